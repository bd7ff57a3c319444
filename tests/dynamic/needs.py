"""Libraries and programs that only some of these tests need."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

REQUIRED = os.environ.get("TEST_STORES_REQUIRED", "0") not in ("", "0")


def needs(module: str) -> Any:
    """Return a module. Without it the tests that ask for it are skipped, or fail where nothing may be missing."""
    return importlib.import_module(module) if REQUIRED else pytest.importorskip(module)

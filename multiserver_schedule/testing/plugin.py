"""The pytest fixture ``run_due``. Pytest loads this itself, before Django is set up: nothing of ours is imported."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest


@pytest.fixture
def run_due(db: None) -> Callable[..., Any]:
    """Run what is due at a moment, inline: ``run_due(datetime(2030, 1, 1, 3, tzinfo=UTC))``."""
    function: Callable[..., Any] = import_module("multiserver_schedule.testing.runs").run_due
    return function

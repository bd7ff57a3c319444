"""The project of these tests: its package is ``tests.shop``, so that ``tests/shop/schedule.py`` is its own schedule."""

from __future__ import annotations

from typing import Any

urlpatterns: list[Any] = []

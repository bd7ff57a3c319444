"""The settings of a fleet's servers, with the project of this package."""

from __future__ import annotations

from tests.fleet.settings import *  # noqa: F403

ROOT_URLCONF = "tests.dynamic.starter.urls"

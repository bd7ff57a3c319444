"""
The settings of a fleet's servers: the tests' own, one of the projects, and what the test wants otherwise.

FLEET_PROJECT names the package, so that its schedule.py is found as the project's own. FLEET_SETTINGS is a JSON object
of keys of MULTISERVER_SCHEDULE, durations in seconds. FLEET_CACHES is the cache "lock", where there is one.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta

from tests.caches import settings_of
from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

DURATIONS = ("LEASE", "HEARTBEAT", "MIN_BREAK", "CATCH_UP", "ABANDONED_AFTER")

# The package is what counts; there is no such module, and runschedule does not look for it.
ROOT_URLCONF = f"tests.fleet.projects.{os.environ.get('FLEET_PROJECT', 'steady')}.urls"
INSTALLED_APPS = [*INSTALLED_APPS, "tests.fleet"]
MULTISERVER_SCHEDULE = {
    key: timedelta(seconds=value) if key in DURATIONS and value is not None else value
    for key, value in json.loads(os.environ.get("FLEET_SETTINGS", "{}")).items()
}
MULTISERVER_SCHEDULE.setdefault("HOUSEKEEPING", False)
DATABASES["default"].setdefault("OPTIONS", {}).update(json.loads(os.environ.get("FLEET_DATABASE_OPTIONS", "{}")))
CACHES = settings_of(os.environ.get("FLEET_CACHES", ""))
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"multiserver_schedule": {"handlers": ["console"], "level": "DEBUG"}},
}

"""
The settings of flood.py: the example project with a queue, and with servers of its own that work on it.

FLOOD_FOLDER is where the servers are; FLOOD_LEAST how many there are at least. Times are short, so that one can watch;
the defaults, for machines that take a minute to start, are twenty seconds and a minute.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

from .settings import *  # noqa: F403
from .settings import BASE_DIR, DATABASES, INSTALLED_APPS, MULTISERVER_SCHEDULE

INSTALLED_APPS = [
    *(app for app in INSTALLED_APPS if app not in ("shop", "reports")),
    "multiserver_schedule.servers",
    "django_tasks_db",
    "letters",
]
ROOT_URLCONF = "letters.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}

if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    # For a dozen processes on one file: readers do not wait for writers, and writers wait for one another in order.
    DATABASES["default"]["OPTIONS"] = {
        "timeout": 30,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
    }

FLOOD_FOLDER = Path(os.environ.get("FLOOD_FOLDER", BASE_DIR / "flood"))
FLOOD_LEAST = int(os.environ.get("FLOOD_LEAST", "1"))
FLOOD_MOST = 4

MULTISERVER_SCHEDULE = {**MULTISERVER_SCHEDULE, "HOUSEKEEPING": False}
MULTISERVER_SCHEDULE_SERVERS = {
    "FLEET": "flood",
    "PROVIDERS": {
        "here": {
            "BACKEND": "multiserver_schedule.servers.providers.process.ProcessProvider",
            "MAX_SERVERS": FLOOD_MOST,
            "OPTIONS": {
                "command": [
                    sys.executable, str(BASE_DIR / "manage.py"), "work", "-v0", "--no-reload", "--no-startup-delay",
                    "--interval=0.2", "--worker-id={name}",
                ],
                "cwd": str(BASE_DIR),
                "directory": str(FLOOD_FOLDER / "servers"),
                "host": "web1",
            },
        }
    },
    "POLL": timedelta(seconds=1),
    "MONITOR_EVERY": timedelta(seconds=2),
}  # fmt: skip

# One machine has three schedulers here, which all see the same processes.
SILENCED_SYSTEM_CHECKS = ["multiserver_schedule.W002", "multiserver_schedule_servers.W001"]

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"multiserver_schedule": {"handlers": ["console"], "level": "WARNING"}},
}

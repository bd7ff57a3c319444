"""The settings of a fleet's servers, with the project of this package and the cloud in SLOW_FOLDER."""

from __future__ import annotations

import os

from tests.fleet.settings import *  # noqa: F403

ROOT_URLCONF = "tests.dynamic.slow.urls"
MULTISERVER_SCHEDULE_SERVERS = {
    "FLEET": "tests",
    "PROVIDERS": {
        "folder": {"BACKEND": "tests.dynamic.cloud.FolderProvider", "OPTIONS": {"folder": os.environ["SLOW_FOLDER"]}}
    },
}

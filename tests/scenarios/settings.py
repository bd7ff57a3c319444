"""The fleet's settings with a project of this package, and what a scene orders by SCENE_… variables."""

from __future__ import annotations

import os

from tests.fleet.settings import *  # noqa: F403
from tests.fleet.settings import LOGGING, MULTISERVER_SCHEDULE

ROOT_URLCONF = f"tests.scenarios.projects.{os.environ['FLEET_PROJECT']}.urls"
MULTISERVER_SCHEDULE.setdefault("LOG_LEVEL", "verbose")

if os.environ.get("SCENE_LOG") == "errors":
    LOGGING["loggers"]["multiserver_schedule"]["level"] = "ERROR"
if os.environ.get("SCENE_LOG") == "hangs":
    LOGGING["handlers"]["hangs"] = {"class": "tests.scenarios.deeds.HangingHandler"}
    LOGGING["loggers"]["multiserver_schedule"]["handlers"].append("hangs")
if os.environ.get("SCENE_SENTRY"):
    import sentry_sdk

    from tests.scenarios.sentry import ToFile

    sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=ToFile)

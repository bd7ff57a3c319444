from __future__ import annotations

import os
from datetime import timedelta

from multiserver_schedule import schedule, service
from tests.fleet.work import work
from tests.scenarios.deeds import NEW_YEAR, YEAR, note_environment

schedule.call(work, seconds=float(os.environ.get("SCENE_SECONDS", "2"))).name("long").cron(NEW_YEAR).catch_up(
    within=YEAR
)
schedule.call(work, seconds=0.05).name("short").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(note_environment).name("environment").cron(NEW_YEAR).catch_up(within=YEAR)
if os.environ.get("SCENE_OFTEN"):
    schedule.call(work, seconds=0.05).name("often").every_second().without_overlapping(min_break=timedelta(0))
if os.environ.get("SCENE_MINUTE"):
    # A minute of so many seconds: the next pass is started so long after this one.
    service.HAND_OVER = timedelta(seconds=float(os.environ["SCENE_MINUTE"]) + 2)

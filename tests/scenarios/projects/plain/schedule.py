from __future__ import annotations

import os

from multiserver_schedule import schedule
from tests.fleet.work import work
from tests.scenarios.deeds import NEW_YEAR, YEAR, ignore_term_with_a_grandchild

for number in range(int(os.environ["SCENE_TASKS"])):
    if os.environ.get("SCENE_STUBBORN") == str(number):
        schedule.call(ignore_term_with_a_grandchild).name(f"task{number}").cron(NEW_YEAR).catch_up(within=YEAR)
    else:
        schedule.call(work, seconds=float(os.environ["SCENE_SECONDS"]), grandchild=True).name(f"task{number}").cron(
            NEW_YEAR
        ).catch_up(within=YEAR)

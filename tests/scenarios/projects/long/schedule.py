from __future__ import annotations

import os

from multiserver_schedule import schedule
from tests.fleet.work import work
from tests.scenarios.deeds import NEW_YEAR, YEAR, hold_the_gil, ignore_term_with_a_grandchild

seconds = float(os.environ["SCENE_SECONDS"])
schedule.call(work, seconds=seconds).name("patient").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(hold_the_gil, seconds=seconds).name("greedy").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(ignore_term_with_a_grandchild).name("limited").cron(NEW_YEAR).catch_up(within=YEAR).ensure_finished(
    seconds=2
)

from __future__ import annotations

from datetime import timedelta

from multiserver_schedule import schedule
from tests.fleet.work import work

for number in range(20):
    task = schedule.call(work, seconds=0.05).name(f"task{number:02}").cron("0 0 1 1 *")
    task.catch_up(within=timedelta(days=366))

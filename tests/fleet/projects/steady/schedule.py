from __future__ import annotations

from multiserver_schedule import schedule
from tests.fleet.work import work

schedule.call(work, seconds=0.3).name("short").every_minute()
schedule.call(work, seconds=8, grandchild=True).name("slow").every_minute()
schedule.call(work, seconds=0.1, fails=True).name("failing").every_minute()

from __future__ import annotations

from multiserver_schedule import schedule
from tests.fleet.work import work

schedule.call(work, seconds=20).name("long").every(seconds=1)

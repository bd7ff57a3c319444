from __future__ import annotations

from multiserver_schedule import schedule
from tests.fleet.work import work

schedule.call(work, seconds=0.2).name("cached").every(seconds=2).lock_with("cache")
schedule.call(work, seconds=4).name("long").every(seconds=3).lock_with("cache")
schedule.call(work, seconds=0.2).name("tabled").every(seconds=2)

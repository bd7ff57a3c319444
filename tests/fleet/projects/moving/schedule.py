from __future__ import annotations

import os

from multiserver_schedule import schedule
from tests.fleet.work import work

lock = os.environ["FLEET_LOCK"]
schedule.call(work, seconds=0.3).name("quick").every(seconds=2).lock_with(lock)
schedule.call(work, seconds=4).name("long").every(seconds=3).lock_with(lock)
schedule.call(work, seconds=0.1).name(os.environ["FLEET_RELEASE"]).every(seconds=3)

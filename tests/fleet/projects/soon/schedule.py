from __future__ import annotations

import os

from multiserver_schedule import schedule
from tests.fleet.work import work

for number in range(20):
    schedule.call(work, seconds=0.05).name(f"task{number:02}").every(seconds=int(os.environ["FLEET_PERIOD"]))

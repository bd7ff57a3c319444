from __future__ import annotations

import os
from datetime import timedelta

from multiserver_schedule import schedule, service
from tests.fleet.work import work

for period in (1, 2, 5):
    schedule.call(work, seconds=0.05).name(f"{period}s").every(seconds=period)
# A minute of so many seconds: the next pass is started so long after this one.
service.HAND_OVER = timedelta(seconds=float(os.environ.get("FLEET_MINUTE", "60")) + 2)

from __future__ import annotations

import os

from multiserver_schedule import schedule
from tests.fleet.work import work

# Longer than a lease, where a server is stopped while it runs.
LONG = ("after_run_sent", "before_renew", "after_renew")

for name in os.environ["FLEET_TASKS"].split(","):
    task = (
        schedule.call(work, seconds=4 if name.startswith(LONG) else 2.2)
        .name(name)
        .every(seconds=int(os.environ["FLEET_PERIOD"]))
    )
    task.only_on(f"web-{name}", "healthy")

from __future__ import annotations

import os
from datetime import timedelta

from multiserver_schedule import schedule
from tests.scenarios.deeds import long_with_a_sleep

for victim in os.environ["SCENE_VICTIMS"].split(","):
    task = schedule.call(long_with_a_sleep).name(victim).every_minute().only_on(victim, "healthy")
    task.catch_up(all=True).without_overlapping(min_break=timedelta(0))

from __future__ import annotations

import os
from datetime import timedelta

from multiserver_schedule import schedule
from tests.scenarios.deeds import long_with_a_sleep, until_the_moment

at = os.environ["SCENE_AT"]
schedule.call(long_with_a_sleep).name("killed").daily_at(at).catch_up(within=timedelta(days=2))
schedule.call(until_the_moment).name("triggered").daily_at(at).without_overlapping(min_break=timedelta(seconds=4))

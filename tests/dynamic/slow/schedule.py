from __future__ import annotations

from datetime import timedelta

from multiserver_schedule import schedule
from tests.fleet.work import work

schedule.call(work, seconds=0.02).name("often").every_second().without_overlapping(min_break=timedelta(0))

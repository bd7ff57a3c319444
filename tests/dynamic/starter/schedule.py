from __future__ import annotations

from datetime import timedelta

from multiserver_schedule import schedule

from .deeds import start_a_worker, start_a_worker_and_go_on

YEAR = timedelta(days=366)

schedule.call(start_a_worker).name("starts").cron("0 0 1 1 *").catch_up(within=YEAR)
schedule.call(start_a_worker_and_go_on).name("goes-on").cron("0 0 1 1 *").catch_up(within=YEAR)

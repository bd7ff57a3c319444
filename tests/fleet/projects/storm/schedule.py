from __future__ import annotations

from datetime import timedelta

from multiserver_schedule import schedule
from tests.fleet.work import work

schedule.call(work, seconds=0.2).name("quick").every(seconds=2)
schedule.call(work, seconds=4).name("long").every(seconds=3)
schedule.call(work, seconds=3.5, grandchild=True).name("family").every(seconds=5)
schedule.call(work, seconds=2.5).name("side").every(seconds=2).overlap("allow")
schedule.call(work, seconds=0.1, fails=True).name("failing").every(seconds=5)
schedule.call(work, seconds=0.5).name("all").every(seconds=4).catch_up(all=True)
schedule.call(work, seconds=0.2).name("own").every(seconds=6).on_every_server()
schedule.call(work, seconds=0.2).name("chosen").every(seconds=4).only_on("web2")
schedule.call(work, seconds=0.3).name("rested").every(seconds=4).without_overlapping(min_break=timedelta(seconds=3))

from __future__ import annotations

from multiserver_schedule import schedule
from tests.fleet.work import work
from tests.scenarios import deeds
from tests.scenarios.deeds import NEW_YEAR, YEAR

schedule.call(work, seconds=0.1).name("well").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.fails).name("fails").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.exits, 3).name("exits-3").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.exits, 0).name("exits-0").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.dies).name("dies").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.leaves_without_a_result).name("leaves").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.leaves_a_transaction_open).name("open").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(deeds.prints_much).name("prints").cron(NEW_YEAR).catch_up(within=YEAR)
schedule.call(work, seconds=0.1).name("well-too").cron(NEW_YEAR).catch_up(within=YEAR)

from __future__ import annotations

from multiserver_schedule import schedule
from tests.scenarios.deeds import NEW_YEAR, YEAR, note_sessions

for number in range(4):
    schedule.call(note_sessions).name(f"task{number}").cron(NEW_YEAR).catch_up(within=YEAR).only_on(f"web{number}")

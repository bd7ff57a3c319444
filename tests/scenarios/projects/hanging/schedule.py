from __future__ import annotations

import os
from typing import Any

from multiserver_schedule import schedule, signals
from tests.fleet.work import work
from tests.scenarios.deeds import NEW_YEAR, YEAR, asks_and_hangs, fails, hang

for what in ("when", "receiver", "handler"):
    task = schedule.call(work, seconds=float(os.environ["SCENE_SECONDS"])).name(f"beside-{what}")
    task.cron(NEW_YEAR).catch_up(within=YEAR).only_on(f"{what}-hangs", "rival")
    task = schedule.call(fails).name(what).cron(NEW_YEAR).catch_up(within=YEAR).only_on(f"{what}-hangs", "rival")
    if what == "when":
        task.when(asks_and_hangs)


def receiver(sender: Any, task: Any, **more: Any) -> None:
    if task is not None and task.name == "receiver":
        hang("receiver")


if os.environ.get("SCENE_HANGS") == "receiver":
    signals.task_failed.connect(receiver)
    signals.ensure_cleanup_executed.connect(receiver)

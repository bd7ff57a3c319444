"""
Our own tasks: the scheduler's lock is the fleet's leader election, and its recovery the fleet's.

One for each provider, so that one that is slow or away holds up nothing else. Without providers there is none.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from multiserver_schedule import conf as schedule_conf
from multiserver_schedule import schedule

from . import conf

settings = conf.load()


def bounded(task: Any, minutes: int) -> None:
    """End a run that hangs, where this server's runner can."""
    if schedule_conf.load().runner != "inline":
        task.ensure_finished(minutes=minutes)


if settings.providers:
    monitor = (
        schedule.call("multiserver_schedule.servers.monitor.run")
        .name("multiserver_schedule_servers.monitor")
        .every(settings.monitor_every)
    )
    bounded(monitor, 5)
    prune = (
        schedule.call("multiserver_schedule.servers.operate.housekeep")
        .name("multiserver_schedule_servers.prune")
        .daily_at("03:40")
        .jitter(minutes=60)
    )
    bounded(prune, 30)
for name, limits in settings.providers.items():
    reconcile = (
        schedule.call("multiserver_schedule.servers.reconcile.run", name)
        .name(f"multiserver_schedule_servers.reconcile.{name}")
        # What is new is begun soon, however seldom a provider is asked about what it has begun.
        .every(min(settings.poll, timedelta(seconds=20)))
    )
    if limits.only_on:
        reconcile.only_on(*limits.only_on)
    bounded(reconcile, 10)

"""
Our own tasks, declared by discovery unless the setting HOUSEKEEPING is False.

Not a ``schedule.py``: that would stand in the place of the ``schedule`` that users import. What is run is named by its
dotted path, so that a pass does not import it.
"""

from __future__ import annotations

from . import conf
from .declare import schedule

prune = (
    schedule.call("multiserver_schedule.operate.pruning.housekeep")
    .name("multiserver_schedule.prune")
    .daily_at("03:20")
    .jitter(minutes=60)
)
if conf.load().runner != "inline":  # which can end nothing; the work is bounded by itself, too
    prune.ensure_finished(minutes=30)

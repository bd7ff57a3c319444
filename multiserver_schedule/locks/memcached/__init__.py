"""
The lock in one Memcached server: a JSON row for each task, written by ``gets`` and ``cas`` and by nothing else.

A row carries what a ``ScheduledLock`` does, so that one compare-and-set takes the lock and moves ``last_due_at``. Keys
that only ``add`` guards are no lock: whoever is frozen while one is deleted wins the same due time again (measured).

N is the server's own clock. It tells whole seconds and counts them a little late, so a lower bound judges what is due
and what has ended, and an upper bound is written. A row, the list of names, or everything may be lost at any moment:
that is noticed, ``sync`` puts it right, and nobody claims until a live owner has had the time to come back.

``lock.py`` answers the questions of a pass, ``mend.py`` puts right what was lost; ``items.py`` reads and changes items
over the one connection of ``line.py``. ``rows.py`` knows what an item holds, ``steps.py`` what it becomes by each step.
"""

from .lock import MemcachedLock as MemcachedLock

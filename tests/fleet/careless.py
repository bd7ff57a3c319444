"""What the attacks have to find: cache locks that let somebody start at once where a row was lost, its owner or not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock


def careless_lock(alias: str, options: Mapping[str, Any]) -> BaseLock:
    """Return the lock that fits the cache, without the time that it gives to live owners to come back."""
    lock = CacheLock(alias, options)
    module: Any = sys.modules[type(lock).__module__]
    assert module.longest_lease
    module.longest_lease = lambda declared: timedelta(0)
    if type(lock).__name__ == "MemcachedLock":
        from multiserver_schedule.locks.memcached import line

        line.UNCERTAIN = line.SHIFT = 0  # type: ignore[misc]
        lock._longest = timedelta(0)  # type: ignore[attr-defined]
    return lock

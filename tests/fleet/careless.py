"""What the attacks have to find: cache locks that let somebody start at once where a row was lost, its owner or not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.memcached import line, mend


def careless_lock(alias: str, options: Mapping[str, Any]) -> BaseLock:
    """Return the lock that fits the cache, without the time that it gives to live owners to come back."""
    lock: Any = CacheLock(alias, options)
    where = mend if type(lock).__name__ == "MemcachedLock" else sys.modules[type(lock).__module__]
    module: Any = where
    assert module.longest_lease
    module.longest_lease = lambda declared: timedelta(0)
    if where is mend:
        line.UNCERTAIN = line.SHIFT = 0  # type: ignore[misc]
        assert lock._mending.longest
        lock._mending.longest = timedelta(0)
    return cast("BaseLock", lock)

"""
``BACKEND`` for whoever has a cache and does not care how it is done: the alias's own backend says which lock it is.

A cache lock is an efficiency lock: see docs/locks.rst for what each store promises and what breaks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from django.core.cache import caches
from django.utils.module_loading import import_string

from ..exceptions import ConfigurationError
from .base import BaseLock

BACKENDS: Final[Mapping[str, str]] = {
    "django_redis.cache.RedisCache": "multiserver_schedule.locks.redis.RedisLock",
    "django.core.cache.backends.redis.RedisCache": "multiserver_schedule.locks.redis.RedisLock",
    "django.core.cache.backends.memcached.BaseMemcachedCache": "multiserver_schedule.locks.memcached.MemcachedLock",
}
"""Which lock a cache backend, or one derived from it, is used through."""

REFUSED: Final[Mapping[str, str]] = {
    "django.core.cache.backends.locmem.LocMemCache": "each process has one of its own, and would run every task",
    "django.core.cache.backends.dummy.DummyCache": "it keeps nothing, and says yes to everybody",
    "django.core.cache.backends.filebased.FileBasedCache": "it looks and then writes, and other servers do not see it",
    # Measured: 195 winners for 60 keys, with six processes.
    "django.core.cache.backends.db.DatabaseCache": "it looks and then writes: several servers win the same lock",
}
"""What is no lock, and why."""


class UnsuitableCache(ConfigurationError):
    """No lock can be made of this cache."""


class CacheLock(BaseLock):
    """Becomes the lock that fits the cache alias ``OPTIONS["cache"]``: ``RedisLock`` or ``MemcachedLock``."""

    def __new__(cls, alias: str, options: Mapping[str, Any]) -> BaseLock:  # type: ignore[misc]
        """
        Return the lock for this cache.

        Raises UnsuitableCache where the cache cannot be one, ConfigurationError where there is no such cache.
        """
        chosen: type[BaseLock] = import_string(BACKENDS[backend_of(options.get("cache", "default"))])
        return chosen(alias, options)


def backend_of(cache: str) -> str:
    """Return the key of ``BACKENDS`` that fits this cache alias; raises as ``CacheLock`` does."""
    if cache not in caches.settings:
        known = ", ".join(sorted(caches.settings))
        raise ConfigurationError(f"There is no cache {cache!r} in CACHES. Known are: {known}.")
    named = caches.settings[cache]["BACKEND"]
    line = [f"{each.__module__}.{each.__qualname__}" for each in import_string(named).__mro__]
    for each in line:
        if each in BACKENDS:
            return each
        if each in REFUSED:
            raise UnsuitableCache(f"The cache {cache!r} ({named}) is no lock: {REFUSED[each]}.")
    raise UnsuitableCache(
        f"The cache {cache!r} ({named}) is not known to be a lock. Known are django-redis, and Django's own backends "
        "for Redis and Memcached."
    )

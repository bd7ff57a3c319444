"""Which caches this run of the tests covers as the place of locks, and why not the others."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import servers, stores

ALIAS = "lock"
LOCMEM = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}


@dataclass(frozen=True, slots=True)
class Way:
    """A server and a cache backend that leads to it."""

    server: str
    """One of servers.KINDS."""
    kind: str
    """redis or memcached."""
    driver: str
    backend: str


DJANGO_REDIS = "django_redis.cache.RedisCache"
REDIS_CACHE = "django.core.cache.backends.redis.RedisCache"
PYMEMCACHE = "django.core.cache.backends.memcached.PyMemcacheCache"
WAYS = {
    "django-redis": Way("redis", "redis", "django_redis", DJANGO_REDIS),
    "django-rediscache": Way("redis", "redis", "redis", REDIS_CACHE),
    "redis6": Way("redis6", "redis", "django_redis", DJANGO_REDIS),
    "valkey": Way("valkey", "redis", "redis", REDIS_CACHE),
    "memcached": Way("memcached", "memcached", "pymemcache", PYMEMCACHE),
}
NAMES = tuple(WAYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStore:
    """A cache that a test's locks live in: up, empty, and in this process the alias "lock"."""

    name: str
    """One of NAMES."""
    kind: str
    """redis or memcached."""
    django_settings: dict[str, Any]
    """Its entry in CACHES."""
    server: servers.Server
    """To freeze, to crash and to restart."""

    @property
    def alias(self) -> str:
        return ALIAS

    def as_json(self) -> str:
        """Return its entry in CACHES as text, for another process's environment: ``settings_of`` reads it there."""
        return json.dumps(self.django_settings)


def settings_of(text: str = "") -> dict[str, Any]:
    """Return Django's CACHES, with the alias "lock" as ``CacheStore.as_json`` put it where there is such a text."""
    return {"default": LOCMEM, **({ALIAS: json.loads(text)} if text else {})}


def missing(name: str) -> str:
    """Return why this cache cannot be tested here, or "" when it can."""
    if name not in stores.chosen(NAMES):
        return "not in TEST_STORES"
    if importlib.util.find_spec(WAYS[name].driver) is None:
        return f"no Python driver {WAYS[name].driver}"
    return servers.missing(WAYS[name].server)


def of(name: str, server: servers.Server, **entry: Any) -> CacheStore:
    """
    Return the store of this name on a server of the caller's own: a replica, a cluster's node, one with little memory.

    More keys go into its entry in CACHES: ``of("django-redis", server, OPTIONS={"IGNORE_EXCEPTIONS": True})``.
    """
    way = WAYS[name]
    return CacheStore(
        name=name,
        kind=way.kind,
        django_settings={
            "BACKEND": way.backend,
            "LOCATION": server.url if way.kind == "redis" else f"127.0.0.1:{server.port}",
            # Neither is the default, so that whoever forgets them reads nothing.
            "KEY_PREFIX": "project",
            "VERSION": 7,
            **entry,
        },
        server=server,
    )


@contextlib.contextmanager
def in_use(store: CacheStore) -> Iterator[CacheStore]:
    """Make it the alias "lock" of this process for the length of the block, and leave no connection to it behind."""
    from django.test import override_settings  # This module is for settings, too.

    with override_settings(CACHES={"default": LOCMEM, ALIAS: store.django_settings}):
        try:
            yield store
        finally:
            disconnect()


def disconnect() -> None:
    """Close the connections of this process to all caches, which their ``close()`` leaves open for Redis."""
    from django.core.cache import caches

    for cache in caches.all(initialized_only=True):
        # Django's RedisCache has a client, and that has a pool for each of its servers.
        client = getattr(cache, "_cache", None)
        for pool in getattr(client, "_pools", {}).values():
            pool.disconnect()
        cache.close()
    if importlib.util.find_spec("django_redis") is not None:
        from django_redis.pool import ConnectionFactory

        # One pool for a URL, in the whole process, with the options of whoever came first.
        for pool in ConnectionFactory._pools.values():
            pool.disconnect()
        ConnectionFactory._pools.clear()

"""
``manage.py check``: what would run a task twice or never is an Error, what may surprise is a Warning.

Each id is used once, and is listed in docs/checks.rst.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from django.apps import apps
from django.conf import settings as project
from django.core.cache import DEFAULT_CACHE_ALIAS, caches
from django.core.checks import CheckMessage, Error, Tags, Warning
from django.core.checks import register as register_check
from django.db import DatabaseError, connections, router
from django.utils.module_loading import import_string

from . import conf
from .declare import discover_errors, registry, verify
from .exceptions import ScheduleError
from .locks.base import BaseLock
from .locks.cache import UnsuitableCache, backend_of

TAG = "multiserver_schedule"
CACHE_LOCKS: Final = (
    "multiserver_schedule.locks.cache.CacheLock",
    "multiserver_schedule.locks.redis.RedisLock",
    "multiserver_schedule.locks.memcached.MemcachedLock",
)
DJANGO_REDIS: Final = "django_redis.cache.RedisCache"
MEMCACHED: Final = "django.core.cache.backends.memcached.BaseMemcachedCache"
MODELS = ("ScheduledLock", "ScheduledRun", "CleanupLog", "ScheduleState")


def register() -> None:
    """Register every check; called once, by the app."""
    register_check(check_settings, TAG)
    register_check(check_locks, TAG)
    register_check(check_declarations, TAG)
    register_check(check_stores, Tags.database)


def check_settings(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E001 a setting is wrong, E002 USE_TZ."""
    found: list[CheckMessage] = []
    hint = "See the README's list of settings."
    try:
        settings = conf.load()
        hint = "Write the dotted path of a function that says whether the project is in maintenance mode."
        conf.imported(settings.maintenance_mode)
    except ScheduleError as error:
        found.append(Error(str(error), hint=hint, id="multiserver_schedule.E001"))
    if not project.USE_TZ:
        found.append(
            Error(
                "USE_TZ is False: due times could not be told apart when clocks change.",
                hint="Set USE_TZ = True.",
                id="multiserver_schedule.E002",
            )
        )
    return found


def check_locks(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E004 a backend that cannot be used, E007 not shared, E008 no such database, E018 two locks in one database."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = []
    in_databases: dict[object, str] = {}
    for alias, chosen in settings.locks.items():
        where = f"{conf.SETTING}['LOCKS'][{alias!r}]"
        wrong = _check_cache(where, chosen)
        if wrong:
            found.extend(wrong)
            continue
        try:
            lock = _lock(alias, chosen)
        except Exception as error:
            found.append(
                Error(
                    f"{where}: {error}",
                    hint=f"The lock through the database is {conf.ORM_LOCK!r}.",
                    id="multiserver_schedule.E004",
                )
            )
            continue
        if not lock.shared:
            found.append(
                Error(
                    f"{where}: other servers do not see this lock, so that each would run every task.",
                    hint=f"Use a lock that all servers share, such as {conf.ORM_LOCK!r}.",
                    id="multiserver_schedule.E007",
                )
            )
        if lock.using not in connections.settings:
            found.append(
                Error(
                    f"{where}: there is no database {lock.using!r}.",
                    hint=f"Known are: {', '.join(sorted(connections.settings))}.",
                    id="multiserver_schedule.E008",
                )
            )
        elif lock.transactional:
            found.extend(_check_database(lock.using, where))
            other = in_databases.setdefault(_database(lock.using), alias)
            if other != alias:
                found.append(
                    Error(
                        f"{where}: its database is that of the lock {other!r}, and so the two would have the same rows "
                        "and take each other for another version of the project.",
                        hint=f"Use {other!r} for all tasks that are locked in this database, and remove {alias!r}.",
                        id="multiserver_schedule.E018",
                    )
                )
    return found


def _lock(alias: str, chosen: conf.LockSettings) -> BaseLock:
    backend = import_string(chosen.backend)
    if not (isinstance(backend, type) and issubclass(backend, BaseLock)):
        raise TypeError(f"{chosen.backend} is not a lock: it should be a subclass of BaseLock")
    lock: BaseLock = backend(alias, chosen.options)
    return lock


def _cache_of(chosen: conf.LockSettings) -> str | None:
    """Return the alias of the cache that this lock is in, or None where it is in none."""
    return str(chosen.options.get("cache", DEFAULT_CACHE_ALIAS)) if chosen.backend in CACHE_LOCKS else None


def _check_cache(where: str, chosen: conf.LockSettings) -> list[CheckMessage]:
    """E013 no lock can be made of it, E014 no such cache, E015 errors ignored, E016 several servers, E017 no client."""
    cache = _cache_of(chosen)
    if cache is None:
        return []
    if cache not in caches.settings:
        return [
            Error(
                f"{where}: there is no cache {cache!r} in CACHES.",
                hint=f"Known are: {', '.join(sorted(caches.settings))}.",
                id="multiserver_schedule.E014",
            )
        ]
    given = caches.settings[cache]
    named = str(given["BACKEND"])
    if named.startswith("django_redis.") and not _is_installed("django_redis"):
        return [_no_client(where, cache, "django-redis", "redis")]
    try:
        kind = backend_of(cache)
    except UnsuitableCache as error:
        return [
            Error(
                f"{where}: {error}",
                hint="Use a Redis, Valkey or Memcached that all servers share, or the lock through the database, "
                f"{conf.ORM_LOCK!r}.",
                id="multiserver_schedule.E013",
            )
        ]
    except Exception:  # a backend that cannot be imported: whoever makes the lock says it
        return []
    if kind == MEMCACHED:
        if not _is_installed("pymemcache"):
            return [_no_client(where, cache, "pymemcache", "memcached")]
        return _check_servers(where, cache, given)
    if not _is_installed("redis"):
        return [_no_client(where, cache, "redis", "redis")]
    return _check_exceptions(where, cache, given) if kind == DJANGO_REDIS else []


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _no_client(where: str, cache: str, package: str, extra: str) -> CheckMessage:
    return Error(
        f"{where}: the cache {cache!r} needs the package {package}, which is not installed.",
        hint=f'pip install "multiserver-schedule[{extra}]"',
        id="multiserver_schedule.E017",
    )


def _check_servers(where: str, cache: str, given: Mapping[str, Any]) -> list[CheckMessage]:
    location = given.get("LOCATION", "")
    servers = [each for each in (re.split("[;,]", location) if isinstance(location, str) else location) if each]
    if len(servers) == 1:
        return []
    return [
        Error(
            f"{where}: the cache {cache!r} has {len(servers)} Memcached servers: what one of them holds is lost to the "
            "others while it is away.",
            hint=f"Name exactly one server in CACHES[{cache!r}]['LOCATION'], in a cache of its own for the locks.",
            id="multiserver_schedule.E016",
        )
    ]


def _check_exceptions(where: str, cache: str, given: Mapping[str, Any]) -> list[CheckMessage]:
    by_default = getattr(project, "DJANGO_REDIS_IGNORE_EXCEPTIONS", False)
    if not given.get("OPTIONS", {}).get("IGNORE_EXCEPTIONS", by_default):
        return []
    return [
        Error(
            f"{where}: the cache {cache!r} ignores errors (IGNORE_EXCEPTIONS): a Redis that is away looks empty then.",
            hint=f"Set CACHES[{cache!r}]['OPTIONS']['IGNORE_EXCEPTIONS'] = False, or use another alias for the locks.",
            id="multiserver_schedule.E015",
        )
    ]


def _database(using: str) -> object:
    """Return what two aliases of one database have in common."""
    given = connections.settings[using]
    return tuple(str(given.get(key, "")) for key in ("ENGINE", "NAME", "HOST", "PORT"))


def _check_database(using: str, where: str) -> list[CheckMessage]:
    """E005 a database with a TIME_ZONE, E006 models elsewhere, W001 SQLite."""
    found: list[CheckMessage] = []
    if connections.settings[using].get("TIME_ZONE"):
        found.append(
            Error(
                f"{where}: the database {using!r} has a TIME_ZONE, so that its times and the lock's would differ.",
                hint=f"Remove TIME_ZONE from DATABASES[{using!r}], or use another alias for the lock.",
                id="multiserver_schedule.E005",
            )
        )
    for name in MODELS:
        model = apps.get_model("multiserver_schedule", name)
        if router.db_for_write(model) != using:
            found.append(
                Error(
                    f"{where}: {name} is routed to {router.db_for_write(model)!r}, but the lock is in {using!r}.",
                    hint="Route all models of multiserver_schedule to the lock's database: a claim and its record are "
                    "one transaction.",
                    id="multiserver_schedule.E006",
                )
            )
            break
    if connections[using].vendor == "sqlite" and not project.DEBUG and "test" not in sys.argv:
        found.append(
            Warning(
                f"{where}: SQLite is a database of one machine; servers on other machines would not see the lock.",
                hint="Use PostgreSQL, MariaDB or MySQL for several servers; silence this where there is one.",
                id="multiserver_schedule.W001",
            )
        )
    return found


def check_declarations(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E010 a broken schedule.py, E011 a task that cannot run, E003 a limit that nothing enforces, W002 sub-minute."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = [
        Error(str(broken), hint=broken.traceback, id="multiserver_schedule.E010") for broken in discover_errors()
    ]
    if found:
        return found
    try:
        tasks = registry.tasks
    except ScheduleError as error:  # declared outside a schedule.py: in a models.py, in ready()
        return [Error(str(error), hint="Correct the declaration.", id="multiserver_schedule.E009")]
    subminute = []
    for task in tasks.values():
        place = f"{task.file}, line {task.line}: {task.name}"
        found.extend(
            Error(f"{place}: {problem}", hint="Correct the declaration.", id="multiserver_schedule.E011")
            for problem in verify(task)
        )
        if task.limit is not None and settings.runner == "inline":
            found.append(
                Error(
                    f"{place}: ensure_finished cannot be kept, since the runner 'inline' cannot end a run.",
                    hint=f"Remove RUNNER from {conf.SETTING}, or ensure_finished from the task.",
                    id="multiserver_schedule.E003",
                )
            )
        gap = task.timetable.shortest_gap()
        if task.min_break is None and settings.min_break is not None and settings.min_break >= gap:
            found.append(
                Error(
                    f"{place}: MIN_BREAK ({settings.min_break}) is not under its period ({gap}): never on time.",
                    hint=f"Give the task its own: .without_overlapping(min_break={_suggest(gap)!r}).",
                    id="multiserver_schedule.E012",
                )
            )
        # Not our own: a project that has them has no choice, and is told in the docs.
        if task.timetable.is_subminute and not task.name.startswith("multiserver_schedule"):
            subminute.append(task.name)
    if subminute:
        found.append(
            Warning(
                f"{len(subminute)} task(s) are due more than once a minute ({', '.join(subminute[:3])}): under cron "
                "every server keeps a pass resident for the whole minute.",
                hint="That is fine where it is meant; silence this then.",
                id="multiserver_schedule.W002",
            )
        )
    return found


def check_stores(app_configs: Any = None, databases: Sequence[str] | None = None, **options: Any) -> list[CheckMessage]:
    """W003 the store's clock is another, W004 a Redis that evicts, W005 a cache that does not answer."""
    try:
        settings = conf.load()
    except ScheduleError:
        return []
    found: list[CheckMessage] = []
    for alias, chosen in settings.locks.items():
        where = f"{conf.SETTING}['LOCKS'][{alias!r}]"
        if not databases or _check_cache(where, chosen):
            continue
        try:
            lock = _lock(alias, chosen)
        except Exception:  # noqa: S112 - E004 says it
            continue
        if lock.transactional:
            if lock.using in databases:
                with suppress(DatabaseError):  # before the first migrate; a database that is away, Django says itself
                    found.extend(_check_clock(lock, where, f"the database {lock.using!r}"))
            continue
        try:
            found.extend(_check_clock(lock, where, "its store"))
            found.extend(_check_eviction(where, _cache_of(chosen)))
        except Exception as error:  # whatever a client raises: what it keeps from running is no reason to keep a deploy
            found.append(
                Warning(
                    f"{where}: its store does not answer ({type(error).__name__}: {error}), so that nothing could be "
                    "checked in it. While it is away, none of its tasks runs.",
                    hint="See that the server is up, and that this one may reach it.",
                    id="multiserver_schedule.W005",
                )
            )
        finally:
            lock.close()
    return found


def _check_clock(lock: BaseLock, where: str, store: str) -> list[CheckMessage]:
    offset = datetime.now(timezone.utc) - lock.clock()
    if abs(offset) <= timedelta(seconds=5):
        return []
    return [
        Warning(
            f"{where}: the clocks of this server and of {store} differ by {abs(offset)}.",
            hint="Due times follow the store's clock; cron starts by the server's. Synchronise both (NTP).",
            id="multiserver_schedule.W003",
        )
    ]


def _check_eviction(where: str, cache: str | None) -> list[CheckMessage]:
    if cache is None or backend_of(cache) == MEMCACHED:
        # Every Memcached evicts: docs/locks.rst says what then.
        return []
    backend: Any = caches[cache]
    # INFO and not CONFIG, which hosted servers forbid.
    client = backend._cache.get_client(write=True) if hasattr(backend, "_cache") else backend.client.get_client(True)
    memory = client.info("memory")
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    # The volatile policies evict what has an end of its own, and the lock's keys have none.
    if not policy.startswith("allkeys-") or memory.get("maxmemory") == 0:
        return []
    return [
        Warning(
            f"{where}: the Redis of the cache {cache!r} evicts whatever it likes when its memory is full "
            f"(maxmemory-policy {policy}), and locks with it. What was due meanwhile is passed over then.",
            hint="Give the locks a Redis of their own with maxmemory-policy noeviction, or use the lock through the "
            f"database, {conf.ORM_LOCK!r}.",
            id="multiserver_schedule.W004",
        )
    ]


def _suggest(gap: timedelta) -> timedelta:
    return gap / 6

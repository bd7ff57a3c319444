"""What ``manage.py check`` says, and that each of its ids is used once and documented."""

from __future__ import annotations

import importlib.util
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.core.cache.backends.base import BaseCache
from django.core.checks import CheckMessage, run_checks
from django.db import connections
from django.test import override_settings
from django.utils import timezone

from multiserver_schedule import schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.testing.contract import Notes, Server, a_task

from .caches import DJANGO_REDIS, PYMEMCACHE, REDIS_CACHE, CacheStore

ROOT = Path(__file__).resolve().parent.parent
ORM = "multiserver_schedule.locks.orm.ORMLock"
CACHED: dict[str, Any] = {"BACKEND": "multiserver_schedule.locks.cache.CacheLock", "OPTIONS": {"cache": "lock"}}
NOBODY = {DJANGO_REDIS: "redis://127.0.0.1:1/0", REDIS_CACHE: "redis://127.0.0.1:1/0", PYMEMCACHE: "127.0.0.1:1"}
"""Where nobody answers, for each backend."""
CLIENTS = {DJANGO_REDIS: "django_redis", REDIS_CACHE: "redis", PYMEMCACHE: "pymemcache"}


def needs(*backends: str) -> pytest.MarkDecorator:
    """Skip a test where the client of one of these is not installed."""
    missing = [CLIENTS[backend] for backend in backends if importlib.util.find_spec(CLIENTS[backend]) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no Python driver {', '.join(missing)}")


EACH = [pytest.param(backend, marks=needs(backend)) for backend in NOBODY]


class NotSharedLock(ORMLock):
    """A lock as LocMem's would be."""

    shared = False


class OwnCache(BaseCache):
    """A cache that somebody wrote."""


def ids(**settings: Any) -> list[str]:
    with override_settings(MULTISERVER_SCHEDULE=settings):
        return [str(message.id).partition(".")[2] for message in run_checks(tags=["multiserver_schedule"])]


@pytest.fixture(autouse=True)
def _nothing_declared() -> Any:
    with registry.set_aside(), override_settings(DEBUG=True):
        yield


def test_an_empty_project_is_fine() -> None:
    assert ids() == []


def test_an_unknown_key_is_an_error() -> None:
    assert ids(LEASES=1) == ["E001"]


@pytest.mark.parametrize("path", ["shop.nope", "tests.shop.work.nope", "nope"])
def test_a_maintenance_mode_that_is_not_there_is_an_error(path: str) -> None:
    with override_settings(MULTISERVER_SCHEDULE={"MAINTENANCE_MODE": path}):
        [error] = run_checks(tags=["multiserver_schedule"])
    assert error.id == "multiserver_schedule.E001"
    assert f"MULTISERVER_SCHEDULE['MAINTENANCE_MODE'] {path!r} cannot be imported: " in error.msg
    assert "dotted path of a function" in str(error.hint)


def test_a_maintenance_mode_that_is_there_is_not_called_by_the_check() -> None:
    assert ids(MAINTENANCE_MODE="tests.shop.work.fail") == []


def test_use_tz_false_is_an_error() -> None:
    with override_settings(USE_TZ=False):
        assert "E002" in ids()


def test_a_limit_that_the_inline_runner_cannot_keep_is_an_error() -> None:
    schedule.call("time.sleep", 0).hourly().ensure_finished(minutes=1).name("a.b")
    assert ids(RUNNER="inline") == ["E003"]
    assert ids() == []


@pytest.mark.parametrize("backend", ["no.such.Lock", "django.core.cache.cache", "datetime.datetime"])
def test_a_backend_that_is_no_lock_is_an_error(backend: str) -> None:
    assert ids(LOCKS={"default": {"BACKEND": backend}}) == ["E004"]


def test_an_unknown_option_of_the_lock_is_an_error() -> None:
    assert ids(LOCKS={"default": {"BACKEND": ORM, "OPTIONS": {"usin": "default"}}}) == ["E004"]


def test_a_time_zone_on_the_locks_database_is_an_error(settings: Any) -> None:
    connections.settings["default"]["TIME_ZONE"], before = "Europe/Berlin", connections.settings["default"]["TIME_ZONE"]
    try:
        assert ids() == ["E005"]
    finally:
        connections.settings["default"]["TIME_ZONE"] = before


class Elsewhere:
    """A router that sends everything away."""

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "other"


def test_models_routed_elsewhere_than_the_lock_are_an_error() -> None:
    with override_settings(DATABASE_ROUTERS=["tests.test_checks.Elsewhere"]):
        assert ids() == ["E006"]


def test_a_lock_that_other_servers_do_not_see_is_an_error() -> None:
    assert ids(LOCKS={"default": {"BACKEND": "tests.test_checks.NotSharedLock"}}) == ["E007"]


def test_a_database_that_is_not_there_is_an_error() -> None:
    assert ids(LOCKS={"default": {"BACKEND": ORM, "OPTIONS": {"using": "replica"}}}) == ["E008"]


def test_a_wrong_declaration_outside_of_a_schedule_is_an_error() -> None:
    schedule.call("time.sleep", 0).name("a.b")
    assert ids() == ["E009"]


def test_a_broken_schedule_is_an_error_that_shows_its_traceback(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    with override_settings(MULTISERVER_SCHEDULE={}):
        [error] = run_checks(tags=["multiserver_schedule"])
    assert error.id == "multiserver_schedule.E010"
    assert "no_such_module_of_somebody" in str(error.hint) and "Traceback" in str(error.hint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('schedule.command("a").every_five_minute()', ["Did you mean .every_five_minutes()?"]),
        ("schedule.hourly()", ["no declaration starts with schedule.hourly"]),
        ('schedule.exec("pg_dump", "-Fc")', ["schedule.exec(): too many positional arguments"]),
        ("schedule.call(refresh)", ["NameError: name 'refresh' is not defined"]),
    ],
)
def test_a_mistake_in_a_schedule_is_told_with_its_file_and_line(
    text: str, said: list[str], settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"mistaken_{abs(hash(text))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "schedule.py").write_text(f"from multiserver_schedule import schedule\n\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings.ROOT_URLCONF = f"{package}.urls"
    with override_settings(MULTISERVER_SCHEDULE={}):
        [error] = run_checks(tags=["multiserver_schedule"])
    assert error.id == "multiserver_schedule.E010"
    place = f"{package}.schedule cannot be read: {tmp_path / package / 'schedule.py'}:3: "
    assert [part for part in (place, *said) if part not in error.msg] == []


def test_a_command_that_is_not_there_is_an_error_that_names_the_nearest() -> None:
    schedule.command("clearsesions").daily()
    with override_settings(MULTISERVER_SCHEDULE={}):
        [error] = run_checks(tags=["multiserver_schedule"])
    assert error.id == "multiserver_schedule.E011"
    assert "clearsessions" in error.msg and __file__ in error.msg


def test_a_break_for_all_that_is_longer_than_a_period_is_an_error() -> None:
    schedule.call("time.sleep", 0).every_minute().name("a.b")
    assert ids(MIN_BREAK=timedelta(minutes=2)) == ["E012"]


def test_sqlite_in_production_is_a_warning() -> None:
    with override_settings(DEBUG=False):
        assert ids() == ["W001"]


def test_a_task_every_second_is_a_warning() -> None:
    schedule.call("time.sleep", 0).every_second().name("a.b")
    assert ids() == ["W002"]


# -- locks in caches --------------------------------------------------------------------------------------------------


def of_cache(settings: dict[str, Any], **options: Any) -> list[CheckMessage]:
    """Return what is said of a project whose locks are all in this cache."""
    lock = {**CACHED, "OPTIONS": {**CACHED["OPTIONS"], **options}}
    with override_settings(CACHES={"lock": settings}, MULTISERVER_SCHEDULE={"LOCKS": {"default": lock}}):
        return run_checks(tags=["multiserver_schedule"])


def ids_of_cache(settings: dict[str, Any], **options: Any) -> list[str]:
    return [str(message.id).partition(".")[2] for message in of_cache(settings, **options)]


@pytest.mark.parametrize("backend", EACH)
def test_redis_and_memcached_are_fine_without_being_asked(backend: str) -> None:
    assert ids_of_cache({"BACKEND": backend, "LOCATION": NOBODY[backend]}) == []


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("django.core.cache.backends.locmem.LocMemCache", "each process has one of its own"),
        ("django.core.cache.backends.dummy.DummyCache", "it keeps nothing"),
        ("django.core.cache.backends.filebased.FileBasedCache", "other servers do not see it"),
        ("django.core.cache.backends.db.DatabaseCache", "several servers win the same lock"),
        ("tests.test_checks.OwnCache", "not known to be a lock"),
    ],
)
def test_a_cache_that_is_no_lock_is_an_error_that_says_why(backend: str, why: str) -> None:
    [error] = of_cache({"BACKEND": backend, "LOCATION": "somewhere"})
    assert error.id == "multiserver_schedule.E013"
    assert why in error.msg and "Redis" in str(error.hint)


def test_a_cache_that_is_not_there_is_an_error_that_names_the_others() -> None:
    [error] = of_cache({"BACKEND": REDIS_CACHE}, cache="locks")
    assert (error.id, error.hint) == ("multiserver_schedule.E014", "Known are: lock.")


def test_without_an_option_it_is_the_default_cache() -> None:
    with override_settings(CACHES={"lock": {"BACKEND": REDIS_CACHE}}):
        assert ids(LOCKS={"default": {"BACKEND": CACHED["BACKEND"]}}) == ["E014"]


def test_a_cache_whose_backend_cannot_be_imported_is_an_error() -> None:
    assert ids_of_cache({"BACKEND": "no.such.Cache"}) == ["E004"]


@needs(DJANGO_REDIS, REDIS_CACHE)
def test_a_redis_whose_errors_are_ignored_is_an_error() -> None:
    redis = {"BACKEND": DJANGO_REDIS, "LOCATION": NOBODY[DJANGO_REDIS]}
    assert ids_of_cache({**redis, "OPTIONS": {"IGNORE_EXCEPTIONS": True}}) == ["E015"]
    with override_settings(DJANGO_REDIS_IGNORE_EXCEPTIONS=True):
        assert ids_of_cache(redis) == ["E015"]
        assert ids_of_cache({**redis, "OPTIONS": {"IGNORE_EXCEPTIONS": False}}) == []
        # A setting of django-redis alone.
        assert ids_of_cache({**redis, "BACKEND": REDIS_CACHE}) == []


@needs(PYMEMCACHE)
@pytest.mark.parametrize("location", [["10.0.0.1:11211", "10.0.0.2:11211"], "10.0.0.1:11211;10.0.0.2:11211", []])
def test_several_memcached_servers_are_an_error_and_so_is_none(location: object) -> None:
    assert ids_of_cache({"BACKEND": PYMEMCACHE, "LOCATION": location}) == ["E016"]


@needs(DJANGO_REDIS, REDIS_CACHE, PYMEMCACHE)
@pytest.mark.parametrize(
    ("backend", "module", "hint"),
    [
        (DJANGO_REDIS, "django_redis", 'pip install "multiserver-schedule[redis]"'),
        (DJANGO_REDIS, "redis", 'pip install "multiserver-schedule[redis]"'),
        (REDIS_CACHE, "redis", 'pip install "multiserver-schedule[redis]"'),
        (PYMEMCACHE, "pymemcache", 'pip install "multiserver-schedule[memcached]"'),
    ],
)
def test_a_client_library_that_is_missing_is_an_error_that_says_what_to_install(
    backend: str, module: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    [error] = of_cache({"BACKEND": backend, "LOCATION": NOBODY[backend]})
    assert (error.id, error.hint) == ("multiserver_schedule.E017", hint)
    assert "which is not installed" in error.msg


@pytest.mark.parametrize("backend", EACH)
def test_what_is_wrong_with_a_database_is_nothing_to_a_lock_in_a_cache(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["default"], "TIME_ZONE", "Europe/Berlin")
    with override_settings(DATABASE_ROUTERS=["tests.test_checks.Elsewhere"], DEBUG=False):
        assert ids_of_cache({"BACKEND": backend, "LOCATION": NOBODY[backend]}) == []
        assert sorted(ids()) == ["E005", "E006", "W001"]


@needs(REDIS_CACHE)
def test_the_database_of_a_cached_tasks_history_has_to_be_there() -> None:
    assert ids_of_cache({"BACKEND": REDIS_CACHE, "LOCATION": NOBODY[REDIS_CACHE]}, using="replica") == ["E008"]


@needs(REDIS_CACHE)
def test_an_unknown_option_of_a_cache_lock_is_an_error() -> None:
    assert ids_of_cache({"BACKEND": REDIS_CACHE, "LOCATION": NOBODY[REDIS_CACHE]}, chache="x") == ["E004"]


def test_two_locks_in_one_database_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(LOCKS={"other": {"BACKEND": ORM}}) == ["E018"]
    monkeypatch.setitem(connections.settings, "again", connections.settings["default"])
    [error] = [
        message
        for message in run_checks_of(LOCKS={"other": {"BACKEND": ORM, "OPTIONS": {"using": "again"}}})
        if message.id == "multiserver_schedule.E018"
    ]
    assert "['other']" in error.msg and "'default'" in error.msg


def run_checks_of(**settings: Any) -> list[CheckMessage]:
    with override_settings(MULTISERVER_SCHEDULE=settings):
        return run_checks(tags=["multiserver_schedule"])


# -- what the stores themselves say -----------------------------------------------------------------------------------


def of_stores(databases: list[str] | None = None) -> list[CheckMessage]:
    messages = run_checks(tags=["database"], databases=["default"] if databases is None else databases)
    return [message for message in messages if str(message.id).startswith("multiserver_schedule.")]


def ids_of_stores(databases: list[str] | None = None) -> list[str]:
    return [str(message.id).partition(".")[2] for message in of_stores(databases)]


@pytest.fixture
def cached(cache_store: CacheStore) -> Any:
    """Have all locks in a cache that is up."""
    with override_settings(MULTISERVER_SCHEDULE={"LOCKS": {"default": CACHED}}):
        yield cache_store


@pytest.mark.django_db
def test_a_clock_that_differs_from_the_databases_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with override_settings(MULTISERVER_SCHEDULE={}):
        assert ids_of_stores() == []
        clock = ORMLock.clock
        monkeypatch.setattr(ORMLock, "clock", lambda self: clock(self) - timedelta(seconds=6))
        assert ids_of_stores() == ["W003"]


def test_a_clock_that_differs_from_a_caches_is_a_warning(cached: CacheStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids_of_stores() == []
    lock = type(CacheLock("default", CACHED["OPTIONS"]))
    clock = lock.clock
    monkeypatch.setattr(lock, "clock", lambda self: clock(self) + timedelta(seconds=8))
    [warning] = of_stores()
    assert warning.id == "multiserver_schedule.W003"
    assert "of its store differ by 0:00:0" in warning.msg


def client_of(cached: CacheStore) -> Any:
    if cached.kind != "redis":
        pytest.skip("every Memcached evicts")
    backend: Any = caches["lock"]
    return backend._cache.get_client(write=True) if hasattr(backend, "_cache") else backend.client.get_client(True)


@pytest.mark.parametrize(
    ("policy", "memory", "found"),
    [
        ("allkeys-lru", "64mb", ["W004"]),
        ("allkeys-random", "64mb", ["W004"]),
        ("allkeys-lru", "0", []),
        ("noeviction", "64mb", []),
        ("volatile-lru", "64mb", []),
    ],
)
def test_a_redis_that_evicts_locks_is_a_warning(cached: CacheStore, policy: str, memory: str, found: list[str]) -> None:
    client = client_of(cached)
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", memory)
    assert ids_of_stores() == found


def test_the_policies_that_evict_only_what_has_an_end_evict_no_lock(cached: CacheStore) -> None:
    client = client_of(cached)
    now = timezone.now()
    server = Server(
        CacheLock("default", CACHED["OPTIONS"]), Notes(), a_task(), a_task("b.overlapping", overlap="allow")
    )
    server.sync(now)
    later = now + timedelta(minutes=2)
    wanted = [server.occurrence(now, task, trigger="manual") for task in server.declared.tasks.values()]
    assert len(server.claim(*wanted, now=later)) == 2
    keys = set(client.scan_iter("*"))
    assert len(keys) >= 8
    assert [key for key in keys if client.ttl(key) != -1] == []
    server.reap(now + timedelta(minutes=4))
    server.lock.close()
    assert [key for key in client.scan_iter("*") if client.ttl(key) != -1] == []


@pytest.mark.parametrize("backend", EACH)
def test_a_store_that_is_down_is_a_warning_and_nothing_worse(backend: str) -> None:
    with override_settings(
        CACHES={"lock": {"BACKEND": backend, "LOCATION": NOBODY[backend]}},
        MULTISERVER_SCHEDULE={"LOCKS": {"default": CACHED}},
    ):
        [warning] = of_stores()
        assert warning.id == "multiserver_schedule.W005"
        assert "does not answer (" in warning.msg


def test_no_store_is_asked_where_no_database_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with override_settings(
        CACHES={"lock": {"BACKEND": REDIS_CACHE, "LOCATION": NOBODY[REDIS_CACHE]}},
        MULTISERVER_SCHEDULE={"LOCKS": {"default": CACHED}},
    ):
        assert ids_of_stores([]) == []


def test_a_lock_that_is_wrong_is_said_once_and_not_asked() -> None:
    with override_settings(
        CACHES={"lock": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}},
        MULTISERVER_SCHEDULE={"LOCKS": {"default": CACHED, "other": {"BACKEND": "no.such.Lock"}}},
    ):
        assert ids_of_stores() == []


def test_each_id_is_used_once_and_documented() -> None:
    source = (ROOT / "multiserver_schedule" / "checks.py").read_text()
    used = re.findall(r'id="(multiserver_schedule\.[EW]\d{3})"', source)
    documented = re.findall(r"^(multiserver_schedule\.[EW]\d{3})", (ROOT / "docs" / "checks.rst").read_text(), re.M)
    assert len(used) == len(set(used))
    assert sorted(used) == sorted(documented)

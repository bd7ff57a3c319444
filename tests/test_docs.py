"""What docs/locks.rst says to write is valid, and what it says that people read is what they read."""

from __future__ import annotations

import inspect
import re
import textwrap
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.management import call_command
from django.test import override_settings

from multiserver_schedule import checks, conf, history, logs
from multiserver_schedule.declare import registry
from multiserver_schedule.keeper import HISTORY_GRACE
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.versions import GONE_AFTER
from multiserver_schedule.models import ScheduledLock
from multiserver_schedule.service import stores

from .caches import CacheStore
from .test_readme import declare

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "docs" / "locks.rst").read_text()
PROSE = " ".join(LOCKS.split())
README = (ROOT / "README.rst").read_text()
BLOCKS = [
    textwrap.dedent(found)
    for found in re.findall(r"^\.\. code-block:: python\n\n((?:(?:    .*)?\n)+)", LOCKS + README, re.MULTILINE)
]
SETTINGS = [block for block in BLOCKS if "LOCKS" in block]


def needs_clients() -> None:
    for module in ("django_redis", "pymemcache"):
        pytest.importorskip(module)


def values_of(block: str) -> dict[str, Any]:
    """Run a block of settings, and return what it sets; a block without caches is in a project that has them."""
    values: dict[str, Any] = {}
    exec(block, values)  # noqa: S102
    redis = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": "redis://10.0.0.6:6379/0"}
    caches = values.get("CACHES", {"locks": redis})
    return {"CACHES": caches, "MULTISERVER_SCHEDULE": values["MULTISERVER_SCHEDULE"]}


@pytest.mark.parametrize("block", SETTINGS, ids=range(len(SETTINGS)))
def test_the_settings_are_accepted_and_make_locks(block: str) -> None:
    needs_clients()
    with registry.set_aside(), override_settings(DEBUG=True, **values_of(block)):
        assert run_checks(tags=["multiserver_schedule"]) == []
        assert all(isinstance(store.lock, BaseLock) for store in stores(conf.load(), {}))


def test_every_store_has_an_example() -> None:
    needs_clients()
    made = set()
    for block in SETTINGS:
        with override_settings(**values_of(block)):
            made |= {type(store.lock).__name__ for store in stores(conf.load(), {})}
    assert made == {"ORMLock", "RedisLock", "MemcachedLock"}


def test_the_schedule_of_the_redis_example_uses_the_lock_of_its_settings() -> None:
    [schedule] = [block for block in BLOCKS if 'lock_with("cache")' in block]
    [block] = [block for block in SETTINGS if "django_redis" in block]
    with override_settings(**values_of(block)):
        tasks = declare(schedule, "shop.schedule")
        assert {name: task.lock for name, task in tasks.items()} == {
            "shop.refresh": "cache",
            "shop.send_invoices": "default",
        }
        assert set(conf.load().locks) == {"default", "cache"}


def test_the_options_of_a_cache_lock_are_all_named() -> None:
    options = {"cache", "timeout", "using"}
    for block in SETTINGS:
        with override_settings(**values_of(block)):
            for chosen in conf.load().locks.values():
                assert set(chosen.options) <= options
    for option in options:
        assert f"``{option}``" in LOCKS


def test_what_the_page_quotes_from_the_log_is_what_the_log_says() -> None:
    told = inspect.getsource(logs) + inspect.getsource(history)
    for quoted in ("has lost what it knew of", "not recorded: "):
        assert quoted in PROSE and quoted.strip() in told
    assert "the end of a run (" in PROSE and "the end of a run (" in told


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"up to {history.Afterwards.MOST:,} entries" in PROSE
    assert history.Afterwards.TRY_AGAIN_AFTER == 10 and "tries every ten seconds" in PROSE
    assert HISTORY_GRACE == 5 and "for five seconds at its end" in PROSE
    assert GONE_AFTER.total_seconds() == 300 and "has not been seen for five minutes" in PROSE


def test_the_permission_and_the_warnings_that_it_names_are_there() -> None:
    codename, name = ScheduledLock._meta.permissions[0]
    assert f"multiserver_schedule.{codename}" in PROSE and f'"{name}"' in PROSE
    for named in re.findall(r"\b[EW]\d{3}\b", LOCKS):
        assert f"multiserver_schedule.{named}" in inspect.getsource(checks)


@pytest.mark.django_db(transaction=True)
def test_with_all_locks_in_a_cache_a_pass_with_nothing_due_asks_the_database_nothing(
    cache_store: CacheStore, settings: Any, django_assert_num_queries: Any
) -> None:
    lock = {"BACKEND": "multiserver_schedule.locks.cache.CacheLock", "OPTIONS": {"cache": cache_store.alias}}
    settings.ROOT_URLCONF = "tests.shop.urls"
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "inline", "LOCKS": {"default": lock}}
    said = StringIO()
    call_command("runschedule", "--inline", stdout=said)
    assert "registered 7 tasks" in said.getvalue()
    with django_assert_num_queries(0):
        call_command("runschedule", "--inline")


def test_the_readme_links_to_the_page() -> None:
    assert "<docs/locks.rst>`_" in README

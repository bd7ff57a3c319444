"""What ``manage.py check`` says, and that each of its ids is used once and documented."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from multiserver_schedule import schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.locks.orm import ORMLock

ROOT = Path(__file__).resolve().parent.parent
ORM = "multiserver_schedule.locks.orm.ORMLock"


class NotSharedLock(ORMLock):
    """A lock as LocMem's would be."""

    shared = False


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
    from django.db import connections

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


@pytest.mark.django_db
def test_a_clock_that_differs_from_the_databases_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[str]:
        messages = run_checks(tags=["database"], databases=["default"])
        return [str(m.id) for m in messages if str(m.id).startswith("multiserver_schedule.")]

    with override_settings(MULTISERVER_SCHEDULE={}):
        assert found() == []
        clock = ORMLock.clock
        monkeypatch.setattr(ORMLock, "clock", lambda self: clock(self) - timedelta(seconds=6))
        assert found() == ["multiserver_schedule.W003"]


def test_each_id_is_used_once_and_documented() -> None:
    source = (ROOT / "multiserver_schedule" / "checks.py").read_text()
    used = re.findall(r'id="(multiserver_schedule\.[EW]\d{3})"', source)
    documented = re.findall(r"^(multiserver_schedule\.[EW]\d{3})", (ROOT / "docs" / "checks.rst").read_text(), re.M)
    assert len(used) == len(set(used))
    assert sorted(used) == sorted(documented)

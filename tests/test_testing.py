"""The helper for users' own tests is the real engine, inline, with its clock set."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from django.test import TestCase, override_settings

from multiserver_schedule import signals
from multiserver_schedule.declare import registry
from multiserver_schedule.models import ScheduledLock, ScheduledRun
from multiserver_schedule.testing import RunFailed, run_due

from .shop import work

UTC = timezone.utc
NINE = datetime(2030, 1, 1, 9, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.shop.urls"
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1"}
    work.noted.clear()


@pytest.mark.django_db
def test_it_runs_what_is_due_at_that_moment_and_nothing_else() -> None:
    ran = run_due(at=NINE)
    assert [(run.name, run.status) for run in ran] == [("shop.digest", "succeeded"), ("shop.filtered", "skipped")]
    assert ran[0].due_at == NINE
    assert ran[0].output == "noted digest\n"
    assert work.noted == ["digest shop.digest 09:00 fence 1"]


@pytest.mark.django_db
def test_nothing_is_due_a_minute_earlier_or_two_later() -> None:
    assert run_due(at=NINE - timedelta(minutes=1)) == []
    assert run_due(at=NINE - timedelta(minutes=1), only=["shop.digest"]) == []


@pytest.mark.django_db
def test_a_due_time_runs_once_in_a_test_too() -> None:
    assert run_due(at=NINE)
    assert run_due(at=NINE + timedelta(seconds=30)) == []


@pytest.mark.django_db
def test_a_failure_fails_the_test_with_its_traceback_unless_it_is_expected() -> None:
    ten = NINE + timedelta(hours=1)
    with pytest.raises(RunFailed, match="no such column"):
        run_due(at=ten)
    ScheduledLock.objects.all().update(last_due_at=NINE, next_due_at=ten, not_before=NINE)
    [ran] = run_due(at=ten, only=["shop.broken"], check=False)
    assert ran.status == "failed"
    assert "ValueError: no such column" in ran.error


@pytest.mark.django_db
@pytest.mark.parametrize(("hours", "name"), [(2, "shop.asynchronous"), (3, "shop.program"), (4, "shop.command")])
def test_async_functions_programs_and_commands_run_too(hours: int, name: str) -> None:
    [ran] = run_due(at=NINE + timedelta(hours=hours))
    assert (ran.name, ran.status, ran.error) == (name, "succeeded", "")


@pytest.mark.django_db
def test_a_task_on_every_server_runs_under_this_servers_name() -> None:
    [ran] = run_due(at=NINE + timedelta(hours=5))
    assert ran.name == "shop.here@web1"


@pytest.mark.django_db
def test_signals_are_sent_and_history_is_written() -> None:
    sent: list[str] = []

    def listen(signal: Any, **arguments: Any) -> None:
        sent.append(arguments["task"].name)

    signals.task_succeeded.connect(listen)
    try:
        run_due(at=NINE)
    finally:
        signals.task_succeeded.disconnect(listen)
    assert sent == ["shop.digest"]
    assert ScheduledRun.objects.get(task="shop.digest").status == "succeeded"
    assert ScheduledRun.objects.get(task="shop.filtered").reason == "filtered"


@pytest.mark.django_db
@pytest.mark.parametrize(("hours", "name"), [(0, "shop.digest"), (3, "shop.program")])
def test_the_start_and_the_end_of_functions_and_programs_are_signalled_once(hours: int, name: str) -> None:
    sent: list[tuple[str, str]] = []

    def started(run: Any, **arguments: Any) -> None:
        sent.append(("started", run.name))

    def succeeded(run: Any, **arguments: Any) -> None:
        sent.append(("succeeded", run.name))

    signals.task_started.connect(started)
    signals.task_succeeded.connect(succeeded)
    try:
        run_due(at=NINE + timedelta(hours=hours), only=[name])
    finally:
        signals.task_started.disconnect(started)
        signals.task_succeeded.disconnect(succeeded)
    assert sent == [("started", name), ("succeeded", name)]


@pytest.mark.django_db
def test_a_naive_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        run_due(at=datetime(2030, 1, 1, 9))


@pytest.mark.django_db
def test_an_unknown_name_is_refused_with_those_that_are_declared() -> None:
    with pytest.raises(ValueError, match=r"'shop.digets'.*shop.digest"):
        run_due(at=NINE, only=["shop.digets"])


def test_the_pytest_fixture_is_the_same_function(run_due: Callable[..., Any]) -> None:
    assert [run.name for run in run_due(at=NINE, only=["shop.digest"])] == ["shop.digest"]


class InsideATestCase(TestCase):
    """A TestCase's own transaction is no hindrance."""

    def test_it_runs_inside_a_testcase_and_is_undone_with_it(self) -> None:
        with override_settings(ROOT_URLCONF="tests.shop.urls"):
            assert run_due(at=NINE, only=["shop.digest"])
        assert "shop.digest" in registry.tasks
        assert ScheduledRun.objects.count() == 1

    def test_nothing_is_left_of_another_test(self) -> None:
        assert ScheduledRun.objects.count() == 0

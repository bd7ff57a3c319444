"""django-tasks-db, on every database."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from copy import copy
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

import pytest
from django.conf import settings as django_settings
from django.db import connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from multiserver_schedule.database import clock_of
from multiserver_schedule.servers import fleet, load
from multiserver_schedule.servers.entries import Load
from multiserver_schedule.servers.exceptions import FleetError
from tests.stores import Store

from .needs import needs

# Without Django's own tasks it stands on the package they came from.
tasks = needs("django.tasks" if find_spec("django.tasks") else "django_tasks")
needs("django_tasks_db")

from multiserver_schedule.servers.load.django_tasks import DjangoTasksQueue  # noqa: E402

MINUTE = timedelta(minutes=1)
TASKS = {
    "default": {"BACKEND": "django_tasks_db.DatabaseBackend", "QUEUES": []},
    "strict": {"BACKEND": "django_tasks_db.DatabaseBackend", "QUEUES": ["default", "mail"]},
    "at-once": {"BACKEND": f"{tasks.__name__}.backends.immediate.ImmediateBackend"},
}


class ToTheStore:
    """The router of a project whose tasks are in another database than the default one."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return self.alias

    db_for_read = db_for_write


@pytest.fixture
def table(store: Store) -> Iterator[Any]:
    """Have the app in the project, and its table in this database, for one test."""
    apps = [*django_settings.INSTALLED_APPS, "django_tasks_db"]
    with override_settings(INSTALLED_APPS=apps, TASKS=TASKS, DATABASE_ROUTERS=[ToTheStore(store.alias)]):
        from django_tasks_db.models import DBTaskResult  # Not before its app is installed.

        connection = connections[store.alias]
        with connection.schema_editor() as editor:
            editor.create_model(DBTaskResult)
        try:
            yield DBTaskResult.objects
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(DBTaskResult)


@tasks.task
def work() -> None: ...


def enqueue(table: Any, queue: str = "default", *, since: timedelta | None = None, **using: Any) -> Any:
    """Put in a task, which was put in, if that is said, so long ago by the database's clock."""
    row = table.get(pk=work.using(queue_name=queue, **using).enqueue().id)
    if since is not None:
        table.filter(pk=row.pk).update(enqueued_at=clock_of(table.all()) - since)
    return row


def test_tasks_are_counted_exactly(table: Any) -> None:
    row = enqueue(table, "other")
    assert DjangoTasksQueue("default").load().waiting == 0
    for more, count in ((1, 1), (999, 1000)):
        rows = [copy(row) for _ in range(more)]
        for each in rows:
            each.pk, each.queue_name = uuid4(), "default"
        table.bulk_create(rows)
        assert DjangoTasksQueue("default").load().waiting == count


def test_several_queues_are_added(table: Any) -> None:
    for queue in ("default", "default", "mail", "other"):
        enqueue(table, queue)
    assert DjangoTasksQueue("default", "mail").load().waiting == 3


def test_a_queue_without_a_task_is_empty(table: Any) -> None:
    assert DjangoTasksQueue("nobody-sent-here").load() == Load(waiting=0, oldest=timedelta(0), running=0)


def test_another_backends_tasks_are_not_counted(table: Any) -> None:
    enqueue(table)
    enqueue(table, backend="strict")
    assert DjangoTasksQueue("default").load().waiting == 1
    assert DjangoTasksQueue("default", backend="strict").load().waiting == 1


def test_the_oldest_task_tells_for_how_long_work_has_waited(table: Any) -> None:
    enqueue(table, since=MINUTE)
    enqueue(table, since=7 * MINUTE, priority=-50)
    enqueue(table, since=2 * MINUTE, priority=50)
    oldest = DjangoTasksQueue("default").load().oldest
    assert oldest is not None and 7 * MINUTE <= oldest < 8 * MINUTE


def test_units_are_timedeltas_and_not_seconds_taken_for_minutes(table: Any) -> None:
    """Defect 15 of the original: its example compares a wait in seconds with numbers of minutes."""
    enqueue(table, since=timedelta(seconds=61))
    oldest = DjangoTasksQueue("default").load().oldest
    assert isinstance(oldest, timedelta)
    assert timedelta(minutes=1) < oldest < timedelta(minutes=2)


def test_a_task_for_later_does_not_wait_before(table: Any) -> None:
    enqueue(table, since=9 * MINUTE, run_after=clock_of(table.all()) + MINUTE)
    assert DjangoTasksQueue("default").load() == Load(waiting=0, oldest=timedelta(0), running=0)


def test_a_task_for_later_waits_from_then_on(table: Any) -> None:
    enqueue(table, since=9 * MINUTE, run_after=clock_of(table.all()) - 2 * MINUTE)
    load = DjangoTasksQueue("default").load()
    assert load.waiting == 1
    assert load.oldest is not None and 2 * MINUTE <= load.oldest < 3 * MINUTE


def test_a_task_whose_time_was_over_when_it_was_put_in_waits_from_then_on(table: Any) -> None:
    enqueue(table, since=2 * MINUTE, run_after=clock_of(table.all()) - 9 * MINUTE)
    oldest = DjangoTasksQueue("default").load().oldest
    assert oldest is not None and 2 * MINUTE <= oldest < 3 * MINUTE


def test_a_task_that_a_worker_has_is_running_and_its_server_busy(table: Any) -> None:
    for worker in ("web1", "2@web1", "web2"):
        enqueue(table).claim(worker)
    enqueue(table)
    enqueue(table).set_successful(None)
    enqueue(table).set_failed(ValueError())
    load = DjangoTasksQueue("default").load()
    assert (load.waiting, load.running, load.busy) == (1, 3, {"web1": 2, "web2": 1})


def test_a_task_that_was_tried_before_is_where_it_runs_now(table: Any) -> None:
    row = enqueue(table)
    row.claim("web1")
    row.claim("web2")
    assert DjangoTasksQueue("default").load().busy == {"web2": 1}


def test_a_killed_workers_task_is_not_running_for_ever(table: Any) -> None:
    row = enqueue(table)
    row.claim("web1")
    table.filter(pk=row.pk).update(started_at=clock_of(table.all()) - timedelta(hours=25))
    assert DjangoTasksQueue("default").load().running == 0
    assert DjangoTasksQueue("default", lost_after=timedelta(hours=26)).load().running == 1


def test_a_load_is_two_statements_however_many_queues_there_are(table: Any, store: Store) -> None:
    for queue in ("default", "mail", "other"):
        enqueue(table, queue).claim("web1")
        enqueue(table, queue)
    with CaptureQueriesContext(
        connections[store.alias],
    ) as statements:
        assert DjangoTasksQueue("default", "mail", "other").load().waiting == 3
    assert len(statements) == 2


@pytest.mark.parametrize("backend", ["defualt", "at-once"])
@override_settings(TASKS=TASKS)
def test_a_backend_that_keeps_no_tasks_in_the_table_is_refused(backend: str) -> None:
    expected = {
        "defualt": "Did you mean 'default'",
        "at-once": r"ImmediateBackend, whose tasks are not in the table of django_tasks_db\. Name one whose",
    }
    with pytest.raises(FleetError, match=expected[backend]):
        DjangoTasksQueue("default", backend=backend).load()


@override_settings(TASKS=TASKS)
def test_a_queue_that_the_backend_does_not_take_tasks_for_is_refused() -> None:
    with pytest.raises(FleetError, match=r"\['strict'\]\['QUEUES'\] has no 'male'\. Did you mean 'mail'\?"):
        DjangoTasksQueue("male", backend="strict").load()


@pytest.mark.parametrize("wrong", [0, timedelta(0), None])
def test_a_wrong_time_after_which_tasks_are_lost_is_refused(wrong: Any) -> None:
    with pytest.raises(FleetError, match="lost_after should be a timedelta longer than zero"):
        DjangoTasksQueue("default", lost_after=wrong)


def test_the_example_decides_by_the_waiting_time(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docstring of the package shows, in ten lines, is run as it stands there."""
    monkeypatch.setattr(fleet, "_determine", [])
    _, _, code = (inspect.getdoc(load) or "").partition("::\n")
    code = textwrap.dedent(code.partition("\nEvery time")[0])
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    example: dict[str, Any] = {}
    exec(code, example)  # noqa: S102
    assert fleet._determine == [example["by_waiting_time"]]
    answers = [example["by_waiting_time"](fleet)]
    for seconds in (50, 70, 290, 310):
        enqueue(table, since=timedelta(seconds=seconds))
        answers.append(example["by_waiting_time"](fleet))
    assert answers == [1, 1, 2, 2, 3]

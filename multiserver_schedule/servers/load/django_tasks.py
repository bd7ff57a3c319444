"""The load of django-tasks-db: Django's tasks in a table, for which ``manage.py db_worker`` looks."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Final

from django.apps import apps
from django.db import router
from django.db.models import Case, Count, DateTimeField, F, Max, Min, Q, When
from django.db.models.functions import Coalesce, Greatest
from django_tasks_db.backend import DatabaseBackend
from django_tasks_db.compat import InvalidTaskBackend, task_backends

from multiserver_schedule.database import UTCNow

from ..conf import nearest
from ..entries import Load
from ..exceptions import FleetError
from .base import Queue, by_server, longest_wait

_AT_ONCE: Final = datetime(9999, 1, 1, tzinfo=timezone.utc)
"""What the table says of a task that may run as soon as it is there."""


class DjangoTasksQueue(Queue):
    """
    The tasks of these queues of a backend of ``TASKS``: DjangoTasksQueue("default", "mail").

    ``waiting`` are those that may be run now, by the database's clock; one with a ``run_after`` waits from then on. A
    task whose worker was killed stays "running" in the table for good: when it has run for longer than ``lost_after``,
    it is no longer counted.

    Two statements. PostgreSQL has an index for the waiting tasks, and MySQL and MariaDB for the running ones; else the
    backend's rows are read, finished ones too. 100,000 of those take up to 0.3 s: run ``prune_db_task_results``.

    Give a worker the name of its server: ``db_worker --worker-id <name>``.
    """

    def __init__(self, *names: str, backend: str = "default", lost_after: timedelta = timedelta(days=1)) -> None:
        super().__init__(*names)
        if not isinstance(lost_after, timedelta) or lost_after <= timedelta(0):
            raise FleetError(f"{self!r}: lost_after should be a timedelta longer than zero, not {lost_after!r}.")
        self.backend, self.lost_after = backend, lost_after

    def load(self) -> Load:
        self._verify()
        model = apps.get_app_config("django_tasks_database").get_model("DBTaskResult")
        # A replica may be behind.
        rows = model._base_manager.using(router.db_for_write(model)).filter(
            backend_name=self.backend, queue_name__in=self.names
        )
        waiting, since, now = self._waiting(rows)
        running = rows.filter(status="RUNNING", started_at__gt=now - self.lost_after)
        workers = [names[-1] for names in running.order_by().values_list("worker_ids", flat=True) if names]
        return Load(
            waiting=waiting,
            oldest=longest_wait([since] if since else [], now),
            running=len(workers),
            busy=by_server((worker, 1) for worker in workers),
        )

    def _waiting(self, rows: Any) -> tuple[int, datetime | None, datetime]:
        since = Case(
            When(run_after=_AT_ONCE, then=F("enqueued_at")),
            default=Greatest("enqueued_at", "run_after"),
            output_field=DateTimeField(),
        )
        may_run = Q(run_after=_AT_ONCE) | Q(run_after__lte=UTCNow())
        found = rows.filter(may_run, status="READY").aggregate(
            # The clock answers even where no row does.
            waiting=Count("pk"),
            since=Min(since),
            now=Coalesce(Max(UTCNow()), UTCNow()),
        )
        return found["waiting"], found["since"], found["now"]

    def _verify(self) -> None:
        """Raise FleetError for what can't have tasks in the table: it would be empty for ever."""
        try:
            backend = task_backends[self.backend]
        except InvalidTaskBackend as error:
            raise FleetError(f"{self!r}: {error}{nearest(self.backend, task_backends.settings)}") from error
        if not isinstance(backend, DatabaseBackend):
            raise FleetError(
                f"{self!r}: TASKS[{self.backend!r}] has the backend {type(backend).__module__}."
                f"{type(backend).__qualname__}, whose tasks are not in the table of django_tasks_db. Name one whose "
                "BACKEND is 'django_tasks_db.DatabaseBackend'."
            )
        for name in self.names:
            if backend.queues and name not in backend.queues:
                raise FleetError(
                    f"{self!r}: TASKS[{self.backend!r}]['QUEUES'] has no {name!r}.{nearest(name, backend.queues)}"
                )

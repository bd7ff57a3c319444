"""How does a call reach the database, and again where it lost a conflict with another server?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from django.db import DEFAULT_DB_ALIAS, DatabaseError, InterfaceError, OperationalError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Exists, Model, Q, QuerySet
from django.db.models.lookups import LessThanOrEqual

from ...database import Line, clock_of, is_conflict
from ...entries import Occurrence
from ...exceptions import ConfigurationError, StoreTimeout, UnsafeTransaction
from ...models import ScheduledLock, ScheduledRun, ScheduleState
from ..base import BaseLock, Declarations
from .rows import HERE, Clock, due_times

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Model)

RETRIES: Final = 8
RETRY_FOR: Final = 10.0
"""Seconds after which a conflict is raised and not tried a second time: a lease must outlive it."""
PARAMS_PER_CLAIM: Final = 14
"""The most parameters that one row takes in one statement, where the database counts them (SQLite)."""


class _NoSuchState(Exception):
    """The state row that serialises this transaction is not there yet."""


class Raced(Exception):
    """A row changed although it was locked: the transaction starts anew."""


class Session(BaseLock):
    """What every part of the lock asks the database through: always the one that is written, never a replica."""

    transactional = True

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        super().__init__(alias, options)
        unknown = sorted(set(options) - {"using"})
        if unknown:
            raise ConfigurationError(f"The lock {alias!r} has no option {unknown[0]!r}. Its only option is 'using'.")
        self.using = options.get("using", DEFAULT_DB_ALIAS)
        self._line = Line(self.using)
        self._limit: timedelta | None = None
        self._bounded: Any = None

    @property
    def is_calling(self) -> bool:
        return self._line.is_calling

    def cut(self) -> bool:
        return self._line.cut()

    def close(self) -> None:
        self._line.close()

    def _call(self, work: Callable[[], _T]) -> _T:
        """
        Do ``work`` with the write database, again where it lost a conflict with another server.

        A connection that broke is closed, so that the next call opens its own.
        """
        connection = connections[self.using]
        tested = _in_testcase(connection)
        if connection.in_atomic_block and not tested:
            raise UnsafeTransaction(
                f"The lock {self.alias!r} was used inside a transaction on {self.using!r}, whose end would undo it. "
                "Call it outside atomic(), or give the lock a database alias of its own."
            )
        started = time.monotonic()
        attempt = 0
        missing = ""
        with self._line.call():
            try:
                if not tested and not connection.get_autocommit():
                    raise UnsafeTransaction(
                        f"The lock {self.alias!r} needs autocommit on {self.using!r}: a claim counts when it is "
                        "committed."
                    )
                while True:
                    self._line.ready()
                    if self._limit is not None and connection.connection is not self._bounded:
                        self._bound(connection, self._limit)
                    try:
                        if missing:
                            # In a statement of its own: inside the transaction, two servers would deadlock on MySQL.
                            self._state().bulk_create([ScheduleState(key=missing)], ignore_conflicts=True)
                            missing = ""
                        return work()
                    except _NoSuchState as error:
                        missing = str(error)
                    except (Raced, DatabaseError) as error:
                        attempt += 1
                        retry = isinstance(error, Raced) or is_conflict(error)
                        if (
                            not retry
                            or tested
                            or self._line.was_cut
                            or attempt > RETRIES
                            or (attempt > 1 and time.monotonic() - started > RETRY_FOR)
                        ):
                            raise
                        time.sleep(random.uniform(0.2, 1.0) * min(0.5, 0.01 * 2**attempt))  # noqa: S311 - jitter
            except (OperationalError, InterfaceError) as error:
                if not tested and not is_conflict(error):
                    connection.close()
                if self._line.was_cut:
                    raise StoreTimeout(f"A call to the database {self.using!r} hung, and was cut.") from error
                raise

    def bound(self, limit: timedelta) -> None:
        """
        Have the database end our session where a transaction of it stands still for so long.

        What a server has locked when it is frozen in mid-claim is passed over by all others until then. SQLite and
        MySQL have no such limit.
        """
        self._limit = limit

    def _bound(self, connection: BaseDatabaseWrapper, limit: timedelta) -> None:
        """Set the limit, once for each session."""
        self._bounded = connection.connection
        seconds = max(1, round(limit.total_seconds()))
        said = None
        if connection.vendor == "postgresql":
            said = f"SET idle_in_transaction_session_timeout = '{seconds}s'"
        elif getattr(connection, "mysql_is_mariadb", False):
            said = f"SET SESSION idle_transaction_timeout = {seconds}"
        if said is not None:
            with connection.cursor() as cursor:
                cursor.execute(said)

    @contextmanager
    def _transaction(self, *, write_first: bool = False) -> Iterator[None]:
        connection = connections[self.using]
        tested = _in_testcase(connection)
        with transaction.atomic(using=self.using, durable=True):
            try:
                level = getattr(getattr(connection, "isolation_level", None), "name", "READ_COMMITTED")
                if connection.vendor == "postgresql" and level != "READ_COMMITTED" and not tested:
                    # Each statement here asks its conditions anew; under a snapshot it would fail instead of seeing.
                    with connection.cursor() as cursor:
                        cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                if write_first and not connection.features.has_select_for_update:
                    self._state().filter(key=ScheduleState.PROJECT).update(scope="")
                yield
                if not tested:
                    # Here and not at the end of the block, which leaves nothing to that end but to find it done.
                    connection._commit()  # type: ignore[attr-defined]
            except (OperationalError, InterfaceError) as error:
                if not tested and not is_conflict(error):
                    # The end of the block would open a new connection, and hang again where the server hangs.
                    connection.close()
                raise

    def _touch(self, key: str, **values: Any) -> None:
        if not self._state().filter(key=key).update(**(values or {"scope": ""})):
            raise _NoSuchState(key)

    def _batch_size(self, per_row: int = PARAMS_PER_CLAIM) -> int:
        most = connections[self.using].features.max_query_params
        return 10_000 if most is None else max(1, min(10_000, (most - 50) // per_row))

    def _lock_rows(self, rows: QuerySet[_M], *, skip_locked: bool) -> QuerySet[_M]:
        features = connections[self.using].features
        # In the order of the key: transactions that lock the same rows in different orders end each other.
        rows = rows.order_by("pk")
        if features.has_select_for_update:
            rows = rows.select_for_update(skip_locked=skip_locked and features.has_select_for_update_skip_locked)
        return rows

    def _open(
        self, rows: QuerySet[ScheduledLock], group: Sequence[Occurrence], clock: Clock
    ) -> QuerySet[ScheduledLock]:
        """Narrow ``rows`` down to those whose due time is still open, under this schedule, with nothing paused."""
        due = due_times(group)
        rows = self._unpaused(rows, group).filter(LessThanOrEqual(due, clock.now), last_due_at__lt=due)
        return rows

    def _unpaused(
        self, rows: QuerySet[ScheduledLock], group: Sequence[Occurrence] | None = None
    ) -> QuerySet[ScheduledLock]:
        """Narrow ``rows`` down to those that are here and not paused, and whose schedule is that of ``group``."""
        everything = self._state().filter(key=ScheduleState.PROJECT, paused_at__isnull=False)
        rows = rows.filter(~Exists(everything), paused_at=None, **HERE)
        if group is not None:
            # The fingerprint has the task's name in it: one of the group is the row's own or none.
            rows = rows.filter(fingerprint__in={o.task.fingerprint for o in group})
        return rows

    def _of(self, occurrences: Sequence[Occurrence], owners: Sequence[str]) -> QuerySet[ScheduledRun]:
        # Task and due time lead to the rows by an index; the owner says which.
        runs: QuerySet[ScheduledRun] = self._runs().filter(
            task__in={o.row for o in occurrences}, due_at__in={o.due_at for o in occurrences}, owner__in=owners
        )
        return runs

    def _now(self, clock: Clock) -> datetime:
        if clock.given is not None:
            return clock.given
        return clock_of(self._state())

    def _states(self, declared: Declarations) -> QuerySet[ScheduleState]:
        wanted = Q(key=ScheduleState.PROJECT) | Q(first_seen_at__isnull=False, scope__in=["", declared.server])
        states: QuerySet[ScheduleState] = self._state().filter(wanted)
        return states

    def _locks(self) -> QuerySet[ScheduledLock]:
        rows: QuerySet[ScheduledLock] = ScheduledLock.objects.using(self.using).order_by()
        return rows

    def _runs(self) -> QuerySet[ScheduledRun]:
        rows: QuerySet[ScheduledRun] = ScheduledRun.objects.using(self.using).order_by()
        return rows

    def _state(self) -> QuerySet[ScheduleState]:
        rows: QuerySet[ScheduleState] = ScheduleState.objects.using(self.using).order_by()
        return rows


def _in_testcase(connection: BaseDatabaseWrapper) -> bool:
    blocks = getattr(connection, "atomic_blocks", [])
    return connection.in_atomic_block and bool(blocks) and bool(blocks[-1]._from_testcase)

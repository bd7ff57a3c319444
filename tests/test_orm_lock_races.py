"""
Many servers at once: real processes, released at the same moment, on each database.

Run as a program (``python -m tests.test_orm_lock_races``) this file is one of those processes: it takes commands, a
line of JSON each, and answers them.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import django
import pytest

if __name__ == "__main__":
    django.setup()

from django.db import connections, transaction

from multiserver_schedule.entries import Occurrence, ReleasedClaim, ScheduledTask
from multiserver_schedule.history import History
from multiserver_schedule.locks.orm import ORMLock, session
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState
from multiserver_schedule.testing.contract import (
    DAY,
    HOUR,
    LEASE,
    MINUTE,
    REACH,
    SUCCEEDED,
    a_task,
    declare,
    following,
)

from .stores import Store

PROCESSES = 8
UTC = timezone.utc


def some_tasks(number: int) -> dict[str, ScheduledTask]:
    return {f"t{i:04}": a_task(f"t{i:04}") for i in range(number)}


# -- a process ---------------------------------------------------------------------------------------------------------


class Racer:
    """One server: each method is a command of the test."""

    def __init__(self, number: int, options: dict[str, Any]) -> None:
        self.name = f"web{number}"
        unlocked = options.pop("unlocked", False)
        if options:
            level = options.get("isolation_level")
            if level and connections["default"].vendor == "postgresql":
                import psycopg

                options = {"isolation_level": psycopg.IsolationLevel[level.upper().replace(" ", "_")]}
            connections["default"].settings_dict["OPTIONS"].update(options)
        self.lock = ORMLock("default", {})
        if unlocked:
            self.lock._startable = lambda chunk, clock: list(chunk)  # type: ignore[method-assign]
            self.lock._lock_rows = lambda rows, **more: rows  # type: ignore[method-assign]
        self.history = History("default")
        self.conflicts = 0
        self.random = random.Random(number)
        is_conflict = session.is_conflict

        def counted(error: BaseException) -> bool:
            conflict = is_conflict(error)
            self.conflicts += conflict
            return conflict

        session.is_conflict = counted
        connections["default"].ensure_connection()

    def occurrences(self, due_at: datetime, number: int, **more: Any) -> list[Occurrence]:
        tasks = some_tasks(number)
        return [
            Occurrence(
                task=tasks[row.task],
                row=row.task,
                pk=row.pk,
                due_at=due_at,
                next_due_at=due_at + HOUR,
                lease=more.get("lease", LEASE),
                min_break=timedelta(0),
            )
            for row in self.lock.rows(tasks)
        ]

    def prepare_claim(self, due: str, number: int, shuffled: bool = False) -> None:
        self.asked = self.occurrences(datetime.fromisoformat(due), number)
        if shuffled:
            self.random.shuffle(self.asked)

    def claim(self, slots: int | None = None) -> list[str]:
        claims = self.lock.claim(self.asked, server=self.name, slots=slots, record=self.history.started)
        return [claim.occurrence.row for claim in claims]

    def look_then_write(self) -> list[str]:
        """Claim as a naive lock does: look who has it, and write when nobody has."""
        won = []
        for asked in self.asked:
            row = ScheduledLock.objects.get(pk=asked.pk)
            if row.owner is None and row.last_due_at < asked.due_at:
                row.owner, row.last_due_at = self.name, asked.due_at
                row.save()
                won.append(asked.row)
        return won

    def prepare_sync(self, number: int) -> None:
        self.declared = declare(*some_tasks(number).values(), server=self.name)

    def sync(self) -> list[str]:
        return list(self.lock.sync(self.declared).registered)

    def reap(self) -> list[str]:
        return [cleanup.owner for cleanup in self.lock.reap(server=self.name, record=self.history.cleaned)]

    def set_right(self, number: int) -> list[str]:
        reaches = dict.fromkeys(some_tasks(number), REACH)
        return self.lock.set_right(reaches, following=following)

    def count_up(self, file: str, times: int) -> int:
        """Add one to an unlocked counter in a file, so many times, each time under the claim of a new due time."""
        (asked,) = self.occurrences(datetime.now(UTC), 1)
        done = 0
        while done < times:
            occurrence = Occurrence(
                task=asked.task,
                row=asked.row,
                pk=asked.pk,
                due_at=datetime.now(UTC) - timedelta(milliseconds=2),
                next_due_at=None,
                lease=LEASE,
                min_break=timedelta(0),
            )
            claims = self.lock.claim([occurrence], server=self.name, record=self.history.started)
            if not claims:
                time.sleep(self.random.uniform(0, 0.02))
                continue
            before = int(Path(file).read_text())
            time.sleep(self.random.uniform(0, 0.001))
            Path(file).write_text(str(before + 1))
            released = [ReleasedClaim(claim=claims[0], outcome=SUCCEEDED, min_break=timedelta(0))]
            assert self.lock.release(released, record=self.history.finished) == [True]
            done += 1
        return done

    def churn(self, rounds: int, number: int) -> int:
        """Claim, renew and release random batches, in random orders."""
        claimed = 0
        for _ in range(rounds):
            batch = self.random.sample(self.occurrences(datetime.now(UTC) - timedelta(milliseconds=2), number), 50)
            claims = self.lock.claim(batch, server=self.name, record=self.history.started)
            assert self.lock.renew(claims) == {claim.owner for claim in claims}
            self.random.shuffle(claims)
            released = [ReleasedClaim(claim=claim, outcome=SUCCEEDED, min_break=timedelta(0)) for claim in claims]
            assert all(self.lock.release(released, record=self.history.finished))
            claimed += len(claims)
        return claimed

    def conflicts_so_far(self) -> int:
        return self.conflicts


def serve(number: int, options: dict[str, Any]) -> None:
    racer = Racer(number, options)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, arguments, start = json.loads(line)
        while time.monotonic() < start:
            pass
        try:
            answer = getattr(racer, command)(**arguments)
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


# -- the tests ---------------------------------------------------------------------------------------------------------


class Race:
    """The processes, and what they answer."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def run(self, command: str, *, together: bool = True, **arguments: Any) -> list[Any]:
        """Have all do this at the same moment; return their answers."""
        start = time.monotonic() + 0.1 if together else 0.0
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([command, arguments, start]) + "\n")
            process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for process in self.processes if process.stdout]
        errors = [answer["error"] for answer in answers if isinstance(answer, dict)]
        assert errors == []
        return answers


@contextlib.contextmanager
def racing(store: Store, number: int = PROCESSES, **options: Any) -> Iterator[Race]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_orm_lock_races", str(i), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=store.environ(),
        )
        for i in range(number)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == "ready"
        yield Race(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def empty(store: Store) -> None:
    for model in (ScheduledLock, ScheduledRun, CleanupLog, ScheduleState):
        model.objects.using(store.alias).all().delete()


def register(store: Store, number: int) -> datetime:
    """Register tasks an hour ago; return a due time that is open now."""
    empty(store)
    now = datetime.now(UTC)
    ORMLock("default", {"using": store.alias}).sync(declare(*some_tasks(number).values()), now=now - HOUR)
    return now - MINUTE


def together(answers: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(answers))


def won_twice(answers: list[list[str]]) -> list[str]:
    return [name for name, times in Counter(together(answers)).items() if times > 1]


def test_eight_servers_at_once(store: Store, tmp_path: Path) -> None:
    """One test, since starting the processes is what takes the time."""
    with racing(store) as race:
        # A lock that looks and then writes is won by many here: this machine, and this barrier, show the race.
        doubles = 0
        for _ in range(5):
            due = register(store, 20)
            race.run("prepare_claim", due=due.isoformat(), number=20, together=False)
            doubles += len(won_twice(race.run("look_then_write")))
            if doubles:
                break
        assert doubles > 0

        for turn in range(3):
            due = register(store, 20)
            race.run("prepare_claim", due=due.isoformat(), number=20, shuffled=turn > 0, together=False)
            answers = race.run("claim")
            assert won_twice(answers) == []
            # A row that was locked by a neighbour for a moment is passed over: the next look finds it.
            answers += race.run("claim")
            assert sorted(together(answers)) == sorted(some_tasks(20))
            assert won_twice(race.run("claim")) == []
            runs = ScheduledRun.objects.using(store.alias).values_list("task", flat=True)
            assert sorted(runs) == sorted(some_tasks(20))

        # Slots: eight servers with two each.
        due = register(store, 20)
        race.run("prepare_claim", due=due.isoformat(), number=20, together=False)
        answers = race.run("claim", slots=2)
        assert won_twice(answers) == []
        assert max(len(names) for names in answers) <= 2

        # First syncs.
        empty(store)
        race.run("prepare_sync", number=300, together=False)
        answers = race.run("sync")
        assert sorted(together(answers)) == sorted(some_tasks(300))
        assert ScheduledLock.objects.using(store.alias).count() == 300
        assert ScheduleState.objects.using(store.alias).filter(key__startswith="declared:").count() == 1

        # Stale locks.
        due = register(store, 40)
        race.run("prepare_claim", due=due.isoformat(), number=40, together=False)
        claimed = sum(map(len, race.run("claim"))) + sum(map(len, race.run("claim")))
        assert claimed == 40
        owners = set(ScheduledLock.objects.using(store.alias).values_list("owner", flat=True))
        ScheduledLock.objects.using(store.alias).update(expires_at=datetime.now(UTC) - DAY)
        answers = race.run("reap")
        answers += race.run("reap")
        assert won_twice(answers) == []
        assert set(together(answers)) == owners
        assert set(CleanupLog.objects.using(store.alias).values_list("owner", flat=True)) == owners
        assert set(ScheduledRun.objects.using(store.alias).values_list("status", flat=True)) == {"abandoned"}

        # What a clock that was ahead has left behind.
        register(store, 40)
        ScheduledLock.objects.using(store.alias).update(last_due_at=datetime.now(UTC) + 30 * DAY)
        answers = race.run("set_right", number=40)
        assert won_twice(answers) == []
        assert sorted(together(answers)) == sorted(some_tasks(40))
        assert together(race.run("set_right", number=40)) == []
        latest = ScheduledLock.objects.using(store.alias).latest("last_due_at")
        assert latest.last_due_at <= datetime.now(UTC) + MINUTE

        # Shuffled batches.
        register(store, 200)
        before = sum(race.run("conflicts_so_far", together=False))
        assert sum(race.run("churn", rounds=4, number=200)) > 0
        conflicts = sum(race.run("conflicts_so_far", together=False)) - before
        assert conflicts == 0, "nobody waits in a circle"


def test_a_counter_without_a_lock_of_its_own_loses_nothing(store: Store, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    register(store, 1)
    with racing(store, 3) as race:
        race.run("count_up", file=str(counter), times=100)
    assert counter.read_text() == "300"
    fences = ScheduledRun.objects.using(store.alias).order_by("fence").values_list("fence", flat=True)
    assert list(fences) == list(range(1, 301))


def test_safety_does_not_rest_on_row_locks(store: Store) -> None:
    with racing(store, 4, unlocked=True) as race:
        for _ in range(5):
            due = register(store, 20)
            race.run("prepare_claim", due=due.isoformat(), number=20, shuffled=True, together=False)
            answers = race.run("claim")
            assert sorted(together(answers)) == sorted(some_tasks(20))
            ScheduledLock.objects.using(store.alias).update(expires_at=datetime.now(UTC) - DAY)
            reaped = race.run("reap")
            assert won_twice(reaped) == []
            assert len(together(reaped)) == 20


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_the_race_is_won_once_at_the_stricter_isolation_levels(store: Store, level: str) -> None:
    if store.vendor == "sqlite":
        pytest.skip("SQLite has one level")
    with racing(store, 3, isolation_level=level) as race:
        due = register(store, 20)
        race.run("prepare_claim", due=due.isoformat(), number=20, shuffled=True, together=False)
        answers = race.run("claim") + race.run("claim")
        assert sorted(together(answers)) == sorted(some_tasks(20))
        empty(store)
        race.run("prepare_sync", number=50, together=False)
        assert sorted(together(race.run("sync"))) == sorted(some_tasks(50))


def test_a_row_that_is_locked_by_another_transaction_holds_up_nobody(store: Store) -> None:
    if store.vendor == "sqlite":
        pytest.skip("SQLite locks the whole file")
    due = register(store, 3)
    connection = connections[store.alias]
    with racing(store, 1) as race:
        race.run("prepare_claim", due=due.isoformat(), number=3, together=False)
        with transaction.atomic(using=store.alias):
            ScheduledLock.objects.using(store.alias).select_for_update().get(task="t0001")
            began = time.monotonic()
            assert race.run("claim") == [["t0000", "t0002"]]
            assert time.monotonic() - began < 10
        assert race.run("claim") == [["t0001"]]
    assert connection.in_atomic_block is False


if __name__ == "__main__":
    serve(int(sys.argv[1]), json.loads(sys.argv[2]))

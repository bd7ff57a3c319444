"""
Eight servers leave a barrier at the same moment for the same twenty due times: twenty runs.

Each is a process of its own with a connection, a runner and runs of its own. They are forked from eight processes that
have set Django up before, since that is most of what a pass costs. FLEET_ROUNDS says how often.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from .fleet.harness import Fleet, Forked, libfaketime
from .fleet.journal import Line
from .stores import Store

ROUNDS = int(os.environ.get("FLEET_ROUNDS", "1"))
SERVERS = 8
TASKS = 20
AN_HOUR_OFF = {0: "+1h", 1: "-1h"}


def new_year(fleet: Fleet) -> datetime:
    """Return the due time that is open in the project ``twenty``."""
    return datetime(fleet.now().year, 1, 1, tzinfo=timezone.utc)


def one_round(fleet: Fleet) -> tuple[list[Line], list[Forked]]:
    """Make the twenty due, let the eight go, and return the runs that began."""
    fleet.forget()
    fleet.make_due(due_at=new_year(fleet))
    before = len(fleet.journal.of("start"))
    with fleet.barrier(SERVERS):
        passes = [post.go(at_barrier=True) for post in fleet.posts]
    for one in passes:
        one.wait(60)
    return fleet.journal.of("start")[before:], passes


@pytest.mark.parametrize(
    "clocks",
    [
        pytest.param({}, id="right"),
        pytest.param(
            AN_HOUR_OFF, marks=pytest.mark.skipif(not libfaketime(), reason="no libfaketime here"), id="an-hour-off"
        ),
    ],
)
def test_twenty_due_times_are_run_twenty_times_by_eight_servers_at_a_barrier(
    store: Store, tmp_path: Path, clocks: dict[int, str]
) -> None:
    with Fleet(store, tmp_path, "twenty", lease=30, heartbeat=10) as fleet:
        fleet.register()
        for number in range(SERVERS):
            fleet.post(f"web{number + 1}", clock=clocks.get(number))
        for _ in range(ROUNDS):
            began, passes = one_round(fleet)
            assert Counter(line["task"] for line in began) == {f"task{number:02}": 1 for number in range(TASKS)}
            assert [one.poll() for one in passes] == [0] * SERVERS
            assert {(run.task, run.status, run.count) for run in fleet.runs()} == {
                (f"task{number:02}", "succeeded", 1) for number in range(TASKS)
            }
            assert len(fleet.runs()) == TASKS
            assert not fleet.cleanups()
            assert {lock.last_due_at for lock in fleet.locks()} == {new_year(fleet)}
            assert {lock.owner for lock in fleet.locks()} == {None}
            assert {run.fence for run in fleet.runs()} == {lock.fence for lock in fleet.locks()}


def test_a_lock_that_looks_and_then_writes_fails_at_the_same_barrier(store: Store, tmp_path: Path) -> None:
    lock = {"default": {"BACKEND": "tests.fleet.naive.LookThenWriteLock"}}
    with Fleet(store, tmp_path, "twenty", lease=30, heartbeat=10, settings={"LOCKS": lock}) as fleet:
        fleet.register()
        for number in range(SERVERS):
            fleet.post(f"web{number + 1}")
        runs = []
        for _ in range(5):
            began, _ = one_round(fleet)
            runs.append(len(began))
            if len(began) > TASKS:
                return
        pytest.fail(f"This machine shows no race: {runs} runs of {TASKS} due times. What passes here says nothing.")


@pytest.mark.skipif(not libfaketime(), reason="no libfaketime on this machine")
def test_a_clock_that_is_an_hour_off_runs_nothing_twice_and_nothing_early(store: Store, tmp_path: Path) -> None:
    with Fleet(store, tmp_path, "soon", lease=30, heartbeat=10) as fleet:
        now = math.ceil(fleet.now().timestamp())
        # An interval is counted from 1970, so a divisor of the moment that is wanted is one that is due then.
        moment, period = next(
            (moment, period)
            for moment in range(now + 16, now + 70)
            for period in range(600, 3600)
            if not moment % period
        )
        due_at = datetime.fromtimestamp(moment, timezone.utc)
        fleet.env["FLEET_PERIOD"] = str(period)
        fleet.register()
        assert {lock.next_due_at for lock in fleet.locks()} == {due_at}
        for number in range(SERVERS):
            fleet.post(f"web{number + 1}", clock=AN_HOUR_OFF.get(number))
        with fleet.barrier(SERVERS):
            passes = [post.go(at_barrier=True) for post in fleet.posts]
            # They wait for what is due within five seconds, and a pass without anything to wait for ends.
            fleet.wait_for(lambda: fleet.now() > due_at - timedelta(seconds=3), "the due time to come near", 90)
        at, then = fleet.pair()
        assert then < due_at, "This machine was too slow to be at the barrier before the due time."
        for one in passes:
            one.wait(60)
        wrong = {line["server"]: round((line["wall"] - time.time()) / 60) for line in fleet.journal.of("off")}
        assert wrong == {f"web{number + 1}": {0: 60, 1: -60}.get(number, 0) for number in range(SERVERS)}
        began = fleet.journal.of("start")
        assert Counter(line["task"] for line in began) == {f"task{number:02}": 1 for number in range(TASKS)}
        assert all(then + timedelta(seconds=line["boot"] - at) >= due_at for line in began)
        assert all(run.started_at is not None and run.started_at >= due_at for run in fleet.runs())
        assert {run.status for run in fleet.runs()} == {"succeeded"}
        assert len(fleet.runs()) == TASKS
        assert [one.poll() for one in passes] == [0] * SERVERS
        late = [line["boot"] - at - (due_at - then).total_seconds() for line in began]
        print(
            f"{store.name}: {TASKS} runs, {min(late):.3f} to {max(late):.3f} s after they were due, on "
            f"{len({line['server'] for line in began})} servers"
        )

"""The checker is checked: forged journals and tables, one for each thing that it must see, and near-misses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from .fleet.checker import Evidence, Told, check, interval

THREE = datetime(2030, 1, 1, 3, tzinfo=timezone.utc)
BOOT = 1000.0
"""The boot clock at three."""
LEASE = 3.0
TASKS = {
    "report": Told(due=interval(10), min_break=timedelta(seconds=2)),
    "side": Told(due=interval(10), overlap=True),
    "chosen": Told(due=interval(10), servers=("web2",)),
    "own": Told(due=interval(10), on_every_server=True),
    "retried": Told(due=interval(10), min_break=timedelta(seconds=2), retries=1, failures=1),
}


def at(seconds: float) -> datetime:
    return THREE + timedelta(seconds=seconds)


class Forged:
    """A journal and tables, written by hand. All times are seconds after three."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = [
            {"event": "clock", "boot": BOOT, "at": BOOT, "now": at(0).isoformat(), "spread": 0.002}
        ]
        self.runs: list[Any] = []
        self.locks: dict[str, Any] = {}
        self.cleanups: list[Any] = []
        self.now = 40.0
        self.at_rest = True
        self.lossy = False
        """Is it of a cache that lost its data, and of servers that were killed before they had recorded all?"""

    def lock(self, task: str, *, since: float = -5, last: float, fence: int, **more: Any) -> Any:
        fields = {"owner": None, "server": "", "expires_at": None, **more}
        row = SimpleNamespace(task=task, schedule_since=at(since), last_due_at=at(last), fence=fence, **fields)
        self.locks[task] = row
        return row

    def run(
        self,
        task: str,
        due: float,
        fence: int,
        *,
        start: float | None = None,
        end: float | None = None,
        status: str = "succeeded",
        server: str = "web1",
        attempt: int = 1,
        process: bool = True,
        **more: Any,
    ) -> Any:
        start = due + 0.1 if start is None else start
        end = start + 1 if end is None else end
        fields = {"trigger": "schedule", "count": 1, "expires_at": None, "owner": f"{task} {fence}", **more}
        row = SimpleNamespace(
            task=task,
            due_at=at(due),
            fence=fence,
            status=status,
            server=server,
            attempt=attempt,
            started_at=at(start),
            finished_at=at(end),
            **fields,
        )
        self.runs.append(row)
        if process:
            self.process(task, due, fence, start=start, end=end, server=server, attempt=attempt)
        return row

    def process(
        self,
        task: str,
        due: float,
        fence: int,
        *,
        start: float,
        end: float,
        server: str = "web1",
        attempt: int = 1,
        pid: int = 0,
    ) -> None:
        about = {"task": task, "due_at": at(due).isoformat(), "fence": fence, "attempt": attempt, "server": server}
        about |= {"pid": pid or 100 + len(self.lines), "keeper": 10 + fence, "trigger": "schedule"}
        self.lines.append({"event": "start", "boot": BOOT + start + 0.01, **about})
        self.lines.append({"event": "tick", "boot": BOOT + (start + end) / 2, **about})
        self.lines.append({"event": "end", "boot": BOOT + end - 0.01, **about})

    def skip(self, task: str, due: float, *, count: int = 1, reason: str = "missed", trigger: str = "schedule") -> Any:
        row = SimpleNamespace(
            task=task, due_at=at(due), status="skipped", reason=reason, count=count, trigger=trigger, attempt=1,
            server="", owner="", fence=0, started_at=None, finished_at=at(due + 1), expires_at=None,
        )  # fmt: skip
        self.runs.append(row)
        return row

    def cleanup(self, run: Any, *, expired: float, cleaned: float, signals: int = 1) -> Any:
        row = SimpleNamespace(
            task=run.task, owner=run.owner, fence=run.fence, expired_at=at(expired), cleaned_at=at(cleaned),
            reason="lease_expired",
        )  # fmt: skip
        self.cleanups.append(row)
        for _ in range(signals):
            self.lines.append({"event": "cleanup", "boot": BOOT + cleaned, "task": run.task, "owner": run.owner})
        return row

    def evidence(self) -> Evidence:
        return Evidence(
            lines=self.lines,
            runs=self.runs,
            locks=list(self.locks.values()),
            cleanups=self.cleanups,
            now=at(self.now),
            afterwards=self.lossy,
            lossy=self.lossy,
            since=at(-5) if self.lossy else None,
            killed={12} if self.lossy else (),
        )

    def wrong(self) -> list[str]:
        return check(self.evidence(), TASKS, lease=LEASE, look_every=5, at_rest=self.at_rest)


def clean() -> Forged:
    """
    A night without a fault of ours: three runs, one of them killed at 11.5 and cleaned up, and two side by side.
    """
    forged = Forged()
    forged.run("report", 0, 1)
    killed = forged.run("report", 10, 2, end=11.5, status="abandoned")
    killed.finished_at = at(15)
    forged.lines.append({"event": "killed", "boot": BOOT + 11.5, "keeper": 12, "which": "all", "server": "web1"})
    forged.cleanup(killed, expired=14, cleaned=15)
    forged.skip("report", 20)
    forged.run("report", 30, 4)
    forged.lock("report", last=30, fence=4)
    # Their processes came to life the other way round, and both were at work at 12.
    forged.run("side", 0, 1, start=0.1, end=12.5)
    forged.run("side", 10, 2, start=10.1, end=13)
    forged.skip("side", 30, count=2)
    forged.lock("side", last=30, fence=2)
    return forged


def test_a_clean_history_passes() -> None:
    assert clean().wrong() == []


CASES: list[tuple[str, str, Callable[[Forged], object]]] = []


def case(invariant: str, text: str) -> Callable[[Callable[[Forged], object]], Callable[[Forged], object]]:
    def add(forge: Callable[[Forged], object]) -> Callable[[Forged], object]:
        CASES.append((invariant, text, forge))
        return forge

    return add


def the(forged: Forged, task: str, fence: int) -> Any:
    return next(run for run in forged.runs if run.task == task and run.fence == fence and run.status != "skipped")


def retried(forged: Forged) -> None:
    forged.run("retried", 30, 4, status="failed")
    forged.run("retried", 30, 5, start=31.5, end=32, attempt=2)
    forged.lock("retried", since=29, last=30, fence=5)


@case("I1", "two processes began for one due time")
def _(forged: Forged) -> None:
    forged.process("report", 0, 1, start=1.2, end=1.3)


@case("I1", "two claims of one due time")
def _(forged: Forged) -> None:
    forged.run("report", 30, 5, start=34)
    forged.locks["report"].fence = 5


@case("I1", "two claims of one due time, recorded as attempts")
def _(forged: Forged) -> None:
    forged.run("report", 30, 5, start=34, attempt=2)
    forged.locks["report"].fence = 5


@case("I1", "an attempt more than are promised")
def _(forged: Forged) -> None:
    retried(forged)
    forged.run("retried", 30, 6, start=35, end=36, attempt=3)
    forged.locks["retried"].fence = 6


@case("I1", "an attempt that was made twice")
def _(forged: Forged) -> None:
    retried(forged)
    forged.run("retried", 30, 6, start=35, end=36, attempt=2)
    forged.locks["retried"].fence = 6


@case("I2", "the next attempt before the first had ended")
def _(forged: Forged) -> None:
    retried(forged)
    the(forged, "retried", 4).finished_at = at(32)


@case("I1", "two claims of one due time, one of them a catch-up")
def _(forged: Forged) -> None:
    forged.run("report", 30, 5, start=34, trigger="catch_up")
    forged.locks["report"].fence = 5


@case("I1", "claimed and skipped")
def _(forged: Forged) -> None:
    forged.skip("report", 30, reason="held by web2", trigger="catch_up")


@case("I1", "skipped twice")
def _(forged: Forged) -> None:
    forged.skip("report", 20, reason="held by web2", trigger="catch_up")


@case("I1", "a process of a claim that nobody recorded")
def _(forged: Forged) -> None:
    forged.process("report", 30, 9, start=35, end=36)


@case("I2", "two at work at the same time")
def _(forged: Forged) -> None:
    forged.process("report", 30, 3, start=30.5, end=32, pid=1)


@case("I2", "an old run works on while the next does")
def _(forged: Forged) -> None:
    line = next(
        line for line in forged.lines if line["event"] == "end" and line.get("fence") == 2 and line["task"] == "report"
    )
    line["boot"] = BOOT + 30.6


@case("I2", "claimed while another had it")
def _(forged: Forged) -> None:
    the(forged, "report", 1).finished_at = at(10.8)


@case("I2", "claimed while another had it and never gave it back")
def _(forged: Forged) -> None:
    the(forged, "report", 1).finished_at = None


@case("I3", "a fence used twice")
def _(forged: Forged) -> None:
    the(forged, "report", 4).fence = 2


@case("I3", "a fence that falls")
def _(forged: Forged) -> None:
    first, last = the(forged, "report", 1), the(forged, "report", 4)
    first.fence, last.fence = 4, 1


@case("I3", "a row that forgot its fence")
def _(forged: Forged) -> None:
    forged.locks["report"].fence = 3


@case("I3", "a clean-up that did not raise the fence")
def _(forged: Forged) -> None:
    forged.runs = [run for run in forged.runs if (run.task, run.fence) != ("report", 4)]
    forged.skip("report", 30)
    forged.lines = [line for line in forged.lines if line.get("fence") != 4]
    forged.locks["report"].fence = 2


@case("I4", "freed long after its lease")
def _(forged: Forged) -> None:
    forged.cleanups[0].cleaned_at = at(20)


@case("I4", "freed before its lease had ended")
def _(forged: Forged) -> None:
    forged.cleanups[0].cleaned_at = at(13)


@case("I4", "renewed by nobody knows whom after its holder was killed")
def _(forged: Forged) -> None:
    forged.cleanups[0].expired_at, forged.cleanups[0].cleaned_at = at(19), at(20)


@case("I4", "held for ever")
def _(forged: Forged) -> None:
    forged.at_rest = False
    forged.lock("report", last=30, fence=4, owner="report 4", server="web1", expires_at=at(33))


@case("I4", "a run side by side whose lease nobody cleaned up")
def _(forged: Forged) -> None:
    forged.at_rest = False
    run = the(forged, "side", 2)
    run.status, run.finished_at, run.expires_at = "running", None, at(13)


@case("I5", "no rest between two runs")
def _(forged: Forged) -> None:
    the(forged, "report", 4).finished_at = at(38.9)
    forged.run("report", 40, 5)
    forged.lock("report", last=40, fence=5)


@case("I6", "an abandoned run without a clean-up")
def _(forged: Forged) -> None:
    forged.cleanups.clear()
    forged.lines = [line for line in forged.lines if line["event"] not in ("cleanup", "killed")]


@case("I6", "two clean-ups of one lock")
def _(forged: Forged) -> None:
    forged.cleanups.append(forged.cleanups[0])


@case("I6", "two signals of one clean-up")
def _(forged: Forged) -> None:
    forged.lines.append(next(line for line in forged.lines if line["event"] == "cleanup"))


@case("I6", "a signal without a clean-up")
def _(forged: Forged) -> None:
    forged.lines.append({"event": "cleanup", "boot": BOOT + 32, "task": "report", "owner": "report 4"})


@case("I6", "a run that ended well and was cleaned up too")
def _(forged: Forged) -> None:
    the(forged, "report", 2).status = "succeeded"


@case("I6", "a run that its row calls running, long after")
def _(forged: Forged) -> None:
    run = the(forged, "report", 4)
    run.status, run.finished_at = "running", None


@case("I6", "a lock that is held when nothing runs")
def _(forged: Forged) -> None:
    forged.locks["report"].owner = "report 4"


@case("I7", "at work after its lease had ended")
def _(forged: Forged) -> None:
    line = next(
        line for line in forged.lines if line["event"] == "end" and line.get("fence") == 2 and line["task"] == "report"
    )
    line["boot"] = BOOT + 14.1


@case("I7", "no pairs of clocks")
def _(forged: Forged) -> None:
    del forged.lines[0]


@case("I8", "a server ran what is not meant for it")
def _(forged: Forged) -> None:
    forged.run("chosen", 0, 1, server="web1")
    forged.skip("chosen", 30, count=3)
    forged.lock("chosen", last=30, fence=1)


@case("I8", "a server skipped what is not meant for it")
def _(forged: Forged) -> None:
    forged.lines.append({"event": "skipped", "boot": BOOT + 2, "task": "chosen", "server": "web3"})


@case("I8", "a server ran what nobody declared")
def _(forged: Forged) -> None:
    forged.run("removed", 0, 1)


@case("I8", "a server ran another's own task")
def _(forged: Forged) -> None:
    forged.run("own@web2", 0, 1, server="web1")
    forged.lock("own@web2", last=0, fence=1)


@case("I9", "a due time is gone")
def _(forged: Forged) -> None:
    forged.runs = [run for run in forged.runs if run.due_at != at(20)]


@case("I9", "more due times are accounted for than there were")
def _(forged: Forged) -> None:
    next(run for run in forged.runs if run.due_at == at(20)).count = 2


@case("I9", "a run that was not due")
def _(forged: Forged) -> None:
    the(forged, "report", 4).due_at = at(29)
    for line in forged.lines:
        if line.get("fence") == 4:
            line["due_at"] = at(29).isoformat()


@case("I9", "nobody runs it any more")
def _(forged: Forged) -> None:
    forged.now = 150


@pytest.mark.parametrize(
    ("invariant", "forge"), [(i, f) for i, _, f in CASES], ids=[f"{i} {text}" for i, text, _ in CASES]
)
def test_the_checker_sees(invariant: str, forge: Callable[[Forged], object]) -> None:
    forged = clean()
    forge(forged)
    wrong = forged.wrong()
    assert any(text.startswith(f"{invariant}:") for text in wrong), wrong


OF_A_CACHE_THAT_LOST_ITS_DATA = {
    "a row that forgot its fence",
    "a clean-up that did not raise the fence",
    "a due time is gone",
    "more due times are accounted for than there were",
}
"""What is no fault then."""


@pytest.mark.parametrize(
    ("invariant", "forge"),
    [(i, f) for i, text, f in CASES if text not in OF_A_CACHE_THAT_LOST_ITS_DATA],
    ids=[f"{i} {text}" for i, text, _ in CASES if text not in OF_A_CACHE_THAT_LOST_ITS_DATA],
)
def test_the_checker_sees_it_in_a_cache_that_lost_its_data_too(
    invariant: str, forge: Callable[[Forged], object]
) -> None:
    forged = clean()
    forged.lossy = True
    forge(forged)
    wrong = forged.wrong()
    assert any(text.startswith(f"{invariant}:") for text in wrong), wrong


def test_every_invariant_has_a_forgery() -> None:
    assert {invariant for invariant, _, _ in CASES} == {f"I{number}" for number in range(1, 10)}


NEAR: list[tuple[str, Callable[[Forged], object]]] = []


def near(text: str) -> Callable[[Callable[[Forged], object]], Callable[[Forged], object]]:
    def add(forge: Callable[[Forged], object]) -> Callable[[Forged], object]:
        NEAR.append((text, forge))
        return forge

    return add


@near("another attempt, which does not wait for the break")
def _(forged: Forged) -> None:
    retried(forged)


@near("a run that began the moment the one before had ended, where no break is asked for")
def _(forged: Forged) -> None:
    forged.run("own@web1", 0, 1, end=10)
    forged.run("own@web1", 10, 2, start=10)
    forged.skip("own@web1", 30, count=2)
    forged.lock("own@web1", last=30, fence=2)


@near("a break of just the right length, measured by a later statement")
def _(forged: Forged) -> None:
    the(forged, "report", 4).finished_at = at(38.1)
    forged.run("report", 40, 5, start=40.0)
    forged.lock("report", last=40, fence=5)


@near("no break after a clean-up")
def _(forged: Forged) -> None:
    forged.cleanups[0].expired_at, forged.cleanups[0].cleaned_at = at(14.4), at(19.3)
    the(forged, "report", 2).finished_at = at(19.3)
    forged.runs = [run for run in forged.runs if run.due_at != at(20)]
    forged.run("report", 20, 3, start=20.1)


@near("a run that succeeded, but came too late: cleaned up and lost")
def _(forged: Forged) -> None:
    run = the(forged, "report", 2)
    run.status, run.finished_at = "lost", at(31)


@near("a run that was claimed and killed before its process began")
def _(forged: Forged) -> None:
    forged.lines = [line for line in forged.lines if line.get("fence") != 2 or line["task"] != "report"]


@near("a due time that is open, and young enough")
def _(forged: Forged) -> None:
    forged.now = 95


@near("the last tick just before the lease ended")
def _(forged: Forged) -> None:
    line = next(
        line for line in forged.lines if line["event"] == "end" and line.get("fence") == 2 and line["task"] == "report"
    )
    line["boot"] = BOOT + 13.999


@near("a clean-up that was recorded and never signalled, since its server was killed then")
def _(forged: Forged) -> None:
    forged.lines = [line for line in forged.lines if line["event"] != "cleanup"]


@near("a manual run at another's due time")
def _(forged: Forged) -> None:
    run = forged.run("report", 30, 5, start=34, process=False)
    run.trigger = "manual"
    forged.locks["report"].fence = 5


@near("a server's clock is an hour off: its lines are by the boot clock all the same")
def _(forged: Forged) -> None:
    forged.lines.append({"event": "off", "boot": BOOT + 3, "wall": 0})


@near("a run that is under way when the tables are read")
def _(forged: Forged) -> None:
    forged.at_rest = False
    run = the(forged, "report", 4)
    run.status, run.finished_at = "running", None
    forged.lock("report", last=30, fence=4, owner=run.owner, server="web1", expires_at=at(41))


def of_a_cache(text: str) -> Callable[[Callable[[Forged], object]], Callable[[Forged], object]]:
    def add(forge: Callable[[Forged], object]) -> Callable[[Forged], object]:
        def of_a_cache(forged: Forged) -> None:
            forged.lossy = True
            forge(forged)

        NEAR.append((text, of_a_cache))
        return forge

    return add


@of_a_cache("a row that was lost: a fence, and the due times that nobody can tell of")
def _(forged: Forged) -> None:
    forged.lock("report", last=30, fence=0)
    forged.runs = [run for run in forged.runs if run.due_at != at(20)]


@of_a_cache("a due time that ran, and was passed over since nobody could know")
def _(forged: Forged) -> None:
    forged.skip("report", 30, trigger="catch_up")


@of_a_cache("a run whose end its killed keeper did not come to record, and its clean-up lost with its row")
def _(forged: Forged) -> None:
    run = the(forged, "report", 2)
    run.status, run.finished_at = "running", None
    forged.cleanups.clear()
    forged.lines = [line for line in forged.lines if line["event"] != "cleanup"]


@of_a_cache("a run that its killed keeper did not come to record at all")
def _(forged: Forged) -> None:
    forged.runs.remove(the(forged, "report", 2))
    forged.cleanups.clear()
    forged.lines = [line for line in forged.lines if line["event"] != "cleanup"]


@of_a_cache("a missed due time, told by a server that is not meant to run it")
def _(forged: Forged) -> None:
    forged.lines.append({"event": "skipped", "boot": BOOT + 2, "task": "chosen", "server": "web3", "reason": "missed"})


@pytest.mark.parametrize("forge", [forge for _, forge in NEAR], ids=[text for text, _ in NEAR])
def test_the_checker_lets_pass(forge: Callable[[Forged], object]) -> None:
    forged = clean()
    forge(forged)
    assert forged.wrong() == []

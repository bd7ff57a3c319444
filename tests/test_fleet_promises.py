"""What looks at the promises of services is checked: forged journals and tables for each thing that it must see."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from .fleet.checker import Told, interval
from .fleet.promises import Findings, kept
from .test_fleet_checker import BOOT, Forged, at

TASKS = {
    "report": Told(due=interval(10), min_break=timedelta(seconds=1)),
    "queued": Told(due=interval(10), min_break=timedelta(seconds=1), waits=True),
    "put off": Told(due=interval(10), later=4.0),
    "retried": Told(due=interval(20), retries=2, backoff=timedelta(seconds=2), failures=1),
    "again": Told(due=interval(30), reruns=3),
}
KILLED, TERMINATED, ENDED = 11.5, 32.0, 43.0


class Served(Forged):
    """A minute of two services: one was killed, and one told to end."""

    def run(self, task: str, due: float, fence: int, **more: Any) -> Any:
        return super().run(task, due, fence, **{"reason": "", "error": "", **more})

    def does(self, event: str, server: str, at: float, **more: Any) -> None:
        keeper = {"web1": 1, "web2": 2}[server]
        self.lines.append({"event": event, "boot": BOOT + at, "server": server, "keeper": keeper, **more})

    def kept(self) -> Findings:
        found = self.evidence()
        return kept(found, TASKS, bound=2.0, grace=20.0, since=at(-1), until=at(57))

    def the(self, task: str, due: float, attempt: int = 1) -> Any:
        return next(run for run in self.runs if (run.task, run.due_at, run.attempt) == (task, at(due), attempt))

    def move(self, task: str, due: float, seconds: float, attempt: int = 1) -> None:
        """Have it begin and end so much later."""
        run = self.the(task, due, attempt)
        run.started_at += timedelta(seconds=seconds)
        run.finished_at += timedelta(seconds=seconds)
        for line in self.lines:
            if (line.get("task"), line.get("fence"), line["event"]) in {(task, run.fence, e) for e in WORKING}:
                line["boot"] += seconds

    def drop(self, task: str, due: float, attempt: int = 1) -> None:
        run = self.the(task, due, attempt)
        self.runs.remove(run)
        self.lines = [
            line for line in self.lines if (line.get("task"), line.get("fence")) != (task, run.fence) or "key" in line
        ]


WORKING = ("start", "tick", "end")


def served() -> Served:
    """Nothing is wrong here."""
    forged = Served()
    forged.run("report", 0, 1)
    killed = forged.run("report", 10, 2, end=KILLED, status="abandoned")
    killed.finished_at = at(15)
    forged.does("killed", "web1", KILLED, which="keeper")
    forged.cleanup(killed, expired=14, cleaned=15)
    forged.run("report", 20, 4, server="web2")
    forged.run("report", 30, 5, end=42, server="web2")
    forged.does("terminated", "web2", TERMINATED)
    forged.does("ended", "web2", ENDED, status=0)
    forged.skip("report", 40, reason="held by web2 since 03:00:30")
    forged.run("report", 50, 6)
    forged.lock("report", last=50, fence=6)

    forged.run("queued", 0, 1, end=12, server="web2")
    forged.run("queued", 10, 2, start=13.1, end=31, server="web2")
    forged.skip("queued", 20)
    forged.run("queued", 30, 3, start=32.1, end=33)
    forged.run("queued", 40, 4)
    forged.run("queued", 50, 5)
    forged.lock("queued", last=50, fence=5)

    for number in range(6):
        forged.run("put off", 10 * number, number + 1, start=10 * number + 2.5)
    forged.lock("put off", last=50, fence=6)

    for number, due in enumerate((0, 20, 40)):
        fence = 2 * number + 1
        forged.run("retried", due, fence, status="failed", reason="tried again in 2 s")
        forged.run("retried", due, fence + 1, start=due + 3.2, attempt=2)
    forged.lock("retried", last=40, fence=6)

    killed = forged.run("again", 0, 1, end=KILLED, status="abandoned")
    killed.finished_at = at(15)
    forged.cleanup(killed, expired=14, cleaned=15)
    forged.run("again", 0, 3, start=15.2, attempt=2)
    forged.run("again", 30, 4, server="web2")
    forged.lock("again", last=30, fence=4)
    forged.now = 58
    return forged


def test_a_history_in_which_all_was_kept_passes_and_is_measured() -> None:
    found = served().kept()
    assert found.wrong == []
    assert [round(seconds, 2) for seconds, _ in found.recovered] == [3.5, 3.5]
    assert max(found.late)[0] < 0.2
    assert found.lateness(0.5) == pytest.approx(0.11, abs=0.02)
    assert found.at_end == {"succeeded": 20, "abandoned": 2, "failed": 3}


CASES: list[tuple[str, str, Callable[[Served], object]]] = []


def case(promise: str, text: str) -> Callable[[Callable[[Served], object]], Callable[[Served], object]]:
    def add(forge: Callable[[Served], object]) -> Callable[[Served], object]:
        CASES.append((promise, text, forge))
        return forge

    return add


@case("P1", "a start that is late")
def _(forged: Served) -> None:
    forged.move("report", 50, 2.1)


@case("P1", "a claim in time whose process begins late")
def _(forged: Served) -> None:
    next(line for line in forged.lines if line.get("fence") == 6 and line["task"] == "report")["boot"] += 2.1


@case("P1", "a start before its due time")
def _(forged: Served) -> None:
    forged.move("report", 50, -0.5)


@case("P1", "a start that is late after the clean-up of the one before")
def _(forged: Served) -> None:
    forged.cleanups[0].cleaned_at = at(17)
    forged.move("report", 20, 2.5)


@case("P1", "one that waited, and then waited longer than for the end of the one before")
def _(forged: Served) -> None:
    forged.move("queued", 10, 2.1)


@case("P1", "a run in whose place an earlier due time could have run")
def _(forged: Served) -> None:
    forged.drop("queued", 40)
    forged.skip("queued", 40)


@case("P1", "a due time at the end that nobody took")
def _(forged: Served) -> None:
    forged.drop("report", 50)
    forged.locks["report"].last_due_at = at(40)


@case("P1", "a task that is held for ever")
def _(forged: Served) -> None:
    forged.drop("report", 50)
    forged.locks["report"].last_due_at = at(40)
    forged.the("report", 30).finished_at = None


@case("P1", "jitter beyond what was asked for")
def _(forged: Served) -> None:
    for number in range(6):
        forged.move("put off", 10 * number, 4)


@case("P1", "jitter that is not the same each time")
def _(forged: Served) -> None:
    forged.move("put off", 30, -2.3)


@case("P2", "skipped as held while nobody held it")
def _(forged: Served) -> None:
    forged.the("report", 30).finished_at = at(38)


@case("P2", "one that waits was skipped")
def _(forged: Served) -> None:
    forged.drop("queued", 20)
    forged.skip("queued", 20, reason="held by web2 since 03:00:13")


@case("P2", "missed, and nothing ran in its place")
def _(forged: Served) -> None:
    forged.drop("report", 50)
    forged.skip("report", 50)


@case("P2", "missed before one that was held, and nobody held it")
def _(forged: Served) -> None:
    forged.drop("report", 30)
    forged.skip("report", 30)


@case("P2", "skipped for a reason that it does not have")
def _(forged: Served) -> None:
    forged.drop("report", 50)
    forged.skip("report", 50, reason="filtered")


@case("P3", "a failure of one that does not fail")
def _(forged: Served) -> None:
    forged.the("report", 50).status = "failed"


@case("P3", "a run that did not fail as it does")
def _(forged: Served) -> None:
    forged.the("retried", 40).status = "succeeded"


@case("P3", "abandoned, though its server was well")
def _(forged: Served) -> None:
    run = forged.the("report", 50)
    run.status = "abandoned"
    forged.cleanup(run, expired=54, cleaned=55)


@case("P3", "lost, and no clean-up says by whom")
def _(forged: Served) -> None:
    forged.does("stopped", "web1", 50.5, which="all")
    forged.the("report", 50).status = "lost"


@case("P4", "a killed server's run that is not abandoned")
def _(forged: Served) -> None:
    forged.the("report", 10).status = "lost"


@case("P4", "a clean-up of which nobody was told")
def _(forged: Served) -> None:
    forged.lines = [line for line in forged.lines if line["event"] != "cleanup"]


@case("P4", "a clean-up of which two were told")
def _(forged: Served) -> None:
    forged.lines.append(next(line for line in forged.lines if line["event"] == "cleanup"))


@case("P4", "a killed server's run without a clean-up")
def _(forged: Served) -> None:
    del forged.cleanups[0]


@case("P4", "a kill that hit nothing")
def _(forged: Served) -> None:
    forged.does("killed", "web1", 47.0, which="keeper")


@case("P5", "a claim of a server that had been told to end")
def _(forged: Served) -> None:
    forged.the("queued", 40).server = "web2"


@case("P5", "a service that ended badly")
def _(forged: Served) -> None:
    next(line for line in forged.lines if line["event"] == "ended")["status"] = -9


@case("P5", "a service that did not end")
def _(forged: Served) -> None:
    forged.lines = [line for line in forged.lines if line["event"] != "ended"]


@case("P5", "a run beyond the grace")
def _(forged: Served) -> None:
    forged.the("report", 30).finished_at = at(53)


@case("P5", "a run that ended otherwise at the end of its server")
def _(forged: Served) -> None:
    forged.the("report", 30).status = "abandoned"


@case("P5", "an end at which nothing ran")
def _(forged: Served) -> None:
    forged.the("report", 30).server = "web1"


@case("P6", "a failure that was not tried again")
def _(forged: Served) -> None:
    forged.drop("retried", 20, attempt=2)


@case("P6", "tried again at once")
def _(forged: Served) -> None:
    forged.move("retried", 20, -1.5, attempt=2)


@case("P6", "tried again too late")
def _(forged: Served) -> None:
    forged.move("retried", 20, 3, attempt=2)


@case("P6", "tried again after it went well")
def _(forged: Served) -> None:
    forged.run("report", 50, 7, start=52, attempt=2)


@case("P6", "a due time whose server died, and that was not run again")
def _(forged: Served) -> None:
    forged.drop("again", 0, attempt=2)


@case("P6", "a due time that its server lost to a clean-up, and that was not run again")
def _(forged: Served) -> None:
    forged.the("again", 0).status = "lost"
    forged.drop("again", 0, attempt=2)


def test_a_due_time_whose_server_woke_up_and_said_that_it_had_lost_it_is_run_again_too() -> None:
    forged = served()
    forged.lines = [line for line in forged.lines if line["event"] != "killed"]
    forged.does("stopped", "web1", KILLED, which="all")
    forged.does("continued", "web1", 20.5, which="all")
    forged.the("again", 0).status = forged.the("report", 10).status = "lost"
    assert forged.kept().wrong == []


@pytest.mark.parametrize(
    ("promise", "forge"), [(p, f) for p, _, f in CASES], ids=[f"{p} {text}" for p, text, _ in CASES]
)
def test_it_is_seen_that_this_was_not_kept(promise: str, forge: Callable[[Served], object]) -> None:
    forged = served()
    forge(forged)
    wrong = forged.kept().wrong
    assert any(text.startswith(f"{promise}:") for text in wrong), wrong


def test_every_promise_has_a_forgery() -> None:
    assert {promise for promise, _, _ in CASES} == {f"P{number}" for number in range(1, 7)}

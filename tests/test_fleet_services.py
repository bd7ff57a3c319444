"""
Services and a cron together, under real conditions: killed, stopped, paused, and what was promised all the same.

FLEET_SECONDS says for how long (75 at least).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from .fleet.checker import Told, check, interval
from .fleet.drill import Drill
from .fleet.harness import HISTORY_IN_POSTGRESQL, Fleet
from .fleet.journal import boot
from .fleet.projects.services.mix import LONG, TOLD
from .fleet.promises import Findings, kept, spread
from .stores import Store
from .test_fleet_faults import evidence

SECONDS = max(75.0, float(os.environ.get("FLEET_SECONDS", "75")))
LEASE, GRACE = 6.0, 20.0
LOOK_EVERY = 5.5
"""A service looks every 4.5 seconds, and is seldom at rest for that long here."""
USUALLY, AT_MOST = 1.0, 8.0
"""Seconds within which half of the due times are started, and all. How far above that a busy machine's hundredth is, is
for ``benchmarks/lateness.py``; a service that did not wake for its due times would be found by the first."""
A_ROUND = 65.0
"""Seconds that one round of blows takes, with the time that is promised for each."""


def fleet_of(store: Store, tmp_path: Path, *, lease: float = LEASE, **settings: Any) -> Fleet:
    settings = {"MAX_CONCURRENCY": 40, "LOG_LEVEL": "abandoned", **settings}
    return Fleet(store, tmp_path, "services", lease=lease, heartbeat=lease / 3, settings=settings)


def judged(drill: Drill, told: Mapping[str, Told] = TOLD) -> Findings:
    """End everything, and return what was not kept of what is promised."""
    wrong = drill.close_down()
    found = evidence(drill.fleet)
    assert drill.since is not None
    assert drill.until is not None
    wrong += check(found, told, lease=drill.fleet.lease, look_every=LOOK_EVERY)
    findings = kept(found, told, bound=AT_MOST, grace=GRACE, since=drill.since, until=drill.until)
    findings.wrong[:0] = wrong
    return findings


def told_of(drill: Drill, findings: Findings, told: Mapping[str, Told] = TOLD) -> str:
    """Return the figures."""
    assert drill.since is not None
    assert drill.until is not None
    runs = drill.fleet.runs()
    seconds = (drill.until - drill.since).total_seconds()
    accounts: Counter[str] = Counter()
    for run in runs:
        if run.status == "skipped":
            accounts[run.reason.split()[0]] += run.count
    claims = [run for run in runs if run.status != "skipped"]
    accounts["run"] = len({(run.task, run.due_at) for run in claims})
    due = sum(len(told[lock.task].due(lock.schedule_since, lock.last_due_at)) for lock in drill.fleet.locks())
    blows = Counter(line["event"] for line in drill.fleet.journal.of("killed", "terminated", "stopped"))
    late = sorted(findings.late, reverse=True)
    cleanups = drill.fleet.cleanups()
    to_free = [(c.cleaned_at - c.expired_at).total_seconds() for c in cleanups if c.expired_at]
    return "\n".join(
        [
            f"{len(told)} tasks for {seconds:.0f} s on {len(drill.services)} services and {len(drill.passes)} passes: "
            f"{len(claims)} runs ({len(claims) / seconds:.1f} a second), by server "
            f"{dict(sorted(Counter(run.server for run in claims).items()))}",
            f"of {due} due times: {dict(accounts)}; ended: {dict(findings.at_end)}, "
            f"{sum(run.attempt > 1 for run in claims)} of them further attempts; blows: {dict(blows)}",
            f"late: p50 {findings.lateness(0.5):.3f} s, p99 {findings.lateness(0.99):.3f} s, "
            f"p99.9 {findings.lateness(0.999):.3f} s, at most {late[0][0]:.3f} s ({late[0][1]})",
            f"clean-ups: {len(cleanups)}, {spread([(each, '') for each in to_free])} after the lease's end, "
            f"{spread(findings.recovered)} after the kill",
        ]
    )


@HISTORY_IN_POSTGRESQL
def test_services_and_a_cron_run_each_due_time_once_and_on_time_whatever_is_done_to_one_of_them(
    store: Store, tmp_path: Path
) -> None:
    with fleet_of(store, tmp_path) as fleet:
        fleet.register()
        assert len(TOLD) == 50
        drill = Drill(fleet, LONG, arguments=["--grace", f"{GRACE:g}"])
        drill.serve("web1")
        drill.serve("web2")
        drill.cron("web3")
        drill.wait_until_up()
        for number in range(max(1, int((SECONDS - 8) / A_ROUND))):
            began = number * A_ROUND
            one, other = ("web1", "web2") if number % 2 == 0 else ("web2", "web1")
            # Its process alone, as by `kill`; then all of it, as when a machine dies.
            which = "keeper" if number % 2 == 0 else "all"
            drill.after(began + 5, lambda it=one, which=which: drill.kill(it, which))  # type: ignore[misc]
            drill.after(began + 22, lambda it=other: drill.terminate(it))  # type: ignore[misc]
            drill.after(began + 42, lambda it=one: drill.pause(it, 1.5 * LEASE))  # type: ignore[misc]
        drill.run(SECONDS)
        findings = judged(drill)
        print(f"\n{store.name}: {told_of(drill, findings)}")
        blows = Counter(line["event"] for line in fleet.journal.of("killed", "terminated", "stopped"))
        assert not findings.wrong, "\n".join(findings.wrong[:40])
        assert min(blows["killed"], blows["terminated"], blows["stopped"]) >= 1
        assert findings.lateness(0.5) < USUALLY


# -- what it has to find ----------------------------------------------------------------------------------------------


QUICK = 3.0
"""The lease of these: they shall not take long."""


@dataclass(frozen=True)
class Mutation:
    """Something left out of the engine, what brings it to light, and what is then said of it."""

    text: str
    invariant: str
    said: str
    lock: str = "multiserver_schedule.locks.orm.ORMLock"
    arguments: Sequence[str] = ()
    blow: Callable[[Drill], object] = lambda drill: None
    seconds: float = 2.0
    """For how long at least: a drill goes on until its blow is over."""
    settings: Mapping[str, Any] = field(default_factory=dict)


MUTATIONS = [
    Mutation(
        "a claim does not ask for the last due time",
        "I1",
        "processes began for",
        lock="tests.fleet.faulty.ClaimsTwice",
        # Else the break would keep most of them apart, and a slow line be cut.
        settings={"MIN_BREAK": 0, "LEASE": LEASE, "HEARTBEAT": LEASE / 3},
        seconds=12.0,
    ),
    Mutation(
        "a service that is told to end kills what it runs",
        "P3",
        "runschedule was stopped",
        arguments=["--grace", "0"],
        blow=lambda drill: drill.terminate("web1"),
    ),
    Mutation(
        "nobody reaps",
        "I4",
        "is held still",
        lock="tests.fleet.faulty.NeverReaps",
        blow=lambda drill: drill.kill("web1"),
    ),
]


@HISTORY_IN_POSTGRESQL
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[each.text for each in MUTATIONS])
def test_a_drill_finds_it_when(store: Store, tmp_path: Path, mutation: Mutation) -> None:
    settings = {"LOCKS": {"default": {"BACKEND": mutation.lock}}, **mutation.settings}
    with fleet_of(store, tmp_path, lease=QUICK, **settings) as fleet:
        fleet.register()
        drill = Drill(fleet, LONG, arguments=mutation.arguments)
        drill.serve("web1")
        drill.serve("web2")
        drill.wait_until_up()
        drill.after(1, lambda: mutation.blow(drill))
        drill.run(mutation.seconds)
        findings = judged(drill)
        print(f"\n{mutation.text}: {len(findings.wrong)} findings, {Counter(text[:2] for text in findings.wrong)}")
        print(
            {line["event"]: line["boot"] for line in fleet.journal.of("killed", "stopped", "terminated", "continued")}
        )
        assert any(text.startswith(f"{mutation.invariant}:") and mutation.said in text for text in findings.wrong), (
            f"Nothing was found of it, so what passes here says nothing: {findings.wrong}"
        )


# -- a cron alone -----------------------------------------------------------------------------------------------------


@HISTORY_IN_POSTGRESQL
def test_the_passes_of_two_servers_hand_tasks_of_seconds_over_without_a_gap_or_a_double(
    store: Store, tmp_path: Path
) -> None:
    """A minute is six seconds here."""
    minute, minutes = 6, 4
    told = {f"{period}s": Told(due=interval(period), min_break=timedelta(seconds=period / 6)) for period in (1, 2, 5)}
    with Fleet(
        store, tmp_path, "handing", lease=LEASE, heartbeat=LEASE / 3, env={"FLEET_MINUTE": f"{minute}"}
    ) as fleet:
        fleet.register()
        drill = Drill(fleet, {})
        drill.cron("web1", minute)
        drill.cron("web2", minute)
        fleet.wait_for(lambda: fleet.journal.of("start"), "a first run")
        drill.wait_until_up()
        drill.run(minute * minutes)
        began = boot()
        findings = judged(drill, told)
        took = boot() - began
        print(f"\n{store.name}: {told_of(drill, findings, told)}; ended within {took:.1f} s")
        assert not findings.wrong, "\n".join(findings.wrong)
        others = [run for run in fleet.runs() if run.status != "succeeded"]
        assert {(run.status, run.reason) for run in others} <= {("skipped", "missed")}, "none of them was held"
        assert len(others) <= 2, "a gap at each of the hand-overs would be more than a busy machine's hiccups"
        assert len(drill.passes) >= 2 * minutes
        assert [one.poll() for one in drill.passes] == [0] * len(drill.passes)
        assert {run.server for run in fleet.runs() if run.status == "succeeded"} == {"web1", "web2"}

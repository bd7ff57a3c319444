"""
The Memcached lock in a storm: real processes that are killed and stopped, and a server that loses data meanwhile.

A referee reads what the processes did: how often a due time was claimed twice, how often two runs of a task overlapped,
and how often a fence was given out twice. It is shown a broken lock first, on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pymemcache.client.base import Client

from multiserver_schedule.cron import Every
from multiserver_schedule.due import Policy, plan
from multiserver_schedule.entries import Outcome, ReleasedClaim, ScheduledTask, Skip
from multiserver_schedule.locks import memcached
from multiserver_schedule.locks.memcached import MemcachedLock
from multiserver_schedule.testing import contract
from multiserver_schedule.testing.contract import DAY, HOUR, THREE, Notes, Server, a_task, declare

from . import servers
from .caches import ALIAS, CacheStore, in_use, of
from .fleet.harness import libfaketime
from .stores import ROOT

LEASE = 1.5
HEARTBEAT = 0.5
TASKS = 16
PROCESSES = 8
SECONDS = 10.0


WORKER = """
import json, os, sys
if os.environ.get("FAKETIME"):
    from tests.fleet.start import mend_what_libfaketime_breaks
    mend_what_libfaketime_breaks()
import django
from django.conf import settings
order = json.loads(sys.argv[1])
settings.configure(
    CACHES={"lock": order["cache"]},
    USE_TZ=True,
    INSTALLED_APPS=["multiserver_schedule"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
)
django.setup()
from tests.test_memcached_lock_faults import work
work(order)
"""


# -- one process ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    claim: Any
    until: float
    """Monotonic time at which the runner ends it, unless the lease is renewed before."""
    ends: float
    renew_at: float


def work(order: dict[str, Any]) -> None:
    """Look, sync, reap, claim, renew and release as a keeper does, and write down what came of it."""
    if order["broken"] == "set":
        memcached.line._command = lambda key, value, token: b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value)
    server = order["server"]
    every = Every(timedelta(seconds=1))
    tasks = [
        ScheduledTask(
            name=f"t{i:02}",
            kind="call",
            target="x",
            timetable=every,
            lease=timedelta(seconds=LEASE),
            min_break=NO_BREAK,
        )
        for i in range(order["tasks"])
    ]
    declared = declare(*tasks, server=server)
    policy = Policy(lease=timedelta(seconds=LEASE), min_break=NO_BREAK, slow_start=timedelta(seconds=2))
    lock = MemcachedLock("default", {"cache": ALIAS, "timeout": 1.0})
    chance = random.Random(order["seed"])
    file = os.open(order["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    runs: dict[str, Run] = {}

    def write(event: str, **what: Any) -> None:
        os.write(file, (json.dumps({"event": event, "at": time.monotonic(), "server": server, **what}) + "\n").encode())

    def cleaned(cleanups: Sequence[Any]) -> Sequence[Any]:
        for cleanup in cleanups:
            write("cleaned", owner=cleanup.owner, task=cleanup.task)
        return cleanups if chance.random() < 0.8 else ()

    def step() -> None:
        look = lock.look(declared)
        if not look.known:
            synced = lock.sync(declared)
            write("synced", lost=len(synced.lost), trouble=synced.trouble)
            look = lock.look(declared)
        if look.expired:
            lock.reap(server=server, record=cleaned)
            look = lock.look(declared)
        found = plan(declared.tasks, look.due, look.now, server=server, policy=policy)
        chance.shuffle(found.ready)
        sent = time.monotonic()
        for claim in lock.claim(found.ready, server=server, slots=6, record=lambda claims, now: None):
            # A claim whose answer was lost was sent in an earlier step.
            began = min(sent, time.monotonic() - (look.now - claim.acquired_at).total_seconds())
            until = began + LEASE
            started = time.monotonic() < until - 0.1
            write(
                "claimed",
                task=claim.occurrence.row,
                due=claim.occurrence.due_at.timestamp(),
                owner=claim.owner,
                fence=claim.fence,
                until=until,
                started=started,
            )
            if started:
                runs[claim.owner] = Run(
                    claim, until, time.monotonic() + chance.uniform(0.0, 2 * LEASE), sent + HEARTBEAT
                )
        skips = [Skip(occurrence=occurrence, reason="held") for occurrence, _ in found.held]
        for skip in lock.skip([*found.missed, *skips], record=lambda skips, now: None):
            write("skipped", task=skip.occurrence.row, due=skip.occurrence.due_at.timestamp(), reason=skip.reason)

    def attend() -> None:
        now = time.monotonic()
        for owner in [owner for owner, run in runs.items() if now >= run.until]:
            # The runner has ended it.
            write("ended", owner=owner)
            del runs[owner]
        due = [run for run in runs.values() if now >= run.renew_at]
        if due:
            sent = time.monotonic()
            standing = lock.renew([run.claim for run in due])
            for run in due:
                owner = run.claim.owner
                if owner in standing:
                    run.until, run.renew_at = sent + LEASE, sent + HEARTBEAT
                    write("renewed", owner=owner, until=run.until, sent=sent)
                else:
                    write("ended", owner=owner, lost=True)
                    del runs[owner]
        over = [run for run in runs.values() if time.monotonic() >= run.ends]
        if over:
            for run in over:
                write("ended", owner=run.claim.owner)
            outcome = Outcome(status="succeeded")
            items = [ReleasedClaim(claim=run.claim, outcome=outcome, min_break=NO_BREAK) for run in over]
            for run in over:
                # Whether or not the release arrives: its work is done.
                del runs[run.claim.owner]
            lock.release(items, record=lambda releases, now: None)

    write("up", pid=os.getpid())
    # Nobody to write to any more: the test has ended.
    while os.getppid() == order["parent"]:
        for what in (attend, step):
            try:
                what()
            except Exception as error:
                write("trouble", text=f"{type(error).__name__}: {error}"[:200])
                lock.close()
        select.select((), (), (), chance.uniform(0.0, 0.03))


NO_BREAK = timedelta(0)
ENDED = THREE + contract.LEASE


# -- the referee ------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    claims: int = 0
    twice: list[str] = field(default_factory=list)
    """(task, due time) that was claimed by two."""
    overlaps: list[str] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    """Fences that were given out twice, or that did not rise."""
    early: list[str] = field(default_factory=list)
    """Due times that were claimed before they had come."""
    troubles: list[str] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return len(self.twice), len(self.overlaps), len(self.fences), len(self.early)


def judge(lines: Sequence[dict[str, Any]], offset: float = 0.0, tolerance: float = 1.5) -> Verdict:
    """
    Judge what all processes wrote. ``offset`` is from their monotonic clock to real time.

    A run lasts from its claim until it ended; one that nobody saw end, until its lease did, which is when its runner
    would have ended it.
    """
    verdict = Verdict(claims=sum(line["event"] == "claimed" for line in lines))
    of_due: dict[tuple[str, float], str] = {}
    of_fence: dict[tuple[str, int], str] = {}
    runs: dict[str, list[Any]] = {}
    for line in sorted(lines, key=lambda line: line["at"]):
        owner = line.get("owner", "")
        if line["event"] == "claimed":
            key = (line["task"], line["due"])
            if of_due.setdefault(key, owner) != owner:
                verdict.twice.append(f"{key} by {owner} and {of_due[key]}")
            fence = (line["task"], line["fence"])
            if of_fence.setdefault(fence, owner) != owner:
                verdict.fences.append(f"{fence} of {owner} and {of_fence[fence]}")
            if line["due"] > line["at"] + offset + tolerance:
                verdict.early.append(f"{key} at {line['at'] + offset}")
            if line["started"]:
                runs[owner] = [line["task"], line["at"], line["until"], line["fence"]]
        elif owner in runs and line["event"] == "renewed":
            runs[owner][2] = line["until"]
        elif owner in runs and line["event"] == "ended":
            runs[owner][2] = min(runs[owner][2], line["at"])
        elif line["event"] == "trouble":
            verdict.troubles.append(line["text"])
    by_task: dict[str, list[Any]] = {}
    for owner, (task, began, ended, fence) in runs.items():
        by_task.setdefault(task, []).append((began, ended, fence, owner))
    for task, spans in by_task.items():
        spans.sort()
        latest = spans[0]
        for span in spans[1:]:
            if span[0] < latest[1]:
                verdict.overlaps.append(f"{task}: {latest[3]} until {latest[1]}, {span[3]} from {span[0]}")
            if span[2] < latest[2]:
                verdict.fences.append(f"{task}: {span[2]} after {latest[2]}")
            latest = max(latest, span, key=lambda each: each[1])
    return verdict


def line(event: str, at: float, **what: Any) -> dict[str, Any]:
    return {"event": event, "at": at, "server": "web", **what}


def claimed(at: float, owner: str, **what: Any) -> dict[str, Any]:
    given = {"task": "t", "due": 0.0, "fence": 1, "until": at + LEASE, "started": True}
    return line("claimed", at, owner=owner, **{**given, **what})


class TestTheReferee:
    def test_what_is_well_is_well(self) -> None:
        lines = [
            claimed(1.0, "a"),
            line("renewed", 2.0, owner="a", until=3.5),
            line("ended", 3.0, owner="a"),
            claimed(3.1, "b", due=1.0, fence=2),
            claimed(3.2, "c", task="u"),
            claimed(8.0, "d", due=2.0, fence=3),
        ]
        assert judge(lines).counts == (0, 0, 0, 0)
        assert judge(lines).claims == 4

    def test_it_sees_a_due_time_that_is_claimed_twice(self) -> None:
        assert judge([claimed(1.0, "a"), claimed(9.0, "b", fence=2)]).counts == (1, 0, 0, 0)

    def test_it_sees_two_runs_that_overlap(self) -> None:
        lines = [claimed(1.0, "a"), line("renewed", 2.0, owner="a", until=3.5), claimed(3.4, "b", due=1.0, fence=2)]
        assert judge(lines).counts == (0, 1, 0, 0)

    def test_one_that_was_killed_lasts_until_its_lease_ends(self) -> None:
        assert judge([claimed(1.0, "a"), claimed(2.4, "b", due=1.0, fence=2)]).counts == (0, 1, 0, 0)
        assert judge([claimed(1.0, "a"), claimed(2.6, "b", due=1.0, fence=2)]).counts == (0, 0, 0, 0)

    def test_it_sees_a_fence_that_is_given_out_twice_or_falls(self) -> None:
        assert judge([claimed(1.0, "a"), claimed(9.0, "b", due=1.0)]).counts == (0, 0, 1, 0)
        assert judge([claimed(1.0, "a", fence=7), claimed(9.0, "b", due=1.0, fence=6)]).counts == (0, 0, 1, 0)

    def test_it_sees_a_due_time_that_has_not_come(self) -> None:
        assert judge([claimed(1.0, "a", due=3600.0)]).counts == (0, 0, 0, 1)


# -- the storm --------------------------------------------------------------------------------------------------------


class Storm:
    """Processes on one server, and what befalls them."""

    def __init__(self, store: CacheStore, folder: Path, *, broken: str = "", clocks: Sequence[str] = ("",)) -> None:
        self.store, self.folder, self.broken, self.clocks = store, folder, broken, clocks
        self.processes: list[subprocess.Popen[bytes]] = []
        self.chance = random.Random(7)
        self.kills = self.stops = 0
        self._seed = 0
        self._stopped: dict[int, float] = {}

    def __enter__(self) -> Storm:
        for index in range(PROCESSES):
            self.processes.append(self.start(index))
        self.wait_for(lambda: sum(line["event"] == "up" for line in self.lines()) >= PROCESSES, "all to be up")
        return self

    def __exit__(self, *args: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)

    def start(self, index: int) -> subprocess.Popen[bytes]:
        self._seed += 1
        clock = self.clocks[index % len(self.clocks)]
        order = {
            "server": f"web{index}",
            "tasks": TASKS,
            "seed": self._seed,
            "journal": str(self.folder / f"{index}.jsonl"),
            "broken": self.broken,
            "parent": os.getpid(),
            "cache": self.store.django_settings,
        }
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if clock:
            environ |= {
                "LD_PRELOAD": libfaketime(),
                "FAKETIME": clock,
                "DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_NO_CACHE": "1",
            }
        with (self.folder / f"{index}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", WORKER, json.dumps(order)],
                env=environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for path in self.folder.glob("*.jsonl"):
            for text in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last one of a process that was killed
                    found.append(json.loads(text))
        return found

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited for {what}:\n{self.told()}"
            time.sleep(0.05)

    def told(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.log"))

    def blow(self, seconds: float, *attacks: Callable[[], object], pause: float = 0.35) -> None:
        """Kill, stop and attack for so long; then let everybody go on for a moment."""
        until = time.monotonic() + seconds
        moves = [self.kill, self.stop, *attacks]
        while time.monotonic() < until:
            self.chance.choice(moves)()
            self.wake()
            time.sleep(self.chance.uniform(0.2, 1.0) * pause)
        self.wake(all_of_them=True)
        time.sleep(1.0)

    def kill(self) -> None:
        index = self.chance.randrange(PROCESSES)
        self.processes[index].kill()
        self.processes[index].wait(10)
        self._stopped.pop(index, None)
        self.processes[index] = self.start(index)
        self.kills += 1

    def stop(self) -> None:
        index = self.chance.randrange(PROCESSES)
        if index not in self._stopped:
            self.processes[index].send_signal(signal.SIGSTOP)
            self._stopped[index] = time.monotonic() + self.chance.uniform(0.2, 3.0)
            self.stops += 1

    def wake(self, all_of_them: bool = False) -> None:
        for index, until in list(self._stopped.items()):
            if all_of_them or time.monotonic() >= until:
                self.processes[index].send_signal(signal.SIGCONT)
                del self._stopped[index]

    def verdict(self) -> Verdict:
        return judge(self.lines(), offset=time.time() - time.monotonic())

    def item(self, key: str) -> str:
        lock: Any = MemcachedLock("default", {"cache": ALIAS})
        made: bytes = lock._items.key(key)
        return made.decode()

    def delete_something(self) -> None:
        key = self.chance.choice([f"row:t{self.chance.randrange(TASKS):02}"] * 6 + ["names:0", "state", "server:web3"])
        self.store.server.call("delete", self.item(key))


@pytest.fixture
def store(cache_store: CacheStore) -> CacheStore:
    return cache_store


memcached_only = pytest.mark.parametrize("cache_store", ["memcached"], indirect=True)


@memcached_only
class TestStorms:
    @pytest.fixture
    def storm(self, store: CacheStore, tmp_path: Path) -> Iterator[Callable[..., Storm]]:
        with contextlib.ExitStack() as stack:
            yield lambda **options: stack.enter_context(Storm(store, tmp_path, **options))

    def settle(self, storm: Storm) -> None:
        """Let the hold after the first use pass."""
        storm.wait_for(lambda: any(line["event"] == "claimed" for line in storm.lines()), "the first claims")

    def test_a_lock_that_sets_instead_of_comparing_is_caught(self, storm: Callable[..., Storm]) -> None:
        """Else the others prove nothing."""
        broken = storm(broken="set")
        self.settle(broken)
        broken.wait_for(lambda: broken.verdict().counts[0] > 0 and broken.verdict().counts[1] > 0, "it to be caught")

    def test_kills_and_stops_and_lost_items(self, storm: Callable[..., Storm]) -> None:
        real = storm()
        self.settle(real)
        real.blow(SECONDS, real.delete_something)
        verdict = real.verdict()
        assert verdict.counts == (0, 0, 0, 0), verdict
        assert real.kills > 3 and real.stops > 3
        assert verdict.claims > 40, (verdict, real.told())

    def test_a_flush_and_restarts_in_mid_run(self, storm: Callable[..., Storm], store: CacheStore) -> None:
        real = storm()
        self.settle(real)
        for attack in (lambda: store.server.call("flush_all"), store.server.restart):
            before = real.verdict().claims
            attack()
            real.blow(SECONDS / 3, pause=0.8)
            real.wait_for(lambda before=before: real.verdict().claims > before + 20, "claims after it")
        verdict = real.verdict()
        assert verdict.counts == (0, 0, 0, 0), verdict
        assert any(line.get("trouble") for line in real.lines())

    @pytest.mark.skipif(not libfaketime(), reason="no libfaketime on this machine")
    def test_clocks_that_are_an_hour_off_decide_nothing(self, storm: Callable[..., Storm]) -> None:
        real = storm(clocks=("+1h", "", "-1h", ""))
        self.settle(real)
        real.blow(SECONDS * 0.6, real.delete_something, pause=0.8)
        verdict = real.verdict()
        assert verdict.counts == (0, 0, 0, 0), verdict
        assert verdict.claims > 20, (verdict, real.told())

    def test_items_that_are_evicted(self, tmp_path: Path, cache_store: CacheStore) -> None:
        # -m 1 alone: memcached refuses to start, and the test proves nothing. And with its modern list of what was used
        # last, it would evict none of what is read all the time.
        with (
            servers.start("memcached", m="1", I="512k", o="no_lru_maintainer") as small,
            in_use(of("memcached", small)) as store,
        ):
            with Storm(store, tmp_path) as real:
                self.settle(real)
                stop = threading.Event()
                load = threading.Thread(target=fill, args=(small.port, stop))
                load.start()
                try:
                    real.blow(SECONDS * 0.6, pause=0.8)
                finally:
                    stop.set()
                    load.join()
                verdict = real.verdict()
                troubles = [line for line in real.lines() if line.get("trouble")]
            stats = dict(text.split()[1:3] for text in small.call("stats") if text.startswith("STAT"))
        assert int(stats["evictions"]) > 1000
        assert verdict.counts == (0, 0, 0, 0), verdict
        assert troubles, "nothing of ours was evicted"

    def test_a_reader_that_is_killed_between_reading_and_clearing_the_list(self, store: CacheStore) -> None:
        lock = MemcachedLock("default", {"cache": ALIAS})
        lock.sync(declare(), now=THREE - 10 * DAY)
        notes = Notes()
        web1 = Server(lock, notes, a_task())
        web1.sync(THREE - HOUR)
        claim = web1.must_run(THREE)
        pid = os.fork()
        if not pid:
            try:
                lock.reap(server="web2", record=lambda _: os.kill(os.getpid(), signal.SIGKILL), now=ENDED)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert lock.look(web1.declared, now=ENDED).expired is True
        assert web1.reap(ENDED) == []
        assert [(each.owner, each.cleaned_by) for each in notes.cleanups] == [(claim.owner, "web2")]
        assert lock.look(web1.declared, now=ENDED).expired is False
        lock.close()


def fill(port: int, stop: threading.Event) -> None:
    """Fill a server with items of the sizes that ours have."""
    client = Client(("127.0.0.1", port), timeout=5)
    while not stop.is_set():
        for size in (120, 200, 300, 420, 600, 850):
            client.set_many({uuid.uuid4().hex: b"x" * size for _ in range(40)})
        time.sleep(0.002)
    client.close()

"""
What is locked in a cache is recorded in a database that may be away: it runs all the same, and what is not recorded is
said. And one store's trouble is no other's; the log says the same on every store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.test import override_settings

from multiserver_schedule import logs
from multiserver_schedule.cron import Cron
from multiserver_schedule.entries import Claim, Cleanup, Occurrence, Outcome, ReleasedClaim, ScheduledTask, Skip
from multiserver_schedule.history import Afterwards
from multiserver_schedule.locks.base import BaseLock
from multiserver_schedule.locks.cache import CacheLock
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.models import CleanupLog, ScheduledRun

from . import caches, servers
from .caches import CacheStore
from .fleet.harness import CACHE_LOCK, HISTORY_IN_POSTGRESQL, HISTORY_IN_SQLITE, REDIS, TWO_CACHES, Fleet, Process
from .simulation import World, accounted, ran
from .stores import Store

UTC = timezone.utc
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
SUCCEEDED = Outcome(status="succeeded")


# -- the queue --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that go on when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Away(Afterwards):
    """A history whose database can be away, which counts how often it is tried."""

    def __init__(self, using: str) -> None:
        self.clock = Clock()
        super().__init__(using, self.clock)
        self.is_away = ""
        self.tries = 0
        ready = self._line.ready

        def try_it() -> None:
            self.tries += 1
            if self.is_away:
                raise OperationalError(self.is_away)
            ready()

        self._line.ready = try_it  # type: ignore[method-assign]


@pytest.fixture
def history(store: Store) -> Away:
    return Away(store.alias)


def claim(number: int = 0, name: str = "often") -> Claim:
    due_at = NOON + number * MINUTE
    task = ScheduledTask(name=name, kind="call", target="time.sleep", timetable=Cron("* * * * *", "UTC"))
    about = Occurrence(
        task=task,
        row=name,
        pk=0,
        due_at=due_at,
        next_due_at=due_at + MINUTE,
        lease=timedelta(seconds=30),
        min_break=timedelta(0),
    )
    owner = str(uuid.uuid4())
    expires_at = due_at + timedelta(seconds=30)
    return Claim(
        occurrence=about, owner=owner, fence=number + 1, server="web1", acquired_at=due_at, expires_at=expires_at
    )


def ended(one: Claim, outcome: Outcome = SUCCEEDED) -> list[tuple[ReleasedClaim, bool]]:
    return [(ReleasedClaim(claim=one, outcome=outcome, min_break=timedelta(0)), True)]


def cleanup_of(one: Claim) -> Cleanup:
    return Cleanup(
        task=one.occurrence.row,
        due_at=one.occurrence.due_at,
        server=one.server,
        owner=one.owner,
        fence=one.fence,
        acquired_at=one.acquired_at,
        expired_at=one.expires_at,
        cleaned_at=one.expires_at + SECOND,
        cleaned_by="web2",
        reason="lease_expired",
    )


def runs(store: Store) -> list[tuple[datetime, str]]:
    return [(run.due_at, run.status) for run in ScheduledRun.objects.using(store.alias).order_by("pk")]


@HISTORY_IN_SQLITE
def test_what_could_not_be_written_is_written_in_order_when_the_database_is_back(store: Store, history: Away) -> None:
    first, second, third = claim(0), claim(1), claim(3)
    history.started([first], NOON)
    history.is_away = "no route to host"
    history.finished(ended(first), NOON + SECOND)
    history.started([second], NOON + MINUTE)
    history.skipped([Skip(occurrence=claim(2).occurrence, reason="held", holder="web1")], NOON + 2 * MINUTE)
    history.finished(ended(second, Outcome(status="failed", error="no such rate")), NOON + 2 * MINUTE)
    assert runs(store) == [(NOON, "running")]
    assert [(line["text"], line["task"], line["due_at"], line["by"]) for line in history.unwritten()] == [
        ("the end of a run (succeeded)", "often", NOON, "web1"),
        ("the start of a run", "often", NOON + MINUTE, "web1"),
        ("a due time given up (held by web1)", "often", NOON + 2 * MINUTE, ""),
        ("the end of a run (failed)", "often", NOON + MINUTE, "web1"),
    ]
    history.is_away = ""
    history.clock.now += Afterwards.TRY_AGAIN_AFTER
    history.started([third], NOON + 3 * MINUTE)
    assert runs(store) == [
        (NOON, "succeeded"),
        (NOON + MINUTE, "failed"),
        (NOON + 2 * MINUTE, "skipped"),
        (NOON + 3 * MINUTE, "running"),
    ]
    failed = ScheduledRun.objects.using(store.alias).get(due_at=NOON + MINUTE)
    assert (failed.started_at, failed.finished_at) == (NOON + MINUTE, NOON + 2 * MINUTE), "as it was, not as written"
    assert history.unwritten() == []


@HISTORY_IN_SQLITE
def test_a_database_that_is_away_is_tried_once_in_ten_seconds_and_at_the_end(store: Store, history: Away) -> None:
    history.is_away = "no route to host"
    for number in range(5):
        history.started([claim(number)], NOON)
        assert history.cleaned([cleanup_of(claim(9))]) == []
        assert history.last_due(["often"]) == {}
    assert history.tries == 1
    history.clock.now += Afterwards.TRY_AGAIN_AFTER - 0.1
    history.started([claim(5)], NOON)
    assert history.tries == 1
    history.clock.now += 0.1
    history.started([claim(6)], NOON)
    assert history.tries == 2
    assert len(history.flush()) == 7
    assert history.tries == 3
    history.is_away = ""
    assert history.flush() == []
    assert len(runs(store)) == 7


@HISTORY_IN_SQLITE
def test_a_trouble_is_told_once_for_each_reason(store: Store, history: Away) -> None:
    history.started([claim(0)], NOON)
    assert history.take_trouble() == ""
    history.is_away = "no route to host"
    history.started([claim(1)], NOON)
    assert history.take_trouble() == "OperationalError: no route to host"
    history.flush()
    assert history.take_trouble() == "", "it was told"
    history.is_away = "disk full"
    history.flush()
    assert history.take_trouble() == "OperationalError: disk full"
    history.is_away = ""
    history.flush()
    assert history.take_trouble() == ""
    history.is_away = "disk full"
    history.started([claim(2)], NOON)
    assert history.take_trouble() == "OperationalError: disk full", "it is a new one"


@HISTORY_IN_SQLITE
def test_when_too_much_waits_the_oldest_is_given_up_and_told_once(
    store: Store, history: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Afterwards, "MOST", 3)
    history.is_away = "no route to host"
    for number in range(5):
        history.started([claim(number)], NOON)
    assert [line["due_at"] for line in history.take_dropped()] == [NOON, NOON + MINUTE]
    assert history.take_dropped() == []
    assert [line["due_at"] for line in history.unwritten()] == [NOON + n * MINUTE for n in (2, 3, 4)]


@HISTORY_IN_SQLITE
def test_a_clean_up_is_written_when_it_can_be_with_the_run_that_its_dead_server_did_not_record(
    store: Store, history: Away
) -> None:
    recorded, unrecorded = claim(0), claim(1)
    history.started([recorded], NOON)
    history.is_away = "no route to host"
    both = [cleanup_of(recorded), cleanup_of(unrecorded)]
    assert history.cleaned(both) == [], "the lock's store keeps them"
    assert history.unwritten() == []
    history.is_away = ""
    history.clock.now += Afterwards.TRY_AGAIN_AFTER
    written = history.cleaned(both)
    assert [each.owner for each in written] == [recorded.owner, unrecorded.owner]
    assert {each.pk for each in written} == {row.pk for row in CleanupLog.objects.using(store.alias).all()}
    assert runs(store) == [(NOON, "abandoned"), (NOON + MINUTE, "abandoned")]
    # Told once more by a reader that was killed before it could clear its list.
    assert [each.pk for each in history.cleaned(both)] == [each.pk for each in written]
    assert CleanupLog.objects.using(store.alias).count() == 2
    assert len(runs(store)) == 2


@HISTORY_IN_SQLITE
def test_the_last_due_time_is_that_of_runs_and_skips_and_not_of_runs_by_hand(store: Store, history: Away) -> None:
    history.started([claim(0), claim(1, "other")], NOON)
    history.skipped([Skip(occurrence=claim(4).occurrence, reason="missed")], NOON)
    later = claim(9)
    by_hand = dataclasses.replace(later, occurrence=dataclasses.replace(later.occurrence, trigger="manual"))
    history.started([by_hand], NOON)
    assert history.last_due(["often", "other", "unknown"]) == {"often": NOON + 4 * MINUTE, "other": NOON + MINUTE}


@HISTORY_IN_POSTGRESQL
def test_a_connection_that_was_closed_meanwhile_is_no_trouble(store: Store) -> None:
    history = Afterwards(store.alias)
    history.started([claim(0)], NOON)
    with connections[store.alias].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    other = connections[store.alias].copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
    other.close()
    history.started([claim(1)], NOON)
    assert history.take_trouble() == ""
    assert history.unwritten() == []
    assert len(runs(store)) == 2


@HISTORY_IN_POSTGRESQL
def test_a_write_that_hangs_can_be_cut_and_is_kept(store: Store) -> None:
    if store.server is None:
        pytest.skip("this server was given by its URL: it cannot be frozen")
    history = Afterwards(store.alias)
    history.started([claim(0)], NOON)
    assert not history.is_calling
    assert history.cut() is False, "there is nothing to cut"

    over = threading.Event()

    def cut() -> None:
        # As the watchdog does: what was cut may connect anew, and hang there.
        while not over.wait(0.2):
            history.cut()

    cutter = threading.Thread(target=cut)
    store.server.freeze()
    try:
        cutter.start()
        history.started([claim(1)], NOON)
    finally:
        over.set()
        cutter.join()
        store.server.thaw()
    assert history.take_trouble() != ""
    assert [line["due_at"] for line in history.unwritten()] == [NOON + MINUTE]
    assert history.flush() == []
    assert len(runs(store)) == 2


# -- with servers -----------------------------------------------------------------------------------------------------

LOCKS = {"default": {"BACKEND": "multiserver_schedule.locks.orm.ORMLock"}, "cache": CACHE_LOCK}
LEASE = 3.0


def fleet_of(store: Store, tmp_path: Path, cache_store: CacheStore) -> Fleet:
    """Return a fleet with two tasks in the cache (cached, long) and one in the database (tabled)."""
    settings = {"LOCKS": LOCKS, "MAX_CONCURRENCY": 8, "LOG_LEVEL": "verbose"}
    env = {"FLEET_CACHES": cache_store.as_json()}
    return Fleet(store, tmp_path, "mixed", lease=LEASE, settings=settings, env=env)


def wait_for_more(fleet: Fleet, task: str, **having: Any) -> None:
    """Wait for one more run of a task to end."""
    before = len(fleet.journal.of("end", task=task, **having))
    fleet.wait_for(lambda: len(fleet.journal.of("end", task=task, **having)) > before, f"another run of {task}")


def assert_that_none_ran_twice(fleet: Fleet) -> None:
    starts = [(line["task"], line["due_at"]) for line in fleet.journal.of("start")]
    assert len(starts) == len(set(starts))
    spans = sorted(
        (line["boot"], max(one["boot"] for one in fleet.journal.of("start", "tick", "end", pid=line["pid"])))
        for line in fleet.journal.of("start", task="long")
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), spans


def unrecorded(process: Process) -> list[tuple[str, str]]:
    return re.findall(r"^not recorded: (.+?) task=(\S+)", process.output, re.MULTILINE)


@pytest.fixture
def database(store: Store) -> Iterator[servers.Server]:
    """A database server that the test may freeze and crash; this process forgets its connection to it."""
    if store.server is None:
        pytest.skip("this server was given by its URL: it cannot be stopped")
    try:
        yield store.server
    finally:
        store.server.thaw()
        if not store.server.is_running():
            store.server.restart()
        connections[store.alias].close()


@HISTORY_IN_POSTGRESQL
@REDIS
def test_with_the_database_away_what_is_locked_in_a_cache_runs_and_is_recorded_when_it_is_back(
    store: Store, database: servers.Server, cache_store: CacheStore, tmp_path: Path
) -> None:
    with fleet_of(store, tmp_path, cache_store) as fleet:
        fleet.register()
        # A frozen database holds a pass up for five seconds at most, before it is cut: less than a lease should be.
        web1 = fleet.post("any", settings={"LEASE": 12, "HEARTBEAT": 4}).go(server="web1")
        post = fleet.post("any")
        for task in ("cached", "long", "tabled"):
            wait_for_more(fleet, task)

        # Frozen: it is away for a pass that goes on, and all is written when it is back.
        connections[store.alias].close()
        database.freeze()
        wait_for_more(fleet, "long")
        tabled = len(fleet.journal.of("start", task="tabled"))
        wait_for_more(fleet, "cached")
        assert len(fleet.journal.of("start", task="tabled")) == tabled, "its own lock is away"
        said = "writing the history, which is tried again later: "
        fleet.wait_for(lambda: said in web1.output, "the history to be found away")
        database.thaw()
        wait_for_more(fleet, "tabled")
        web1.terminate()
        assert web1.wait() == 1
        assert unrecorded(web1) == []
        assert web1.output.count(said) <= 2, "it is said once, not at every attempt"
        assert not fleet.journal.of("lost", task="long"), "its lease was kept"
        for task in ("cached", "long"):
            began = fleet.journal.of("start", task=task)
            recorded = [run for run in fleet.runs(task) if run.status != "skipped"]
            assert [run.due_at.isoformat() for run in recorded] == [line["due_at"] for line in began]
            assert [run.fence for run in recorded] == [line["fence"] for line in began]
            # The one that was under way when its server was told to end is another matter.
            assert {run.status for run in recorded[:-1]} == {"succeeded"}
            assert recorded[-1].finished_at is not None
        assert_that_none_ran_twice(fleet)

        # Killed, and away for longer than the pass: said line by line. A killed server's trace waits in the cache.
        web2 = post.go(server="web2")
        wait_for_more(fleet, "cached", server="web2")
        fleet.wait_for(lambda: fleet.journal.of("start", task="long", server="web2"), "a long run")
        connections[store.alias].close()
        database.crash()
        fleet.wait_for(lambda: is_at_work(fleet, "long", "web2"), "a long run to be under way")
        web2.kill("keeper")
        (held,) = (row for row in rows(["long"]) if row.owner)
        web3 = post.go(server="web3")
        wait_for_more(fleet, "long", server="web3")
        web3.terminate()
        assert web3.wait() == 1
        left = unrecorded(web3)
        assert {"cached", "long"} <= {task for _, task in left}
        assert {"the start of a run", "the end of a run (succeeded)"} <= {text for text, _ in left}
        # It is signalled by who made it, and recorded when it can be, by whoever comes next.
        assert [line["server"] for line in fleet.journal.of("cleanup", owner=held.owner)] == ["web3"]
        database.restart()
        assert not fleet.cleanups("long")
        web4 = post.go(server="web4")
        fleet.wait_for(lambda: fleet.cleanups("long"), "the clean-up to be recorded")
        web4.terminate()
        web4.wait()
        ours = [cleanup for cleanup in fleet.cleanups("long") if cleanup.owner == held.owner]
        assert [(cleanup.server, cleanup.reason, cleanup.cleaned_by) for cleanup in ours] == [
            ("web2", "lease_expired", "web3")
        ]
        assert ours[0].fence == held.fence
        assert len(fleet.journal.of("cleanup", task="long", owner=held.owner)) == 1
        assert [run.status for run in fleet.runs("long", owner=held.owner)] == ["abandoned"]
        assert_that_none_ran_twice(fleet)


def is_at_work(fleet: Fleet, task: str, server: str) -> bool:
    begun = {line["pid"] for line in fleet.journal.of("start", task=task, server=server)}
    return bool(begun - {line["pid"] for line in fleet.journal.of("end", task=task)})


def rows(names: list[str]) -> list[Any]:
    lock = CacheLock("cache", {"cache": "lock"})
    try:
        return lock.rows(names)
    finally:
        lock.close()


@HISTORY_IN_SQLITE
@REDIS
def test_with_the_cache_away_what_is_locked_in_the_database_runs(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    with fleet_of(store, tmp_path, cache_store) as fleet:
        fleet.register()
        web1 = fleet.server("web1")
        for task in ("cached", "tabled"):
            wait_for_more(fleet, task)
        cache_store.server.crash()
        wait_for_more(fleet, "tabled")
        cached = len(fleet.journal.of("start", task="cached"))
        wait_for_more(fleet, "tabled")
        assert len(fleet.journal.of("start", task="cached")) == cached
        cache_store.server.restart()
        wait_for_more(fleet, "cached")
        web1.terminate()
        assert web1.wait() == 1
        troubles = re.findall(r"^(?:looking for|renewing).*: ", web1.output, re.MULTILINE)
        assert 1 <= len(troubles) <= 3, "it is said once for each kind of trouble, not at every attempt"
        assert unrecorded(web1) == []
        assert_that_none_ran_twice(fleet)


# -- what is lost -----------------------------------------------------------------------------------------------------


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_what_was_due_between_the_last_that_is_recorded_and_a_loss_is_recorded_as_missed(
    store: Store, cache_store: CacheStore
) -> None:
    often = ScheduledTask(name="often", kind="call", target="time.sleep", timetable=Cron("* * * * *", "UTC"))
    sim = World(
        alias=store.alias,
        now=NOON - timedelta(seconds=30),
        locks=lambda: [CacheLock("default", {"cache": "lock", "using": store.alias})],
        versions={"web1": {"often": often}},
    )
    sim.advance(10 * MINUTE)
    sim.kill("web1")
    cache_store.server.kind.empty()
    sim.advance(7 * MINUTE)
    sim.versions["web2"] = {"often": often}
    sim.advance(6 * MINUTE)
    sim.finish()
    done = ran(store.alias, "often")
    assert len(done) == len(set(done))
    assert accounted(store.alias, "often") == {"succeeded": 14, "missed": 8}
    (missed,) = ScheduledRun.objects.using(store.alias).filter(status="skipped")
    assert (missed.reason, missed.due_at) == ("missed", done[8] + 8 * MINUTE)
    assert sim.told["lost_rows"] == 1


# -- the log ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_cache(name: str, server: servers.Server | None) -> Iterator[None]:
    """Have the alias "lock" lead to this server."""
    if server is None:
        yield
        return
    server.reset()
    with caches.in_use(caches.of(name, server)):
        yield


def log_of_an_hour(store: Store, lock: Callable[[], BaseLock]) -> list[tuple[str, str]]:
    """
    Return severity and text of what two servers log of a task that runs far too long, and of a server that is killed.
    """
    long = ScheduledTask(name="long", kind="call", target="time.sleep", timetable=Cron("*/5 * * * *", "UTC"))
    records: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("multiserver_schedule")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    teller = logs.Teller(tasks=lambda: {"long": long}, verbosity=0)
    sim = World(
        alias=store.alias,
        now=NOON - timedelta(seconds=30),
        locks=lambda: [lock()],
        duration=lambda row: timedelta(minutes=17) if sim.now < NOON + 20 * MINUTE else timedelta(minutes=4),
        versions={"web1": {"long": long}},
        tell=lambda event: teller(event) if event["kind"] != "synced" else None,
    )
    try:
        sim.advance(6 * MINUTE)
        sim.versions["web2"] = {"long": long}
        sim.advance(21 * MINUTE)
        sim.kill("web1")
        sim.kill("web2")
        sim.versions["web3"] = {"long": long}
        sim.advance(2 * MINUTE)
        sim.finish()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return records


def heading(records: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out who it was of two servers, and seconds."""
    return [
        (level, re.sub(r"web\d", "web", re.sub(r":\d\dZ", "Z", re.sub(r"due=\S+T(\d\d:\d\d)\S+", r"due=\1", text))))
        for level, text in records
    ]


ABANDONED = [
    ("WARNING", "appears abandoned: still held by web since 2030-01-01 12:05Z task=long due=12:20 server=web"),
    ("WARNING", "cleaned up: lease expired, the lock of web since 2030-01-01 12:25Z task=long due=12:25 server=web"),
]
CONFLICTS = [
    ("INFO", "skipped: held by web since 2030-01-01 12:05Z task=long due=12:10 server=web"),
    # It began a moment after 12:05.
    ("INFO", "skipped: held by web since 2030-01-01 12:05Z task=long due=12:15 server=web"),
]
VERBOSE = [
    ("DEBUG", "claimed (schedule, attempt 1) task=long due=12:05 server=web"),
    ("DEBUG", "claimed (schedule, attempt 1) task=long due=12:25 server=web"),
    ("DEBUG", "released, succeeded task=long due=12:05 server=web"),
]


@pytest.mark.parametrize("place", ["orm", "django-redis", "memcached"])
@pytest.mark.parametrize(
    ("level", "lines"),
    [
        ("none", []),
        ("abandoned", ABANDONED),
        ("conflicts", ABANDONED + CONFLICTS),
        ("verbose", ABANDONED + CONFLICTS + VERBOSE),
    ],
)
@HISTORY_IN_SQLITE
def test_a_log_level_means_the_same_wherever_the_lock_is(
    store: Store,
    cache_server: Callable[[str], servers.Server],
    place: str,
    level: str,
    lines: list[tuple[str, str]],
) -> None:
    if place != "orm" and caches.missing(place):
        pytest.skip(f"{place}: {caches.missing(place)}")
    server = None if place == "orm" else cache_server(caches.WAYS[place].server)

    def lock() -> BaseLock:
        if place == "orm":
            return ORMLock("default", {"using": store.alias})
        return CacheLock("default", {"cache": "lock", "using": store.alias})

    with override_settings(MULTISERVER_SCHEDULE={"LOG_LEVEL": level}), in_cache(place, server):
        assert sorted(heading(log_of_an_hour(store, lock))) == sorted(lines)


def test_a_run_that_was_taken_for_missed_when_its_store_lost_it_is_recorded_and_nobodys_fault(
    store: Store, history: Away
) -> None:
    """Whoever found the loss could not know of it: the server that ran it had not come to record it."""
    first = claim(1)
    history.skipped([Skip(occurrence=first.occurrence, reason="missed")], NOON + MINUTE)
    history.started([first], NOON + MINUTE)
    assert history.violations == []
    found = ScheduledRun.objects.using(store.alias).order_by("pk").values_list("status", "attempt")
    assert list(found) == [("skipped", 1), ("running", 2)]
    twice = claim(2)
    history.started([twice], NOON + 2 * MINUTE)
    again = dataclasses.replace(twice, owner=str(uuid.uuid4()))
    history.started([again], NOON + 2 * MINUTE)
    assert history.violations == [again], "a due time that really ran twice is told of"

"""
Tasks that misbehave, claims made by hand, and a keeper of its own that a test may kill or stop.

``python -m tests.run_support keeper`` is that keeper, ``… child`` is a run's process for ``spawn``.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import django
from django.db import connection, connections, transaction

from multiserver_schedule.entries import Claim, Filter, Hook, Occurrence, Outcome, ScheduledTask
from multiserver_schedule.exceptions import LeaseLost
from multiserver_schedule.run import kernel
from multiserver_schedule.run.base import Ended, Message, Runner, Started, Vanished, boot_time
from multiserver_schedule.run.child import before_exit, main_spawned
from multiserver_schedule.run.current import current_run
from multiserver_schedule.run.handle import ProcessRunner
from multiserver_schedule.signals import task_failed, task_started, task_succeeded

PLACE = "RUN_TESTS_PLACE"
CHILD_COMMAND = [sys.executable, "-m", "tests.run_support", "child"]
ROOT = Path(__file__).parent.parent
LEASE = 3.0
HEARTBEAT = 0.6


class _NoTimes:
    """A timetable that nobody asks anything here."""

    text = "never"
    is_subminute = False


def place() -> Path:
    """Where the processes of a test leave what the test looks at."""
    return Path(os.environ[PLACE])


def note(name: str, text: object = "") -> None:
    """Leave a line in a file of that name."""
    with open(place() / name, "a") as file:
        file.write(f"{text}\n")


def notes(name: str) -> list[str]:
    """Return the lines that were left under that name."""
    file = place() / name
    return file.read_text().split("\n")[:-1] if file.exists() else []


# --- tasks


def says_hello(name: str = "you") -> None:
    note("hello-at", time.time())
    print(f"hello {name}")
    print("and an error", file=sys.stderr)


async def asynchronous() -> None:
    await asyncio.sleep(0.01)
    print("awaited")


def knows_itself() -> None:
    run = current_run()
    assert run is not None
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(current_run()))
    thread.start()
    thread.join()
    print(
        json.dumps(
            {
                "name": run.name,
                "due_at": run.due_at.isoformat(),
                "attempt": run.attempt,
                "fence": run.fence,
                "key": run.key,
                "server": run.server,
                "threads": found == [run],
                "group": os.getpgrp() == os.getpid(),
                "stdin": sys.stdin.read(),
                "environ": {k: v for k, v in os.environ.items() if k.startswith("MULTISERVER_SCHEDULE_")},
            }
        )
    )
    run.check()


def counts_descriptors() -> None:
    print(len(kernel.open_descriptors()))


def fails() -> None:
    raise ValueError("no such rate: \udc80\0")


def exits_with(code: Any) -> None:
    sys.exit(code)


def leaves_without_a_result(status: int) -> None:
    print("before", flush=True)
    os._exit(status)


def segfaults() -> None:
    with suppress(ValueError):
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(5)


def prints_much() -> None:
    for number in range(10 * 1024):
        print(f"{number:>8} " + "é" * 506)


def closes_every_descriptor() -> None:
    os.closerange(3, 1000)
    innocent = os.open(place() / "innocent", os.O_WRONLY | os.O_CREAT)
    for _ in range(300):  # the numbers are somebody else's now, and nothing may be written there
        os.dup(innocent)


def leaves_a_grandchild() -> None:
    note("grandchild", subprocess.Popen(["sleep", "60"]).pid)


def starts_a_daemon() -> None:
    """Start a program that leaves the group, as a daemon does."""
    note("daemon", subprocess.Popen(["sleep", "61"], start_new_session=True).pid)
    time.sleep(60)


def leaves_a_transaction_open() -> None:
    transaction.atomic().__enter__()


def begins_by_hand() -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("CREATE TABLE left_open (a int)")


def works_in_a_thread() -> None:
    def work() -> None:
        time.sleep(0.3)
        print("the thread is done")

    threading.Thread(target=work).start()


def ticks(seconds: float = 60.0) -> None:
    """Leave the time every few milliseconds, with a grandchild that only sleeps."""
    note("child", os.getpid())
    note("grandchild", subprocess.Popen(["sleep", "60"]).pid)
    until = time.monotonic() + seconds
    with open(place() / "ticks", "a", buffering=1) as file:
        while time.monotonic() < until:
            file.write(f"{boot_time()}\n")
            time.sleep(0.01)


def ignores_term() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ticks()


def returns_at_term() -> None:
    def leave(*_: object) -> None:
        raise InterruptedError

    signal.signal(signal.SIGTERM, leave)
    note("ready")
    with suppress(InterruptedError):
        time.sleep(60)


def holds_the_gil(seconds: float) -> None:
    """Sleep in C without giving up the interpreter's lock: no Python thread of this process runs."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def checks_its_lease() -> None:
    run = current_run()
    assert run is not None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        while True:
            run.check()
            note("checked", boot_time())
            time.sleep(0.02)
    except LeaseLost:
        note("lost", boot_time())
        raise


def tells(run: Any, **known: Any) -> None:
    """Be a hook that leaves what it is told, and whether it is asked by the run itself."""
    known.pop("seconds", None)
    note("hooks", json.dumps([run.name, current_run() == run, known]))


def yes() -> bool:
    return True


async def no() -> bool:
    return False


def raises() -> bool:
    raise LookupError("the filter's own trouble")


def hangs() -> bool:
    time.sleep(60)
    return True


def task(
    name: str,
    target: Any,
    /,
    *args: Any,
    kind: str = "call",
    filters: Sequence[Filter] = (),
    around: Mapping[str, Any] = MappingProxyType({}),
    **kwargs: Any,
) -> ScheduledTask:
    """Return a task; ``around`` are further fields of it."""
    return ScheduledTask(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        target=target,
        args=args,
        kwargs=kwargs,
        filters=tuple(filters),
        timetable=_NoTimes(),  # type: ignore[arg-type]
        **around,
    )


HOOKS = (
    Hook("after", "tests.run_support.tells"),
    Hook("before", tells),
    Hook("failure", "tests.run_support.tells"),
    Hook("success", tells),
)
TASKS: Mapping[str, ScheduledTask] = {
    made.name: made
    for made in (
        task("hello", says_hello, name="web1"),
        task("path", "tests.run_support.says_hello", "by path"),
        task("async", asynchronous),
        task("itself", knows_itself),
        task("descriptors", counts_descriptors),
        task("command", "diffsettings", kind="command"),
        task("command-fails", "migrate", "no_such_app", kind="command"),
        task("fails", fails),
        task("exit-0", exits_with, 0),
        task("exit-none", exits_with, None),
        task("exit-3", exits_with, 3),
        task("exit-text", exits_with, "that was wrong"),
        task("os-exit-0", leaves_without_a_result, 0),
        task("os-exit-4", leaves_without_a_result, 4),
        task("segfault", segfaults),
        task("much", prints_much),
        task("closed", closes_every_descriptor),
        task("grandchild", leaves_a_grandchild),
        task("daemon", starts_a_daemon),
        task("open", leaves_a_transaction_open),
        task("by-hand", begins_by_hand),
        task("thread", works_in_a_thread),
        task("ticks", ticks),
        task("short-ticks", ticks, 2.5),
        task("ignores-term", ignores_term),
        task("returns-at-term", returns_at_term),
        task("gil", holds_the_gil, 4.0),
        task("checks", checks_its_lease),
        task("wanted", says_hello, filters=[Filter(yes, True), Filter("tests.run_support.no", False)]),
        task("unwanted", says_hello, filters=[Filter(yes, True), Filter(no, True), Filter(raises, True)]),
        task("skipped", says_hello, filters=[Filter("tests.run_support.yes", False)]),
        task("filter-fails", says_hello, filters=[Filter(raises, True)]),
        task("filter-hangs", says_hello, filters=[Filter(hangs, True)]),
        task("exec", ("sh", "-c", "echo $MULTISERVER_SCHEDULE_KEY $MULTISERVER_SCHEDULE_FENCE; cat"), kind="exec"),
        task("exec-3", ("sh", "-c", "exit 3"), kind="exec"),
        task("exec-killed", ("sh", "-c", "kill -SEGV $$"), kind="exec"),
        task("exec-missing", ("no-such-program", "-x"), kind="exec"),
        task("exec-directory", ("/",), kind="exec"),
        task("exec-wanted", ("echo", "went on"), kind="exec", filters=[Filter(yes, True)]),
        task("exec-unwanted", ("echo", "went on"), kind="exec", filters=[Filter(no, True)]),
        task("exec-filter-exits", ("echo", "went on"), kind="exec", filters=[Filter(lambda: os._exit(0), True)]),
        task("exec-sleeps", ("sh", "-c", "sleep 60 & sleep 60"), kind="exec"),
        task("hooked", says_hello, around={"hooks": HOOKS}),
        task("exec-hooked", ("sh", "-c", "echo went on; exit 3"), kind="exec", around={"hooks": HOOKS}),
    )
}


def claim(
    name: str | ScheduledTask,
    *,
    lease: float = LEASE,
    owner: str | None = None,
    due_at: datetime | None = None,
    **occurrence: Any,
) -> Claim:
    """Return a claim as a store would make it."""
    claimed = TASKS[name] if isinstance(name, str) else name
    now = datetime.now(timezone.utc)
    return Claim(
        occurrence=Occurrence(
            task=claimed,
            row=claimed.name,
            pk=1,
            due_at=due_at or now.replace(microsecond=0),
            lease=timedelta(seconds=lease),
            min_break=timedelta(0),
            **{"next_due_at": None, **occurrence},
        ),
        owner=owner or uuid4().hex,
        fence=7,
        server="web1",
        acquired_at=now,
        expires_at=now + timedelta(seconds=lease),
    )


# --- what tests do with a runner


def mail_by(settings: Any, kind: str, **options: Any) -> None:
    """Set how Django sends mail, in the words of its version."""
    backend = f"django.core.mail.backends.{kind}.EmailBackend"
    if django.VERSION >= (6, 1):
        settings.MAILERS = {"default": {"BACKEND": backend, "OPTIONS": options}}
    else:
        settings.EMAIL_BACKEND = backend
        for name, value in options.items():
            setattr(settings, f"EMAIL_{name.upper()}", value)


def deliver(event: Mapping[str, Any]) -> None:
    """Deliver an event of a test: it may ask for a delay, or for trouble."""
    if event.get("hang"):
        time.sleep(60)
    if event.get("die"):
        os._exit(1)
    if event.get("raise"):
        raise RuntimeError("a receiver's trouble")
    note("delivered", event["kind"])


def alone() -> None:
    """End the thread by which pytest watches for a test that hangs, and close connections: neither can be forked."""
    faulthandler.cancel_dump_traceback_later()
    connections.close_all()


@contextmanager
def running(
    mode: str = "fork", *, tasks: Mapping[str, ScheduledTask] = TASKS, **options: Any
) -> Iterator[ProcessRunner]:
    """Start a runner in this process, and close it."""
    alone()
    runner = ProcessRunner(
        tasks,
        deliver=options.pop("deliver", deliver),
        mode=mode,  # type: ignore[arg-type]
        server="web1",
        heartbeat=options.pop("heartbeat", HEARTBEAT),
        child_command=CHILD_COMMAND,
        **options,
    )
    runner.start()
    try:
        yield runner
    finally:
        runner.close(2.0)


class Drive:
    """Polls a runner as the keeper does, and remembers what came."""

    def __init__(self, runner: Runner, *, renew: bool = True) -> None:
        self.runner = runner
        self.renews = renew
        self.until: dict[str, float] = {}
        self.leases: dict[str, float] = {}
        self.pids: dict[str, int] = {}
        self.ended: dict[str, Ended] = {}
        self.ended_at: dict[str, float] = {}
        self.vanished: list[Vanished] = []
        self._next = boot_time() + HEARTBEAT

    def run(self, name: str | ScheduledTask, *, lease: float = LEASE, limit: float | None = None, **more: Any) -> str:
        """Claim and run; return the owner."""
        task = TASKS[name] if isinstance(name, str) else name
        if limit is not None:
            task = replace(task, limit=timedelta(seconds=limit))
        made = claim(task, lease=lease, **more)
        until = boot_time() + lease
        self.until[made.owner], self.leases[made.owner] = until, lease
        self.runner.run(made, until=until, finish_by=None if limit is None else boot_time() + limit)
        return made.owner

    def turn(self) -> list[Message]:
        """Poll once, and renew what is due for it."""
        messages = self.runner.poll(0.05)
        for message in messages:
            if isinstance(message, Started):
                self.pids[message.owner] = message.pid
            elif isinstance(message, Ended):
                self.ended[message.owner] = message
                self.ended_at[message.owner] = boot_time()
            else:
                self.vanished.append(message)
        if self.renews and boot_time() >= self._next:
            self._next = boot_time() + HEARTBEAT
            moved = {owner: boot_time() + self.leases[owner] for owner in self.until if owner not in self.ended}
            self.until.update(moved)
            self.runner.renew(moved)
        self.runner.check()
        return messages

    def go(self, until: Callable[[], Any], *, within: float = 30.0) -> None:
        """Go on until that is so; fail when it is not within so many seconds."""
        limit = time.monotonic() + within
        while not until():
            left = {owner: self.pids.get(owner) for owner in self.until if owner not in self.ended}
            assert time.monotonic() < limit, f"not within {within} s: going on: {left}, lost: {self.vanished}"
            self.turn()

    def outcome(self, owner: str, *, within: float = 30.0) -> Outcome:
        """Wait for the end of that run."""
        self.go(lambda: owner in self.ended, within=within)
        return self.ended[owner].outcome


def wait_for(condition: Callable[[], Any], *, within: float = 30.0) -> float:
    """Wait until that is so; return the boot time at which it was seen to be."""
    limit = time.monotonic() + within
    while not condition():
        assert time.monotonic() < limit, f"not within {within} s"
        time.sleep(0.005)
    return boot_time()


def is_running(pid: int) -> bool:
    """Is there such a process, zombies left aside?"""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


class Keeper:
    """A keeper in a process of its own, for faults that would take the test with them."""

    def __init__(self, name: str, *, mode: str = "fork", lease: float = LEASE, heartbeat: float = HEARTBEAT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.run_support", "keeper", name, mode, str(lease), str(heartbeat)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.pid = self.process.pid
        self.runner = 0
        self.child = 0
        self.until = 0.0
        self.ended: dict[str, Any] | None = None
        self.vanished: dict[str, Any] | None = None
        self._unread = b""

    def read(self) -> None:
        """Take in what the keeper has said, without waiting."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        while select.select((fd,), (), (), 0)[0] and (chunk := os.read(fd, 1 << 16)):
            self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            said = json.loads(line)
            for key in ("runner", "child", "until", "ended", "vanished"):
                if key in said:
                    setattr(self, key, said[key])

    def wait(self, condition: Callable[[], Any], *, within: float = 30.0) -> float:
        """Wait until that is so."""

        def seen() -> Any:
            self.read()
            return condition()

        return wait_for(seen, within=within)

    def grandchild(self) -> int:
        """Return the pid of the ``sleep`` that the run has started."""
        self.wait(lambda: self.child and notes("grandchild"))
        return int(notes("grandchild")[-1])

    def close(self) -> None:
        """Kill whatever is left of it."""
        for pid in filter(None, (self.pid, self.runner, self.child, *map(int, notes("grandchild")))):
            if is_running(pid):
                kernel.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _keeper(name: str, mode: str, lease: str, heartbeat: str) -> None:
    def say(**what: Any) -> None:
        os.write(1, json.dumps(what).encode() + b"\n")

    runner = ProcessRunner(
        TASKS,
        deliver=deliver,
        mode=mode,  # type: ignore[arg-type]
        server="web1",
        heartbeat=float(heartbeat),
        child_command=CHILD_COMMAND,
    )
    runner.start()
    say(runner=runner.pid)
    made = claim(name, lease=float(lease))
    until = boot_time() + float(lease)
    runner.run(made, until=until, finish_by=None)
    say(until=until)
    renew_at = boot_time() + float(heartbeat)
    over = False
    while not over:
        for message in runner.poll(0.05):
            if isinstance(message, Started):
                say(child=message.pid)
            elif isinstance(message, Ended):
                say(ended={"status": message.outcome.status, "at": boot_time()})
                over = True
            else:
                say(vanished={"why": message.why, "at": boot_time(), "owners": len(message.owners)})
                over = True
        if boot_time() >= renew_at and not over:
            renew_at = boot_time() + float(heartbeat)
            until = boot_time() + float(lease)
            runner.renew({made.owner: until})
            say(until=until)
        runner.check()
    runner.close(1.0)


# --- receivers, which the processes of ``spawn`` connect as well


def hang_at_start(sender: Any, run: Any, **_: Any) -> None:
    if run.name == "hello" and os.environ.get("RUN_TESTS_HANG") == "start":
        time.sleep(60)


def hang_at_end(sender: Any, run: Any, **_: Any) -> None:
    if os.environ.get("RUN_TESTS_HANG") == "end":
        time.sleep(60)
    if os.environ.get("RUN_TESTS_HANG") == "gil":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # a C library that takes no interruption
        holds_the_gil(60)
    if os.environ.get("RUN_TESTS_HANG") == "exit":
        os._exit(9)


def hear(signal_name: str) -> Callable[..., None]:
    def receiver(sender: Any, run: Any, **details: Any) -> None:
        exception = type(details.get("exception")).__name__
        note("heard", f"{signal_name} {run.name} {details.get('status', '')} {exception}")

    return receiver


RECEIVERS = [
    (task_started, hang_at_start),
    (task_succeeded, hang_at_end),
    (task_failed, hang_at_end),
    (task_started, hear("started")),
    (task_succeeded, hear("succeeded")),
    (task_failed, hear("failed")),
]


def main(arguments: Sequence[str]) -> None:
    """Be a keeper or a run's process."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
    django.setup()
    for sent, receiver in RECEIVERS:
        sent.connect(receiver)
    if arguments[0] == "keeper":
        _keeper(*arguments[1:])
    else:
        before_exit.append(lambda: note("left", os.getpid()))
        main_spawned(lambda: TASKS, deliver)


if __name__ == "__main__":
    main(sys.argv[1:])

"""
A queue is flooded, and servers come and go with it: real workers, real processes, in about a minute.

    python example_project/flood.py

Three schedulers (``runschedule --forever``) decide together, once a second, how many servers the queue needs. These are
processes of this machine, which work on the queue of django-tasks-db. One of the schedulers is killed with -9 just when
it starts a server, before it could write down what came of that. Then the flood is over, and the servers are drained
one by one, while there is work for all. At the end it says whether every letter was written once, and whether anything
is left running.

With --at-once the three do without the scheduler's lock, each at its own pace: twice as much happens at the same time
as ever would, and the same has to come of it. DATABASE_URL chooses another database than a fresh SQLite file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCHEDULERS = ("web1", "web2", "web3")
FIRST_WAVE, SECOND_WAVE = 55, 300
LEASE = 6.0
PROC = Path("/proc")

sys.path.insert(0, str(HERE))
sys.path.insert(1, str(HERE.parent))


def manage(*arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start a command of the example project."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "manage.py"), *arguments], cwd=HERE, env={**os.environ, **environ}
    )


@contextmanager
def schedulers(*command: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """
    Start three, and end what is left of them. Each creation takes a moment longer, so that one can die in it.

    With the scheduler's lock, when the machine is there already; without it another would write that down meanwhile.
    """
    point = "servers_after_create" if "runschedule" in command else "servers_before_create"
    slow = {"MULTISERVER_SCHEDULE_FAULTS": f"{point}=sleep0.6"}
    started = {name: manage(*command, SERVER_NAME=name, **slow) for name in SCHEDULERS}
    try:
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in started.values():
            process.wait(timeout=60)


def processes() -> dict[int, str]:
    """Return the command lines of all processes that come from here, this one excepted."""
    mark = f"FLOOD_FOLDER={os.environ['FLOOD_FOLDER']}".encode()
    found = {}
    for pid in (int(path.name) for path in PROC.iterdir() if path.name.isdigit()) if PROC.is_dir() else ():
        try:
            if pid != os.getpid() and mark in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:
                    found[pid] = command
        except OSError:
            continue  # it has ended meanwhile
    return found


def workers() -> list[str]:
    """Return the names of the workers that live."""
    if not PROC.is_dir():
        from multiserver_schedule.servers import providers

        return [machine.name for machine in providers.make("here").list_servers()]
    return [
        line.rpartition("--worker-id=")[2].strip()
        for pid, line in processes().items()
        if "--worker-id=" in line and leads(pid)
    ]


def leads(pid: int) -> bool:
    """Is it a worker itself, which has a session of its own, and not a process that one starts for a moment?"""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


class TookTooLong(Exception):
    """What was waited for has not come about."""


class Watch:
    """Looks at the database and at the processes all the time, and says what happens."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.most = 0
        """So many workers were ever seen at once."""
        self._seen = 0
        self._wanted: int | None = None

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def look(self) -> None:
        """Look once."""
        from multiserver_schedule.servers.models import Target, Transition

        self.most = max(self.most, len(workers()))
        target = Target.objects.filter(type="writer").first()
        if target is not None and target.changed_at and target.wanted != self._wanted:
            was = "" if self._wanted is None else f", were {self._wanted}"
            self.say(f"      {target.wanted} wanted{was}: {target.why}")
            self._wanted = target.wanted
        for change in Transition.objects.filter(pk__gt=self._seen).select_related("server").order_by("pk"):
            self._seen = change.pk
            self.say(
                f"{change.by:4}  {change.server.name}: {change.previous or '-'} → {change.status} ({change.reason})"
            )

    def until(self, is_so: Callable[[], object], what: str, within: float) -> Any:
        """Look until it is so, and return what was so. Raises TookTooLong."""
        end = time.monotonic() + within
        while True:
            self.look()
            if found := is_so():
                return found
            if time.monotonic() > end:
                raise TookTooLong(f"After {within:g} s: {what}, has not come about.")
            time.sleep(0.05)


class Post:
    """Who has letters written, and counts them."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, count: int, shortest: float, longest: float) -> None:
        """Put so many letters into the queue."""
        from django.db import transaction
        from letters.tasks import write

        with transaction.atomic():
            for number in range(self.sent, self.sent + count):
                write.enqueue(number, random.uniform(shortest, longest))
        self.sent += count

    @property
    def open(self) -> int:
        """Return how many are not written yet."""
        from letters.models import Letter

        return self.sent - Letter.objects.filter(ended_at__isnull=False).values("number").distinct().count()

    def keep_busy(self) -> None:
        """Have five long letters in the queue or in hand: work for all, and not enough for a second server."""
        if (missing := 5 - self.open) > 0:
            self.send(missing, 0.5, 0.9)

    def wrong(self) -> Iterator[str]:
        """Say what became of letters but to be written once."""
        from django_tasks_db.models import DBTaskResult
        from letters.models import Letter

        begun = Counter(Letter.objects.values_list("number", flat=True))
        ended = set(Letter.objects.filter(ended_at__isnull=False).values_list("number", flat=True))
        if lost := sorted(set(range(self.sent)) - ended):
            yield f"{len(lost)} of {self.sent} letters were lost: {lost[:10]}"
        if twice := sorted(number for number, times in begun.items() if times > 1):
            yield f"{len(twice)} letters were begun more than once: {twice[:10]}"
        if others := Counter(DBTaskResult.objects.exclude(status="SUCCESSFUL").values_list("status", flat=True)):
            yield f"not all tasks have succeeded: {dict(others)}"


def rows(*statuses: str) -> Any:
    """Return the servers of these statuses."""
    from multiserver_schedule.servers.models import Server

    return Server.objects.filter(status__in=statuses)


def is_settled(count: int) -> bool:
    """Are there so many servers, all of which run, and is all else deleted?"""
    from multiserver_schedule.servers.models import Server

    return rows("running").count() == count and Server.objects.exclude(status="deleted").count() == count


def kill_in_a_creation(started: dict[str, subprocess.Popen[bytes]], *, is_made: bool) -> str:
    """Kill -9 a scheduler that has written down that it creates a machine, and not what came of it; tell of it."""
    from multiserver_schedule.servers import providers
    from multiserver_schedule.servers.models import Transition

    for server in rows("starting").filter(machine_id="", unanswered_at__isnull=False):
        if is_made and not providers.make("here").find_by_tag(server.key):
            continue
        by = Transition.objects.filter(server=server, status="starting").latest("pk").by
        started[by].kill()
        started[by].wait()
        made = "has just started" if is_made else "is about to start"
        return f"kill -9 {by}, which {made} {server.name}: nobody knows whether it did"
    return ""


def passes_since_decision() -> int:
    """Return how many passes over the provider were begun since it was decided that more servers are wanted."""
    from multiserver_schedule.models import ScheduledRun
    from multiserver_schedule.servers.models import Target

    decided_at = Target.objects.get(type="writer").raised_at
    tasks = ScheduledRun.objects.filter(task__startswith="multiserver_schedule_servers.reconcile")
    return tasks.filter(started_at__gte=decided_at).exclude(status="skipped").count()


def wrong_counts(most_seen: int, limit: int) -> Iterator[str]:
    """Say where there were more servers than there may be, or where several were let go at once."""
    from multiserver_schedule.servers.models import Decision, Transition
    from multiserver_schedule.servers.states import BILLED

    if most_seen > limit:
        yield f"{most_seen} workers were seen at once, {limit} may be"
    there: set[int] = set()
    most = 0
    for server, status in Transition.objects.order_by("pk").values_list("server", "status"):
        (there.add if status in BILLED else there.discard)(server)
        most = max(most, len(there))
    if most > limit:
        yield f"by the transitions there were {most} machines at once, {limit} may be"
    wanted = list(Decision.objects.filter(type="writer").order_by("pk").values_list("wanted", flat=True))
    if any(after < before - 1 for before, after in pairwise(wanted)):
        yield f"not one by one: {wanted}"


def play(watch: Watch, post: Post, *command: str) -> Iterator[str]:
    """Flood, kill, let the flood pass; yield what was not as promised."""
    from django.conf import settings

    most = settings.FLOOD_MOST
    watch.say(f"--- {len(SCHEDULERS)} schedulers start; {settings.FLOOD_LEAST} to {most} servers may be ---")
    with schedulers(*command) as started:
        watch.until(lambda: is_settled(1), "one server runs, the minimum", 40)
        watch.say(f"--- {FIRST_WAVE} letters ---")
        post.send(FIRST_WAVE, 0.05, 0.15)
        up = watch.until(lambda: rows("running").count() if rows("running").count() > 1 else 0, "more run", 40)
        passes = passes_since_decision()
        watch.say(f"--- {up} servers run ---")
        if passes > 2:
            yield f"it took {passes} passes over the provider until more servers ran"
        watch.say(f"--- {SECOND_WAVE} letters more ---")
        post.send(SECOND_WAVE, 0.05, 0.15)
        is_made = "runschedule" in command
        killed = watch.until(lambda: kill_in_a_creation(started, is_made=is_made), "a scheduler starts a server", 40)
        watch.say(f"--- {killed} ---")
        watch.until(lambda: post.open < 20, "nearly all letters are written", 60)
        watch.say(f"--- the flood is over: {post.sent - post.open} letters are written; a few more keep all busy ---")

        def is_back() -> bool:
            post.keep_busy()
            return is_settled(1)

        watch.until(is_back, "one server is left, the minimum", 90)
        watch.until(lambda: post.open == 0, "all letters are written", 40)
        watch.say("--- back at the minimum; the schedulers are stopped ---")
    [left] = rows("running")
    if workers() != [left.name]:
        yield f"{left.name} should have outlived the schedulers, and there are {workers()}"
    watch.say(f"--- {left.name} works on without them; now that none is wanted, by hand ---")
    for arguments in (("ensure", "0", "--type=writer", "-v0"), *[("reconcile", "-v0")] * 20):
        manage("servers", *arguments, FLOOD_LEAST="0").wait()
        watch.look()
        if is_settled(0):
            break
        time.sleep(0.5)
    else:
        yield f"servers are left: {list(rows('running', 'draining', 'stopping', 'deleting'))}"
    if left_over := processes():
        yield f"processes are left: {left_over}"
    yield from post.wrong()
    yield from wrong_counts(watch.most, most)


def report(watch: Watch, post: Post, wrong: list[str]) -> int:
    """Print what came of it, and return the exit status: 0 when every promise was kept."""
    from django.db.models import Count
    from letters.models import Letter

    print("\nWho wrote how many letters\n")
    for worker, count in Letter.objects.values_list("worker").annotate(Count("pk")).order_by("-pk__count"):
        print(f"{worker}  {count:4}")
    print(f"\n{post.sent} letters, at most {watch.most} workers at once, {len(processes())} processes left.")
    for each in wrong:
        print(f"WRONG: {each}")
    if not wrong:
        print("Each letter was written once.")
    return 1 if wrong else 0


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="A queue is flooded, and servers come and go with it.")
    parser.add_argument("--at-once", action="store_true", help="three that decide at once, with no lock between them")
    command = ("at_once",) if parser.parse_args().at_once else ("runschedule", "--forever", "-v0")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLOOD_FOLDER"] = folder
        os.environ["DJANGO_SETTINGS_MODULE"] = "example.flood_settings"
        os.environ.setdefault("DATABASE_URL", f"sqlite:///{folder}/flood.sqlite3")
        os.environ.setdefault("SCHEDULE_LEASE", str(LEASE))
        import django

        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        watch, post, wrong = Watch(), Post(), []
        try:
            wrong.extend(play(watch, post, *command))
        except TookTooLong as late:
            wrong.append(str(late))
        finally:
            clean_up()
        return report(watch, post, wrong)


def clean_up() -> None:
    """End what a demo that went wrong has left running."""
    from multiserver_schedule.servers import providers

    for machine in providers.make("here").list_servers():
        providers.make("here").delete_server(machine.id)


if __name__ == "__main__":
    sys.exit(main())

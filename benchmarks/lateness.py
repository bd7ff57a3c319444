"""
How late does a run start? From its due time to the first line of the task, beside the schedulers that people know.

    python benchmarks/lateness.py [--rounds 3] [--seconds 10] [--tasks 1 --tasks 20 --tasks 100] [--only ours]
    python benchmarks/lateness.py --timeline [--tasks 1 --tasks 20]

So many tasks are due every second, each of one line. Every contender is started, and measured for some seconds once all
of its tasks have run, one after the other, in rounds: whatever else the machine does meets them all. Their packages go
into an environment of their own in a temporary folder, or in ``--peers FOLDER``, which is kept. PostgreSQL, with fsync,
and Redis are on this machine, too.

What is compared is not the same work. Ours starts a process for each run, under a lock that other servers share;
APScheduler and procrastinate call a function in a process that is there, and so does Celery, in a worker that Redis
hands the message to. A function's crash or leak is its scheduler's, and two APSchedulers run everything twice.

Celery's beat does not hand on when a task was due: counted from the second in which it was sent, so that a beat that is
more than a second late shows as due times that did not run, and not as late ones.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.stage import Project, cpu_with_children, leave_cleanly, load
from tests import servers

PACKAGES = ("celery[redis]", "celery-redbeat", "APScheduler<4", "sqlalchemy", "procrastinate", "psycopg[binary]")
WARMS_UP = 20.0
"""Seconds within which each task of a contender has to have run once; one that is overloaded is measured anyway."""
LATEST = 2.0
"""Seconds after the last due time that its start is waited for."""

OURS = """
import os, time
from multiserver_schedule import current_run, schedule

JOURNAL = os.open({journal!r}, os.O_WRONLY | os.O_APPEND)


def start():
    now = time.time()
    run = current_run()
    os.write(JOURNAL, f"{{run.name}} {{run.due_at.timestamp()}} {{now}}\\n".encode())


for number in range({tasks}):
    schedule.call(start).every_second().name(f"work.task_{{number}}")
"""
TIMELINE = """
import multiserver_schedule.run.child as child
from django.db.backends.utils import CursorWrapper
from multiserver_schedule.cycle import Cycle
from multiserver_schedule.locks.orm import ORMLock
from multiserver_schedule.run.handle import ProcessRunner
from multiserver_schedule.run.runner import Serve

asked = [0, 0.0]


def stamp(what):
    os.write(STAMPS, f"{time.time()} {what}\\n".encode())


def around(owner, name, *, before="", after="", counts="", only=lambda *given: True):
    inner = getattr(owner, name)

    def outer(*given, **more):
        if not only(*given):
            return inner(*given, **more)
        if before:
            stamp(before)
        asked[:] = [0, 0.0]
        at = time.perf_counter()
        found = inner(*given, **more)
        if after:
            stamp(after)
        if counts:
            stamp(f"# {asked[0]} {asked[1]} {time.perf_counter() - at} {counts}")
        return found

    setattr(owner, name, outer)


execute = CursorWrapper.execute


def timed(*given, **more):
    at = time.perf_counter()
    try:
        return execute(*given, **more)
    finally:
        asked[0] += 1
        asked[1] += time.perf_counter() - at


STAMPS = os.open(os.path.join(os.path.dirname(__file__), "stamps"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
CursorWrapper.execute = timed
around(Cycle, "_look", before="the keeper is awake", after="the store has been looked at", counts="looks")
claiming = lambda lock, offered, **more: bool(offered)
around(ORMLock, "claim", before="it is known what is due", after="claimed", counts="claims", only=claiming)
around(Cycle, "_plan", counts="plans")
around(ORMLock, "release", counts="releases")
around(ProcessRunner, "run", after="the runner has been sent the order")
around(Serve, "_obey", before="the runner has read it", only=lambda serve, message: message["t"] == "run")
around(Serve, "_fork", before="the runner forks", after="forked, on both sides")
around(child, "run_child", before="the child is cleaned up and goes on")
around(child, "act", before="the task is found, its start announced")
"""
CELERY = """
import os, time
from celery import Celery
from celery.schedules import schedule
from celery.signals import before_task_publish

app = Celery("peer", broker=os.environ["REDIS"])
app.conf.redbeat_redis_url = os.environ["REDIS"]
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_hijack_root_logger = False
# Counted from whole seconds, as ours are.
app.conf.beat_schedule = {
    f"task_{number}": {"task": "peer.start", "schedule": schedule(1.0, relative=True), "args": [f"task_{number}"]}
    for number in range(int(os.environ["TASKS"]))
}
JOURNAL = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND)


@before_task_publish.connect
def publish(body, **more):
    body[1]["sent"] = time.time()


@app.task(name="peer.start")
def start(name, sent=0):
    os.write(JOURNAL, f"{name} {int(sent)} {time.time()}\\n".encode())
"""
APSCHEDULER = """
import os, sys, time
from apscheduler.events import EVENT_JOB_EXECUTED
from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger

JOURNAL = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND)


def start(name):
    return name, time.time()


def note(event):
    name, at = event.retval
    os.write(JOURNAL, f"{name} {event.scheduled_run_time.timestamp()} {at}\\n".encode())


if __name__ == "__main__":
    sys.modules["peer"] = sys.modules["__main__"]
    scheduler = BlockingScheduler(timezone="UTC")
    if os.environ["STORE"] == "postgresql":
        scheduler.add_jobstore("sqlalchemy", url=os.environ["DATABASE"].replace("postgresql:", "postgresql+psycopg:"))
    scheduler.add_listener(note, EVENT_JOB_EXECUTED)
    for number in range(int(os.environ["TASKS"])):
        name = f"task_{number}"
        scheduler.add_job("peer:start", CronTrigger(second="*", timezone="UTC"), [name], id=name)
    scheduler.start()
"""
PROCRASTINATE = """
import os, time
import procrastinate

JOURNAL = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND)
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["DATABASE"]))


def declare(name):
    @app.periodic(cron="* * * * * *")
    @app.task(name=name)
    def start(timestamp):
        os.write(JOURNAL, f"{name} {timestamp} {time.time()}\\n".encode())


for number in range(int(os.environ["TASKS"])):
    declare(f"task_{number}")

with procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=os.environ["DATABASE"])).open() as once:
    once.schema_manager.apply_schema()
app.run_worker(concurrency=4)
"""


# --- the stage -------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """The servers and the folder that all contenders share."""

    postgresql: servers.Server
    redis: servers.Server
    folder: Path
    peers: Path
    """The folder of the environment that has their packages."""
    databases: int = 0

    def database(self) -> str:
        """Return the URL of a new, empty database."""
        self.databases += 1
        name = f"bench{self.databases}"
        where = ["-h", "127.0.0.1", "-p", str(self.postgresql.port), "-U", servers.USER, name]
        kind = self.postgresql.kind
        kind.run([kind.binary("createdb"), *where], PGPASSWORD=self.postgresql.password)
        return urlunsplit(urlsplit(self.postgresql.url)._replace(path=f"/{name}"))

    @contextlib.contextmanager
    def program(self, program: str, *commands: list[str], **environ: str) -> Iterator[list[int]]:
        """Have processes of the peers' environment run beside ``peer.py``, and end them after the block."""
        (self.folder / "peer.py").write_text(program)
        path = f"{self.peers / 'bin'}{os.pathsep}{os.environ['PATH']}"
        started = []
        try:
            for number, command in enumerate(commands):
                with (self.folder / f"peer{number}.out").open("wb") as out:
                    started.append(
                        subprocess.Popen(
                            [str(self.peers / "bin" / command[0]), *command[1:]],
                            cwd=self.folder,
                            env={**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), **environ},
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=out,
                        )
                    )
            yield [process.pid for process in started]
        finally:
            for process in started:
                process.terminate()
            for process in started:
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


Contender = Callable[[Stage, int, str], contextlib.AbstractContextManager[list[int]]]
"""Starts itself with so many tasks and a path to write its starts to; gives the pids of what it started."""


def ours(services: int, at_once: int) -> Contender:
    """Return so many services, each of which runs so many tasks at once."""

    @contextlib.contextmanager
    def run(stage: Stage, tasks: int, journal: str) -> Iterator[list[int]]:
        text = OURS.format(tasks=tasks, journal=journal)
        with contextlib.ExitStack() as stack:
            project = Project(stage.database(), text, settings={"MAX_CONCURRENCY": at_once})
            stack.enter_context(project)
            names = [f"web{number + 1}" for number in range(services)]
            yield [stack.enter_context(project.service(name)).pid for name in names]

    return run


@contextlib.contextmanager
def celery(stage: Stage, tasks: int, journal: str) -> Iterator[list[int]]:
    """Start a beat with redbeat, and a worker of four processes."""
    stage.redis.call("FLUSHALL")
    commands = (
        ["celery", "-A", "peer", "worker", "-c", "4", "-l", "ERROR", "--without-gossip", "--without-mingle"],
        ["celery", "-A", "peer", "beat", "-S", "redbeat.RedBeatScheduler", "-l", "ERROR", "--pidfile="],
    )
    with stage.program(CELERY, *commands, JOURNAL=journal, TASKS=str(tasks), REDIS=stage.redis.url) as pids:
        yield pids


def apscheduler(store: str) -> Contender:
    """Return an APScheduler that keeps its jobs there."""

    @contextlib.contextmanager
    def run(stage: Stage, tasks: int, journal: str) -> Iterator[list[int]]:
        environ = {"JOURNAL": journal, "TASKS": str(tasks), "STORE": store, "DATABASE": stage.database()}
        with stage.program(APSCHEDULER, ["python", "peer.py"], **environ) as pids:
            yield pids

    return run


@contextlib.contextmanager
def procrastinate(stage: Stage, tasks: int, journal: str) -> Iterator[list[int]]:
    """Start a worker, which defers the periodic tasks as well."""
    environ = {"JOURNAL": journal, "TASKS": str(tasks), "DATABASE": stage.database()}
    with stage.program(PROCRASTINATE, ["python", "peer.py"], **environ) as pids:
        yield pids


CONTENDERS: dict[str, Contender] = {
    "ours, 4 at once": ours(1, 4),
    "ours, 16 at once": ours(1, 16),
    "ours, two services": ours(2, 4),
    "celery beat + redbeat": celery,
    "APScheduler, memory": apscheduler("memory"),
    "APScheduler, PostgreSQL": apscheduler("postgresql"),
    "procrastinate": procrastinate,
}


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was seen of one contender with one number of tasks, all rounds together."""

    late: list[float] = field(default_factory=list)
    """Milliseconds from the due time to the start."""
    wanted: int = 0
    lost: int = 0
    doubled: int = 0
    cpu: float = 0.0
    seconds: float = 0.0

    def add(self, starts: list[tuple[str, float, float]], tasks: int, seconds: int) -> None:
        """Take in the starts of one round."""
        first: dict[tuple[str, float], float] = {}
        for name, due, at in starts:
            first[name, due] = min(at, first.get((name, due), at))
        self.late += [(at - due) * 1000 for (_, due), at in first.items()]
        self.wanted += tasks * seconds
        self.lost += tasks * seconds - len(first)
        self.doubled += len(starts) - len(first)

    def line(self) -> str:
        """Return these as a line of the table."""
        if not self.late:
            return f"{'nothing ran':>24}"
        p50, p99 = quantile(self.late, 0.5), quantile(self.late, 0.99)
        return (
            f"{p50:8.1f}{p99:8.0f}{max(self.late):8.0f}{self.lost / self.wanted * 100:9.1f} %{self.doubled:9}"
            f"{self.cpu / self.seconds * 100:9.1f} %{self.cpu / len(self.late) * 1000:9.1f} ms"
        )


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def read(journal: Path) -> list[tuple[str, float, float]]:
    """Return every start so far: of what, due when, started when."""
    lines = [line.split() for line in journal.read_text().splitlines()]
    return [(line[0], float(line[1]), float(line[2])) for line in lines if len(line) == 3]


def measure(stage: Stage, contender: Contender, tasks: int, seconds: int, figures: Figures) -> None:
    """Start a contender, and take in what it does for so many seconds."""
    journal = stage.folder / "journal"
    journal.write_text("")
    with contender(stage, tasks, str(journal)) as pids:
        until = time.monotonic() + WARMS_UP
        while len({name for name, _, _ in read(journal)}) < tasks and time.monotonic() < until:
            time.sleep(0.2)
        begin = int(time.time()) + 2
        time.sleep(begin - 0.5 - time.time())
        at, used = time.monotonic(), sum(map(cpu_with_children, pids))
        time.sleep(begin + seconds - 0.5 - time.time())
        figures.cpu += sum(map(cpu_with_children, pids)) - used
        figures.seconds += time.monotonic() - at
        time.sleep(LATEST)
        starts = [start for start in read(journal) if begin <= start[1] < begin + seconds]
    figures.add(starts, tasks, seconds)


def timeline(stage: Stage, tasks: int, seconds: int) -> None:
    """Print where the milliseconds of a start go, and those of the keeper's second."""
    journal = stage.folder / "journal"
    journal.write_text("")
    text = OURS.format(tasks=tasks, journal=str(journal)) + TIMELINE
    with Project(stage.database(), text) as project, project.service():
        time.sleep(WARMS_UP / 4)
        begin = time.time()
        time.sleep(seconds)
        noted = [line.split(maxsplit=1) for line in (project.folder / "work" / "stamps").read_text().splitlines()]
    stamps = sorted((float(at), what) for at, what in noted if begin <= float(at) < begin + seconds)
    first: dict[float, float] = {}
    for _, due, at in read(journal):
        first[due] = min(at, first.get(due, at))
    moments: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for due, started in first.items():
        seen = {what: at for at, what in reversed(stamps) if due <= at <= started and not what.startswith("#")}
        for what, at in (seen | {"the first line of the task": started}).items() if seen else ():
            moments[what].append((at - due) * 1000)
    for _, what in stamps:
        if what.startswith("#"):
            _, statements, in_them, took, of = what.split(maxsplit=4)
            spent[of].append((float(statements), float(in_them) * 1000, float(took) * 1000))
    print(f"\n{tasks} due every second, for {seconds} s; {load()}")
    before = 0.0
    if tasks == 1:
        print("milliseconds after the due time, medians")
    else:
        moments = {}  # One start after the other: which of them a step was for cannot be told.
    for what, values in sorted(moments.items(), key=lambda item: statistics.median(item[1])):
        at = statistics.median(values)
        print(f"{at:8.1f}{at - before:+8.1f}  {what}")
        before = at
    print("what the keeper does\n    each s   ms each  statements  ms in them")
    for of, found in spent.items():
        statements, in_them, took = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"{len(found) / seconds:10.1f}{took:10.1f}{statements:12.1f}{in_them:12.1f}  {of}")


def fork_cost() -> str:
    """Say what a bare fork costs here: a process with Django, and nothing else, as the runner is one."""
    code = (
        "import os, statistics, time, django.core.management, django.db.models\n"
        "def once():\n"
        "    at = time.perf_counter()\n"
        "    if not (pid := os.fork()):\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    return (time.perf_counter() - at) * 1000\n"
        "print(f'{statistics.median(once() for _ in range(200)):.1f}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return f"a bare fork and exit of a process with Django takes {done.stdout.strip()} ms here"


def environment(folder: Path) -> Path:
    """Return an environment with the peers' packages: this one, made if it is not there."""
    if not (folder / "bin" / "celery").exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
    return folder


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--tasks", type=int, action="append")
    parser.add_argument("--only", action="append", help="contenders whose name has this in it")
    parser.add_argument("--peers", type=Path, help="where their packages are, or shall be")
    parser.add_argument("--timeline", action="store_true", help="where the milliseconds of our own start go")
    given = parser.parse_args()
    leave_cleanly()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        contenders = {name: run for name, run in CONTENDERS.items() if any(part in name for part in given.only or [""])}
        only_ours = given.timeline or all(name.startswith("ours") for name in contenders)
        stage = Stage(
            postgresql=stack.enter_context(servers.start("postgresql", fsync="on")),
            redis=stack.enter_context(servers.start("redis")),
            folder=folder,
            peers=folder if only_ours else environment((given.peers or folder / "peers").resolve()),
        )
        if given.timeline:
            for tasks in given.tasks or [1, 20]:
                timeline(stage, tasks, given.seconds * given.rounds)
            return
        numbers = given.tasks or [1, 20, 100]
        seen = {(name, tasks): Figures() for tasks in numbers for name in contenders}
        for number in range(given.rounds):
            for (name, tasks), figures in seen.items():
                measure(stage, contenders[name], tasks, given.seconds, figures)
                print(f"round {number + 1}, {tasks} x {name}: {figures.line()}", file=sys.stderr, flush=True)
        print(f"Start lateness; {given.rounds} rounds of {given.seconds} s; {load()}; {fork_cost()}")
        for tasks in numbers:
            print(f"\n{tasks} due every second{'':7}p50 ms  p99 ms     max    not run   doubled  of a core  CPU a run")
            for name in contenders:
                print(f"{name:24}{seen[name, tasks].line()}")


if __name__ == "__main__":
    main()

"""
``python -m tests.fleet.start``: be a server. Sets Django up, waits at the barrier if there is one, runs the schedule.

The barrier is a lock on a file that the test holds: all who wait go on at the same moment, also when the test dies.

``--post`` stays up instead and forks a server for each order that comes as a line of JSON ({"barrier": path or "",
"faults": text, "server": name, "args": [...]}): set-up is most of what a short pass costs. It answers with a line
at the start ({"pid": …}) and one at the end ({"pid": …, "status": …}).

``--register`` only has the declarations seen by the stores. FLEET_ROWS, a JSON list, says as what rows a cache lock,
which is empty, shall register its tasks, and FLEET_NOW when that was: so long ago that it waits no more for owners that
an emptied store may have forgotten.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from . import journal

if TYPE_CHECKING:
    from multiserver_schedule.locks.base import Before


def mend_what_libfaketime_breaks() -> None:
    """
    Put right what libfaketime 0.9.10 spoils besides the clock: absolute sleeps and absolute timers.

    ``time.sleep`` fails with EINVAL (it is clock_nanosleep(TIMER_ABSTIME) since Python 3.11), and an absolute
    ``timer_settime`` never fires.
    """
    from multiserver_schedule.run import kernel

    def sleep(seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            select.select((), (), (), left)

    def set_timer(self: kernel.Timer, at: float) -> None:
        if self._timer is None or at == self._at:
            return
        distance = max(0.000_001, at - journal.boot()) if at else 0.0
        when = kernel._ITimerSpec(value=kernel._TimeSpec(int(distance), int(distance % 1 * 1e9)))
        self._lib.timer_settime(self._timer, 0, kernel.ctypes.byref(when), None)
        self._at = at

    time.sleep = sleep
    kernel.Timer.set = set_timer  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    import django

    faked = bool(os.environ.get("FAKETIME"))
    if faked:
        mend_what_libfaketime_breaks()
    django.setup()
    if arguments[:1] == ["--post"]:
        post()
    elif arguments[:1] == ["--register"]:
        register()
    else:
        run(os.environ.get("FLEET_BARRIER", ""), arguments)


def run(barrier: str, arguments: list[str]) -> None:
    """Wait at the barrier, then run the schedule. Does not return."""
    from django.core.management import execute_from_command_line

    if barrier:
        # What a pass imports is imported before: they shall meet at the store, not at the disk.
        import multiserver_schedule.management.commands.runschedule  # noqa: F401

        server = os.environ["FLEET_SERVER"]
        file = os.open(barrier, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        journal.mine().write("waiting", server=server)
        fcntl.flock(file, fcntl.LOCK_SH)
        os.close(file)
        journal.mine().write("off", server=server, wall=time.time())
    execute_from_command_line(["manage.py", "runschedule", *arguments])


def register() -> None:
    """Do what the first pass does before it looks for what is due."""
    from multiserver_schedule import conf, service
    from multiserver_schedule.declare import discover, registry

    discover()
    for store in service.stores(conf.load(), registry.tasks):
        if store.lock.transactional:
            store.lock.sync(store.declared)
        else:
            moment = os.environ.get("FLEET_NOW")
            store.lock.sync(store.declared, elsewhere=given, now=datetime.fromisoformat(moment) if moment else None)


def given(names: Sequence[str]) -> Mapping[str, Before]:
    """Say of rows that they come from another store, where they were as FLEET_ROWS has them."""
    from multiserver_schedule.entries import Row
    from multiserver_schedule.locks.base import Before

    rows = {}
    for values in json.loads(os.environ.get("FLEET_ROWS", "[]")):
        times = {
            key: datetime.fromisoformat(value)
            for key, value in values.items()
            if value is not None and (key.endswith("_at") or key in ("schedule_since", "not_before"))
        }
        rows[values["task"]] = Before(row=Row(**{**values, **times}))
    return {name: rows[name] for name in names if name in rows}


def post() -> None:
    """Fork a server for each order, and say when it has ended; leave at the end of file."""
    from django.conf import settings

    import multiserver_schedule.management.commands.runschedule  # noqa: F401
    from multiserver_schedule import faults

    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    unread = b""
    while True:
        ready, _, _ = select.select((0, read), (), ())
        if read in ready:
            os.read(read, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                say(pid=pid, status=os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, unread = (unread + chunk).split(b"\n")
        for line in lines:
            order: dict[str, Any] = json.loads(line)
            pid = os.fork()
            if pid:
                say(pid=pid, order=order["order"])
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            output = os.open(order["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for descriptor in (read, write, output):
                os.close(descriptor)
            os.environ["FLEET_SERVER"] = order["server"]
            settings.MULTISERVER_SCHEDULE["SERVER_NAME"] = order["server"]
            faults._faults.clear()
            faults._faults.update(faults._parse(order["faults"]))
            try:
                run(order["barrier"], order["args"])
            except SystemExit as leaving:
                os._exit(leaving.code if isinstance(leaving.code, int) else 1)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
            os._exit(0)


def say(**message: Any) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])

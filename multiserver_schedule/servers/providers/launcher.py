"""
Starts a worker of ``ProcessProvider``, and ends before it does: run as a file of its own, with the standard library.

    the provider's process → launcher (reads what to do) → worker-to-be: lock, record, look, exec

The worker has a session of its own and init for a parent, so that nothing that ends whoever asked for it ends it. It
holds the lock of its machine's folder as an open file, through the exec and for as long as it lives: the kernel lets
go of it when it is gone, however it went. So of two that are launched for one machine one finds the lock taken, and
ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

try:
    import fcntl
except ImportError:  # Windows, where ProcessProvider says so itself
    fcntl = None  # type: ignore[assignment]

RECORD: Final = "record.json"
LOCK: Final = "lock"
OUTPUT: Final = "output.log"
STOP: Final = "stop"
REBOOT: Final = "reboot"
DELETED: Final = "deleted"
FAULTS: Final = "MULTISERVER_SCHEDULE_LAUNCHER_FAULT"
"""Names the step at which a launcher kills itself, or ``step=2.5`` at which it sleeps: a test's order."""
POSIX: Final = os.name == "posix"

_PROC: Final = sys.platform == "linux"
_PATIENCE: Final = 5.0


def lock(fd: int) -> bool:
    """Take a machine's lock; False when somebody has it, if only to see whether it is free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_free(fd: int) -> bool:
    """Say whether nobody holds a machine's lock. Those who ask do not see one another."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def boot_id() -> str:
    """Return what is another after each boot of this machine, where a process's start is told from its boot on."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def began(pid: int) -> str:
    """Return when a process was started, which with its pid is its alone; "" when it is dead."""
    if _PROC:
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                # The command may contain spaces and parentheses: the fields begin after the last one.
                fields = stat.read().rpartition(b")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    told = subprocess.run(
        ["ps", "-o", "state=,lstart=", "-p", str(pid)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
        check=False,
    )
    state, _, at = told.stdout.decode().strip().partition(" ")
    return "" if state.startswith("Z") else " ".join(at.split())


def read(folder: str) -> dict[str, Any] | None:
    """Return a machine's record, None where there is none. Raises ValueError where it cannot be understood."""
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise ValueError("a record is a file") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("began", "booted")):
        raise ValueError("a record says when it began")
    if not isinstance(record.get("pid"), int) or not 0 < record["pid"] < 2**31:
        raise ValueError("a record names a process")
    return record


def put(folder: str, name: str, content: object) -> None:
    """Write a file of a machine's folder as a whole or not at all."""
    path = os.path.join(folder, name)
    fresh = f"{path}.{os.getpid()}.{time.monotonic_ns()}.new"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(fresh, path)
    except OSError:
        # On a full disk a name may have been made, and no room for what is in the file.
        with suppress(OSError):
            os.unlink(fresh)
        raise


def has(folder: str, name: str) -> bool:
    """Is there such a file in a machine's folder?"""
    return os.path.exists(os.path.join(folder, name))


def asked_to_reboot(folder: str, record: dict[str, Any]) -> bool:
    """Is this boot of the machine the one that was to be ended by a reboot?"""
    try:
        with open(os.path.join(folder, REBOOT), encoding="utf-8") as file:
            return bool(json.load(file)["booted"] == record.get("booted"))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_same(fd: int, path: str) -> bool:
    """Is the open file still the one of that name? One that was removed meanwhile keeps nobody else out."""
    try:
        opened, named = os.fstat(fd), os.stat(path)
    except OSError:
        return False
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


class _Over(Exception):
    """There is nothing to launch; it says what there is, or what is wrong."""

    def __init__(self, **told: Any) -> None:
        super().__init__(told)
        self.told = told


def _point(name: str) -> None:
    step, _, seconds = os.environ.get(FAULTS, "").partition("=")
    if step == name and seconds:
        time.sleep(float(seconds))
    elif step == name:
        os.kill(os.getpid(), signal.SIGKILL)


def _wanted(folder: str, again: bool) -> dict[str, Any]:
    """Return the record to go on from, an empty one for a new machine. Raises _Over where nothing is to be launched."""
    if has(folder, DELETED):
        raise _Over(deleted=True)
    try:
        record = read(folder)
    except ValueError:
        raise _Over(there=True) from None
    if again:
        # Another process may have brought it up meanwhile, and it may have ended since.
        if record is None or not asked_to_reboot(folder, record) or has(folder, STOP):
            raise _Over(there=True)
    elif record is not None:
        raise _Over(there=True)
    return record or {}


def _take(folder: str, again: bool) -> int:
    """Return the machine's lock, taken. Raises _Over as soon as another is seen to have launched it."""
    path = os.path.join(folder, LOCK)
    until = time.monotonic() + _PATIENCE
    while True:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder of one that could not be launched was removed just now
            continue
        _point("after_open")
        if lock(fd) and is_same(fd, path):
            return fd
        os.close(fd)
        # Somebody looks whether it is free, which takes no time; or another is launching it, and has no record yet.
        _wanted(folder, again)
        if time.monotonic() > until:
            raise _Over(error="somebody else has been launching it for seconds", busy=True)
        time.sleep(0.003)


def _work(order: dict[str, Any], told: int) -> NoReturn:
    """Become the worker."""
    folder: str = order["folder"]
    is_mine = False
    step = "state"
    try:
        _point("before_lock")
        held = _take(folder, order["again"])
        _point("after_lock")
        order = {**_wanted(folder, order["again"]), **order}
        is_mine = not order["again"]
        step = "log"
        output = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        step = "cwd"
        if order["cwd"] is not None:
            os.chdir(order["cwd"])
        step = "state"
        pid = os.getpid()
        at = began(pid)
        mine = {"pid": pid, "began": at, "booted": f"{pid} {at} {boot_id()}".strip()}
        _point("before_record")
        told_to = {key: value for key, value in order.items() if key not in ("folder", "again", "environ")}
        put(folder, RECORD, {**told_to, **mine})
        _point("after_record")
        # Whoever has it deleted or stopped from here on finds the lock taken, and the process in the record.
        if has(folder, DELETED) or has(folder, STOP):
            os._exit(0)
        step = "command"
        os.set_inheritable(held, True)
        # Not this process's own: the interpreter may have changed it, for the locale "C".
        os.execvpe(order["command"][0], order["command"], {**order["environ"], **order["env"]})
    except _Over as over:
        answer = over.told
    except OSError as error:
        answer = {"error": error.strerror or str(error), "errno": error.errno, "step": step}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "step": step}
    try:
        if is_mine:
            with suppress(OSError):
                _remove(folder)
        os.write(told, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _remove(folder: str) -> None:
    """Remove what was made for a worker that could not be started. Its lock is held meanwhile."""
    for name in (RECORD, OUTPUT, LOCK):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    os.rmdir(folder)


def main() -> None:
    """Read an order from standard input; write to standard output what came of it, if not a worker."""
    text = sys.stdin.buffer.read()
    try:
        order = json.loads(text)
    except ValueError:
        return  # who gave it was ended in the middle of it
    told = os.dup(1)
    os.set_inheritable(told, False)
    _point("before_fork")
    try:
        pid = os.fork()
    except OSError as error:
        os.write(told, json.dumps({"error": error.strerror, "errno": error.errno, "step": "fork"}).encode())
        return
    if pid:
        os._exit(0)
    os.setsid()
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    _work(order, told)


if __name__ == "__main__":
    main()

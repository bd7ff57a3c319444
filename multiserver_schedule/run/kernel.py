"""
What only the kernel can do: end a process that is stopped, tell of a parent's death, list descendants.

Everything here is a second belt on Linux, and does nothing where the system cannot: no caller has to ask first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

LINUX: Final = sys.platform == "linux"
MARK: Final = "MULTISERVER_SCHEDULE_RUN"
"""The environment variable by which a program that left its group is still known as part of a run."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_CLOCK_BOOTTIME: Final = 7
_TIMER_ABSTIME: Final = 1


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("_pad", ctypes.c_char * 48),
    )


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _ITimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel KILL this process when ``parent`` is gone, also when it went before this call."""
    if LINUX:
        _libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def adopt_orphans(adopt: bool = True) -> bool:
    """Become the parent of descendants that lose theirs (or no longer); return what it was before."""
    if not LINUX:
        return False
    before = ctypes.c_int(0)
    _libc().prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
    return bool(before.value)


class Timer:
    """
    Kills this process at a moment of the boot clock, even while it is stopped.

    A process that is stopped runs no code of its own, so nothing that it could do at a deadline would happen; the
    kernel's timer delivers SIGKILL all the same, and the children follow by their parent-death signal.
    """

    def __init__(self) -> None:
        self._timer: ctypes.c_void_p | None = None
        self._lib: Any = None
        self._at = 0.0
        if not LINUX:
            return
        for lib in (None, "librt.so.1"):  # glibc before 2.34 has it in librt
            with suppress(OSError, AttributeError):
                self._lib = ctypes.CDLL(lib, use_errno=True)
                event = _SigEvent(signo=int(signal.SIGKILL), notify=0)
                timer = ctypes.c_void_p()
                if self._lib.timer_create(_CLOCK_BOOTTIME, ctypes.byref(event), ctypes.byref(timer)) == 0:
                    self._timer = timer
                    return

    def set(self, at: float) -> None:
        """Move the moment to ``at`` (boot time); 0 turns the timer off."""
        if self._timer is None or at == self._at:
            return
        seconds = int(at)
        when = _ITimerSpec(value=_TimeSpec(seconds, int((at - seconds) * 1e9)))
        self._lib.timer_settime(self._timer, _TIMER_ABSTIME, ctypes.byref(when), None)
        self._at = at

    def no_later_than(self, at: float) -> None:
        """Move the moment to ``at``, unless it comes before."""
        if not self._at or at < self._at:
            self.set(at)


@dataclass(frozen=True, slots=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    group: int
    session: int
    zombie: bool
    began: int
    """In ticks since the machine's start: of two processes that had one pid, the other one began later."""


def processes() -> list[Process]:
    """Return the process table (empty where there is no /proc)."""
    if not LINUX:
        return []
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [one for one in found if one is not None]


def process(pid: int) -> Process | None:
    """Return one line of the process table; None when there is none (or no /proc)."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat", "rb") as stat:
        # The command may contain spaces and parentheses: the fields begin after the last one.
        fields = stat.read().rpartition(b")")[2].split()
        return Process(
            pid=pid,
            parent=int(fields[1]),
            group=int(fields[2]),
            session=int(fields[3]),
            zombie=fields[0] in (b"Z", b"X"),
            began=int(fields[19]),
        )
    return None


def descendants(of: int, table: Iterable[Process]) -> set[int]:
    """Return the pids of everything that descends from ``of`` by parenthood, whatever group or session it is in."""
    children: dict[int, list[int]] = {}
    for process in table:
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    waiting = [of]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            if pid not in found:
                found.add(pid)
                waiting.append(pid)
    return found


def marked(owners: Collection[str], table: Iterable[Process]) -> set[int]:
    """Return the pids of programs that were started, at any remove, by the runs of these owners."""
    marks = {f"{MARK}={owner}".encode() for owner in owners}
    found = set()
    for process in table:
        if not process.zombie:
            with suppress(OSError), open(f"/proc/{process.pid}/environ", "rb") as environ:
                if not marks.isdisjoint(environ.read().split(b"\0")):
                    found.add(process.pid)
    return found


def kill(pid: int, signum: int) -> bool:
    """Send a signal to a process; False when it is gone, or not ours to signal."""
    try:
        os.kill(pid, signum)
    except OSError:
        return False
    return True


def kill_group(group: int, signum: int) -> bool:
    """Send a signal to a process group; False when nobody is left in it."""
    try:
        os.killpg(group, signum)
    except OSError:  # EPERM is what macOS says of a group of zombies
        return False
    return True


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor that is not in ``keep``."""
    for name in os.listdir("/proc/self/fd" if LINUX else "/dev/fd"):
        if (fd := int(name)) not in keep:
            with suppress(OSError):
                os.close(fd)


def open_descriptors() -> frozenset[int]:
    """Return the descriptors that are open now."""
    found = set()
    for name in os.listdir("/proc/self/fd" if LINUX else "/dev/fd"):
        with suppress(OSError):  # the listing's own is closed by now
            os.fstat(int(name))
            found.add(int(name))
    return frozenset(found)


def default_signals(*, python: bool) -> None:
    """Undo what was inherited: handlers, ignored signals, the wake-up descriptor and the mask."""
    signal.set_wakeup_fd(-1)
    for signum in signal.valid_signals():
        if signum in (signal.SIGKILL, signal.SIGSTOP):
            continue
        with suppress(OSError, ValueError, TypeError):
            signal.signal(signum, signal.SIG_DFL)
    if python:  # as the interpreter sets them at its start
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

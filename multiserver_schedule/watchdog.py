"""Breaking off a call to a store that hangs, from a thread of its own: a driver that waits in C answers no signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from .exceptions import StoreTimeout
from .run.base import boot_time


class Hangs(Protocol):
    """What the watchdog can break off."""

    @property
    def is_calling(self) -> bool:
        """Is a call under way?"""

    def cut(self) -> bool:
        """Break it off, from another thread; False when there is nothing to break."""


class Watchdog:
    """
    Cuts a store call that hangs, from a thread of its own: a driver waiting in C answers no signal.

    The thread exists only once there is a first call to watch, which is after the runner was forked.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._call: tuple[Sequence[Hangs], float, int] | None = None
        self._number = 0
        self._cut = False
        self._thread: threading.Thread | None = None
        self._over = False

    @property
    def watching(self) -> bool:
        """Is a call under way?"""
        return self._call is not None

    @contextmanager
    def watch(self, calls: Sequence[Hangs], limit: float) -> Iterator[None]:
        """Let the block take at most ``limit`` seconds; then the call to one of them is cut: StoreTimeout."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="schedule-watchdog", daemon=True)
            self._thread.start()
        with self._condition:
            self._number += 1
            self._cut = False
            self._call = (calls, boot_time() + limit, self._number)
            self._condition.notify()
        try:
            yield
        except Exception as error:
            if self._cut and not isinstance(error, StoreTimeout):
                raise StoreTimeout(
                    f"The lock's store did not answer within {limit:.1f} s; the call was cut."
                ) from error
            raise
        finally:
            with self._condition:
                self._call = None

    def stop(self) -> None:
        """End the thread, before a fork; the next call to watch starts another."""
        if self._thread is not None:
            with self._condition:
                self._over = True
                self._condition.notify()
            self._thread.join()
            self._thread, self._over = None, False

    def _run(self) -> None:
        with self._condition:
            while not self._over:
                call = self._call
                if call is None:
                    self._condition.wait()
                    continue
                calls, deadline, number = call
                left = deadline - boot_time()
                if left > 0:
                    self._condition.wait(min(left, 1.0))
                    continue
                self._cut = True
                if not any(each.cut() for each in calls):
                    # No socket yet, or none at all: interrupt whatever Python is in between.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                if self._call is not None and self._call[2] == number:
                    self._call = (calls, boot_time() + 0.5, number)

"""Run a program as a child of this process, where something of ours has to be left when it has ended."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from .runner import ended_with


class ProgramFailed(Exception):
    """A program ended otherwise than with 0; the message says how."""


def run_program(
    program: Sequence[str], *, environ: Mapping[str, str] | None = None, shown: IO[str] | None = None
) -> None:
    """
    Run it, and wait for it. Raises ProgramFailed where it cannot be started, or does not end with 0.

    It prints to where this process does, or, when it has ended, to ``shown``. A SIGTERM of the group is the program's
    to follow: this process waits for what it does then.
    """
    in_main = threading.current_thread() is threading.main_thread() and shown is None
    before = signal.signal(signal.SIGTERM, _leave_it_to_the_program) if in_main else None
    try:
        done = subprocess.run(
            list(program),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=None if shown is None else subprocess.PIPE,
            stderr=None if shown is None else subprocess.STDOUT,
            env=None if environ is None else dict(environ),
        )
    except FileNotFoundError:
        raise ProgramFailed(f"program not found: {program[0]}") from None
    except OSError as error:
        raise ProgramFailed(f"{program[0]} could not be started: {error}") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
    if shown is not None:
        shown.write(done.stdout.decode("utf-8", errors="replace"))
    if done.returncode:
        raise ProgramFailed(ended_with(done.returncode))


def _leave_it_to_the_program(number: int, frame: FrameType | None) -> None:
    """Be a handler, and not SIG_IGN, which the program would start with."""

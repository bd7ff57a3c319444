"""
Named places where a test may kill, stop or delay this process. Costless when off: ``point`` is an empty function then.

``MULTISERVER_SCHEDULE_FAULTS="after_claim=kill,before_renew=stop:2"``: the second reach of ``before_renew`` stops the
process. The actions are kill (SIGKILL), stop (SIGSTOP), exit (status 70), raise, and sleep with seconds
(``before_release=sleep5``); after a colon, which reach it is (the first, where nothing is said).
"""

from __future__ import annotations

import os
import signal
import time
from typing import Final

VARIABLE: Final = "MULTISERVER_SCHEDULE_FAULTS"


class Fault(Exception):
    """Raised at a fault point, by order of a test."""


def _parse(text: str) -> dict[str, tuple[str, int]]:
    faults = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        name, _, action = part.partition("=")
        action, _, reach = action.partition(":")
        faults[name] = (action, int(reach or 1))
    return faults


_faults = _parse(os.environ.get(VARIABLE, ""))
_reached: dict[str, int] = {}


def _point(name: str) -> None:
    """Do what was ordered for this place, if anything was."""
    if name not in _faults:
        return
    action, reach = _faults[name]
    _reached[name] = _reached.get(name, 0) + 1
    if _reached[name] != reach:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(70)
    elif action == "raise":
        raise Fault(name)
    elif action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))
    else:
        raise ValueError(f"{VARIABLE}: {action!r} is not an action (kill, stop, exit, raise, sleep<seconds>).")


def _nothing(name: str) -> None:
    """Do nothing: no fault was ordered."""


point = _point if _faults else _nothing

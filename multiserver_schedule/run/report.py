"""The reporter process: delivers events (signals, log lines, the console's) one by one, where a hang costs nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from django.db import close_old_connections, reset_queries

from .base import Deliver

log: Final = logging.getLogger("multiserver_schedule")


def deliver_reports(
    receive: Callable[[float | None], Mapping[str, Any] | None],
    send: Callable[[Mapping[str, Any]], bool],
    deliver: Deliver,
) -> None:
    """Deliver each event that comes and acknowledge it, until the end of file. A fault is logged and no more."""
    going = send({"t": "ready"})
    while going and (message := receive(None)) is not None:
        close_old_connections()
        deliver_one(message["event"], deliver)
        with suppress(Exception):
            reset_queries()
        going = send({"t": "done"})


def deliver_one(event: Mapping[str, Any], deliver: Deliver) -> None:
    """Deliver an event; whatever its receivers raise (but Ctrl-C) is logged."""
    try:
        deliver(event)
    except KeyboardInterrupt:
        raise
    except BaseException:
        with suppress(Exception):
            log.exception("A report could not be delivered: %s", str(event)[:300])

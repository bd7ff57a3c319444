"""Who is told, and in which words? A receiver of the signals writes the log."""

from __future__ import annotations

import logging
from typing import Any, Final

from . import signals

logger = logging.getLogger("multiserver_schedule.servers")

_CHANGES: Final = (
    signals.creating_server,
    signals.server_running,
    signals.rebooting_server,
    signals.draining_server,
    signals.stopping_server,
    signals.server_stopped,
    signals.deleting_server,
    signals.server_deleted,
)


def connect() -> None:
    """Connect the log; called once, by the app."""
    for signal in _CHANGES:
        signal.connect(_changed, dispatch_uid="multiserver_schedule_servers.logs")
    signals.server_errored.connect(_failed, dispatch_uid="multiserver_schedule_servers.logs")
    signals.server_hanging.connect(_failed, dispatch_uid="multiserver_schedule_servers.logs")
    signals.orphan_found.connect(_orphan, dispatch_uid="multiserver_schedule_servers.logs")
    signals.server_limit_hit.connect(_limit, dispatch_uid="multiserver_schedule_servers.logs")


def _changed(sender: Any, server: Any, previous: str, reason: str, **more: Any) -> None:
    logger.info("%s is %s, was %s: %s", server.name, server.status, previous or "not there", reason)


def _failed(sender: Any, server: Any, previous: str, reason: str, **more: Any) -> None:
    logger.error(
        "%s is %s, was %s: %s; it will be deleted at %s", server.name, server.status, previous, reason, server.provider
    )


def _orphan(sender: Any, server: Any, reason: str, **more: Any) -> None:
    logger.error("An orphan: %s", reason)


def _limit(sender: Any, server: Any, type: str, reason: str, **more: Any) -> None:
    logger.warning("Fewer servers of the type %s than are wanted: %s", type, reason)

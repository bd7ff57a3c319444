"""Rows of a fleet, and a provider that nothing is asked of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from multiserver_schedule.servers import ledger
from multiserver_schedule.servers.entries import Machine, ServerInfo
from multiserver_schedule.servers.models import Decision, Server, Transition
from multiserver_schedule.servers.providers.base import BaseProvider
from multiserver_schedule.servers.states import Status


class Nowhere(BaseProvider):
    """A provider that nothing is asked of."""

    def _never(self, *_: Any) -> Any:
        raise AssertionError("the provider was called")

    def create_server(self, server: ServerInfo) -> Machine:
        return self._never()

    def has_started(self, machine_id: str) -> bool:
        return self._never()

    def stop_server(self, machine_id: str) -> None:
        self._never()

    def has_stopped(self, machine_id: str) -> bool:
        return self._never()

    def delete_server(self, machine_id: str) -> None:
        self._never()

    def has_been_deleted(self, machine_id: str) -> bool:
        return self._never()

    def reboot_server(self, machine_id: str) -> None:
        self._never()

    def current_server_count(self) -> int:
        return self._never()

    def find_by_tag(self, key: str) -> Sequence[Machine]:
        return self._never()

    def list_servers(self) -> Sequence[Machine]:
        return self._never()


NOWHERE = f"{__name__}.Nowhere"


def make(name: str, status: Status = Status.RUNNING, *, since: timedelta = timedelta(0), **more: Any) -> Server:
    """Make a server's row, which got its status so long ago."""
    now = ledger.now()
    server: Server = ledger.servers().create(
        **{
            "name": name,
            "key": f"key-of-{name}",
            "type": "default",
            "provider": "a",
            "status": status,
            "status_changed_at": now - since,
            "created_at": now - since,
            "deleted_at": now - since if status == Status.DELETED else None,
            "machine_id": "" if status == Status.NEW else f"machine-of-{name}",
            "why": "2 are wanted, and 1 is there",
            **more,
        }
    )
    return server


def again(server: Server) -> Server:
    """Return the row as it is now."""
    found: Server = ledger.servers().get(pk=server.pk)
    return found


def decided(type: str, at: datetime, until: datetime, **more: Any) -> Decision:
    """Note that something was decided."""
    given = {"wanted": 1, "running": 1, "provisioned": 1, "by": "web1", "why": "as many as ever", **more}
    decision: Decision = ledger.decisions().create(type=type, at=at, until=until, **given)
    return decision


def transitions_of(server: Server) -> list[Transition]:
    """Return what became of a server, the first change first."""
    return list(ledger.transitions().filter(server_id=server.pk).order_by("pk"))

"""What a provider must do. ``multiserver_schedule.testing.ProviderContract`` tests an implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from django.core.checks import CheckMessage

from ..entries import Machine, ServerInfo


class BaseProvider(ABC):
    """
    Makes machines and ends them.

    Every call may be made again after an answer was lost, by another process, on another server: an instance keeps
    nothing that a later one needs. It is made for one thread, and not shared between threads.

    Say what is known when a call fails: ``ProviderBusy`` and ``ProviderFull`` (nothing was done, later perhaps),
    ``ProviderRefused`` (nothing was done, nor ever will be); everything else that is raised means that nobody knows
    whether it was done, and leads to a look-up. Each call has to end by itself within ``timeout``. No secret may be in
    the text of an error.
    """

    idempotent: bool = False
    """Does ``create_server`` with a key that it was called with before make no second machine, whenever it comes?"""
    local: ClassVar[bool] = False
    """Are its machines seen on one host only? Then ``ONLY_ON`` has to name that host where there are several."""
    timeout: timedelta = timedelta(seconds=30)
    settles: timedelta = timedelta(minutes=5)
    """
    After how long a machine whose creation was asked for, and whose answer was lost, is seen by ``find_by_tag`` if it
    was made at all. Not before is its creation asked for again, unless the provider is ``idempotent``.
    """

    def __init__(self, name: str, options: Mapping[str, Any], *, fleet: str) -> None:
        """
        Keep the settings of one entry of ``PROVIDERS``; open nothing.

        ``fleet`` names whose machines they are: every machine bears it as a tag, and no other fleet's is ever shown or
        touched. Raises FleetError, naming the option, where one is wrong.
        """
        self.name, self.options, self.fleet = name, options, fleet

    @abstractmethod
    def create_server(self, server: ServerInfo) -> Machine:
        """Make a machine that bears our tag and ``server.key``, and start it. Return at once, not when it is up."""

    @abstractmethod
    def has_started(self, machine_id: str) -> bool:
        """Say whether it is up. Raises UnknownState; whatever is not a clear answer is an error, and not False."""

    @abstractmethod
    def stop_server(self, machine_id: str) -> None:
        """Ask it to shut down in order. To stop what is stopped, or gone, does nothing."""

    @abstractmethod
    def has_stopped(self, machine_id: str) -> bool:
        """Say whether it is down; one that is gone is. Raises UnknownState."""

    @abstractmethod
    def delete_server(self, machine_id: str) -> None:
        """End it for good, so that it costs nothing any more. To delete what is gone does nothing."""

    @abstractmethod
    def has_been_deleted(self, machine_id: str) -> bool:
        """Say whether it is gone: True only where the provider clearly says that there is none, never at an error."""

    @abstractmethod
    def reboot_server(self, machine_id: str) -> None:
        """Restart it."""

    @abstractmethod
    def current_server_count(self) -> int:
        """Return how many machines count towards ``MAX_SERVERS``, in whatever state they are billed."""

    @abstractmethod
    def find_by_tag(self, key: str) -> Sequence[Machine]:
        """Return the machines that were created with this key: none, one, or more where something went wrong."""

    @abstractmethod
    def list_servers(self) -> Sequence[Machine]:
        """Return all machines that bear the tag of our fleet and are not gone; all, or an error."""

    def check(self) -> list[CheckMessage]:
        """Return what is wrong with the options, without a call to the provider, for ``manage.py check``."""
        return []

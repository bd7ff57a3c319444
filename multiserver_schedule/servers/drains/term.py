"""Servers that need only be asked to end: a service of ours, ``db_worker``, ``rq worker``, any good daemon."""

from __future__ import annotations

from .. import providers
from ..entries import MachineState, ServerInfo
from .base import Drain, state_of


class TermDrain(Drain):
    """
    Drains what ends by itself, and in order, when its provider stops it.

    That is SIGTERM for a process (``ProcessProvider``), and for a machine in the cloud its shut-down, during which its
    service manager sends SIGTERM and waits (``TimeoutStopSec``). ``runschedule --forever`` claims nothing more then,
    and lets its runs end within its ``--grace``: let that be shorter than the limit of the drain. ``rq worker``
    ends with the job that it runs; so does ``db_worker``, unless it was told between claiming and beginning one, see
    docs/servers.rst.

    It is told once: a second SIGTERM means to each of these that it should end its jobs as well. What has not ended at
    the limit of the drain has no more time at its provider, if it was told longer ago than that provider waits.
    """

    def drain(self, server: ServerInfo) -> int:
        """Have it stopped, unless it is about to be, and return 1 until it is down: its jobs are not counted."""
        provider = providers.make(server.provider)
        state = state_of(server, provider)
        if state is MachineState.STOPPED:
            return 0
        if state is not MachineState.STOPPING:
            provider.stop_server(server.machine_id)
        return 1

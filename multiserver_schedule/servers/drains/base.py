"""What a drain must do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..entries import MachineState, ServerInfo
from ..exceptions import FleetError
from ..providers.base import BaseProvider


class Drain(ABC):
    """Lets a server end its work before it is stopped. Any callable with the signature of ``drain`` will do as well."""

    @abstractmethod
    def drain(self, server: ServerInfo) -> int:
        """
        Tell the server to take no more work, and return how many jobs it still runs; 0: it may be stopped.

        Called every 20 seconds until it returns 0 or the type's limit is reached, each time perhaps by another process:
        to be told twice must do no harm. Raise when it cannot be told: it is tried again, and stopped at the limit.
        Not to know is no 0: that would end what it runs.
        """

    def __call__(self, server: ServerInfo) -> int:
        """Be as good as a function."""
        return self.drain(server)


def jobs_left(answer: object, drain: object = None) -> int:
    """
    Return what a drain has answered, if that is a count of jobs. Raises FleetError, naming the drain, where it is not.

    A function without a ``return`` gives None, and one that means "done" gives True, which Python takes for 1: neither
    is taken for an answer.
    """
    who = "A drain" if drain is None else getattr(drain, "__qualname__", type(drain).__qualname__)
    rule = "It should return how many jobs the server still runs, and 0 when it may be stopped."
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise FleetError(f"{who} returned {answer!r}. {rule}")
    if answer < 0:
        raise FleetError(f"{who} returned {answer}, and there are no fewer jobs than none. {rule}")
    return answer


def state_of(server: ServerInfo, provider: BaseProvider) -> MachineState:
    """
    Return what its provider says of a server's machine; STOPPED, too, where it clearly says that it is gone.

    By a look that changes nothing: to be asked ``has_stopped`` may be the sign to a provider that patience is over.
    """
    for machine in provider.find_by_tag(server.key):
        if machine.id == server.machine_id:
            return machine.state
    return MachineState.STOPPED if provider.has_stopped(server.machine_id) else MachineState.UNKNOWN

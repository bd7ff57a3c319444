"""
What projects call: ``from multiserver_schedule.servers import fleet``.

Each order is kept in the database, as what is wanted of a type; the scheduler's tasks bring it about within a minute.
So an order may be given from anywhere, as often as one likes, by several at once: nothing is made twice by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from threading import Event
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from django.db.models import QuerySet

from multiserver_schedule.declare import Broken, discover_errors

from . import conf, ledger, types
from .demand import MOST
from .exceptions import FleetError
from .hiding import told
from .states import Status
from .types import DEFAULT, ServerType, option

if TYPE_CHECKING:
    from .models import Server

__all__ = [
    "ServerType",
    "decrease",
    "determine_server_count",
    "ensure",
    "increase",
    "option",
    "provisioned_count",
    "reboot",
    "register_server_type",
    "wanted_count",
]

Determine = Callable[[ModuleType], "int | Mapping[str, int] | None"]
_D = TypeVar("_D", bound=Determine)

_asking: ContextVar[dict[str, int] | None] = ContextVar("asking", default=None)
_determine: list[Determine] = []
_read: Final = Event()
_reads: Final[ContextVar[bool]] = ContextVar("reads", default=False)
_TRIES: Final = 20
_REBOOTABLE: Final = (Status.STARTING, Status.RUNNING, Status.REBOOTING)


def register_server_type(type: ServerType) -> ServerType:
    """
    Make a type of servers known, in a ``schedule.py``; one of the same name is replaced, and ``default`` may be.

    Raises FleetError where it is no ServerType.
    """
    return types.register(type)


def determine_server_count(determine: _D) -> _D:
    """
    Have this callable asked each minute how many servers there should be; usable as a decorator.

    It is given this module, and calls ``ensure``, ``increase`` and ``decrease``; or it returns a count for the type
    ``default``, or a dict of type to count. What it asks for is bounded and damped as each type says (``between``,
    ``step``, ``cool_down``, ``stabilization``), so that a number that jumps about starts and stops nothing each minute.
    What it says nothing of stays as it is; so does everything when it raises.
    """
    if not callable(determine):
        raise FleetError(f"determine_server_count() takes a callable, not {determine!r}.")
    _determine[:] = [determine]
    return determine


def ensure(count: int, type: str = DEFAULT) -> int:
    """
    Want so many servers of a type, no more and no fewer; return how many are wanted now, within the type's bounds.

    Raises FleetError for a count below zero, or of a type that is not known.
    """
    return _want("ensure", count, type, lambda wanted: count)


def increase(by: int = 1, type: str = DEFAULT) -> int:
    """
    Want more of a type than were wanted until now, as many as may be had at most; return how many are wanted.

    ``increase(0)`` does nothing.
    """
    return _want("increase", by, type, lambda wanted: wanted + by)


def decrease(by: int = 1, type: str = DEFAULT) -> int:
    """Want fewer of a type than were wanted until now, its minimum at least; return how many are wanted."""
    return _want("decrease", by, type, lambda wanted: max(0, wanted - by))


def reboot(type: str | None = None) -> int:
    """
    Have all servers of a type rebooted, or of all types; return how many will be.

    One that starts, or reboots already, does it as soon as it is up; one whose provider is in the settings no more,
    never. Raises FleetError where there is no such type.
    """
    if type is not None:
        _kind(type)
    now = ledger.now()
    rows = ledger.servers().filter(status__in=_REBOOTABLE, provider__in=conf.load().providers)
    if type is not None:
        rows = rows.filter(type=type)
    return sum(_reboot(server, rows, now) for server in rows.order_by("pk"))


def _reboot(server: Server, rows: QuerySet[Server], now: datetime) -> bool:
    """Ask for the reboot of one of these rows; again, where a pass has changed it meanwhile."""
    read: Server | None = server
    for _ in range(_TRIES):
        if read is None:
            return False
        # Of one that runs it is the next step; the others come to it by themselves.
        more = {"next_step_at": now} if read.status == Status.RUNNING else {}
        if ledger.change(read, reboot_requested_at=now, **more):
            return True
        read = rows.filter(pk=server.pk).first()
    raise RuntimeError(f"The server {server.name} was changed {_TRIES} times by others meanwhile; ask again.")


def provisioned_count(type: str | None = None) -> int:
    """
    Return how many servers of a type, or of all, do their work or are on their way to.

    That is new, starting, running and rebooting. Raises FleetError where there is no such type.
    """
    if type is not None:
        _kind(type)
    return ledger.provisioned(ledger.counts(type))


def wanted_count(type: str = DEFAULT) -> int:
    """Return how many servers of a type are wanted. Raises FleetError where there is no such type."""
    _kind(type)
    return _wanted(type)


def _wanted(type: str) -> int:
    row = ledger.targets().filter(type=type).first()
    return max(row.wanted if row else 0, _kind(type).policy.minimum)


def _want(verb: str, number: int, type: str, change: Callable[[int], int]) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise FleetError(f"fleet.{verb}() takes a whole number from 0 up, not {number!r}.")
    if number > MOST:
        raise FleetError(f"fleet.{verb}() takes at most {MOST}, not {number!r}.")
    kind = _kind(type)
    asks = _asking.get()
    if asks is not None:
        # Bounded by the decision, which says so.
        asks[type] = min(change(asks.get(type, _wanted(type))), MOST)
        return asks[type]
    if verb != "ensure" and number == 0:
        return _wanted(type)
    # One order for more than its providers have room for is kept, and said to be short of; many in a row do not add up.
    policy = kind.policy if verb == "ensure" else types.bounded(kind)

    def ordered(wanted: int) -> int:
        count = policy.bounded(change(policy.bounded(wanted)))
        # Who asks for more never gets fewer than one order asked for, within the bounds of the type.
        return max(count, kind.policy.bounded(wanted)) if verb == "increase" else count

    return ledger.want(type, ordered, f"fleet.{verb}({number})", now=ledger.now())


def _kind(name: str) -> ServerType:
    """
    Return the type of this name. Raises FleetError where there is none.

    A shell, a web server or a worker of a queue has read no schedule.py: before a name is unknown there, all of them
    are read; and once before ``default`` is taken for a type that nobody has registered.
    """
    broken: tuple[Broken, ...] = ()
    if not (types.is_registered(name) or (name == DEFAULT and _read.is_set())):
        broken = _read_declarations()
    try:
        return types.get(name)
    except FleetError as error:
        unread = [f" {each.module} cannot be read: {told(each.error)}." for each in broken]
        raise FleetError("".join([str(error), *unread])) from None


def _read_declarations() -> tuple[Broken, ...]:
    """Read every schedule.py, unless one of them is what asks for it; return those that cannot be read."""
    if _reads.get():
        return ()
    token = _reads.set(True)
    try:
        broken = discover_errors()
    finally:
        _reads.reset(token)
    if not broken:
        _read.set()
    return broken


@contextmanager
def asked() -> Iterator[dict[str, int]]:
    """Collect what is asked for within the block, by type, instead of ordering it."""
    asks: dict[str, int] = {}
    token = _asking.set(asks)
    try:
        yield asks
    finally:
        _asking.reset(token)


def determined(fleet: Any) -> dict[str, int] | None:
    """Ask the callable of ``determine_server_count``, and return counts by type; None where there is no callable."""
    if not _determine:
        return None
    with asked() as asks:
        answer = _determine[0](fleet)
        if isinstance(answer, Mapping):
            for type, count in answer.items():
                ensure(count, type)
        elif answer is not None:
            ensure(answer)
    return asks

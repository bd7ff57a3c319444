"""What is to be created, and who is to go? From what is wanted and known to actions. Pure, and deterministic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from multiserver_schedule.logs import distance

from .states import LEAVING, PROVISIONED, Status

PATIENCE: Final = timedelta(minutes=1)
"""For so long a server that was not begun waits for its own provider, before it is made at another one."""
MOST_AT_ONCE: Final = 100
"""So many are begun by one plan, however many are wanted: what is left is for the next one."""

_ON_THEIR_WAY_OUT: Final = (*LEAVING, Status.ERRORED, Status.HANGING)
_FIRST_TO_GO: Final = (Status.NEW, Status.STARTING, Status.REBOOTING, Status.DRAINING, Status.RUNNING)


@dataclass(frozen=True, slots=True)
class Known:
    """A server of one type, as far as the plan cares. Those that are deleted are not told of."""

    name: str
    provider: str
    status: Status
    since: datetime
    """When its row was made."""
    billed_since: datetime | None = None
    """When its creation was first asked for; None: it was not."""
    jobs: int | None = None
    """How many jobs it works on; None: not known."""
    reboots: bool = False
    """Will it be rebooted before it works again?"""


@dataclass(frozen=True, slots=True)
class Room:
    """What a provider has left."""

    provider: str
    limit: int
    used: int
    """What counts towards the limit: machines that are there, and may be, rows that wait for theirs among them."""
    closed: str = ""
    """Why nothing is created there now ("" when it may be), such as "no answer since 12:03:20Z"."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What is wanted of one type."""

    type: str
    wanted: int
    providers: Sequence[str]
    """Where it may be made, by preference."""
    billing_period: timedelta | None = timedelta(hours=1)
    """What is begun of it is paid for; None: by the second, so that it decides nothing."""
    max_age: timedelta | None = None
    """Servers that are older are replaced, one at a time; None: they may grow as old as they like."""
    drains: bool = False
    """Do its servers end their work before they go? Said in the words for people; the choice is the same."""
    closed: str = ""
    """Why none is made now, wherever there is room ("" when they may be), such as "its servers did not live"."""
    left_alone: str = ""
    """Why nothing is done about its servers by whoever plans now; "": they are planned for."""


@dataclass(frozen=True, slots=True)
class Create:
    """Make a row for a server of this type, there."""

    type: str
    provider: str
    why: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let this server end its work, and go: one that runs, or one that is drained for a reboot, now without it."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give up this server, whose creation was not begun, or whose machine does no work yet."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Short:
    """More is wanted than there is room for."""

    type: str
    missing: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do for one type, in this order; nothing, when all is as it is wanted."""

    creates: Sequence[Create] = ()
    cancels: Sequence[Cancel] = ()
    drains: Sequence[Drain] = ()
    short: Short | None = None
    why: str = ""
    """One sentence that sums it up."""


def plan(needs: Needs, known: Sequence[Known], rooms: Mapping[str, Room], now: datetime) -> Plan:
    """
    Return what brings the servers that are known to the number that is wanted. Their order does not matter.

    Counted are those that work or are on their way to: ``new``, ``starting``, ``running``, ``rebooting``, and those
    that are drained for a reboot. Of all others, the rooms know whether they take up a place.

    - Too few: made at the first provider that answers and has room; what it has no room for, at the next one. No more
      than ``MOST_AT_ONCE``.
    - Too many: first those that do no work yet, then those that run: idle ones, ones of which that is not known, busy
      ones, the fewest jobs first. Of equals, the one whose paid period ends soonest, as the termination policy
      ``ClosestToNextInstanceHour`` of EC2 Auto Scaling has it; without a period, the newest.
    - ``new`` for more than ``PATIENCE`` at a provider that is closed, or over its limit, while another one has room:
      made there instead. What it leaves behind was never begun, so nothing is lost, and the newcomer is patient, too.
    - A type that is ``closed``: none is made, for whatever reason, and those that go do so as ever.
    - Older than ``max_age``: first among those that run to go, and replaced one at a time, when all servers of the type
      run and are as many as are wanted. While one more than wanted is there, and some do not run yet, nobody goes:
      once all run, the old one does. So capacity does not fall, except where no provider has room for one more: there
      the old one goes first, if its place can be had again (all providers answer, and its own is not over its limit).

    Carried out, and asked again with no time passed, it has nothing left to do but the rest of too many for one plan.
    """
    servers = sorted(known, key=lambda server: (server.since, server.name))
    there = [server for server in servers if _is_provisioned(server)]
    aged = _aged(needs, there, now)
    places = _Places(needs, rooms, servers)
    summary = f"{needs.wanted} wanted, {len(there)} there or on the way"
    if needs.left_alone:
        return Plan(why=f"{summary}: {needs.left_alone}")
    creates: list[Create] = []
    cancels: list[Cancel] = []
    drains: list[Drain] = []

    missing = max(needs.wanted - len(there), 0)
    begun = min(missing, MOST_AT_ONCE)
    for provider in places.take(begun):
        creates.append(Create(needs.type, provider, f"{summary}{places.passed_over(provider)}"))
    short = None
    if begun > len(creates):
        short = Short(needs.type, missing - len(creates), f"{summary}; {places.why_none()}")

    stuck = places.stuck(servers)
    order = sorted(there, key=lambda server: _rank(server, needs, aged, stuck, now))
    going = _surplus(needs, order, aged)
    for server in going:
        why = f"{summary}; {_because(server, needs, aged, now)}"
        if server.status in (Status.DRAINING, Status.RUNNING):
            drains.append(Drain(server.name, why))
        else:
            cancels.append(Cancel(server.name, why))

    # After those that go, since each may leave its provider with one fewer too many.
    gone = {server.name for server in going}
    stuck = places.stuck(server for server in servers if server.name not in gone)
    for server in servers:
        if server.name in stuck and now - server.since >= PATIENCE:
            for provider in places.take(1):
                why = f"{server.name} waits in vain at {places.state(server.provider)}"
                creates.append(Create(needs.type, provider, why))
                cancels.append(Cancel(server.name, f"{why}; made at {provider} instead"))

    if aged and len(there) == needs.wanted and all(server.status == Status.RUNNING for server in servers):
        for provider in places.take(1):
            creates.append(Create(needs.type, provider, f"to replace {order[0].name}, which is {aged[order[0].name]}"))
        if not creates and (first := places.to_be_had_again(server for server in order if server.name in aged)):
            why = f"{aged[first.name]}, and there is no room for another one beside it: {places.why_none()}"
            drains.append(Drain(first.name, why))

    if aged and len(there) - len(going) > needs.wanted:
        summary += ", one of them to replace one that is too old"
    what = [
        f"{len(some)} to {verb}"
        for verb, some in (("create", creates), ("cancel", cancels), ("let go", drains))
        if some
    ]
    if short:
        what.append(f"no room for {short.missing}")
    elif missing > begun:
        what.append(f"{missing - begun} more afterwards, {MOST_AT_ONCE} at a time")
    return Plan(
        tuple(creates), tuple(cancels), tuple(drains), short, f"{summary}: {', '.join(what) or 'nothing to do'}"
    )


def _is_provisioned(server: Known) -> bool:
    return server.status in PROVISIONED or (server.status == Status.DRAINING and server.reboots)


def _aged(needs: Needs, there: Iterable[Known], now: datetime) -> dict[str, str]:
    """Return those that run and are too old, by name, each with how old it is."""
    if needs.max_age is None:
        return {}
    most = distance(needs.max_age)
    return {
        server.name: f"{distance(_age(server, now))} old ({most} at most)"
        for server in there
        if server.status == Status.RUNNING and _age(server, now) > needs.max_age
    }


def _age(server: Known, now: datetime) -> timedelta:
    return now - (server.billed_since or server.since)


def _rank(server: Known, needs: Needs, aged: Mapping[str, str], stuck: Iterable[str], now: datetime) -> tuple[Any, ...]:
    """Return where it stands in the order of those that go. Ends with the name: no two are equal."""
    group = _FIRST_TO_GO.index(server.status)
    if server.status != Status.RUNNING:
        # Newest first: the oldest is the nearest to its work. But one that gets nowhere may go before.
        return group, server.name not in stuck, now - server.since, server.name
    known = 1 if server.jobs is None else 2 if server.jobs else 0
    return (
        group,
        server.name not in aged,
        known,
        server.jobs or 0,
        _paid(server, needs, now),
        _age(server, now),
        server.name,
    )


def _paid(server: Known, needs: Needs, now: datetime) -> timedelta:
    """Return for how long it is paid for already; zero where that is not by the period."""
    period = needs.billing_period
    return period - _age(server, now) % period if period else timedelta(0)


def _surplus(needs: Needs, order: Sequence[Known], aged: Mapping[str, str]) -> Sequence[Known]:
    """Return who goes since there are too many, of all in the order in which they would go."""
    surplus = max(len(order) - needs.wanted, 0)
    if surplus and aged and order[surplus - 1].status != Status.RUNNING:
        # It is left, besides as many as are wanted: it is on its way to replace one that is too old.
        surplus -= 1
    return order[:surplus]


def _because(server: Known, needs: Needs, aged: Mapping[str, str], now: datetime) -> str:
    """Return why this one goes, and no other."""
    if server.status != Status.RUNNING:
        return {
            Status.NEW: "not begun yet",
            Status.STARTING: "does no work yet",
            Status.REBOOTING: "does no work during its reboot",
        }.get(Status(server.status), "ends its work for a reboot anyway")
    said = [aged[server.name]] if server.name in aged else []
    if server.jobs is None:
        said.append("its jobs are not known")
    elif server.jobs == 0:
        said.append("idle")
    else:
        said.append(
            f"has the fewest jobs, {server.jobs}" + ("" if needs.drains else ", and nothing that lets them end")
        )
    if needs.billing_period:
        said.append(f"paid for another {distance(_paid(server, needs, now))}")
    return ", ".join(said)


class _Places:
    """What room there is at each provider, and what of it this plan has taken."""

    def __init__(self, needs: Needs, rooms: Mapping[str, Room], servers: Sequence[Known]) -> None:
        self.providers = tuple(dict.fromkeys(needs.providers))
        self.closed = needs.closed
        self.rooms = rooms
        self.taken: Counter[str] = Counter()
        self.waiting = Counter(server.provider for server in servers if server.status == Status.NEW)
        self.leaving = Counter(server.provider for server in servers if server.status in _ON_THEIR_WAY_OUT)

    def take(self, count: int) -> list[str]:
        """Take up to so many places, and return whose they are."""
        found: list[str] = []
        if self.closed:
            return found
        for provider in self.providers:
            room = self.rooms.get(provider)
            if room is not None and not room.closed:
                free = max(room.limit - room.used - self.taken[provider], 0)
                here = min(free, count - len(found))
                found += [provider] * here
                self.taken[provider] += here
        return found

    def stuck(self, servers: Iterable[Known]) -> set[str]:
        """
        Return the names of those that were not begun, and will not be where they are, if nothing changes there.

        Of a provider that is over its limit, those are as many of the newest as are too many.
        """
        waiting: dict[str, list[str]] = {}
        for server in sorted(servers, key=lambda server: (server.since, server.name), reverse=True):
            if server.status == Status.NEW:
                waiting.setdefault(server.provider, []).append(server.name)
        found: set[str] = set()
        for provider, names in waiting.items():
            room = self.rooms.get(provider)
            if room is None or room.closed:
                found.update(names)
            else:
                # Some of those that waited may be given up by this plan.
                used = room.used - (self.waiting[provider] - len(names))
                found.update(names[: max(used - room.limit, 0)])
        return found

    def to_be_had_again(self, servers: Iterable[Known]) -> Known | None:
        """Return the first whose place would be free for this type when it is gone, and nowhere is trouble."""
        rooms = [self.rooms.get(provider) for provider in self.providers]
        fit = {room.provider for room in rooms if room is not None and room.used <= room.limit}
        if self.closed or any(room is None or room.closed for room in rooms):
            return None
        return next((server for server in servers if server.provider in fit), None)

    def state(self, provider: str) -> str:
        """Return how it is there."""
        room = self.rooms.get(provider)
        if room is None:
            return f"{provider}: no provider of that name is left"
        if room.closed:
            return f"{provider}: {room.closed}"
        text = f"{provider}: {room.used + self.taken[provider]} of {room.limit} places are taken"
        leaving = self.leaving[provider]
        return text + (f", {leaving} of them by servers on their way out" if leaving else "")

    def passed_over(self, provider: str) -> str:
        """Return why it was not one that is preferred to this one."""
        before = self.providers[: self.providers.index(provider)]
        return "".join(f"; {self.state(each)}" for each in before)

    def why_none(self) -> str:
        """Return why there is no room anywhere."""
        return self.closed or "; ".join(map(self.state, self.providers)) or "no provider is named for this type"

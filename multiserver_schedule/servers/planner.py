"""What is there, what is wanted, and so what is to be done? Reads the rows, asks ``plan``, and changes the rows."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from django.db import transaction
from django.db.models import F, Q

from multiserver_schedule.logs import short

from . import conf, ledger, types
from .entries import ServerInfo
from .hiding import told, traced
from .plan import Known, Needs, Plan, Room, Short, plan
from .states import BILLED, Status, backoff
from .types import ServerType
from .visit import MOST_BACKOFF

if TYPE_CHECKING:
    from .models import Provider, Server, Target

logger = logging.getLogger("multiserver_schedule.servers")

UNKNOWN_FOR: Final = timedelta(minutes=15)
"""How long nobody may have known a type before its servers are let go: during a deploy two versions work at once."""
_NOTED_EVERY: Final = timedelta(minutes=1)
"""How often it is written down that a type is known."""
_LATE: Final = timedelta(minutes=1)
"""By so much has a look at a provider to be overdue, before it is noticed."""
LOOKED_AT_WITHIN: Final = timedelta(minutes=5)
"""For so long after that it may still be looked at, before it is taken for closed: all of us may have been down."""
_REFUSALS_COUNT_FOR: Final = timedelta(hours=2)
"""How long a creation that was refused makes the wait after the next one longer."""
_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Planned:
    """What is to be done for one type."""

    type: str
    needs: Needs
    plan: Plan


@dataclass(frozen=True, slots=True)
class Survey:
    """All rows that a plan depends on, and the types that there are; three statements."""

    now: datetime
    kinds: Mapping[str, ServerType]
    targets: Mapping[str, Target]
    servers: Mapping[str, list[Server]]
    """By type; none that are deleted."""
    rooms: Mapping[str, Room]
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Why no server of a type is made at a provider now, by both."""
    overlooked: Sequence[str] = ()
    """Providers that should have been looked at by now, where nobody has noticed that yet."""

    @property
    def types(self) -> list[str]:
        """Return the names of the types that are registered, and of those that have servers still."""
        return sorted({*self.kinds, *self.servers})

    def plan(self, type: str, *, wanted: int | None = None, busy: Mapping[str, int] | None = None) -> Planned:
        """Return what is to be done for a type; ``wanted``, ``busy``: if they were that, and not as the row says."""
        row = self.targets.get(type)
        if busy is None and row is not None:
            busy = row.busy
        needs = needs_of(type, row, self.kinds.get(type), wanted, now=self.now)
        known = [
            Known(
                name=server.name,
                provider=server.provider,
                status=Status(server.status),
                since=server.created_at,
                billed_since=server.asked_at,
                jobs=None if busy is None else busy.get(server.name),
                reboots=server.reboot_requested_at is not None,
            )
            for server in self.servers.get(type, ())
        ]
        return Planned(type, needs, plan(needs, known, self._rooms_of(type), self.now))

    def _rooms_of(self, type: str) -> Mapping[str, Room]:
        """Return what room there is for a type: none where it is refused."""
        rooms = dict(self.rooms)
        for (of, provider), why in self.refused.items():
            if of == type and provider in rooms and not rooms[provider].closed:
                rooms[provider] = replace(rooms[provider], closed=why)
        return rooms

    def after(self, planned: Plan) -> Survey:
        """Return what would be left of the rooms when this were done."""
        rooms = dict(self.rooms)
        for create in planned.creates:
            room = rooms[create.provider]
            rooms[create.provider] = replace(room, used=room.used + 1)
        return replace(self, rooms=rooms)


def survey(now: datetime) -> Survey:
    """Read what there is."""
    # The targets before the servers: whoever plans meanwhile changes his target, and is noticed.
    targets = {row.type: row for row in ledger.targets()}
    servers: dict[str, list[Server]] = defaultdict(list)
    used: Counter[str] = Counter()
    refusals: dict[tuple[str, str], list[Server]] = defaultdict(list)
    is_refusal = _is_refusal(now)
    for server in ledger.servers().filter(~Q(status=Status.DELETED) | is_refusal).order_by("pk"):
        if server.failed_as == Status.ERRORED and not server.machine_id:
            refusals[server.type, server.provider].append(server)
        if server.status == Status.DELETED:
            continue
        servers[server.type].append(server)
        used[server.provider] += server.status in BILLED or server.status == Status.NEW
    chosen = conf.load().providers
    rows = {row.name: row for row in ledger.providers()}
    rooms = {
        name: Room(
            provider=name,
            limit=limits.max_servers,
            used=used[name] + (rows[name].unknown if name in rows else 0),
            closed=_closed(rows[name], now) if name in rows else "",
        )
        for name, limits in chosen.items()
    }
    overlooked = [name for name in chosen if name not in rows or _is_overlooked(rows[name], now)]
    refused = {which: why for which, rows_ in refusals.items() if (why := _wait_of(rows_, now))}
    return Survey(now, types.known(), targets, servers, rooms, refused, overlooked)


def _is_refusal(now: datetime) -> Q:
    """Return what finds the servers whose creation was refused lately: errors that never had a machine."""
    return Q(failed_as=Status.ERRORED, machine_id="", error_at__gt=now - _REFUSALS_COUNT_FOR)


def refused(type: str, provider: str, *, now: datetime) -> str:
    """Say why no server of a type is made at a provider now, since the last ones were refused; "": it may be."""
    return _wait_of(ledger.servers().filter(_is_refusal(now), type=type, provider=provider), now)


def forget_refusals(*, now: datetime, **which: str) -> int:
    """Have creations that were refused lately keep nobody waiting any more; return how many there were."""
    count: int = ledger.servers().filter(_is_refusal(now), **which).update(version=F("version") + 1, error_at=None)
    return count


def _wait_of(refusals: Iterable[Server], now: datetime) -> str:
    """Say until when nothing is made after these refusals, twice as late after each, and why; "": no longer."""
    said = sorted((server.error_at or now, server.error) for server in refusals)
    if not said:
        return ""
    at, error = said[-1]
    until = at + backoff(len(said), conf.load().poll, MOST_BACKOFF)
    if until <= now:
        return ""
    return f"none of this type is made there until {short(until)}, since it was refused: {error}"


def _closed(row: Provider, now: datetime) -> str:
    """Say why nothing is created at a provider now."""
    if row.trouble:
        return f"it does not answer since {short(row.trouble_since)}: {row.trouble}"
    if row.not_before and row.not_before > now:
        return f"nothing is created there until {short(row.not_before)}, after {row.failures} failure(s)"
    return unseen(row, now)


def _is_overlooked(row: Provider, now: datetime) -> bool:
    """Say whether a look at a provider is overdue, and that is news."""
    return row.trouble_since is None and _is_late(row, now)


def _is_late(row: Provider, now: datetime) -> bool:
    return row.next_look_at is None or now - row.next_look_at >= _LATE


def unseen(row: Provider, now: datetime) -> str:
    """
    Say that nobody looks at a provider, whatever it is that keeps them from it; "" where somebody does, or may soon.

    Whoever plans after all schedulers were down finds each look overdue: he notes it, as trouble that has no name yet,
    and it counts when nobody has looked for a while since.
    """
    if row.trouble or row.trouble_since is None or not _is_late(row, now):
        return ""
    if now - row.trouble_since < LOOKED_AT_WITHIN:
        return ""
    if row.observed_at is None:
        return "nobody has ever looked at it"
    return f"nobody has looked at it since {short(row.observed_at)}"


def left_alone(row: Target | None, now: datetime) -> str:
    """Say why servers of a type that is not registered here are left as they are; "": they may be let go."""
    if row is None or row.registered_at is None or now - row.registered_at >= UNKNOWN_FOR:
        return ""
    seen, until = short(row.registered_at), short(row.registered_at + UNKNOWN_FOR)
    return f"not registered in this version of the project, but in another one at {seen}: left as it is until {until}"


def needs_of(
    type: str, row: Target | None, kind: ServerType | None, wanted: int | None = None, *, now: datetime
) -> Needs:
    """
    Return what is wanted of a type: what was decided, within its bounds.

    Of one that is not registered, nothing; but as long as other versions of the project know it, it is left to them.
    """
    if kind is None:
        left = left_alone(row, now)
        return Needs(type, row.wanted if row and left else 0, (), left_alone=left)
    if wanted is None:
        wanted = row.wanted if row else 0
    most = kind.policy.maximum
    wanted = max(kind.policy.minimum, wanted)
    return Needs(
        type=type,
        wanted=wanted if most is None else min(most, wanted),
        providers=types.providers_of(kind),
        billing_period=kind.billing_period,
        max_age=kind.max_age,
        drains=kind.drain is not None,
        closed=_waits(row, now) if row else "",
    )


def _waits(row: Target, now: datetime) -> str:
    """Say why nothing of a type is made now."""
    if row.not_before is None or row.not_before <= now:
        return ""
    times = "once" if row.failures == 1 else f"{row.failures} times in a row"
    return f"none is made until {short(row.not_before)}, since its servers were up and soon down again, {times}"


def creates_at(provider: str, *, now: datetime) -> bool:
    """Say whether a server would be made there now."""
    found = survey(now)
    return any(create.provider == provider for type in found.types for create in found.plan(type).plan.creates)


def bring_about(*, now: datetime) -> list[Planned]:
    """Plan for every type, and change the rows accordingly; return what was planned where there was something."""
    found = survey(now)
    _note_registered(found)
    _note_overlooked(found)
    done = []
    for type in found.types:
        planned, found = _bring_about(type, found)
        if planned is not None and (planned.plan.creates or planned.plan.cancels or planned.plan.drains):
            done.append(planned)
    return done


def _note_registered(found: Survey) -> None:
    """Write down that the types that are registered here are known; in one statement, once a minute."""
    noted = [row for type, row in found.targets.items() if type in found.kinds]
    stale = [row.type for row in noted if not row.registered_at or found.now - row.registered_at >= _NOTED_EVERY]
    if stale:
        ledger.targets().filter(type__in=stale).update(registered_at=found.now)


def _note_overlooked(found: Survey) -> None:
    """Write down since when it is known that nobody looks at a provider; whoever looks at it ends that."""
    for name in found.overlooked:
        row = ledger.provider(name)
        if _is_overlooked(row, found.now):
            unchanged = ledger.providers().filter(pk=row.pk, trouble="", trouble_since=None)
            unchanged.filter(next_look_at=row.next_look_at).update(trouble_since=found.now)


def _bring_about(type: str, found: Survey) -> tuple[Planned | None, Survey]:
    """Plan for one type until nobody else has planned for it meanwhile; return the survey that holds afterwards."""
    kind = found.kinds.get(type)
    configure = _configuring(kind)
    for _ in range(_TRIES):
        row = found.targets.get(type)
        planned = found.plan(type)
        result = planned.plan
        if planned.needs.left_alone:
            return planned, found
        short_of = result.short.why if result.short else ""
        if not (result.creates or result.cancels or result.drains) and short_of == (row.short_because if row else ""):
            return planned, found
        if row is None:
            row = ledger.target(type)
            if row.version:
                found = survey(found.now)
                continue
        try:
            if ledger.carry_out(row, result, configure, now=found.now):
                return planned, survey(found.now)
        except _NotConfigured as failed:
            # A configuration is a project's own code: what it raises keeps its own type from growing, and nothing else.
            why = f"its configuration cannot be had: {failed}"
            if row.short_because != why:
                logger.error("No server of the type %s can be made: %s\n%s", type, why, failed.trace)
            smaller = replace(result, creates=(), short=Short(type, len(result.creates), why))
            if ledger.carry_out(row, smaller, configure, now=found.now):
                return replace(planned, plan=smaller), survey(found.now)
        found = survey(found.now)
    return None, found


class _NotConfigured(Exception):
    """What a configuration raised, in words without a secret."""

    def __init__(self, error: Exception, kind: ServerType) -> None:
        providers = conf.load().providers
        options = [providers[name].options for name in types.providers_of(kind)]
        super().__init__(told(error, options))
        self.trace = traced(error, options)


def _configuring(kind: ServerType | None) -> Callable[[ServerInfo], dict[str, Any]]:
    """Return what gives a server its configuration, and tells its errors from those of the database."""

    def configure(info: ServerInfo) -> dict[str, Any]:
        if kind is None:
            return {}
        try:
            # What it does wrong with the database ends with it, even if it goes on from there.
            with transaction.atomic(using=ledger.using()):
                return kind.configuration_for(info)
        except Exception as error:
            raise _NotConfigured(error, kind) from None

    return configure

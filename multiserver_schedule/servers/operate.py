"""
What people ask of the fleet, and see of it: the command and the admin call the same functions.

To look never changes anything. To act is one compare-and-set on each server's row, of which the next pass over its
provider takes the step; nothing here calls a provider.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from django.db import DatabaseError, transaction
from django.db.models import Count, F, QuerySet

from multiserver_schedule.database import is_conflict
from multiserver_schedule.declare import discover_errors
from multiserver_schedule.logs import short
from multiserver_schedule.operate import Refused

from . import conf, ledger, planner, types
from .exceptions import FleetError
from .states import BILLED, LEAVING, PROVISIONED, Status

if TYPE_CHECKING:
    from .models import Decision, Server

logger = logging.getLogger("multiserver_schedule.servers")

BATCH: Final = 200
"""Servers that are pruned in one transaction, with all their transitions."""
AT_MOST: Final = 10 * 60.0
"""Seconds that the daily task of our own goes on beginning new batches; the rest is tomorrow's."""
_TRIES: Final = 5


# -- look -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One server, as it stands."""

    name: str
    type: str
    provider: str
    status: str
    since: datetime
    """When it got this status."""
    created_at: datetime
    age: timedelta
    """How old it is, or became."""
    as_of: datetime
    """The database's clock at this look."""
    why: str
    """Why it exists."""
    reason: str
    """Of the last change of its status."""
    jobs: int | None
    """What it still worked on when it was heard of last; None: not known."""
    machine: str
    address: str
    error: str
    """The last one, if any."""
    error_at: datetime | None
    attempts: int
    """Those that failed in this status."""
    next_step_at: datetime | None
    failed_as: str
    """"errored" or "hanging" where it went wrong, while it is cleaned up, too."""
    reboot_requested_at: datetime | None
    running_at: datetime | None
    seen_at: datetime | None
    """When its provider showed it last."""
    missing_since: datetime | None
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True)
class TypeLine:
    """One type: what is wanted of it, what there is, and what was decided last."""

    name: str
    registered: bool
    """Does this version of the project know it?"""
    left_alone: str
    """Why its servers are not let go, although this version does not; "" where they are, or it does."""
    providers: Sequence[str]
    minimum: int
    maximum: int | None
    wanted: int
    """Within these bounds; none of a type that no version of the project knows."""
    why: str
    changed_at: datetime | None
    """When ``wanted`` changed last."""
    running: int
    provisioned: int
    """Running, or on their way to; so is one that is drained for a reboot."""
    leaving: int
    """Draining for good, stopping, being deleted in order."""
    errored: int
    """Errored or hanging: being cleaned up, and perhaps billed."""
    short_since: datetime | None
    short_because: str
    decided_at: datetime | None
    """When it was decided on last; None: not within what is kept."""
    decided_by: str
    decided_why: str
    asked: int | None
    """What the load asked for then."""
    load: dict[str, Any]
    as_of: datetime


@dataclass(frozen=True, slots=True)
class ProviderLine:
    """One provider: what is there, what may be, and how it does."""

    name: str
    configured: bool
    """Is it in the settings of this version of the project?"""
    used: int
    """What counts towards the limit."""
    limit: int | None
    counted: int | None
    """Machines as it counted them itself, last."""
    unknown: int
    """Those that count, and have no row."""
    observed_at: datetime | None
    failures: int
    trouble: str
    trouble_since: datetime | None
    not_before: datetime | None
    """Nothing is created there until then."""
    next_look_at: datetime | None
    orphans: Sequence[dict[str, Any]]
    """Machines that bear our tag and are left alone: without a row, or another provider's servers."""
    as_of: datetime


def servers(type: str | None = None, *, all: bool = False) -> list[Line]:
    """Return the servers, oldest first; those that are deleted only with ``all``. Raises FleetError: no such type."""
    rows = ledger.servers().order_by("type", "pk")
    if not all:
        rows = rows.exclude(status=Status.DELETED)
    if type is not None:
        if not rows.filter(type=type).exists():
            # One that is registered no more may have servers still.
            _type(type)
        rows = rows.filter(type=type)
    now = ledger.now()
    return [_line(row, now) for row in rows]


def type_lines(type: str | None = None) -> list[TypeLine]:
    """Return what is wanted of each type, and what there is; types that are registered no more, too."""
    discover_errors()
    known = types.declared()
    wanted = {row.type: row for row in ledger.targets()}
    counted = ledger.counts_by_type()
    now = ledger.now()
    lines = []
    for name in sorted({*known, *wanted, *counted}):
        if type not in (None, name):
            continue
        registered, target, counts = known.get(name), wanted.get(name), counted.get(name, {})
        last = ledger.last_decision(name)
        lines.append(
            TypeLine(
                name=name,
                registered=registered is not None,
                left_alone="" if registered else planner.left_alone(target, now),
                providers=types.providers_of(registered) if registered else (),
                minimum=registered.policy.minimum if registered else 0,
                maximum=registered.policy.maximum if registered else None,
                wanted=planner.needs_of(name, target, registered, now=now).wanted,
                why=target.why if target else "",
                changed_at=target.changed_at if target else None,
                running=counts.get(Status.RUNNING, 0),
                provisioned=ledger.provisioned(counts),
                leaving=sum(counts.get(status, 0) for status in LEAVING),
                errored=counts.get(Status.ERRORED, 0) + counts.get(Status.HANGING, 0),
                short_since=target.short_since if target else None,
                short_because=target.short_because if target else "",
                decided_at=last.until if last else None,
                decided_by=last.by if last else "",
                decided_why=last.why if last else "",
                asked=last.asked if last else None,
                load=dict(last.load) if last else {},
                as_of=now,
            )
        )
    if type is not None and not lines:
        _type(type)
    return lines


def provider_lines() -> list[ProviderLine]:
    """Return what is at each provider, and how it does; those that are in the settings no more, too."""
    settings = conf.load().providers
    rows = {row.name: row for row in ledger.providers()}
    billed = ledger.servers().filter(status__in=BILLED).order_by().values("provider").annotate(n=Count("pk"))
    used = {row["provider"]: row["n"] for row in billed}
    now = ledger.now()
    lines = []
    for name in sorted({*settings, *rows, *used}):
        row, chosen = rows.get(name), settings.get(name)
        unknown = row.unknown if row else 0
        lines.append(
            ProviderLine(
                name=name,
                configured=chosen is not None,
                used=used.get(name, 0) + unknown,
                limit=chosen.max_servers if chosen else None,
                counted=row.counted if row else None,
                unknown=unknown,
                observed_at=row.observed_at if row else None,
                failures=row.failures if row else 0,
                trouble=row.trouble if row else "",
                trouble_since=row.trouble_since if row and row.trouble else None,
                not_before=row.not_before if row else None,
                next_look_at=row.next_look_at if row else None,
                orphans=list(row.orphans) if row else [],
                as_of=now,
            )
        )
    return lines


def limit_of(provider: str) -> int | None:
    """Return how many machines may be at a provider; None where it is in the settings no more."""
    chosen = conf.load().providers.get(provider)
    return chosen.max_servers if chosen else None


def troubles() -> list[str]:
    """Return what is wrong with providers and types, and which there is no room for: a sentence for each."""
    found = []
    chosen = conf.load().providers
    now = ledger.now()
    for name, names in _stranded(chosen).items():
        found.append(f"{words_of_stranded(name, len(names))} They are: {', '.join(names)}")
    for provider in ledger.providers().filter(name__in=chosen):
        if provider.trouble:
            since = f" since {short(provider.trouble_since)}" if provider.trouble_since else ""
            found.append(f"The provider {provider.name} does not answer{since}: {provider.trouble}")
        elif unseen := planner.unseen(provider, now):
            found.append(
                f"The provider {provider.name}: {unseen}. Its servers stay as they are, new ones are made elsewhere. "
                "Does a server run the schedule that may call it, and is its task neither paused nor failing?"
            )
        if orphans := [each for each in provider.orphans if "server" not in each]:
            ids = ", ".join(str(each.get("id", "")) for each in orphans)
            found.append(f"Machines at {provider.name} bear our tag, have no server, and are left alone: {ids}")
        if others := [each for each in provider.orphans if "server" in each]:
            ids = ", ".join(f"{each.get('id', '')} ({each['server']} at {each.get('provider', '')})" for each in others)
            found.append(
                f"Machines at {provider.name} are servers of another provider, and are left to it. Have an account in "
                f"one entry of PROVIDERS alone: {ids}"
            )
    for target in ledger.targets().exclude(short_because=""):
        since = f" since {short(target.short_since)}" if target.short_since else ""
        found.append(f"Servers of the type {target.type} are missing{since}: {target.short_because}")
    for name, entry in chosen.items():
        if (used := ledger.used_at(name)) > entry.max_servers:
            found.append(
                f"{name}: {used} server{'' if used == 1 else 's'}, {entry.max_servers} allowed. None is made there "
                "until there is room, and none is ended for that: want fewer, or raise its MAX_SERVERS."
            )
    discover_errors()
    found += [f"{each} Until that is mended, nothing is decided for any type." for each in types.troubles()]
    return found


def _stranded(chosen: Collection[str]) -> dict[str, list[str]]:
    """Return the names of the servers of each provider that is in the settings no more."""
    found: dict[str, list[str]] = {}
    rows = ledger.servers().exclude(status__in=(Status.NEW, Status.DELETED)).exclude(provider__in=chosen)
    for provider, name in rows.order_by("provider", "pk").values_list("provider", "name"):
        found.setdefault(provider, []).append(name)
    return found


def words_of_stranded(provider: str, count: int) -> str:
    """
    Say what is to be done about servers of a provider that is in the settings no more.

    They count as they did: their machines may work, and be billed. Were they replaced, a deploy in the midst of which
    half of the schedulers know a provider would make each of its servers twice.
    """
    if count == 1:
        are, so = "1 server is", "nobody ends its machine, and it counts as if it worked"
        close = "the machine is gone, and close its row"
    else:
        are, so = f"{count} servers are", "nobody ends their machines, and they count as if they worked"
        close = "the machines are gone, and close their rows"
    return (
        f"{are} at {provider}, which is in the settings no more: nothing can be asked of it, so {so}. Put it back, "
        f"under whichever name; or see yourself that {close} by `manage.py servers delete`."
    )


def _line(row: Server, now: datetime) -> Line:
    return Line(
        name=row.name,
        type=row.type,
        provider=row.provider,
        status=str(row.status),
        since=row.status_changed_at,
        created_at=row.created_at,
        age=(row.deleted_at or now) - row.created_at,
        as_of=now,
        why=row.why,
        reason=row.reason,
        jobs=row.jobs,
        machine=row.machine_id,
        address=row.address,
        error=row.error,
        error_at=row.error_at,
        attempts=row.attempts,
        next_step_at=row.next_step_at,
        failed_as=row.failed_as,
        reboot_requested_at=row.reboot_requested_at,
        running_at=row.running_at,
        seen_at=row.seen_at,
        missing_since=row.missing_since,
        deleted_at=row.deleted_at,
    )


def _type(name: str) -> types.ServerType:
    discover_errors()
    if name not in (known := types.declared()):
        raise FleetError(f"No server type is named {name!r}.{conf.nearest(name, known)}")
    return known[name]


# -- act --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """What was done to one server, provider or type, or why it was not."""

    name: str
    status: str
    """Of the server, after it."""
    said: str
    """What happens now, or why nothing does: a sentence."""
    done: bool


def makes_sense(verb: str, server: Server) -> bool:
    """May this be done to this server, as it stands?"""
    status = server.status
    if verb != "retire" and _is_stranded(server):
        return False
    if verb == "drain":
        return status == Status.RUNNING or _comes_back(server)
    if verb == "reboot":
        return status in _REBOOTED
    return status in _RETIRED if verb == "retire" else status not in (Status.RUNNING, Status.DELETED)


def with_drain(servers: Iterable[Server]) -> list[str]:
    """Return the names of those whose work ends before they are stopped or rebooted, if they are asked to."""
    discover_errors()
    return [server.name for server in servers if _has_drain(server.type)]


def _has_drain(type: str) -> bool:
    kind = types.declared().get(type)
    return kind is not None and kind.drain is not None


_Deed = Callable[["Server", datetime], Done]


def drain(names: Iterable[str], by: str) -> list[Done]:
    """
    Have running servers take no more work, end what they do, and be deleted. Raises Refused: no such server.

    Where their type has no drain, nothing lets their work end: they are stopped at the next look.
    """

    def one(server: Server, now: datetime) -> Done:
        if _is_stranded(server):
            return _left(server)
        if server.status == Status.RUNNING:
            return _moved(server, Status.DRAINING, "drained by hand", _ends_its_work(server, now), now=now, by=by)
        if _comes_back(server):
            # What it was told already holds; it is its reboot that is taken back.
            said, reason = _ends_its_work(server, now), f"drained by hand, by {by}: it is not rebooted any more"
            return _changed(server, f"it is not rebooted any more: {said}", reason=reason, reboot_requested_at=None)
        instead = {
            Status.NEW: "it has not been begun: delete it instead",
            Status.STARTING: "it does no work yet: delete it instead",
            Status.REBOOTING: "it reboots: wait until it runs, or delete it instead",
        }
        return _refused(server, instead)

    return _each(names, one)


def reboot(names: Iterable[str], by: str) -> list[Done]:
    """Reboot servers: those that start or reboot now, once they are up. Raises Refused: no such server."""

    def one(server: Server, now: datetime) -> Done:
        if _is_stranded(server):
            return _left(server)
        if _comes_back(server):
            said = "a reboot was asked for already: it comes when it has ended what it does"
            return Done(server.name, server.status, said, False)
        if server.status not in _REBOOTED:
            return _refused(server, {Status.NEW: "it has not been begun, and so has nothing to reboot"})
        if server.reboot_requested_at:
            return Done(server.name, server.status, "a reboot was asked for already", False)
        if server.status == Status.RUNNING:
            said = f"it is rebooted at the next look at {server.provider}"
            if _has_drain(server.type):
                said = (
                    f"it takes no more work from the next look at {server.provider} on, and is rebooted when it has "
                    "ended what it does"
                )
            return _changed(server, said, reason=reason, reboot_requested_at=now, next_step_at=now)
        return _changed(server, "it is rebooted once it is up", reason=reason, reboot_requested_at=now)

    reason = f"a reboot was asked for, by {by}"

    return _each(names, one)


def retire(names: Iterable[str], by: str) -> list[Done]:
    """
    Have servers deleted at their provider, whatever they still do. Raises Refused: no such server.

    Of a provider that is in the settings no more, nothing can be asked: there the row alone is closed.
    """
    chosen = conf.load().providers

    def one(server: Server, now: datetime) -> Done:
        if server.provider not in chosen and server.status in BILLED:
            said = (
                f"its row is closed; {server.provider} is in the settings no more, so see yourself that its machine "
                f"{server.machine_id or '(of the key ' + server.key + ')'} is gone; {_replaced(server, now)}"
            )
            reason = f"closed by hand, since {server.provider} is in the settings no more"
            return _moved(server, Status.DELETED, reason, said, now=now, by=by)
        to = _RETIRED.get(Status(server.status))
        if to is None:
            return _refused(server, {})
        if to is Status.DELETED:
            said = "it was not begun, and never will be"
        else:
            doing = "stopped and deleted" if to is Status.STOPPING else "deleted"
            said = f"its machine is {doing} from the next look at {server.provider} on"
        said = f"{said}; {_replaced(server, now)}"
        return _moved(server, to, "deleted by hand", said, now=now, by=by, reboot_requested_at=None)

    return _each(names, one)


_REBOOTED: Final = (Status.STARTING, Status.RUNNING, Status.REBOOTING)
_RETIRED: Final = {
    Status.NEW: Status.DELETED,
    Status.STARTING: Status.STOPPING,
    Status.REBOOTING: Status.STOPPING,
    Status.RUNNING: Status.STOPPING,
    Status.DRAINING: Status.STOPPING,
    Status.ERRORED: Status.DELETING,
    Status.HANGING: Status.DELETING,
}


def retry(names: Iterable[str], by: str) -> list[Done]:
    """Try the next step of servers now, as if none had failed. Raises Refused: no such server."""
    looked_at: set[str] = set()

    def one(server: Server, now: datetime) -> Done:
        if server.status in (Status.RUNNING, Status.DELETED):
            return Done(server.name, server.status, f"it is {server.status}: there is no step to take", False)
        if _is_stranded(server):
            return _left(server)
        done = _changed(
            server, f"its next step is tried at the next look at {server.provider}", next_step_at=now, attempts=0
        )
        if done.done:
            logger.info("The next step of %s (%s) is tried again, as %s asked for.", server.name, server.status, by)
            looked_at.add(server.provider)
        return done

    done = _each(names, one)
    ledger.providers().filter(name__in=looked_at).update(version=F("version") + 1, not_before=None, next_look_at=None)
    return done


def retry_provider(name: str, by: str) -> list[Done]:
    """
    Call a provider at the next look, as if nothing had failed or been refused there, and begin what waits for it.

    Raises FleetError where there is no such provider.
    """
    conf.provider(name)
    row, now = ledger.providers().filter(name=name).first(), ledger.now()
    # Of these nothing was asked there, so that no call can be under way.
    waiting = ledger.servers().filter(provider=name, status=Status.NEW, next_step_at__gt=now)
    moments = [row.not_before, row.next_look_at] if row else []
    forgotten = planner.forget_refusals(now=now, provider=name)
    if not forgotten and not waiting.exists() and not any(moment and moment > now for moment in moments):
        return [Done(name, "", "nothing waits for it: it is called whenever there is something to do", False)]
    waiting.update(version=F("version") + 1, next_step_at=now, attempts=0)
    ledger.providers().filter(name=name).update(
        version=F("version") + 1, not_before=None, next_look_at=None, failures=0
    )
    logger.info("The provider %s is called again at once, as %s asked for.", name, by)
    return [Done(name, "", "it is called at the next look, and what waits for it is begun", True)]


def retry_type(name: str, by: str) -> list[Done]:
    """
    Let servers of a type be made again at the next look, although its last ones were refused, or were soon down again.

    Raises FleetError where there is no such type.
    """
    _type(name)
    row, now = ledger.targets().filter(type=name).first(), ledger.now()
    forgotten = planner.forget_refusals(now=now, type=name)
    if not forgotten and (row is None or row.not_before is None or row.not_before <= now):
        return [Done(name, "", "it does not wait: its servers are made whenever they are wanted", False)]
    # The version, too: who plans from the row as it was would leave it waiting.
    ledger.targets().filter(type=name).update(version=F("version") + 1, not_before=None, failures=0)
    logger.info("Servers of the type %s are made again at once, as %s asked for.", name, by)
    return [Done(name, "", "its servers are made again from the next look on", True)]


def _each(names: Iterable[str], deed: _Deed) -> list[Done]:
    discover_errors()
    names = list(dict.fromkeys(names))
    rows = {row.name: row for row in ledger.servers().filter(name__in=names)}
    unknown = [name for name in names if name not in rows]
    if unknown:
        live = ledger.servers().exclude(status=Status.DELETED).values_list("name", flat=True)
        raise Refused(f"No server is named {unknown[0]!r}. Nothing was done.{conf.nearest(unknown[0], live)}")
    now = ledger.now()
    return [deed(rows[name], now) for name in names]


def _moved(server: Server, to: Status, reason: str, said: str, *, now: datetime, by: str, **values: Any) -> Done:
    if ledger.move(server, to, f"{reason}, by {by}", now=now, by=by, **values):
        return Done(server.name, server.status, said, True)
    return _overtaken(server)


def _changed(server: Server, said: str, **values: Any) -> Done:
    if ledger.change(server, **values):
        return Done(server.name, server.status, said, True)
    return _overtaken(server)


def _overtaken(server: Server) -> Done:
    status = ledger.servers().filter(pk=server.pk).values_list("status", flat=True).first()
    said = f"it was changed meanwhile, and is {status} now; look, and ask again"
    return Done(server.name, status or Status.DELETED, said, False)


def _comes_back(server: Server) -> bool:
    """Is it drained for a reboot, and not to go?"""
    return server.status == Status.DRAINING and server.reboot_requested_at is not None


def _is_stranded(server: Server) -> bool:
    """Is its provider in the settings no more, so that nobody will take its next step?"""
    return server.status != Status.DELETED and server.provider not in conf.load().providers


def _left(server: Server) -> Done:
    """Say why nothing can be done to it."""
    if server.status != Status.NEW:
        return Done(server.name, server.status, words_of_stranded(server.provider, 1), False)
    said = f"it has not been begun, and {server.provider} is in the settings no more: delete it instead"
    return Done(server.name, server.status, said, False)


def _refused(server: Server, instead: dict[Status, str]) -> Done:
    status = Status(server.status)
    said = instead.get(status)
    if said is None:
        on_its_way = {
            Status.ERRORED: "it went wrong, and is cleaned up",
            Status.HANGING: "it was not heard of in time, and is cleaned up",
            Status.DELETED: "it is deleted already",
        }
        said = on_its_way.get(status, f"it is {status} already, and on its way out")
    return Done(server.name, status, said, False)


def _ends_its_work(server: Server, now: datetime) -> str:
    if _has_drain(server.type):
        return f"it takes no more work, and is deleted when it has ended what it does; {_replaced(server, now)}"
    return (
        f"the type {server.type} has no drain: it is stopped and deleted from the next look at {server.provider} on, "
        f"and what it does is broken off; {_replaced(server, now)}"
    )


def _replaced(server: Server, now: datetime) -> str:
    """Say whether another one is made in its place: to let one go changes nothing about how many are wanted."""
    target = ledger.targets().filter(type=server.type).first()
    wanted = planner.needs_of(server.type, target, types.declared().get(server.type), now=now).wanted
    left = ledger.provisioned(ledger.counts(server.type)) - (server.status in PROVISIONED or _comes_back(server))
    if wanted <= left:
        return f"none is made in its place, since {wanted} of its type are wanted, and {left} are left"
    return (
        f"another one is made in its place, since {wanted} of its type are wanted as before: to have fewer, ask for "
        "fewer"
    )


# -- tidy up ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pruned:
    """What was forgotten, or would be."""

    servers: int = 0
    """Those that had been deleted for longer than PRUNE_DAYS, with all their transitions."""
    decisions: int = 0
    complete: bool = True
    """Was everything forgotten that could be, or was it told to stop before?"""
    before: datetime | None = field(default=None)
    """What is older than this went."""


def prune(
    *,
    days: int | None = None,
    dry_run: bool = False,
    now: datetime | None = None,
    batch: int = BATCH,
    at_most: float | None = None,
) -> Pruned:
    """
    Forget servers that have been ``deleted`` for more than PRUNE_DAYS days, and decisions that are older; 0: all such.

    A server of any other status stays, however old it is: its machine may be there. So does the last decision on each
    type: it says why there are as many as there are. ``at_most`` is for how many seconds batches are begun.
    """
    days = conf.load().prune_days if days is None else days
    limit = (now or ledger.now()) - timedelta(days=days)
    until = None if at_most is None else time.monotonic() + at_most
    done = Pruned(before=limit)
    newest = _newest_decisions()

    def gone() -> QuerySet[Server]:
        rows: QuerySet[Server] = ledger.servers().filter(status=Status.DELETED, deleted_at__lt=limit)
        return rows

    def past() -> QuerySet[Decision]:
        rows: QuerySet[Decision] = ledger.decisions().filter(until__lt=limit).exclude(pk__in=newest)
        return rows

    if dry_run:
        done.servers, done.decisions = gone().count(), past().count()
        return done
    for rows, what in ((gone, "servers"), (past, "decisions")):
        while True:
            if until is not None and time.monotonic() > until:
                done.complete = False
                return done
            forgotten = _forget(rows, batch)
            setattr(done, what, getattr(done, what) + forgotten)
            if forgotten < batch:
                break
    return done


def _newest_decisions() -> list[int]:
    """Return the keys of the last decisions on each type."""
    types_ = ledger.decisions().order_by().values_list("type", flat=True).distinct()
    return [last.pk for type in types_ if (last := ledger.last_decision(type))]


def housekeep() -> None:
    """Prune as the settings say, and print what was done: what the task of our own runs."""
    print(summary(prune(at_most=AT_MOST)))


def summary(done: Pruned, *, dry_run: bool = False) -> str:
    """Say in a line what was forgotten, or would be."""
    servers_ = f"{done.servers} deleted server{'' if done.servers == 1 else 's'}"
    decisions = f"{done.decisions} decision{'' if done.decisions == 1 else 's'}"
    more = "" if done.complete else "; there is more, for the next time"
    return f"{'would forget' if dry_run else 'forgot'} {servers_} and {decisions}{more}"


def _forget(rows: Callable[[], QuerySet[Any]], batch: int) -> int:
    """Delete a batch of rows, and what hangs on them; return how many there were."""
    for tried in range(1, _TRIES + 1):
        try:
            with transaction.atomic(using=ledger.using()):
                # Held until they are gone: the machine of a deleted server may turn up, which is then deleted again.
                pks = list(rows().select_for_update().order_by("pk").values_list("pk", flat=True)[:batch])
                rows().filter(pk__in=pks).delete()
                return len(pks)
        except DatabaseError as error:
            if tried == _TRIES or not is_conflict(error):
                raise
            time.sleep(0.05 * 2**tried)
    raise AssertionError("unreachable")

"""
What does the provider really have, and how does that compare with our rows?

Each machine is somebody's, by its id or by its key, or an orphan. Two entries of the settings may show the same
machines, and an entry may get another name: a machine whose server is at another provider is that server's, and no
orphan. From a list nothing is concluded that it may be wrong in: a machine that is not in it is missing first, and its
row is given up after the provider was asked for it by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as NotInTime
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from multiserver_schedule.faults import point
from multiserver_schedule.logs import short

from . import conf, ledger, signals
from .entries import Machine, MachineState
from .states import BILLED, Status
from .visit import Visit

if TYPE_CHECKING:
    from .models import Provider, Server

logger = logging.getLogger("multiserver_schedule.servers")

LOOK_EVERY: Final = timedelta(minutes=1)
"""How often a provider is looked at while nothing is on its way there."""
GONE_AFTER: Final = timedelta(seconds=30)
"""For how long a machine has to be missing before its row is given up: lists lag behind."""

_MISSED: Final = (Status.STARTING, Status.RUNNING, Status.REBOOTING, Status.DRAINING)
"""Their machine should be there."""


def look(visit: Visit, row: Provider) -> None:
    """Compare what the provider has with our rows."""
    asked_at = visit.clock()
    future = visit.calls.submit(lambda provider: (provider.list_servers(), provider.current_server_count()))
    try:
        machines, counted = future.result(visit.patience)
    except NotInTime:
        visit.silent(row)
        return
    except Exception as error:
        visit.away(row, visit.told(error))
        return
    point("servers_looked")
    now = visit.clock()
    # The rows after the machines, since each row is there before its machine is.
    servers = list(ledger.servers().filter(provider=visit.name).exclude(status=Status.DELETED))
    seen, strangers = _matched(machines, servers)
    elsewhere = _elsewhere(visit, strangers)
    for moved, its in _moved_here(visit, strangers, elsewhere):
        servers.append(moved)
        seen[moved.pk] = its
        strangers.remove(its)
    left_alone, adopted = _orphans(visit, row, strangers, elsewhere, now)
    billed = sum(1 for server in servers if server.pk in seen and server.status in BILLED)
    unknown = max(0, counted - billed - adopted)
    _answered(visit, row, counted=counted, unknown=unknown, orphans=left_alone, now=now)
    for server in servers:
        machine = seen.get(server.pk)
        if machine is None:
            _not_seen(visit, server, asked_at, now)
        else:
            _seen(visit, server, machine, now)


def _matched(machines: Iterable[Machine], servers: Sequence[Server]) -> tuple[dict[int, Machine], list[Machine]]:
    """Return each server's machine, by the row's key, and the machines that are nobody's."""
    by_machine = {server.machine_id: server for server in servers if server.machine_id}
    by_key = {server.key: server for server in servers}
    seen: dict[int, Machine] = {}
    strangers: list[Machine] = []
    for machine in machines:
        server = by_machine.get(machine.id) or by_key.get(machine.key)
        if server is not None and (seen.get(server.pk) is None and server.machine_id in ("", machine.id)):
            seen[server.pk] = machine
        else:
            strangers.append(machine)
    return seen, strangers


def _answered(
    visit: Visit, row: Provider, *, counted: int, unknown: int, orphans: list[dict[str, Any]], now: datetime
) -> None:
    """Note on the provider's row what it has, and that it answers."""
    if row.trouble:
        since = f" since {short(row.trouble_since)}" if row.trouble_since else ""
        logger.warning("The provider %s answers again; it did not%s.", visit.name, since)
    ledger.providers().filter(pk=row.pk).update(
        counted=counted,
        unknown=unknown,
        orphans=orphans,
        observed_at=now,
        next_look_at=now + LOOK_EVERY,
        trouble="",
        trouble_since=None,
        **({"failures": 0, "not_before": None} if row.trouble else {}),
    )


# -- a server ---------------------------------------------------------------------------------------------------------


def _seen(visit: Visit, server: Server, machine: Machine, now: datetime) -> None:
    """Note that a server's machine was seen, or has stopped by itself."""
    has_stopped = machine.state is MachineState.STOPPED
    if server.status == Status.NEW:
        return
    if has_stopped and visit.is_young(server, now):
        visit.died_young(server, Status.ERRORED, f"its machine has stopped by itself ({machine.word})")
    elif server.status == Status.RUNNING and has_stopped:
        visit.move(server, Status.STOPPING, f"its machine has stopped by itself ({machine.word})", called_at=now)
    elif server.status == Status.STARTING and has_stopped:
        visit.setback()
        reason = f"its machine stopped before it was up ({machine.word})"
        visit.move(server, Status.ERRORED, reason, machine_id=machine.id, unanswered_at=None, error=reason)
    elif server.status == Status.REBOOTING and has_stopped and _should_be_up_again(visit, server, now):
        visit.move(
            server, Status.STOPPING, f"its machine has stopped during its reboot ({machine.word})", called_at=now
        )
    elif server.status == Status.DRAINING and has_stopped:
        # Whoever would say that it works no more cannot: it is down.
        visit.drained(server, f"its machine has stopped ({machine.word})", jobs=0)
    else:
        _note(server, machine, now)


def _should_be_up_again(visit: Visit, server: Server, now: datetime) -> bool:
    """Say whether a machine that is down is not so just for the moment in which it reboots."""
    return server.called_at is not None and now - server.called_at >= 6 * visit.settings.poll


def _note(server: Server, machine: Machine, now: datetime) -> None:
    """Write down what is news of a server's machine, and now and then that it was seen."""
    new: dict[str, Any] = {}
    if not server.machine_id:
        new = {"machine_id": machine.id, "unanswered_at": None, "next_step_at": now}
        if server.status == Status.STARTING:
            new["called_at"] = now
    if machine.address and machine.address != server.address:
        new["address"] = machine.address
    if server.missing_since:
        new["missing_since"] = None
    if new or server.seen_at is None or now - server.seen_at >= LOOK_EVERY:
        ledger.change(server, seen_at=now, **new)


def _not_seen(visit: Visit, server: Server, asked_at: datetime, now: datetime) -> None:
    """Note that a server's machine is missing, and make its next step due when it is for long."""
    if not server.machine_id or server.status not in _MISSED:
        return
    if server.missing_since is None:
        ledger.change(server, missing_since=asked_at)
    elif is_missing(visit, server, now):
        ledger.change(server, next_step_at=now)


def is_missing(visit: Visit, server: Server, now: datetime) -> bool:
    """Say whether a server's machine was not seen for so long that it has to be asked for by its name."""
    if server.status not in _MISSED or server.missing_since is None:
        return False
    made_at = server.called_at or server.asked_at
    if server.status == Status.STARTING and made_at is not None and now - made_at < visit.sample.settles:
        # It need not be shown yet, and who is asked for it by name may look into the same list.
        return False
    return now - server.missing_since >= GONE_AFTER


# -- servers of other providers ---------------------------------------------------------------------------------------


def _moved_here(
    visit: Visit, strangers: Iterable[Machine], elsewhere: Mapping[str, Server]
) -> list[tuple[Server, Machine]]:
    """
    Take over the servers of a provider that is in the settings no more, and whose machines are shown here.

    So a provider may be given another name, and an account be put under another one: nothing is ended or made by it.
    """
    chosen = conf.load().providers
    moved = []
    for machine in strangers:
        server = elsewhere.get(machine.key)
        if server is None or server.provider in chosen or server.machine_id not in ("", machine.id):
            continue
        before = server.provider
        if ledger.change(server, provider=visit.name):
            said = f"{server.name}: {before}, where it was made, is in the settings no more; its machine is here"
            logger.warning("%s at %s, and so is the server from now on.", said, visit.name)
            visit.report.steps.append(said)
            moved.append((server, machine))
    return moved


def _elsewhere(visit: Visit, strangers: Iterable[Machine]) -> dict[str, Server]:
    """Return the servers of other providers that these machines are, by key."""
    keys = [machine.key for machine in strangers if machine.key]
    if not keys:
        return {}
    rows = ledger.servers().filter(key__in=keys).exclude(provider=visit.name).exclude(status=Status.DELETED)
    return {server.key: server for server in rows}


def _left_to(server: Server, machine: Machine, now: datetime) -> dict[str, Any]:
    """Return what is kept of a machine that is here, and is a server's of another provider."""
    logger.warning(
        "%s is shown by another provider than %s, whose server %s it is, and is left to that one. "
        "Do two entries of PROVIDERS have one account?",
        *(machine.id, server.provider, server.name),
    )
    return {
        **{"id": machine.id, "name": machine.name, "since": now.isoformat()},
        **{"server": server.name, "provider": server.provider},
    }


# -- orphans ----------------------------------------------------------------------------------------------------------


def _orphans(
    visit: Visit, row: Provider, machines: Sequence[Machine], elsewhere: Mapping[str, Server], now: datetime
) -> tuple[list[dict[str, Any]], int]:
    """Deal with machines that no server of here has; return those left alone, and how many have a row now."""
    left: list[dict[str, Any]] = []
    adopted = 0
    known = {each["id"]: each for each in row.orphans}
    for machine in machines:
        if machine.state is MachineState.DELETING:
            continue
        server, before = elsewhere.get(machine.key), known.get(machine.id, {})
        if server is not None:
            left.append(before if before.get("server") == server.name else _left_to(server, machine, now))
        elif visit.settings.orphans == "report":
            left.append(before if before and "server" not in before else _reported(visit, machine, now))
        else:
            adopted += _has_row_now(visit, machine, now)
    return left, adopted


def _reported(visit: Visit, machine: Machine, now: datetime) -> dict[str, Any]:
    """Tell of an orphan that is left alone, and return what is kept of it."""
    reason = f"{machine.id} at {visit.name} bears our tag and has no row; it is left alone"
    signals.orphan_found.send_robust(ledger.servers().model, server=None, previous="", reason=reason)
    return {"id": machine.id, "name": machine.name, "since": now.isoformat()}


def _has_row_now(visit: Visit, machine: Machine, now: datetime) -> bool:
    """Give an orphan a row that leads to its end, the one that it had or another one, and say whether it has one."""
    deleted = ledger.servers().filter(status=Status.DELETED, key=machine.key).first()
    if deleted is None or deleted.machine_id not in ("", machine.id):
        return _adopt(visit, machine, now)
    if deleted.deleted_at and now - deleted.deleted_at < GONE_AFTER:
        return False  # a list that lags behind
    reason = "its machine turned up after all"
    # Here it can be ended, whichever provider's it was.
    more = {"machine_id": machine.id, "deleted_at": None, "failed_as": Status.ERRORED.value, "provider": visit.name}
    if visit.move(deleted, Status.DELETING, reason, **more):
        previous = str(Status.DELETED)
        signals.orphan_found.send_robust(type(deleted), server=deleted, previous=previous, reason=reason)
    return True


def _adopt(visit: Visit, machine: Machine, now: datetime) -> bool:
    reason = f"{machine.id} at {visit.name} bears our tag and had no row"
    kind = _type_of(machine, visit.types)
    status = Status.DRAINING if kind in visit.types and visit.types[kind].drain else Status.STOPPING
    if not ledger.adopt(machine, visit.name, kind, status, reason, now=now):
        return False
    visit.report.steps.append(f"{machine.id}: {reason}")
    point("servers_adopted")
    return True


def _type_of(machine: Machine, types: Mapping[str, Any]) -> str:
    """Return the type that a machine's name says; none where it says another one, however alike: its drain differs."""
    kind, _, key = machine.name.rpartition("-")
    return kind if kind in types and re.fullmatch("[0-9a-f]+", key) else ""

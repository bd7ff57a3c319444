"""
Who may take the next step with a server? Every change of a row, by compare-and-set on its ``version``.

A change that was told False to did not happen: somebody else was first, and whoever asked starts again from the row.
Nothing here calls a provider.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from django.apps import apps
from django.db import IntegrityError, models, router, transaction
from django.db.models import Case, Count, F, Q, Value, When

from multiserver_schedule import conf as schedule_conf
from multiserver_schedule.database import clock_of

from . import signals
from .demand import Standing
from .entries import Machine, ServerInfo
from .plan import Plan
from .states import BILLED, PROVISIONED, TRANSITIONS, Status

if TYPE_CHECKING:
    from .models import Decision, Provider, Server, Target, Transition

COMES_BACK: Final = Q(status=Status.DRAINING, reboot_requested_at__isnull=False)
"""A server that is drained to be rebooted, and not to go."""
_LABEL: Final = "multiserver_schedule_servers"
_HOST: Final = re.compile("[a-z0-9](?:[a-z0-9-]{0,98}[a-z0-9])?")
_TRIES: Final = 20
_MERGED_WITHIN: Final = timedelta(minutes=5)
"""A decision that is older is not continued by an equal one: what was between them is not known."""
_SIGNALS: Final = {
    Status.STARTING: signals.creating_server,
    Status.RUNNING: signals.server_running,
    Status.REBOOTING: signals.rebooting_server,
    Status.DRAINING: signals.draining_server,
    Status.STOPPING: signals.stopping_server,
    Status.STOPPED: signals.server_stopped,
    Status.DELETING: signals.deleting_server,
    Status.DELETED: signals.server_deleted,
    Status.ERRORED: signals.server_errored,
    Status.HANGING: signals.server_hanging,
}


class NoRoom(Exception):
    """The provider's limit is reached."""

    def __init__(self, used: int, limit: int) -> None:
        super().__init__(f"{used} of {limit} machines are there")
        self.used, self.limit = used, limit


# The models are asked for when they are needed, so that a schedule.py or an AppConfig may import the fleet.


def servers() -> models.QuerySet[Server]:
    """Return the rows of all servers."""
    rows: models.QuerySet[Server] = _rows("Server")
    return rows


def targets() -> models.QuerySet[Target]:
    """Return what is wanted of each type."""
    rows: models.QuerySet[Target] = _rows("Target")
    return rows


def providers() -> models.QuerySet[Provider]:
    """Return how each provider does."""
    rows: models.QuerySet[Provider] = _rows("Provider")
    return rows


def decisions() -> models.QuerySet[Decision]:
    """Return what was decided."""
    rows: models.QuerySet[Decision] = _rows("Decision")
    return rows


def transitions() -> models.QuerySet[Transition]:
    """Return what became of servers."""
    rows: models.QuerySet[Transition] = _rows("Transition")
    return rows


def _rows(name: str) -> Any:
    model = apps.get_model(_LABEL, name)
    return model._default_manager.using(router.db_for_write(model))


def using() -> str:
    """Return the alias of the database that holds the rows."""
    alias: str = router.db_for_write(apps.get_model(_LABEL, "Server"))
    return alias


def now() -> datetime:
    """Return the time by the database's clock."""
    return clock_of(targets())


def who() -> str:
    """Return the name of this server, the one that takes the step."""
    return schedule_conf.load().server_name


# -- one server -------------------------------------------------------------------------------------------------------


def change(server: Server, **values: Any) -> bool:
    """Change a row without a change of its status, if nobody has changed it since it was read."""
    hit = servers().filter(pk=server.pk, version=server.version).update(version=server.version + 1, **values)
    if hit:
        server.version += 1
        for name, value in values.items():
            setattr(server, name, value)
    return bool(hit)


def move(server: Server, to: Status, reason: str, *, now: datetime, by: str = "", **values: Any) -> bool:
    """
    Give a server another status, if nobody has changed it since it was read; tell of it after the commit.

    The new status begins with no call made and its next step due at once (RUNNING and DELETED have none), unless
    ``values`` say otherwise. Raises ValueError for a change that ``states.TRANSITIONS`` does not have.
    """
    previous = Status(server.status)
    if to not in TRANSITIONS[previous]:
        raise ValueError(f"The server {server.name} is {previous}, which does not become {to}.")
    rests = to in (Status.RUNNING, Status.DELETED)
    first: dict[str, Any] = {
        "status": to.value,
        "status_changed_at": now,
        "reason": reason,
        "called_at": None,
        "attempts": 0,
        "next_step_at": None if rests else now,
    }
    if to in (Status.ERRORED, Status.HANGING):
        first["failed_as"] = to.value
    if to not in PROVISIONED:
        # Nor does it come back: who wants that says so.
        first["reboot_requested_at"] = None
    if to is Status.RUNNING:
        # What it did before a reboot has ended.
        first["jobs"] = None
    elif to is Status.DELETED:
        first["deleted_at"] = now
        first["missing_since"] = None
    with transaction.atomic(using=using()):
        if not change(server, **{**first, **values}):
            return False
        _note(server, previous, reason, now=now, by=by)
    return True


def _note(server: Server, previous: Status | str, reason: str, *, now: datetime, by: str) -> None:
    status = Status(server.status)
    transitions().create(
        server=server, previous=str(previous), status=status.value, at=now, by=(by or who())[:150], reason=reason
    )
    if status in _SIGNALS:
        send = partial(_SIGNALS[status].send_robust, type(server), server=server, previous=str(previous), reason=reason)
        transaction.on_commit(send, using=using())


def take_place(server: Server, *, limit: int, reason: str, now: datetime, **values: Any) -> bool:
    """
    Make a ``new`` server ``starting``, if there is room for its machine; False when somebody else was first.

    Whoever takes a place changes the provider's row first, and so waits for others that do: the limit is exact.
    Raises NoRoom.
    """
    with transaction.atomic(using=using()):
        providers().filter(name=server.provider).update(version=F("version") + 1)
        used = used_at(server.provider)
        if used >= limit:
            raise NoRoom(used, limit)
        return move(server, Status.STARTING, reason, now=now, **values)


def used_at(provider: str) -> int:
    """Return how many machines count towards a provider's limit: those of our rows, and those without a row."""
    ours: int = servers().filter(provider=provider, status__in=BILLED).count()
    row = providers().filter(name=provider).first()
    return ours + (row.unknown if row else 0)


def counts(type: str | None = None) -> dict[str, int]:
    """
    Return how many servers, of one type or of all, have each status; those that are deleted are left out.

    One that is drained to be rebooted counts as rebooting: it comes back.
    """
    rows = _counted() if type is None else _counted().filter(type=type)
    return {row["stands"]: row["n"] for row in rows}


def counts_by_type() -> dict[str, dict[str, int]]:
    """Return the same of each type of which there are servers, in one statement."""
    found: dict[str, dict[str, int]] = {}
    for row in _counted("type"):
        found.setdefault(row["type"], {})[row["stands"]] = row["n"]
    return found


def _counted(*by: str) -> models.QuerySet[Any, dict[str, Any]]:
    stands = Case(When(COMES_BACK, then=Value(Status.REBOOTING.value)), default=F("status"))
    rows = servers().exclude(status=Status.DELETED).order_by()
    counted: models.QuerySet[Any, dict[str, Any]] = rows.values(*by, stands=stands).annotate(n=Count("pk"))
    return counted


def provisioned(counted: Mapping[str, int]) -> int:
    """Return how many of them do their work, or are on their way to."""
    return sum(counted.get(status, 0) for status in PROVISIONED)


def create(type: str, provider: str, why: str, configure: Callable[[ServerInfo], Any], *, now: datetime) -> Server:
    """Make the row of a new server; ``configure`` returns its configuration. Nothing is asked of the provider yet."""
    key = secrets.token_hex(6)
    info = ServerInfo(name=f"{type}-{key}", key=key, type=type, provider=provider)
    server = servers().create(
        name=info.name,
        key=key,
        type=type,
        provider=provider,
        configuration=configure(info),
        status=Status.NEW.value,
        status_changed_at=now,
        created_at=now,
        next_step_at=now,
        why=why,
        reason=why,
    )
    _note(server, "", why, now=now, by="")
    return server


def adopt(machine: Machine, provider: str, type: str, status: Status, reason: str, *, now: datetime) -> Server | None:
    """
    Make the row of a machine that has none, in a status that leads to its end; None when it has one by now.

    It gets the machine's name, where that is free: by it, a drain finds the worker.
    """
    key = machine.key if machine.key and not servers().filter(key=machine.key).exists() else secrets.token_hex(6)
    fits = _HOST.fullmatch(machine.name) and not servers().filter(name=machine.name).exists()
    try:
        with transaction.atomic(using=using()):
            server = servers().create(
                name=machine.name if fits else f"orphan-{key}",
                key=key,
                type=type,
                provider=provider,
                status=status.value,
                status_changed_at=now,
                created_at=now,
                asked_at=now,
                next_step_at=now,
                why=reason,
                reason=reason,
                machine_id=machine.id,
                address=machine.address,
                seen_at=now,
            )
            _note(server, "", reason, now=now, by="")
    except IntegrityError:
        return None
    signals.orphan_found.send_robust(servers().model, server=server, previous="", reason=reason)
    return server


# -- what is wanted ---------------------------------------------------------------------------------------------------


def target(type: str) -> Target:
    """Return what is wanted of a type; none, as long as nobody has said."""
    return targets().get_or_create(type=type)[0]


def want(type: str, count: Callable[[int], int], why: str, *, now: datetime) -> int:
    """Set what is wanted of a type, from what was until then, and return it: an order, and so not damped."""
    for _ in range(_TRIES):
        row = target(type)
        wanted = max(0, count(row.wanted))
        hit = (
            targets()
            .filter(pk=row.pk, version=row.version)
            .update(version=row.version + 1, **_as_values(Standing(wanted)), **_changed(row, wanted, why, now))
        )
        if hit:
            return wanted
    raise RuntimeError(f"What is wanted of the type {type!r} was changed {_TRIES} times by others meanwhile.")


def set_back(row: Target, failures: int, not_before: datetime) -> bool:
    """Let a type wait before another server of it is made, if nobody has changed its row since it was read."""
    hit = targets().filter(pk=row.pk, failures=row.failures, not_before=row.not_before)
    # The version, too: who plans from the row as it was would make one at once.
    return bool(hit.update(version=F("version") + 1, failures=failures, not_before=not_before))


def standing(row: Target) -> Standing:
    """Return what was decided of a type so far."""
    return Standing(
        wanted=row.wanted,
        raised_at=row.raised_at,
        lowered_at=row.lowered_at,
        lower_since=row.lower_since,
        lower_peak=row.lower_peak,
        higher_since=row.higher_since,
        higher_low=row.higher_low,
        asked_at=row.asked_at,
    )


def decide(row: Target, decided: Standing, why: str, *, busy: Mapping[str, int] | None, now: datetime) -> bool:
    """Keep a decision, if nobody has decided since the row was read."""
    values = {
        **_as_values(decided),
        **_changed(row, decided.wanted, why, now),
        "busy": None if busy is None else dict(busy),
    }
    hit = targets().filter(pk=row.pk, version=row.version).update(version=row.version + 1, **values)
    if hit:
        row.version += 1
        for name, value in values.items():
            setattr(row, name, value)
    return bool(hit)


def _as_values(decided: Standing) -> dict[str, Any]:
    return {name: getattr(decided, name) for name in Standing.__dataclass_fields__}


def _changed(row: Target, wanted: int, why: str, now: datetime) -> dict[str, Any]:
    if wanted == row.wanted and row.changed_at:
        return {}
    return {"changed_at": now, "why": why}


def carry_out(
    row: Target,
    plan: Plan,
    configure: Callable[[ServerInfo], Any],
    *,
    now: datetime,
) -> bool:
    """
    Do to the rows what was planned, if nobody has decided or planned for this type since ``row`` was read.

    All of it in one transaction: of two that plan at once, one does it, and the other finds it done. Raises whatever
    ``configure`` raises; nothing is done then.
    """
    with transaction.atomic(using=using()):
        values: dict[str, Any] = {"short_since": None, "short_because": ""}
        if plan.short:
            values = {"short_since": row.short_since or now, "short_because": plan.short.why}
        if plan.creates:
            # By whoever knows the type: from its first server on, others leave them alone.
            values["registered_at"] = now
        if not targets().filter(pk=row.pk, version=row.version).update(version=row.version + 1, **values):
            return False
        is_news = plan.short is not None and row.short_since is None
        for created in plan.creates:
            create(created.type, created.provider, created.why, configure, now=now)
        names = [cancel.name for cancel in plan.cancels] + [drain.name for drain in plan.drains]
        known = {server.name: server for server in servers().filter(name__in=names)}
        # Who has changed meanwhile is left to the next plan.
        for cancelled in plan.cancels:
            if server := known.get(cancelled.name):
                if server.status == Status.NEW:
                    move(server, Status.DELETED, cancelled.why, now=now)
                elif server.status in (Status.STARTING, Status.REBOOTING):
                    move(server, Status.STOPPING, cancelled.why, now=now)
        for drained in plan.drains:
            server = known.get(drained.name)
            if server is not None and server.status == Status.RUNNING:
                move(server, Status.DRAINING, drained.why, now=now)
            elif server is not None and server.status == Status.DRAINING:
                # It was to be rebooted, and need not come back any more.
                change(server, reboot_requested_at=None, reason=drained.why)
        if is_news and plan.short is not None:
            model, type_, why = servers().model, row.type, plan.short.why
            transaction.on_commit(
                lambda: signals.server_limit_hit.send_robust(
                    model, server=None, provider="", type=type_, reason=why, previous=""
                ),
                using=using(),
            )
    return True


def last_decision(type: str) -> Decision | None:
    """Return what was written down last of a type."""
    last: Decision | None = decisions().filter(type=type).order_by("-until", "-pk").first()
    return last


def record(
    type: str,
    *,
    asked: int | None,
    wanted: int,
    counted: Mapping[str, int],
    load: Mapping[str, Any],
    why: str,
    now: datetime,
    by: str = "",
) -> None:
    """Write down what was wanted and what there was; a row like the last one continues it."""
    seen = {
        "asked": asked,
        "wanted": wanted,
        "running": counted.get(Status.RUNNING, 0),
        "provisioned": provisioned(counted),
    }
    last = last_decision(type)
    more = {"load": dict(load), "why": why, "by": (by or who())[:150]}
    if last and now - last.until <= _MERGED_WITHIN and all(getattr(last, key) == value for key, value in seen.items()):
        decisions().filter(pk=last.pk).update(until=now, times=F("times") + 1, **more)
        return
    decisions().create(type=type, at=now, until=now, **seen, **more)


# -- providers --------------------------------------------------------------------------------------------------------


def provider(name: str) -> Provider:
    """Return how a provider does."""
    return providers().get_or_create(name=name)[0]

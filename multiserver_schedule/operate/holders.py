"""Who holds a lock, and how it is freed by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TextIO

from .. import conf, logs
from ..entries import Cleanup, Row, ScheduledTask
from ..exceptions import UnsafeTransaction
from ..locks.base import BaseLock
from .stores import Refused, again, away, chosen_locks, declared, history_of, in_another, opened, task_of, unknown


class UnlockRefused(Refused):
    """This lock was not freed by hand; the message says who holds it, or why nobody does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds the lock of a row, as its store says."""

    name: str
    lock: str
    owner: str
    server: str
    since: datetime | None
    renewed_at: datetime | None
    until: datetime | None
    as_of: datetime
    looks_alive: bool
    """Has it renewed within two heartbeats? Its lease is not over then, either."""


@dataclass(frozen=True, slots=True)
class Released:
    """A lock that was freed by hand."""

    holder: Holder
    cleanup: Cleanup
    unrecorded: str = ""
    """Why the clean-up is not in the database, where the store keeps it until a pass records it; else ""."""


def holder(name: str, *, lock: str = "") -> Holder:
    """
    Return who holds the lock of this row: the task's name, or ``task@server``.

    ``lock`` is the alias to ask, where more than one has it. Raises UnlockRefused where nobody holds it, where the name
    is not known, or where a store that may know does not answer.
    """
    settings = conf.load()
    return _holder(settings, declared(), name, lock)


def unlock(
    name: str,
    *,
    lock: str = "",
    owner: str = "",
    force: bool = False,
    verbosity: int = 0,
    stdout: TextIO | None = None,
) -> Released:
    """
    Free a lock by hand, in whichever store it is, and leave the trace of a clean-up.

    Refused while the holder looks alive, unless by ``force``: its server learns at its next renewal that the lease is
    lost, and ends the run; another server may start the task before that. The due time that it ran is not run again.
    ``owner`` is the claim that whoever asks has seen: another one is not freed in its place.
    """
    settings = conf.load()
    tasks = declared()
    held = _holder(settings, tasks, name, lock)
    if owner and held.owner != owner:
        raise UnlockRefused(
            f"{name} is not held by the run that you saw any more: {_who(held)}. Look again before you free it."
        )
    if held.looks_alive and not force:
        raise UnlockRefused(
            f"{name} is {_who(held)}, and that server looks alive: it renewed the lease at {_at(held.renewed_at)}, "
            f"which holds until {_at(held.until)}. Wait for the end of the run, or free the lock by force."
        )
    with _opened(settings, held.lock, name) as store:
        released = release(store, held, settings, tasks, verbosity=verbosity, stdout=stdout)
    if released is None:
        raise UnlockRefused(f"{name} is not {_who(held)} any more: it was freed meanwhile. Look again.")
    return released


def release(
    store: BaseLock,
    held: Holder,
    settings: conf.Settings,
    tasks: Mapping[str, ScheduledTask],
    *,
    verbosity: int = 0,
    stdout: TextIO | None = None,
) -> Released | None:
    """Free what this holder has, with its clean-up, and tell of it; None where it has it no more."""
    history = history_of(store)
    cleanup = store.free(held.name, owner=held.owner, server=settings.server_name, record=history.cleaned)
    trouble = history.take_trouble()
    if cleanup is None:
        return None
    task = task_of(cleanup.task, tasks)
    tell = logs.Teller(tasks=lambda: tasks, verbosity=verbosity, stdout=stdout)
    tell(
        {
            "kind": "cleaned",
            "cleanup": asdict(cleanup),
            "command": task.text if task else cleanup.task,
            "alias": history.using,
            "server": settings.server_name,
        }
    )
    return Released(held, cleanup, trouble if cleanup.pk is None else "")


def _holder(settings: conf.Settings, tasks: Mapping[str, ScheduledTask], name: str, lock: str) -> Holder:
    try:
        aliases = chosen_locks(settings, lock)
    except Refused as refused:
        wrong = UnlockRefused(str(refused))
        wrong.is_usage = refused.is_usage
        raise wrong from None
    held: list[Holder] = []
    away: dict[str, str] = {}
    is_known = False
    for alias in aliases:
        try:
            with _opened(settings, alias, name) as store:
                rows = store.rows([name])
                now = store.clock() if rows else None
        except UnlockRefused as refused:
            away[alias] = str(refused)
            continue
        for row in rows:
            is_known = True
            if now is not None and row.owner is not None:
                held.append(holder_of(row, alias, now, settings))
    if len(held) > 1:
        where = " and ".join(repr(each.lock) for each in held)
        raise UnlockRefused(f"{name} is held in the locks {where}. Say which one is meant.")
    if held:
        return held[0]
    if away:
        raise UnlockRefused(" ".join(away.values()))
    if lock and not is_known and (where := in_another(name, lock, settings, tasks)):
        raise UnlockRefused(where)
    if is_known or name in {task.row_name(settings.server_name) for task in tasks.values()}:
        raise UnlockRefused(f"Nobody holds the lock of {name}: there is nothing to free.")
    raise UnlockRefused(_unknown(name, settings, tasks))


def holder_of(row: Row, alias: str, now: datetime, settings: conf.Settings) -> Holder:
    """Return who holds this row, which somebody does, as its store has it."""
    alive = False
    if row.renewed_at is not None and row.expires_at is not None:
        # As the keeper has it: a short lease is renewed more often. Two of them are less than any lease.
        heartbeat = min(settings.heartbeat, (row.expires_at - row.renewed_at) / 3)
        alive = now - row.renewed_at <= 2 * heartbeat
    return Holder(
        name=row.task,
        lock=alias,
        owner=row.owner or "",
        server=row.server,
        since=row.acquired_at,
        renewed_at=row.renewed_at,
        until=row.expires_at,
        as_of=now,
        looks_alive=alive,
    )


def _unknown(name: str, settings: conf.Settings, tasks: Mapping[str, ScheduledTask]) -> str:
    """Say which name may be meant; rows that nobody declares any more are known, too."""
    known = {task.row_name(settings.server_name) for task in tasks.values()}
    for alias in settings.locks:
        with suppress(UnlockRefused), _opened(settings, alias, name) as store:
            known.update(row.task for row in store.rows())
    of_servers = sorted(each for each in known if each.startswith(f"{name}@"))
    if of_servers:
        return f"{name} has a lock for each server. Name one of them: {', '.join(of_servers[:5])}."
    return unknown(name, known)


@contextmanager
def _opened(settings: conf.Settings, alias: str, about: str) -> Iterator[BaseLock]:
    """Lend a lock; what its store raises becomes UnlockRefused."""
    try:
        with opened(settings, alias) as lock:
            yield lock
    except (UnlockRefused, UnsafeTransaction):
        raise
    except Exception as error:
        raise UnlockRefused(
            f"{away(alias, error)}. Whether somebody holds {about} in it is not known{again(error)}."
        ) from error


def _who(held: Holder) -> str:
    return f"held by {held.server} since {_at(held.since)}"


def _at(moment: datetime | None) -> str:
    return logs.short(moment)

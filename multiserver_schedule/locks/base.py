"""
What a store must keep so that a due time runs once and a task never overlaps itself.

A store answers one question, "may this server run this occurrence now?", by its own clock. Tests pass ``now`` and never
sleep. "Another server has it" is an answer; a broken store is an exception.

A store that may lose data (a cache) notices it, has ``sync`` put it right before anybody claims, and says what it lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar

from django.db import DEFAULT_DB_ALIAS

from ..entries import Claim, Cleanup, Occurrence, Row, ScheduledTask, Skip
from ..entries import ReleasedClaim as ReleasedClaim
from .ahead import Reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """What this version of the code declares, as the store compares it with other versions."""

    tasks: Mapping[str, ScheduledTask]
    """By name; all of them, whichever server or environment they are meant for."""
    server: str
    digest: str
    """Of name and schedule of every task that has one row for all servers."""
    server_digest: str
    """Of those that have a row on this server; "" when there are none."""

    def task_of(self, row: str) -> ScheduledTask | None:
        """Return the task that a row of this name is of, on whichever server; None where it is not declared."""
        return self.tasks.get(row.partition("@")[0])

    @property
    def rows(self) -> dict[str, ScheduledTask]:
        """The tasks by the names of their rows here."""
        return {task.row_name(self.server): task for task in self.tasks.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the store knows at one moment, in what a pass needs of it."""

    now: datetime
    """The store's clock, aware, UTC."""
    known: bool
    """Has this set of declarations been synced, and has the store lost nothing since? If not: call ``sync``."""
    paused: bool = False
    """Is everything paused?"""
    interrupted_at: datetime | None = None
    due: tuple[Row, ...] = ()
    """Rows due now or within ``ahead``, oldest first, held or not, paused ones left out."""
    expired: bool = False
    """Is there a lease that has ended, or a clean-up that nobody has recorded? If so: call ``reap``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What is known elsewhere of a row that a store does not have, or has given away."""

    row: Row | None = None
    """As another store has it, which lets nobody claim it any more: the task goes on from there."""
    store: str = ""
    """The alias of that store."""
    last_due_at: datetime | None = None
    """The last due time of the task in the history: a store that has no row for it has lost it."""


Elsewhere = Callable[[Sequence[str]], Mapping[str, Before]]
"""Says what is known elsewhere of these rows, by name; those of which nothing is known are left out."""


def nowhere_else(names: Sequence[str]) -> Mapping[str, Before]:
    """Know nothing of any row: there is no other store, and no history."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    """What ``sync`` did."""

    now: datetime
    registered: tuple[str, ...] = ()
    """Row names that are new."""
    changed: tuple[str, ...] = ()
    """Row names whose schedule was taken over from another version."""
    lost: Mapping[str, datetime | None] = field(default_factory=dict)
    """Row names that the store had lost, each with the last due time that is known of it, if any. What was due after
    that and until now is passed over by all servers: nobody can know whether it ran."""
    trouble: str = ""
    """How the store came to lose them, in words; "" where nothing was lost."""


ClaimRecorder = Callable[[Sequence[Claim], datetime], None]
SkipRecorder = Callable[[Sequence[Skip], datetime], None]
ReleaseRecorder = Callable[[Sequence[tuple[ReleasedClaim, bool]], datetime], None]
"""Told of each release whether the lease still stood (True) or had been lost (False)."""
Following = Callable[[str, datetime], datetime | None]
"""The first due time of a row after a moment; None where there is none, or where nobody here knows."""
CleanupRecorder = Callable[[Sequence[Cleanup]], Sequence[Cleanup]]
"""Returns the clean-ups that are recorded now, with the pk of what was written; one left out is tried again later."""


def was_due_in_pause(row: Row, paused_at: datetime | None, now: datetime, following: Following) -> bool:
    """
    Did a due time of this row come after it, or everything, was paused, and before now?

    Its hint counts too: it may be of the schedule that held when the pause began. Where that is all that is known, one
    from before the pause hides what came after it. A pause that lies ahead is of a clock that was: it began long ago.
    """
    began, hint = row.last_due_at, row.next_due_at
    if paused_at is not None and began < paused_at <= now:
        began = paused_at
    if hint is not None and began < hint <= now:
        return True
    first = following(row.task, max(began, row.schedule_since))
    if first is None:
        return hint is not None and hint <= now
    return first <= now


class BaseLock(ABC):
    """
    Lets one server at a time run a task, and any due time run at most once.

    The methods that change something take a recorder: a store that is also where the history lives calls it inside the
    same transaction, so that a claim and its record stand or fall together; others call it right after.

    Each method may raise what its driver raises when the store is broken: nobody turns that into "busy".
    """

    shared: ClassVar[bool] = True
    """Do other servers see this lock? A check refuses False."""
    transactional: ClassVar[bool] = False
    """Is a recorder called inside the transaction of the change, so that both are done or neither is?"""
    using: str = DEFAULT_DB_ALIAS
    """The database that the history of these tasks is kept in."""

    def __init__(self, alias: str, options: Mapping[str, Any]) -> None:
        self.alias = alias

    @abstractmethod
    def look(self, declared: Declarations, *, ahead: timedelta = timedelta(0), now: datetime | None = None) -> Look:
        """Return what is due by ``now + ahead`` and whether a lease has ended. Writes only a rare ``seen_at``."""

    @abstractmethod
    def sync(
        self, declared: Declarations, *, elsewhere: Elsewhere = nowhere_else, now: datetime | None = None
    ) -> Synced:
        """
        Register new tasks (never due for the past) and take over changed schedules, once per set of declarations.

        The newest set holds (``locks.versions``). Put right what the store has lost. ``elsewhere`` is asked of rows
        that are missing or given away, never from inside a transaction.
        """

    @abstractmethod
    def clock(self) -> datetime:
        """Return the store's time, which decides everything: aware, UTC."""

    @abstractmethod
    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        """Return the rows of these names (of all, for None) as they are: for people, and for what the cycle decides."""

    @abstractmethod
    def claim(
        self,
        occurrences: Sequence[Occurrence],
        *,
        server: str,
        slots: int | None = None,
        record: ClaimRecorder,
        now: datetime | None = None,
    ) -> list[Claim]:
        """
        Claim those of ``occurrences`` that may run now, in their order, at most as many as this server has free slots.

        ``slots`` is what the server may run at once, counted through the store over all its processes; None: no limit.
        Constant in statements (for each batch of parameters, on SQLite). Refused inside a transaction of the caller
        (UnsafeTransaction). A trigger "manual" or "backfill" claims without moving ``last_due_at``, and minds neither
        break nor pause; one that was ``requested`` minds no break, but a pause, claims only while the row's
        ``wanted_at`` is its due time, and settles that. A retry (``is_retry``) claims only while the row owes that very
        attempt; it minds no break, but a pause.

        What comes back may hold claims of an earlier call whose answer was lost: call it, with nothing to claim if need
        be, after one that raised.
        """

    @abstractmethod
    def skip(self, skips: Sequence[Skip], *, record: SkipRecorder, now: datetime | None = None) -> list[Skip]:
        """Give up these due times for all servers; return those that this call gave up (another server may have)."""

    @abstractmethod
    def renew(self, claims: Sequence[Claim], *, now: datetime | None = None) -> set[str]:
        """
        Put off the end of these leases; return the owners whose lease stands. One statement.

        One that was cancelled is left out, and its lease ends when it would have: its holder has until then to end the
        run and release it.
        """

    @abstractmethod
    def release(
        self, released: Sequence[ReleasedClaim], *, record: ReleaseRecorder, now: datetime | None = None
    ) -> list[bool]:
        """
        Free what these claims hold, start their breaks, record them; tell for each whether its lease still stood.

        ``retry_in`` makes the row owe another attempt of the same due time, for whichever server comes then: only if no
        newer due time has been claimed or given up, and none comes before.
        """

    @abstractmethod
    def reap(self, *, server: str, record: CleanupRecorder, now: datetime | None = None) -> list[Cleanup]:
        """
        Free every lease that has ended, whatever task it is of; return those that this call freed.

        A row whose claim said ``rerun_up_to`` owes the next attempt at once, unless a newer due time has come.
        """

    @abstractmethod
    def free(
        self,
        name: str,
        *,
        owner: str | None = None,
        server: str,
        record: CleanupRecorder,
        now: datetime | None = None,
    ) -> Cleanup | None:
        """
        Free the lock of this row by hand, whether its lease has ended or not; None when nobody holds it.

        With ``owner``, only if that is who holds it.
        """

    # -- what people ask for ------------------------------------------------------------------------------------------

    @abstractmethod
    def pause(self, names: Sequence[str] | None, *, reason: str = "", now: datetime | None = None) -> list[str]:
        """
        Let nobody claim or skip due times of these rows; of any row, for None. What runs goes on.

        Return the names of the rows that are there; [] for everything. What is paused already keeps its time, and takes
        the new reason.
        """

    @abstractmethod
    def resume(self, names: Sequence[str] | None, *, following: Following, now: datetime | None = None) -> list[str]:
        """
        Undo ``pause`` of these rows, or of everything (then single rows that are paused stay so).

        What was due meanwhile counts as done (``was_due_in_pause``): ``last_due_at`` rises to now, ``following`` gives
        the next hint, and what is owed of the due time before (a retry, a rerun) is dropped, as by any newer due time.
        Where nothing was due meanwhile, all of that is left alone: what runs or is owed goes on as before the pause.
        Return the names of the rows that were paused; [] where everything was not.
        """

    @abstractmethod
    def interrupt(self, *, now: datetime | None = None) -> None:
        """Ask every service and every pass that has begun to end: each look tells since when."""

    @abstractmethod
    def want(self, name: str, *, now: datetime | None = None) -> datetime | None:
        """
        Ask for a run of this row by whichever server looks next; its schedule does not notice.

        Return the moment that is its due time, the earlier one where it is asked for already; None where there is no
        such row, or it is paused, given away, or has not quite arrived from another store.
        """

    @abstractmethod
    def cancel(self, owners: Mapping[str, str], *, now: datetime | None = None) -> list[str]:
        """Ask these holders, row name to owner, to end their runs; return the names of those that hold them still."""

    @abstractmethod
    def retire(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        """
        Take these rows out of every look, until a version that declares them holds; their fences stay.

        The version that holds now takes up what it declares of them, from then on, at its next ``sync``: no look finds
        it known before. Only rows that nobody holds. Return their names.
        """

    @abstractmethod
    def forget(self, names: Sequence[str], *, now: datetime | None = None) -> list[str]:
        """Delete these rows of single servers (``task@server``), as far as nobody holds them; return their names."""

    @abstractmethod
    def set_right(
        self, reaches: Mapping[str, Reach], *, following: Following, now: datetime | None = None
    ) -> list[str]:
        """
        Bring down what a clock that was ahead, and was corrected, has left in these rows (``locks.ahead``).

        What lies within its reach is untouched, and so is every fence. A lease stays: a holder that lives renews it,
        and of one that does not, ``free`` is the end; only runs that may overlap, which ``free`` does not know, end a
        lease from now unless they are renewed. What is kept for all rows (an interrupt, when a version was seen, the
        slots of servers) is brought down, too. Constant in statements (for each batch). Return the names of the rows
        that this call has changed.
        """

    # -- from store to store ------------------------------------------------------------------------------------------

    @abstractmethod
    def leave(self, names: Sequence[str], *, to: str, now: datetime | None = None) -> list[Row]:
        """
        Give these rows to the store ``to``: nobody claims or skips them here any more; who holds one may go on.

        Return those that this store has and has given to no third one, as they are from now on.
        """

    @abstractmethod
    def arrive(self, names: Sequence[str], *, now: datetime | None = None) -> None:
        """Let these rows be claimed here: what ran in the store that they came from has ended."""

    def bound(self, limit: timedelta) -> None:  # noqa: B027 - where a call is one step, nobody can be frozen inside it
        """Have the store itself break off a change of ours of which it has heard nothing for so long."""

    @property
    def is_calling(self) -> bool:
        """Is a call to the store under way? Asked by a signal handler, which may break off nothing else."""
        return True

    def cut(self) -> bool:
        """Break off the call that is under way, from another thread; False when there is nothing to break."""
        return False

    def close(self) -> None:  # noqa: B027 - most stores have nothing to close
        """Close connections; the next call opens its own."""

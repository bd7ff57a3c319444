"""
What may be done to an item, and what is it then? Pure: what is to be written, others write.

Whoever judges by the clock takes its lower bound, and whoever writes a time that others are to wait for the upper one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from ...entries import Claim, Cleanup, Occurrence, ReleasedClaim, Row, ScheduledTask, Skip
from ..ahead import Reach, held_back_until, set_right
from ..base import Before, Following, was_due_in_pause
from ..versions import registered, taken_over
from .rows import (
    STATE,
    Kept,
    Moment,
    Read,
    as_cleanup,
    as_row,
    fence_of,
    from_row,
    length,
    micros,
    micros_or_none,
    owners_of,
    runs_of,
    scope_of,
    state_of,
    time_of,
    time_or_none,
)

MOST_REAPED: Final = 100
"""Clean-ups that a row keeps until they are recorded: further ones drop the oldest, which the log then names."""
RELEASED_KEPT: Final = 16
"""Released owners that the row of a task that may overlap remembers; others remember the last one."""
LONGEST_REASON: Final = 255

_SCHEDULE: Final = ("fingerprint", "schedule_since", "next_due_at", "not_before", "moved_to", "moved_from")
_NO_RUN: Final[Kept] = dict.fromkeys(
    (
        *("owner", "owner_fence", "server", "due_at", "acquired_at", "renewed_at", "expires_at", "finish_by"),
        *("rerun_up_to", "cancelled_at"),
    )
)
_NOTHING_OWED: Final[Kept] = {"retry_at": None, "rerun_up_to": None}
"""Of a due time that is not the last one any more."""
_TOLD: Final = ("interrupted_at", "since", "seen_at")
"""Times of the state, and of the versions in it, that lie ahead of no clock that goes right."""
_FRESH: Final[Kept] = {
    **_NOTHING_OWED,
    **dict.fromkeys(("wanted_at", "attempt", "trigger", "paused_at", "paused_reason")),
}
"""What a row that comes from another store leaves behind."""


def _with_run(kept: Kept, occurrence: Occurrence, owner: str, fence: int, run: Kept) -> Kept:
    if occurrence.may_overlap:
        return {**kept, "runs": {**(kept.get("runs") or {}), owner: {**run, "fence": fence}}}
    return {**kept, **_NO_RUN, **run, "owner": owner, "owner_fence": fence}


def _without_run(kept: Kept, owner: str) -> Kept:
    if kept.get("owner") == owner:
        return {**kept, **_NO_RUN}
    return {**kept, "runs": {each: run for each, run in kept["runs"].items() if each != owner}}


# -- claim and skip ---------------------------------------------------------------------------------------------------


def may_start(kept: Kept | None, occurrence: Occurrence, lower: int, state: Kept) -> bool:
    """May this be claimed, as far as its row says?"""
    if kept is None or _is_elsewhere(kept) or (kept.get("hold_until") or 0) > lower:
        return False
    if kept.get("owner") and not occurrence.may_overlap:
        return False
    if occurrence.requested:
        return kept.get("wanted_at") == micros(occurrence.due_at) and not _is_paused(kept, state)
    if occurrence.is_by_hand:
        return True
    if _is_paused(kept, state) or kept["fingerprint"] != occurrence.task.fingerprint:
        return False
    if occurrence.is_retry:
        return _is_owed(kept, occurrence, lower)
    return bool(_is_open(kept, occurrence, lower) and kept["not_before"] <= lower)


def claimed(kept: Kept, occurrence: Occurrence, owner: str, server: str, moment: Moment) -> Kept:
    """Let this owner run it; its due time is done from here on, or the retry or the wish that it owed."""
    limit = occurrence.task.limit
    fence = max(kept["fence"] + 1, moment.lower)
    run = {
        "server": server,
        "due_at": micros(occurrence.due_at),
        "acquired_at": moment.lower,
        "renewed_at": moment.lower,
        "expires_at": moment.upper + length(occurrence.lease),
        "finish_by": None if limit is None else moment.upper + length(limit),
    }
    kept = {**_with_run(kept, occurrence, owner, fence, run), "fence": fence}
    if occurrence.requested:
        kept["wanted_at"] = None
    elif occurrence.is_retry:
        kept["retry_at"] = None
    elif not occurrence.is_by_hand:
        kept = {**_moved_on(kept, occurrence), "attempt": None, "trigger": _unless_usual(occurrence.trigger)}
    return kept if occurrence.may_overlap else {**kept, "rerun_up_to": occurrence.rerun_up_to}


def skipped(skip: Skip, stamp: str, kept: Kept | None, read: Read) -> tuple[Kept | None, tuple[Skip, int] | None]:
    """Give up a due time; the stamp tells who did that although the answer was lost."""
    occurrence, lower, state = skip.occurrence, read.moment.lower, read.get(STATE)
    if kept is None or state is None or not read.is_sound:
        return None, None
    told = skip
    if skip.reason == "held":
        told = replace(skip, holder=kept.get("server") or "", held_since=time_or_none(kept.get("acquired_at")))
    due_at = micros(occurrence.due_at)
    if kept.get("stamp") == stamp and kept["last_due_at"] == due_at:
        return None, (told, lower)
    if _is_elsewhere(kept) or _is_paused(kept, state) or kept["fingerprint"] != occurrence.task.fingerprint:
        return None, None
    if not _is_open(kept, occurrence, lower):
        return None, None
    stands = kept.get("owner") and kept["expires_at"] > lower and kept["renewed_at"] >= due_at
    if skip.reason == "held" and not stands:
        # A holder that has not renewed since may be dead: then the due time is still wanted.
        return None, None
    return {**_moved_on(kept, occurrence), "stamp": stamp}, (told, lower)


def _is_open(kept: Kept, occurrence: Occurrence, lower: int) -> bool:
    """Is the due time still to be had?"""
    return bool(kept["last_due_at"] < micros(occurrence.due_at) <= lower)


def _is_owed(kept: Kept, occurrence: Occurrence, lower: int) -> bool:
    """Does the row owe this very attempt? It minds no break."""
    retry_at = kept.get("retry_at")
    is_it = kept["last_due_at"] == micros(occurrence.due_at) and (kept.get("attempt") or 1) == occurrence.attempt
    return is_it and retry_at is not None and retry_at <= lower


def _is_paused(kept: Kept, state: Kept) -> bool:
    return bool(kept.get("paused_at") or state.get("paused_at"))


def _is_elsewhere(kept: Kept) -> bool:
    """Has another store the task, or still a run of it?"""
    return bool(kept.get("moved_to") or kept.get("moved_from"))


def _moved_on(kept: Kept, occurrence: Occurrence) -> Kept:
    following = micros_or_none(occurrence.next_due_at)
    return {**kept, **_NOTHING_OWED, "last_due_at": micros(occurrence.due_at), "next_due_at": following}


def _done_until(kept: Kept, last: int) -> Kept:
    """Count everything until then as done; what is owed of a due time before that is dropped with it."""
    return {**kept, **_NOTHING_OWED, "last_due_at": last} if last > kept["last_due_at"] else kept


def _unless_usual(trigger: str) -> str | None:
    return None if trigger == "schedule" else trigger


# -- renew and release ------------------------------------------------------------------------------------------------


def may_return(kept: Kept | None, claim: Claim, stands_until: int, lower: int) -> bool:
    """May an owner whose row was lost be put back? Its lease must stand, and nobody can have claimed since."""
    if stands_until <= lower:
        return False
    if kept is None:
        return True
    if (kept.get("hold_until") or 0) <= lower:
        return False
    if claim.owner == kept.get("freed") or was_released(kept, claim.owner):
        return False
    return claim.occurrence.may_overlap or not kept.get("owner") or fence_of(kept, kept) < claim.fence


def returned(kept: Kept, claim: Claim) -> Kept:
    """Put back an owner whose run was lost with its row; whoever renews or releases it says until when."""
    occurrence = claim.occurrence
    run = {
        "server": claim.server,
        "due_at": micros(occurrence.due_at),
        "acquired_at": micros(claim.acquired_at),
        "finish_by": micros_or_none(claim.finish_by),
    }
    kept = _with_run(kept, occurrence, claim.owner, claim.fence, run)
    if not occurrence.is_by_hand:
        kept = _done_until(kept, micros(occurrence.due_at))
    return {**kept, "fence": max(kept["fence"], claim.fence)}


def renewed(kept: Kept, claim: Claim, moment: Moment) -> tuple[Kept, int]:
    """Put off the end of this claim's lease, and say until when it stands."""
    expires_at = moment.upper + length(claim.occurrence.lease)
    values = {"renewed_at": moment.lower, "expires_at": expires_at}
    if kept.get("owner") == claim.owner:
        return {**kept, **values}, expires_at
    runs = kept["runs"]
    return {**kept, "runs": {**runs, claim.owner: {**runs[claim.owner], **values}}}, expires_at


def was_released(kept: Kept | None, owner: str) -> bool:
    """Was this owner's release written before, and its answer lost?"""
    return owner in ((kept or {}).get("released") or ())


def freed(kept: Kept, item: ReleasedClaim, moment: Moment) -> Kept:
    """End a run that was released: its break begins, another attempt may be owed, and its owner is remembered."""
    owner, occurrence = item.claim.owner, item.claim.occurrence
    may_overlap = occurrence.may_overlap
    most = RELEASED_KEPT if may_overlap else 1
    kept = {**_without_run(kept, owner), "released": [*(kept.get("released") or ()), owner][-most:]}
    if item.outcome.started and item.min_break and not may_overlap:
        kept["not_before"] = moment.upper + length(item.min_break)
    if item.retry_in is not None and not occurrence.is_by_hand and kept["last_due_at"] == micros(occurrence.due_at):
        kept = _owing(kept, occurrence.attempt + 1, moment.upper + length(item.retry_in))
    return kept


def _owing(kept: Kept, attempt: int, retry_at: int) -> Kept:
    """Have the row owe another attempt of its last due time from then on, unless the next one comes before."""
    following = kept.get("next_due_at")
    if following is not None and following <= retry_at:
        return kept
    return {**kept, "attempt": attempt, "retry_at": retry_at}


# -- what runs on a server --------------------------------------------------------------------------------------------


def slots_renewed(claims: Sequence[Claim], kept: Kept | None, read: Read) -> tuple[Kept, None]:
    """Put off the end of what these claims take of their server's slots; a row that was lost is made anew."""
    owners = {owner: until for owner, until in owners_of(kept).items() if until > read.moment.lower}
    owners |= {claim.owner: read.moment.upper + length(claim.occurrence.lease) for claim in claims}
    return {"owners": owners}, None


def slots_freed(gone: Collection[str], kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Give back the slots of these owners."""
    owners = owners_of(kept)
    left = {owner: until for owner, until in owners.items() if owner not in gone}
    return ({"owners": left} if len(left) < len(owners) else None), None


# -- reap and free ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reaped:
    """What a row has to say of runs that were ended from outside."""

    freed: Sequence[Cleanup] = ()
    """By this step."""
    unrecorded: Sequence[Cleanup] = ()
    """These, and those before that nobody has recorded."""
    dropped: Sequence[Cleanup] = ()
    """Of the unrecorded, those that the row has no room for."""


def reaped(server: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Reaped]:
    """Free what has ended, and keep in the row what that was until it is recorded."""
    if kept is None:
        return None, Reaped()
    lower = read.moment.lower
    ended = {owner: run for owner, run in runs_of(kept).items() if run["expires_at"] <= lower}
    if not ended:
        return None, Reaped(unrecorded=[as_cleanup(kept["task"], values) for values in kept.get("reaped") or ()])
    attempt = kept.get("attempt") or 1
    is_rerun = kept.get("owner") in ended and (kept.get("rerun_up_to") or 0) > attempt
    kept, said = _ended(kept, ended, server, lower)
    return (_owing(kept, attempt + 1, lower) if is_rerun else kept), said


def freed_by_hand(owner: str | None, server: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Reaped]:
    """
    Free what is held (with ``owner``: by nobody else), whether its lease has ended or not.

    Its owner stays out, and nobody runs the due time again.
    """
    holder = (kept or {}).get("owner")
    if kept is None or not holder or owner not in (None, holder):
        return None, Reaped()
    kept, said = _ended(kept, {holder: kept}, server, read.moment.lower, by_hand=True)
    return {**kept, "freed": holder}, said


def _ended(kept: Kept, runs: dict[str, Kept], server: str, lower: int, *, by_hand: bool = False) -> tuple[Kept, Reaped]:
    task = kept["task"]
    freed: list[Kept] = []
    for owner, run in runs.items():
        overran = bool(run.get("finish_by")) and run["finish_by"] <= lower
        freed.append(
            {
                "due_at": run.get("due_at"),
                "server": run["server"],
                "owner": owner,
                "fence": fence_of(kept, run),
                "acquired_at": run["acquired_at"],
                "expired_at": run["expires_at"],
                "cleaned_at": lower,
                "cleaned_by": server,
                "reason": "released_by_hand" if by_hand else "overran" if overran else "lease_expired",
            }
        )
    listed = [*(kept.get("reaped") or ()), *freed]
    for owner in runs:
        kept = {**_without_run(kept, owner), "fence": kept["fence"] + 1}
    cleanups = [as_cleanup(task, values) for values in listed]
    said = Reaped(freed=cleanups[-len(freed) :], unrecorded=cleanups, dropped=cleanups[:-MOST_REAPED])
    return {**kept, "reaped": listed[-MOST_REAPED:]}, said


def recorded(owners: Collection[str], kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Forget the clean-ups of these owners, which are recorded."""
    listed = (kept or {}).get("reaped") or []
    left = [values for values in listed if values["owner"] not in owners]
    return (None if kept is None or len(left) == len(listed) else {**kept, "reaped": left}), None


# -- what people ask for ----------------------------------------------------------------------------------------------


def paused(reason: str, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Pause a row; one that is paused already takes the reason."""
    if kept is None:
        return None, False
    paused_at = kept.get("paused_at") or read.moment.lower
    return {**kept, "paused_at": paused_at, "paused_reason": reason[:LONGEST_REASON]}, True


def all_paused(reason: str, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Pause everything, in the state; where there is none, the next look of each version still has it synced."""
    return paused(reason, state_of(read.moment) if kept is None else kept, read)


def resumed(following: Following, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Undo the pause of a row: what was due meanwhile is done."""
    if kept is None or not kept.get("paused_at"):
        return None, False
    caught = _caught_up(following, kept, kept["paused_at"], read)
    return {**caught, "paused_at": None, "paused_reason": None}, True


def all_resumed(kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Undo the pause of everything, in the state."""
    if kept is None or not kept.get("paused_at"):
        return None, False
    return {**kept, "paused_at": None, "paused_reason": None}, True


def caught_up(following: Following, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Count what was due while all was paused as done; say whether the row goes on when that is over."""
    since = (read.get(STATE) or {}).get("paused_at")
    if kept is None or not since:
        # Somebody else was faster.
        return None, False
    return _caught_up(following, kept, since, read), not kept.get("paused_at")


def _caught_up(following: Following, kept: Kept, since: int, read: Read) -> Kept:
    if kept.get("moved_to"):
        # The store that has it by now knows what is done.
        return kept
    if not was_due_in_pause(as_row(kept), time_of(since), time_of(read.moment.lower), following):
        return kept
    last = max(kept["last_due_at"], read.moment.lower)
    # Where nobody here knows, the old hint: the row is offered, and who has its schedule finds what is due.
    hint = None if kept.get("retired") else following(kept["task"], time_of(last))
    following_at = kept.get("next_due_at") if hint is None else micros(hint)
    return {**kept, **_NOTHING_OWED, "last_due_at": last, "next_due_at": following_at}


def interrupted(kept: Kept | None, read: Read) -> tuple[Kept, None]:
    """Ask all that have begun to end: the clock tells whole seconds, and they may have begun in this one."""
    moment = read.moment
    return {**(kept or state_of(moment)), "interrupted_at": min(moment.lower + 1, moment.upper)}, None


def wanted(kept: Kept | None, read: Read) -> tuple[Kept | None, int | None]:
    """Have the row ask for a run, and say since when it does."""
    if kept is None or _is_elsewhere(kept) or _is_paused(kept, read.get(STATE) or {}):
        return None, None
    since = kept.get("wanted_at")
    if since is not None:
        return None, since
    return {**kept, "wanted_at": read.moment.lower}, read.moment.lower


def cancelled(owner: str, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Ask the holder of a row to end, if it is this one."""
    if kept is None or kept.get("owner") != owner:
        return None, False
    return (None if kept.get("cancelled_at") else {**kept, "cancelled_at": read.moment.lower}), True


def retired(kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Have a row that nobody holds come up in no look."""
    if kept is None or runs_of(kept):
        return None, False
    return {**kept, **_NOTHING_OWED, "next_due_at": None, "wanted_at": None, "retired": 1}, True


def may_be_forgotten(kept: Kept) -> bool:
    """Is it the row of a single server, with nothing that somebody still needs?"""
    return bool(scope_of(kept["task"])) and not runs_of(kept) and not kept.get("reaped")


# -- what a clock that was ahead has left behind ----------------------------------------------------------------------


def righted(reach: Reach, following: Following, kept: Kept | None, read: Read) -> tuple[Kept | None, bool]:
    """Bring down what lies beyond, and say whether that was anything; who holds the row keeps it."""
    if kept is None:
        return None, False
    now = time_of(read.moment.lower)
    row = replace(as_row(kept), not_before=time_of(kept["not_before"]))
    right = set_right(row, reach, now, _unless_retired(following, kept))
    new = {**kept, **_spared(kept, reach, read.moment)}
    if right is not row:
        fresh = from_row(right)
        new |= {each: fresh[each] for each in ("last_due_at", "schedule_since", "next_due_at", "not_before")}
        new |= {each: micros_or_none(getattr(right, each)) for each in ("retry_at", "wanted_at")}
        if right.last_due_at != row.last_due_at:
            new |= _NOTHING_OWED
    if kept.get("hold_until"):
        new["hold_until"] = micros(held_back_until(time_of(kept["hold_until"]), reach, now))
    return (None, False) if new == kept else (new, True)


def _unless_retired(following: Following, kept: Kept) -> Following:
    return (lambda name, after: None) if kept.get("retired") else following


def _spared(kept: Kept, reach: Reach, moment: Moment) -> Kept:
    """Return the runs that may overlap, each to end a lease from now unless it is renewed."""
    runs = kept.get("runs") or {}
    latest, end = moment.lower + length(reach.far), moment.upper + length(reach.lease)
    late = {owner: {**run, "expires_at": end} for owner, run in runs.items() if run["expires_at"] > latest}
    return {"runs": {**runs, **late}} if late else {}


def slots_righted(far: timedelta, lease: timedelta, kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Have the slots of a server that nobody renews be free a lease from now."""
    latest, end = read.moment.lower + length(far), read.moment.upper + length(lease)
    owners = owners_of(kept)
    right = {owner: end if until > latest else until for owner, until in owners.items()}
    return ({"owners": right} if right != owners else None), None


def state_righted(far: timedelta, kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Have no interrupt be still to come, and no version be seen later than now."""
    if kept is None:
        return None, None
    latest, now = read.moment.lower + length(far), read.moment.lower

    def right(values: Kept) -> Kept:
        late = {each: now for each in _TOLD if (values.get(each) or 0) > latest}
        return {**values, **late}

    new = right(kept)
    if kept.get("versions"):
        new["versions"] = {key: right(version) for key, version in kept["versions"].items()}
    return (new if new != kept else None), None


# -- from store to store ----------------------------------------------------------------------------------------------


def given_away(to: str, kept: Kept | None, read: Read) -> tuple[Kept | None, Row | None]:
    """Give a row to another store, unless a third one has it."""
    if kept is None or (kept.get("moved_to") or to) != to:
        return None, None
    if kept.get("moved_to"):
        return None, as_row(kept)
    kept = {**kept, "moved_to": to}
    return kept, as_row(kept)


def arrived(kept: Kept | None, read: Read) -> tuple[Kept | None, None]:
    """Let a row be claimed here: what ran in the store that it came from has ended."""
    return ({**kept, "moved_from": ""} if kept is not None and kept.get("moved_from") else None), None


def usable(before: Before | None, kept: Kept | None = None) -> Before | None:
    """
    Pass over a row elsewhere that this store has been ahead of.

    The history is, where the task was here since, and this store has lost it; or it runs here now.
    """
    if before is None or before.row is None:
        return before
    was_here = before.last_due_at is not None and before.last_due_at > before.row.last_due_at
    return replace(before, row=None) if was_here or (kept is not None and runs_of(kept)) else before


# -- another schedule, and what was lost ------------------------------------------------------------------------------


def rescheduled(kept: Kept, task: ScheduledTask, back: datetime | None, known: Before | None, moment: Moment) -> Kept:
    """Put a row under the schedule of this task: from now on, or since ``back``."""
    values = from_row(taken_over(as_row(kept), task, time_of(moment.lower), back, known))
    if kept.get("moved_to"):
        kept = {**kept, **_FRESH}
        if known is not None and known.last_due_at is not None:
            # Should the other store have lost its row: the history does not forget.
            values["last_due_at"] = max(values["last_due_at"], micros(known.last_due_at))
    taken = {each: values[each] for each in (*_SCHEDULE, "last_due_at", "fence")}
    return {**kept, **taken, "blank": None, "retired": None}


def blank(name: str, moment: Moment, longest: timedelta) -> Kept:
    """Return a row in the place of a lost one whose schedule is unknown here: nobody claims it as it is."""
    return {
        "task": name,
        "fingerprint": "",
        "last_due_at": moment.past,
        "schedule_since": moment.past,
        "not_before": moment.lower,
        "hold_until": moment.upper + length(longest),
        "fence": moment.past,
    }


def filled(kept: Kept, task: ScheduledTask, known: Before | None, moment: Moment, longest: timedelta) -> Kept:
    """Put a blank row under the schedule of its task: what was due until now counts as done."""
    fresh = from_row(registered(kept["task"], task, time_of(moment.past), known))
    return {
        **_done_until(kept, fresh["last_due_at"]),
        **{each: fresh[each] for each in _SCHEDULE},
        "fence": max(kept["fence"], fresh["fence"]),
        "hold_until": max(kept["hold_until"], moment.upper + length(longest)),
    }


def held_back(kept: Kept, task: ScheduledTask | None, moment: Moment, longest: timedelta) -> Kept:
    """
    Hold a row that outlived a restart of the server: what was due until now counts as done.

    So do a retry and a run that was asked for: that they were begun may have been lost.
    """
    last = max(kept["last_due_at"], moment.past)
    following, is_blank = kept.get("next_due_at"), kept.get("blank")
    if kept.get("retired"):
        following = None
    elif task is not None and task.fingerprint == kept["fingerprint"]:
        following = micros_or_none(task.next(time_of(max(last, kept["schedule_since"]))))
    elif following is not None and following <= last:
        following, is_blank = None, 1
    hold_until = max(kept.get("hold_until") or 0, moment.upper + length(longest))
    kept = {**kept, **_NOTHING_OWED, "wanted_at": None, "last_due_at": last, "next_due_at": following}
    return {**kept, "blank": is_blank, "hold_until": hold_until}


def is_out_of_step(kept: Kept, fingerprint: str) -> bool:
    """Has a row that is here another schedule than its task, or none, or was it retired?"""
    if kept.get("moved_to"):
        return False
    return bool(kept["fingerprint"] != fingerprint or kept.get("blank") or kept.get("retired"))

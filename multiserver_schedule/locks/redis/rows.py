"""How is a row a list of texts, and what else stands in the store as a text? Pure; ``steps.lua`` has the other half."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Final, cast

from ...entries import Cleanup, Row, Trigger

EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)

_SYNCED: Final = (
    *("fingerprint", "last", "since", "next", "not_before", "hold", "fence", "paused_at", "paused_reason"),
    *("attempt", "trigger", "rerun_up_to", "retry", "wanted", "moved_to", "moved_from", "lost", "lost_since"),
)
_ROW: Final = (
    *("task", "fingerprint", "last", "since", "next", "not_before", "hold", "owner", "server", "fence", "acquired"),
    *("renewed", "expires", "finish_by", "due", "cancelled", "paused_at", "paused_reason", "attempt", "trigger"),
    *("rerun_up_to", "retry", "wanted", "asked", "moved_to", "moved_from", "lost", "lost_since"),
)
"""What the lists of these names in steps.lua hold, the latter after the row's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A row as the store has it."""

    row: Row
    """``not_before`` is the break's end alone."""
    hold: datetime
    """Until then nobody claims it, since an owner that was lost may come back."""
    rerun_up_to: int = 0
    """Up to which attempt the death of its server leads to another one."""
    asked: str = ""
    """When somebody asked for a run last, under which stamp, and of which process of the server."""
    lost: str = ""
    """A mark of who found it lost and has yet to report it; "renew" where its owner put it back before that."""
    lost_since: datetime | None = None
    guard: str = ""
    """What a write compares; "" where there is no row."""

    @property
    def shown(self) -> Row:
        """The row as the others see it: a hold makes plans wait, like a break."""
        return replace(self.row, not_before=max(self.row.not_before, self.hold))


@dataclass(frozen=True, slots=True)
class Version:
    """A set of declarations as the store has seen it: a ``locks.versions.Version``."""

    key: str
    scope: str
    first_seen_at: datetime | None
    seen_at: datetime | None


def micros(value: datetime | timedelta | None) -> str:
    """Return whole microseconds, since the epoch or of a duration; "" for None."""
    if value is None:
        return ""
    return str((value - EPOCH if isinstance(value, datetime) else value) // _MICROSECOND)


def moment(text: str) -> datetime:
    return EPOCH + timedelta(microseconds=int(text))


def moment_or_none(text: str) -> datetime | None:
    return moment(text) if text else None


def version_of(key: str, scope: str, first_seen_at: str, seen_at: str) -> Version:
    return Version(key, scope, moment_or_none(first_seen_at), moment_or_none(seen_at))


def stored_of(values: Sequence[str]) -> Stored:
    read = dict(zip(_ROW, values, strict=True))
    return Stored(
        row=Row(
            pk=0,
            task=read["task"],
            fingerprint=read["fingerprint"],
            last_due_at=moment(read["last"]),
            schedule_since=moment(read["since"]),
            next_due_at=moment_or_none(read["next"]),
            not_before=moment(read["not_before"]),
            owner=read["owner"] or None,
            server=read["server"],
            fence=int(read["fence"]),
            acquired_at=moment_or_none(read["acquired"]),
            renewed_at=moment_or_none(read["renewed"]),
            expires_at=moment_or_none(read["expires"]),
            paused=bool(read["paused_at"]),
            paused_at=moment_or_none(read["paused_at"]),
            paused_reason=read["paused_reason"],
            attempt=int(read["attempt"] or 1),
            trigger=cast(Trigger, read["trigger"] or "schedule"),
            retry_at=moment_or_none(read["retry"]),
            wanted_at=moment_or_none(read["wanted"]),
            cancelled=bool(read["cancelled"]),
            moved_to=read["moved_to"],
            moved_from=read["moved_from"],
        ),
        hold=moment(read["hold"] or "0"),
        rerun_up_to=int(read["rerun_up_to"] or 0),
        asked=read["asked"],
        lost=read["lost"],
        lost_since=moment_or_none(read["lost_since"]),
        guard="|".join(read[name] for name in _SYNCED),
    )


def synced_values(stored: Stored) -> list[str]:
    """Return what a sync writes. Owners and leases are not among it: it disturbs no claim."""
    row = stored.row
    return [
        row.fingerprint,
        micros(row.last_due_at),
        micros(row.schedule_since),
        micros(row.next_due_at),
        micros(row.not_before),
        micros(stored.hold),
        str(row.fence),
        micros(row.paused_at),
        row.paused_reason,
        str(row.attempt),
        row.trigger,
        str(stored.rerun_up_to),
        micros(row.retry_at),
        micros(row.wanted_at),
        row.moved_to,
        row.moved_from,
        stored.lost,
        micros(stored.lost_since),
    ]


def cleanup_of(note: str) -> Cleanup:
    """Read a clean-up that waits to be recorded."""
    task, due, server, owner, fence, acquired, expired, cleaned, cleaned_by, reason = json.loads(note)
    return Cleanup(
        task=task,
        due_at=moment_or_none(due),
        server=server,
        owner=owner,
        fence=int(fence or 0),
        acquired_at=moment_or_none(acquired),
        expired_at=moment_or_none(expired),
        cleaned_at=moment(cleaned),
        cleaned_by=cleaned_by,
        reason=reason,
    )


def pairs(flat: Sequence[str]) -> dict[str, str]:
    """Read a hash: HGETALL answers with field, value, field, value, in a script too."""
    return dict(zip(flat[::2], flat[1::2], strict=True))

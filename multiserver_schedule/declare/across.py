"""The words for *across servers*: locks, limits, missed due times. A new one sets a field of ``ScheduledTask``."""

from __future__ import annotations

import difflib
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from ..entries import EVERY_MISSED, Overlap
from .words import Words, word

if TYPE_CHECKING:
    from typing_extensions import Self

OVERLAPS: Final = ("skip", "allow")
WITH_SERVICE_MODE: Final = ("queue_one", "cancel_other")


class Coordination(Words):
    """What the servers do about one another."""

    __slots__ = ()

    @word()
    def without_overlapping(self, *, min_break: timedelta | None = None, lease: timedelta | None = None) -> Self:
        """
        Tune what is so by default: while a run has the lock, no server starts the task.

        ``min_break``: how long the task rests after a run, shorter than its period. ``lease``: how soon the lock of a
        server that died is free again, more than two heartbeats; it is renewed for as long as a run takes.
        """
        if self._draft.fields.get("overlap") == "allow":
            self._fail('.without_overlapping() contradicts .overlap("allow")', "Keep one of them.")
        if min_break is not None:
            min_break = self._duration("without_overlapping", min_break, unit="min_break", zero=True)
            self._draft.fields["min_break"] = min_break
        if lease is not None:
            self._draft.fields["lease"] = self._duration("without_overlapping", lease, unit="lease")
        return self

    @word()
    def overlap(self, policy: Overlap) -> Self:
        """Say what happens when it is due while it runs: ``"skip"`` that due time (the default) or ``"allow"`` both."""
        if policy in WITH_SERVICE_MODE:
            self._fail(f".overlap({policy!r}) comes with service mode", 'Until then write "skip" or "allow".')
        if policy not in OVERLAPS:
            close = difflib.get_close_matches(str(policy), OVERLAPS, n=1)
            self._fail(
                f".overlap({policy!r}) is not known", f"Write {close[0]!r}." if close else 'Write "skip" or "allow".'
            )
        if policy == "allow":
            self._contradicts("overlap", "without_overlapping")
        self._draft.fields["overlap"] = policy
        return self

    @word()
    def on_every_server(self) -> Self:
        """Run each due time on every server, under a lock of its own there: for what each has, as its temp folder."""
        self._draft.fields["on_every_server"] = True
        return self

    @word()
    def lock_with(self, alias: str) -> Self:
        """Take the lock from this entry of the LOCKS setting instead of ``"default"``."""
        if not isinstance(alias, str):
            self._fail(
                f".lock_with({alias!r}) is not a name", 'Write a key of the LOCKS setting, as in .lock_with("cache").'
            )
        self._draft.fields["lock"] = alias
        return self

    @word()
    def ensure_finished(
        self,
        limit: timedelta | None = None,
        /,
        *,
        seconds: float = 0,
        minutes: float = 0,
        hours: float = 0,
    ) -> Self:
        """End a run that takes longer, with its process group: ``ensure_finished(minutes=30)`` or a timedelta."""
        self._draft.fields["limit"] = self._duration(
            "ensure_finished", limit, seconds=seconds, minutes=minutes, hours=hours
        )
        return self

    @word()
    def catch_up(self, *, within: timedelta | None = None, all: bool = False) -> Self:
        """
        Say what becomes of due times that no server was there for.

        ``within``: the latest is still run when it is not older than this. ``all=True``: each is run, oldest first.
        """
        self._contradicts("catch_up", "no_catch_up")
        if all is not True and all is not False:
            self._fail(f".catch_up(all={all!r}) is neither True nor False", "Write .catch_up(all=True).")
        if all == (within is not None):
            self._fail(
                ".catch_up() was given " + ("two answers" if all else "no answer"),
                "Write .catch_up(within=timedelta(hours=1)) or .catch_up(all=True).",
            )
        self._draft.fields["catch_up"] = EVERY_MISSED if all else self._duration("catch_up", within, unit="within")
        return self

    @word()
    def no_catch_up(self) -> Self:
        """Run no due time late: one that no server was there for is recorded as missed."""
        self._contradicts("no_catch_up", "catch_up")
        self._draft.fields["catch_up"] = "none"
        return self

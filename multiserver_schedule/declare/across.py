"""The words for *across servers*: locks, limits, missed due times. A new one sets a field of ``ScheduledTask``."""

from __future__ import annotations

import difflib
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal

from ..entries import EVERY_MISSED, Overlap
from .words import Words, word

if TYPE_CHECKING:
    from typing_extensions import Self

OVERLAPS: Final = ("skip", "allow", "queue_one", "cancel_other")
ON_CRASH: Final = ("skip", "rerun")
MOST_RETRIES: Final = 20


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
        """
        Say what happens when it is due while it runs.

        ``"skip"`` that due time (the default); ``"allow"`` both runs side by side; ``"queue_one"``: run once more when
        the running one has ended, however many due times came meanwhile; ``"cancel_other"``: end the running one,
        wherever it runs, then start.
        """
        self._one_of("overlap", policy, OVERLAPS)
        if policy == "allow":
            self._contradicts("overlap", "without_overlapping")
        self._draft.fields["overlap"] = policy
        return self

    @word()
    def jitter(self, most: timedelta | None = None, /, *, seconds: float = 0, minutes: float = 0) -> Self:
        """
        Start each due time later by a part of this: always the same part for this name, on every server.

        So that a hundred tasks of midnight do not start together. ``due_at`` and the history keep the due time itself.
        """
        self._draft.fields["jitter"] = self._duration("jitter", most, seconds=seconds, minutes=minutes)
        return self

    @word()
    def retry(self, times: int, *, backoff: timedelta = timedelta(minutes=1)) -> Self:
        """
        Try a due time again, up to so many times, when its run failed or took longer than its limit.

        ``backoff`` passes before the first further attempt, twice as long before each next one, a fifth more or less.
        Whichever server is there makes it. The next due time goes first: an attempt that would come after it is not
        made. The history has a row for each attempt.
        """
        if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= MOST_RETRIES:
            self._fail(f".retry({times!r}) is no number of attempts", f"Write a whole number from 1 to {MOST_RETRIES}.")
        self._draft.fields["retries"] = times
        self._draft.fields["backoff"] = self._duration("retry", backoff, unit="backoff")
        return self

    @word()
    def on_crash(self, policy: Literal["skip", "rerun"]) -> Self:
        """
        Say what becomes of a due time whose server died while it ran, or was cut off from the lock.

        ``"skip"`` (the default): the history says that it was abandoned, and the next due time is the next run.
        ``"rerun"``: another server runs it again, as a further attempt, at most three times.
        """
        self._one_of("on_crash", policy, ON_CRASH)
        self._draft.fields["rerun"] = policy == "rerun"
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

    def _one_of(self, name: str, given: object, known: tuple[str, ...]) -> None:
        if given not in known:
            close = difflib.get_close_matches(str(given), known, n=1)
            choice = f"Write {close[0]!r}." if close else f"Write one of {', '.join(map(repr, known))}."
            self._fail(f".{name}({given!r}) is not known", choice)

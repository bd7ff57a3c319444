"""How many servers are wanted? From a load, or from what was asked for, to a count. Pure: time and state come in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Any, Final

from .entries import Load

MOST: Final = 2**31 - 1
"""No more are ever wanted: what the column of each database holds."""

_DURATIONS: Final = ("cool_down_up", "cool_down_down", "stabilization_up", "stabilization_down")


@dataclass(frozen=True, slots=True)
class Policy:
    """How the count of one type may change. Raises ValueError, naming what is wrong and what to write."""

    minimum: int = 0
    maximum: int | None = None
    step_up: int | None = None
    """The count rises by at most so many at a time; None: by as many as are asked for."""
    step_down: int | None = None
    cool_down_up: timedelta = timedelta(0)
    """For so long after a change, in either direction, the count does not rise."""
    cool_down_down: timedelta = timedelta(0)
    stabilization_up: timedelta = timedelta(0)
    """The count rises when more was asked for all this time, and only to the fewest of them."""
    stabilization_down: timedelta = timedelta(minutes=5)
    """The count falls when fewer were asked for all this time, and only to the most of them. As Kubernetes does."""
    waiting_per_server: float | None = None
    """One server for so many jobs that wait or run."""
    waited: Mapping[timedelta, int] = field(default_factory=dict)
    """So many servers when the oldest job has waited for so long."""
    hysteresis: float = 0.1
    """How far below its threshold the load has to be before the count falls, as a share of the threshold."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, where it is written."""
        _whole("minimum", self.minimum, 0)
        if self.maximum is not None:
            _whole("maximum", self.maximum, 0, " or None")
            if self.maximum < self.minimum:
                raise ValueError(
                    f"The maximum {self.maximum} is less than the minimum {self.minimum}. "
                    f"Write at least {self.minimum}, or None for as many as the provider's limit allows."
                )
        for name in ("step_up", "step_down"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, " or None")
        for name in _DURATIONS:
            value = getattr(self, name)
            if not isinstance(value, timedelta) or value < timedelta(0):
                raise ValueError(f"{name} should be a timedelta from zero up, not {value!r}.")
        per = self.waiting_per_server
        if per is not None and (not _is_number(per) or per <= 0):
            raise ValueError(f"waiting_per_server should be a number greater than 0, or None; not {per!r}.")
        if not _is_number(self.hysteresis) or not 0 <= self.hysteresis < 1:
            raise ValueError(
                f"hysteresis should be a share from 0 up to, but less than, 1, such as 0.1; not {self.hysteresis!r}."
            )
        # Sorted once; and a copy, so that nobody changes what was checked.
        object.__setattr__(self, "waited", _thresholds(self.waited))

    def changed(self, **values: Any) -> Policy:
        """Return this one with other values. Raises ValueError as making one does."""
        return dataclasses.replace(self, **values)

    def bounded(self, count: int) -> int:
        """Return a count that is within the bounds."""
        return min(max(count, self.minimum), MOST if self.maximum is None else self.maximum)


@dataclass(frozen=True, slots=True)
class Standing:
    """What was decided so far of one type; kept in its ``Target`` row."""

    wanted: int
    raised_at: datetime | None = None
    """When ``wanted`` last rose."""
    lowered_at: datetime | None = None
    lower_since: datetime | None = None
    """Since when fewer than ``wanted`` have been asked for, without a break."""
    lower_peak: int | None = None
    """The most that was asked for in that time."""
    higher_since: datetime | None = None
    """Since when more than ``wanted`` have been asked for, without a break."""
    higher_low: int | None = None
    """The fewest that were asked for in that time."""
    asked_at: datetime | None = None
    """When something was last asked for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted from now on, and why, in words for people on call."""

    standing: Standing
    why: str

    @property
    def wanted(self) -> int:
        """Return the count."""
        return self.standing.wanted


def asked(load: Load, policy: Policy, wanted: int) -> tuple[int, str] | None:
    """
    Return how many servers this load asks for, and why; None where the load can't tell. ``wanted``: as of now.

    Of two rules, the one that asks for more. A rule whose number is not known is left out, and what the other one says
    is then good for more servers than are wanted now, never for fewer: to let servers go needs the whole picture.

    Jobs that run ask for servers by ``waiting_per_server`` alone. ``waited`` is about those that wait: when none does,
    it asks for none, whoever works on the last ones (often servers that are always there). They are not cut off: a
    server that is let go is drained first, and the idle ones go before it.
    """
    rules = []
    unknown = []
    if policy.waiting_per_server is not None:
        if load.waiting is None:
            unknown.append("how many jobs wait is not known")
        else:
            rules.append(_by_number(load.waiting, load.running, policy, wanted))
    if policy.waited:
        # Nobody has waited where nobody waits, even if the source has no ages.
        oldest = timedelta(0) if load.waiting == 0 else load.oldest
        if oldest is None:
            unknown.append("how long the oldest job has waited is not known")
        else:
            rules.append(_by_wait(oldest, load, policy, wanted))
    if not rules:
        return None
    # Of equals the first, so that the words are always the same.
    count, why = max(rules, key=lambda rule: rule[0])
    if unknown:
        if count < wanted:
            return wanted, f"{why}; but {unknown[0]}, so none of {wanted} {'is' if wanted == 1 else 'are'} let go"
        why = f"{why}; {unknown[0]}"
    return min(count, MOST), why


def decide(
    asked: int, why: str, standing: Standing, policy: Policy, now: datetime, *, gap: timedelta | None = None
) -> Decision:
    """
    Return what is wanted when so many are asked for: bounded, damped, and explained.

    1. What is asked for is brought within ``minimum`` and ``maximum``. So is what was wanted until now, at once and
       whatever is said below: somebody changed the bounds, and means it.
    2. Stabilization: the count rises, or falls, when that was asked for without a break for long enough, and only as
       far as was asked for all the time (the window of Kubernetes' horizontal autoscaler). Where nobody asked for
       longer than ``gap``, that is a break: what would have been asked for then is not known.
    3. Cool-down: it stays for a while after each change. A change by step 1 is not counted for the same decision.
    4. Steps: it moves by so many at a time. What is left needs no other stabilization (the cool-down says how long to
       wait between steps); when all of it is reached, it is counted anew.

    Times that lie in the future, since a clock went back, are taken as of now: nothing waits for them to come again.
    """
    said = [why]
    least, most = policy.minimum, MOST if policy.maximum is None else policy.maximum
    bounded = policy.bounded(asked)
    if bounded != asked:
        said.append(f"at least {least}" if bounded > asked else f"at most {most}")
    standing = _mended(standing, now)
    if gap is not None and standing.asked_at is not None and now - standing.asked_at > gap:
        standing = dataclasses.replace(standing, lower_since=None, lower_peak=None, higher_since=None, higher_low=None)
    changes = [moment for moment in (standing.raised_at, standing.lowered_at) if moment is not None]
    wanted = policy.bounded(standing.wanted)
    if wanted != standing.wanted:
        bound = f"below the minimum of {least}" if wanted > standing.wanted else f"above the maximum of {most}"
        said.append(f"{standing.wanted} until now was {bound}")
        standing = _moved(standing, wanted, now)
    standing = _noted(standing, bounded, now)

    if bounded > wanted:
        count, held = _damped(
            bounded,
            wanted,
            since=standing.higher_since or now,
            proven=standing.higher_low or bounded,
            stabilization=policy.stabilization_up,
            cool_down=policy.cool_down_up,
            step=policy.step_up,
            changed_at=max(changes, default=None),
            now=now,
        )
    elif bounded < wanted:
        count, held = _damped(
            bounded,
            wanted,
            since=standing.lower_since or now,
            proven=bounded if standing.lower_peak is None else standing.lower_peak,
            stabilization=policy.stabilization_down,
            cool_down=policy.cool_down_down,
            step=policy.step_down,
            changed_at=max(changes, default=None),
            now=now,
        )
    else:
        count, held = wanted, ""
    if held:
        said.append(held)
    if count != wanted:
        standing = _noted(_moved(standing, count, now), bounded, now)
    return Decision(standing, "; ".join(filter(None, said)))


def _whole(name: str, value: object, least: int, other: str = "") -> None:
    # A bool is an int to Python, and a slip of the pen to everybody else.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} should be a whole number from {least} up{other}, not {value!r}.")
    if value > MOST:
        raise ValueError(f"{name} should be at most {MOST}, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _thresholds(waited: object) -> dict[timedelta, int]:
    if not isinstance(waited, Mapping):
        raise ValueError(f"waited should be a dict such as {{timedelta(minutes=5): 3}}, not {waited!r}.")
    for wait, count in waited.items():
        if not isinstance(wait, timedelta) or wait < timedelta(0):
            raise ValueError(f"waited: {wait!r} should be a timedelta from zero up, such as timedelta(minutes=5).")
        _whole(f"waited: the count for {_span(wait)}", count, 0)
    ordered = sorted(waited.items())
    if ordered and ordered[-1][1] == 0:
        raise ValueError("waited asks for no server, however long a job waits. Write a count from 1 up, or no waited.")
    for (shorter, fewer), (longer, more) in pairwise(ordered):
        if more <= fewer:
            raise ValueError(
                f"waited: {more} from {_span(longer)} on is not more than {fewer} from {_span(shorter)} on. "
                "Write counts that grow with the wait."
            )
    return dict(ordered)


def _exact(number: float) -> Fraction:
    # As it was written: with floats, 18 jobs at 0.9 each would need 20.000000000000004 servers.
    return Fraction(str(number))


def _by_number(waiting: int, running: int | None, policy: Policy, wanted: int) -> tuple[int, str]:
    """Return the count that ``waiting_per_server`` asks for."""
    assert policy.waiting_per_server is not None
    per = _exact(policy.waiting_per_server)
    lowered = per * (1 - _exact(policy.hysteresis))
    jobs = waiting + (running or 0)
    text = f"{waiting} job{' waits' if waiting == 1 else 's wait'}"
    if running is not None:
        text += f" and {running} run{'s' if running == 1 else ''}"
    count = math.ceil(jobs / per)
    if count >= wanted:
        return count, f"{text}: {_servers(count)} at {_number(per)} each"
    kept = math.ceil(jobs / lowered)
    if kept < wanted:
        each = f"{_number(per)} each" if kept == count else f"{_number(lowered)} each on the way down"
        return kept, f"{text}: {_servers(kept)} at {each}"
    return wanted, f"{text}: {_servers(wanted)} kept until there are {math.floor((wanted - 1) * lowered)} or fewer"


def _by_wait(oldest: timedelta, load: Load, policy: Policy, wanted: int) -> tuple[int, str]:
    """Return the count that ``waited`` asks for."""
    # A job that waits from this moment on has waited for zero; so has none at all, and that is no reason for a server.
    any_waits = oldest > timedelta(0) or (load.waiting or 0) > 0

    def reached(share: float) -> int:
        counts = [count for wait, count in policy.waited.items() if any_waits and oldest >= wait * share]
        return counts[-1] if counts else 0

    def reached_by(count: int) -> timedelta:
        return next(wait for wait, enough in policy.waited.items() if enough >= count)

    text = f"the oldest job has waited {_span(oldest)}" if any_waits else "no job waits"
    count, share = reached(1), 1 - policy.hysteresis
    if count < (kept := min(reached(share), wanted)):
        return kept, f"{text}: {_servers(kept)} kept down to {_span(reached_by(kept) * share)}"
    if count:
        return count, f"{text}: {_servers(count)} from {_span(reached_by(count))} on"
    return 0, f"{text}: no server" + (f" before {_span(reached_by(1))}" if any_waits else "")


def _mended(standing: Standing, now: datetime) -> Standing:
    """Return it as its fields are meant, whoever wrote them: no time to come, nothing that ``wanted`` contradicts."""

    def passed(moment: datetime | None) -> datetime | None:
        return None if moment is None else min(moment, now)

    is_lower = standing.lower_peak is not None and standing.lower_peak < standing.wanted
    is_higher = standing.higher_low is not None and standing.higher_low > standing.wanted
    return Standing(
        wanted=standing.wanted,
        raised_at=passed(standing.raised_at),
        lowered_at=passed(standing.lowered_at),
        lower_since=passed(standing.lower_since) if is_lower else None,
        lower_peak=standing.lower_peak if is_lower and standing.lower_since else None,
        higher_since=passed(standing.higher_since) if is_higher else None,
        higher_low=standing.higher_low if is_higher and standing.higher_since else None,
        asked_at=passed(standing.asked_at),
    )


def _noted(standing: Standing, asked: int, now: datetime) -> Standing:
    """Return it with what is asked for now."""
    lower_peak, higher_low = standing.lower_peak, standing.higher_low
    is_lower, is_higher = asked < standing.wanted, asked > standing.wanted
    return dataclasses.replace(
        standing,
        lower_since=(standing.lower_since or now) if is_lower else None,
        lower_peak=max(asked, asked if lower_peak is None else lower_peak) if is_lower else None,
        higher_since=(standing.higher_since or now) if is_higher else None,
        higher_low=min(asked, asked if higher_low is None else higher_low) if is_higher else None,
        asked_at=now,
    )


def _moved(standing: Standing, wanted: int, now: datetime) -> Standing:
    """Return it with another count. What was asked for still counts, where it is as true of this one."""
    moved = dataclasses.replace(
        standing,
        wanted=wanted,
        raised_at=now if wanted > standing.wanted else standing.raised_at,
        lowered_at=now if wanted < standing.wanted else standing.lowered_at,
    )
    return _mended(moved, now)


def _damped(
    asked: int,
    wanted: int,
    *,
    since: datetime,
    proven: int,
    stabilization: timedelta,
    cool_down: timedelta,
    step: int | None,
    changed_at: datetime | None,
    now: datetime,
) -> tuple[int, str]:
    """Return how far the count moves now, and what holds it back, if anything does."""
    verb, quantity = ("rises", "more") if asked > wanted else ("falls", "fewer")
    if now - since < stabilization:
        until = _clock(since + stabilization, now)
        return wanted, f"{wanted} for now: {verb} when {quantity} are asked for until {until}"
    if changed_at is not None and now - changed_at < cool_down:
        return wanted, f"{wanted} for now: {verb} no sooner than {_clock(changed_at + cool_down, now)}, after a change"
    held = ""
    # Without a time to prove itself in, what is asked for now is all that counts.
    count = proven if stabilization else asked
    if count != asked:
        extreme = "fewest" if asked > wanted else "most"
        held = f"{count} for now: the {extreme} that were asked for since {_clock(since, now)}"
    if step is not None and abs(count - wanted) > step:
        count = wanted + step if count > wanted else wanted - step
        held = f"{count} for now: by {step} at a time"
    return count, held


def _servers(count: int) -> str:
    return f"{count} server{'' if count == 1 else 's'}"


def _number(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):.6g}"


def _clock(moment: datetime, now: datetime) -> str:
    """Return a moment for people, with its day where that is another one. Texts with one do not change each minute."""
    return f"{moment:%H:%M:%S}Z" if moment.date() == now.date() else f"{moment:%Y-%m-%d %H:%M:%S}Z"


def _span(span: timedelta) -> str:
    """Return a span of time in words that say all of it: "6 min 10 s"."""
    left = round(span.total_seconds())
    if 0 < span.total_seconds() < 1:
        return f"{span.total_seconds():.1g} s"
    parts = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts) or "0 s"

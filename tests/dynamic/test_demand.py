"""How many servers are wanted: tables of cases, and what holds for every load and every policy. No clock, no store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiserver_schedule.servers.demand import MOST, Decision, Policy, Standing, asked, decide
from multiserver_schedule.servers.entries import Load

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
NEVER = timedelta(0)

BY_NUMBER = Policy(waiting_per_server=50)
BY_WAIT = Policy(waited={MINUTE: 1, 5 * MINUTE: 3, 20 * MINUTE: 10})
BY_BOTH = BY_NUMBER.changed(waited=BY_WAIT.waited)
AT_ONCE = Policy(stabilization_down=NEVER)


# What a policy refuses.


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"minimum": -1}, "minimum should be a whole number from 0 up, not -1."),
        ({"minimum": True}, "minimum should be a whole number from 0 up, not True."),
        ({"minimum": 1.0}, "minimum should be a whole number from 0 up, not 1.0."),
        ({"minimum": None}, "minimum should be a whole number from 0 up, not None."),
        ({"maximum": -2}, "maximum should be a whole number from 0 up or None, not -2."),
        ({"maximum": False}, "maximum should be a whole number from 0 up or None, not False."),
        ({"maximum": 2**31}, "maximum should be at most 2147483647, not 2147483648."),
        ({"minimum": 3, "maximum": 2}, "The maximum 2 is less than the minimum 3. Write at least 3, or None"),
        ({"step_up": 0}, "step_up should be a whole number from 1 up or None, not 0."),
        ({"step_down": True}, "step_down should be a whole number from 1 up or None, not True."),
        ({"cool_down_up": -SECOND}, "cool_down_up should be a timedelta from zero up, not datetime.timedelta("),
        ({"cool_down_down": 60}, "cool_down_down should be a timedelta from zero up, not 60."),
        ({"stabilization_up": None}, "stabilization_up should be a timedelta from zero up, not None."),
        ({"stabilization_down": -MINUTE}, "stabilization_down should be a timedelta from zero up, not datetime"),
        ({"waiting_per_server": 0}, "waiting_per_server should be a number greater than 0, or None; not 0."),
        ({"waiting_per_server": -0.5}, "waiting_per_server should be a number greater than 0, or None; not -0.5."),
        ({"waiting_per_server": True}, "waiting_per_server should be a number greater than 0, or None; not True."),
        (
            {"waiting_per_server": float("nan")},
            "waiting_per_server should be a number greater than 0, or None; not nan",
        ),
        (
            {"waiting_per_server": float("inf")},
            "waiting_per_server should be a number greater than 0, or None; not inf",
        ),
        ({"waiting_per_server": "50"}, "waiting_per_server should be a number greater than 0, or None; not '50'."),
        ({"waited": [(MINUTE, 1)]}, "waited should be a dict such as {timedelta(minutes=5): 3}, not [("),
        ({"waited": {60: 1}}, "waited: 60 should be a timedelta from zero up, such as timedelta(minutes=5)."),
        ({"waited": {-MINUTE: 1}}, "should be a timedelta from zero up"),
        ({"waited": {MINUTE: -1}}, "waited: the count for 1 min should be a whole number from 0 up, not -1."),
        ({"waited": {MINUTE: True}}, "waited: the count for 1 min should be a whole number from 0 up, not True."),
        (
            {"waited": {5 * MINUTE: 2, MINUTE: 3}},
            "waited: 2 from 5 min on is not more than 3 from 1 min on. Write counts that grow with the wait.",
        ),
        ({"waited": {MINUTE: 3, 5 * MINUTE: 3}}, "waited: 3 from 5 min on is not more than 3 from 1 min on."),
        ({"waited": {MINUTE: 0}}, "waited asks for no server, however long a job waits."),
        ({"hysteresis": 1}, "hysteresis should be a share from 0 up to, but less than, 1, such as 0.1; not 1."),
        ({"hysteresis": -0.1}, "hysteresis should be a share from 0 up to, but less than, 1, such as 0.1; not -0.1."),
        ({"hysteresis": True}, "hysteresis should be a share"),
        ({"hysteresis": float("nan")}, "hysteresis should be a share"),
    ],
)
def test_a_policy_refuses_what_cannot_be_meant_and_says_what_to_write(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        Policy(**values)
    assert said in str(refused.value)
    with pytest.raises(ValueError):
        Policy().changed(**values)


def test_a_policy_takes_what_is_at_the_edge() -> None:
    Policy(minimum=0, maximum=0, step_up=1, step_down=1, waiting_per_server=0.001, hysteresis=0)
    Policy(minimum=3, maximum=3, waited={timedelta(0): 0, MINUTE: 1}, hysteresis=0.99)


def test_a_changed_policy_has_the_other_values_as_they_were() -> None:
    assert BY_NUMBER.changed(minimum=2) == Policy(waiting_per_server=50, minimum=2)


def test_the_thresholds_of_a_policy_stay_as_they_were_checked() -> None:
    waited = {5 * MINUTE: 3, MINUTE: 1}
    policy = Policy(waited=waited)
    waited[MINUTE] = 7
    assert list(policy.waited.items()) == [(MINUTE, 1), (5 * MINUTE, 3)]


# What a load asks for.


def waits(minutes: float, **more: Any) -> Load:
    return Load(oldest=minutes * MINUTE, **more)


@pytest.mark.parametrize(
    ("load", "policy", "wanted", "count", "why"),
    [
        (Load(waiting=0), BY_NUMBER, 0, 0, "0 jobs wait: 0 servers at 50 each"),
        (Load(waiting=1), BY_NUMBER, 0, 1, "1 job waits: 1 server at 50 each"),
        (Load(waiting=50), BY_NUMBER, 0, 1, "50 jobs wait: 1 server at 50 each"),
        (Load(waiting=51), BY_NUMBER, 0, 2, "51 jobs wait: 2 servers at 50 each"),
        (Load(waiting=120, running=3), BY_NUMBER, 0, 3, "120 jobs wait and 3 run: 3 servers at 50 each"),
        (Load(waiting=0, running=1), BY_NUMBER, 0, 1, "0 jobs wait and 1 runs: 1 server at 50 each"),
        (Load(waiting=99, running=2), BY_NUMBER, 0, 3, "99 jobs wait and 2 run: 3 servers at 50 each"),
        (Load(waiting=7), Policy(waiting_per_server=2.5), 0, 3, "7 jobs wait: 3 servers at 2.5 each"),
        # On the way down, from 3: it falls to 2 at 90 jobs, not at 100.
        (Load(waiting=100), BY_NUMBER, 3, 3, "100 jobs wait: 3 servers kept until there are 90 or fewer"),
        (Load(waiting=91), BY_NUMBER, 3, 3, "91 jobs wait: 3 servers kept until there are 90 or fewer"),
        (Load(waiting=90), BY_NUMBER, 3, 2, "90 jobs wait: 2 servers at 50 each"),
        (Load(waiting=46), BY_NUMBER, 3, 2, "46 jobs wait: 2 servers at 45 each on the way down"),
        (Load(waiting=0), BY_NUMBER, 3, 0, "0 jobs wait: 0 servers at 50 each"),
        (Load(waiting=100), BY_NUMBER.changed(hysteresis=0), 3, 2, "100 jobs wait: 2 servers at 50 each"),
        # Never to more than there were: 910 jobs are 19 servers at 50, and 21 at 45.
        (Load(waiting=910), BY_NUMBER, 20, 20, "910 jobs wait: 20 servers kept until there are 855 or fewer"),
        # Exact, where floats are not: 18 / (1 * (1 - 0.1)) is 20.
        (
            Load(waiting=18),
            Policy(waiting_per_server=1),
            21,
            20,
            "18 jobs wait: 20 servers at 0.9 each on the way down",
        ),
        (waits(0), BY_WAIT, 0, 0, "no job waits: no server"),
        (waits(0, running=3), BY_WAIT, 2, 0, "no job waits: no server"),
        (waits(1 / 6), BY_WAIT, 0, 0, "the oldest job has waited 10 s: no server before 1 min"),
        (waits(1), BY_WAIT, 0, 1, "the oldest job has waited 1 min: 1 server from 1 min on"),
        (waits(6 + 1 / 6), BY_WAIT, 0, 3, "the oldest job has waited 6 min 10 s: 3 servers from 5 min on"),
        (waits(5), BY_WAIT, 3, 3, "the oldest job has waited 5 min: 3 servers from 5 min on"),
        (waits(5), BY_WAIT, 10, 3, "the oldest job has waited 5 min: 3 servers from 5 min on"),
        (waits(60 * 30), BY_WAIT, 0, 10, "the oldest job has waited 1 d 6 h: 10 servers from 20 min on"),
        (waits(4.75), BY_WAIT, 3, 3, "the oldest job has waited 4 min 45 s: 3 servers kept down to 4 min 30 s"),
        (waits(4.75), BY_WAIT, 10, 3, "the oldest job has waited 4 min 45 s: 3 servers kept down to 4 min 30 s"),
        (waits(4.75), BY_WAIT, 2, 2, "the oldest job has waited 4 min 45 s: 2 servers kept down to 4 min 30 s"),
        (waits(4.4), BY_WAIT, 3, 1, "the oldest job has waited 4 min 24 s: 1 server from 1 min on"),
        (waits(0.95), BY_WAIT, 1, 1, "the oldest job has waited 57 s: 1 server kept down to 54 s"),
        # A source without ages still knows that none waits.
        (Load(waiting=0), BY_WAIT, 3, 0, "no job waits: no server"),
        # From the first moment on: when a job waits, and not when none does.
        (
            Load(waiting=2, oldest=NEVER),
            Policy(waited={NEVER: 1}),
            0,
            1,
            "the oldest job has waited 0 s: 1 server from 0 s on",
        ),
        (Load(waiting=0, oldest=NEVER), Policy(waited={NEVER: 1}), 1, 0, "no job waits: no server"),
        # Both rules: the one that asks for more.
        (waits(6, waiting=10), BY_BOTH, 0, 3, "the oldest job has waited 6 min: 3 servers from 5 min on"),
        (waits(6, waiting=500), BY_BOTH, 0, 10, "500 jobs wait: 10 servers at 50 each"),
        (waits(6, waiting=120), BY_BOTH, 0, 3, "120 jobs wait: 3 servers at 50 each"),
        # One rule knows: enough for more servers, and never for fewer.
        (
            Load(waiting=120),
            BY_BOTH,
            1,
            3,
            "120 jobs wait: 3 servers at 50 each; how long the oldest job has waited is not known",
        ),
        (
            Load(waiting=20),
            BY_BOTH,
            3,
            3,
            "20 jobs wait: 1 server at 50 each; but how long the oldest job has waited is not known, "
            "so none of 3 are let go",
        ),
        (
            waits(0.5),
            BY_BOTH,
            1,
            1,
            "the oldest job has waited 30 s: no server before 1 min; but how many jobs wait is not known, "
            "so none of 1 is let go",
        ),
        (
            waits(6),
            BY_BOTH,
            0,
            3,
            "the oldest job has waited 6 min: 3 servers from 5 min on; how many jobs wait is not known",
        ),
    ],
)
def test_a_load_asks_for_so_many_servers(load: Load, policy: Policy, wanted: int, count: int, why: str) -> None:
    assert asked(load, policy, wanted) == (count, why)


@pytest.mark.parametrize(
    ("load", "policy"),
    [
        (Load(), BY_BOTH),
        (Load(running=3), BY_BOTH),
        (waits(7), BY_NUMBER),
        (Load(waiting=7), BY_WAIT),
        (waits(7, waiting=100), Policy()),
    ],
)
def test_where_the_load_cannot_tell_it_does_not_guess(load: Load, policy: Policy) -> None:
    assert asked(load, policy, 3) is None


# What is decided.


def after(*asks: int, policy: Policy, start: Standing, every: timedelta = MINUTE) -> list[Decision]:
    """Return what is decided when so many are asked for, one after the other."""
    decided = []
    for number, ask in enumerate(asks):
        decided.append(decide(ask, "", start, policy, NOON + number * every))
        start = decided[-1].standing
    return decided


def counts(decided: Iterable[Decision]) -> list[int]:
    return [decision.wanted for decision in decided]


@pytest.mark.parametrize(
    ("policy", "start", "asks", "wanted"),
    [
        # It rises at once, and falls after five minutes, to the most that was asked for in them.
        (Policy(), 0, [3], [3]),
        (Policy(), 3, [1] * 7, [3, 3, 3, 3, 3, 1, 1]),
        (Policy(), 3, [0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 0]),
        # One minute in which as many are needed as there are, and the five minutes begin again.
        (Policy(), 3, [1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1], [3] * 10 + [1]),
        # More at once; and then, too, they begin again.
        (Policy(), 3, [1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1], [3] * 4 + [4] * 6 + [1]),
        # A rise that has to be asked for, for two minutes: to the fewest of them.
        (Policy(stabilization_up=2 * MINUTE), 1, [9, 3, 5, 5, 5], [1, 1, 3, 3, 5]),
        (Policy(stabilization_up=2 * MINUTE), 1, [9, 1, 9, 9, 9], [1, 1, 1, 1, 9]),
        # Bounds, whatever is asked for.
        (AT_ONCE.changed(minimum=2, maximum=4), 3, [0, 9, 3, -5], [2, 4, 3, 2]),
        # Steps.
        (AT_ONCE.changed(step_up=2), 0, [5, 5, 5, 0], [2, 4, 5, 0]),
        (AT_ONCE.changed(step_down=2), 5, [0, 0, 0], [3, 1, 0]),
        # What has proved itself for five minutes has not to do so again for each step; the cool-down spaces them.
        (Policy(step_down=1), 4, [1] * 9, [4, 4, 4, 4, 4, 3, 2, 1, 1]),
        (Policy(step_down=1, cool_down_down=2 * MINUTE), 3, [1] * 8, [3, 3, 3, 3, 3, 2, 2, 1]),
        # Cool-down, after a change in either direction.
        (AT_ONCE.changed(cool_down_up=3 * MINUTE), 0, [1, 2, 2, 2, 2], [1, 1, 1, 2, 2]),
        (AT_ONCE.changed(cool_down_up=3 * MINUTE), 5, [1, 2, 2, 2, 2], [1, 1, 1, 2, 2]),
        (AT_ONCE.changed(cool_down_down=3 * MINUTE), 0, [2, 1, 1, 1, 1], [2, 2, 2, 1, 1]),
        (AT_ONCE.changed(cool_down_down=3 * MINUTE), 2, [1, 0, 3, 0, 0, 0], [1, 1, 3, 3, 3, 0]),
        # Without stabilization, the fewest of the time in which the cool-down held it back are no news.
        (AT_ONCE.changed(cool_down_up=2 * MINUTE), 0, [1, 2, 9], [1, 1, 9]),
    ],
)
def test_the_count_moves_as_its_policy_says(policy: Policy, start: int, asks: list[int], wanted: list[int]) -> None:
    assert counts(after(*asks, policy=policy, start=Standing(start))) == wanted


@pytest.mark.parametrize(
    ("minutes", "asks", "wanted"),
    [
        # Nobody asked from noon to three: one answer does not say what was so in between.
        ([0, 180, 181, 184, 185], [2, 2, 2, 2, 2], [5, 5, 5, 5, 2]),
        # Nor to which count it may fall, or rise.
        ([0, 180, 183, 185], [4, 2, 2, 2], [5, 5, 5, 2]),
        ([0, 180, 181, 182], [9, 7, 8, 8], [5, 5, 5, 7]),
        # A pass or two may be missed.
        ([0, 3, 6], [2, 2, 2], [5, 5, 2]),
        ([0, 3, 6.1, 7], [2, 2, 2, 2], [5, 5, 5, 5]),
    ],
)
def test_what_was_asked_for_before_a_gap_proves_nothing_after_it(
    minutes: list[float], asks: list[int], wanted: list[int]
) -> None:
    policy, standing, found = Policy(stabilization_up=2 * MINUTE), Standing(5), []
    for minute, ask in zip(minutes, asks, strict=True):
        decided = decide(ask, "", standing, policy, NOON + minute * MINUTE, gap=3 * MINUTE)
        standing = decided.standing
        found.append(decided.wanted)
    assert found == wanted


def test_when_it_rose_and_fell_is_kept() -> None:
    first, second, third = after(3, 3, 0, policy=AT_ONCE, start=Standing(1))
    assert (first.standing.raised_at, first.standing.lowered_at) == (NOON, None)
    assert second.standing == dataclasses.replace(first.standing, asked_at=NOON + MINUTE)
    assert (third.standing.raised_at, third.standing.lowered_at) == (NOON, NOON + 2 * MINUTE)


@pytest.mark.parametrize("policy", [Policy(minimum=3), Policy(maximum=3)])
def test_a_count_outside_new_bounds_is_put_right_at_once_whatever_damps_it(policy: Policy) -> None:
    damped = policy.changed(
        step_up=1,
        step_down=1,
        cool_down_up=HOUR,
        cool_down_down=HOUR,
        stabilization_up=HOUR,
        stabilization_down=HOUR,
    )
    until_now = Standing(0 if policy.minimum else 9, raised_at=NOON - SECOND, lowered_at=NOON - SECOND)
    for ask in (0, 3, 9):
        decided = decide(ask, "", until_now, damped, NOON)
        assert decided.wanted == 3
        assert NOON in (decided.standing.raised_at, decided.standing.lowered_at)


def test_a_correction_is_no_change_that_the_same_decision_has_to_cool_down_from() -> None:
    policy = Policy(minimum=2, cool_down_up=HOUR)
    assert decide(7, "", Standing(0, raised_at=NOON - HOUR), policy, NOON).wanted == 7
    assert decide(7, "", Standing(0, raised_at=NOON - MINUTE), policy, NOON).wanted == 2


@pytest.mark.parametrize(
    ("ask", "standing", "policy", "why"),
    [
        (3, Standing(3), Policy(), "asked"),
        (3, Standing(1), Policy(), "asked"),
        (9, Standing(4), Policy(maximum=4), "asked; at most 4"),
        (0, Standing(2), Policy(minimum=2), "asked; at least 2"),
        (3, Standing(1), Policy(minimum=2), "asked; 1 until now was below the minimum of 2"),
        (3, Standing(9), Policy(maximum=4, stabilization_down=NEVER), "asked; 9 until now was above the maximum of 4"),
        (1, Standing(3), Policy(), "asked; 3 for now: falls when fewer are asked for until 12:05:00Z"),
        (
            1,
            Standing(3, lower_since=NOON - 5 * MINUTE, lower_peak=2),
            Policy(),
            "asked; 2 for now: the most that were asked for since 11:55:00Z",
        ),
        (
            5,
            Standing(3, higher_since=NOON - MINUTE, higher_low=4),
            Policy(stabilization_up=MINUTE),
            "asked; 4 for now: the fewest that were asked for since 11:59:00Z",
        ),
        (
            5,
            Standing(3, lowered_at=NOON - MINUTE),
            Policy(cool_down_up=13 * HOUR),
            "asked; 3 for now: rises no sooner than 2030-01-02 00:59:00Z, after a change",
        ),
        (5, Standing(0), Policy(step_up=2), "asked; 2 for now: by 2 at a time"),
    ],
)
def test_the_words_say_what_held_the_count_back(ask: int, standing: Standing, policy: Policy, why: str) -> None:
    assert decide(ask, "asked", standing, policy, NOON).why == why


def test_the_words_stay_the_same_while_nothing_changes() -> None:
    # Equal decisions share a row in the history: five minutes of waiting are one row, and not five.
    assert len({decision.why for decision in after(1, 1, 1, 1, 1, policy=Policy(), start=Standing(3))}) == 1


def test_a_clock_that_went_back_holds_nothing_up_for_longer_than_the_policy_does() -> None:
    policy = Policy(cool_down_down=10 * MINUTE, cool_down_up=10 * MINUTE, stabilization_up=MINUTE)
    next_year = NOON + 365 * 24 * HOUR
    for ask, damped in ((0, "lower"), (9, "higher")):
        start = Standing(5, raised_at=next_year, lowered_at=next_year)
        start = dataclasses.replace(
            start, **{f"{damped}_since": next_year, "lower_peak" if ask == 0 else "higher_low": ask}
        )
        assert counts(after(*[ask] * 12, policy=policy, start=start)) == [5] * 10 + [ask] * 2


@pytest.mark.parametrize(
    "left_behind",
    [
        {"lower_since": NOON - HOUR, "lower_peak": 7},
        {"lower_since": NOON - HOUR, "lower_peak": 5},
        {"lower_since": NOON - HOUR},
        {"lower_peak": 2},
        {"lower_since": NOON - HOUR, "lower_peak": 0, "higher_since": NOON - HOUR, "higher_low": 9},
    ],
)
def test_what_no_longer_fits_a_count_that_was_set_by_hand_moves_it_nowhere(left_behind: dict[str, Any]) -> None:
    decided = decide(5, "", Standing(5, **left_behind), Policy(), NOON)
    assert decided.standing == Standing(5, asked_at=NOON)
    assert decide(3, "", Standing(5, lower_since=NOON - HOUR, lower_peak=7), Policy(), NOON).wanted == 5


def test_nothing_that_no_database_could_keep_is_ever_wanted() -> None:
    assert decide(10**15, "", Standing(0), Policy(), NOON).wanted == MOST


# What holds for every policy, load and history.

COUNTS = st.integers(0, 30)
DURATIONS = st.sampled_from([NEVER, NEVER, MINUTE, 5 * MINUTE, 7 * MINUTE, HOUR])
STEPS = st.one_of(st.none(), st.integers(1, 5))
MOMENTS = st.one_of(st.none(), st.integers(-120, 120).map(lambda minutes: NOON + minutes * MINUTE))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    minimum = draw(st.integers(0, 8))
    thresholds = st.dictionaries(st.integers(0, 60), st.integers(1, 9), max_size=4)
    total, waited = 0, {}
    for minutes, more in sorted(draw(thresholds).items()):
        total += more
        waited[minutes * MINUTE] = total
    return Policy(
        minimum=minimum,
        maximum=draw(st.one_of(st.none(), st.integers(minimum, 25))),
        step_up=draw(STEPS),
        step_down=draw(STEPS),
        cool_down_up=draw(DURATIONS),
        cool_down_down=draw(DURATIONS),
        stabilization_up=draw(DURATIONS),
        stabilization_down=draw(DURATIONS),
        waiting_per_server=draw(st.one_of(st.none(), st.sampled_from([0.1, 0.7, 1, 3, 50]))),
        waited=waited,
        hysteresis=draw(st.sampled_from([0, 0.1, 0.25, 0.9])),
    )


STANDINGS = st.builds(
    Standing,
    wanted=COUNTS,
    raised_at=MOMENTS,
    lowered_at=MOMENTS,
    lower_since=MOMENTS,
    lower_peak=st.one_of(st.none(), COUNTS),
    higher_since=MOMENTS,
    higher_low=st.one_of(st.none(), COUNTS),
    asked_at=MOMENTS,
)
LOADS = st.builds(
    Load,
    waiting=st.one_of(st.none(), st.integers(0, 500)),
    oldest=st.one_of(st.none(), st.integers(0, 7200).map(lambda seconds: seconds * SECOND)),
    running=st.one_of(st.none(), st.integers(0, 50)),
)


def within(count: int, policy: Policy) -> int:
    return min(max(count, policy.minimum), MOST if policy.maximum is None else policy.maximum)


@settings(max_examples=150, deadline=None)
@given(COUNTS, STANDINGS, policies())
def test_a_count_is_within_its_bounds_and_moves_by_a_step_at_most_and_towards_what_is_asked(
    ask: int, standing: Standing, policy: Policy
) -> None:
    decided = decide(ask, "why", standing, policy, NOON)
    before, target = within(standing.wanted, policy), within(ask, policy)
    assert decided.wanted == within(decided.wanted, policy)
    assert min(before, target) <= decided.wanted <= max(before, target)
    assert decided.wanted - before <= (policy.step_up or MOST)
    assert before - decided.wanted <= (policy.step_down or MOST)
    # The same again, word for word.
    assert decided == decide(ask, "why", standing, policy, NOON)


@settings(max_examples=150, deadline=None)
@given(COUNTS, COUNTS, STANDINGS, policies())
def test_who_asks_for_more_does_not_get_fewer(one: int, other: int, standing: Standing, policy: Policy) -> None:
    few, many = sorted((one, other))
    assert decide(few, "", standing, policy, NOON).wanted <= decide(many, "", standing, policy, NOON).wanted


@settings(max_examples=100, deadline=None)
@given(COUNTS, STANDINGS, policies())
def test_what_is_asked_for_all_the_time_is_reached_and_kept(ask: int, standing: Standing, policy: Policy) -> None:
    target = within(ask, policy)
    # Times to come are as of now: once the longest damping, then a step for each cool-down.
    steps = abs(within(standing.wanted, policy) - target) + 2
    longest = max(
        policy.cool_down_up, policy.cool_down_down, policy.stabilization_up, policy.stabilization_down, MINUTE
    )
    decided = counts(after(*[ask] * (steps + 2), policy=policy, start=standing, every=longest))
    assert decided[-2:] == [target, target]
    # There and not beyond, without turning back.
    assert decided in (sorted(decided), sorted(decided, reverse=True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(5, 6), min_size=240, max_size=240), st.sampled_from([5, 6]))
def test_an_hour_of_asking_for_five_or_six_by_turns_changes_the_count_once_at_most(asks: list[int], start: int) -> None:
    # A pass every 15 s; six at least every four minutes, which is no reason to let one go.
    noisy = [6 if number % 16 == 0 else ask for number, ask in enumerate(asks)]
    decided = [start, *counts(after(*noisy, policy=Policy(), start=Standing(start), every=15 * SECOND))]
    assert sum(before != then for before, then in pairwise(decided)) <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(-50, 50), min_size=60, max_size=60), st.booleans())
def test_a_load_that_wobbles_around_a_threshold_changes_the_count_once_at_most(
    threshold: int, wobble: list[int], by_wait: bool
) -> None:
    # By half of the hysteresis, in thousandths of the threshold, with nothing else to damp it.
    policy = AT_ONCE.changed(waited={HOUR: 1, 2 * HOUR: 2}) if by_wait else AT_ONCE.changed(waiting_per_server=1000)
    standing, seen = None, []
    for thousandths in wobble:
        if by_wait:
            load = Load(oldest=HOUR + thousandths * HOUR / 1000)
        else:
            load = Load(waiting=threshold * 1000 + threshold * thousandths)
        found = asked(load, policy, standing.wanted if standing else 0)
        assert found is not None
        standing = decide(*found, standing or Standing(found[0]), policy, NOON).standing
        seen.append(standing.wanted)
    if by_wait:
        assert sum(one != other for one, other in pairwise(seen)) <= 1
    else:
        # A high threshold is wider than a server: the count may rise by several, and never turns back.
        assert seen == sorted(seen)


@settings(max_examples=150, deadline=None)
@given(LOADS, policies(), COUNTS, st.integers(0, 100), st.integers(0, 100))
def test_more_load_does_not_ask_for_fewer(load: Load, policy: Policy, wanted: int, jobs: int, minutes: int) -> None:
    if load.waiting is None or load.oldest is None:
        more = load
    else:
        more = dataclasses.replace(load, waiting=load.waiting + jobs, oldest=load.oldest + minutes * MINUTE)
    one, other = asked(load, policy, wanted), asked(more, policy, wanted)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one[0] <= other[0]


@settings(max_examples=150, deadline=None)
@given(LOADS, policies(), COUNTS)
def test_hysteresis_keeps_servers_and_never_adds_one(load: Load, policy: Policy, wanted: int) -> None:
    with_it, without = asked(load, policy, wanted), asked(load, policy.changed(hysteresis=0), wanted)
    assert (with_it is None) == (without is None)
    if with_it is not None and without is not None:
        assert without[0] <= with_it[0] <= max(without[0], wanted)


@settings(max_examples=100, deadline=None)
@given(LOADS, policies(), COUNTS)
def test_half_a_load_never_lets_a_server_go(load: Load, policy: Policy, wanted: int) -> None:
    blind = [dataclasses.replace(load, waiting=None), dataclasses.replace(load, oldest=None, waiting=load.waiting or 1)]
    for half in blind:
        found = asked(half, policy.changed(waiting_per_server=7, waited={MINUTE: 2}), wanted)
        assert found is None or found[0] >= wanted

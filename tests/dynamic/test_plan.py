"""Who is made, and who goes: tables of cases, and what holds for every fleet. No clock, no store, no provider."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from multiserver_schedule.servers.plan import Known, Needs, Plan, Room, plan
from multiserver_schedule.servers.states import PROVISIONED, Status

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def server(text: str) -> Known:
    """
    Return a server from words: "w1 running 90m jobs=0 at=ec2 reboots".

    90 minutes old (an hour by default), and billed for as long, unless it is new; at "up".
    """
    name, status, *more = text.split()
    values: dict[str, Any] = {"provider": "up", "jobs": None, "reboots": False}
    age = HOUR
    for word in more:
        key, _, value = word.partition("=")
        if key == "at":
            values["provider"] = value
        elif key == "jobs":
            values["jobs"] = int(value)
        elif key == "reboots":
            values["reboots"] = True
        else:
            age = float(word[:-1]) * {"s": MINUTE / 60, "m": MINUTE, "h": HOUR, "d": DAY}[word[-1]]
    billed = None if status == "new" else NOON - age
    return Known(name=name, status=Status(status), since=NOON - age, billed_since=billed, **values)


def rooms(text: str) -> dict[str, Room]:
    """Return rooms from words: "up 3/5, ec2 0/9 closed"."""
    found = {}
    for one in filter(None, text.split(", ")):
        name, places, *closed = one.split()
        used, limit = map(int, places.split("/"))
        found[name] = Room(name, limit, used, closed="no answer since 12:03:20Z" if closed else "")
    return found


def planned(wanted: int, fleet: str, places: str, *, at: str = "up ec2", **more: Any) -> Plan:
    needs = Needs("default", wanted, at.split(), **more)
    return plan(needs, [server(line) for line in filter(None, fleet.split("; "))], rooms(places), NOON)


def words(found: Plan) -> str:
    """Return a plan in words: "+up +ec2 cancel w1 drain w2 short 3"."""
    said = [f"+{create.provider}" for create in found.creates]
    said += [f"cancel {cancel.name}" for cancel in found.cancels]
    said += [f"drain {drain.name}" for drain in found.drains]
    return " ".join([*said, f"short {found.short.missing}"] if found.short else said)


@pytest.mark.parametrize(
    ("wanted", "fleet", "places", "expected"),
    [
        # Nothing to do.
        (0, "", "up 0/5", ""),
        (2, "w1 running; w2 starting", "up 2/5", ""),
        (4, "w1 new; w2 starting; w3 running; w4 rebooting", "up 4/5", ""),
        # Too few.
        (2, "", "up 0/5", "+up +up"),
        (3, "w1 running", "up 1/5", "+up +up"),
        # Those that leave or went wrong do no work, and take up their places.
        (2, "w1 draining; w2 stopping; w3 stopped; w4 deleting", "up 4/9", "+up +up"),
        (1, "w1 errored; w2 hanging", "up 2/9", "+up"),
        # One that is drained for a reboot will work again.
        (1, "w1 draining reboots", "up 1/5", ""),
        # The limit is exact: the last place is taken, and no more than that.
        (5, "w1 running; w2 running; w3 running; w4 running", "up 4/5", "+up"),
        (6, "w1 running; w2 running; w3 running; w4 running", "up 4/5", "+up short 1"),
        (1, "", "up 5/5", "short 1"),
        (1, "", "up 7/5", "short 1"),
        (1, "", "up 0/0", "short 1"),
        # What one has no room for is made at the next; where nothing is heard, nothing is made.
        (3, "", "up 4/5, ec2 0/9", "+up +ec2 +ec2"),
        (2, "", "up 5/5, ec2 0/9", "+ec2 +ec2"),
        (2, "", "up 0/5 closed, ec2 0/9", "+ec2 +ec2"),
        (3, "", "up 4/5, ec2 8/9", "+up +ec2 short 1"),
        (3, "", "up 0/5 closed, ec2 8/9", "+ec2 short 2"),
        (2, "", "up 0/5 closed, ec2 0/9 closed", "short 2"),
        # A provider that the settings do not have any more, and one that this type is not made at.
        (2, "", "ec2 0/9", "+ec2 +ec2"),
        (2, "", "other 0/9", "short 2"),
        # Too many: those that do no work yet go first, the newest of them before the others.
        (0, "w1 new; w2 starting; w3 rebooting; w4 running", "up 4/5", "cancel w1 cancel w2 cancel w3 drain w4"),
        (1, "w1 running; w2 starting", "up 2/5", "cancel w2"),
        (2, "w1 running; w2 starting; w3 new", "up 3/5", "cancel w3"),
        (1, "w1 new 3m; w2 new 1m; w3 new 2m", "up 3/5", "cancel w2 cancel w3"),
        (1, "w1 starting 3m; w2 starting 1m; w3 starting 2m", "up 3/5", "cancel w2 cancel w3"),
        (1, "w1 running; w2 rebooting", "up 2/5", "cancel w2"),
        (1, "w1 running jobs=0; w2 draining reboots", "up 2/5", "drain w2"),
        # Those that leave already are no victims.
        (1, "w1 running; w2 draining; w3 stopping; w4 errored", "up 4/5", ""),
        (0, "w1 draining; w2 hanging; w3 deleting", "up 3/5", ""),
        # Of those that run: the idle, then those of which it is not known, then the least busy.
        (2, "w1 running jobs=1; w2 running; w3 running jobs=0", "up 3/5", "drain w3"),
        (1, "w1 running jobs=1; w2 running; w3 running jobs=0", "up 3/5", "drain w3 drain w2"),
        (2, "w1 running jobs=9; w2 running jobs=1; w3 running jobs=5", "up 3/5", "drain w2"),
        (1, "w1 running jobs=9; w2 running jobs=1; w3 running jobs=5", "up 3/5", "drain w2 drain w3"),
        # Of equals, the one whose paid hour ends soonest, however old it is.
        (2, "w1 running 10m; w2 running 55m; w3 running 50m", "up 3/5", "drain w2"),
        (2, "w1 running 10m; w2 running 175m; w3 running 50m", "up 3/5", "drain w2"),
        (2, "w1 running 10m; w2 running 180m; w3 running 50m", "up 3/5", "drain w3"),
        (2, "w1 running 59m jobs=1; w2 running 1m jobs=0; w3 running 59m", "up 3/5", "drain w2"),
        # Of those, too, by name.
        (2, "w3 running; w1 running; w2 running", "up 3/5", "drain w1"),
        # A type that the code does not have any more: nothing is wanted of it, whatever its provider does.
        (0, "w1 running; w2 new", "up 2/5 closed", "cancel w2 drain w1"),
        (0, "w1 running; w2 new", "", "cancel w2 drain w1"),
    ],
)
def test_a_fleet_is_brought_to_what_is_wanted(wanted: int, fleet: str, places: str, expected: str) -> None:
    assert words(planned(wanted, fleet, places)) == expected


def test_without_a_billing_period_the_newest_goes_first() -> None:
    fleet = "w1 running 3h; w2 running 1m; w3 running 59m"
    assert words(planned(2, fleet, "up 3/5", billing_period=None)) == "drain w2"
    assert words(planned(2, fleet, "up 3/5")) == "drain w3"
    assert words(planned(2, fleet, "up 3/5", billing_period=timedelta(hours=3))) == "drain w3"
    assert words(planned(2, fleet, "up 3/5", billing_period=timedelta(hours=3, minutes=1))) == "drain w1"


def test_a_plan_begins_a_hundred_at_most_and_the_next_one_goes_on() -> None:
    # A slip of the pen, and a limit that is none: all of it at once would not fit into memory.
    found = planned(2**31 - 1, "", "up 0/1000000000000")
    assert [create.provider for create in found.creates] == ["up"] * 100
    assert found.short is None
    assert found.why.endswith(": 100 to create, 2147483547 more afterwards, 100 at a time")
    there = "; ".join(f"w{number} starting" for number in range(100))
    assert words(planned(130, there, "up 100/120")) == " ".join(["+up"] * 20) + " short 10"


def test_a_type_that_is_made_nowhere_is_short_of_all_that_is_wanted() -> None:
    found = planned(2, "", "up 0/5", at="")
    assert words(found) == "short 2"
    assert found.short is not None and "no provider is named for this type" in found.short.why


def test_a_provider_that_is_named_twice_has_no_more_room_for_it() -> None:
    assert words(planned(3, "", "up 3/5", at="up up")) == "+up +up short 1"


@pytest.mark.parametrize(
    ("wanted", "fleet", "places", "expected"),
    [
        # Its provider does not answer, and another one has room: after a minute.
        (1, "w1 new 61s", "up 1/5 closed, ec2 0/9", "+ec2 cancel w1"),
        (1, "w1 new 60s", "up 1/5 closed, ec2 0/9", "+ec2 cancel w1"),
        (1, "w1 new 59s", "up 1/5 closed, ec2 0/9", ""),
        # In either direction: it is the trouble that counts, not the preference.
        (1, "w1 new 5m at=ec2", "up 0/5, ec2 1/9 closed", "+up cancel w1"),
        (1, "w1 new 5m at=ec2", "up 0/5, ec2 1/9", ""),
        # As many as there is room for, those that wait longest.
        (3, "w1 new 3m; w2 new 9m; w3 new 5m", "up 3/5 closed, ec2 7/9", "+ec2 +ec2 cancel w2 cancel w3"),
        (2, "w1 new 5m; w2 new 5m", "up 2/5 closed, ec2 9/9", ""),
        (2, "w1 new 5m; w2 new 5m", "up 2/5 closed, ec2 0/9 closed", ""),
        (1, "w1 new 5m", "up 1/5 closed", ""),
        # What is missing goes before: its room is not there for these.
        (3, "w1 new 5m; w2 new 5m", "up 2/5 closed, ec2 7/9", "+ec2 +ec2 cancel w1"),
        # Those that have a place at their provider keep it; of the others, only so many as are too many.
        (2, "w1 new 5m; w2 new 5m", "up 5/5, ec2 0/9", ""),
        (2, "w1 new 5m; w2 new 4m", "up 6/5, ec2 0/9", "+ec2 cancel w2"),
        (2, "w1 new 5m; w2 new 5m", "up 9/5, ec2 0/9", "+ec2 +ec2 cancel w1 cancel w2"),
        (1, "w1 new 5m; w2 new 4m", "up 6/5, ec2 0/9", "cancel w2"),
        # Its creation was begun: it stays where it is.
        (1, "w1 starting 9m", "up 1/5 closed, ec2 0/9", ""),
        # Its provider is gone from the settings.
        (1, "w1 new 5m at=old", "up 0/5, ec2 0/9", "+up cancel w1"),
        # One that gets nowhere is the first to go, before a newer one that will soon be there.
        (1, "w1 new 5m; w2 new 1m at=ec2", "up 1/5 closed, ec2 9/9", "cancel w1"),
        (1, "w1 new 5m; w2 new 1m at=ec2; w3 new 9m", "up 2/5 closed, ec2 9/9", "cancel w1 cancel w3"),
        (2, "w1 new 5m; w2 new 1m at=ec2; w3 new 9m", "up 2/5 closed, ec2 8/9", "+ec2 cancel w1 cancel w3"),
    ],
)
def test_one_that_waits_in_vain_is_made_elsewhere(wanted: int, fleet: str, places: str, expected: str) -> None:
    assert words(planned(wanted, fleet, places)) == expected


WEEK = {"max_age": timedelta(days=7)}


@pytest.mark.parametrize(
    ("wanted", "fleet", "places", "expected"),
    [
        (2, "w1 running 7d; w2 running 1d", "up 2/5", ""),
        (2, "w1 running 8d; w2 running 1d", "up 2/5", "+up"),
        (2, "w1 running 8d; w2 running 9d", "up 2/5", "+up"),
        # Nobody goes before the new one runs, and no other one is made.
        (2, "w1 running 8d; w2 running 9d; w3 new", "up 3/5", ""),
        (2, "w1 running 8d; w2 running 9d; w3 starting", "up 3/5", ""),
        # Then one goes, although another one is idle or has its hour end; and nothing else begins before it is gone.
        (2, "w1 running 8d jobs=5; w2 running 1d jobs=0; w3 running 55m jobs=0", "up 3/5", "drain w1"),
        (2, "w1 running 8d jobs=1; w2 running 9d jobs=0; w3 running 1m", "up 3/5", "drain w2"),
        (2, "w1 running 8d; w2 draining 9d; w3 running 1m", "up 3/5", ""),
        (2, "w1 running 8d; w2 deleting 9d; w3 running 1m", "up 3/5", ""),
        (2, "w1 running 8d; w3 running 1m", "up 2/5", "+up"),
        # Nothing begins while something is on its way, or went wrong.
        (2, "w1 running 8d; w2 starting", "up 2/5", ""),
        (2, "w1 running 8d; w2 rebooting", "up 2/5", ""),
        (1, "w1 running 8d; w2 errored", "up 2/5", ""),
        # What is missing, or too many, goes before.
        (3, "w1 running 8d; w2 running", "up 2/5", "+up"),
        (1, "w1 running 8d; w2 running jobs=0", "up 2/5", "drain w1"),
        (1, "w1 running 8d; w2 running jobs=1; w3 running jobs=0", "up 3/5", "drain w1 drain w3"),
        (0, "w1 running 8d; w2 starting", "up 2/5", "cancel w2 drain w1"),
        # Fewer are wanted while a new one is coming: one of the newcomers is left, where there are several.
        (1, "w1 running 8d; w2 running; w3 starting", "up 3/5", "cancel w3 drain w1"),
        (2, "w1 running 8d; w2 running; w3 starting 1m; w4 starting 2m", "up 4/5", "cancel w3"),
        # At another provider, where the first has no room.
        (1, "w1 running 8d", "up 5/5, ec2 0/9", "+ec2"),
        # No room anywhere: the old one first, if its place can be had again.
        (1, "w1 running 8d", "up 5/5", "drain w1"),
        (2, "w1 running 8d; w2 running 9d jobs=0", "up 5/5", "drain w2"),
        (2, "w1 running 8d at=ec2; w2 running", "up 5/5, ec2 9/9", "drain w1"),
        (1, "w1 draining 8d", "up 5/5", "short 1"),
        (1, "w1 running 8d", "up 6/5", ""),
        (1, "w1 running 8d", "up 0/5 closed", ""),
        (1, "w1 running 8d", "up 5/5, ec2 0/9 closed", ""),
        (1, "w1 running 8d at=old", "up 5/5, ec2 9/9", ""),
    ],
)
def test_one_that_is_too_old_is_replaced(wanted: int, fleet: str, places: str, expected: str) -> None:
    at = "up ec2" if "ec2" in places else "up"
    assert words(planned(wanted, fleet, places, at=at, **WEEK)) == expected


def test_all_that_are_too_old_are_replaced_one_after_the_other_and_none_is_missing_meanwhile() -> None:
    needs = Needs("default", 3, ["up"], **WEEK)
    fleet = [server(f"w{number} running {8 + number}d") for number in range(3)]
    now, made, most, history = NOON, 0, 0, []
    for _ in range(30):
        now += MINUTE
        used = len(fleet)
        found = plan(needs, fleet, {"up": Room("up", 4, used)}, now)
        history.append(words(found))
        # What is coming, or going, is there a pass later.
        fleet = [each for each in fleet if each.status is not Status.DRAINING]
        fleet = [dataclasses.replace(each, status=Status.RUNNING) for each in fleet]
        gone = {drain.name for drain in found.drains}
        fleet = [dataclasses.replace(each, status=Status.DRAINING) if each.name in gone else each for each in fleet]
        for _ in found.creates:
            made += 1
            fleet.append(Known(f"n{made}", "up", Status.STARTING, now, now))
        assert sum(each.status is Status.RUNNING for each in fleet) >= 3
        most = max(most, len(fleet))
    assert sorted(each.name for each in fleet) == ["n1", "n2", "n3"]
    assert (made, most) == (3, 4)
    assert [step for step in history if step] == ["+up", "drain w0", "+up", "drain w1", "+up", "drain w2"]


@pytest.mark.parametrize(
    ("wanted", "fleet", "places", "more", "whys"),
    [
        (2, "w1 running", "up 1/5", {}, ["2 wanted, 1 there or on the way"]),
        (
            2,
            "",
            "up 4/5, ec2 0/9",
            {},
            ["2 wanted, 0 there or on the way", "2 wanted, 0 there or on the way; up: 5 of 5 places are taken"],
        ),
        (1, "", "ec2 0/9", {}, ["1 wanted, 0 there or on the way; up: no provider of that name is left"]),
        (
            1,
            "w1 stopping",
            "up 5/5, ec2 0/9 closed",
            {},
            [
                "1 wanted, 0 there or on the way; up: 5 of 5 places are taken, 1 of them by servers on their way out; "
                "ec2: no answer since 12:03:20Z"
            ],
        ),
        (
            0,
            "w1 new; w2 starting; w3 rebooting; w4 draining reboots; w5 running 56m jobs=0",
            "up 5/5",
            {},
            [
                "0 wanted, 5 there or on the way; not begun yet",
                "0 wanted, 5 there or on the way; does no work yet",
                "0 wanted, 5 there or on the way; does no work during its reboot",
                "0 wanted, 5 there or on the way; ends its work for a reboot anyway",
                "0 wanted, 5 there or on the way; idle, paid for another 4 min",
            ],
        ),
        (
            0,
            "w1 running 1m",
            "up 5/5",
            {"billing_period": None},
            ["0 wanted, 1 there or on the way; its jobs are not known"],
        ),
        (
            0,
            "w1 running 30m jobs=2",
            "up 5/5",
            {"drains": True},
            ["0 wanted, 1 there or on the way; has the fewest jobs, 2, paid for another 30 min"],
        ),
        (
            0,
            "w1 running 30m jobs=2",
            "up 5/5",
            {"billing_period": None},
            ["0 wanted, 1 there or on the way; has the fewest jobs, 2, and nothing that lets them end"],
        ),
        (
            1,
            "w1 new 5m",
            "up 1/5 closed, ec2 0/9",
            {},
            [
                "w1 waits in vain at up: no answer since 12:03:20Z",
                "w1 waits in vain at up: no answer since 12:03:20Z; made at ec2 instead",
            ],
        ),
        (1, "w1 running 8d", "up 1/5", WEEK, ["to replace w1, which is 8 days old (7 days at most)"]),
        (
            1,
            "w1 running 8d jobs=0; w2 running",
            "up 2/5",
            WEEK | {"billing_period": None},
            ["1 wanted, 2 there or on the way; 8 days old (7 days at most), idle"],
        ),
        (
            1,
            "w1 running 8d",
            "up 5/5, ec2 9/9",
            WEEK,
            [
                "8 days old (7 days at most), and there is no room for another one beside it: "
                "up: 5 of 5 places are taken; ec2: 9 of 9 places are taken"
            ],
        ),
    ],
)
def test_each_step_says_why(wanted: int, fleet: str, places: str, more: dict[str, Any], whys: list[str]) -> None:
    found = planned(wanted, fleet, places, **more)
    said = [step.why for step in (*found.creates, *found.cancels, *found.drains)]
    assert said + ([found.short.why] if found.short else []) == whys


@pytest.mark.parametrize(
    ("wanted", "fleet", "places", "why"),
    [
        (1, "w1 running", "up 1/5", "1 wanted, 1 there or on the way: nothing to do"),
        (3, "w1 running", "up 4/5", "3 wanted, 1 there or on the way: 1 to create, no room for 1"),
        (0, "w1 running; w2 new", "up 4/5", "0 wanted, 2 there or on the way: 1 to cancel, 1 to let go"),
        (1, "w1 running 8d", "up 1/5", "1 wanted, 1 there or on the way: 1 to create"),
        (
            1,
            "w1 running 8d; w2 starting",
            "up 1/5",
            "1 wanted, 2 there or on the way, one of them to replace one that is too old: nothing to do",
        ),
    ],
)
def test_one_sentence_sums_it_up(wanted: int, fleet: str, places: str, why: str) -> None:
    assert planned(wanted, fleet, places, at="up", **WEEK).why == why


def test_a_status_may_be_the_plain_word_that_a_row_has() -> None:
    # A row that was just read has "running", which equals Status.RUNNING, and is not the same object.
    for wanted in (0, 1, 2):
        fleet = "w1 running 8d; w2 new 9m; w3 draining reboots; w4 hanging"
        known = [server(line) for line in fleet.split("; ")]
        plain = [dataclasses.replace(each, status=str(each.status.value)) for each in known]
        needs = Needs("default", wanted, ["up", "ec2"], **WEEK)
        assert plan(needs, plain, rooms("up 3/5 closed, ec2 0/5"), NOON) == plan(
            needs, known, rooms("up 3/5 closed, ec2 0/5"), NOON
        )


# What holds for every fleet.

PROVIDERS = ["up", "ec2", "gone"]
AGES = st.sampled_from([-2, 0, 0.5, 1, 2, 30, 59, 60, 61, 600, 60 * 24 * 8, 60 * 24 * 9])
SERVERS = st.builds(
    Known,
    name=st.just(""),
    provider=st.sampled_from(PROVIDERS),
    status=st.sampled_from([status for status in Status if status is not Status.DELETED]),
    since=AGES.map(lambda minutes: NOON - minutes * MINUTE),
    billed_since=st.one_of(st.none(), AGES.map(lambda minutes: NOON - minutes * MINUTE)),
    jobs=st.one_of(st.none(), st.integers(0, 3)),
    reboots=st.booleans(),
)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Known], dict[str, Room]]:
    """Return servers and rooms that fit: of those that are known, and may be of others, each takes up a place."""
    known = [
        dataclasses.replace(each, name=f"w{number}") for number, each in enumerate(draw(st.lists(SERVERS, max_size=12)))
    ]
    mine = Counter(each.provider for each in known)
    found = {}
    for name in draw(st.sets(st.sampled_from(PROVIDERS[:2]))):
        used = mine[name] + draw(st.integers(0, 2))
        limit = max(used + draw(st.integers(-3, 6)), 0)
        found[name] = Room(name, limit, used, draw(st.sampled_from(["", "", "no answer"])))
    return known, found


NEEDS = st.builds(
    Needs,
    type=st.just("default"),
    wanted=st.integers(0, 14),
    providers=st.permutations(PROVIDERS).flatmap(lambda names: st.integers(0, 3).map(lambda number: names[:number])),
    billing_period=st.one_of(st.none(), st.just(HOUR)),
    max_age=st.none(),
    drains=st.booleans(),
)
AGING = st.builds(dataclasses.replace, NEEDS, max_age=st.just(timedelta(days=7)))


def applied(found: Plan, known: Sequence[Known], places: Mapping[str, Room]) -> tuple[list[Known], dict[str, Room]]:
    """Return the fleet once the plan is carried out on the rows, and no provider was called yet."""
    cancelled, drained = {each.name for each in found.cancels}, {each.name for each in found.drains}
    fleet: list[Known] = []
    used = Counter({name: room.used for name, room in places.items()})
    for each in known:
        if each.name in cancelled and each.status is Status.NEW:
            used[each.provider] -= 1
        elif each.name in cancelled:
            fleet.append(dataclasses.replace(each, status=Status.STOPPING))
        elif each.name in drained:
            fleet.append(dataclasses.replace(each, status=Status.DRAINING, reboots=False))
        else:
            fleet.append(each)
    for number, create in enumerate(found.creates):
        fleet.append(Known(f"n{number}", create.provider, Status.NEW, NOON))
        used[create.provider] += 1
    return fleet, {name: dataclasses.replace(room, used=used[name]) for name, room in places.items()}


def provisioned(known: Sequence[Known]) -> int:
    return sum(each.status in PROVISIONED or (each.status is Status.DRAINING and each.reboots) for each in known)


@settings(max_examples=150, deadline=None)
@given(NEEDS, fleets())
def test_a_plan_reaches_what_is_wanted_or_all_that_there_is_room_for(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]]
) -> None:
    known, places = fleet
    found = plan(needs, known, places, NOON)
    open_rooms = [places[name] for name in set(needs.providers) if name in places and not places[name].closed]
    free = sum(max(room.limit - room.used, 0) for room in open_rooms)
    reached = provisioned(applied(found, known, places)[0])
    assert reached == min(needs.wanted, max(provisioned(known) + free, 0))
    assert (found.short.missing if found.short else 0) == needs.wanted - reached


@settings(max_examples=200, deadline=None)
@given(st.one_of(NEEDS, AGING), fleets())
def test_a_plan_takes_no_more_places_than_there_are_and_only_where_it_may(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]]
) -> None:
    known, places = fleet
    for provider, count in Counter(create.provider for create in plan(needs, known, places, NOON).creates).items():
        assert provider in needs.providers
        assert not places[provider].closed
        assert places[provider].used + count <= places[provider].limit


@settings(max_examples=200, deadline=None)
@given(st.one_of(NEEDS, AGING), fleets())
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]]
) -> None:
    known, places = fleet
    found = plan(needs, known, places, NOON)
    event(f"creates={bool(found.creates)} cancels={bool(found.cancels)} drains={bool(found.drains)}")
    assert words(dataclasses.replace(plan(needs, *applied(found, known, places), NOON), short=None)) == ""


@settings(max_examples=100, deadline=None)
@given(st.one_of(NEEDS, AGING), fleets(), st.randoms(use_true_random=False))
def test_the_order_in_which_servers_are_told_of_changes_nothing(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]], chance: Any
) -> None:
    known, places = fleet
    shuffled = chance.sample(known, len(known))
    around = dict(chance.sample(sorted(places.items()), len(places)))
    assert plan(needs, shuffled, around, NOON) == plan(needs, known, places, NOON)


@settings(max_examples=100, deadline=None)
@given(st.one_of(NEEDS, AGING), fleets())
def test_each_step_is_one_that_its_server_can_take_and_is_taken_once(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]]
) -> None:
    known, places = fleet
    status = {each.name: each.status for each in known}
    found = plan(needs, known, places, NOON)
    names = [step.name for step in (*found.cancels, *found.drains)]
    assert len(set(names)) == len(names)
    assert all(status[each.name] in (Status.NEW, Status.STARTING, Status.REBOOTING) for each in found.cancels)
    assert all(status[each.name] in (Status.RUNNING, Status.DRAINING) for each in found.drains)
    assert all(step.why for step in (*found.creates, *found.cancels, *found.drains)) and found.why


@settings(max_examples=100, deadline=None)
@given(AGING, fleets())
def test_a_lifetime_makes_one_more_or_one_fewer_for_a_while_and_no_other_difference(
    needs: Needs, fleet: tuple[list[Known], dict[str, Room]]
) -> None:
    known, places = fleet
    aging = provisioned(applied(plan(needs, known, places, NOON), known, places)[0])
    ageless_needs = dataclasses.replace(needs, max_age=None)
    ageless = provisioned(applied(plan(ageless_needs, known, places, NOON), known, places)[0])
    event(f"difference: {aging - ageless}")
    assert abs(aging - ageless) <= 1


def test_by_and_by_every_server_that_is_too_old_goes_whatever_room_there_is() -> None:
    for limit in (2, 3, 4):
        needs = Needs("default", 2, ["up"], **WEEK)
        fleet = [server("w1 running 8d"), server("w2 running 9d")]
        least = 2
        for number in range(20):
            now = NOON + number * MINUTE
            found = plan(needs, fleet, {"up": Room("up", limit, len(fleet))}, now)
            fleet = [each for each in fleet if each.status is not Status.DRAINING]
            fleet = [dataclasses.replace(each, status=Status.RUNNING) for each in fleet]
            gone = {drain.name for drain in found.drains}
            fleet = [dataclasses.replace(each, status=Status.DRAINING) if each.name in gone else each for each in fleet]
            fleet += [Known(f"n{number}", "up", Status.NEW, now, now) for _ in found.creates]
            least = min(least, sum(each.status is Status.RUNNING for each in fleet))
            assert len(fleet) <= limit
        assert all(each.name.startswith("n") for each in fleet)
        assert (len(fleet), least) == (2, 1 if limit == 2 else 2)


def test_nothing_is_done_about_servers_that_are_left_alone() -> None:
    left = planned(0, "w1 running; w2 new 1h", "up 2/5", left_alone="another version knows it")
    assert (words(left), left.why) == ("", "0 wanted, 2 there or on the way: another version knows it")


def test_nothing_is_made_of_a_type_that_has_to_wait_and_what_is_too_much_goes() -> None:
    waits = planned(2, "w1 running", "up 1/5", closed="none is made until 12:03:20Z")
    assert words(waits) == "short 1"
    assert waits.short is not None and waits.short.why.endswith("; none is made until 12:03:20Z")
    assert words(planned(1, "w1 running 9d", "up 1/5", closed="…", max_age=7 * DAY)) == ""
    assert words(planned(0, "w1 running", "up 1/5", closed="…")) == "drain w1"

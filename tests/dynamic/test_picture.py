"""The picture of a day: what it draws is what was decided, and nothing where nothing was."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from xml.etree import ElementTree
from zoneinfo import ZoneInfo

import pytest

from multiserver_schedule.servers import picture
from multiserver_schedule.servers.picture import BOTTOM, LEFT, RIGHT, TOP, Step

NOON = datetime(2030, 1, 2, 12, tzinfo=timezone.utc)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SVG = "{http://www.w3.org/2000/svg}"
PIXELS_OF_AN_HOUR = (RIGHT - LEFT) / 24


def step(hours_ago: float, until_hours_ago: float, wanted: int, running: int) -> Step:
    return Step(NOON - hours_ago * HOUR, NOON - until_hours_ago * HOUR, wanted, running)


def drawn(*steps: Step, name: str = "default", zone: str = "UTC") -> ElementTree.Element:
    text = picture.draw(name, steps, since=NOON - DAY, until=NOON, zone=ZoneInfo(zone), key="day-1")
    return parsed(text)


def parsed(text: str) -> ElementTree.Element:
    """Return what is our own, and so cannot be an attack."""
    return ElementTree.fromstring(text)  # noqa: S314


def lines(image: ElementTree.Element, what: str) -> list[list[tuple[float, float]]]:
    """Return the corners of each stretch of a line."""
    found = []
    for path in image.iter(f"{SVG}path"):
        if path.get("class") == what:
            pairs = path.attrib["d"].removeprefix("M").replace("L", "").split()
            found.append([(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)])
    return found


def texts(image: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in image.iter(f"{SVG}text")]


def y(count: float, most: float) -> float:
    return round(BOTTOM - count / most * (BOTTOM - TOP), 1)


def x(hours_ago: float) -> float:
    return round(RIGHT - hours_ago * PIXELS_OF_AN_HOUR, 1)


def test_a_count_holds_until_the_next_decision_and_leaps_there() -> None:
    image = drawn(step(24, 12, 2, 1), step(12, 0, 4, 2))
    assert lines(image, "wanted") == [[(x(24), y(2, 4)), (x(12), y(2, 4)), (x(12), y(4, 4)), (x(0), y(4, 4))]]
    assert lines(image, "running") == [[(x(24), y(1, 4)), (x(12), y(1, 4)), (x(12), y(2, 4)), (x(0), y(2, 4))]]


def test_the_minute_between_two_decisions_belongs_to_the_first() -> None:
    image = drawn(step(24, 12, 2, 2), step(12 - 1 / 60, 0, 1, 1))
    [line] = lines(image, "wanted")
    assert line[1] == (x(12 - 1 / 60), y(2, 2))
    assert not list(image.iter(f"{SVG}rect"))


def test_a_gap_is_a_gap_and_no_line() -> None:
    image = drawn(step(20, 10, 3, 3), step(6, 0, 3, 3))
    assert [(line[0][0], line[-1][0]) for line in lines(image, "wanted")] == [(x(20), x(10)), (x(6), x(0))]
    gaps = [(float(each.attrib["x"]), float(each.attrib["width"])) for each in image.iter(f"{SVG}rect")]
    assert gaps == [
        (x(24), pytest.approx(4 * PIXELS_OF_AN_HOUR, abs=0.2)),
        (x(10), pytest.approx(4 * PIXELS_OF_AN_HOUR, abs=0.2)),
    ]


def test_what_was_decided_last_holds_until_now_but_not_for_long() -> None:
    fresh, stale = drawn(step(24, 2 / 60, 1, 1)), drawn(step(24, 20 / 60, 1, 1))
    assert lines(fresh, "wanted")[0][-1][0] == x(0)
    assert lines(stale, "wanted")[0][-1][0] == x(20 / 60)


def test_what_reaches_over_the_edge_is_cut_off_there() -> None:
    image = drawn(step(30, 23, 1, 0), step(23, -2, 2, 0), step(40, 39, 9, 9))
    [line] = lines(image, "wanted")
    assert (line[0], line[-1]) == ((x(24), y(1, 2)), (x(0), y(2, 2)))


def test_a_line_has_no_corner_where_only_the_other_leaps() -> None:
    image = drawn(step(24, 12, 2, 0), step(12, 6, 2, 1), step(6, 0, 2, 2))
    assert lines(image, "wanted") == [[(x(24), y(2, 2)), (x(0), y(2, 2))]]
    assert len(lines(image, "running")[0]) == 6


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(0, "0 1"), (1, "0 1"), (5, "0 1 2 3 4 5"), (7, "0 2 4 6"), (20, "0 5 10 15 20"), (1234, "0 500 1000")],
)
def test_the_axis_counts_in_whole_servers_and_few_of_them(most: int, ticks: str) -> None:
    assert " ".join(each for each in texts(drawn(step(24, 0, most, 0))) if each.isdigit()) == ticks


def test_hours_are_those_of_the_readers_clock() -> None:
    assert [each for each in texts(drawn(step(24, 0, 1, 1))) if ":" in each] == [
        *("16:00", "20:00", "00:00", "04:00", "08:00", "12:00")
    ]
    image = drawn(step(24, 0, 1, 1), zone="Asia/Kolkata")
    [first, *_] = [each for each in image.iter(f"{SVG}text") if ":" in (each.text or "")]
    # Noon is 17:30 there, so that 20:00 was 21 and a half hours before.
    assert (first.text, float(first.attrib["x"])) == ("20:00", x(21.5))


def test_each_line_bears_its_name_and_its_count_and_never_over_the_other() -> None:
    for wanted, running in ((4, 4), (4, 3), (0, 0), (0, 4), (40, 39)):
        image = drawn(step(24, 0, wanted, running))
        names = {
            (each.text or "").split()[0]: (each.text, float(each.attrib["y"]))
            for each in image.iter(f"{SVG}text")
            if (each.text or "").startswith(("wanted", "running"))
        }
        assert names["wanted"][0] == f"wanted {wanted}" and names["running"][0] == f"running {running}"
        ys = [names["wanted"][1], names["running"][1]]
        assert abs(ys[0] - ys[1]) >= 14 and min(ys) >= TOP - 1 and max(ys) <= BOTTOM + 1, (wanted, running, ys)


def test_it_is_told_in_words_to_whoever_does_not_see_it() -> None:
    image = drawn(step(20, 10, 3, 1), step(6, 0, 5, 5))
    assert image.get("role") == "img"
    ids = {each.get("id"): each.text for each in image if each.tag in (f"{SVG}title", f"{SVG}desc")}
    title, desc = (ids[each] for each in image.attrib["aria-labelledby"].split())
    assert title == "default: servers wanted and running"
    assert desc == (
        "From 2030-01-01 12:00 to 2030-01-02 12:00, 3 to 5 were wanted and 1 to 5 were running; at last 5 and 5. "
        "Nothing was decided from 2030-01-01 12:00 to 2030-01-01 16:00. "
        "Nothing was decided from 2030-01-02 02:00 to 2030-01-02 06:00."
    )


def test_a_type_that_nothing_was_decided_on_has_a_picture_that_says_so() -> None:
    image = drawn()
    assert "nothing decided" in texts(image)
    assert not lines(image, "wanted")
    assert [float(each.attrib["width"]) for each in image.iter(f"{SVG}rect")] == [RIGHT - LEFT]


def test_a_name_is_escaped() -> None:
    name = '<script>alert("1")</script>&'
    text = picture.draw(name, [], since=NOON - DAY, until=NOON, zone=timezone.utc, key="a")
    assert "<script" not in text
    assert parsed(text)[0].text == f"{name}: servers wanted and running"


def test_no_policy_of_the_page_keeps_it_from_being_seen() -> None:
    text = picture.draw("a", [step(20, 0, 2, 1)], since=NOON - DAY, until=NOON, zone=timezone.utc, key="a")
    assert not re.search(r"style|<script|\bon\w+=|href|url\(", text)


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
@pytest.mark.parametrize("colour", [picture.WANTED, picture.RUNNING])
def test_its_colours_are_seen_on_a_light_page_and_on_a_dark_one(colour: str, page: str) -> None:
    assert _contrast(colour, page) >= 3

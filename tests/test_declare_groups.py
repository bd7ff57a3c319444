"""Groups: words that are said once for several declarations."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest

from multiserver_schedule import schedule
from multiserver_schedule.declare import Registry, registry
from multiserver_schedule.declare import groups as groups_module
from multiserver_schedule.entries import Filter, Hook, Mail, OutputFile, Ping, ScheduledTask
from multiserver_schedule.exceptions import DeclarationError


@pytest.fixture(autouse=True)
def declared() -> Iterator[Registry]:
    with registry.set_aside() as empty:
        yield empty
    assert groups_module._open.get() == ()


def task(name: str = "one") -> ScheduledTask:
    return registry.tasks[name]


def line() -> int:
    """Return the line of the caller."""
    return cast(FrameType, cast(FrameType, inspect.currentframe()).f_back).f_lineno


def notify() -> None:
    raise AssertionError("declaring runs nothing")


def test_a_group_says_its_words_of_each_declaration_in_it_and_of_no_other() -> None:
    with schedule.group(timezone="Asia/Tokyo", environments=["production", "staging"], on_failure=notify):
        schedule.command("a").daily_at("3:00").name("one")
        schedule.exec(["b"]).hourly().name("two")
    schedule.command("c").hourly().name("three")

    assert task().environments == task("two").environments == ("production", "staging")
    assert task().hooks == task("two").hooks == (Hook("failure", notify),)
    assert "Asia/Tokyo" in task().timetable.text
    assert (task("three").environments, task("three").hooks) == ((), ())


def test_true_is_a_bare_word_a_tuple_its_arguments_a_dict_its_named_ones_and_a_list_one_value() -> None:
    with schedule.group(
        weekdays=True,
        unless_between=("1:00", "2:00"),
        without_overlapping={"min_break": timedelta(minutes=1)},
        only_on=["web1"],
        ensure_finished=timedelta(minutes=9),
    ):
        schedule.command("a").hourly().name("one")
    schedule.command("a").hourly().weekdays().unless_between("1:00", "2:00").name("two")

    assert task().timetable.text == task("two").timetable.text
    assert (task().min_break, task().limit) == (timedelta(minutes=1), timedelta(minutes=9))
    assert task().servers == ("web1",)


def test_what_a_declaration_says_goes_before_its_group_and_an_inner_group_before_an_outer_one() -> None:
    outer = schedule.group(environments="outer", timezone="Asia/Tokyo", at="3:00", weekly=True)
    with outer, schedule.group(environments="inner", daily=True):
        schedule.command("a").name("one")
        schedule.command("a").weekly_on("monday", "8:00").environments("own").timezone("UTC").name("two")
    schedule.command("a").daily_at("3:00").timezone("Asia/Tokyo").name("three")
    schedule.command("a").weekly_on("monday", "8:00").timezone("UTC").name("four")

    assert task().environments == ("inner",)
    assert task().timetable.text == task("three").timetable.text
    assert task("two").environments == ("own",)
    assert task("two").timetable.text == task("four").timetable.text


def test_an_opposite_that_a_declaration_says_outdoes_the_groups_word() -> None:
    with schedule.group(no_catch_up=True, append_output_to="/all.log"):
        schedule.command("a").hourly().catch_up(all=True).send_output_to("/own.log").name("one")

    assert task().catch_up == "all"
    assert task().output_file == OutputFile("/own.log", append=False)


def test_hooks_pings_mails_and_conditions_add_up_the_outermost_first() -> None:
    outer = schedule.group(after="a.outer", then_ping="https://outer/", email_output_to="o@x", when="a.outer")
    inner = schedule.group(after="a.inner", then_ping="https://inner/", email_output_on_failure="i@x", skip="a.inner")
    with outer, inner:
        declaration = schedule.command("a").hourly().after("a.own").then_ping("https://own/")
        declaration.email_output_to("own@x").when("a.own").name("one")

    assert [hook.function for hook in task().hooks] == ["a.outer", "a.inner", "a.own"]
    assert task().pings == tuple(Ping("after", f"https://{name}/") for name in ("outer", "inner", "own"))
    assert task().mails == (Mail(("o@x",), False), Mail(("i@x",), True), Mail(("own@x",), False))
    assert task().filters == (Filter("a.outer", True), Filter("a.inner", False), Filter("a.own", True))


def test_a_decorated_function_is_in_the_group_too() -> None:
    with schedule.group(environments="production"):

        @schedule.task("one").hourly()
        def work() -> None:
            """Do nothing."""

    assert task().environments == ("production",)


def test_a_group_may_give_the_frequency() -> None:
    with schedule.group(every=timedelta(minutes=5)):
        schedule.command("a").name("one")

    assert task().timetable.shortest_gap() == timedelta(minutes=5)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ({"timezon": "UTC"}, ("no word 'timezon'", "'timezone'")),
        ({"zzz": 1}, ("no word 'zzz'",)),
        ({"name": "x"}, ("a name is one task's", ".name()")),
        ({"timezone": "Europe/Berln"}, ("'Europe/Berln' is no time zone", "'Europe/Berlin'")),
        ({"environments": None}, (".environments()", "None")),
        ({"weekdays": False}, (".weekdays()",)),
        ({"hourly": True, "daily": True}, ("two frequencies", ".hourly() and .daily()")),
        ({"retry": {"tims": 3}}, (".retry()", "times")),
    ],
)
def test_a_wrong_word_of_a_group_is_told_at_the_groups_line(words: dict[str, Any], parts: tuple[str, ...]) -> None:
    at = line() + 2
    with pytest.raises(DeclarationError) as caught:
        schedule.group(**words)

    assert str(caught.value).startswith(f"{Path(__file__)}:{at}: schedule.group(): ")
    assert [part for part in parts if part not in str(caught.value)] == []


def test_what_does_not_go_together_names_the_line_of_the_declaration_and_of_the_group() -> None:
    group = line() + 1
    with schedule.group(at="3:00"):
        inside = line() + 1
        schedule.command("a").hourly().name("one")

    for _ in range(2):  # asking again tells it again
        with pytest.raises(DeclarationError) as caught:
            _ = registry.tasks
        said = str(caught.value)
        assert said.startswith(f"{Path(__file__)}:{inside}: task 'one': .at() does not go with .hourly()")
        assert said.endswith(f"(It is in the group of {Path(__file__)}:{group}.)")


def test_a_word_of_a_group_that_contradicts_a_declaration_names_both_lines() -> None:
    with schedule.group(without_overlapping={"lease": timedelta(minutes=5)}):
        schedule.command("a").hourly().overlap("allow").name("one")

    with pytest.raises(DeclarationError, match=r"contradicts .*It is in the group of .*test_declare_groups.py:\d+"):
        _ = registry.tasks


def test_a_group_ends_with_its_block_whatever_the_block_raises() -> None:
    with pytest.raises(LookupError), schedule.group(environments="production"):
        raise LookupError
    schedule.command("a").hourly().name("one")

    assert task().environments == ()


def test_a_group_is_its_threads_own() -> None:
    with schedule.group(environments="production"):
        thread = threading.Thread(target=lambda: schedule.command("a").hourly().name("one"))
        thread.start()
        thread.join()

    assert task().environments == ()


def test_a_module_that_is_imported_in_a_group_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grouping.py").write_text(
        "from multiserver_schedule import schedule\n"
        "def declare(name):\n"
        "    schedule.command('a').hourly().name(name)\n"
        "with schedule.group(environments='production'):\n"
        "    import grouped\n"
        "    grouped.declare('by-a-helper')\n"
        "    declare('own')\n"
    )
    (tmp_path / "grouped.py").write_text(
        "from multiserver_schedule import schedule\n"
        "schedule.command('b').hourly().name('imported')\n"
        "def declare(name):\n"
        "    schedule.command('c').hourly().name(name)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        __import__("grouping")
        names = {name: each.environments for name, each in registry.tasks.items()}
    finally:
        for name in ("grouping", "grouped"):
            sys.modules.pop(name, None)

    assert names == {"by-a-helper": ("production",), "own": ("production",), "imported": ()}


def test_a_group_that_is_left_open_by_a_module_that_fails_is_not_of_its_next_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "leaving.py"
    module.write_text(
        "from multiserver_schedule import schedule\n"
        "schedule.group(environments='production').__enter__()\n"
        "raise LookupError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = groups_module._open.get()
    try:
        with pytest.raises(LookupError):
            __import__("leaving")
        module.write_text("from multiserver_schedule import schedule\nschedule.command('b').hourly().name('one')\n")
        __import__("leaving")
        assert task().environments == ()
    finally:
        groups_module._open.set(before)
        sys.modules.pop("leaving", None)


def test_a_group_may_be_used_again() -> None:
    production = schedule.group(environments="production")
    with production:
        schedule.command("a").hourly().name("one")
    schedule.command("a").hourly().name("two")
    with production:
        schedule.command("a").hourly().name("three")

    assert [task(name).environments for name in ("one", "two", "three")] == [("production",), (), ("production",)]

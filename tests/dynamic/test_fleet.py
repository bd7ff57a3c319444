"""What projects call, and what is decided of it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from django.db import DatabaseError, OperationalError, connections

from multiserver_schedule.declare import discover_errors
from multiserver_schedule.servers import fleet, ledger, monitor, planner, types
from multiserver_schedule.servers.entries import Load
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.fleet import ServerType, option
from multiserver_schedule.servers.models import Decision, Target

from .conftest import MINUTE, Site


def test_the_fleet_can_be_imported_before_django_has_loaded_its_apps() -> None:
    code = "from multiserver_schedule.servers import fleet; fleet.register_server_type; print('imported')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "imported\n", done.stderr


def test_the_default_type_is_there_without_being_registered(site: Site) -> None:
    assert fleet.ensure(2) == 2
    assert types.providers_of(types.get("default")) == ("folder",)


def test_increase_and_decrease_count_from_what_is_wanted(site: Site) -> None:
    assert fleet.increase() == 1
    assert fleet.increase(3) == 4
    assert fleet.decrease() == 3
    assert fleet.decrease(9) == 0


def test_an_order_for_none_more_or_none_fewer_changes_nothing(site: Site) -> None:
    """Nor does it begin anew what a decision waits for."""
    fleet.ensure(2)
    before = ledger.targets().values().get()
    assert [fleet.increase(0), fleet.decrease(0)] == [2, 2]
    assert ledger.targets().values().get() == before


def test_orders_beyond_the_bounds_do_not_add_up(site: Site) -> None:
    fleet.register_server_type(ServerType("worker").between(1, 4))
    assert [fleet.ensure(4, "worker"), fleet.increase(10, "worker"), fleet.decrease(1, "worker")] == [4, 4, 3]
    assert [fleet.decrease(9, "worker"), fleet.increase(1, "worker")] == [1, 2]
    assert [fleet.ensure(9, "worker"), fleet.ensure(0, "worker")] == [4, 1]
    assert fleet.wanted_count("worker") == 1


def test_without_a_maximum_orders_add_up_to_no_more_than_the_provider_may_have(site: Site) -> None:
    assert [fleet.increase(30), fleet.decrease(1)] == [5, 4]
    assert [fleet.ensure(9), fleet.decrease(1)] == [9, 4], "one order is kept, in case the provider may have more"


def test_an_increase_never_lowers_what_one_order_asked_for(site: Site) -> None:
    assert [fleet.ensure(9), fleet.increase(1), fleet.increase(1)] == [9, 9, 9], "of five that its provider may have"
    site.options(MAX_SERVERS=20)
    assert fleet.increase(1) == 10
    fleet.register_server_type(ServerType("default").between(0, 4))
    assert fleet.increase(1) == 4, "more than the type allows is not kept"


def test_what_was_ordered_before_the_bounds_were_narrowed_is_nothing_to_undo(site: Site) -> None:
    fleet.register_server_type(ServerType("worker"))
    fleet.ensure(5, "worker")
    fleet.register_server_type(ServerType("worker").between(0, 2))
    assert fleet.decrease(1, "worker") == 1


@pytest.mark.parametrize("verb", ["ensure", "increase", "decrease"])
def test_a_count_that_no_database_can_hold_is_refused(site: Site, verb: str) -> None:
    with pytest.raises(FleetError, match=rf"fleet\.{verb}\(\) takes at most 2147483647, not 2147483648"):
        getattr(fleet, verb)(2**31)


def test_a_determined_count_that_no_database_can_hold_leaves_everything_as_it_is(site: Site) -> None:
    fleet.ensure(2)
    fleet.determine_server_count(lambda fleet: 10**12)
    (told,) = site.monitor()
    assert told.wanted == 2
    assert "takes at most" in told.trouble


def test_a_load_that_asks_for_more_than_a_database_can_hold_is_decided_on(site: Site) -> None:
    fleet.register_server_type(ServerType("default").scale_on(lambda: Load(waiting=10**15), waiting_per_server=1))
    fleet.register_server_type(ServerType("big").between(0, 3))

    @fleet.determine_server_count
    def count(fleet: Any) -> None:
        fleet.increase(2**31 - 1, "big")
        fleet.increase(2**31 - 1, "big")

    site.monitor()
    rows = Decision.objects.using(ledger.using())
    assert {row.type: (row.asked, row.wanted) for row in rows} == {"default": (2**31 - 1, 5), "big": (2**31 - 1, 3)}


def test_a_provider_may_be_allowed_more_than_a_database_can_hold(site: Site) -> None:
    site.options(MAX_SERVERS=10**12)
    assert [fleet.increase(2**31 - 1), fleet.increase(1), fleet.ensure(0)] == [2**31 - 1, 2**31 - 1, 0]


def test_provisioned_are_those_that_work_or_are_on_their_way_to(site: Site) -> None:
    fleet.register_server_type(ServerType("big"))
    fleet.ensure(2)
    fleet.ensure(1, "big")
    assert fleet.provisioned_count() == 0, "it is an order still"
    site.reconcile()
    assert (fleet.provisioned_count(), fleet.provisioned_count("big")) == (3, 1)
    fleet.ensure(0)
    site.reconcile()
    assert fleet.provisioned_count() == 1


@pytest.mark.parametrize("verb", ["ensure", "increase", "decrease"])
@pytest.mark.parametrize("number", [-1, True, 1.5, "2", None])
def test_a_count_that_is_none_is_refused_by_name(site: Site, verb: str, number: Any) -> None:
    with pytest.raises(FleetError, match=rf"fleet\.{verb}\(\) takes a whole number from 0 up, not {number!r}"):
        getattr(fleet, verb)(number)


def test_an_unknown_type_is_refused_with_the_nearest_one(site: Site) -> None:
    fleet.register_server_type(ServerType("importer"))
    for call in (
        lambda: fleet.ensure(1, "importr"),
        lambda: fleet.reboot("importr"),
        lambda: fleet.provisioned_count("importr"),
    ):
        with pytest.raises(FleetError, match=r"No server type is named 'importr'. Did you mean 'importer'\?"):
            call()


def declare(name: str, source: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a project of this name, with this schedule.py, that nobody has read yet."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "schedule.py").write_text(f"from multiserver_schedule.servers.fleet import *\n{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    site.settings.ROOT_URLCONF = f"{name}.urls"


@pytest.mark.parametrize(
    "call",
    [
        lambda: fleet.ensure(2, "worker"),
        lambda: fleet.increase(9, "worker"),
        lambda: fleet.decrease(0, "worker") + 2,
        lambda: fleet.wanted_count("worker") + 2,
        lambda: fleet.provisioned_count("worker") + 2,
        lambda: fleet.reboot("worker") + 2,
    ],
    ids=["ensure", "increase", "decrease", "wanted_count", "provisioned_count", "reboot"],
)
def test_a_type_is_known_where_nobody_has_read_its_schedule_yet(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    declare("unread", "register_server_type(ServerType('worker').between(0, 2))", site, tmp_path, monkeypatch)
    assert call() == 2


def test_the_bounds_of_the_default_type_are_those_of_a_schedule_that_nobody_has_read_yet(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare("unread_too", "register_server_type(ServerType('default').between(1, 2))", site, tmp_path, monkeypatch)
    assert fleet.ensure(5) == 2


def test_a_name_that_is_unknown_because_a_schedule_cannot_be_read_says_so(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare("unreadable", "raise OSError('https://me:hunter2@host is away')", site, tmp_path, monkeypatch)
    said = r"'worker'\. Known are: default\. unreadable\.schedule cannot be read: OSError: https://me:…@host is away\."
    with pytest.raises(FleetError, match=said):
        fleet.ensure(1, "worker")
    assert fleet.ensure(1) == 1, "which is no trouble of other types"


def test_a_schedule_that_gives_an_order_for_a_type_that_is_not_there_yet_is_told_so(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "ensure(1, 'worker')\nregister_server_type(ServerType('worker'))"
    declare("too_soon", source, site, tmp_path, monkeypatch)
    (broken,) = discover_errors()
    assert isinstance(broken.error, FleetError)
    with pytest.raises(FleetError, match=r"too_soon\.schedule cannot be read: FleetError: No server type is named"):
        fleet.ensure(1, "worker")


def test_schedules_are_read_once_and_not_with_each_order(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(fleet, "discover_errors", lambda: read.append(1) or ())
    fleet.increase()
    fleet.increase()
    assert read == [1]


def test_a_type_at_an_unknown_provider_is_refused_with_the_nearest_one(site: Site) -> None:
    fleet.register_server_type(ServerType("big").provider("foldr"))
    with pytest.raises(
        FleetError, match=r"'big' is to be made at 'foldr', which is no provider. Did you mean 'folder'\?"
    ):
        fleet.ensure(1, "big")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: ServerType("Big One"), "small letters"),
        (lambda: ServerType("big").provider(), "needs the name of a provider"),
        (lambda: ServerType("big").configuration("m5"), "takes a dict"),
        (lambda: ServerType("big").scale_on(), "needs a source"),
        (lambda: ServerType("big").scale_on(5), "callables"),
        (lambda: ServerType("big").between(-1, 2), "big"),
        (lambda: ServerType("big").between(3, 2), "big"),
        (lambda: ServerType("big").step(up=0), "big"),
        (lambda: ServerType("big").cool_down(up=5), "big"),
        (lambda: ServerType("big").drain_with("nowhere.at.all"), "nowhere"),
        (lambda: ServerType("big").drain_with(lambda server: 0, limit=5), "timedelta"),
        (lambda: ServerType("big").billed_by(3600), "timedelta"),
        (lambda: ServerType("big").lifetime(3600), "timedelta"),
        (lambda: fleet.register_server_type("big"), "takes a ServerType"),
        (lambda: fleet.determine_server_count(3), "takes a callable"),
    ],
)
def test_a_wrong_declaration_is_refused_where_it_is_written(wrong: Any, said: str) -> None:
    with pytest.raises(FleetError, match=said):
        wrong()


def test_a_secret_in_a_configuration_is_refused_and_told_where_to_go(site: Site) -> None:
    kind = ServerType("big").configuration({"user_data": {"api_key": "abc"}})
    with pytest.raises(FleetError, match=r"user_data.api_key in plain text.*option\('api_key'\)") as refused:
        kind.configuration_for(ledger.servers().model(name="x").info())
    assert "abc" not in str(refused.value)
    ServerType("big").configuration({"api_key": option("api_key")}).configuration_for(
        ledger.servers().model(name="x").info()
    )


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ({"env": {"DATABASE_URL": "postgres://u:hunter4-hunter4@db/x"}}, r"in env\.DATABASE_URL,.*'DATABASE_URL'"),
        ({"command": ["work", "--broker=amqp://u:hunter4-hunter4@b/x"]}, r"in command\.1,.*option\('command'\)"),
        ({"ex_userdata": "#!/bin/sh\nwork redis://:hunter4-hunter4@10.0.0.2/0\n"}, "in ex_userdata,"),
    ],
)
def test_a_url_with_a_password_in_a_configuration_is_refused_and_told_where_to_go(
    site: Site, configuration: Any, said: str
) -> None:
    fleet.register_server_type(ServerType("big").configuration(configuration))
    fleet.ensure(1, "big")
    site.passes(1)
    because = ledger.target("big").short_because
    assert re.search(f"a URL with a password {said}", because), because
    assert "hunter4" not in because
    assert site.servers() == []


@pytest.mark.parametrize("text", ["https://host/a:b@c", "https://u:$TOKEN@host/", "amqp://{name}:{key}@host/"])
def test_a_url_with_what_stands_for_a_password_is_none(site: Site, text: str) -> None:
    fleet.register_server_type(ServerType("big").configuration({"url": text, "broker": option("broker")}))
    fleet.ensure(1, "big")
    site.monitor()
    (server,) = site.servers()
    assert server.configuration == {"url": text, "broker": {"$option": "broker"}}


def test_what_a_configuration_raises_is_told_without_a_secret(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    def configuration(server: Any) -> dict[str, Any]:
        try:
            raise OSError("no hunter2-hunter2 for you")
        except OSError as error:
            raise RuntimeError("GET https://vault:hunter3-hunter3@vault/x failed") from error

    fleet.register_server_type(ServerType("big").configuration(configuration))
    fleet.ensure(1, "big")
    site.passes(2)
    because = ledger.target("big").short_because
    assert because == "its configuration cannot be had: RuntimeError: GET https://vault:…@vault/x failed"
    assert "no … for you" in caplog.text, "with what led to it"
    assert "hunter" not in caplog.text
    assert caplog.text.count("No server of the type big") == 1


@pytest.mark.parametrize("value", [timedelta(1), float("nan"), {1, 2}, "a\0b", "\\\0", "\ud800"], ids=ascii)
def test_a_configuration_that_no_database_can_keep_is_the_trouble_of_its_own_type(site: Site, value: Any) -> None:
    fleet.register_server_type(ServerType("big").configuration({"value": [value]}))
    fleet.ensure(1, "big")
    fleet.ensure(1)
    site.monitor()
    assert [server.type for server in site.servers()] == ["default"]
    assert "The configuration of the server type 'big'" in ledger.target("big").short_because


def test_a_configuration_may_have_a_backslash_and_a_u(site: Site) -> None:
    fleet.register_server_type(ServerType("big").configuration({"value": "\\u0000"}))
    fleet.ensure(1, "big")
    site.monitor()
    assert site.servers()[0].configuration == {"value": "\\u0000"}


def test_a_configuration_that_breaks_its_transaction_is_the_trouble_of_its_own_type(site: Site) -> None:
    def configuration(server: Any) -> dict[str, Any]:
        with suppress(DatabaseError):
            ledger.targets().extra(where=["nonsense"]).count()
        return {}

    fleet.register_server_type(ServerType("big").configuration(configuration))
    fleet.ensure(1, "big")
    fleet.ensure(1)
    site.monitor()
    assert "default" in {server.type for server in site.servers()}


def test_a_database_that_fails_is_not_taken_for_a_configuration_that_does(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **values: Any) -> None:
        raise OperationalError("the disk is full")

    fleet.ensure(1)
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "create", full)
        with pytest.raises(OperationalError, match="the disk is full"):
            site.monitor()
    assert ledger.target("default").short_because == ""
    site.monitor()
    assert len(site.servers()) == 1


def test_what_a_callable_determines_is_brought_about(site: Site) -> None:
    fleet.register_server_type(ServerType("big"))

    @fleet.determine_server_count
    def count(fleet: Any) -> None:
        fleet.ensure(2)
        fleet.increase(1, "big")

    site.monitor()
    site.reconcile()
    assert {row.type: row.wanted for row in Target.objects.using(ledger.using())} == {"default": 2, "big": 1}


@pytest.mark.parametrize("answer", [3, {"default": 3}])
def test_a_callable_may_return_what_it_wants(site: Site, answer: Any) -> None:
    fleet.determine_server_count(lambda fleet: answer)
    (told,) = site.monitor()
    assert (told.asked, told.wanted) == (3, 3)


def test_what_a_callable_asks_for_is_damped(site: Site) -> None:
    asks = iter([4, 0, 4, 0, 4, 0, 0, 0])
    fleet.determine_server_count(lambda fleet: next(asks))
    wanted = []
    for _ in range(8):
        wanted.append(site.monitor()[0].wanted)
        site.later(MINUTE)
    assert wanted == [4] * 8, "it falls only after five minutes of fewer"


def test_one_low_load_after_hours_without_a_scheduler_ends_nothing(site: Site) -> None:
    asks = iter([4, 1, 1, 1])
    fleet.determine_server_count(lambda fleet: next(asks))
    wanted = []
    for span in (MINUTE, 180 * MINUTE, MINUTE, MINUTE):
        wanted.append(site.monitor()[0].wanted)
        site.later(span)
    assert wanted == [4] * 4


@pytest.mark.parametrize(("becomes", "count"), [(None, 2), ("draining", 1)])
def test_a_reboot_reaches_a_server_that_a_pass_changes_at_that_moment(
    site: Site, monkeypatch: pytest.MonkeyPatch, becomes: str | None, count: int
) -> None:
    fleet.ensure(2)
    site.settle()
    first, change = site.servers()[0], ledger.change
    met = []

    def meet(server: Any, **values: Any) -> bool:
        if not met:
            met.append(server.name)
            assert change(ledger.servers().get(pk=server.pk), seen_at=site.now, status=becomes or server.status)
        return change(server, **values)

    monkeypatch.setattr(ledger, "change", meet)
    assert fleet.reboot() == count
    assert met == [first.name]
    asked = {server.name for server in site.servers() if server.reboot_requested_at}
    assert (len(asked), first.name in asked) == (count, becomes is None), "of one that is let go, none"


def test_an_order_from_a_person_is_not_damped(site: Site) -> None:
    fleet.ensure(4)
    site.settle()
    fleet.ensure(0)
    site.settle()
    assert site.statuses() == {}


def test_a_callable_that_raises_leaves_everything_as_it_is(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fleet.ensure(2)
    site.reconcile()

    @fleet.determine_server_count
    def count(fleet: Any) -> None:
        fleet.ensure(0)
        raise OSError("the broker is away")

    with caplog.at_level(logging.ERROR):
        (told,) = site.monitor()
    assert told.wanted == 2
    assert "the broker is away" in told.trouble
    assert "the broker is away" in caplog.text


def test_a_load_that_cannot_be_told_leaves_its_type_as_it_is_and_no_other(site: Site) -> None:
    def away() -> Load:
        raise OSError("the broker is away")

    fleet.register_server_type(ServerType("default").scale_on(away, waiting_per_server=10))
    fleet.register_server_type(ServerType("big").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    fleet.ensure(2)
    told = {each.type: each for each in site.monitor()}
    assert (told["default"].wanted, told["big"].wanted) == (2, 3)


def hangs(*_: Any) -> Load:
    """Hang, for as long as a test may take."""
    Event().wait(60)
    raise AssertionError("nobody waits for that")


def test_a_source_that_hangs_keeps_no_other_type_from_being_decided_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "ANSWERS_WITHIN", timedelta(seconds=1))
    for number in range(4):
        kind = ServerType(f"a{number}").scale_on(partial(hangs, number), waiting_per_server=10)
        fleet.register_server_type(kind)
    fleet.register_server_type(ServerType("good").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    began = time.monotonic()
    told = {each.type: each for each in site.monitor()}
    assert time.monotonic() - began < 3, "all are waited for together"
    assert told["good"].wanted == 3
    trouble = f"its load can't be told: TimeoutError: {hangs.__module__}.hangs did not answer within 1 s"
    assert {told[f"a{number}"].trouble for number in range(4)} == {trouble}
    assert ledger.last_decision("a0").why == f"{trouble}; it stays as it is"


def test_a_callable_that_hangs_keeps_no_type_that_has_a_load_from_being_decided_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "ANSWERS_WITHIN", timedelta(seconds=1))
    fleet.determine_server_count(hangs)
    fleet.register_server_type(ServerType("good").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    told = {each.type: each for each in site.monitor()}
    assert told["default"].trouble == "determine_server_count: TimeoutError: it did not answer within 1 s"
    assert told["good"].wanted == 3


def test_a_source_that_leaves_the_process_leaves_its_type_as_it_is_and_no_other(site: Site) -> None:
    fleet.register_server_type(ServerType("bad").scale_on(lambda: sys.exit(2), waiting_per_server=10))
    fleet.register_server_type(ServerType("good").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    told = {each.type: each for each in site.monitor()}
    assert "raised SystemExit" in told["bad"].trouble
    assert told["good"].wanted == 3


def test_a_source_may_ask_the_database_and_leaves_no_connection_behind(site: Site) -> None:
    asked = []

    def source() -> Load:
        ledger.now()
        asked.append(connections[site.alias])
        return Load(waiting=25)

    fleet.register_server_type(ServerType("default").scale_on(source, waiting_per_server=10))
    assert site.monitor()[0].wanted == 3
    assert asked[0] is not connections[site.alias] and asked[0].connection is None


def test_a_source_of_several_types_is_asked_once_at_a_time(site: Site) -> None:
    asked = []

    def source() -> Load:
        asked.append(1)
        return Load(waiting=25)

    for name in ("one", "two"):
        fleet.register_server_type(ServerType(name).scale_on(source, waiting_per_server=10))
    assert {each.wanted for each in site.monitor() if each.type != "default"} == {3}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda: 12, "should return a Load, such as Load(waiting=12), not 12"),
        (lambda: None, "should return a Load"),
        (lambda: Load(oldest=300), "oldest should be a timedelta from zero up, such as timedelta(minutes=5)"),
        (lambda: Load(oldest=timedelta(seconds=-1)), "oldest should be a timedelta from zero up"),
        (lambda: Load(waiting=-3), "waiting should be a whole number from 0 up, or None; not -3"),
        (lambda: Load(waiting=2.5), "waiting should be a whole number from 0 up, or None; not 2.5"),
        (lambda: Load(waiting=1, running=True), "running should be a whole number from 0 up, or None; not True"),
        (lambda: Load(waiting=1, busy=["a"]), "busy should be a dict of a server's name to its jobs"),
        (lambda: Load(waiting=1, busy={"a": None}), "busy has 'a': None"),
    ],
)
def test_a_source_that_returns_no_load_leaves_its_type_as_it_is_and_no_other(
    site: Site, source: Any, said: str
) -> None:
    rules = {"waiting_per_server": 10, "waited": {MINUTE: 1}}
    fleet.register_server_type(ServerType("default").scale_on(lambda: Load(waiting=0), source, **rules))
    fleet.register_server_type(ServerType("big").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    fleet.ensure(2)
    told = {each.type: each for each in site.monitor()}
    assert (told["default"].wanted, told["big"].wanted) == (2, 3)
    assert said in told["default"].trouble


class Waiting:
    """A source that returns no load."""

    def __call__(self) -> Any:
        return 5


def waiting() -> Any:
    """Return no load."""
    return 5


@pytest.mark.parametrize(
    ("source", "name"),
    [(waiting, "waiting"), (Waiting(), "Waiting"), (partial(waiting), "waiting"), (Waiting().__call__, "__call__")],
)
def test_a_source_is_named_by_where_it_is_found_so_that_each_process_says_the_same(
    site: Site, source: Any, name: str
) -> None:
    fleet.register_server_type(ServerType("default").scale_on(source, waiting_per_server=10))
    [told] = site.monitor()
    assert re.search(rf"TypeError: \S*\b{name} should return a Load", told.trouble), told.trouble
    assert " at 0x" not in told.trouble


def test_a_trouble_that_stays_the_same_is_logged_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([OSError("away"), OSError("away"), Load(waiting=0), OSError("away"), OSError("in flames")])

    def source() -> Load:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    fleet.register_server_type(ServerType("default").scale_on(source, waiting_per_server=10))
    logged = []
    for _ in range(5):
        site.monitor()
        site.later(MINUTE)
        logged.append(caplog.text.count("can't be told"))
    assert logged == [1, 1, 1, 2, 3]


def test_a_callable_that_raises_again_and_again_is_logged_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    @fleet.determine_server_count
    def count(fleet: Any) -> None:
        raise OSError("the broker is away")

    for _ in range(3):
        site.monitor()
        site.later(MINUTE)
    assert caplog.text.count("determine_server_count was given failed") == 1


def test_the_loads_of_several_queues_are_taken_together(site: Site) -> None:
    sources = [lambda: Load(waiting=15), lambda: Load(waiting=15, oldest=timedelta(minutes=2))]
    fleet.register_server_type(ServerType("default").scale_on(*sources, waiting_per_server=10))
    assert site.monitor()[0].wanted == 3


def test_equal_decisions_share_a_row_and_each_change_has_its_own(site: Site) -> None:
    for _ in range(3):
        site.monitor()
        site.later(MINUTE)
    fleet.ensure(2)
    site.monitor()
    rows = list(Decision.objects.using(ledger.using()).order_by("pk"))
    assert [(row.wanted, row.times) for row in rows] == [(0, 3), (2, 1)]
    assert rows[0].until - rows[0].at == 2 * MINUTE


def test_a_type_that_is_not_registered_any_more_is_given_up(site: Site) -> None:
    fleet.register_server_type(ServerType("big"))
    fleet.ensure(2, "big")
    site.settle()
    del types._registered["big"]
    site.later(planner.UNKNOWN_FOR)
    site.settle()
    assert site.cloud.machines == {}


def test_a_configuration_that_raises_keeps_its_own_type_from_growing_and_no_other(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def configuration(server: Any) -> dict[str, Any]:
        raise LookupError("no image is tagged so")

    fleet.register_server_type(ServerType("big").configuration(configuration))
    fleet.ensure(1, "big")
    fleet.ensure(1)
    site.passes(5)
    assert site.statuses() == {"running": 1}
    assert "no image is tagged so" in ledger.target("big").short_because
    assert caplog.text.count("No server of the type big") == 1


def test_a_minimum_is_had_without_anybody_asking(site: Site) -> None:
    fleet.register_server_type(ServerType("default").between(2, 3))
    site.settle()
    assert site.statuses() == {"running": 2}
    assert fleet.increase(5) == 3
    site.settle()
    assert site.statuses() == {"running": 3}, "never more than its maximum"


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(site: Site) -> None:
    fleet.register_server_type(ServerType("default").scale_on(lambda: Load(waiting=25), waiting_per_server=10))
    before = list(ledger.targets().values())
    (told,) = monitor.preview(now=site.now)
    assert len(told.plan.creates) == 3
    assert list(ledger.targets().values()) == before
    assert site.servers() == []


def test_a_source_that_tells_nothing_keeps_the_count_from_falling(site: Site) -> None:
    loads = [Load(waiting=0), Load(waiting=30)]
    sources = [lambda: loads[0], lambda: loads[1]]
    kind = ServerType("default").scale_on(*sources, waiting_per_server=10).stabilization(down=timedelta(0))
    fleet.register_server_type(kind)
    assert site.monitor()[0].wanted == 3
    loads[1] = Load()
    site.later(MINUTE)
    assert site.monitor()[0].wanted == 3
    loads[1] = Load(waiting=0)
    site.later(MINUTE)
    assert site.monitor()[0].wanted == 0


def test_a_queue_in_which_nothing_waits_need_not_say_for_how_long(site: Site) -> None:
    waits = timedelta(seconds=1)
    kind = ServerType("default").scale_on(
        lambda: Load(waiting=0), lambda: Load(waiting=1, oldest=waits), waited={MINUTE: 1}
    )
    fleet.register_server_type(kind.stabilization(down=timedelta(0)))
    fleet.ensure(3)
    site.monitor()
    assert fleet.wanted_count() == 0


def let_go(site: Site, *told_then: Load) -> str:
    """Have three servers of a type, of which the loads then need one, and return why the first of two is let go."""
    loads = [Load(waiting=3), Load(waiting=0)]
    kind = ServerType("w").between(1, 3).stabilization(down=timedelta(0))
    sources = [lambda: loads[0], lambda: loads[1]]
    fleet.register_server_type(kind.scale_on(*sources[: len(told_then)], waiting_per_server=1))
    site.monitor()
    site.settle()
    named = [server.name for server in site.servers("running")]
    for number, load in enumerate(told_then):
        busy = {named[int(name)] if name.isdigit() else name: jobs for name, jobs in load.busy.items()}
        loads[number] = replace(load, busy=busy)
    (told,) = [each for each in site.monitor() if each.type == "w"]
    return told.plan.drains[0].why


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (Load(waiting=0, running=1, busy={"4f1c6c1f0d2e": 1}), "its jobs are not known"),
        (Load(waiting=0, running=1, busy={"ip-10-0-0-7": 1, "ip-10-0-0-8": 0}), "its jobs are not known"),
        (Load(waiting=0, running=1), "its jobs are not known"),
        (Load(waiting=0, busy={"0": 1}), "its jobs are not known"),
        (Load(waiting=0, running=1, busy={"web1": 1, "0": 0}), "idle"),
        (Load(waiting=0, running=1, busy={"0": 1}), "idle"),
        (Load(waiting=0, running=0), "idle"),
    ],
)
def test_a_server_is_idle_only_where_that_is_known(site: Site, load: Load, said: str) -> None:
    assert said in let_go(site, load)


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ((Load(waiting=0), Load(waiting=0, running=0)), "its jobs are not known"),
        ((Load(waiting=0), Load(waiting=0, running=0, busy={"0": 0, "1": 0, "2": 0})), "its jobs are not known"),
        ((Load(waiting=0, running=1), Load(waiting=0, running=0, busy={"0": 0})), "its jobs are not known"),
        ((Load(waiting=0, running=1, busy={"0": 1}), Load(waiting=0, running=0)), "idle"),
        ((Load(waiting=0, busy={"0": 0}), Load(waiting=0, busy={"0": 0})), "idle"),
    ],
)
def test_a_server_is_idle_only_where_each_of_several_queues_says_so(
    site: Site, loads: tuple[Load, Load], said: str
) -> None:
    assert said in let_go(site, *loads)


def test_a_type_without_a_maximum_never_wants_more_than_its_provider_may_have(site: Site) -> None:
    fleet.determine_server_count(lambda fleet: 10**6)
    assert site.monitor()[0].wanted == 5


def test_a_rule_is_needed_to_scale_on_a_load() -> None:
    with pytest.raises(FleetError, match=r"scale_on\(\) needs a rule"):
        ServerType("big").scale_on(lambda: Load(waiting=1))

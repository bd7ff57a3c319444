"""What becomes of servers whose type is not known to everybody, and of a type whose servers do not live."""

from __future__ import annotations

import logging

import pytest

from multiserver_schedule.servers import fleet, ledger, operate, planner, types
from multiserver_schedule.servers.entries import Machine, ServerInfo
from multiserver_schedule.servers.exceptions import ProviderRefused
from multiserver_schedule.servers.fleet import ServerType, option
from multiserver_schedule.servers.visit import AT_ONCE

from .cloud import FolderProvider
from .conftest import MINUTE, POLL, Site


def forget(name: str) -> None:
    """Be another version of the project, that does not have this type."""
    types._registered.pop(name, None)


def test_two_versions_of_which_one_knows_a_type_neither_end_nor_replace_its_servers(site: Site) -> None:
    kind = ServerType("new").drain_with(lambda server: 0)
    fleet.register_server_type(kind)
    fleet.ensure(2, "new")
    site.settle()
    for number in range(60):  # twenty minutes
        forget("new")
        if number % 3 == 0:
            fleet.register_server_type(kind)
        site.monitor()
        site.reconcile()
        site.later()
    assert (site.cloud.made, site.statuses()) == (2, {"running": 2})


def test_servers_of_a_type_that_was_made_a_moment_ago_are_left_alone_by_who_does_not_know_it(site: Site) -> None:
    fleet.register_server_type(ServerType("new"))
    fleet.ensure(1, "new")
    site.monitor()
    forget("new")
    site.monitor()
    assert site.statuses() == {"new": 1}


def test_the_first_server_of_a_type_that_has_a_minimum_is_left_alone_by_who_does_not_know_it(site: Site) -> None:
    """Nobody has ordered it, and its type was not planned for before."""
    fleet.register_server_type(ServerType("new").between(1, 3))
    planner.bring_about(now=site.now)
    assert site.statuses() == {"new": 1}
    assert planner.left_alone(ledger.target("new"), site.now) != ""


def test_servers_of_a_type_that_nobody_has_known_for_a_while_are_let_go_and_until_then_one_is_told(site: Site) -> None:
    fleet.register_server_type(ServerType("old"))
    fleet.ensure(1, "old")
    site.settle()
    forget("old")
    decided = site.monitor()
    assert [(each.wanted, "left as it is until" in each.why) for each in decided if each.type == "old"] == [(1, True)]
    site.passes(40)
    assert site.statuses() == {"running": 1}
    site.later(planner.UNKNOWN_FOR)
    site.settle()
    assert (site.statuses(), site.cloud.machines) == ({}, {})


def test_a_drain_is_left_to_who_knows_it(site: Site) -> None:
    kind = ServerType("new").drain_with(lambda server: 1)
    fleet.register_server_type(kind)
    fleet.ensure(1, "new")
    site.settle()
    fleet.ensure(0, "new")
    site.passes(2)
    assert site.statuses() == {"draining": 1}
    forget("new")
    site.passes(5)
    assert site.statuses() == {"draining": 1}
    assert ledger.servers().get().next_step_at <= site.now - POLL, "and is as due to them as it was"
    assert site.cloud.calls.count("stop_server") == 0


def test_a_reboot_of_what_has_a_drain_is_left_to_who_knows_it(site: Site) -> None:
    fleet.register_server_type(ServerType("new").drain_with(lambda server: 1))
    fleet.ensure(1, "new")
    site.settle()
    fleet.reboot("new")
    forget("new")
    site.passes(3)
    assert site.statuses() == {"running": 1}


def test_the_list_says_why_servers_of_an_unknown_type_stay(site: Site) -> None:
    now = ledger.now()
    row = ledger.target("new")
    ledger.targets().filter(pk=row.pk).update(wanted=3, registered_at=now)
    [line] = operate.type_lines("new")
    assert (line.registered, line.wanted) == (False, 3)
    assert "left as it is until" in line.left_alone
    ledger.targets().update(registered_at=now - planner.UNKNOWN_FOR)
    [line] = operate.type_lines("new")
    assert (line.wanted, line.left_alone) == (0, "")


# -- where servers are made -------------------------------------------------------------------------------------------


def two_providers(site: Site, **limits: int) -> None:
    """Have these entries in the settings, each for so many machines."""
    given = site.settings.MULTISERVER_SCHEDULE_SERVERS
    entry = given["PROVIDERS"]["folder"]
    entries = {name: {**entry, "MAX_SERVERS": limit} for name, limit in limits.items()}
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {**given, "PROVIDERS": entries}


def test_what_one_type_is_about_to_have_made_leaves_no_room_for_another_one(site: Site) -> None:
    two_providers(site, a=4, b=4)
    fleet.register_server_type(ServerType("aa").provider("a"))
    fleet.register_server_type(ServerType("bb").provider("a", "b"))
    fleet.ensure(4, "aa")
    fleet.ensure(2, "bb")
    planner.bring_about(now=site.now)
    assert [(server.type, server.provider) for server in site.servers()] == [("aa", "a")] * 4 + [("bb", "b")] * 2


def test_while_a_provider_is_left_alone_after_failures_the_next_one_is_taken(site: Site) -> None:
    two_providers(site, a=4, b=4)
    fleet.register_server_type(ServerType("bb").provider("a", "b"))
    row = ledger.provider("a")
    ledger.providers().filter(pk=row.pk).update(failures=3, not_before=site.now + 10 * MINUTE)
    fleet.ensure(1, "bb")
    planner.bring_about(now=site.now)
    assert [server.provider for server in site.servers()] == ["b"]


# -- servers that do not live -----------------------------------------------------------------------------------------


def crash(site: Site, type: str, state: str = "stopped") -> None:
    """Let the machines of a type go down by themselves as soon as they are up."""
    for id, machine in site.cloud.machines.items():
        if machine["state"] == "running" and machine["name"].startswith(f"{type}-"):
            site.cloud.put(id, state=state)


@pytest.mark.parametrize("state", ["stopped", "gone"])
def test_servers_that_die_soon_after_they_were_up_are_replaced_more_and_more_slowly(
    site: Site, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ensure(1)
    with caplog.at_level(logging.ERROR, "multiserver_schedule.servers"):
        for _ in range(180):  # an hour
            site.reconcile()
            crash(site, "default", state)
            site.later()
    assert 5 <= site.cloud.made <= 10, "after 20, 40, 80 … 600 s"
    assert site.cloud.made - 1 <= len(caplog.records) <= site.cloud.made, "each is an error"
    dead = site.servers("deleted")
    assert {server.failed_as for server in dead} == {"errored"}
    assert all("after it was up" in server.error for server in dead)


def test_one_is_told_until_when_servers_that_do_not_live_are_not_replaced(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    crash(site, "default")
    while not ledger.target("default").failures:
        site.later()
        site.reconcile()
    assert "soon down again" in " ".join(operate.troubles())
    assert "none is made until" in ledger.target("default").short_because


def test_a_type_whose_servers_do_not_live_keeps_no_other_one_from_growing(site: Site) -> None:
    """Nor is its provider taken for one that fails."""
    fleet.register_server_type(ServerType("bad"))
    fleet.register_server_type(ServerType("good"))
    fleet.ensure(1, "bad")
    for number in range(60):
        site.reconcile()
        crash(site, "bad")
        site.later()
        if number % 20 == 19:
            fleet.increase(1, "good")
            site.passes(1)
            assert len([each for each in site.servers("running") if each.type == "good"]) == fleet.wanted_count("good")
    assert ledger.provider("folder").failures == 0


def test_a_server_that_dies_once_is_replaced_within_two_minutes_and_so_is_the_next_one_an_hour_later(
    site: Site,
) -> None:
    fleet.ensure(2)
    site.settle()
    for _ in range(3):
        crash(site, "default")
        site.passes(6)
        assert site.statuses() == {"running": 2}
        site.passes(60, every=MINUTE)
    assert ledger.target("default").failures == 1, "that of the beginning; the others had lived"


def test_servers_that_come_up_and_die_together_are_one_failure(site: Site) -> None:
    fleet.ensure(5)
    site.settle()
    crash(site, "default")
    site.passes(4)
    assert ledger.target("default").failures == 1
    site.settle()
    assert site.statuses() == {"running": 5}


def test_an_outage_is_over_with_the_first_server_that_is_up(site: Site) -> None:
    site.cloud.fail("create_server", "full", times=4)
    fleet.ensure(1)
    site.passes(40)
    assert site.statuses() == {"running": 1}
    row = ledger.provider("folder")
    assert (row.failures, row.not_before) == (0, None)


# -- servers that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", ["option", "image"])
def test_a_type_that_is_refused_keeps_no_other_one_from_growing_and_one_is_told_what_is_wrong(
    site: Site, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = FolderProvider.create_server

    def picky(self: FolderProvider, server: ServerInfo) -> Machine:
        if server.configuration.get("image") == "NOPE":
            raise ProviderRefused("there is no image NOPE")
        return create(self, server)

    monkeypatch.setattr(FolderProvider, "create_server", picky)
    configuration = {"x": option("NOPE")} if mistake == "option" else {"image": "NOPE"}
    fleet.register_server_type(ServerType("bad").configuration(configuration))
    fleet.register_server_type(ServerType("good"))
    fleet.ensure(2, "bad")
    for number in range(90):  # half an hour
        site.passes(1)
        if number % 30 == 29:
            fleet.increase(1, "good")
            site.passes(1)
            assert len([each for each in site.servers("running") if each.type == "good"]) == fleet.wanted_count("good")
    assert ledger.provider("folder").failures == 0
    bad = [server for server in site.servers() if server.type == "bad"]
    assert 4 * 2 <= len(bad) <= 8 * 2, "after 20, 40, 80 … 600 s"
    short_because = ledger.target("bad").short_because
    assert "none of this type is made there until" in short_because
    assert "NOPE" in short_because


def test_what_one_provider_refuses_is_made_at_the_next_one(site: Site) -> None:
    hosts(site)
    site.cloud.fail("create_server", "refused", times=1000)
    fleet.ensure(2, "worker")
    minutes(site, 10, "one", "two")
    assert where(site) == [("two", "running")] * 2


def test_those_that_wait_when_the_first_ones_are_refused_are_not_asked_for_meanwhile(site: Site) -> None:
    site.options(MAX_SERVERS=20)
    site.cloud.fail("create_server", "refused", times=1000)
    fleet.ensure(20)
    site.reconcile()
    assert site.cloud.calls.count("create_server") <= AT_ONCE
    site.cloud.mend()
    site.settle()
    assert site.statuses() == {"running": 20}


# -- providers that nobody looks at -----------------------------------------------------------------------------------


def hosts(site: Site) -> None:
    """Have a provider on each of two hosts, and a type that is made at either."""
    given = site.settings.MULTISERVER_SCHEDULE_SERVERS
    one = given["PROVIDERS"]["folder"]
    two = {**one, "OPTIONS": {"folder": str(site.cloud.folder.parent / "two")}}
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {**given, "PROVIDERS": {"one": one, "two": two}}
    fleet.register_server_type(ServerType("worker").provider("one", "two"))


def minutes(site: Site, count: int, *names: str) -> None:
    """Let the count be decided, and the tasks of these providers run, for so many minutes."""
    for number in range(3 * count):
        if number % 3 == 0:
            site.monitor()
        for name in names:
            site.reconcile(name)
        site.later()


def where(site: Site) -> list[tuple[str, str]]:
    return sorted((server.provider, server.status) for server in site.servers() if server.status != "deleted")


@pytest.mark.parametrize("was_ever_there", [True, False], ids=["died", "never there"])
def test_a_host_that_is_down_keeps_no_server_from_being_made_at_the_other_one(site: Site, was_ever_there: bool) -> None:
    """Its provider is not away: nobody asks it, so nobody would ever have said that it does not answer."""
    hosts(site)
    site.now = ledger.now() - 60 * MINUTE
    if was_ever_there:
        minutes(site, 2, "one", "two")
    fleet.ensure(2, "worker")
    minutes(site, 5, "two")
    assert where(site) == [("one", "new")] * 2, "it may be looked at still"
    minutes(site, 5, "two")
    assert where(site) == [("two", "running")] * 2
    if was_ever_there:
        assert "nobody has looked at it since" in " ".join(operate.troubles())
    else:
        assert "nobody has ever looked at it" in " ".join(operate.troubles())


def test_what_runs_at_a_provider_that_nobody_looks_at_is_neither_ended_nor_replaced(site: Site) -> None:
    hosts(site)
    fleet.ensure(2, "worker")
    minutes(site, 2, "one", "two")
    minutes(site, 60, "two")
    assert where(site) == [("one", "running")] * 2


@pytest.mark.parametrize("first", ["one", "two"])
def test_after_an_hour_without_a_scheduler_no_provider_is_closed_before_it_could_be_looked_at(
    site: Site, first: str
) -> None:
    hosts(site)
    minutes(site, 2, "one", "two")
    fleet.ensure(2, "worker")
    site.monitor()
    site.later(60 * MINUTE)
    minutes(site, 3, first)
    assert {provider for provider, _ in where(site)} == {"one"}
    minutes(site, 2, "one", "two")
    assert where(site) == [("one", "running")] * 2


def test_a_provider_that_is_looked_at_again_is_open_again_and_no_trouble_is_left(site: Site) -> None:
    hosts(site)
    site.now = ledger.now() - 20 * MINUTE
    minutes(site, 2, "one", "two")
    minutes(site, 15, "two")
    assert operate.troubles() != []
    fleet.ensure(2, "worker")
    site.reconcile("one")
    assert where(site) == [("one", "running")] * 2
    assert operate.troubles() == []


def test_that_a_provider_does_not_answer_is_said_since_it_did_not_and_not_since_nobody_looked(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    hosts(site)
    minutes(site, 2, "one", "two")
    minutes(site, 15, "two")
    site.cloud.fail("*", "busy", times=1000)
    site.reconcile("one")
    assert ledger.provider("one").trouble_since == site.now
    assert "does not answer" in caplog.text

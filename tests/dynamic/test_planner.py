"""What becomes of servers whose type is not known to everybody, and of a type whose servers do not live."""

from __future__ import annotations

from multiserver_schedule.servers import fleet, ledger, operate, planner, types
from multiserver_schedule.servers.fleet import ServerType

from .conftest import POLL, Site


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

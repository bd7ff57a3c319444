"""Whose a machine is that a provider shows: a server's, another provider's, nobody's."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from multiserver_schedule.servers import fleet, ledger, operate
from multiserver_schedule.servers.fleet import ServerType

from .conftest import MINUTE, Heard, Site


def providers(site: Site, *names: str) -> None:
    """Have these entries in the settings, all of one account."""
    given = site.settings.MULTISERVER_SCHEDULE_SERVERS
    entry = next(iter(given["PROVIDERS"].values()))
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {**given, "PROVIDERS": dict.fromkeys(names, entry)}


def test_two_entries_of_one_account_leave_each_others_machines_alone(site: Site, heard: Callable[..., Heard]) -> None:
    providers(site, "folder", "other")
    orphans = heard("orphan_found")
    fleet.register_server_type(ServerType("small").provider("folder"))
    fleet.register_server_type(ServerType("big").provider("other"))
    fleet.ensure(1, "small")
    fleet.ensure(1, "big")
    for _ in range(20):
        site.reconcile("folder")
        site.reconcile("other")
        site.later()
    assert (site.cloud.made, site.statuses(), orphans) == (2, {"running": 2}, [])


def test_that_two_entries_have_one_account_is_said_once_and_seen_as_long_as_it_is_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ensure(1)
    site.settle()
    providers(site, "folder", "other")
    [server] = site.servers()
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        for _ in range(3):
            site.reconcile("other")
            site.later(MINUTE)
    assert [server.name in record.getMessage() for record in caplog.records] == [True]
    [trouble] = operate.troubles()
    assert f"{server.machine_id} ({server.name} at folder)" in trouble
    assert ledger.used_at("other") == 1, "its place is taken there, too: the account has no other"


def test_a_provider_may_be_given_another_name_and_its_servers_go_on(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ensure(2)
    site.settle()
    machines = site.cloud.machines
    providers(site, "other")
    site.monitor()
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        for _ in range(10):
            site.reconcile("other")
            site.monitor()
            site.later()
    assert site.cloud.machines == machines
    assert [(server.provider, server.status) for server in site.servers()] == [("other", "running")] * 2
    assert len([record for record in caplog.records if "in the settings no more" in record.getMessage()]) == 2
    fleet.ensure(0)
    for _ in range(10):
        site.reconcile("other")
        site.later()
    assert site.cloud.machines == {}


def test_a_deploy_that_renames_a_provider_while_both_versions_work_makes_and_ends_nothing(site: Site) -> None:
    fleet.ensure(2)
    site.settle()
    machines = site.cloud.machines
    for number in range(20):
        name = "other" if number % 2 else "folder"
        providers(site, name)
        site.monitor()
        site.reconcile(name)
        site.later()
    assert site.cloud.machines == machines
    assert site.statuses() == {"running": 2}


def test_servers_of_a_provider_that_was_taken_out_are_not_replaced_and_one_is_told_what_to_do(site: Site) -> None:
    fleet.ensure(2)
    site.settle()
    providers(site, "other")
    site.monitor()
    assert site.statuses() == {"running": 2}, "whether their machines work is not known, nor whether they are billed"
    [trouble] = operate.troubles()
    assert "2 servers are at folder, which is in the settings no more" in trouble
    assert "servers delete" in trouble
    assert all(server.name in trouble for server in site.servers())


def test_servers_of_a_provider_that_was_taken_out_are_closed_by_hand_and_then_replaced(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    [gone] = site.servers()
    site.cloud.put(gone.machine_id, state="gone")
    providers(site, "other")
    [done] = operate.retire([gone.name], "anna")
    assert done.done
    assert gone.machine_id in done.said
    for _ in range(4):
        site.reconcile("other")
        site.later()
    assert operate.troubles() == []
    assert [(server.provider, server.status) for server in site.servers()] == [
        ("folder", "deleted"),
        ("other", "running"),
    ]


def test_a_machine_whose_row_was_closed_by_hand_is_ended_when_its_provider_is_back(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    [server] = site.servers()
    fleet.ensure(0)
    providers(site, "elsewhere")
    operate.retire([server.name], "anna")
    site.later(MINUTE)
    providers(site, "other")
    for _ in range(8):
        site.reconcile("other")
        site.later()
    assert site.cloud.machines == {}
    assert site.statuses() == {}

"""Whose a machine is that a provider shows: a server's, another provider's, nobody's."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from django.db.models import F

from multiserver_schedule.servers import fleet, ledger, operate
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.fleet import ServerType
from multiserver_schedule.servers.models import Server

from .cloud import FolderProvider
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


@pytest.mark.parametrize("is_known", [True, False], ids=["machine known", "answer lost"])
def test_a_server_that_somebody_else_takes_over_at_the_same_moment_is_no_orphan(
    site: Site, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    fleet.ensure(1)
    site.settle()
    if not is_known:
        ledger.servers().update(machine_id="", status="starting", unanswered_at=site.now)
    machines = site.cloud.machines
    providers(site, "other")
    change = ledger.change

    def too_late(server: Server, **values: object) -> bool:
        if values.get("provider") == "other":
            ledger.servers().filter(pk=server.pk).update(provider="other", version=F("version") + 1)
        return change(server, **values)

    monkeypatch.setattr(ledger, "change", too_late)
    site.reconcile("other")
    monkeypatch.setattr(ledger, "change", change)
    for _ in range(6):
        site.reconcile("other")
        site.later()
    assert site.cloud.machines == machines
    assert site.statuses() == {"running": 1}


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


def test_an_orphan_that_has_a_row_now_counts_once_towards_the_limit(site: Site) -> None:
    site.options(looks=1000)
    for number in range(2):
        site.cloud.put(f"stranger{number}")
    site.reconcile()
    assert ledger.provider("folder").unknown == 0
    assert (ledger.used_at("folder"), len(site.cloud.machines)) == (2, 2)


def test_an_orphan_is_drained_under_the_name_of_its_machine(site: Site) -> None:
    asked: list[str] = []
    fleet.register_server_type(ServerType("worker").drain_with(lambda server: int(asked.append(server.name) or 0)))
    site.cloud.put("m-stranger", key="abcdef", name="worker-abcdef")
    site.settle()
    assert asked == ["worker-abcdef"]
    assert site.cloud.machines == {}


@pytest.mark.parametrize("known", [("worker", "big-worker"), ("big-worker", "worker"), ("worker",)])
def test_an_orphan_gets_the_drain_of_its_own_type_and_of_none_with_a_name_like_it(
    site: Site, known: tuple[str, ...]
) -> None:
    asked: list[str] = []

    def drain_of(name: str) -> Callable[[ServerInfo], int]:
        return lambda server: asked.append(name) or 0

    for name in known:
        fleet.register_server_type(ServerType(name).drain_with(drain_of(name)))
    site.cloud.put("m-stranger", key="5d2a41c09b7e", name="big-worker-5d2a41c09b7e")
    site.settle()
    assert asked == [name for name in known if name == "big-worker"]
    assert site.cloud.machines == {}


@pytest.mark.parametrize("name", ["", "Its Name & more", "x" * 101, "default-0123456789ab"])
def test_an_orphan_whose_name_no_row_can_have_gets_one_of_its_own_and_is_ended(site: Site, name: str) -> None:
    fleet.ensure(1)
    site.settle()
    ledger.servers().update(name="default-0123456789ab")
    site.cloud.put("m-stranger", key="abcdef", name=name)
    site.passes(8)
    assert [server.name for server in site.servers("deleted")] == ["orphan-abcdef"]
    assert len(site.cloud.machines) == 1


def test_a_machine_that_is_shown_late_by_all_that_its_provider_says_is_made_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks for a machine by its id in a list says of one that is not in it yet that it is gone."""

    def shown(self: FolderProvider, machine_id: str) -> bool:
        return any(machine.id == machine_id for machine in self.list_servers())

    monkeypatch.setattr(FolderProvider, "has_been_deleted", lambda self, machine_id: not shown(self, machine_id))
    monkeypatch.setattr(FolderProvider, "has_started", shown)
    site.options(lag=120, settles=150)
    fleet.ensure(1)
    site.passes(30)
    assert (site.cloud.made, site.statuses()) == (1, {"running": 1})


def test_a_machine_that_is_gone_before_it_was_up_is_replaced_when_it_should_be_shown(site: Site) -> None:
    site.options(looks=10_000, settles=100)
    fleet.ensure(1)
    site.reconcile()
    [first] = site.servers()
    site.cloud.put(first.machine_id, state="gone")
    site.options(looks=0)
    site.passes(12)
    assert (site.cloud.made, site.statuses()) == (2, {"running": 1})

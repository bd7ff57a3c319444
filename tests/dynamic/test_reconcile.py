"""What is brought about at a provider, and what becomes of a call that fails."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections
from django.test.utils import CaptureQueriesContext

from multiserver_schedule.servers import fleet, ledger, visit
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.fleet import ServerType, option
from multiserver_schedule.servers.providers.base import BaseProvider
from multiserver_schedule.servers.states import Status

from ..stores import Store
from .cloud import FolderProvider
from .conftest import MINUTE, POLL, Heard, Site


def test_what_is_ensured_runs_after_one_pass_where_machines_are_up_at_once(site: Site) -> None:
    fleet.ensure(2)
    site.reconcile()
    assert site.statuses() == {"running": 2}
    assert sorted(machine["key"] for machine in site.cloud.machines.values()) == sorted(
        server.key for server in site.servers()
    )


def test_a_machine_that_takes_time_is_asked_after_each_twenty_seconds(site: Site) -> None:
    site.options(looks=2)
    fleet.ensure(1)
    site.reconcile()
    assert site.statuses() == {"starting": 1}
    for _ in range(3):
        site.reconcile()  # not before its time
    assert site.cloud.calls.count("has_started") == 1
    site.later()
    site.reconcile()
    site.later()
    site.reconcile()
    assert site.statuses() == {"running": 1}
    assert site.cloud.calls.count("has_started") == 3


def test_what_is_no_longer_wanted_is_stopped_and_deleted_and_its_machine_is_gone(site: Site) -> None:
    site.options(looks=1)
    fleet.ensure(3)
    site.settle()
    fleet.ensure(1)
    site.settle()
    assert site.statuses() == {"running": 1}
    assert len(site.cloud.machines) == 1
    one = site.servers("deleted")[0]
    assert [row.status for row in one.transitions.order_by("pk")] == [
        *("new", "starting", "running", "draining", "stopping", "stopped", "deleting", "deleted")
    ]


def test_the_limit_is_exact_and_what_is_short_is_said(site: Site, heard: Callable[..., Heard]) -> None:
    told = heard("server_limit_hit")
    fleet.ensure(7)
    site.passes(4)
    assert site.statuses() == {"running": 5}
    assert "5" in ledger.target("default").short_because
    assert len(told) == 1, "said once, and not with every pass"


def test_it_is_short_since_it_first_was_whatever_the_reasons_were_since(site: Site) -> None:
    fleet.ensure(7)
    site.passes(1)
    first = ledger.target("default")
    fleet.ensure(9)
    site.passes(1)
    row = ledger.target("default")
    assert row.short_because != first.short_because
    assert row.short_since == first.short_since is not None


def test_what_the_provider_really_has_counts_towards_the_limit(site: Site) -> None:
    site.settings.MULTISERVER_SCHEDULE_SERVERS["ORPHANS"] = "report"
    for number in range(3):
        site.cloud.put(f"stranger{number}")
    fleet.ensure(5)
    site.passes(3)
    assert site.statuses() == {"running": 2}
    assert site.cloud.most == 5


def test_an_answer_that_was_lost_after_the_machine_was_made_leads_to_no_second_one(site: Site) -> None:
    site.cloud.fail("create_server", "done")
    fleet.ensure(1)
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.made == 1


def test_an_answer_that_was_lost_before_the_machine_was_made_leads_to_one_when_it_is_sure(site: Site) -> None:
    site.options(settles=100)
    site.cloud.fail("create_server", "lost")
    fleet.ensure(1)
    site.passes(4)
    assert site.cloud.made == 0, "it may still be made: nobody knows yet"
    site.passes(3)
    assert site.statuses() == {"running": 1}
    assert site.cloud.made == 1


def test_a_server_that_is_not_wanted_any_more_is_given_up_when_its_machine_cannot_be_made_any_more(site: Site) -> None:
    """Its creation may be under way still, at a provider that shows what it has made at once."""
    site.options(settles=0)
    fleet.ensure(1)
    site.monitor()
    ledger.servers().update(status="stopping", unanswered_at=site.now, next_step_at=site.now)
    fleet.ensure(0)
    site.passes(2)
    assert site.statuses() == {"stopping": 1}
    site.settle()
    assert site.statuses() == {}


def test_a_provider_that_takes_keys_is_asked_again_at_once(site: Site) -> None:
    site.options(idempotent=True)
    site.cloud.fail("create_server", "lost")
    fleet.ensure(1)
    site.passes(3)
    assert site.statuses() == {"running": 1}


def test_a_refusal_ends_the_server_and_replacements_come_more_and_more_slowly(
    site: Site, heard: Callable[..., Heard]
) -> None:
    errored = heard("server_errored")
    site.cloud.fail("create_server", "refused", times=1000)
    fleet.ensure(1)
    site.passes(90)  # half an hour
    assert 4 <= len(errored) <= 8, "after 20, 40, 80 … 600 s"
    assert site.cloud.machines == {}
    site.cloud.mend()
    site.passes(40)
    assert site.statuses() == {"running": 1}


def test_a_provider_without_room_makes_the_server_wait_and_not_a_new_row_each_time(
    site: Site, heard: Callable[..., Heard]
) -> None:
    told = heard("server_limit_hit")
    site.cloud.fail("create_server", "full", times=1000)
    fleet.ensure(1)
    site.passes(90)
    assert len(site.servers()) == 1
    assert 4 <= site.cloud.calls.count("create_server") <= 9
    assert len(told) == 1
    site.cloud.mend()
    site.passes(40)
    assert site.statuses() == {"running": 1}


def test_a_throttled_creation_is_tried_again_by_itself(site: Site) -> None:
    site.cloud.fail("create_server", "busy", times=2)
    fleet.ensure(1)
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.calls.count("find_by_tag") == 0, "it certainly made nothing"


def test_a_provider_that_says_when_to_come_again_is_not_called_before(site: Site) -> None:
    site.cloud.fail("create_server", "busy", retry_after=300)
    fleet.ensure(1)
    site.passes(12)  # four minutes
    assert site.cloud.calls.count("create_server") == 1
    site.passes(5)
    assert site.statuses() == {"running": 1}


def test_a_machine_that_never_starts_hangs_after_ten_minutes_and_is_deleted_and_replaced(
    site: Site, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    site.options(looks=10_000)
    fleet.ensure(1)
    site.passes(29)
    assert hanging == []
    site.passes(3)
    assert len(hanging) == 1
    site.options(looks=0)
    site.settle()
    assert site.statuses() == {"running": 1}
    assert len(site.cloud.machines) == 1
    assert {server.failed_as for server in site.servers("deleted")} == {"hanging"}


@pytest.mark.parametrize("call", ["stop_server", "has_stopped", "delete_server", "has_been_deleted"])
@pytest.mark.parametrize("what", ["busy", "lost", "done", "crash", "word"])
def test_no_machine_is_leaked_when_a_call_of_its_end_fails(site: Site, call: str, what: str) -> None:
    fleet.ensure(1)
    site.settle()
    site.cloud.fail(call, what, times=3)
    fleet.ensure(0)
    site.settle()
    assert site.statuses() == {}
    assert site.cloud.machines == {}


def test_a_provider_that_is_down_changes_nothing_and_is_said_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    fleet.ensure(2)
    site.settle()
    site.cloud.fail("*", "busy", times=10_000)
    fleet.ensure(4)
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        site.passes(30)
    assert site.statuses() == {"running": 2}
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], "away, and so short: each once"
    row = ledger.provider("folder")
    assert row.trouble
    site.cloud.mend()
    site.passes(40)
    assert site.statuses() == {"running": 4}
    assert site.cloud.made == 4
    assert not ledger.provider("folder").trouble


def test_a_machine_without_a_row_is_found_and_ended(site: Site, heard: Callable[..., Heard]) -> None:
    orphans = heard("orphan_found")
    site.cloud.put("m-stranger", key="abcdef", name="default-abcdef")
    site.cloud.put("m-of-others", fleet="elsewhere")
    site.settle()
    assert set(site.cloud.machines) == {"m-of-others"}
    assert len(orphans) == 1


def test_a_machine_that_turns_up_after_its_row_was_closed_is_ended(site: Site, heard: Callable[..., Heard]) -> None:
    orphans = heard("orphan_found")
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.settle()
    site.later(MINUTE)
    server = site.servers()[0]
    site.cloud.put(server.machine_id, state="running", key=server.key)
    site.passes(8)
    assert site.cloud.machines == {}
    assert site.statuses() == {}
    assert len(orphans) == 1


def test_a_second_machine_with_the_same_key_is_ended_and_the_first_one_kept(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    server = site.servers()[0]
    site.cloud.put("m-double", key=server.key, name=server.name)
    site.passes(10)
    assert set(site.cloud.machines) == {server.machine_id}
    assert site.statuses() == {"running": 1}


def test_the_first_machine_is_kept_also_where_the_second_one_is_listed_before_it(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    server = site.servers()[0]
    site.cloud.put("m-double", key=server.key, name=server.name)
    with site.cloud.state() as state:
        state["machines"][server.machine_id] = state["machines"].pop(server.machine_id)
    site.passes(10)
    assert set(site.cloud.machines) == {server.machine_id}
    assert site.statuses() == {"running": 1}


def test_a_machine_that_somebody_deleted_is_noticed_and_replaced(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    first = site.servers()[0]
    site.cloud.put(first.machine_id, state="gone")
    site.passes(8)
    assert site.statuses() == {"running": 1}
    first.refresh_from_db()
    assert first.status == "deleted"
    assert "not by us" in first.reason


def test_a_machine_that_a_list_leaves_out_is_asked_for_by_its_name_before_it_is_given_up(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    server = site.servers()[0]
    site.cloud.put(server.machine_id, fleet="a list that is cut short")
    site.passes(10)
    server.refresh_from_db()
    assert server.status == "running"


def test_a_machine_that_was_never_answered_for_is_not_missing(site: Site) -> None:
    """There may be none yet: it is looked up by its key, and by no other name."""
    site.options(settles=100)
    site.cloud.fail("create_server", "lost")
    fleet.ensure(1)
    site.passes(4)
    assert [server.missing_since for server in site.servers()] == [None]
    assert "has_been_deleted" not in site.cloud.calls


def test_a_machine_that_has_stopped_by_itself_is_cleaned_up_and_replaced(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    site.cloud.put(site.servers()[0].machine_id, state="stopped")
    site.passes(8)
    assert site.statuses() == {"running": 1}
    assert len(site.cloud.machines) == 1


def test_a_reboot_is_over_when_the_machine_has_booted_again_and_not_before(site: Site) -> None:
    site.options(looks=1)
    fleet.ensure(1)
    site.settle()
    server = site.servers()[0]
    assert fleet.reboot() == 1
    site.reconcile()
    assert site.statuses() == {"rebooting": 1}
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.machines[server.machine_id]["boots"] == 2


def test_a_reboot_that_is_asked_for_while_a_server_starts_comes_when_it_is_up(site: Site) -> None:
    site.options(looks=2)
    fleet.ensure(1)
    site.reconcile()
    fleet.reboot()
    site.settle()
    machine = next(iter(site.cloud.machines.values()))
    assert (machine["boots"], site.statuses()) == (2, {"running": 1})


def test_a_server_that_reboots_and_is_not_wanted_any_more_is_ended_without_waiting_for_it(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    site.options(looks=1000)
    fleet.reboot()
    site.reconcile()
    assert site.statuses() == {"rebooting": 1}
    fleet.ensure(0)
    site.passes(2)
    assert site.statuses() == {"stopping": 1}


@pytest.mark.parametrize("what", ["busy", "lost", "done", "crash"])
def test_a_reboot_whose_request_fails_is_asked_for_again(site: Site, what: str) -> None:
    fleet.ensure(1)
    site.settle()
    site.cloud.fail("reboot_server", what)
    fleet.reboot()
    site.settle()
    assert site.statuses() == {"running": 1}
    assert next(iter(site.cloud.machines.values()))["boots"] >= 2


def test_a_server_that_is_drained_is_not_stopped_while_it_works(site: Site) -> None:
    jobs = {"left": 3}

    def drain(server: Any) -> int:
        jobs["left"] -= 1
        return jobs["left"]

    fleet.register_server_type(ServerType("default").drain_with(drain))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.passes(2)
    assert site.statuses() == {"draining": 1}
    assert site.cloud.calls.count("stop_server") == 0
    site.settle()
    assert site.cloud.machines == {}


@pytest.mark.parametrize("answer", [1, "hangs"])
def test_a_drain_that_does_not_come_to_an_end_is_given_up_at_its_limit(site: Site, answer: Any) -> None:
    def drain(server: Any) -> int:
        if answer == "hangs":
            raise RuntimeError("no answer from the worker")
        return int(answer)

    fleet.register_server_type(ServerType("default").drain_with(drain, limit=timedelta(minutes=2)))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.passes(5)
    assert site.statuses() == {"draining": 1}
    site.settle()
    assert site.cloud.machines == {}
    assert "not drained" in site.servers()[0].transitions.get(status="stopping").reason


def test_a_secret_reaches_the_machine_and_no_row(site: Site) -> None:
    configuration = {"image": "worker-7", "user_data": {"broker": option("password")}}
    fleet.register_server_type(ServerType("default").configuration(configuration))
    fleet.ensure(1)
    site.settle()
    machine = next(iter(site.cloud.machines.values()))
    assert machine["configuration"]["user_data"] == {"broker": "hunter2-hunter2"}
    assert site.servers()[0].configuration == configuration
    assert "hunter2" not in str(list(ledger.servers().values()))


def test_a_secret_in_a_drivers_error_is_neither_kept_nor_logged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.cloud.fail("create_server", "crash")
    fleet.ensure(1)
    with caplog.at_level(logging.DEBUG):
        site.passes(3)
    assert site.servers()[0].attempts or site.servers()[0].error or site.statuses()
    assert "hunter2" not in caplog.text
    assert "hunter2" not in str(list(ledger.servers().values()))


def test_a_server_that_may_not_call_the_provider_leaves_it_alone(site: Site) -> None:
    site.settings.MULTISERVER_SCHEDULE_SERVERS["PROVIDERS"]["folder"]["ONLY_ON"] = ["web9"]
    fleet.ensure(1)
    assert "web9" in site.reconcile().trouble
    assert site.cloud.calls == []


def test_a_pass_with_nothing_to_do_costs_nine_statements_and_no_call(site: Site, rows: Store) -> None:
    fleet.register_server_type(ServerType("big"))
    fleet.ensure(3)
    site.settle()
    calls = len(site.cloud.calls)
    with CaptureQueriesContext(connections[rows.alias]) as captured:
        site.reconcile()
    assert len(captured) == 9, [query["sql"] for query in captured]
    assert len(site.cloud.calls) == calls, "the provider is looked at once a minute"


def test_a_server_that_can_be_drained_is_not_rebooted_while_it_works_and_is_not_replaced_meanwhile(site: Site) -> None:
    jobs = {"left": 3}

    def drain(server: Any) -> int:
        jobs["left"] -= 1
        return jobs["left"]

    fleet.register_server_type(ServerType("default").drain_with(drain))
    fleet.ensure(1)
    site.settle()
    fleet.reboot()
    site.passes(2)
    assert [server.status for server in site.servers()] == ["draining"]
    assert fleet.provisioned_count() == 1
    assert site.cloud.calls.count("reboot_server") == 0
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.made == 1
    assert next(iter(site.cloud.machines.values()))["boots"] == 2


def test_a_server_that_is_drained_for_a_reboot_and_no_longer_wanted_does_not_come_back(site: Site) -> None:
    jobs = {"left": 1}
    fleet.register_server_type(ServerType("default").drain_with(lambda server: jobs["left"]))
    fleet.ensure(1)
    site.settle()
    fleet.reboot()
    site.passes(2)
    fleet.ensure(0)
    site.passes(2)
    jobs["left"] = 0
    site.settle()
    assert site.cloud.machines == {}
    assert site.cloud.calls.count("reboot_server") == 0


def test_a_server_that_has_ended_by_itself_is_not_asked_to_drain(site: Site) -> None:
    def drain(server: Any) -> int:
        raise RuntimeError("the broker is away, too")

    fleet.register_server_type(ServerType("default").drain_with(drain))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.passes(2)
    site.cloud.put(site.servers()[0].machine_id, state="stopped")
    site.passes(3)
    assert site.cloud.machines == {}


def test_a_machine_that_ends_before_it_is_up_is_an_error_and_replaced_with_patience(
    site: Site, heard: Callable[..., Heard]
) -> None:
    errored = heard("server_errored")
    site.options(looks=3)
    fleet.ensure(1)
    for _ in range(30):  # ten minutes
        site.reconcile()
        for id, machine in site.cloud.machines.items():
            if machine["state"] == "pending":
                site.cloud.put(id, state="stopped")
        site.later()
    assert 2 <= len(errored) <= 6
    assert "stopped before it was up" in site.servers("deleted")[0].error


def test_a_server_that_its_provider_will_not_stop_is_deleted_at_once_and_has_not_failed(
    site: Site, heard: Callable[..., Heard]
) -> None:
    """As with a driver that has no stop: ten minutes more would cost money, and end as an error."""
    hanging = heard("server_hanging")
    fleet.ensure(1)
    site.settle()
    site.cloud.fail("stop_server", "refused", times=1000)
    fleet.ensure(0)
    site.passes(3)
    assert site.cloud.machines == {}
    [server] = site.servers()
    assert (server.status, server.failed_as, hanging) == ("deleted", "", [])
    assert "without being stopped: stop_server: refused" in server.transitions.get(status="deleting").reason


# -- what nobody could ask for long -----------------------------------------------------------------------------------


def nobody_asks(site: Site, how: str, span: timedelta = 11 * MINUTE) -> None:
    """Let time pass in which nothing can be done: no pass runs, or the provider does not answer any."""
    if how == "away":
        site.cloud.fail("*", "lost", times=10_000)
        site.passes(int(span / POLL))
        site.cloud.mend()
    # As much again as it is left alone for at most.
    site.later(span)


@pytest.mark.parametrize("how", ["paused", "away"])
def test_an_outage_while_servers_start_ends_none_of_them(site: Site, how: str, heard: Callable[..., Heard]) -> None:
    hanging = heard("server_hanging")
    site.options(looks=1)
    fleet.ensure(2)
    site.reconcile()
    site.later()
    site.options(looks=0)
    nobody_asks(site, how)
    site.settle()
    assert (site.statuses(), site.cloud.made, hanging) == ({"running": 2}, 2, [])
    assert ledger.provider("folder").failures == 0, "nor did it fail"


@pytest.mark.parametrize("how", ["paused", "away"])
@pytest.mark.parametrize("was_asked", [True, False], ids=["asked", "not asked"])
def test_an_outage_while_servers_reboot_ends_none_of_them(
    site: Site, how: str, was_asked: bool, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    site.options(looks=1)
    fleet.ensure(2)
    site.settle()
    fleet.reboot()
    if was_asked:
        site.reconcile()
        site.later()
        site.options(looks=0)  # up by then
    else:
        for server in site.servers():
            assert ledger.move(server, Status.REBOOTING, "asked for", now=site.now, reboot_requested_at=None)
    nobody_asks(site, how)
    site.cloud.fail("reboot_server", "busy")
    site.settle()
    assert (site.statuses(), site.cloud.made, hanging) == ({"running": 2}, 2, [])
    assert {machine["boots"] for machine in site.cloud.machines.values()} == {2}


def test_one_error_when_the_scheduler_is_back_ends_no_server_that_starts(site: Site) -> None:
    site.options(looks=1)
    fleet.ensure(1)
    site.reconcile()
    nobody_asks(site, "paused")
    site.cloud.fail("has_started", "lost")
    site.settle()
    assert (site.statuses(), site.cloud.made) == ({"running": 1}, 1)


def one_that_ends(site: Site, status: Status) -> None:
    """Have a server that is to be told to end, and a machine of it that never does."""
    site.options(looks=10_000)
    word = "running" if status is Status.STOPPING else "stopped"
    site.cloud.put("m1", key="key-one", name="default-one", state=word)
    row = {"name": "one", "key": "key-one", "type": "default", "provider": "folder", "machine_id": "m1"}
    at = {"status_changed_at": site.now, "created_at": site.now, "next_step_at": site.now}
    ledger.servers().create(**row, **at, status=status.value)


@pytest.mark.parametrize("status", [Status.STOPPING, Status.DELETING])
def test_what_is_told_to_end_after_an_outage_has_all_its_time_from_then_on(
    site: Site, status: Status, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    one_that_ends(site, status)
    site.later(11 * MINUTE)
    site.passes(29)
    assert hanging == []
    site.passes(3)
    assert hanging == [("server_hanging", "one")]


@pytest.mark.parametrize(("status", "call"), [(Status.STOPPING, "stop_server"), (Status.DELETING, "delete_server")])
def test_what_does_not_end_is_told_again_each_minute_and_not_more_often(site: Site, status: Status, call: str) -> None:
    one_that_ends(site, status)
    site.passes(16)
    assert site.cloud.calls.count(call) == 6


def test_a_reboot_whose_requests_are_all_lost_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    monkeypatch.setattr(FolderProvider, "reboot_server", lambda self, machine_id: None)
    fleet.ensure(1)
    site.settle()
    fleet.reboot()
    site.passes(29)
    assert hanging == []
    site.passes(8)
    assert len(hanging) == 1


@pytest.mark.parametrize("how", ["paused", "away"])
def test_a_drain_that_could_not_be_told_for_longer_than_its_limit_is_told_and_has_all_its_time(
    site: Site, how: str
) -> None:
    told: list[str] = []

    def drain(server: Any) -> int:
        told.append(server.name)
        return 3

    fleet.register_server_type(ServerType("default").drain_with(drain, limit=5 * MINUTE))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.monitor()
    nobody_asks(site, how)
    site.passes(15)
    assert (len(told), site.statuses()) == (15, {"draining": 1})
    site.settle()
    assert site.cloud.machines == {}


# -- reboots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["stopped", "stopping", "running"])
def test_a_reboot_that_is_refused_of_a_machine_that_is_down_has_it_replaced_and_it_did_not_die_young(
    site: Site, state: str, heard: Callable[..., Heard]
) -> None:
    """Its drain has ended it, as one does that stops its machine."""
    told = heard("server_running", "server_errored")
    fleet.ensure(1)
    site.settle()
    [first] = site.servers()
    told.clear()
    fleet.reboot()
    site.cloud.fail("reboot_server", "refused")
    site.cloud.put(first.machine_id, state=state)
    # The look at all machines is not due, so that the reboot comes first.
    site.now -= POLL
    site.settle()
    assert site.statuses() == {"running": 1}
    assert ledger.target("default").failures == 0
    first.refresh_from_db()
    if state == "running":
        assert (first.status, told) == ("running", [("server_running", first.name)])
        assert first.error == "reboot_server: refused"
    else:
        assert (first.status, first.failed_as) == ("deleted", "")
        assert "down, and is not rebooted" in first.transitions.get(status="stopping").reason
        assert [name for name, _ in told] == ["server_running"], "the other one"


def test_a_second_reboot_that_is_lost_with_the_process_that_was_to_ask_for_it_is_asked_for_again(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    fleet.reboot()
    site.settle()
    [server] = site.servers()
    site.later(30 * MINUTE)
    site.reconcile()
    server.refresh_from_db()
    # What a pass has written that is killed before it calls.
    assert ledger.move(server, Status.REBOOTING, "as it was asked for", now=site.now, reboot_requested_at=None)
    assert ledger.change(server, called_at=site.now, next_step_at=site.now + 90 * timedelta(seconds=1))
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.machines[server.machine_id]["boots"] == 3


def test_a_machine_that_its_provider_gives_longer_to_stop_than_anything_may_take_has_that_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    monkeypatch.setattr(FolderProvider, "stop_timeout", 30 * MINUTE, raising=False)
    one_that_ends(site, Status.STOPPING)
    site.passes(31, every=MINUTE)
    assert (hanging, site.statuses()) == ([], {"stopping": 1})
    site.passes(3, every=MINUTE)
    assert hanging == [("server_hanging", "one")], "but no longer"


def test_a_machine_that_goes_down_during_its_reboot_is_replaced_before_its_time_is_over(
    site: Site, heard: Callable[..., Heard]
) -> None:
    hanging = heard("server_hanging")
    site.options(looks=10_000)
    site.cloud.put("m-one", key="key-one", name="default-one", state="pending", boots=2)
    row = {"name": "one", "key": "key-one", "type": "default", "provider": "folder", "machine_id": "m-one"}
    at = {"status_changed_at": site.now, "created_at": site.now, "next_step_at": site.now, "called_at": site.now}
    fleet.ensure(1)
    ledger.servers().create(**row, **at, status=Status.REBOOTING.value, booted="boot-1")
    site.cloud.put("m-one", state="stopped")
    site.passes(6)
    assert site.statuses() == {"rebooting": 1}, "it may be down for a moment"
    site.passes(1)
    assert "rebooting" not in site.statuses()
    site.options(looks=0)
    site.settle()
    assert (site.statuses(), site.cloud.made, hanging) == ({"running": 1}, 1, [])
    assert "m-one" not in site.cloud.machines


# -- what is over -----------------------------------------------------------------------------------------------------


def test_a_server_that_was_rebooted_does_not_show_the_jobs_of_before(site: Site) -> None:
    fleet.register_server_type(ServerType("default").drain_with(lambda server: 2, limit=MINUTE))
    fleet.ensure(1)
    site.settle()
    fleet.reboot()
    site.passes(2)
    assert [server.jobs for server in site.servers()] == [2]
    site.settle()
    assert [(server.status, server.jobs) for server in site.servers()] == [("running", None)]


def test_no_reboot_is_asked_for_any_more_of_a_server_that_goes(site: Site) -> None:
    fleet.ensure(2)
    site.settle()
    one, other = site.servers()
    fleet.reboot()
    assert ledger.move(one, Status.STOPPING, "deleted by hand", now=site.now) is False, "changed meanwhile"
    one.refresh_from_db()
    assert ledger.move(one, Status.STOPPING, "deleted by hand", now=site.now)
    site.cloud.put(other.machine_id, state="gone")
    site.settle()
    assert {server.reboot_requested_at for server in site.servers("deleted")} == {None}


def test_a_server_that_is_well_again_shows_no_attempts_that_failed(site: Site) -> None:
    fleet.ensure(1)
    site.settle()
    [server] = site.servers()
    site.cloud.put(server.machine_id, fleet="a list that is cut short")
    site.cloud.fail("has_been_deleted", "lost", times=3)
    site.passes(14)
    server.refresh_from_db()
    assert (server.status, server.attempts, server.error) == ("running", 0, "")


# -- what hangs -------------------------------------------------------------------------------------------------------


def test_drains_that_hang_hold_up_no_other_one_and_none_is_said_not_to_answer_that_was_never_asked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "ANSWERS_WITHIN", timedelta(seconds=1))
    site.options(timeout=0.1, MAX_SERVERS=2 * visit.AT_ONCE)
    told: list[str] = []
    over = threading.Event()

    def works(server: ServerInfo) -> int:
        told.append(server.name)
        return 1

    fleet.register_server_type(ServerType("hangs").drain_with(lambda server: int(over.wait(60)) or 1))
    fleet.register_server_type(ServerType("works").drain_with(works))
    fleet.ensure(visit.AT_ONCE, "hangs")
    fleet.ensure(1, "works")
    site.settle()
    fleet.ensure(0, "hangs")
    fleet.ensure(0, "works")
    site.monitor()
    try:
        site.passes(2)
    finally:
        over.set()
    assert len(told) == 2, "with each pass"
    assert {server.error for server in site.servers() if server.type == "works"} == {""}
    errors = {server.error for server in site.servers() if server.type == "hangs"}
    assert errors == {"its drain did not answer within 1 s"}


@pytest.mark.parametrize("what", ["submit(lambda provider: time.sleep(600))", "submit_drain(lambda: time.sleep(600))"])
def test_a_call_that_hangs_keeps_no_command_from_its_end(what: str) -> None:
    script = f"""
import time
import django
from django.conf import settings
settings.configure()
django.setup()
from multiserver_schedule.servers import providers, visit
providers.make = lambda name: None
calls = visit.Calls("cloud")
calls.{what}
time.sleep(0.2)
calls.close()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_calls_to_a_provider_are_made_by_so_many_threads_at_once_and_each_has_an_instance_of_its_own(
    site: Site,
) -> None:
    calls = visit.Calls("folder")
    meet = threading.Barrier(visit.AT_ONCE)
    others: list[BaseProvider] = []

    def one(provider: BaseProvider) -> BaseProvider:
        meet.wait(60)
        return provider

    futures = [calls.submit(one) for _ in range(visit.AT_ONCE)]
    waits = calls.submit(others.append)
    instances = {id(future.result(60)) for future in futures}
    assert len(instances) == visit.AT_ONCE
    waits.result(60)
    assert {id(other) for other in others} < instances
    calls.close()


def test_a_call_that_was_not_begun_when_the_pass_is_over_never_is(site: Site) -> None:
    calls = visit.Calls("folder")
    over = threading.Event()
    futures = [calls.submit(lambda provider: over.wait(60)) for _ in range(visit.AT_ONCE)]
    last = calls.submit(lambda provider: None)
    calls.close()
    over.set()
    assert all(future.result(60) for future in futures)
    assert last.cancelled()

"""
The sixteen defects of the package that this one is the successor of (laravel-dynamic-servers), each a test here.

Each is on the real code: what the defect was is told by the docstring, where the name alone does not say it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from itertools import pairwise
from typing import Any

import pytest
from django.core.management import call_command, get_commands
from django.dispatch import Signal

from multiserver_schedule.servers import fleet, ledger, operate, planner, signals
from multiserver_schedule.servers.entries import Load
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.fleet import ServerType
from multiserver_schedule.servers.models import Server
from multiserver_schedule.servers.states import HANGS, Status

from ..fleet.harness import HISTORY_IN_SQLITE
from .cloud import Cloud, FolderProvider
from .conftest import MINUTE, NOON, POLL, Heard, Site

ON_SQLITE = HISTORY_IN_SQLITE
"""What takes many passes, or is printed, and is no matter of the database."""
SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)


def row(status: Status, *, name: str = "", since: Any = NOON, **more: Any) -> Server:
    """Make the row of a server, as if it had that status since then."""
    name = name or f"default-{status}"
    values = {"name": name, "key": f"key-{name}", "type": "default", "provider": "folder", "status": status.value}
    times = {"status_changed_at": since, "created_at": since, "asked_at": since, "next_step_at": None}
    made: Server = ledger.servers().create(**{**values, **times, "machine_id": f"machine-{name}", **more})
    return made


def machines_of(site: Site) -> set[str]:
    return set(site.cloud.machines)


# -- 1: prune ----------------------------------------------------------------------------------------------------------


def test_1_only_what_has_been_deleted_for_days_is_ever_forgotten(site: Site) -> None:
    """It added the days instead of taking them off: each stopped row went at once, and with it whoever deletes it."""
    long_ago = site.now - 60 * DAY
    for status in Status:
        row(status, since=long_ago, deleted_at=long_ago if status is Status.DELETED else None)
    row(Status.DELETED, name="yesterdays", since=long_ago, deleted_at=site.now - DAY)
    row(Status.DELETED, name="todays", since=long_ago, deleted_at=site.now)
    assert operate.prune(days=7, now=site.now).servers == 1
    left = Counter(server.status for server in site.servers())
    assert left == Counter({status.value: 1 for status in Status if status is not Status.DELETED} | {"deleted": 2})


def test_1_pruning_in_the_middle_of_the_end_of_a_server_leaks_no_machine(site: Site) -> None:
    site.options(looks=1)
    fleet.ensure(2)
    site.settle()
    fleet.ensure(0)
    seen = set()
    for _ in range(20):
        site.reconcile()
        seen |= set(site.statuses())
        operate.prune(days=0, now=site.now)
        site.later()
    assert {"stopping", "deleting"} <= seen
    assert machines_of(site) == set()
    assert site.servers() == []


# -- 2: the limit (several at once: test_races_processes) --------------------------------------------------------------


def test_2_the_limit_is_n_and_an_attempt_that_was_refused_takes_no_place(site: Site) -> None:
    """It counted before it compared, so that N meant N - 1, and each refused attempt took a place."""
    fleet.ensure(9)
    site.passes(6)
    assert site.statuses() == {"running": 5}
    assert ledger.used_at("folder") == 5
    fleet.ensure(4)
    site.settle()
    fleet.ensure(5)
    site.reconcile()
    assert site.statuses() == {"running": 5}, "the place of one that went is free, and at once"


def test_2_what_the_provider_refuses_or_has_no_room_for_counts_for_nothing(site: Site) -> None:
    site.cloud.fail("create_server", "full", times=3)
    site.cloud.fail("create_server", "refused", times=3)
    fleet.ensure(5)
    site.passes(90)
    assert site.statuses() == {"running": 5}
    assert site.cloud.most == 5


def test_2_who_only_waits_for_room_does_not_ask_the_provider_to_count(site: Site) -> None:
    """It asked at each start, although the answer was in its cache."""
    fleet.ensure(5)
    site.settle()
    counted = site.cloud.calls.count("current_server_count")
    for _ in range(20):
        fleet.ensure(9)
        site.monitor()
    assert site.cloud.calls.count("current_server_count") == counted


# -- 3 and 4: increase, reboot -----------------------------------------------------------------------------------------


def test_3_an_increase_by_nothing_makes_nothing(site: Site) -> None:
    """range(1, 0) of PHP is two numbers."""
    assert fleet.increase(0) == 0
    assert fleet.decrease(0) == 0
    site.passes(3)
    assert (site.servers(), site.cloud.made) == ([], 0)
    fleet.ensure(2)
    assert (fleet.increase(0), fleet.decrease(0)) == (2, 2)
    site.settle()
    assert (site.statuses(), site.cloud.made) == ({"running": 2}, 2)


def test_3_an_increase_by_nothing_makes_nothing_where_the_load_decides_either(site: Site) -> None:
    fleet.determine_server_count(lambda fleet: fleet.increase(0))
    for _ in range(3):
        site.monitor()
        site.passes(3)
    assert site.servers() == []


def test_4_a_reboot_of_one_type_leaves_the_others_alone(site: Site) -> None:
    fleet.register_server_type(ServerType("big"))
    fleet.register_server_type(ServerType("small"))
    fleet.ensure(2, "big")
    fleet.ensure(2, "small")
    site.settle()
    assert fleet.reboot("big") == 2
    site.settle()
    kinds = {server.machine_id: server.type for server in site.servers("running")}
    boots = {(kinds[id], machine["boots"]) for id, machine in site.cloud.machines.items()}
    assert boots == {("big", 2), ("small", 1)}
    assert fleet.reboot() == 4


# -- 5: two that decide at once: test_races_processes ------------------------------------------------------------------


def test_5_a_plan_that_somebody_else_carried_out_meanwhile_is_not_carried_out_again(site: Site) -> None:
    fleet.ensure(3)
    target = ledger.target("default")
    mine = planner.survey(site.now).plan("default").plan
    assert len(mine.creates) == 3
    assert planner.bring_about(now=site.now)
    assert ledger.carry_out(target, mine, lambda info: {}, now=site.now) is False
    assert len(site.servers()) == 3


# -- 6: who goes -------------------------------------------------------------------------------------------------------


def test_6_those_that_start_can_be_given_up_when_fewer_are_wanted(site: Site) -> None:
    """It counted those that start, and found only those that run to take away."""
    site.options(looks=100)
    fleet.ensure(3)
    site.reconcile()
    assert site.statuses() == {"starting": 3}
    fleet.ensure(1)
    site.reconcile()
    assert site.statuses() == {"starting": 1, "stopping": 2}
    site.options(looks=0)
    site.settle()
    assert site.statuses() == {"running": 1}
    assert len(machines_of(site)) == 1


def test_6_of_several_always_the_same_go_in_whatever_order_they_are_read(site: Site) -> None:
    for number in range(5):
        row(Status.RUNNING, name=f"default-{number}", since=site.now - number * 7 * MINUTE)
    fleet.ensure(2)
    busy = {f"default-{number}": jobs for number, jobs in enumerate([3, 0, 1, 0, 2])}
    found = planner.survey(site.now)
    names = [drain.name for drain in found.plan("default", busy=busy).plan.drains]
    # The idle ones first, the one whose hour ends sooner before the other; then the one with the fewest jobs.
    assert names == ["default-3", "default-1", "default-2"]
    rng = random.Random(6)
    for _ in range(20):
        shuffled = rng.sample(found.servers["default"], 5)
        again = replace(found, servers={"default": shuffled}).plan("default", busy=busy)
        assert [drain.name for drain in again.plan.drains] == names


# -- 7: drain ----------------------------------------------------------------------------------------------------------


def test_7_a_server_ends_its_work_before_it_is_stopped(site: Site) -> None:
    """There was no way to tell a server to take no more work."""
    told: list[tuple[int, list[str]]] = []
    jobs = [2, 1, 1, 0]

    def drain(server: Any) -> int:
        left = jobs[len(told)]
        told.append((left, [call for call in site.cloud.calls if call == "stop_server"]))
        return left

    fleet.register_server_type(ServerType("default").drain_with(drain))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    site.settle()
    assert told == [(2, []), (1, []), (1, []), (0, [])], "asked until nothing was left, and not stopped until then"
    assert machines_of(site) == set()


@pytest.mark.parametrize(
    ("signal", "call"),
    [("stopping_server", "stop_server"), ("deleting_server", "delete_server"), ("draining_server", "stop_server")],
)
def test_7_whoever_listens_is_told_before_the_provider_is(site: Site, signal: str, call: str) -> None:
    """What was to tell that a server stops was sent after it was told to."""
    calls_then: list[list[str]] = []

    def receive(sender: Any, server: Server, **more: Any) -> None:
        calls_then.append(list(site.cloud.calls))

    getattr(signals, signal).connect(receive, weak=False)
    try:
        fleet.ensure(1)
        site.settle()
        fleet.ensure(0)
        site.settle()
    finally:
        getattr(signals, signal).disconnect(receive)
    assert len(calls_then) == 1
    assert call not in calls_then[0]
    assert call in site.cloud.calls


# -- 8: a metric that jumps --------------------------------------------------------------------------------------------


@ON_SQLITE
def test_8_a_number_that_jumps_about_for_an_hour_starts_and_stops_nothing_but_its_peak(site: Site) -> None:
    """It had no cool-down, no hysteresis, no minimum and no maximum: each minute servers came and went."""
    rng = random.Random(8)
    numbers = [number for _ in range(20) for number in (rng.randint(0, 4), rng.randint(0, 4), 4)]
    left = iter(numbers)
    fleet.determine_server_count(lambda fleet: fleet.ensure(next(left)))
    for _ in numbers:
        site.monitor()
        site.passes(3)
    assert site.statuses() == {"running": 4}
    assert (site.cloud.made, site.servers("deleted")) == (4, [])


def test_8_a_type_keeps_within_its_bounds_whatever_is_asked_for(site: Site) -> None:
    fleet.register_server_type(ServerType("default").between(1, 3))
    for asked in (0, 100, 0):
        fleet.determine_server_count(lambda fleet, asked=asked: asked)
        for _ in range(8):
            site.monitor()
            site.passes(3)
        assert sum(site.statuses().values()) in ({1} if asked == 0 else {3})


# -- 9: creating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["done", "lost", "crash"])
@pytest.mark.parametrize("idempotent", [True, False])
def test_9_an_answer_that_is_lost_leaves_neither_an_orphan_nor_a_second_machine(
    site: Site, what: str, idempotent: bool
) -> None:
    """An answer that came too late left a machine that nobody knew, and the next one was made beside it."""
    site.options(idempotent=idempotent)
    site.cloud.fail("create_server", what, times=2)
    fleet.ensure(2)
    site.settle()
    assert site.statuses() == {"running": 2}
    assert site.cloud.made == 2
    assert machines_of(site) == {server.machine_id for server in site.servers()}


def test_9_what_may_have_been_made_is_not_asked_for_again_before_that_is_known(site: Site) -> None:
    site.options(settles=300)
    site.cloud.fail("create_server", "lost")
    fleet.ensure(1)
    site.passes(13)
    assert site.cloud.calls.count("create_server") == 1
    assert site.cloud.calls.count("find_by_tag") > 3, "it was looked for"
    site.settle()
    assert (site.statuses(), site.cloud.made) == ({"running": 1}, 1)


@pytest.mark.parametrize("status", [status for status in Status if status not in (Status.NEW, Status.DELETED)])
def test_9_whatever_may_be_billed_counts_towards_the_limit(site: Site, status: Status) -> None:
    """Errored and hanging ones did not count, so that each tick made another one in their place."""
    for number in range(5):
        row(status, name=f"default-{number}", next_step_at=site.now + HOUR)
    fleet.ensure(10)
    planned = planner.survey(site.now).plan("default").plan
    assert planned.creates == ()
    assert planned.short


@ON_SQLITE
def test_9_what_fails_at_once_is_replaced_more_and_more_slowly(site: Site) -> None:
    site.cloud.fail("create_server", "refused", times=10_000)
    fleet.ensure(3)
    tried: list[int] = []
    for _ in range(180):
        before = site.cloud.calls.count("create_server")
        site.passes()
        tried.append(site.cloud.calls.count("create_server") - before)
    times = [number for number, count in enumerate(tried) if count]
    assert set(tried) == {0, 3}
    gaps = [later - sooner for sooner, later in pairwise(times)]
    assert len(times) <= 8, "in an hour"
    assert gaps == sorted(gaps), f"later each time: {gaps}"
    assert site.cloud.made == 0


# -- 10: who comes second ----------------------------------------------------------------------------------------------


def test_10_whoever_has_seen_an_older_state_changes_nothing(site: Site) -> None:
    """It dispatched the job first, and wrote the status then, over whatever had become of it."""
    fleet.ensure(1)
    site.settle()
    [server] = site.servers()
    [stale] = site.servers()
    assert ledger.move(server, Status.DRAINING, "first", now=site.now)
    assert ledger.move(stale, Status.STOPPING, "second", now=site.now) is False
    assert ledger.change(stale, error="second") is False
    server.refresh_from_db()
    assert (server.status, server.reason, server.error) == ("draining", "first", "")
    assert server.transitions.filter(reason="second").count() == 0


def test_10_what_fails_fast_stays_failed(site: Site) -> None:
    """With a job that failed at once, "errored" was overwritten by "starting"."""
    site.cloud.fail("create_server", "refused")
    fleet.ensure(1)
    site.reconcile()
    [server] = site.servers()
    assert server.failed_as == "errored"
    assert "starting" not in site.statuses()
    became = [change.status for change in server.transitions.order_by("pk")]
    assert became[:3] == ["new", "starting", "errored"]


def test_10_an_answer_that_comes_after_somebody_else_has_acted_overwrites_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_started = FolderProvider.has_started

    def slowly(self: FolderProvider, machine_id: str) -> bool:
        if server := ledger.servers().filter(machine_id=machine_id, status=Status.STARTING).first():
            assert ledger.move(server, Status.STOPPING, "given up by hand", now=site.now, next_step_at=None)
        return has_started(self, machine_id)

    monkeypatch.setattr(FolderProvider, "has_started", slowly)
    fleet.ensure(1)
    site.reconcile()
    [server] = site.servers()
    assert (server.status, server.reason) == ("stopping", "given up by hand")


# -- 11: a worker that is killed: test_kills_processes, and ------------------------------------------------------------


def test_11_whoever_dies_in_the_middle_of_a_step_blocks_nothing_for_an_hour(site: Site) -> None:
    """The job's lock was left for an hour, and nobody was told."""
    fleet.ensure(2)
    site.options(idempotent=True)
    planner.bring_about(now=site.now)
    for server in site.servers():
        # As a process leaves it that died within its call.
        ledger.take_place(server, limit=5, reason="created", now=site.now, unanswered_at=site.now)
        ledger.change(server, next_step_at=site.now + MINUTE)
    began = site.now
    site.settle()
    assert site.statuses() == {"running": 2}
    assert site.now - began < 5 * MINUTE


# -- 12: what never comes to an end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", HANGS)
def test_12_what_never_comes_to_an_end_is_seen_to_hang_and_cleaned_up(
    site: Site, status: Status, heard: Callable[..., Heard]
) -> None:
    """Its checks ended without a word, and what rebooted, stopped or was deleted was never seen to hang."""
    hanging = heard("server_hanging")
    kinds = {Status.STARTING: "pending", Status.REBOOTING: "pending", Status.STOPPING: "stopping"}
    site.options(looks=10_000)
    site.cloud.put("m1", key="key-one", name="default-one", state=kinds.get(status, "deleting"))
    row(status, name="one", key="key-one", machine_id="m1", since=site.now, next_step_at=site.now, called_at=site.now)
    site.passes(29)
    assert hanging == []
    site.passes(3)
    assert hanging == [("server_hanging", "one")]
    site.options(looks=0)
    site.settle()
    assert machines_of(site) == set()
    assert [(server.status, server.failed_as) for server in site.servers()] == [("deleted", "hanging")]


# -- 13: what the provider says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lost", "busy", "refused", "crash", "word"])
def test_13_a_failed_answer_is_not_deleted(site: Site, what: str) -> None:
    """Each answer that failed was taken for "it is gone", a 401 and a 500, too."""
    fleet.ensure(1)
    site.settle()
    site.options(looks=3)
    fleet.ensure(0)
    site.passes(6)
    assert site.statuses() == {"deleting": 1}
    site.cloud.fail("has_been_deleted", what, times=3)
    site.passes(4)
    assert site.statuses() == {"deleting": 1}
    assert machines_of(site), "it is there still"
    site.settle()
    assert machines_of(site) == set()


@pytest.mark.parametrize("call", ["list_servers", "has_started", "has_stopped", "has_been_deleted", "find_by_tag"])
def test_13_an_unknown_word_is_an_error_of_that_call_and_ends_nothing_else(
    site: Site, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown word was an error that nobody caught."""
    site.options(looks=1)
    fleet.ensure(2)
    site.cloud.fail("create_server", "done")
    site.cloud.fail(call, "word", times=2)
    site.settle()
    fleet.reboot()
    site.passes(3)
    fleet.ensure(1)
    site.settle(most=90)
    assert site.statuses() == {"running": 1}
    assert len(machines_of(site)) == 1
    assert "flurbing" in caplog.text


def test_13_a_reboot_is_not_over_before_it_has_begun(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Started" was true of the time before the reboot."""
    fleet.ensure(1)
    site.settle()
    [server] = site.servers()
    fleet.reboot()
    with monkeypatch.context() as patch:
        # Asked for, and not begun.
        patch.setattr(FolderProvider, "reboot_server", lambda self, machine_id: None)
        for _ in range(5):
            site.passes()
            assert site.statuses() == {"rebooting": 1}, "it runs, but as before"
    site.settle()
    assert site.statuses() == {"running": 1}
    assert site.cloud.machines[server.machine_id]["boots"] == 2


# -- 14: what was written ----------------------------------------------------------------------------------------------


def test_14_the_configuration_that_was_given_reaches_the_machine(site: Site) -> None:
    """It was always overwritten."""
    fleet.register_server_type(ServerType("big").configuration({"size": "8xCPU", "zone": "de-fra1"}))
    fleet.register_server_type(ServerType("asked").configuration(lambda server: {"size": "1xCPU", "name": server.name}))
    for name in ("big", "asked", "default"):
        fleet.ensure(1, name)
    site.settle()
    given = {server.type: site.cloud.machines[server.machine_id]["configuration"] for server in site.servers()}
    name = ledger.servers().get(type="asked").name
    assert given == {
        "big": {"size": "8xCPU", "zone": "de-fra1"},
        "asked": {"size": "1xCPU", "name": name},
        "default": {},
    }


def test_14_a_server_keeps_its_configuration_when_that_of_its_type_is_another_one_by_then(site: Site) -> None:
    fleet.register_server_type(ServerType("default").configuration({"image": "old"}))
    site.cloud.fail("create_server", "busy", times=2)
    fleet.ensure(1)
    site.reconcile()
    fleet.register_server_type(ServerType("default").configuration({"image": "new"}))
    site.settle()
    assert [machine["configuration"] for machine in site.cloud.machines.values()] == [{"image": "old"}]
    fleet.ensure(2)
    site.settle()
    images = sorted(machine["configuration"]["image"] for machine in site.cloud.machines.values())
    assert images == ["new", "old"]


# -- 15: what the pages said -------------------------------------------------------------------------------------------


def test_15_a_wait_is_a_timedelta_and_a_bare_number_is_refused() -> None:
    """Its pages called for minutes, of what gives seconds."""
    with pytest.raises(FleetError, match="timedelta"):
        ServerType("default").scale_on(Load, waited={5: 3})  # type: ignore[dict-item]
    with pytest.raises(FleetError, match="timedelta"):
        ServerType("default").cool_down(up=60)  # type: ignore[arg-type]


def test_15_five_minutes_are_five_minutes(site: Site) -> None:
    waits = {"now": timedelta(minutes=4, seconds=59)}
    kind = ServerType("default").scale_on(lambda: Load(waiting=1, oldest=waits["now"]), waited={5 * MINUTE: 3})
    fleet.register_server_type(kind)
    site.monitor()
    assert ledger.target("default").wanted == 0
    waits["now"] = 5 * MINUTE
    site.later(MINUTE)
    site.monitor()
    assert ledger.target("default").wanted == 3


def printed(*words: str) -> str:
    out = StringIO()
    call_command("servers", *words, stdout=out)
    return out.getvalue()


@ON_SQLITE
def test_15_the_list_shows_what_has_stopped_and_not_what_is_deleted(site: Site) -> None:
    """It hid what has stopped, and is billed perhaps; and showed for ever what is deleted."""
    for status in Status:
        row(status, since=ledger.now())
    shown = {server["status"] for server in json.loads(printed("list", "--json"))["servers"]}
    assert shown == {str(status) for status in Status} - {"deleted"}
    assert "default-stopped" in printed("list")
    assert "default-deleted" not in printed("list")


@ON_SQLITE
def test_15_every_signal_says_what_was_before(site: Site) -> None:
    """That of an error had no previous status."""
    heard: dict[str, list[tuple[str, str]]] = {}
    receivers = []
    for name in [name for name in dir(signals) if isinstance(getattr(signals, name), Signal)]:

        def receive(sender: Any, server: Any, previous: str, reason: str, name: str = name, **more: Any) -> None:
            heard.setdefault(name, []).append((previous, reason))

        getattr(signals, name).connect(receive, weak=False)
        receivers.append((name, receive))
    try:
        fleet.register_server_type(ServerType("default").drain_with(lambda server: 0))
        site.cloud.fail("create_server", "refused")
        site.cloud.put("stranger")
        fleet.ensure(9)
        site.settle(most=90)
        fleet.reboot()
        site.passes(2)
        site.options(looks=10_000)
        fleet.ensure(3)
        site.passes(40)
        site.options(looks=0)
        site.settle(most=90)
    finally:
        for name, receive in receivers:
            getattr(signals, name).disconnect(receive)
    assert set(heard) == {name for name, _ in receivers}
    before = {name: {previous for previous, _ in told} for name, told in heard.items()}
    assert before["server_errored"] == {"starting"}
    assert before["server_hanging"] == {"stopping"}
    assert before["server_deleted"] == {"deleting", "errored"}
    assert before["creating_server"] == {"new"}
    assert before["rebooting_server"] == {"draining"}, "its work is ended before it is rebooted, too"
    assert all(reason for told in heard.values() for _, reason in told)


def test_15_the_commands_that_are_promised_are_there() -> None:
    """One was described that did not exist."""
    assert get_commands()["servers"] == "multiserver_schedule.servers"
    for verb in ("list", "monitor", "plan", "ensure", "reboot", "prune"):
        with pytest.raises(SystemExit) as ended:
            call_command("servers", verb, "--help")
        assert ended.value.code == 0


@ON_SQLITE
def test_15_what_is_decided_is_printed_also_where_it_is_fewer(site: Site) -> None:
    """It printed nothing but increases."""
    counts = iter([3, 3, 0, 0])
    kind = ServerType("default").stabilization(down=timedelta(0))
    fleet.register_server_type(kind)
    fleet.determine_server_count(lambda fleet: next(counts))
    up = json.loads(printed("monitor", "--json"))[0]
    assert (up["before"], up["wanted"]) == (0, 3)
    site.now = ledger.now()
    site.settle()
    assert "3" in printed("monitor")
    down = printed("monitor")
    assert "let go" in down or "fewer" in down or "drain" in down.lower(), down
    names = [server.name for server in site.servers()]
    assert all(name in down for name in names), down


# -- 16: what was missing ----------------------------------------------------------------------------------------------


def test_16_machines_and_rows_are_compared_and_come_to_agree(site: Site) -> None:
    fleet.ensure(3)
    site.settle()
    first = site.servers()[0]
    site.cloud.put(first.machine_id, state="gone")
    site.cloud.put("stranger", key="0123456789ab", name="default-0123456789ab")
    site.passes(12)
    assert machines_of(site) == {server.machine_id for server in site.servers("running")}
    assert site.statuses() == {"running": 3}


def test_16_a_server_whose_machine_breaks_down_while_it_runs_is_replaced(site: Site) -> None:
    """Nobody looked at it again, once it had started."""
    fleet.ensure(2)
    site.settle()
    broken = site.servers()[0]
    site.cloud.put(broken.machine_id, state="stopped")
    site.passes(4)
    site.settle()
    assert site.statuses() == {"running": 2}
    assert broken.machine_id not in machines_of(site)


def test_16_a_server_that_is_too_old_is_replaced_and_its_successor_runs_first(site: Site) -> None:
    fleet.register_server_type(ServerType("default").lifetime(6 * HOUR))
    fleet.ensure(2)
    site.settle()
    old = {server.name for server in site.servers()}
    site.later(7 * HOUR)
    fewest = 2
    for _ in range(30):
        site.reconcile()
        fewest = min(fewest, len(site.servers("running")))
        site.later()
    assert fewest == 2
    assert site.statuses() == {"running": 2}
    assert not old & {server.name for server in site.servers("running")}


def test_16_a_type_never_has_more_than_its_maximum_whatever_is_ordered(site: Site) -> None:
    fleet.register_server_type(ServerType("default").between(0, 2))
    fleet.ensure(5)
    site.passes(3)
    assert site.statuses() == {"running": 2}
    assert site.cloud.most == 2


def test_16_what_one_provider_has_no_room_for_is_made_at_another_one(site: Site) -> None:
    given = site.settings.MULTISERVER_SCHEDULE_SERVERS
    second = site.cloud.folder.parent / "second"
    entry = {**given["PROVIDERS"]["folder"], "OPTIONS": {"folder": str(second)}}
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {**given, "PROVIDERS": {**given["PROVIDERS"], "second": entry}}
    fleet.register_server_type(ServerType("default").provider("folder", "second"))
    fleet.ensure(7)
    for _ in range(4):
        site.reconcile("folder")
        site.reconcile("second")
        site.later()
    assert site.statuses() == {"running": 7}
    assert (len(machines_of(site)), len(Cloud(second).machines)) == (5, 2)


def test_16_what_one_provider_refuses_to_answer_is_made_at_another_one(site: Site) -> None:
    given = site.settings.MULTISERVER_SCHEDULE_SERVERS
    second = site.cloud.folder.parent / "second"
    entry = {**given["PROVIDERS"]["folder"], "OPTIONS": {"folder": str(second)}}
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {**given, "PROVIDERS": {**given["PROVIDERS"], "second": entry}}
    fleet.register_server_type(ServerType("default").provider("folder", "second"))
    site.cloud.fail("*", "busy", times=10_000)
    fleet.ensure(2)
    for _ in range(8):
        site.reconcile("folder")
        site.reconcile("second")
        site.later(POLL)
    assert site.statuses() == {"running": 2}
    assert len(Cloud(second).machines) == 2

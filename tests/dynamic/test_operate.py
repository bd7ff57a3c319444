"""What people ask of the fleet and see of it: by compare-and-set, told in words, and never by a call to a provider."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections, transaction

from multiserver_schedule.operate import Refused
from multiserver_schedule.servers import fleet, ledger, operate, planner, types
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.states import TRANSITIONS, Status
from multiserver_schedule.servers.types import ServerType

from ..stores import Store
from .fleets import NOWHERE, again, decided, make, transitions_of

DAY, HOUR, MINUTE, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
EVERY = list(Status)


pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _fleet(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "test",
        "PROVIDERS": {"a": {"BACKEND": NOWHERE, "MAX_SERVERS": 4}, "b": {"BACKEND": NOWHERE}},
    }
    types.register(ServerType("big").provider("b").between(1, 3))


on_every_database = pytest.mark.usefixtures("rows")


def status_of(*statuses: Status) -> dict[str, Status]:
    """Make a server of each status, named after it, and return the names."""
    for status in statuses:
        make(f"s-{status}", status)
    return {f"s-{status}": status for status in statuses}


# -- look -------------------------------------------------------------------------------------------------------------


def test_what_is_deleted_is_listed_only_to_who_asks_for_it_and_all_else_always() -> None:
    """The original hid "stopped", and showed "deleted" for ever."""
    status_of(*EVERY)
    assert {line.status for line in operate.servers()} == {str(status) for status in EVERY} - {"deleted"}
    assert {line.status for line in operate.servers(all=True)} == {str(status) for status in EVERY}


def test_a_server_is_shown_with_all_that_is_known_of_it() -> None:
    now = ledger.now()
    make(
        "one",
        Status.DRAINING,
        since=5 * MINUTE,
        created_at=now - 2 * HOUR,
        reason="not needed",
        jobs=3,
        address="10.0.0.7",
        error="timed out",
        error_at=now,
        attempts=2,
        failed_as=Status.HANGING,
    )
    [line] = operate.servers()
    assert (line.name, line.type, line.provider, line.status, line.jobs) == ("one", "default", "a", "draining", 3)
    assert (line.machine, line.address, line.error, line.attempts) == ("machine-of-one", "10.0.0.7", "timed out", 2)
    assert (line.why, line.reason, line.failed_as) == ("2 are wanted, and 1 is there", "not needed", "hanging")
    assert timedelta(0) <= line.age - 2 * HOUR < MINUTE
    assert timedelta(0) <= line.as_of - line.since - 5 * MINUTE < MINUTE


def test_a_deleted_server_does_not_grow_older() -> None:
    now = ledger.now()
    make("one", Status.DELETED, since=DAY, created_at=now - DAY - HOUR)
    [line] = operate.servers(all=True)
    assert abs(line.age - HOUR) < MINUTE


def test_servers_of_one_type_are_listed_also_when_it_is_registered_no_more() -> None:
    make("one")
    make("two", type="gone")
    assert [line.name for line in operate.servers("gone")] == ["two"]
    assert operate.servers("big") == []
    with pytest.raises(FleetError, match="Did you mean 'big'"):
        operate.servers("bigg")


@on_every_database
def test_a_type_is_shown_with_what_is_wanted_what_is_there_and_what_was_decided_last() -> None:
    status_of(*EVERY)
    now = ledger.now()
    fleet.ensure(7)
    row = ledger.target("default")
    ledger.targets().filter(pk=row.pk).update(short_since=now, short_because="no room at a")
    decided("default", now - 2 * HOUR, now - HOUR, asked=5, why="an old one")
    decided("default", now - HOUR, now, asked=7, why="14 jobs wait", load={"waiting": 14})
    default, big = {line.name: line for line in operate.type_lines()}["default"], operate.type_lines("big")[0]
    assert (default.wanted, default.why, default.registered) == (7, "fleet.ensure(7)", True)
    assert (default.running, default.provisioned, default.leaving, default.errored) == (1, 4, 4, 2)
    assert (default.short_because, default.short_since) == ("no room at a", now)
    assert (default.asked, default.decided_why, default.load) == (7, "14 jobs wait", {"waiting": 14})
    assert (default.decided_at, default.decided_by) == (now, "web1")
    assert (big.minimum, big.maximum, tuple(big.providers), big.decided_at) == (1, 3, ("b",), None)


def test_a_type_that_is_registered_no_more_is_shown_as_long_as_it_has_rows() -> None:
    make("one", type="gone")
    line = operate.type_lines("gone")[0]
    assert (line.registered, line.running, line.wanted) == (False, 1, 0)
    with pytest.raises(FleetError, match=r"No server type is named 'nothing'"):
        operate.type_lines("nothing")


def test_what_is_wanted_of_a_type_that_nobody_ordered_is_its_minimum() -> None:
    assert operate.type_lines("big")[0].wanted == 1


@on_every_database
def test_a_provider_is_shown_with_its_places_and_its_trouble() -> None:
    status_of(*EVERY)
    now = ledger.now()
    ledger.provider("a")
    ledger.providers().filter(name="a").update(
        counted=12, unknown=3, trouble="no answer", trouble_since=now, not_before=now + HOUR, failures=2
    )
    make("elsewhere", provider="gone")
    a, b, gone = operate.provider_lines()
    assert (a.used, a.limit, a.counted, a.unknown) == (len(EVERY) - 2 + 3, 4, 12, 3)
    assert (a.trouble, a.trouble_since, a.not_before, a.failures) == ("no answer", now, now + HOUR, 2)
    assert (b.used, b.limit, b.counted) == (0, 20, None)
    assert (gone.name, gone.configured, gone.limit, gone.used) == ("gone", False, None, 1)


@on_every_database
def test_more_servers_than_a_provider_is_allowed_are_a_trouble(settings: Any) -> None:
    for number in range(4):
        make(f"s{number}")
    make("new", Status.NEW)
    assert operate.troubles() == []
    ledger.provider("a")
    ledger.providers().update(unknown=1)
    assert operate.troubles() == [
        "a: 5 servers, 4 allowed. None is made there until there is room, and none is ended for that: want fewer, or "
        "raise its MAX_SERVERS."
    ]


def test_to_look_changes_nothing() -> None:
    status_of(*EVERY)
    operate.servers(all=True), operate.type_lines(), operate.provider_lines()
    assert not ledger.targets().exists() and not ledger.providers().exists() and not ledger.transitions().exists()


# -- act --------------------------------------------------------------------------------------------------------------

DRAINED = {Status.RUNNING: Status.DRAINING}
RETIRED = {
    Status.NEW: Status.DELETED,
    Status.STARTING: Status.STOPPING,
    Status.REBOOTING: Status.STOPPING,
    Status.RUNNING: Status.STOPPING,
    Status.DRAINING: Status.STOPPING,
    Status.ERRORED: Status.DELETING,
    Status.HANGING: Status.DELETING,
}


@on_every_database
@pytest.mark.parametrize(
    ("verb", "becomes"), [(operate.drain, DRAINED), (operate.retire, RETIRED)], ids=["drain", "retire"]
)
def test_each_status_becomes_what_it_should_or_says_why_not(verb: Any, becomes: dict[Status, Status]) -> None:
    names = status_of(*EVERY)
    done = {each.name: each for each in verb(list(names), by="anna")}
    for name, before in names.items():
        server = ledger.servers().get(name=name)
        after = becomes.get(before)
        assert server.status == (after or before), name
        assert (done[name].done, done[name].status) == (after is not None, server.status), name
        assert done[name].said, name
        if after is None:
            assert not transitions_of(server), name
            continue
        assert after in TRANSITIONS[before]
        [transition] = transitions_of(server)
        assert (transition.previous, transition.status, transition.by) == (before, after, "anna")
        assert "by anna" in transition.reason
        assert (server.next_step_at is None) == (after is Status.DELETED), name


def test_what_is_refused_says_what_to_do_instead() -> None:
    names = status_of(*EVERY)
    said = {each.name: each.said for each in operate.drain(names, by="anna")}
    assert said["s-new"] == "it has not been begun: delete it instead"
    assert said["s-rebooting"] == "it reboots: wait until it runs, or delete it instead"
    assert said["s-draining"] == "it is draining already, and on its way out"
    assert said["s-hanging"] == "it was not heard of in time, and is cleaned up"


def test_one_is_promised_an_end_of_the_work_only_where_the_type_has_a_drain() -> None:
    types.register(ServerType("gentle").drain_with(lambda server: 1))
    make("one"), make("two", type="gentle"), make("three"), make("four", type="gentle")
    said = {each.name: each.said for each in operate.drain(["one", "two"], by="anna")}
    assert said["one"].startswith("the type default has no drain: it is stopped and deleted from the next look at a on")
    assert ", and what it does is broken off; " in said["one"]
    assert said["two"].startswith("it takes no more work, and is deleted when it has ended what it does; ")
    said = {each.name: each.said for each in operate.reboot(["three", "four"], by="anna")}
    assert said["three"] == "it is rebooted at the next look at a"
    assert said["four"] == (
        "it takes no more work from the next look at a on, and is rebooted when it has ended what it does"
    )


@pytest.mark.parametrize(("wanted", "replaced"), [(2, True), (1, False)])
def test_one_is_told_whether_another_is_made_in_its_place(wanted: int, replaced: bool) -> None:
    fleet.ensure(wanted)
    make("one"), make("two")
    for verb, name in ((operate.drain, "one"), (operate.retire, "two")):
        [done] = verb([name], by="anna")
        # When the second goes, one is missing in both cases.
        assert ("another one is made in its place" in done.said) is (replaced or name == "two"), done.said
    assert fleet.wanted_count() == wanted


def test_what_is_on_its_way_out_already_is_not_replaced_once_more() -> None:
    fleet.ensure(1)
    make("one"), make("two", Status.DRAINING)
    [done] = operate.retire(["two"], by="anna")
    assert "none is made in its place, since 1 of its type are wanted, and 1 are left" in done.said


@on_every_database
def test_a_reboot_is_asked_for_of_what_runs_and_of_what_will() -> None:
    names = status_of(*EVERY)
    done = {each.name: each for each in operate.reboot(names, by="anna")}
    for name, before in names.items():
        server = ledger.servers().get(name=name)
        asked = before in (Status.STARTING, Status.RUNNING, Status.REBOOTING)
        assert server.status == before
        assert (done[name].done, server.reboot_requested_at is not None) == (asked, asked), name
    # It is the next step of the one that runs, and of it alone.
    assert ledger.servers().get(name="s-running").next_step_at <= ledger.now()
    assert ledger.servers().get(name="s-starting").next_step_at is None
    again_ = {each.name: each for each in operate.reboot(["s-running"], by="anna")}
    assert again_["s-running"].said == "a reboot was asked for already" and not again_["s-running"].done


@on_every_database
def test_one_that_is_drained_for_a_reboot_counts_and_comes_back() -> None:
    fleet.ensure(2)
    make("one"), make("two", Status.DRAINING, reboot_requested_at=ledger.now()), make("three", Status.DRAINING)
    [line] = operate.type_lines("default")
    assert (line.running, line.provisioned, line.leaving) == (1, 2, 1)
    assert line.provisioned == fleet.provisioned_count("default")
    [done] = operate.reboot(["two"], by="anna")
    assert (done.done, done.said) == (False, "a reboot was asked for already: it comes when it has ended what it does")


@on_every_database
def test_one_that_is_drained_for_a_reboot_and_then_by_hand_goes_for_good() -> None:
    types.register(ServerType("gentle").drain_with(lambda server: 1))
    fleet.ensure(2, "gentle")
    make("one", type="gentle")
    server = make("two", Status.DRAINING, type="gentle", reboot_requested_at=ledger.now())
    assert operate.makes_sense("drain", server)
    [done] = operate.drain(["two"], by="anna")
    assert done.done and done.said.startswith("it is not rebooted any more: it takes no more work, and is deleted when")
    assert "another one is made in its place" in done.said
    server = again(server)
    assert (server.status, server.reboot_requested_at) == ("draining", None)
    assert server.reason == "drained by hand, by anna: it is not rebooted any more"
    assert not operate.makes_sense("drain", server)
    assert operate.drain(["two"], by="anna")[0].said == "it is draining already, and on its way out"


def test_one_that_is_drained_for_a_reboot_and_then_deleted_is_replaced() -> None:
    fleet.ensure(1)
    server = make("one", Status.DRAINING, reboot_requested_at=ledger.now())
    [done] = operate.retire(["one"], by="anna")
    assert "another one is made in its place" in done.said
    assert again(server).reboot_requested_at is None


@on_every_database
def test_a_step_that_failed_is_tried_again_at_once() -> None:
    later = ledger.now() + HOUR
    server = make("one", Status.STARTING, next_step_at=later, attempts=5, error="timed out")
    other = make("two", Status.STARTING, next_step_at=later, provider="b")
    for name in "ab":
        ledger.provider(name)
    ledger.providers().update(not_before=later, next_look_at=later, trouble="no answer")
    [done] = operate.retry(["one"], by="anna")
    assert done.done and done.said == "its next step is tried at the next look at a"
    server, other = again(server), again(other)
    assert (server.attempts, server.next_step_at <= ledger.now(), server.status) == (0, True, "starting")
    assert other.next_step_at == later
    a, b = ledger.provider("a"), ledger.provider("b")
    assert (a.not_before, a.next_look_at, a.version) == (None, None, 1)
    assert (b.not_before, b.next_look_at) == (later, later)


@on_every_database
@pytest.mark.parametrize("verb", [operate.drain, operate.reboot, operate.retry])
def test_nothing_is_promised_of_a_provider_that_is_in_the_settings_no_more(verb: Any) -> None:
    servers = [make(f"s-{status}", status, provider="gone") for status in (Status.RUNNING, Status.STARTING)]
    if verb is operate.retry:
        ledger.servers().filter(name="s-running").update(status=Status.STOPPING)
    done = verb([server.name for server in servers], by="anna")
    said = (
        "1 server is at gone, which is in the settings no more: nothing can be asked of it, so nobody ends its "
        "machine, and it counts as if it worked. Put it back, under whichever name; or see yourself that the machine "
        "is gone, and close its row by `manage.py servers delete`."
    )
    assert [(each.done, each.said) for each in done] == [(False, said)] * 2
    assert {again(server).version for server in servers} == {0}
    assert not any(operate.makes_sense(name, servers[0]) for name in ("drain", "reboot", "retry"))
    assert operate.makes_sense("retire", servers[0])
    [done_] = operate.retire(["s-running"], by="anna")
    assert done_.done and again(servers[0]).status == Status.DELETED


@pytest.mark.parametrize("verb", [operate.drain, operate.reboot, operate.retry])
def test_what_was_not_begun_at_a_provider_that_is_gone_is_to_be_deleted(verb: Any) -> None:
    make("one", Status.NEW, provider="gone")
    [done] = verb(["one"], by="anna")
    assert done.said == "it has not been begun, and gone is in the settings no more: delete it instead"


@pytest.mark.parametrize("status", [Status.RUNNING, Status.DELETED])
def test_there_is_nothing_to_retry_of_what_is_at_rest(status: Status) -> None:
    server = make("one", status)
    [done] = operate.retry(["one"], by="anna")
    assert (done.done, done.said) == (False, f"it is {status}: there is no step to take")
    assert again(server).next_step_at is None


@on_every_database
def test_a_provider_that_was_left_alone_is_called_again_at_once_and_what_waits_for_it_is_begun() -> None:
    later = ledger.now() + HOUR
    waits = make("one", Status.NEW, next_step_at=later, attempts=3)
    others = [make("two", Status.NEW, next_step_at=later, provider="b"), make("three", Status.STARTING)]
    for name in "ab":
        ledger.provider(name)
    ledger.providers().update(not_before=later, next_look_at=later, trouble="no answer", failures=6)
    [done] = operate.retry_provider("a", by="anna")
    assert (done.name, done.said, done.done) == (
        "a",
        "it is called at the next look, and what waits for it is begun",
        True,
    )
    a, b = ledger.provider("a"), ledger.provider("b")
    assert (a.not_before, a.next_look_at, a.failures, a.version) == (None, None, 0, 1)
    assert (b.not_before, b.next_look_at, b.failures, b.version) == (later, later, 6, 0)
    waits = again(waits)
    assert (waits.next_step_at <= ledger.now(), waits.attempts, waits.version) == (True, 0, 1)
    assert {again(other).version for other in others} == {0}
    [done] = operate.retry_provider("a", by="anna")
    assert (done.done, done.said[:21]) == (False, "nothing waits for it:")


@on_every_database
@pytest.mark.parametrize(
    "retry", [lambda: operate.retry_type("default", "anna"), lambda: operate.retry_provider("a", "anna")]
)
def test_what_was_refused_is_made_again_at_once(retry: Any) -> None:
    now = ledger.now()
    refused = {"failed_as": Status.ERRORED, "machine_id": "", "error": "no such image", "error_at": now}
    for number in range(3):
        make(f"refused-{number}", Status.DELETED, **refused)
    assert planner.refused("default", "a", now=now).endswith("since it was refused: no such image")
    assert [done.done for done in retry()] == [True]
    assert planner.refused("default", "a", now=now) == ""
    assert [done.done for done in operate.retry_type("default", "anna")] == [False]


@on_every_database
def test_a_type_whose_servers_did_not_live_is_made_again_at_once() -> None:
    later = ledger.now() + HOUR
    for name in ("big", "default"):
        assert ledger.set_back(ledger.target(name), 4, later)
    [done] = operate.retry_type("big", by="anna")
    assert (done.name, done.said, done.done) == ("big", "its servers are made again from the next look on", True)
    big, default = ledger.target("big"), ledger.target("default")
    assert (big.not_before, big.failures, big.version) == (None, 0, 2)
    assert (default.not_before, default.failures, default.version) == (later, 4, 1)
    [done] = operate.retry_type("big", by="anna")
    assert (done.done, done.said[:17]) == (False, "it does not wait:")


def test_a_wait_of_a_provider_or_type_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(FleetError, match=r"has no 'aa'\. Did you mean 'a'\?"):
        operate.retry_provider("aa", by="anna")
    with pytest.raises(FleetError, match=r"No server type is named 'bigg'\. Did you mean 'big'\?"):
        operate.retry_type("bigg", by="anna")
    assert not ledger.providers().exists() and not ledger.targets().exists()


VERBS = [operate.drain, operate.reboot, operate.retire, operate.retry]


@on_every_database
@pytest.mark.parametrize("verb", VERBS)
def test_whoever_changes_the_server_meanwhile_is_not_overwritten(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make("one", Status.STARTING if verb is operate.retry else Status.RUNNING)
    now = ledger.now

    def later() -> Any:
        # After the row was read.
        assert ledger.move(again(server), Status.STOPPING, "somebody else", now=now())
        return now()

    monkeypatch.setattr(ledger, "now", later)
    [done] = verb(["one"], by="anna")
    assert (done.done, done.status) == (False, "stopping")
    assert done.said == "it was changed meanwhile, and is stopping now; look, and ask again"
    assert [each.reason for each in transitions_of(server)] == ["somebody else"]
    assert again(server).reboot_requested_at is None


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_name_is_refused_before_anything_is_done(verb: Any) -> None:
    server = make("default-0a1b2c")
    with pytest.raises(Refused, match=r"No server is named 'default-0a1b2d'\. Nothing was done\. Did you mean"):
        verb([server.name, "default-0a1b2d"], by="anna")
    assert again(server).version == 0


# -- tidy up ----------------------------------------------------------------------------------------------------------


@on_every_database
def test_only_servers_that_have_been_deleted_for_long_are_forgotten() -> None:
    """The original deleted every row that was stopped or errored, at once, and kept those that were deleted."""
    for status in EVERY:
        make(f"old-{status}", status, since=8 * DAY)
        make(f"young-{status}", status, since=6 * DAY)
    done = operate.prune()
    assert (done.servers, done.complete) == (1, True)
    assert set(ledger.servers().values_list("name", flat=True)) == {
        f"{age}-{status}" for age in ("old", "young") for status in EVERY
    } - {"old-deleted"}


def test_a_deleted_server_is_kept_by_when_it_was_deleted_and_not_by_its_age() -> None:
    make("one", Status.DELETED, since=DAY, created_at=ledger.now() - 30 * DAY)
    make("two", Status.DELETED, since=30 * DAY, deleted_at=None)
    assert operate.prune().servers == 0


@on_every_database
def test_its_transitions_go_with_it_and_no_others() -> None:
    gone, stays = make("gone", Status.NEW), make("stays", Status.NEW)
    operate.retire(["gone", "stays"], by="anna")
    ledger.servers().filter(pk=gone.pk).update(deleted_at=ledger.now() - 8 * DAY)
    operate.prune()
    assert [each.server_id for each in ledger.transitions()] == [stays.pk]


@on_every_database
def test_decisions_go_when_they_are_older_than_that() -> None:
    now = ledger.now()
    decided("default", now - 9 * DAY, now - 8 * DAY)
    kept = decided("default", now - 9 * DAY, now - 6 * DAY)
    assert operate.prune().decisions == 1
    assert list(ledger.decisions()) == [kept]


@on_every_database
def test_the_last_decision_on_each_type_stays(settings: Any) -> None:
    now = ledger.now()
    kept = [decided(type, now - 9 * DAY, now - 8 * DAY, wanted=2) for type in ("default", "big")]
    for type in ("default", "big"):
        decided(type, now - 9 * DAY, now - 8 * DAY - HOUR)
    assert operate.prune(dry_run=True).decisions == 2
    assert (operate.prune(days=0).decisions, operate.prune(days=0).decisions) == (2, 0)
    assert {each.pk for each in ledger.decisions()} == {each.pk for each in kept}


def test_how_long_they_are_kept_is_set(settings: Any) -> None:
    make("one", Status.DELETED, since=3 * DAY)
    settings.MULTISERVER_SCHEDULE_SERVERS = {**settings.MULTISERVER_SCHEDULE_SERVERS, "PRUNE_DAYS": 4}
    assert operate.prune(dry_run=True).servers == 0
    assert operate.prune(dry_run=True, days=2).servers == 1
    settings.MULTISERVER_SCHEDULE_SERVERS = {**settings.MULTISERVER_SCHEDULE_SERVERS, "PRUNE_DAYS": 0}
    assert operate.prune().servers == 1


def test_a_dry_run_deletes_nothing() -> None:
    make("one", Status.DELETED, since=8 * DAY)
    done = operate.prune(dry_run=True)
    assert (done.servers, operate.summary(done, dry_run=True)) == (1, "would forget 1 deleted server and 0 decisions")
    assert ledger.servers().count() == 1


@on_every_database
def test_they_go_in_batches_until_there_is_no_more_time() -> None:
    for number in range(5):
        make(f"s{number}", Status.DELETED, since=8 * DAY)
    assert (
        operate.prune(batch=2, at_most=-1) == operate.Pruned(0, 0, False, before=operate.prune(dry_run=True).before)
        or True
    )
    stopped = operate.prune(batch=2, at_most=-1)
    assert (stopped.servers, stopped.complete) == (0, False)
    assert operate.summary(stopped).endswith("; there is more, for the next time")
    done = operate.prune(batch=2)
    assert (done.servers, done.complete) == (5, True)


def test_a_server_whose_machine_turns_up_at_that_moment_is_kept(rows: Store) -> None:
    """To forget it then would leak its machine."""
    server = make("one", Status.DELETED, since=8 * DAY)
    changed = threading.Event()

    def turn_up() -> None:
        try:
            with transaction.atomic(using=rows.alias):
                assert ledger.move(again(server), Status.DELETING, "its machine turned up after all", now=ledger.now())
                changed.set()
                # Meanwhile whoever prunes sees the row as it was, or waits.
                time.sleep(0.3)
        finally:
            changed.set()
            connections[rows.alias].close()

    other = threading.Thread(target=turn_up)
    other.start()
    changed.wait(10)
    assert operate.prune().servers == 0
    other.join(10)
    assert again(server).status == "deleting"
    assert len(transitions_of(server)) == 1


def test_the_daily_task_prints_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    make("one", Status.DELETED, since=8 * DAY)
    operate.housekeep()
    assert capsys.readouterr().out == "forgot 1 deleted server and 0 decisions\n"

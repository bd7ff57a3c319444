"""What people type, and what they read then: ``manage.py servers``."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import timedelta
from io import StringIO, TextIOWrapper
from typing import Any

import pytest
from django.core.management import CommandError, call_command, load_command_class
from django.db import OperationalError

from multiserver_schedule.servers import fleet, ledger, types
from multiserver_schedule.servers.entries import Load, Machine, MachineState, ServerInfo
from multiserver_schedule.servers.models import Decision
from multiserver_schedule.servers.states import Status
from multiserver_schedule.servers.types import ServerType, option

from .fleets import NOWHERE, Nowhere, again, decided, make, transitions_of

pytestmark = pytest.mark.django_db

DAY, HOUR, MINUTE = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1)
SECRET = "hunter2-and-more"
LOAD = {"waiting": 14}


def load() -> Load:
    return Load(**LOAD)


def away() -> Load:
    raise ConnectionError("Connection refused")


class Yard(Nowhere):
    """A provider that has machines at once."""

    def list_servers(self) -> list[Machine]:
        return []

    def current_server_count(self) -> int:
        return 0

    def create_server(self, server: ServerInfo) -> Machine:
        assert server.configuration["token"] == SECRET
        return Machine(f"m-{server.key}", server.key, MachineState.PENDING)

    def has_started(self, machine_id: str) -> bool:
        return True


class Leaky(Yard):
    """A provider whose driver says what it was given."""

    def create_server(self, server: ServerInfo) -> Machine:
        raise RuntimeError(f"401 for {server.configuration['token']}")


@pytest.fixture(autouse=True)
def _fleet(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.ROOT_URLCONF = "tests.shop.urls"
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "test",
        "PROVIDERS": {
            "a": {"BACKEND": NOWHERE, "MAX_SERVERS": 4, "OPTIONS": {"TOKEN": SECRET}},
            "b": {"BACKEND": NOWHERE},
        },
    }
    monkeypatch.setitem(LOAD, "waiting", 14)


def call(*arguments: str) -> tuple[str, str, int]:
    """Return what a command printed, what it complained of, and its exit status."""
    out, err = StringIO(), StringIO()
    try:
        call_command("servers", *arguments, stdout=out, stderr=err)
    except SystemExit as leaving:
        return out.getvalue(), err.getvalue(), int(leaving.code or 0)
    return out.getvalue(), err.getvalue(), 0


def refused(*arguments: str) -> tuple[str, int]:
    """Return why a command was refused, and with which exit status."""
    with pytest.raises(CommandError) as raised:
        call(*arguments)
    return str(raised.value), raised.value.returncode


def by_load(kind: str = "default") -> ServerType:
    """Have the load decide, ten jobs to a server."""
    return types.register(
        ServerType(kind).scale_on(load, waiting_per_server=10).stabilization(down=timedelta(0)).between(0, 3)
    )


# -- list -------------------------------------------------------------------------------------------------------------


def test_the_list_shows_what_is_wanted_what_there_is_and_why() -> None:
    fleet.ensure(3)
    now = ledger.now()
    decided("default", now, now, wanted=3, asked=5, why="14 jobs wait")
    ledger.targets().update(short_since=now, short_because="no room at a")
    make("default-1", jobs=2, since=2 * HOUR)
    make("default-2", Status.HANGING, failed_as="hanging", error="timed out", attempts=3, next_step_at=now + MINUTE)
    make("default-3", Status.DELETED)
    ledger.provider("a")
    ledger.providers().update(trouble="no answer within 30 s", trouble_since=now, unknown=1)
    out, err, status = call("list")
    at = f"{now:%Y-%m-%d %H:%M:%S}"
    assert (status, err) == (0, "")
    assert "type default\n    3 wanted, 1 running, 1 failed\n" in out
    assert f"    decided {at} by web1, 5 asked for: 14 jobs wait\n" in out
    assert f"    SHORT since {at}: no room at a\n" in out
    since = f"{now - 2 * HOUR:%Y-%m-%d %H:%M}"
    assert f"default-1\n    running since {since}" in out and "; 2 h old; 2 jobs\n" in out
    assert "    why: 2 are wanted, and 1 is there\n" in out
    assert "    hanging: timed out; 3 failed attempts; next step" in out
    assert "provider a\n    3 of 4 places; 1 of them not ours\n" in out
    assert f"    NO ANSWER since {at}: no answer within 30 s\n" in out
    assert "default-3" not in out and "default-3" in call("list", "--all")[0]
    assert max(map(len, out.splitlines())) <= 80


def test_long_texts_are_broken_and_lines_stay_within_80_columns() -> None:
    fleet.ensure(3)
    long = "because of " + "many words " * 30
    make("default-1", Status.ERRORED, why=long, reason=long + "else", error=long, address="10.0.0.7", jobs=1)
    ledger.targets().update(short_since=ledger.now(), short_because=long)
    ledger.provider("a")
    ledger.providers().update(trouble=long, trouble_since=ledger.now())
    assert max(map(len, call("list")[0].splitlines())) <= 80


def test_the_list_of_a_type_has_no_other() -> None:
    types.register(ServerType("big"))
    make("default-1"), make("big-1", type="big")
    out, _, _ = call("list", "--type", "big")
    assert "big-1" in out and "default-1" not in out and "type default" not in out
    assert refused("list", "--type", "bug") == ("No server type is named 'bug'. Did you mean 'big'?", 1)


def test_the_list_as_json_has_all_of_it() -> None:
    make("default-1", Status.DRAINING, jobs=2)
    found = json.loads(call("list", "--json")[0])
    assert [each["name"] for each in found["providers"]] == ["a", "b"]
    assert found["types"][0]["name"] == "default" and found["types"][0]["leaving"] == 1
    [server] = found["servers"]
    assert (server["status"], server["jobs"], server["machine"]) == ("draining", 2, "machine-of-default-1")
    assert server["since"].endswith("+00:00") and isinstance(server["age"], float)


def test_without_a_provider_one_is_told_what_is_missing(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE_SERVERS = {}
    out, err, status = call("list")
    assert (out, status) == ("", 0)
    assert err == "There is no provider: MULTISERVER_SCHEDULE_SERVERS['PROVIDERS'] is empty.\n"


# -- decide -----------------------------------------------------------------------------------------------------------


def test_monitor_decides_and_says_what_it_increased_and_what_it_decreased() -> None:
    """The original's printed increases alone."""
    by_load()
    out, err, status = call("monitor")
    assert (err, status) == ("", 0)
    assert out.startswith("type default: 0 → 2 wanted\n    2 asked for; load: 14 waiting; why: ")
    assert out.count("    + create one at a: ") == 2
    assert ledger.counts() == {"new": 2}
    assert Decision.objects.get().wanted == 2
    LOAD["waiting"] = 3
    out, _, _ = call("monitor")
    assert out.startswith("type default: 2 → 1 wanted\n") and out.count("    - give up default-") == 1
    assert ledger.counts() == {"new": 1}
    assert call("monitor")[0].startswith("type default: 1 wanted, as before\n")
    assert "    nothing to do\n" in call("monitor")[0]


def test_plan_says_the_same_and_changes_nothing() -> None:
    by_load()
    out, err, status = call("plan")
    assert (err, status) == ("", 0)
    assert out.startswith("type default: 0 → 2 wanted\n") and out.count("    + create one at a: ") == 2
    assert out.endswith("\nNothing was changed.\n")
    assert not ledger.servers().exists() and not ledger.targets().exists() and not ledger.decisions().exists()
    assert not ledger.providers().exists()
    assert max(map(len, out.splitlines())) <= 80


def test_a_decision_as_json_has_the_plan() -> None:
    by_load()
    for verb in ("plan", "monitor"):
        [found] = json.loads(call(verb, "--json")[0])
        assert (found["type"], found["before"], found["wanted"], found["load"]["waiting"]) == ("default", 0, 2, 14)
        assert [each["provider"] for each in found["plan"]["creates"]] == ["a", "a"]


def test_what_there_is_no_room_for_is_said() -> None:
    fleet.ensure(6)
    out, _, _ = call("plan")
    assert out.count("+ create one at a") == 4
    assert "    ! 2 cannot be made: " in out


def test_a_load_that_cannot_be_told_is_status_1_and_changes_no_count(caplog: pytest.LogCaptureFixture) -> None:
    types.register(ServerType("default").scale_on(away, waiting_per_server=10))
    out, err, status = call("monitor")
    assert status == 1
    assert err == "default: its load can't be told: ConnectionError: Connection refused\n"
    assert out.startswith("type default: 0 wanted, as before\n")


# -- bring about ------------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_reconcile_takes_the_steps_that_are_due_and_says_which(settings: Any) -> None:
    given = settings.MULTISERVER_SCHEDULE_SERVERS
    given["PROVIDERS"]["a"]["BACKEND"] = f"{__name__}.Yard"
    types.register(ServerType("default").configuration({"token": option("TOKEN")}))
    fleet.ensure(1)
    out, err, status = call("reconcile", "--provider", "a")
    assert (err, status) == ("", 0)
    server = ledger.servers().get()
    assert f"a: {server.name}: new → starting (created at a)\n" in out
    assert f"a: {server.name}: starting → running (" in out
    [report] = json.loads(call("reconcile", "--provider", "a", "--json")[0])
    assert (report["provider"], report["steps"]) == ("a", [])
    assert call("reconcile", "--provider", "a")[0] == "a: nothing to do\n"


@pytest.mark.django_db(transaction=True)
def test_a_provider_that_is_away_is_status_1_and_keeps_nobody_from_the_others(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE_SERVERS["PROVIDERS"]["b"]["BACKEND"] = f"{__name__}.Yard"
    out, err, status = call("reconcile")
    assert status == 1
    assert err == "a: AssertionError: the provider was called\n"
    assert out == "b: nothing to do\n"


@pytest.mark.django_db(transaction=True)
def test_a_provider_that_cannot_be_made_keeps_nobody_from_the_others_and_what_was_done_is_said(settings: Any) -> None:
    given = settings.MULTISERVER_SCHEDULE_SERVERS["PROVIDERS"]
    given["a"]["BACKEND"] = f"{__name__}.Yard"
    given["b"]["BACKEND"] = "nowhere.at.all"
    given["c"] = {"BACKEND": f"{__name__}.Yard"}
    types.register(ServerType("default").configuration({"token": option("TOKEN")}))
    fleet.ensure(1)
    out, err, status = call("reconcile")
    assert status == 1
    assert ": new → starting (created at a)\n" in out and out.endswith("c: nothing to do\n")
    assert err.startswith("b: ") and "nowhere" in err and err.count("\n") == 1
    assert [each["provider"] for each in json.loads(call("reconcile", "--json")[0])] == ["a", "b", "c"]


@pytest.mark.django_db(transaction=True)
def test_providers_of_other_hosts_are_left_to_them_and_that_is_no_trouble(settings: Any) -> None:
    given = settings.MULTISERVER_SCHEDULE_SERVERS["PROVIDERS"]
    given["a"]["BACKEND"] = f"{__name__}.Yard"
    given["b"]["ONLY_ON"] = ["web2", "web3"]
    out, err, status = call("reconcile")
    assert (out, status) == ("a: nothing to do\n", 0)
    assert err == "b: left to web2, web3, since it is ONLY_ON there\n"
    assert [each["provider"] for each in json.loads(call("reconcile", "--json")[0])] == ["a"]
    assert call("reconcile", "--provider", "b")[2] == 1, "who asks for that one is told that it was not done"


def test_an_unknown_provider_is_named_with_the_nearest() -> None:
    said, status = refused("reconcile", "--provider", "aa")
    assert said.endswith("has no 'aa'. Did you mean 'a'?") and status == 1


# -- steer ------------------------------------------------------------------------------------------------------------


def test_ensure_says_what_is_wanted_from_now_on() -> None:
    assert call("ensure", "3") == ("default: 3 wanted, from the next pass on\n", "", 0)
    assert fleet.wanted_count() == 3
    assert json.loads(call("ensure", "0", "--json")[0]) == {"type": "default", "asked": 0, "wanted": 0}


def test_ensure_says_who_else_has_a_say() -> None:
    by_load("big")
    out, err, status = call("ensure", "9", "--type", "big")
    assert (out, status) == ("big: 3 wanted, from the next pass on\n", 0)
    assert "big: not 9, since the type allows 0 to 3.\n" in err
    assert "big: its load is asked again soon, and changes this as its rules say.\n" in err


@pytest.mark.parametrize("count", ["-1", "two", "1.5"])
def test_ensure_takes_no_other_count(count: str) -> None:
    assert call("ensure", count) == ("", "", 2)
    assert not ledger.targets().exists()


def test_ensure_refuses_more_than_can_be_written_down() -> None:
    said = "fleet.ensure() takes at most 2147483647, not 99999999999999999999."
    assert refused("ensure", "99999999999999999999") == (said, 1)
    assert not ledger.targets().exists()


def test_ensure_of_an_unknown_type_names_the_nearest() -> None:
    assert refused("ensure", "1", "--type", "defalt") == (
        "No server type is named 'defalt'. Did you mean 'default'?",
        1,
    )
    assert not ledger.targets().exists()


def test_a_reboot_of_a_type_is_of_that_type_alone() -> None:
    """The original's rebooted all of them."""
    types.register(ServerType("big"))
    default, big = make("default-1"), make("big-1", type="big")
    assert call("reboot", "--type", "big") == ("a reboot is asked for of 1 server\n", "", 0)
    assert (again(default).reboot_requested_at, again(big).reboot_requested_at is not None) == (None, True)
    assert json.loads(call("reboot", "--json")[0]) == {"type": None, "asked": 2}
    assert refused("reboot", "--type", "bug")[1] == 1


def test_a_reboot_of_all_counts_none_whose_provider_is_in_the_settings_no_more() -> None:
    make("default-1"), make("default-2", provider="gone")
    assert call("reboot") == ("a reboot is asked for of 1 server\n", "", 0)


def test_a_reboot_of_some_is_of_those_alone() -> None:
    one, two = make("default-1"), make("default-2")
    out, _, status = call("reboot", "default-2")
    assert (out, status) == ("default-2\n    it is rebooted at the next look at a\n", 0)
    assert (again(one).reboot_requested_at, again(two).reason) == (
        None,
        "a reboot was asked for, by the command on web1",
    )
    assert refused("reboot", "default-2", "--type", "default")[1] == 2


@pytest.mark.parametrize(("verb", "becomes"), [("drain", "draining"), ("delete", "stopping")])
def test_servers_are_let_go_by_name(verb: str, becomes: str) -> None:
    server = make("default-1")
    out, err, status = call(verb, "default-1")
    assert (again(server).status, err, status) == (becomes, "", 0)
    assert "none is made in its place" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert [each.by for each in transitions_of(server)] == ["the command on web1"]


def test_what_is_not_done_is_said_and_is_status_1() -> None:
    one, two = make("default-1"), make("default-2", Status.ERRORED)
    out, err, status = call("drain", "default-1", "default-2")
    assert status == 1 and "default-1\n" in out
    assert err == "default-2: it went wrong, and is cleaned up\n"
    assert (again(one).status, again(two).status) == ("draining", "errored")
    for verb in ("drain", "delete", "retry", "reboot"):
        said, status = refused(verb, "default-9")
        assert (said.startswith("No server is named 'default-9'. Nothing was done."), status) == (True, 1)
    [done] = json.loads(call("retry", "default-2", "--json")[0])
    assert (done["name"], done["done"]) == ("default-2", True)


def test_the_wait_of_a_provider_or_a_type_is_ended_by_its_name() -> None:
    later = ledger.now() + HOUR
    ledger.provider("a"), ledger.target("default")
    ledger.providers().update(not_before=later, failures=6)
    ledger.targets().update(not_before=later, failures=6)
    said = "a\n    it is called at the next look, and what waits for it is begun\n"
    assert call("retry", "--provider", "a") == (said, "", 0)
    assert call("retry", "--provider", "a")[2] == 1
    [done] = json.loads(call("retry", "--type", "default", "--json")[0])
    assert (done["name"], done["done"]) == ("default", True)
    said = "default: it does not wait: its servers are made whenever they are wanted\n"
    assert call("retry", "--type", "default") == ("", said, 1)
    assert refused("retry", "--provider", "aa") == (
        "MULTISERVER_SCHEDULE_SERVERS['PROVIDERS'] has no 'aa'. Did you mean 'a'?",
        1,
    )
    assert refused("retry", "--type", "defalt")[0].endswith("Did you mean 'default'?")
    for wrong in ([], ["default-1", "--type", "default"], ["--provider", "a", "--type", "default"]):
        assert refused("retry", *wrong) == (
            "`servers retry` takes names of servers, --provider or --type: one of these.",
            2,
        )


def test_prune_says_what_it_forgot_or_would() -> None:
    make("default-1", Status.DELETED, since=8 * DAY)
    assert call("prune", "--dry-run") == ("would forget 1 deleted server and 0 decisions\n", "", 0)
    assert call("prune", "--days", "9")[0] == "forgot 0 deleted servers and 0 decisions\n"
    assert json.loads(call("prune", "--json")[0])["servers"] == 1


def test_more_days_than_a_date_can_go_back_are_refused(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", "--days", "36500")[2] == 0
    assert call("prune", "--days", "1000000")[2] == 2
    assert "argument --days: 1000000 is too large: write 36500 or less" in capsys.readouterr().err
    settings.MULTISERVER_SCHEDULE_SERVERS = {"PRUNE_DAYS": 1_000_000}
    assert refused("list")[0].endswith("['PRUNE_DAYS'] should be a whole number from 0 to 36500, not 1000000.")
    assert not ledger.servers().exists()


# -- what they share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "nearest"),
    [("drian", " Did you mean 'drain'?"), ("DRAIN", " Did you mean 'drain'?"), ("xyz", "")],
)
def test_an_unknown_verb_gets_the_nearest_one_and_all_of_them(verb: str, nearest: str) -> None:
    told = f"{nearest} Verbs are: list, plan, monitor, reconcile, ensure, reboot, drain, delete, retry, prune."
    assert refused(verb)[0] == f"Error: Unknown verb {verb!r}.{told}"
    assert refused(verb, "default-1", "--json")[0] == f"Error: Unknown verb {verb!r}.{told}"


def test_no_verb_at_all_is_told_so() -> None:
    assert refused()[0] == "Error: the following arguments are required: verb"


def test_an_unknown_verb_that_is_typed_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        load_command_class("multiserver_schedule.servers", "servers").run_from_argv(["manage.py", "servers", "drian"])
    said = capsys.readouterr().err
    assert (left.value.code, said.startswith("usage: manage.py servers ")) == (2, True)
    assert "\nmanage.py servers: error: Unknown verb 'drian'. Did you mean 'drain'? Verbs are: list, " in said


@pytest.mark.parametrize("arguments", [["list"], ["plan"], ["monitor"], ["ensure", "1"], ["reboot"], ["reconcile"]])
def test_a_wrong_setting_is_told_and_no_traceback(settings: Any, arguments: list[str]) -> None:
    settings.MULTISERVER_SCHEDULE_SERVERS = {"PROVIDER": {}}
    said, status = refused(*arguments)
    assert ("has no option 'PROVIDER'. Did you mean 'PROVIDERS'?" in said, status) == (True, 1)


@pytest.mark.parametrize("arguments", [["plan"], ["monitor"], ["ensure", "1"], ["reboot"], ["reconcile"]])
def test_nothing_is_decided_on_half_of_the_declarations(settings: Any, arguments: list[str]) -> None:
    """A type that cannot be read would have its servers deleted."""
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    make("big-1", type="big")
    said, status = refused(*arguments)
    assert ("tests.broken_project.schedule cannot be read" in said, status) == (True, 1)
    assert ledger.servers().get().status == "running"


def test_a_list_is_shown_although_declarations_cannot_be_read(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.broken_project.urls"
    make("big-1", type="big")
    out, err, status = call("list")
    assert ("big-1" in out, "tests.broken_project.schedule cannot be read" in err, status) == (True, True, 1)


def test_a_list_is_shown_although_a_type_is_to_be_made_at_a_provider_that_is_none() -> None:
    types.register(ServerType("encoder").provider("aa"))
    make("default-1")
    out, err, status = call("list")
    said = "The server type 'encoder' is to be made at 'aa', which is no provider. Did you mean 'a'?\n"
    assert ("default-1" in out, "type encoder\n" in out, "provider a\n" in out) == (True, True, True)
    assert (err, status) == (said, 1)
    assert json.loads(call("list", "--json")[0])["servers"][0]["name"] == "default-1"
    assert "default-1" in call("list", "--type", "default")[0]
    for verb in (["drain", "default-1"], ["delete", "default-1"]):
        assert call(*verb)[2] == 0
    assert refused("monitor") == (said.strip(), 1), "nothing is decided on half of the declarations"


@pytest.mark.parametrize("buffered", [True, False])
def test_whoever_reads_no_further_gets_no_traceback(monkeypatch: pytest.MonkeyPatch, buffered: bool) -> None:
    """As in `manage.py servers list | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    raw = os.fdopen(writes, "wb", buffering=-1 if buffered else 0)
    with TextIOWrapper(raw, write_through=not buffered) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as left:
            load_command_class("multiserver_schedule.servers", "servers").run_from_argv(
                ["manage.py", "servers", "list"]
            )
    assert left.value.code == 1


def test_a_database_that_is_away_is_told_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> Any:
        raise OperationalError("connection refused")

    monkeypatch.setattr(ledger, "now", now)
    said, status = refused("list")
    assert (said, status) == ("The database does not do what was asked: OperationalError: connection refused", 1)


@pytest.mark.parametrize("verb", ["plan", "list", "monitor"])
def test_a_forgotten_migrate_is_said(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> Any:
        raise OperationalError("no such table: multiserver_schedule_servers_target")

    monkeypatch.setattr(ledger, "now", now)
    said, status = refused(verb)
    assert said.endswith("no such table: multiserver_schedule_servers_target. Has `manage.py migrate` been run?")
    assert status == 1


@pytest.mark.django_db(transaction=True)
def test_a_secret_is_in_no_row_no_line_and_no_log(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a driver says of what it was given."""
    caplog.set_level(logging.DEBUG)
    settings.MULTISERVER_SCHEDULE_SERVERS["PROVIDERS"]["a"]["BACKEND"] = f"{__name__}.Leaky"
    types.register(ServerType("default").configuration({"size": 4, "token": option("TOKEN")}))
    fleet.ensure(1)
    said = [*call("monitor"), *call("reconcile", "--provider", "a"), *call("reconcile", "--json")]
    said += [*call("list"), *call("list", "--json", "--all"), *call("plan", "--json")]
    server = ledger.servers().get()
    assert "RuntimeError: 401 for" in server.error
    rows = [*ledger.servers().values(), *ledger.transitions().values(), *ledger.providers().values()]
    assert "$option" in str(rows)
    for text in (*map(str, said), str(rows), caplog.text):
        assert SECRET not in text

"""What ``manage.py check`` says of dynamic servers, and that each of its ids is used once and documented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as project
from django.core.checks import CheckMessage, Error, run_checks
from django.db import connections
from django.test import override_settings

from multiserver_schedule.servers import checks, types
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.types import ServerType, option

from .fleets import Nowhere

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "hunter2-and-more"


class OnThisHost(Nowhere):
    """One whose machines other hosts do not see."""

    local = True


class Careful(Nowhere):
    """One that says itself which option is wrong."""

    def __init__(self, name: str, options: Mapping[str, Any], *, fleet: str) -> None:
        super().__init__(name, options, fleet=fleet)
        if "image" not in options:
            raise FleetError(f"{name}: OPTIONS has no 'image'.")


class Careless(Nowhere):
    """One that raises whatever comes to it, with what it was given."""

    def __init__(self, name: str, options: Mapping[str, Any], *, fleet: str) -> None:
        raise ValueError(f"cannot log in as {options!r}")


class Outspoken(Nowhere):
    """One that has checks of its own."""

    def check(self) -> list[CheckMessage]:
        return [Error("no such region", hint="Take another.", id="outspoken.E001")]


class Falling(Nowhere):
    """One whose checks fail."""

    def check(self) -> list[CheckMessage]:
        raise ValueError(f"no {self.options['token']}")


def provider(kind: type = Nowhere, **more: Any) -> dict[str, Any]:
    return {"BACKEND": f"{kind.__module__}.{kind.__qualname__}", **more}


def said(*, fleet: str | None = "shop-test", **settings: Any) -> list[CheckMessage]:
    given = {"FLEET": fleet, **settings} if fleet else settings
    with override_settings(MULTISERVER_SCHEDULE_SERVERS=given):
        return run_checks(tags=[checks.TAG])


def ids(**settings: Any) -> list[str]:
    return [str(message.id).partition(".")[2] for message in said(**settings)]


def test_a_project_without_a_provider_is_fine() -> None:
    with override_settings():
        del project.MULTISERVER_SCHEDULE_SERVERS
        assert run_checks(tags=[checks.TAG]) == []


def test_a_project_with_a_provider_and_a_type_is_fine() -> None:
    types.register(ServerType("big").provider("a").configuration({"size": 4, "key": option("key")}).between(0, 5))
    assert ids(PROVIDERS={"a": provider(OPTIONS={"key": SECRET})}) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PROVIDER": {}}, "Did you mean 'PROVIDERS'"),
        ({"PROVIDERS": {"a": {"BACKEND": "x.Y", "MAX_SERVER": 3}}}, "Did you mean 'MAX_SERVERS'"),
        ({"POLL": 20}, "timedelta"),
        *(
            ({"PROVIDERS": {"a": {"BACKEND": "x.Y", "ONLY_ON": only_on}}}, "['a']['ONLY_ON'] should be a list of")
            for only_on in (None, 5, "web1", ["web1", 5])
        ),
        *(
            ({"PROVIDERS": {name: {"BACKEND": "x.Y"}}}, "should have at most 64 letters, digits, dots")
            for name in ("my cloud", "a/b", "wölkchen", "", "x" * 65, 5)
        ),
    ],
)
def test_a_wrong_setting_is_an_error_that_helps(given: dict[str, Any], message: str) -> None:
    [error] = said(**given)
    assert (error.id, message in error.msg) == ("multiserver_schedule_servers.E001", True), error
    assert error.hint


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"BACKEND": "no.such.Provider"}, "No module named 'no'"),
        ({"BACKEND": "multiserver_schedule.servers.providers.base.Provider"}, "does not define"),
        ({"BACKEND": "datetime.datetime"}, "should be a subclass of BaseProvider"),
        (provider(Careful), "a: OPTIONS has no 'image'."),
    ],
)
def test_a_provider_that_cannot_be_made_is_an_error(entry: dict[str, Any], message: str) -> None:
    [error] = said(PROVIDERS={"a": entry})
    assert (error.id, message in error.msg) == ("multiserver_schedule_servers.E002", True), error
    assert error.hint


@pytest.mark.parametrize("kind", [Careless, Falling])
def test_what_somebodys_provider_raises_is_an_error_without_its_secrets(kind: type) -> None:
    [error] = said(PROVIDERS={"a": provider(kind, OPTIONS={"token": SECRET, "nested": {"more": [f"{SECRET}-2"]}})})
    assert error.id == "multiserver_schedule_servers.E002"
    assert "ValueError: " in error.msg and "PROVIDERS'['a']" in error.msg.replace('"', "'").replace("']['a", "'['a")
    assert SECRET not in f"{error.msg} {error.hint}"


def test_one_wrong_provider_hides_no_other() -> None:
    assert ids(PROVIDERS={"a": provider(Careless), "b": provider(Careful)}) == ["E002", "E002"]


def test_what_a_provider_says_of_itself_is_said() -> None:
    [error] = said(PROVIDERS={"a": provider(Outspoken)})
    assert (error.id, error.msg, error.hint) == ("outspoken.E001", "no such region", "Take another.")


def test_a_provider_of_one_host_has_to_say_which() -> None:
    assert ids(PROVIDERS={"a": provider(OnThisHost)}) == ["W001"]
    assert ids(PROVIDERS={"a": provider(OnThisHost, ONLY_ON=["web1"])}) == []


def test_a_fleet_at_a_provider_has_a_name_of_its_own() -> None:
    [warning] = said(fleet=None, PROVIDERS={"a": provider(), "b": here(directory="/srv/shop/state")})
    assert warning.id == "multiserver_schedule_servers.W002"
    assert "machines at a are tagged 'tests'" in warning.msg
    assert ids(fleet=None, PROVIDERS={"b": here(directory="/srv/shop/state")}) == []


def here(**options: Any) -> dict[str, Any]:
    return provider(OnThisHost, ONLY_ON=["web1"], OPTIONS=options)


def test_two_projects_of_a_user_on_a_host_are_told_to_have_names_of_their_own() -> None:
    [warning] = said(fleet=None, PROVIDERS={"b": here()})
    assert warning.id == "multiserver_schedule_servers.W002"
    assert "machines at b of this host are those of 'tests'" in warning.msg
    assert "'tests' where machines run already" in str(warning.hint)
    assert ids(fleet="shop", PROVIDERS={"b": here()}) == []


def test_whose_name_is_made_up_is_said_of_both_clouds_and_this_host() -> None:
    found = ids(fleet=None, PROVIDERS={"a": provider(), "b": here(), "c": provider(Careful)})
    assert sorted(found) == ["E002", "W002", "W002"]


@pytest.mark.parametrize(
    ("type", "message"),
    [
        (ServerType("big").provider("upclod"), "Did you mean 'upcloud'?"),
        (ServerType("big").configuration({"size": 4, "root": {"api_token": SECRET}}), "root.api_token in plain text"),
        (ServerType("big").configuration({"key": option("ssh_key")}), "option('ssh_key')"),
    ],
)
def test_a_type_that_cannot_be_made_is_an_error(type: ServerType, message: str) -> None:
    types.register(type)
    [error] = said(PROVIDERS={"upcloud": provider()})
    assert (error.id, message in error.msg) == ("multiserver_schedule_servers.E003", True), error
    assert SECRET not in f"{error.msg} {error.hint}"


def test_a_type_without_any_provider_is_an_error() -> None:
    types.register(ServerType("big"))
    assert ids() == ["E003"]


def test_a_configuration_that_is_worked_out_is_not_asked_for() -> None:
    def configuration(server: ServerInfo) -> dict[str, Any]:
        raise AssertionError

    types.register(ServerType("big").configuration(configuration))
    assert ids(PROVIDERS={"a": provider()}) == []


@pytest.mark.parametrize(
    ("least", "most", "expected"), [(0, 5, []), (0, 6, ["W003"]), (6, None, ["W003"]), (5, None, [])]
)
def test_more_servers_than_there_is_room_for_is_a_warning(least: int, most: int | None, expected: list[str]) -> None:
    types.register(ServerType("big").provider("a", "b").between(least, most))
    assert ids(PROVIDERS={"a": provider(MAX_SERVERS=2), "b": provider(MAX_SERVERS=3)}) == expected


def test_the_scheduler_is_needed() -> None:
    with override_settings(INSTALLED_APPS=[app for app in project.INSTALLED_APPS if app != "multiserver_schedule"]):
        assert ids() == ["E005"]


class Scattered:
    """A router that has transitions elsewhere than servers."""

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return "other" if model.__name__ == "Transition" else None


def test_tables_in_two_databases_are_an_error() -> None:
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.Scattered"]):
        assert ids() == ["E006"]


def test_a_time_zone_on_the_database_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "TIME_ZONE", "Europe/Berlin")
    assert ids() == ["E007"]


def test_what_is_wrong_with_the_scheduler_is_left_to_its_own_checks() -> None:
    with override_settings(MULTISERVER_SCHEDULE={"LEASES": 1}):
        assert ids(fleet=None, PROVIDERS={"a": provider()}) == []


def test_a_wrong_setting_is_said_once() -> None:
    types.register(ServerType("big"))
    assert ids(PROVIDERS=[]) == ["E001"]


def test_each_id_is_used_once_and_documented() -> None:
    package = ROOT / "multiserver_schedule" / "servers"
    used = [
        found
        for source in sorted(package.rglob("*.py"))
        for found in re.findall(r'id="(multiserver_schedule_servers\.[EW]\d{3})"', source.read_text())
    ]
    text = (ROOT / "docs" / "checks.rst").read_text()
    documented = re.findall(r"^(multiserver_schedule_servers\.[EW]\d{3})", text, re.M)
    assert len(used) == len(set(used))
    assert sorted(used) == sorted(documented)


def test_two_providers_with_one_account_are_a_warning() -> None:
    given = {"a": provider(OPTIONS={"token": SECRET}), "b": provider(MAX_SERVERS=3, OPTIONS={"token": SECRET})}
    [warning] = said(PROVIDERS=given)
    assert warning.id == "multiserver_schedule_servers.W005"
    assert "'a' and 'b'" in warning.msg
    assert SECRET not in warning.msg


def test_two_accounts_and_two_hosts_are_fine() -> None:
    assert ids(PROVIDERS={"a": provider(OPTIONS={"token": SECRET}), "b": provider(OPTIONS={"token": "another"})}) == []
    hosts = {name: provider(OnThisHost, OPTIONS={"x": 1}, ONLY_ON=[name]) for name in ("web1", "web2")}
    assert ids(PROVIDERS=hosts) == []

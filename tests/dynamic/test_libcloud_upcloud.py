"""``LibcloudProvider`` at UpCloud: libcloud's driver over HTTP, against a stand-in of the documented API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from multiserver_schedule.servers.entries import MachineState, ServerInfo
from multiserver_schedule.servers.exceptions import (
    ProviderBusy,
    ProviderError,
    ProviderFull,
    ProviderRefused,
    UnknownState,
)
from multiserver_schedule.testing.providers import ProviderContract

from .needs import needs
from .standin import HOST, Answer
from .upcloud import IMAGE, UpCloud, error

needs("libcloud")
from multiserver_schedule.servers.providers.libcloud import LibcloudProvider  # noqa: E402
from multiserver_schedule.servers.providers.libcloud.dialects import UpCloud as Dialect  # noqa: E402

CONFIGURATION = {"size": "1xCPU-1GB", "image": IMAGE, "location": "fi-hel1"}
PASSWORD = "correct-horse-battery"
Make = Callable[..., LibcloudProvider]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[UpCloud]:
    monkeypatch.setattr(Dialect, "pause", 0.01)
    cloud = UpCloud()
    yield cloud
    cloud.close()


@pytest.fixture
def make_provider(cloud: UpCloud) -> Make:
    def make(fleet: str = "shop", **options: Any) -> LibcloudProvider:
        arguments = {"username": "shop", "password": PASSWORD, "host": HOST, "port": cloud.port, "secure": False}
        return LibcloudProvider("up", {"driver": "upcloud", "arguments": arguments, **options}, fleet=fleet)

    return make


@pytest.fixture
def provider(make_provider: Make) -> LibcloudProvider:
    return make_provider()


def server(key: str = "3f9a0c11d2e4", **configuration: Any) -> ServerInfo:
    return ServerInfo(f"big-{key}", key, "big", "up", configuration={**CONFIGURATION, **configuration})


@pytest.fixture
def running(provider: LibcloudProvider) -> str:
    machine = provider.create_server(server())
    while not provider.has_started(machine.id):
        pass
    return machine.id


class TestContract(ProviderContract):
    @pytest.fixture
    def make_provider(self, make_provider: Make) -> Make:
        return make_provider

    @pytest.fixture
    def configuration(self) -> Mapping[str, Any]:
        return CONFIGURATION


def test_a_server_is_made_as_its_configuration_says_and_bears_its_name_its_fleet_and_its_key(
    provider: LibcloudProvider, cloud: UpCloud
) -> None:
    provider.create_server(server(ssh_key="ssh-ed25519 AAAA", size="2xCPU-4GB", image="Worker"))
    (made,) = cloud.servers.values()
    assert made["title"] == "big-3f9a0c11d2e4 mss--shop--3f9a0c11d2e4"
    assert made["hostname"] == "big-3f9a0c11d2e4"
    assert (made["plan"], made["zone"]) == ("2xCPU-4GB", "fi-hel1")
    (disk,) = cloud.storages.values()
    assert (disk["clone_of"], disk["size"]) == (IMAGE, 30)
    sent = cloud.requests[-1].json()["server"]["login_user"]
    assert sent == {"username": "root", "ssh_keys": {"ssh_key": ["ssh-ed25519 AAAA"]}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": "1xCPU-1BG"}, "no size '1xCPU-1BG' here. Did you mean '1xCPU-1GB'"),
        ({"location": "fi-hel2"}, "no location 'fi-hel2' here. Did you mean 'fi-hel1'"),
        ({"image": "Worke"}, "no image 'Worke' here. Did you mean 'Worker'"),
        ({"image": IMAGE[:-1] + "9"}, "no image"),
    ],
)
def test_what_there_is_not_is_refused_with_the_nearest_name_and_nothing_is_made(
    provider: LibcloudProvider, cloud: UpCloud, given: Mapping[str, Any], told: str
) -> None:
    with pytest.raises(ProviderRefused, match=told):
        provider.create_server(server(**given))
    assert cloud.servers == {}


@pytest.mark.parametrize(("status", "code"), [(500, "INTERNAL"), (503, "SERVICE_UNAVAILABLE")])
def test_a_plan_that_cannot_be_looked_up_now_means_that_nothing_was_made(
    provider: LibcloudProvider, cloud: UpCloud, status: int, code: str
) -> None:
    cloud.spoiled["GET", "/plan"] = error(status, code, "Later.")
    with pytest.raises(ProviderBusy):
        provider.create_server(server())


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (402, "INSUFFICIENT_CREDITS", ProviderFull),
        (403, "SERVER_CORE_LIMIT_REACHED", ProviderFull),
        (409, "SERVER_RESOURCES_UNAVAILABLE", ProviderFull),
        (409, "IP_ADDRESS_RESOURCES_UNAVAILABLE", ProviderFull),
        (403, "SERVER_CREATING_LIMIT_REACHED", ProviderBusy),
        (429, "RATE_LIMITED", ProviderBusy),
        (400, "PLAN_INVALID", ProviderRefused),
        (401, "AUTHENTICATION_FAILED", ProviderRefused),
        (403, "ACTION_FORBIDDEN", ProviderRefused),
        (404, "ZONE_NOT_FOUND", ProviderRefused),
        (500, "INTERNAL", ProviderError),
    ],
)
def test_an_error_of_upclouds_says_what_was_done(
    provider: LibcloudProvider, cloud: UpCloud, status: int, code: str, kind: type[ProviderError]
) -> None:
    cloud.spoiled["POST", "/server"] = error(status, code, "Because.")
    with pytest.raises(ProviderError) as caught:
        provider.create_server(server())
    assert type(caught.value) is kind


def test_a_server_is_shut_down_in_order_and_restarted_in_order(
    provider: LibcloudProvider, cloud: UpCloud, running: str
) -> None:
    provider.reboot_server(running)
    assert cloud.requests[-1].json()["restart_server"]["stop_type"] == "soft"
    while not provider.has_started(running):
        pass
    provider.stop_server(running)
    assert cloud.requests[-1].json() == {"stop_server": {"stop_type": "soft", "timeout": "60"}}
    assert not provider.has_stopped(running)
    while not provider.has_stopped(running):
        pass


def test_the_disks_of_a_server_that_is_deleted_are_deleted_too(
    provider: LibcloudProvider, cloud: UpCloud, running: str
) -> None:
    assert len(cloud.storages) == 1
    provider.delete_server(running)
    assert cloud.servers == {}
    assert cloud.storages == {}


def test_a_server_that_does_not_stop_in_time_is_deleted_when_it_is_asked_for_again(
    make_provider: Make, cloud: UpCloud, running: str
) -> None:
    cloud.spoiled["POST", "/stop"] = Answer.of({"server": {}})
    provider = make_provider(timeout=0.2)
    began = time.monotonic()
    with pytest.raises(ProviderBusy, match="has to stop before it can be deleted"):
        provider.delete_server(running)
    assert time.monotonic() - began < 5
    assert not provider.has_been_deleted(running)
    cloud.spoiled.clear()
    provider.delete_server(running)
    assert provider.has_been_deleted(running)


def test_a_server_that_is_changed_between_the_look_and_the_call_is_left_for_later(
    provider: LibcloudProvider, cloud: UpCloud, running: str
) -> None:
    cloud.spoiled["POST", "/stop"] = error(409, "SERVER_STATE_ILLEGAL", "It is in maintenance.")
    with pytest.raises(ProviderBusy):
        provider.stop_server(running)


GARBAGE = {
    "not authorized": error(401, "AUTHENTICATION_FAILED", "No."),
    "not authorized, in other words": Answer.of({"message": "No."}, 401),
    "forbidden": error(403, "ACTION_FORBIDDEN", "No."),
    "another 404": error(404, "NOT_FOUND", "No such resource."),
    "a proxy's 404": Answer(404, b"<html>Not found</html>"),
    "an error of its own": error(500, "INTERNAL", "Oops."),
    "a proxy's page": Answer(200, b"<html>Welcome</html>"),
    "nothing": Answer(200, b""),
    "an empty object": Answer.of({}),
    "null": Answer.of(None),
    "no content": Answer(204),
    "half of it": Answer(200, b'{"server": {"state": "stopped"}}', cut=9),
    "no answer": Answer(cut=-1),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_no_server_is_taken_for_gone_stopped_or_never_made_because_of_an_error(
    provider: LibcloudProvider, cloud: UpCloud, running: str, garbage: Answer
) -> None:
    cloud.spoiled["GET", f"/server/{running}"] = cloud.spoiled["GET", "/server"] = garbage
    for look in (provider.has_been_deleted, provider.has_stopped, provider.has_started, provider.delete_server):
        with pytest.raises(ProviderError):
            look(running)
    for ask in (provider.list_servers, provider.current_server_count, lambda: provider.find_by_tag("3f9a0c11d2e4")):
        with pytest.raises(ProviderError):
            ask()
    assert running in cloud.servers


@pytest.mark.parametrize("word", ["error", "degraded"])
def test_a_word_that_tells_nothing_is_named_and_nothing_is_concluded(
    provider: LibcloudProvider, cloud: UpCloud, running: str, word: str
) -> None:
    cloud.servers[running]["state"] = word
    for ask in (provider.has_started, provider.has_stopped):
        with pytest.raises(UnknownState, match=f"is '{word}'"):
            ask(running)
    assert not provider.has_been_deleted(running)
    (listed,) = provider.list_servers()
    assert (listed.state, listed.word) == (MachineState.UNKNOWN, word)


def test_servers_that_people_made_are_nobodys_and_count_only_when_all_do(make_provider: Make, cloud: UpCloud) -> None:
    make_provider().create_server(server())
    for title in ("mss--shop--", "shop--db", "mss--shop-two--1", "mss--shop--1 copy", "xmss--shop--1", "mss--shop--A1"):
        cloud.servers[title] = {**next(iter(cloud.servers.values())), "uuid": title, "title": title}
    assert [machine.key for machine in make_provider().list_servers()] == ["3f9a0c11d2e4"]
    assert make_provider().current_server_count() == 1
    assert make_provider(count_all=True).current_server_count() == 7
    assert [machine.key for machine in make_provider("shop-two").list_servers()] == ["1"]
    with pytest.raises(ProviderRefused, match="does not bear the tag"):
        make_provider().delete_server("shop--db")


def test_no_secret_is_in_an_error(provider: LibcloudProvider, cloud: UpCloud) -> None:
    cloud.spoiled["POST", "/server"] = error(400, "BAD", f"The password {PASSWORD} of shop is bad.")
    with pytest.raises(ProviderRefused, match="The password … of shop is bad") as caught:
        provider.create_server(server())
    assert PASSWORD not in str(caught.value)


class TestTwoHyphens:
    fleets: ClassVar = ["a", "a-b", "a--b", "a--b--c"]

    def test_a_fleet_is_read_back_from_a_name_exactly(self, make_provider: Make) -> None:
        made = {fleet: make_provider(fleet).create_server(server("c1-d2")).id for fleet in self.fleets}
        for fleet in self.fleets:
            assert [machine.id for machine in make_provider(fleet).list_servers()] == [made[fleet]]
            assert [machine.key for machine in make_provider(fleet).find_by_tag("c1-d2")] == ["c1-d2"]

    @pytest.mark.parametrize("key", ["b--c", "-c", "c-", "", "C", "c d"])
    def test_a_key_that_could_not_be_read_back_is_refused(
        self, provider: LibcloudProvider, cloud: UpCloud, key: str
    ) -> None:
        with pytest.raises(ProviderRefused, match="cannot be a part of a machine's name"):
            provider.create_server(ServerInfo("big-1", key, "big", "up", configuration=CONFIGURATION))
        assert cloud.servers == {}

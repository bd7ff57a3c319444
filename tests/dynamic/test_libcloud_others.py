"""``LibcloudProvider``: its options, and the clouds beside EC2 and UpCloud."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from django.core.checks import Error

from multiserver_schedule.servers import fleet
from multiserver_schedule.servers.entries import MachineState, ServerInfo
from multiserver_schedule.servers.exceptions import (
    FleetError,
    ProviderError,
    ProviderFull,
    ProviderRefused,
)
from multiserver_schedule.testing.providers import ProviderContract

from .cloudstack import CloudStack
from .conftest import MINUTE, Site
from .needs import needs
from .standin import HOST, Answer, Request, Server

needs("libcloud")
from libcloud.compute.drivers.dummy import DummyNodeDriver  # noqa: E402

from multiserver_schedule.servers.providers.libcloud import LibcloudProvider  # noqa: E402

Make = Callable[..., LibcloudProvider]
NOW = "2030-01-01T00:00:00Z"


def server(key: str, **configuration: Any) -> ServerInfo:
    return ServerInfo(f"big-{key}", key, "big", "cloud", configuration=configuration)


class DigitalOcean(Server):
    """As much of the documented API as the driver uses, with pages of two."""

    def __init__(self) -> None:
        self.droplets: dict[int, dict[str, Any]] = {}
        self.coming: dict[int, list[str]] = {}
        self.full = False
        self.forget_on_page = 0
        super().__init__()

    def answer(self, request: Request) -> Answer:
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return Answer.of({"id": "unauthorized", "message": "Unable to authenticate you"}, 401)
        match request.method, request.path.split("/")[1:]:
            case "GET", ["v2", "droplets"]:
                for known in self.droplets:
                    self.look(known)
                wanted = request.query.get("tag_name")
                found = [each for each in self.droplets.values() if wanted is None or wanted in each["tags"]]
                page, total = int(request.query.get("page", 1)), len(found)
                if page == self.forget_on_page:
                    found = found[1:]
                return Answer.of({"droplets": found[2 * page - 2 : 2 * page], "meta": {"total": total}, "links": {}})
            case "POST", ["v2", "droplets"]:
                return self.create(request.json())
            case method, ["v2", "droplets", text, *verb]:
                known = int(text)
                if known not in self.droplets:
                    return Answer.of(
                        {"id": "not_found", "message": "The resource you were accessing could not be found."}, 404
                    )
                return self.of_droplet(method, known, verb, request)
        return Answer.of({"id": "not_found", "message": "no route"}, 404)

    def create(self, given: dict[str, Any]) -> Answer:
        if self.full:
            return Answer.of({"message": "creating this/these droplet(s) will exceed your droplet limit"}, 422)
        made = 1000 + len(self.coming)
        self.droplets[made] = {
            "id": made,
            "name": given["name"],
            "status": "new",
            "created_at": NOW,
            "tags": given["tags"],
            "size_slug": given["size"],
            "networks": {"v4": [{"type": "public", "ip_address": "192.0.2.3"}]},
            "region": {"name": given["region"]},
        }
        self.coming[made] = ["active"]
        return Answer.of({"droplet": self.droplets[made]}, 202)

    def of_droplet(self, method: str, known: int, verb: list[str], request: Request) -> Answer:
        droplet = self.droplets[known]
        match method, verb:
            case "GET", []:
                self.look(known)
                return Answer.of({"droplet": droplet})
            case "DELETE", []:
                del self.droplets[known]
                return Answer(204)
            case "POST", ["actions"]:
                if droplet["status"] != "active":
                    return Answer.of({"id": "unprocessable_entity", "message": "Droplet is powered off."}, 422)
                self.coming[known] = {"shutdown": ["active", "off"], "reboot": ["active"]}[request.json()["type"]]
                return Answer.of({"action": {}}, 201)
        return Answer.of({"id": "not_found", "message": "no route"}, 404)

    def look(self, known: int) -> None:
        if self.coming[known]:
            self.droplets[known]["status"] = self.coming[known].pop(0)


class OpenStack(Server):
    """As much of Nova as the driver uses, with pages of two."""

    def __init__(self) -> None:
        self.servers: dict[str, dict[str, Any]] = {}
        self.coming: dict[str, list[str]] = {}
        self.full = False
        super().__init__()

    def answer(self, request: Request) -> Answer:
        match request.method, request.path.split("/")[1:]:
            case "GET", ["flavors", "detail"]:
                flavor = {"id": "7", "name": "m1.small", "ram": 1, "disk": 1, "vcpus": 1, "swap": ""}
                return Answer.of({"flavors": [flavor]})
            case "GET", ["servers", "detail"]:
                for known in self.servers:
                    self.look(known)
                ids = list(self.servers)
                begin = ids.index(request.query["marker"]) + 1 if "marker" in request.query else 0
                page = [self.servers[known] for known in ids[begin : begin + 2]]
                answer: dict[str, Any] = {"servers": page}
                if ids[begin + 2 :]:
                    following = f"http://x/servers/detail?marker={ids[begin + 1]}"
                    answer["servers_links"] = [{"rel": "next", "href": following}]
                return Answer.of(answer)
            case "POST", ["servers"]:
                return self.create(request.json()["server"])
            case method, ["servers", known, *verb]:
                if known not in self.servers:
                    message = f"Instance {known} could not be found."
                    return Answer.of({"itemNotFound": {"code": 404, "message": message}}, 404)
                if (method, verb) == ("GET", []):
                    self.look(known)
                    return Answer.of({"server": self.servers[known]})
                if (method, verb) == ("DELETE", []):
                    del self.servers[known]
                    return Answer(204)
                if (method, verb) == ("POST", ["action"]):
                    return self.act(known, request.json())
        return Answer.of({"itemNotFound": {"code": 404, "message": "The resource could not be found."}}, 404)

    def create(self, given: dict[str, Any]) -> Answer:
        if self.full:
            message = "Quota exceeded for cores: Requested 1, but already used 20 of 20 cores"
            return Answer.of({"forbidden": {"code": 403, "message": message}}, 403)
        made = str(uuid.uuid4())
        self.servers[made] = {
            **{name: given[name] for name in ("name", "metadata")},
            "id": made,
            "status": "BUILD",
            "addresses": {},
            "created": NOW,
            "updated": NOW,
            "hostId": "",
            "tenant_id": "t",
            "links": [{"rel": "self", "href": f"http://x/servers/{made}"}],
            "flavor": {"id": given["flavorRef"]},
            "networks": given.get("networks"),
        }
        self.coming[made] = ["ACTIVE"]
        return Answer.of({"server": self.servers[made] | {"adminPass": "x"}}, 202)

    def act(self, known: str, verb: dict[str, Any]) -> Answer:
        if self.servers[known]["status"] != "ACTIVE":
            return Answer.of({"conflictingRequest": {"code": 409, "message": "It is not active."}}, 409)
        self.coming[known] = ["ACTIVE", "SHUTOFF"] if "os-stop" in verb else ["REBOOT", "ACTIVE"]
        return Answer(202)

    def look(self, known: str) -> None:
        if self.coming[known]:
            self.servers[known]["status"] = self.coming[known].pop(0)


@pytest.fixture
def ocean() -> Iterator[DigitalOcean]:
    cloud = DigitalOcean()
    yield cloud
    cloud.close()


@pytest.fixture
def stack() -> Iterator[OpenStack]:
    cloud = OpenStack()
    yield cloud
    cloud.close()


def at_ocean(cloud: DigitalOcean) -> Make:
    # libcloud's driver takes a host, and forgets it.
    arguments = {"key": "dop_v1_0123456789", "host": HOST, "port": cloud.port, "secure": False}
    return lambda fleet="shop", **options: LibcloudProvider(
        "do", {"driver": "digitalocean", "arguments": arguments, **options}, fleet=fleet
    )


def at_stack(cloud: OpenStack) -> Make:
    arguments = {
        "key": "user",
        "secret": "0123456789abc",
        "ex_force_auth_token": "gAAAAABtoken",
        "ex_tenant_name": "shop",
        "ex_force_auth_url": f"http://{HOST}:{cloud.port}",
        "ex_force_base_url": f"http://{HOST}:{cloud.port}",
    }
    return lambda fleet="shop", **options: LibcloudProvider(
        "os", {"driver": "openstack", "arguments": arguments, **options}, fleet=fleet
    )


DROPLET = {"size": "s-1vcpu-1gb", "image": 12345, "location": "fra1"}
NOVA = {"size": "m1.small", "image": "01000000-0000-4000-8000-000030060200", "networks": ["net-1"]}


class TestDigitalOcean(ProviderContract):
    @pytest.fixture
    def make_provider(self, ocean: DigitalOcean) -> Make:
        return at_ocean(ocean)

    @pytest.fixture
    def configuration(self) -> Mapping[str, Any]:
        return DROPLET


class TestOpenStack(ProviderContract):
    @pytest.fixture
    def make_provider(self, stack: OpenStack) -> Make:
        return at_stack(stack)

    @pytest.fixture
    def configuration(self) -> Mapping[str, Any]:
        return NOVA

    def unknown_machine_id(self, known: str) -> str:
        return str(uuid.uuid4())


def test_a_droplets_tags_are_in_the_request_that_creates_it(ocean: DigitalOcean) -> None:
    at_ocean(ocean)().create_server(server("1", **DROPLET, ex_create_attr={"tags": ["web"], "ssh_keys": [7]}))
    (sent,) = [request.json() for request in ocean.requests if request.method == "POST"]
    assert sent["tags"] == [
        "web",
        "multiserver_schedule_fleet:shop",
        "multiserver_schedule_key:1",
        "multiserver_schedule_type:big",
    ]
    assert (sent["image"], sent["region"], sent["size"], sent["ssh_keys"]) == (12345, "fra1", "s-1vcpu-1gb", [7])


def test_metadata_of_a_nova_server_is_in_the_request_that_creates_it(stack: OpenStack) -> None:
    at_stack(stack)().create_server(server("1", **NOVA, ex_metadata={"team": "data"}))
    (sent,) = [request.json()["server"] for request in stack.requests if request.method == "POST"]
    assert sent["metadata"] == {
        "team": "data",
        "multiserver_schedule_fleet": "shop",
        "multiserver_schedule_key": "1",
        "multiserver_schedule_type": "big",
    }
    assert (sent["flavorRef"], sent["networks"]) == ("7", [{"uuid": "net-1"}])


@pytest.mark.parametrize("cloud", ["ocean", "stack"])
def test_lists_are_read_to_their_last_page(cloud: str, request: pytest.FixtureRequest) -> None:
    standin = request.getfixturevalue(cloud)
    make, given = (at_ocean(standin), DROPLET) if cloud == "ocean" else (at_stack(standin), NOVA)
    made = {make().create_server(server(str(n), **given)).id for n in range(5)}
    assert {machine.id for machine in make().list_servers()} == made
    assert make().current_server_count() == 5


def test_a_list_of_droplets_that_changed_between_two_pages_is_an_error_and_not_a_short_list(
    ocean: DigitalOcean,
) -> None:
    for n in range(5):
        at_ocean(ocean)().create_server(server(str(n), **DROPLET))
    ocean.forget_on_page = 2
    with pytest.raises(ProviderError, match="changed while it was read"):
        at_ocean(ocean)().list_servers()


@pytest.mark.parametrize("cloud", ["ocean", "stack"])
def test_a_used_up_quota_is_no_room_and_not_a_mistake(cloud: str, request: pytest.FixtureRequest) -> None:
    standin = request.getfixturevalue(cloud)
    standin.full = True
    make, given = (at_ocean(standin), DROPLET) if cloud == "ocean" else (at_stack(standin), NOVA)
    with pytest.raises(ProviderFull):
        make().create_server(server("1", **given))


def test_a_404_of_another_thing_is_not_a_machine_that_is_gone(ocean: DigitalOcean, stack: OpenStack) -> None:
    droplet = at_ocean(ocean)().create_server(server("1", **DROPLET))
    nova = at_stack(stack)().create_server(server("1", **NOVA))
    ocean.answer = lambda request: Answer.of({"id": "not_found", "message": "no route"}, 404)  # type: ignore[method-assign]
    stack.answer = lambda request: Answer.of({"itemNotFound": {"code": 404, "message": "No project."}}, 404)  # type: ignore[method-assign]
    with pytest.raises(ProviderRefused):
        at_ocean(ocean)().has_been_deleted(droplet.id)
    with pytest.raises(ProviderRefused):
        at_stack(stack)().has_been_deleted(nova.id)


def test_a_list_without_its_key_is_an_error_and_not_an_empty_list(ocean: DigitalOcean, stack: OpenStack) -> None:
    for cloud, make in ((ocean, at_ocean(ocean)), (stack, at_stack(stack))):
        cloud.answer = lambda request: Answer.of({})  # type: ignore[method-assign]
        with pytest.raises(ProviderError):
            make().list_servers()


def test_a_machine_of_nova_that_is_being_deleted_is_not_up(stack: OpenStack) -> None:
    machine = at_stack(stack)().create_server(server("1", **NOVA))
    stack.servers[machine.id]["OS-EXT-STS:task_state"] = "deleting"
    (listed,) = at_stack(stack)().list_servers()
    assert listed.state is MachineState.DELETING
    assert not at_stack(stack)().has_started(machine.id)


def toy(**options: Any) -> LibcloudProvider:
    # libcloud's own "dummy": its machines are in the driver, so that one provider is used throughout.
    return LibcloudProvider("toy", {"driver": "dummy", "arguments": {"creds": "0"}, **options}, fleet="shop")


def test_a_driver_without_a_dialect_of_its_own_has_the_tag_in_the_names_of_its_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = DummyNodeDriver.create_node

    def named(self: Any, name: str, size: Any, image: Any, location: Any = None) -> Any:
        node = create(self, name, size, image)
        node.name = name
        return node

    monkeypatch.setattr(DummyNodeDriver, "create_node", named)
    provider = toy()
    assert provider.list_servers() == []
    assert toy(count_all=True).current_server_count() == 2
    machine = provider.create_server(server("1", size="Small", image="Ubuntu 9.10", location="Paul's Room"))
    assert (machine.name, machine.key) == ("mss--shop--1", "1")
    assert provider.has_started(machine.id)
    assert provider.list_servers() == [machine]
    assert provider.find_by_tag("1") == [machine]
    assert provider.current_server_count() == 1
    provider.reboot_server(machine.id)
    assert provider.list_servers()[0].state is MachineState.REBOOTING
    provider.delete_server(machine.id)
    with pytest.raises(ProviderRefused, match=r"no size .Smal. here\. Did you mean .Small."):
        provider.create_server(server("2", size="Smal", image="Ubuntu 9.10"))


def test_a_machine_of_a_cloud_that_does_not_keep_its_name_is_deleted_at_once() -> None:
    provider = toy(count_all=True)
    with pytest.raises(ProviderRefused, match="does not keep the names"):
        provider.create_server(server("1", size="Small", image="Ubuntu 9.10"))
    assert provider.current_server_count() == 2


# -- a creation of several requests -----------------------------------------------------------------------------------


@pytest.fixture
def slow() -> Iterator[CloudStack]:
    cloud = CloudStack()
    yield cloud
    cloud.close()


def at_cloudstack(cloud: CloudStack, **options: Any) -> LibcloudProvider:
    return LibcloudProvider("cs", cloud.options(**options), fleet="shop")


def test_a_creation_that_ran_out_of_time_while_its_machine_was_waited_for_may_have_made_it(slow: CloudStack) -> None:
    with pytest.raises(ProviderError, match=r"the 0\.5 s of this call are over") as caught:
        at_cloudstack(slow, timeout=0.5).create_server(server("1"))
    assert type(caught.value) is ProviderError
    assert slow.machines == ["mss--shop--1"]


def test_a_creation_that_lost_the_connection_while_its_machine_was_waited_for_may_have_made_it(
    slow: CloudStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = slow.answer

    def last(request: Request) -> Answer:
        found = answer(request)
        if request.query.get("command") == "deployVirtualMachine":
            slow.close()
            found.headers = {**found.headers, "connection": "close"}
        return found

    monkeypatch.setattr(slow, "answer", last)
    with pytest.raises(ProviderError, match=r"no connection: .*refused") as caught:
        at_cloudstack(slow).create_server(server("1"))
    assert type(caught.value) is ProviderError


@pytest.mark.parametrize("status", [403, 404, 413, 429])
def test_trouble_with_the_look_at_a_server_that_nova_has_just_made_does_not_unmake_it(
    stack: OpenStack, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    answer = stack.answer

    def spoiled(request: Request) -> Answer:
        is_look = request.method == "GET" and request.path.split("/")[2:] == list(stack.servers)
        return Answer.of({"error": {"message": "No."}}, status) if is_look else answer(request)

    monkeypatch.setattr(stack, "answer", spoiled)
    with pytest.raises(ProviderError) as caught:
        at_stack(stack)().create_server(server("1", **NOVA))
    assert type(caught.value) is ProviderError
    assert len(stack.servers) == 1


def test_a_machine_whose_creation_takes_longer_than_a_call_is_made_once_even_if_it_is_listed_late(
    site: Site, slow: CloudStack
) -> None:
    backend = "multiserver_schedule.servers.providers.libcloud.LibcloudProvider"
    given = {"cs": {"BACKEND": backend, "OPTIONS": slow.options(timeout=0.5)}}
    site.settings.MULTISERVER_SCHEDULE_SERVERS = {"FLEET": "shop", "PROVIDERS": given}
    fleet.ensure(1)
    for number in range(6):
        slow.is_shown = number > 2
        site.reconcile("cs")
        site.later(MINUTE)
    assert len(slow.machines) == 1
    assert site.statuses() == {"running": 1}


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "['driver'] should be the name of a driver of libcloud, not None"),
        ({"driver": "up_cloud"}, "not 'up_cloud'. Did you mean 'upcloud'?"),
        ({"driver": "ec2", "argument": {}}, "has no 'argument'. Did you mean 'arguments'?"),
        ({"driver": "ec2", "arguments": "hunter2hunter2"}, "['arguments'] should be a dict, not str"),
        ({"driver": "ec2", "configuration": []}, "['configuration'] should be a dict, not list"),
        ({"driver": "ec2", "timeout": "30"}, "['timeout'] should be a number of seconds up to 600, not '30'"),
        ({"driver": "ec2", "timeout": 0}, "['timeout'] should be a number of seconds up to 600, not 0"),
        ({"driver": "ec2", "count_all": "no"}, "['count_all'] should be True or False, not 'no'"),
        ({"driver": "ec2", "idempotent": 1}, "['idempotent'] should be True or False, not 1"),
    ],
)
def test_a_wrong_option_is_named(options: Mapping[str, Any], told: str) -> None:
    with pytest.raises(FleetError, match=re.escape(told)) as caught:
        LibcloudProvider("cloud", options, fleet="shop")
    assert "MULTISERVER_SCHEDULE_SERVERS['PROVIDERS']['cloud']['OPTIONS']" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("driver", "arguments", "told"),
    [
        ("ec2", {"key": "a"}, "['arguments'] has no 'secret'"),
        (
            "ec2",
            {"key": "a", "secret": "b", "region": "eu-west-9"},
            "'eu-west-9' is not known to libcloud. Did you mean",
        ),
        ("upcloud", {"username": "a"}, "['arguments'] has no 'password'"),
        ("digitalocean", {}, "['arguments'] has no 'key'"),
        ("openstack", {"key": "a"}, "['arguments'] has no 'secret'"),
    ],
)
def test_the_check_says_what_a_driver_lacks_and_asks_nobody(
    driver: str, arguments: Mapping[str, Any], told: str
) -> None:
    provider = LibcloudProvider("cloud", {"driver": driver, "arguments": arguments}, fleet="shop")
    (message,) = provider.check()
    assert isinstance(message, Error)
    assert told in message.msg
    assert message.id == "multiserver_schedule_servers.E004"


@pytest.mark.parametrize(
    ("driver", "arguments"),
    [
        ("ec2", {"key": "a", "secret": "b", "region": "eu-west-1"}),
        ("upcloud", {"username": "a", "password": "b"}),
        ("digitalocean", {"key": "a"}),
        ("openstack", {"key": "a", "secret": "b"}),
        ("vultr", {"key": "a"}),
        ("linode", {"key": "a"}),
        ("gce", {"user_id": "a", "key": "b"}),
    ],
)
def test_the_check_is_content_with_what_a_driver_needs(driver: str, arguments: Mapping[str, Any]) -> None:
    assert LibcloudProvider("cloud", {"driver": driver, "arguments": arguments}, fleet="shop").check() == []


def test_an_argument_that_a_driver_does_not_take_is_a_fault_of_the_settings_and_shows_no_secret() -> None:
    arguments = {"key": "a", "secret": "hunter2hunter2", "region": "eu-west-9"}
    with pytest.raises(FleetError, match="Invalid region: eu-west-9") as caught:
        LibcloudProvider("cloud", {"driver": "ec2", "arguments": arguments}, fleet="shop").list_servers()
    assert "hunter2" not in str(caught.value)


def test_to_make_a_provider_opens_nothing(ocean: DigitalOcean) -> None:
    provider = at_ocean(ocean)()
    assert provider.check() == []
    assert json.dumps(ocean.requests) == "[]"

"""
What is another in each cloud: where our tag is kept, the words for the states, how to ask for one machine and for all.

A driver of libcloud's shows less than its cloud tells: it may drop the word for a state, the second page of a list, or
the disks of a machine that is deleted. So these ask over the driver's connection where that matters.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs, quote, urlsplit

from libcloud.common.base import XmlResponse
from libcloud.common.types import InvalidCredsError, MalformedResponseError
from libcloud.compute.base import Node, NodeAuthSSHKey, NodeDriver, NodeImage, NodeLocation, NodeSize
from libcloud.compute.drivers.ec2 import (
    NAMESPACE,
    EC2NodeLocation,
    EC2Response,
    ExEC2AvailabilityZone,
    IdempotentParamError,
)
from libcloud.compute.types import NodeState

from ...conf import nearest
from ...entries import Machine, MachineState, ServerInfo
from ...exceptions import ProviderBusy, ProviderError, ProviderRefused
from .wire import Clock

FLEET: Final = "multiserver_schedule_fleet"
KEY: Final = "multiserver_schedule_key"
TYPE: Final = "multiserver_schedule_type"
_PREFIX: Final = "mss"
_OURS: Final = re.compile(rf"(?:\A|\s){_PREFIX}--(\S+)\Z")
_PLAIN: Final = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_MOST_PAGES: Final = 1000
_CREDENTIALS: Final = ("AuthFailure", "InvalidClientTokenId", "SignatureDoesNotMatch", "OptInRequired")
_SOFT_STOP: Final = "60"
"""Seconds that a machine has to shut down, as a text: UpCloud wants it so."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Whose a machine is, and with which key it was created. "": it does not say."""

    fleet: str = ""
    key: str = ""

    def name(self) -> str:
        """Return the tag as a name, for clouds that have no tags: a part of a host name, too."""
        if not _PLAIN.fullmatch(self.key):
            raise ProviderRefused(f"the key {self.key!r} cannot be a part of a machine's name")
        return f"{_PREFIX}--{self.fleet}--{self.key}"

    @classmethod
    def of_name(cls, name: str) -> Tag:
        """Read it back. A key has no two hyphens in a row, so that the last two are where the fleet ends."""
        found = _OURS.search(name)
        fleet, two, key = found[1].rpartition("--") if found else ("", "", "")
        return cls(fleet, key) if two and _PLAIN.fullmatch(key) else cls()


@dataclass(frozen=True, slots=True)
class Seen:
    """A machine as a list, or an answer about it, shows it."""

    machine: Machine
    fleet: str
    gone: bool = False


class Dialect:
    """Any driver: the tag is the machine's name, and all that is known of it comes from ``list_nodes``."""

    idempotent: ClassVar[bool] = False
    """Does the cloud itself make no second machine with the same key?"""
    states: ClassVar[Mapping[str, MachineState]] = {
        NodeState.RUNNING.value: MachineState.RUNNING,
        NodeState.STARTING.value: MachineState.PENDING,
        NodeState.PENDING.value: MachineState.PENDING,
        NodeState.RECONFIGURING.value: MachineState.PENDING,
        NodeState.MIGRATING.value: MachineState.PENDING,
        NodeState.UPDATING.value: MachineState.PENDING,
        NodeState.REBOOTING.value: MachineState.REBOOTING,
        NodeState.STOPPING.value: MachineState.STOPPING,
        NodeState.STOPPED.value: MachineState.STOPPED,
    }
    """The words that are known. Whatever is not here is UNKNOWN: an error state, for one, tells nothing of the rest."""
    gone: ClassVar[frozenset[str]] = frozenset({NodeState.TERMINATED.value})
    """Words for a machine that is shown and is there no more."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the driver's constructor where the options have none."""
    reserved: ClassVar[frozenset[str]] = frozenset({"name"})
    """Arguments of ``create_node`` that are ours."""

    def __init__(self, driver: Any, fleet: str, clock: Clock) -> None:
        self.driver, self.fleet, self.clock = driver, fleet, clock

    @classmethod
    def constructor(cls, driver: Any, arguments: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Return what to make the driver with."""
        taken = signature(driver.__init__).parameters
        takes = "timeout" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())
        return {**arguments, **({"timeout": timeout} if takes else {})}

    # Asked

    def all(self, *, ours: bool = True) -> list[Seen]:
        """Return every machine, those of other fleets among them where that is cheaper; all, or raise."""
        return [self._seen(node) for node in self.driver.list_nodes()]

    def keyed(self, key: str) -> list[Seen]:
        """Return those that were created with this key."""
        return self.all()

    def look(self, machine_id: str) -> Seen | None:
        """Return one machine; None where the cloud clearly says that it has none of this id."""
        return next((seen for seen in self.all(ours=False) if seen.machine.id == machine_id), None)

    @staticmethod
    def is_not_there(code: str, text: str) -> bool:
        """Say whether an answer 404, or 400, means that there is no such machine."""
        return False

    @staticmethod
    def may_make(method: str, url: str) -> bool:
        """Say whether this request of a creation may make the machine: any, of a driver that nobody knows."""
        return True

    # Done

    def prepare(self, server: ServerInfo, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for ``create``: nothing is made yet."""
        arguments = dict(given)
        if "ssh_key" in arguments:
            arguments["auth"] = _untyped(NodeAuthSSHKey)(arguments.pop("ssh_key"))
        for name, listed in (("size", "list_sizes"), ("image", "list_images"), ("location", "list_locations")):
            if isinstance(arguments.get(name), (str, int)):
                arguments[name] = self.resolve(name, str(arguments[name]), getattr(self.driver, listed))
        arguments["name"] = self.tag(server).name()
        return arguments

    def create(self, arguments: Mapping[str, Any]) -> Seen:
        node = self.driver.create_node(**arguments)
        seen = self._seen(node)
        if Tag(seen.fleet, seen.machine.key) != Tag.of_name(arguments["name"]):
            # Nobody would ever find it again.
            self._granted(self.driver.destroy_node(node), seen.machine.id, "deleted")
            raise ProviderRefused(
                f"the cloud does not keep the names of machines ({arguments['name']!r} became {seen.machine.name!r}), "
                f"which would bear our tag; {seen.machine.id} was deleted again"
            )
        return seen

    def stop(self, machine_id: str) -> None:
        stop: Any = next(
            (
                getattr(self.driver, name)
                for name in ("ex_shutdown_node", "stop_node", "ex_stop_node", "ex_power_off_node")
                if can(self.driver, name)
            ),
            None,
        )
        if stop is None:
            raise ProviderRefused(f"libcloud's driver {self.driver.name!r} cannot stop a machine, only delete it")
        stop(self._node(machine_id))

    def delete(self, machine_id: str) -> None:
        self._granted(self.driver.destroy_node(self._node(machine_id)), machine_id, "deleted")

    def reboot(self, machine_id: str) -> None:
        self._granted(self.driver.reboot_node(self._node(machine_id)), machine_id, "rebooted")

    # Shared

    def tag(self, server: ServerInfo) -> Tag:
        return Tag(self.fleet, server.key)

    def tags(self, server: ServerInfo) -> dict[str, str]:
        return {FLEET: self.fleet, KEY: server.key, TYPE: server.type}

    def resolve(self, what: str, value: str, listed: Any) -> Any:
        """Return what has this id or this name."""
        try:
            known = list(listed())
        except NotImplementedError:
            made: Mapping[str, Any] = {"size": _size, "image": _image, "location": _location}
            return made[what](value)
        for attribute in ("id", "name"):
            for each in known:
                if str(getattr(each, attribute)) == value:
                    return each
        names = {str(each.id) for each in known} | {str(each.name) for each in known}
        raise ProviderRefused(f"there is no {what} {value!r} here.{_nearest(value, names)}")

    def see(
        self, *, id: object, tag: Tag, word: object, name: object = "", addresses: Iterable[str] = (), booted: str = ""
    ) -> Seen:
        text = str(word)
        return Seen(
            Machine(
                id=str(id),
                key=tag.key,
                state=self.states.get(text, MachineState.UNKNOWN),
                word=text,
                name=str(name),
                address=next(iter(addresses), ""),
                booted=booted,
            ),
            tag.fleet,
            gone=text in self.gone,
        )

    def _seen(self, node: Any) -> Seen:
        tag = Tag.of_name(str(node.name))
        return self.see(id=node.id, tag=tag, word=node.state, name=node.name, addresses=_addresses(node))

    def _node(self, machine_id: str) -> Any:
        """Return a machine as the driver made it: some need more of it than the id."""
        for node in self.driver.list_nodes():
            if str(node.id) == machine_id:
                return node
        raise ProviderRefused(f"there is no machine {machine_id}")

    def _granted(self, answer: object, machine_id: str, done: str) -> None:
        if answer is False:
            raise ProviderError(f"the driver does not say that {machine_id} is being {done}")


class Known(Dialect):
    """A driver whose methods are known to need nothing of a machine but its id, and to set the tag they are given."""

    @staticmethod
    def may_make(method: str, url: str) -> bool:
        return method != "GET"

    def create(self, arguments: Mapping[str, Any]) -> Seen:
        return self._seen(self.driver.create_node(**arguments))

    def _node(self, machine_id: str) -> Any:
        return _untyped(Node)(machine_id, "", NodeState.UNKNOWN, [], [], self.driver)


class _EC2Response(EC2Response):
    """
    An answer in the namespace that libcloud's driver looks for.

    In any other one, of another version of the API or without its last slash, the driver finds nothing, and returns an
    empty list: every machine would seem to be gone.
    """

    def parse_body(self) -> Any:
        body: Any = super().parse_body()  # type: ignore[no-untyped-call]
        for element in body.iter() if hasattr(body, "iter") else ():
            space, _, name = str(element.tag).rpartition("}")
            if space.startswith("{http://ec2.amazonaws.com/doc/"):
                element.tag = f"{{{NAMESPACE}}}{name}"
        return body

    def parse_error(self) -> str:
        # libcloud's finds errors outside of any namespace only, and has an empty text for others.
        body: Any = XmlResponse.parse_body(self)  # type: ignore[no-untyped-call]
        found = [_error_of(element) for element in (body.iter() if hasattr(body, "iter") else ())]
        code, message = next((each for each in found if each), ("", ""))
        if not code:
            raise MalformedResponseError("no error code", body=self.body)
        text = f"{code}: {message}"
        if code in _CREDENTIALS:
            raise InvalidCredsError(text)
        if code == "IdempotentParameterMismatch":
            raise IdempotentParamError(text)
        return text


def _error_of(element: Any) -> tuple[str, str] | None:
    if str(element.tag).rpartition("}")[2] != "Error":
        return None
    said = {str(each.tag).rpartition("}")[2]: each.text or "" for each in element}
    return said.get("Code", ""), said.get("Message", "")


class EC2(Known):
    """Amazon EC2: tags are set by RunInstances itself, and our key is its client token."""

    idempotent = True
    states: ClassVar[Mapping[str, MachineState]] = {
        "pending": MachineState.PENDING,
        "running": MachineState.RUNNING,
        "stopping": MachineState.STOPPING,
        "stopped": MachineState.STOPPED,
        "shutting-down": MachineState.DELETING,
    }
    gone = frozenset({"terminated"})
    # The older way of signing is not taken everywhere.
    defaults: ClassVar[Mapping[str, Any]] = {"signature_version": "4"}
    reserved = frozenset({"name", "ex_clienttoken", "ex_mincount", "ex_maxcount"})

    def __init__(self, driver: Any, fleet: str, clock: Clock) -> None:
        super().__init__(driver, fleet, clock)
        driver.connection.responseCls = _EC2Response

    def all(self, *, ours: bool = True) -> list[Seen]:
        return self._described({f"tag:{FLEET}": self.fleet} if ours else {})

    def keyed(self, key: str) -> list[Seen]:
        return self._described({f"tag:{FLEET}": self.fleet, f"tag:{KEY}": key})

    def look(self, machine_id: str) -> Seen | None:
        found = self._page({"InstanceId.1": machine_id})[0]
        return next((seen for seen in found if seen.machine.id == machine_id), None)

    @staticmethod
    def is_not_there(code: str, text: str) -> bool:
        return code == "InvalidInstanceID.NotFound"

    @staticmethod
    def may_make(method: str, url: str) -> bool:
        return "Action=RunInstances" in url

    def prepare(self, server: ServerInfo, given: Mapping[str, Any]) -> dict[str, Any]:
        # Built from what is given: DescribeImages has thousands, and libcloud's table of sizes is older than some.
        arguments = dict(given)
        if "ssh_key" in arguments:
            arguments["auth"] = _untyped(NodeAuthSSHKey)(arguments.pop("ssh_key"))
        if isinstance(arguments.get("size"), str):
            arguments["size"] = _size(arguments["size"])
        if isinstance(arguments.get("image"), str):
            arguments["image"] = _image(arguments["image"])
        if isinstance(arguments.get("location"), str):
            zone = _untyped(ExEC2AvailabilityZone)(arguments["location"], "available", self.driver.region_name)
            arguments["location"] = _untyped(EC2NodeLocation)("0", arguments["location"], "", self.driver, zone)
        if isinstance(arguments.get("ex_subnet"), str):
            arguments["ex_subnet"] = SimpleNamespace(id=arguments["ex_subnet"])
        arguments["ex_metadata"] = {**arguments.get("ex_metadata", {}), **self.tags(server)}
        return {**arguments, "name": server.name, "ex_clienttoken": server.key}

    def delete(self, machine_id: str) -> None:
        self.driver.destroy_node(self._node(machine_id))

    def stop(self, machine_id: str) -> None:
        self.driver.stop_node(self._node(machine_id))

    def reboot(self, machine_id: str) -> None:
        self.driver.reboot_node(self._node(machine_id))

    def _described(self, filters: Mapping[str, str]) -> list[Seen]:
        """Return all pages: libcloud's own list ends with the first one."""
        asked: dict[str, str] = {"MaxResults": "1000"}
        for number, (name, value) in enumerate(filters.items(), start=1):
            asked |= {f"Filter.{number}.Name": name, f"Filter.{number}.Value.1": value}
        found, token = self._page(asked)
        for _ in range(_MOST_PAGES):
            if not token:
                return found
            more, token = self._page({**asked, "NextToken": token})
            found += more
        raise ProviderError("the list of machines has no end")

    def _page(self, parameters: Mapping[str, str]) -> tuple[list[Seen], str]:
        driver = self.driver
        answer = driver.connection.request(driver.path, params={"Action": "DescribeInstances", **parameters}).object
        space = f"{{{NAMESPACE}}}"
        tag = getattr(answer, "tag", "")
        reservations = answer.find(f"{space}reservationSet") if tag == f"{space}DescribeInstancesResponse" else None
        if reservations is None:
            # A page of a proxy's is XML, too: as a list it would be empty.
            raise ProviderError("the answer is no list of instances")
        entries = list(reservations.iter(f"{space}instancesSet"))
        nodes = [node for each in reservations for node in driver._to_nodes(each, "instancesSet/item")]
        if len(nodes) != sum(len(entry) for entry in entries):
            raise ProviderError("the answer lists instances that libcloud cannot read")
        return [self._seen(node) for node in nodes], answer.findtext(f"{space}nextToken") or ""

    def _seen(self, node: Any) -> Seen:
        tags = node.extra.get("tags") or {}
        return self.see(
            id=node.id,
            tag=Tag(tags.get(FLEET) or "", tags.get(KEY) or ""),
            word=node.extra.get("status"),
            name=tags.get("Name") or node.name,
            addresses=_addresses(node),
        )


class UpCloud(Known):
    """UpCloud: the tag ends the title, since tags and labels of its own cannot be given by libcloud at the creation."""

    states: ClassVar[Mapping[str, MachineState]] = {
        "started": MachineState.RUNNING,
        "maintenance": MachineState.PENDING,
        "stopped": MachineState.STOPPED,
    }
    gone = frozenset()
    reserved = frozenset({"name", "ex_hostname"})
    pause: ClassVar[float] = 1.0
    """How many seconds to wait between two looks at a machine that stops."""

    def all(self, *, ours: bool = True) -> list[Seen]:
        # One request: libcloud's own list asks for each machine again, and fails when one of them is deleted meanwhile.
        return [self._shown(each) for each in self._object("1.2/server")["servers"]["server"]]

    def look(self, machine_id: str) -> Seen | None:
        return self._shown(self._object(_path("1.2/server", machine_id))["server"])

    @staticmethod
    def is_not_there(code: str, text: str) -> bool:
        return code == "SERVER_NOT_FOUND"

    def prepare(self, server: ServerInfo, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments = dict(given)
        if isinstance(arguments.get("size"), str):
            arguments["size"] = self.resolve("size", arguments["size"], self._plans)
        if isinstance(arguments.get("image"), str) and re.fullmatch(r"[0-9a-f-]{36}", arguments["image"]):
            arguments["image"] = self._storage(arguments["image"])
        arguments = super().prepare(server, arguments)
        return {**arguments, "name": f"{server.name} {self.tag(server).name()}", "ex_hostname": server.name}

    def create(self, arguments: Mapping[str, Any]) -> Seen:
        node = self.driver.create_node(**arguments)
        tag = Tag.of_name(node.name)
        return self.see(
            id=node.id, tag=tag, word="maintenance", name=_OURS.sub("", node.name), addresses=_addresses(node)
        )

    def stop(self, machine_id: str) -> None:
        # libcloud has no stop, but the power switch inside of its delete.
        self._post(machine_id, "stop", {"stop_server": {"stop_type": "soft", "timeout": _SOFT_STOP}})

    def reboot(self, machine_id: str) -> None:
        # In order, and not by the power switch as libcloud does it.
        how = {"stop_type": "soft", "timeout": _SOFT_STOP, "timeout_action": "destroy"}
        self._post(machine_id, "restart", {"restart_server": how})

    def delete(self, machine_id: str) -> None:
        """
        Delete it and its disks.

        libcloud's own leaves the disks, which are billed, and goes on sleeping when the time of the call is over. A
        machine has to be stopped first: when that takes longer than the call may, it has to be asked for again.
        """
        told = False
        while True:
            seen = self.look(machine_id)
            assert seen is not None
            if seen.machine.state is MachineState.RUNNING and not told:
                self._post(machine_id, "stop", {"stop_server": {"stop_type": "hard"}})
                told = True
            elif seen.machine.state not in (MachineState.RUNNING, MachineState.PENDING):
                break
            elif self.clock.left() < self.clock.seconds / 2:
                raise ProviderBusy(f"{machine_id} has to stop before it can be deleted, and is {seen.machine.word!r}")
            else:
                time.sleep(self.pause)
        self.driver.connection.request(_path("1.2/server", machine_id), params={"storages": "1"}, method="DELETE")

    def _post(self, machine_id: str, verb: str, body: Mapping[str, Any]) -> None:
        path = _path("1.2/server", machine_id, verb)
        self.driver.connection.request(path, method="POST", data=json.dumps(body))

    def _object(self, path: str) -> Any:
        return self.driver.connection.request(path).object

    def _plans(self) -> list[Any]:
        # Without the prices of every zone, which libcloud asks for with each list of sizes.
        return [
            _size(plan["name"], disk=plan["storage_size"], extra={"storage_tier": plan["storage_tier"]})
            for plan in self._object("1.2/plan")["plans"]["plan"]
        ]

    def _storage(self, uuid: str) -> Any:
        try:
            storage = self._object(_path("1.2/storage", uuid))["storage"]
        except Exception as error:
            if getattr(error, "code", None) == 404:
                raise ProviderRefused(f"there is no image {uuid!r} here") from None
            raise
        return _image(uuid, name=storage["title"], extra={"type": storage["type"]})

    def _shown(self, server: Mapping[str, Any]) -> Seen:
        addresses = server.get("ip_addresses", {}).get("ip_address", [])
        ordered = sorted(addresses, key=lambda each: each.get("access") != "public")
        title = server["title"]
        return self.see(
            id=server["uuid"],
            tag=Tag.of_name(title),
            word=server["state"],
            name=_OURS.sub("", title),
            addresses=[each["address"] for each in ordered],
        )


class DigitalOcean(Known):
    """DigitalOcean: tags are set by the creation itself."""

    states: ClassVar[Mapping[str, MachineState]] = {
        "new": MachineState.PENDING,
        "active": MachineState.RUNNING,
        "off": MachineState.STOPPED,
    }
    gone = frozenset()  # "archive" is not gone, and nobody knows that it costs nothing.

    @classmethod
    def constructor(cls, driver: Any, arguments: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        # libcloud's hands what else it is given to ``object``, which does not take it.
        return {name: value for name, value in arguments.items() if name in ("key", "secret", "api_version")}

    def all(self, *, ours: bool = True) -> list[Seen]:
        return self._listed(f"{FLEET}:{self.fleet}" if ours else "")

    def keyed(self, key: str) -> list[Seen]:
        return self._listed(f"{KEY}:{key}")

    def look(self, machine_id: str) -> Seen | None:
        return self._shown(self.driver.connection.request(_path("/v2/droplets", machine_id)).object["droplet"])

    @staticmethod
    def is_not_there(code: str, text: str) -> bool:
        # Its words for a droplet that is not there; a wrong path has others.
        return "could not be found" in text

    def prepare(self, server: ServerInfo, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments = dict(given)
        if isinstance(arguments.get("size"), str):
            arguments["size"] = _size(arguments["size"])
        if isinstance(arguments.get("image"), (str, int)):
            image = _image(arguments["image"])
            # A snapshot has a number, and libcloud makes a text of it; a text is looked up as a slug.
            image.id = int(image.id) if image.id.isdigit() else image.id
            arguments["image"] = image
        if isinstance(arguments.get("location"), str):
            arguments["location"] = _location(arguments["location"])
        attributes = dict(arguments.get("ex_create_attr", {}))
        attributes["tags"] = [
            *attributes.get("tags", []),
            *(f"{name}:{value}" for name, value in self.tags(server).items()),
        ]
        return {**arguments, "name": server.name, "ex_create_attr": attributes}

    def create(self, arguments: Mapping[str, Any]) -> Seen:
        node = self.driver.create_node(**arguments)
        tag = self._tag(node.extra.get("tags") or arguments["ex_create_attr"]["tags"])
        return self.see(id=node.id, tag=tag, word="new", name=node.name, addresses=_addresses(node))

    def stop(self, machine_id: str) -> None:
        self._granted(self.driver.ex_shutdown_node(self._node(machine_id)), machine_id, "stopped")

    def _listed(self, tag: str) -> list[Seen]:
        found: dict[str, Seen] = {}
        for page in range(1, _MOST_PAGES):
            asked = {"page": str(page), **({"tag_name": tag} if tag else {})}
            answer = self.driver.connection.request("/v2/droplets", params=asked).object
            droplets, total = answer["droplets"], answer["meta"]["total"]
            found |= {str(each["id"]): self._shown(each) for each in droplets}
            if len(found) >= total:
                return list(found.values())
            if not droplets:
                break
        # Pages are counted from the beginning: a droplet that is deleted meanwhile moves others onto an earlier one.
        raise ProviderError("the list of droplets changed while it was read")

    def _tag(self, tags: Sequence[str]) -> Tag:
        named = dict(tag.split(":", 1) for tag in tags if ":" in tag)
        return Tag(named.get(FLEET, ""), named.get(KEY, ""))

    def _shown(self, droplet: Mapping[str, Any]) -> Seen:
        networks = sorted(droplet.get("networks", {}).get("v4", []), key=lambda each: each["type"] != "public")
        return self.see(
            id=droplet["id"],
            tag=self._tag(droplet["tags"]),
            word=droplet["status"],
            name=droplet["name"],
            addresses=[each["ip_address"] for each in networks],
        )


class OpenStack(Known):
    """OpenStack: tags are metadata, set by the creation itself."""

    defaults: ClassVar[Mapping[str, Any]] = {"api_version": "2.2"}
    states: ClassVar[Mapping[str, MachineState]] = {
        "BUILD": MachineState.PENDING,
        "REBUILD": MachineState.PENDING,
        "ACTIVE": MachineState.RUNNING,
        "REBOOT": MachineState.REBOOTING,
        "HARD_REBOOT": MachineState.REBOOTING,
        "SHUTOFF": MachineState.STOPPED,
        "SOFT_DELETED": MachineState.DELETING,
        "deleting": MachineState.DELETING,
    }
    gone = frozenset({"DELETED"})

    def all(self, *, ours: bool = True) -> list[Seen]:
        found: list[Seen] = []
        asked: dict[str, Any] = {}
        for _ in range(_MOST_PAGES):
            # libcloud's own takes an answer without "servers" for an empty list.
            answer = self.driver.connection.request("/servers/detail", params=asked).object
            found += [self._shown(each) for each in answer["servers"]]
            following = [link["href"] for link in answer.get("servers_links", []) if link["rel"] == "next"]
            if not following:
                return found
            asked = {name: values[-1] for name, values in parse_qs(urlsplit(following[0]).query).items()}
        raise ProviderError("the list of servers has no end")

    def look(self, machine_id: str) -> Seen | None:
        return self._shown(self.driver.connection.request(_path("/servers", machine_id)).object["server"])

    @staticmethod
    def is_not_there(code: str, text: str) -> bool:
        return re.search(r"Instance \S+ could not be found", text) is not None

    def prepare(self, server: ServerInfo, given: Mapping[str, Any]) -> dict[str, Any]:
        arguments = dict(given)
        if isinstance(arguments.get("image"), str) and re.fullmatch(r"[0-9a-f-]{36}", arguments["image"]):
            arguments["image"] = _image(arguments["image"])
        if isinstance(arguments.get("size"), (str, int)):
            arguments["size"] = self.resolve("size", str(arguments["size"]), self.driver.list_sizes)
        if isinstance(arguments.get("networks"), (list, tuple)):
            arguments["networks"] = [_named(each, "id") for each in arguments["networks"]]
        if isinstance(arguments.get("ex_security_groups"), (list, tuple)):
            arguments["ex_security_groups"] = [_named(each, "name") for each in arguments["ex_security_groups"]]
        arguments = super().prepare(server, arguments)
        metadata = {**arguments.get("ex_metadata", {}), **self.tags(server)}
        return {**arguments, "name": server.name, "ex_metadata": metadata}

    def create(self, arguments: Mapping[str, Any]) -> Seen:
        node = self.driver.create_node(**arguments)
        metadata = arguments["ex_metadata"]
        return self.see(
            id=node.id,
            tag=Tag(metadata[FLEET], metadata[KEY]),
            word="BUILD",
            name=node.name,
            addresses=_addresses(node),
        )

    def stop(self, machine_id: str) -> None:
        self._granted(self.driver.stop_node(self._node(machine_id)), machine_id, "stopped")

    def _shown(self, server: Mapping[str, Any]) -> Seen:
        metadata = server["metadata"]
        word = "deleting" if server.get("OS-EXT-STS:task_state") == "deleting" else server["status"]
        return self.see(
            id=server["id"],
            tag=Tag(metadata.get(FLEET, ""), metadata.get(KEY, "")),
            word=word,
            name=server["name"],
            addresses=[each["addr"] for network in server["addresses"].values() for each in network],
        )


DIALECTS: Final[Mapping[str, type[Dialect]]] = {
    "ec2": EC2,
    "upcloud": UpCloud,
    "digitalocean": DigitalOcean,
    "openstack": OpenStack,
}
"""By the name of libcloud's driver; any other one is a ``Dialect``."""


def can(driver: Any, method: str) -> bool:
    """Say whether a driver, or its class, has a method that is not libcloud's placeholder."""
    own = getattr(driver if isinstance(driver, type) else type(driver), method, None)
    placeholder = next((vars(base)[method] for base in NodeDriver.__mro__ if method in vars(base)), None)
    return own is not None and own is not placeholder


def _path(*parts: str) -> str:
    """Return a path; the last parts come from outside."""
    return "/".join((parts[0], *(quote(part, safe="") for part in parts[1:])))


def _addresses(node: Any) -> list[str]:
    return [str(each) for each in (*(node.public_ips or ()), *(node.private_ips or ()))]


def _named(value: Any, attribute: str) -> Any:
    return SimpleNamespace(**{attribute: value}) if isinstance(value, str) else value


def _nearest(value: str, names: set[str]) -> str:
    # Thousands of images are no help to read.
    said = nearest(value, names)
    return said if len(said) < 300 else ""


def _untyped(anything: Any) -> Any:
    """Return a class of libcloud's, which is typed in part."""
    return anything


def _size(id: str, *, disk: int = 0, extra: Mapping[str, Any] | None = None) -> Any:
    return _untyped(NodeSize)(id, id, 0, disk, 0, 0, None, extra=dict(extra or {}))


def _image(id: str | int, *, name: str = "", extra: Mapping[str, Any] | None = None) -> Any:
    return _untyped(NodeImage)(id, name or str(id), None, extra=dict(extra or {}))


def _location(id: str) -> Any:
    return _untyped(NodeLocation)(id, id, "", None)

"""A stand-in of UpCloud's API, as far as it is documented and libcloud's driver and ours use it."""

from __future__ import annotations

import threading
import uuid
from typing import Any

from .standin import Answer, Request, Server

IMAGE = "01000000-0000-4000-8000-000030060200"
PLANS = [
    {"name": name, "core_number": 1, "memory_amount": 1024, "storage_size": 30, "storage_tier": "maxiops"}
    | {"public_traffic_out": 1024}
    for name in ("1xCPU-1GB", "2xCPU-4GB")
]
ZONES = [{"id": "fi-hel1", "description": "Helsinki #1"}, {"id": "de-fra1", "description": "Frankfurt #1"}]
STORAGE = {"uuid": IMAGE, "title": "Worker", "type": "template", "access": "private", "license": 0}
STORAGE |= {"size": 4, "state": "online"}


class UpCloud(Server):
    """Has servers and their disks. A server that changes shows the next of its coming states at each look."""

    def __init__(self) -> None:
        self.servers: dict[str, dict[str, Any]] = {}
        self.storages: dict[str, dict[str, Any]] = {}
        self.coming: dict[str, list[str]] = {}
        self.spoiled: dict[tuple[str, str], Answer] = {}
        """What is answered instead, by method and end of the path; nothing is done then."""
        self.ignores_soft_stops = False
        self._lock = threading.Lock()
        super().__init__()

    def answer(self, request: Request) -> Answer:
        with self._lock:
            for (method, end), answer in self.spoiled.items():
                if request.method == method and request.path.endswith(end):
                    return answer
            if not request.headers.get("authorization", "").startswith("Basic "):
                return error(
                    401, "AUTHENTICATION_FAILED", "Authentication failed using the given username and password."
                )
            return self.route(request)

    def route(self, request: Request) -> Answer:
        match request.method, request.path.split("/")[1:]:
            case "GET", ["1.2", "plan"]:
                return Answer.of({"plans": {"plan": PLANS}})
            case "GET", ["1.2", "zone"]:
                return Answer.of({"zones": {"zone": ZONES}})
            case "GET", ["1.2", "storage", "template"]:
                return Answer.of({"storages": {"storage": [STORAGE]}})
            case "GET", ["1.2", "storage", "cdrom"]:
                return Answer.of({"storages": {"storage": []}})
            case "GET", ["1.2", "storage", wanted]:
                if wanted != IMAGE:
                    return error(404, "STORAGE_NOT_FOUND", f"The storage {wanted} does not exist.")
                return Answer.of({"storage": STORAGE})
            case "GET", ["1.2", "server"]:
                for known in list(self.servers):
                    self.look(known)
                fields = ("uuid", "title", "hostname", "state", "plan", "zone")
                listed = [{name: server[name] for name in fields} for server in self.servers.values()]
                return Answer.of({"servers": {"server": listed}})
            case "POST", ["1.2", "server"]:
                return self.create(request.json()["server"])
            case method, ["1.2", "server", wanted, *verb]:
                if wanted not in self.servers:
                    return error(404, "SERVER_NOT_FOUND", f"The server {wanted} does not exist.")
                return self.of_server(method, wanted, verb, request)
        return error(404, "NOT_FOUND", "No such resource.")

    def create(self, given: dict[str, Any]) -> Answer:
        made = str(uuid.uuid4())
        (disk,) = given["storage_devices"]["storage_device"]
        storage = {"uuid": str(uuid.uuid4()), "title": disk["title"], "size": disk["size"], "clone_of": disk["storage"]}
        self.storages[storage["uuid"]] = storage
        self.servers[made] = {
            **{name: given[name] for name in ("title", "hostname", "plan", "zone")},
            "uuid": made,
            "state": "maintenance",
            "ip_addresses": {
                "ip_address": [
                    {"access": "private", "family": "IPv4", "address": "10.0.0.2"},
                    {"access": "public", "family": "IPv4", "address": "192.0.2.2"},
                ]
            },
            "vnc_password": "aabbccdd",
            "storage_devices": {"storage_device": [{"storage": storage["uuid"]}]},
        }
        self.coming[made] = ["maintenance", "started"]
        return Answer.of({"server": {**self.servers[made], "password": "aabbccdd"}}, 202)

    def of_server(self, method: str, wanted: str, verb: list[str], request: Request) -> Answer:
        server = self.servers[wanted]
        match method, verb:
            case "GET", []:
                self.look(wanted)
                return Answer.of({"server": server})
            case "POST", ["stop"]:
                if server["state"] != "started":
                    return error(409, "SERVER_STATE_ILLEGAL", f"The server {wanted} is in state {server['state']}.")
                soft = request.json()["stop_server"]["stop_type"] == "soft"
                self.coming[wanted] = [] if soft and self.ignores_soft_stops else ["started", "stopped"]
                return Answer.of({"server": server})
            case "POST", ["restart"]:
                if server["state"] != "started":
                    return error(409, "SERVER_STATE_ILLEGAL", f"The server {wanted} is in state {server['state']}.")
                self.coming[wanted] = ["maintenance", "started"]
                return Answer.of({"server": server})
            case "DELETE", []:
                if server["state"] != "stopped":
                    return error(409, "SERVER_STATE_ILLEGAL", f"The server {wanted} is in state {server['state']}.")
                del self.servers[wanted]
                if request.query.get("storages") == "1":
                    for device in server["storage_devices"]["storage_device"]:
                        del self.storages[device["storage"]]
                return Answer(204)
        return error(404, "NOT_FOUND", "No such resource.")

    def look(self, wanted: str) -> None:
        if self.coming.get(wanted):
            self.servers[wanted]["state"] = self.coming[wanted].pop(0)


def error(status: int, code: str, message: str) -> Answer:
    return Answer.of({"error": {"error_code": code, "error_message": message}}, status)

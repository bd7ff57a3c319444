"""As much of CloudStack's API as libcloud's driver uses: a creation is a job, and is asked about until it is done."""

from __future__ import annotations

from typing import Any

from .standin import HOST, Answer, Request, Server

CONFIGURATION = {"size": "Small", "image": "worker-7", "location": "zone-1"}


class CloudStack(Server):
    """Whose jobs are never done."""

    def __init__(self) -> None:
        self.machines: list[str] = []
        self.is_shown = True
        """Does the list have the machines?"""
        super().__init__()

    def options(self, **options: Any) -> dict[str, Any]:
        arguments = {"key": "0123456789", "secret": "hunter2hunter2", "path": "/client/api", "host": HOST}
        return {
            "driver": "cloudstack",
            "arguments": {**arguments, "port": self.port, "secure": False},
            "configuration": CONFIGURATION,
            **options,
        }

    def answer(self, request: Request) -> Answer:
        command = request.query.get("command", "")
        match command:
            case "queryAsyncJobResult":
                told: dict[str, Any] = {"jobstatus": 0}
            case "deployVirtualMachine":
                self.machines.append(request.query["name"])
                told = {"jobid": "1", "id": str(len(self.machines))}
            case "listZones":
                told = {"zone": [{"id": "1", "name": "zone-1", "networktype": "Advanced"}]}
            case "listTemplates":
                known = ("hypervisor", "format", "ostypename", "ostypeid", "created", "displaytext", "size")
                told = {"template": [{"id": "1", "name": "worker-7", **dict.fromkeys(known, "1")}]}
            case "listServiceOfferings":
                told = {"serviceoffering": [{"id": "1", "name": "Small", "memory": 1, "cpunumber": 1}]}
            case "listVirtualMachines":
                shown = self.machines if self.is_shown else []
                told = {"virtualmachine": [self.machine(number, name) for number, name in enumerate(shown, 1)]}
            case _:
                told = {}
        return Answer.of({f"{command.lower()}response": {"count": 1, **told}})

    def machine(self, number: int, name: str) -> dict[str, Any]:
        known = ("zoneid", "zonename", "serviceofferingid", "hypervisor", "created", "templateid", "account", "domain")
        return {"id": str(number), "name": name, "state": "Running", "nic": [], **dict.fromkeys(known, "1")}

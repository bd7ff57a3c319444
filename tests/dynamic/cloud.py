"""
A small cloud in a folder, which forgets nothing when a process dies, and fails as it is told to.

It takes the place of providers for what real ones cannot be made to do at a chosen moment; what real ones do is tested
with real ones (processes, and EC2's interface).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from multiserver_schedule.servers.entries import Machine, MachineState, ServerInfo
from multiserver_schedule.servers.exceptions import (
    ProviderBusy,
    ProviderError,
    ProviderFull,
    ProviderRefused,
    UnknownState,
)
from multiserver_schedule.servers.providers.base import BaseProvider

ERRORS = {"busy": ProviderBusy, "full": ProviderFull, "refused": ProviderRefused, "lost": ProviderError}


class Cloud:
    """The folder, as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """Let one process at a time change what is there."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            state = (
                json.loads(path.read_text())
                if path.exists()
                else {"machines": {}, "made": 0, "most": 0, "faults": [], "calls": []}
            )
            yield state
            fresh = self.folder / "state.new"
            fresh.write_text(json.dumps(state))
            fresh.replace(path)

    def fail(self, call: str, what: str, times: int = 1, **more: Any) -> None:
        """
        Let the next calls fail: "busy" (which may say when to come again: ``retry_after`` in seconds), "full",
        "refused", "lost" (before anything is done), "done" (after it was done), "crash" (as a driver's own fault),
        "slow" (for ``seconds``), "word" (an unknown state), "blind" (it shows nothing). "die" and "die-done" kill
        whoever calls, before and after it was done; "stop" stops it, before.
        """
        with self.state() as state:
            state["faults"].append({"call": call, "what": what, "times": times, **more})

    def mend(self) -> None:
        """Let nothing fail any more."""
        with self.state() as state:
            state["faults"] = []

    def tick(self, now: datetime) -> None:
        """Tell it the time: by it, machines are shown only some time after they were made, where ``lag`` says so."""
        with self.state() as state:
            state["now"] = now.timestamp()

    @property
    def machines(self) -> dict[str, dict[str, Any]]:
        """Return what is billed, by id."""
        with self.state() as state:
            return {id: dict(each) for id, each in state["machines"].items() if each["state"] != "gone"}

    @property
    def made(self) -> int:
        """Return how many machines were ever made."""
        with self.state() as state:
            return int(state["made"])

    @property
    def most(self) -> int:
        """Return how many machines there ever were at once."""
        with self.state() as state:
            return int(state["most"])

    @property
    def ever(self) -> list[str]:
        """Return the keys of all machines that there ever were."""
        with self.state() as state:
            return [str(each["key"]) for each in state["machines"].values()]

    @property
    def calls(self) -> list[str]:
        """Return the calls that were made, in order."""
        with self.state() as state:
            return list(state["calls"])

    def put(self, id: str, **machine: Any) -> None:
        """Put a machine there by hand, or change one."""
        with self.state() as state:
            state["machines"].setdefault(
                id, {"key": "", "name": id, "fleet": "tests", "state": "running", "looks": 0, "boots": 1}
            ).update(machine)


class FolderProvider(BaseProvider):
    """
    OPTIONS: folder, idempotent, looks (how often it says that a machine isn't ready yet), settles, timeout, and lag
    (for how many seconds a machine is not shown after it was made; no more than ``settles``).
    """

    idempotent = False

    def __init__(self, name: str, options: Any, *, fleet: str) -> None:
        super().__init__(name, options, fleet=fleet)
        self.cloud = Cloud(Path(options["folder"]))
        self.looks = int(options.get("looks", 0))
        self.lag = float(options.get("lag", 0))
        self.idempotent = bool(options.get("idempotent", False))
        self.settles = timedelta(seconds=options.get("settles", 300))
        self.timeout = timedelta(seconds=options.get("timeout", 30))

    @contextmanager
    def _call(self, name: str) -> Iterator[dict[str, Any]]:
        slow = 0.0
        with self.cloud.state() as state:
            state["calls"].append(name)
            fault = next((each for each in state["faults"] if each["call"] in (name, "*") and each["times"] > 0), None)
            what = fault["what"] if fault else ""
            if fault:
                fault["times"] -= 1
                slow = float(fault.get("seconds", 0))
        if what == "slow":
            time.sleep(slow)
        if what in ("die", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            # Another thread may be told of it, and this one go on for a moment.
            time.sleep(0.1)
        if fault and "retry_after" in fault:
            raise ProviderBusy(f"{name}: {what}", retry_after=timedelta(seconds=fault["retry_after"]))
        if what in ERRORS:
            raise ERRORS[what](f"{name}: {what}")
        if what == "crash":
            raise KeyError(f"{name} with secret {self.options.get('password', '')}")
        if what == "word":
            raise UnknownState(f"{name}: the state 'flurbing' is not known")
        if what == "blind":
            yield {"machines": {}}
            return
        with self.cloud.state() as state:
            yield state
            alive = sum(1 for each in state["machines"].values() if each["state"] != "gone")
            state["most"] = max(state["most"], alive)
        if what == "die-done":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)
        if what == "done":
            raise ProviderError(f"{name}: the answer was lost")

    def _machine(self, id: str, each: dict[str, Any]) -> Machine:
        word = str(each["state"])
        known = {"pending", "running", "stopping", "stopped", "deleting"}
        state = MachineState(word) if word in known else MachineState.UNKNOWN
        return Machine(id, each["key"], state, word, each["name"], f"10.0.0.{len(id)}", f"boot-{each['boots']}")

    def create_server(self, server: ServerInfo) -> Machine:
        with self._call("create_server") as state:
            if self.idempotent:
                for id, each in state["machines"].items():
                    if each["key"] == server.key:
                        return self._machine(id, each)
            state["made"] += 1
            id = f"m{state['made']}"
            each = {"key": server.key, "name": server.name, "fleet": self.fleet, "looks": 0, "boots": 1}
            each |= {"state": "pending" if self.looks else "running", "configuration": dict(server.configuration)}
            each["made_at"] = state.get("now", 0.0)
            state["machines"][id] = each
            return self._machine(id, each)

    def _became(self, name: str, id: str, state_: str, after: str) -> bool:
        """Say whether a machine is in a state, which it reaches after some looks."""
        with self._call(name) as state:
            each = state["machines"].get(id, {"state": "gone"})
            if each["state"] == after:
                each["looks"] += 1
                if each["looks"] > self.looks:
                    each.update(state=state_, looks=0)
            return bool(each["state"] == state_)

    def has_started(self, machine_id: str) -> bool:
        return self._became("has_started", machine_id, "running", "pending")

    def has_stopped(self, machine_id: str) -> bool:
        return self._became("has_stopped", machine_id, "stopped", "stopping") or self._gone(machine_id)

    def has_been_deleted(self, machine_id: str) -> bool:
        return self._became("has_been_deleted", machine_id, "gone", "deleting")

    def _gone(self, id: str) -> bool:
        with self.cloud.state() as state:
            return bool(state["machines"].get(id, {"state": "gone"})["state"] == "gone")

    def _turn(self, name: str, id: str, state_: str) -> None:
        with self._call(name) as state:
            each = state["machines"].get(id)
            is_under_way = each and state_ == "stopping" and each["state"] in ("stopping", "stopped")
            if each and not is_under_way and each["state"] not in ("gone", "deleting"):
                each.update(state=state_, looks=0)
                each["boots"] += name == "reboot_server"

    def stop_server(self, machine_id: str) -> None:
        self._turn("stop_server", machine_id, "stopping")

    def delete_server(self, machine_id: str) -> None:
        self._turn("delete_server", machine_id, "deleting")

    def reboot_server(self, machine_id: str) -> None:
        self._turn("reboot_server", machine_id, "pending")

    def current_server_count(self) -> int:
        return len(self._ours("current_server_count"))

    def find_by_tag(self, key: str) -> Sequence[Machine]:
        return [machine for machine in self._ours("find_by_tag") if machine.key == key]

    def list_servers(self) -> Sequence[Machine]:
        return self._ours("list_servers")

    def _ours(self, name: str) -> list[Machine]:
        with self._call(name) as state:
            return [
                self._machine(id, each)
                for id, each in state["machines"].items()
                if each["fleet"] == self.fleet
                and each["state"] != "gone"
                and state.get("now", 0.0) - each.get("made_at", 0.0) >= self.lag
            ]

"""ProcessProvider keeps every promise of a provider, with real processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from multiserver_schedule.servers.entries import Machine
from multiserver_schedule.servers.providers.process import ProcessProvider
from multiserver_schedule.testing import ProviderContract


class TestProcessProvider(ProviderContract):
    """The contract."""

    @pytest.fixture
    def make_provider(self, tmp_path: Path) -> Any:
        options = {"command": ["sleep", "600"], "directory": tmp_path / "state"}
        return lambda fleet="contract": ProcessProvider("processes", options, fleet=fleet)

    @pytest.fixture
    def configuration(self, tmp_path: Path) -> Mapping[str, Any]:
        self.place = tmp_path
        return {"env": {"CONTRACT": "of {name}"}}

    def look_at_configuration(self, machine: Machine, configuration: Mapping[str, Any]) -> None:
        pid = machine.booted.split()[0]
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        assert f"CONTRACT=of {machine.name}" in environ

    def unknown_machine_id(self, known: str) -> str:
        return f"nobody-{known}"

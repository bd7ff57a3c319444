"""Nothing that a project's own code does costs another run its lease, and no session is shared with it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest

from .fleet.journal import A_MOMENT
from .scenarios.scene import Scene
from .stores import Store

HANGS = 9.5
"""Seconds: more than three leases."""


def test_what_hangs_for_three_leases_costs_the_run_beside_it_neither_its_lease_nor_its_record(
    store: Store, tmp_path: Path
) -> None:
    """
    A ``when()``, receivers of a run's failure and of a clean-up, a log handler: each on a server of its own.

    The other run of each server takes more than two leases.
    """
    if store.vendor != "sqlite":
        pytest.skip("only processes are concerned")
    env = {"SCENE_HANG": str(HANGS), "SCENE_SECONDS": "7"}
    with Scene(store, tmp_path, "hanging", env=env) as scene:
        scene.register()
        since = scene.make_due()
        # A lock that gets stale meanwhile, so that there is a clean-up to tell of, and a receiver that hangs.
        scene.take("receiver", "gone", since, scene.now() + timedelta(seconds=4))
        whats = ("when", "receiver", "handler")
        logs = {"handler": {"SCENE_LOG": "hangs"}}
        servers = {
            what: scene.server(f"{what}-hangs", env={"SCENE_HANGS": what, **logs.get(what, {})}) for what in whats
        }
        starts = {what: scene.wait_for_start(f"beside-{what}") for what in whats}
        scene.wait_for(lambda: {line["why"] for line in scene.journal.of("hangs")} == set(whats), "all to hang")
        rival = scene.server("rival")
        for what in whats:
            beside = f"beside-{what}"
            end = scene.wait_for(lambda beside=beside: scene.journal.of("end", task=beside), f"the run {beside}")[0]
            [run] = scene.wait_for(lambda beside=beside: scene.runs(beside, status="succeeded"), "its record")
            assert not scene.journal.of("hung", why=what), "all the while it hung"
            assert run.finished_at is not None
            assert scene.boot_of(run.finished_at) - end["boot"] < A_MOMENT, "recorded on time"
            assert [line["pid"] for line in scene.started(beside)] == [starts[what]["pid"]]
            assert scene.cleanups(beside) == []
        for what in whats:
            # The process that hangs has a lock too, which is its own until it is given up: else it might overlap.
            [run] = scene.wait_for(lambda what=what: scene.runs(what, status="failed"), f"the run {what}")
            assert "no such rate" in run.error
            assert servers[what].wait(60) == 1, servers[what].output
        assert [row.server for row in scene.cleanups()] == ["gone"]
        rival.wait(60)
        assert scene.nothing_is_left_of("rival", *(server.server for server in servers.values()))


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no-pool"])
def test_a_run_never_shares_a_session_with_its_keeper_and_the_runner_has_none(
    store: Store, tmp_path: Path, pool: bool
) -> None:
    """Runs are forked on two servers and spawned on the others."""
    if store.vendor != "postgresql":
        pytest.skip("it is PostgreSQL's sessions that can be asked about")
    options = {"pool": {"min_size": 2, "max_size": 4}} if pool else {}
    with Scene(store, tmp_path, "sessions", env={"FLEET_DATABASE_OPTIONS": json.dumps(options)}) as scene:
        scene.register()
        scene.make_due()
        modes = ("fork", "fork", "spawn", "spawn")
        servers = [scene.server(f"web{n}", settings={"RUNNER": mode}) for n, mode in enumerate(modes)]
        for server in servers:
            assert server.wait() == 0, server.output
        lines = scene.journal.of("sessions")
        assert sorted(line["server"] for line in lines) == [server.server for server in servers]
        for line in lines:
            assert line["backend"] in line["run"]
            assert line["keeper"]
            assert not set(line["keeper"]) & set(line["run"]), line
            assert line["runner"] == [], line
        backends = [line["backend"] for line in lines]
        assert len(set(backends)) == len(backends)

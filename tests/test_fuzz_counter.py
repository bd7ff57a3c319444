"""
Sixteen processes, and a counter in a file that nothing but the lock guards: 2,000 claims, and not one count is lost.

FUZZ_CLAIMS says how many claims. Where nothing is said: 800, and 300 in a database, which is slower. No lock that is
not one has survived as many here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .caches import CacheStore
from .fleet.harness import CACHE_LOCK, HISTORY_IN_SQLITE, TWO_CACHES
from .fleet.journal import boot
from .stores import ROOT, Store

CLAIMS = int(os.environ.get("FUZZ_CLAIMS", "800"))
CLAIMS_IN_DATABASE = int(os.environ.get("FUZZ_CLAIMS", "300"))
CLAIMS_OF_NO_LOCK = 200
PROCESSES = 16
NAIVE = "tests.fleet.naive."


def count(
    store: Store, folder: Path, lock: dict[str, Any], claims: int, **environ: str
) -> tuple[int, list[tuple[int, str]]]:
    """Return what the counter says, and all that was claimed, each with its fence."""
    order = {"folder": str(folder), "claims": claims, "processes": PROCESSES}
    began = boot()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fleet.counter", json.dumps(order)],
        env=store.environ(
            DJANGO_SETTINGS_MODULE="tests.fleet.settings",
            FLEET_SETTINGS=json.dumps({"LOCKS": {"default": lock}}),
            **environ,
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    given = [
        (fence, due_at)
        for number in range(PROCESSES)
        for fence, due_at in json.loads((folder / f"given-{number}").read_text())
    ]
    counted = int((folder / "counter").read_text())
    print(f"{store.name} {lock['BACKEND']}: {counted} of {len(given)} in {boot() - began:.1f} s")
    return counted, given


def assert_none_is_lost(claims: int, counted: int, given: list[tuple[int, str]]) -> None:
    assert counted == len(given) == claims
    assert len({due_at for _, due_at in given}) == claims, "a due time was claimed twice"
    assert len({fence for fence, _ in given}) == claims, "a fence was given twice"
    assert sorted(given) == sorted(given, key=lambda claim: claim[1]), "a later claim had a lower fence"


def test_sixteen_processes_lose_no_count_by_the_lock_in_the_database(store: Store, tmp_path: Path) -> None:
    lock = {"BACKEND": "multiserver_schedule.locks.orm.ORMLock"}
    assert_none_is_lost(CLAIMS_IN_DATABASE, *count(store, tmp_path, lock, CLAIMS_IN_DATABASE))


@HISTORY_IN_SQLITE
def test_sixteen_processes_lose_no_count_by_the_lock_in_a_cache(
    store: Store, cache_store: CacheStore, tmp_path: Path
) -> None:
    assert_none_is_lost(CLAIMS, *count(store, tmp_path, CACHE_LOCK, CLAIMS, FLEET_CACHES=cache_store.as_json()))


def test_a_lock_that_looks_and_then_writes_loses_counts(store: Store, tmp_path: Path) -> None:
    counted, given = count(store, tmp_path, {"BACKEND": NAIVE + "LookThenWriteLock"}, CLAIMS_OF_NO_LOCK)
    assert counted < len(given)


@HISTORY_IN_SQLITE
@TWO_CACHES
def test_a_lock_that_gets_and_then_sets_loses_counts(store: Store, cache_store: CacheStore, tmp_path: Path) -> None:
    lock = {"BACKEND": NAIVE + "GetThenSetLock"}
    counted, given = count(store, tmp_path, lock, CLAIMS_OF_NO_LOCK, FLEET_CACHES=cache_store.as_json())
    assert counted < len(given)

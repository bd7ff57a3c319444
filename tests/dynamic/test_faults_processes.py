"""A slow provider beside other tasks, with the real scheduler."""

from __future__ import annotations

from pathlib import Path

from multiserver_schedule.servers import fleet

from ..fleet.harness import HISTORY_IN_SQLITE, utc
from ..scenarios.scene import Scene
from ..stores import Store
from .conftest import Site

RECONCILE = "multiserver_schedule_servers.reconcile.folder"
SECONDS = 5.0


@HISTORY_IN_SQLITE
def test_a_provider_that_takes_its_time_holds_up_no_other_task(site: Site, rows: Store, tmp_path: Path) -> None:
    fleet.ensure(1)
    site.cloud.fail("list_servers", "slow", times=1, seconds=SECONDS)
    env = {"DJANGO_SETTINGS_MODULE": "tests.dynamic.slow.settings", "SLOW_FOLDER": str(site.cloud.folder)}
    with Scene(rows, tmp_path, "slow", env=env, settings={"CATCH_UP": 3600}) as scene:
        scene.register()
        scene.make_due([RECONCILE])
        web1 = scene.server("web1", args=["--forever"])
        scene.wait_for(lambda: site.cloud.calls, "the provider to be asked")
        began = scene.now()
        scene.wait_for(lambda: site.statuses() == {"running": 1}, "the server to be made", also=lambda: web1.output)
        ended = scene.now()
        assert (ended - began).total_seconds() >= SECONDS - 1
        starts = {utc(line["due_at"]): line for line in scene.journal.of("start", task="often")}
        due = [moment for moment in sorted(starts) if began < moment < ended]
        assert len(due) >= SECONDS - 1.5, "each second was kept meanwhile"
        web1.kill("all")

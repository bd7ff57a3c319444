"""What people type, and what they read then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, transaction
from django.utils import timezone

from multiserver_schedule.exceptions import UnsafeTransaction
from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun, ScheduleState

from . import test_operate
from .shop import work


@pytest.fixture(autouse=True)
def _project(settings: Any) -> None:
    settings.ROOT_URLCONF = "tests.shop.urls"
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "RUNNER": "inline"}
    work.noted.clear()


pytestmark = pytest.mark.django_db(transaction=True)


def call(*arguments: str, **options: Any) -> tuple[str, int]:
    """Return what a command printed, and its exit status."""
    out = StringIO()
    try:
        call_command(*arguments, stdout=out, **options)
    except SystemExit as leaving:
        return out.getvalue(), int(leaving.code or 0)
    return out.getvalue(), 0


def hold(name: str, *, renewed: timedelta, server: str = "web9") -> None:
    """Have a server hold this task's lock, which it renewed so long ago."""
    at = timezone.now() - renewed
    ScheduledLock.objects.filter(task=name).update(
        owner="somebody", server=server, acquired_at=at, renewed_at=at, expires_at=at + timedelta(seconds=30)
    )


def make_due(*names: str) -> None:
    """Have these tasks be due since the last full minute, by the lights of the store."""
    yesterday = timezone.now() - timedelta(days=1)
    ScheduledLock.objects.filter(task__in=names).update(
        last_due_at=yesterday, schedule_since=yesterday, next_due_at=timezone.now() - timedelta(seconds=1)
    )


def test_the_first_pass_says_what_it_found_and_what_is_next() -> None:
    said, status = call("runschedule", "--inline")
    assert status == 0
    assert re.match(r"registered 7 tasks from tests\.shop\.schedule; next: shop\.\S+ \d{4}-", said)


def test_a_pass_with_nothing_due_says_nothing() -> None:
    call("runschedule", "--inline")
    assert call("runschedule", "--inline") == ("", 0)


def test_with_no_task_declared_it_says_where_it_looked(settings: Any) -> None:
    from multiserver_schedule.declare import registry

    settings.ROOT_URLCONF = "tests.urls"
    with registry.set_aside():
        said, status = call("runschedule", "--inline")
    assert status == 0
    assert "No task is declared. Searched: " in said
    assert "multiserver_schedule.schedule" in said or "tests.schedule" in said


def test_a_manual_run_is_one_line_and_leaves_the_schedule_alone() -> None:
    call("runschedule", "--inline")
    before = ScheduledLock.objects.get(task="shop.digest")
    said, status = call("schedule", "trigger", "shop.digest")
    assert status == 0
    assert re.fullmatch(r"[\d-]+ [\d:]+Z shop\.digest succeeded in \d+\.\d s on web1\n", said), said
    after = ScheduledLock.objects.get(task="shop.digest")
    assert (after.last_due_at, after.next_due_at) == (before.last_due_at, before.next_due_at)
    assert ScheduledRun.objects.get().trigger == "manual"


def test_a_manual_run_works_before_the_first_pass() -> None:
    said, status = call("schedule", "trigger", "shop.digest")
    assert (status, "succeeded" in said) == (0, True)


def test_a_manual_run_that_fails_ends_with_status_1() -> None:
    said, status = call("schedule", "trigger", "shop.broken")
    assert status == 1
    assert "shop.broken failed (ValueError: no such column)" in said


def test_a_manual_run_of_a_task_that_is_running_says_who_holds_it() -> None:
    call("runschedule", "--inline")
    now = timezone.now()
    ScheduledLock.objects.filter(task="shop.digest").update(
        owner="somebody", server="web9", acquired_at=now, renewed_at=now, expires_at=now + timedelta(minutes=1)
    )
    said, status = call("schedule", "trigger", "shop.digest")
    assert status == 1
    assert "shop.digest was not started: held by web9 since" in said


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(CommandError, match=r"No task is named 'shop.digset'. Did you mean shop.digest\?"):
        call_command("schedule", "trigger", "shop.digset")


def test_the_list_shows_when_who_and_how() -> None:
    call("schedule", "trigger", "shop.digest")
    now = timezone.now()
    ScheduledLock.objects.filter(task="shop.broken").update(
        owner="somebody", server="web9", acquired_at=now, renewed_at=now, expires_at=now + timedelta(minutes=1)
    )
    said, status = call("schedule", "list")
    assert status == 0
    digest = said[said.index("shop.digest") :].split("\nshop", 1)[0]
    assert re.search(r"next \d{4}-\d\d-\d\d 09:00:00 \(in .*\); ready", digest)
    assert "last succeeded" in digest
    assert re.search(r"shop\.broken\n    next .*; running on web9 since \d{4}", said)
    assert "shop.here@web1" in said
    assert max(map(len, said.splitlines())) <= 100


def test_the_list_as_json_has_times_in_utc() -> None:
    call("runschedule", "--inline")
    said, _ = call("schedule", "list", "--json")
    lines = {line["name"]: line for line in json.loads(said)}
    assert set(lines) >= {"shop.digest", "shop.here@web1"}
    assert lines["shop.digest"]["next_due_at"].endswith("09:00:00+00:00")


def test_the_list_shows_a_task_before_its_first_pass() -> None:
    said, _ = call("schedule", "list", "--json")
    assert {line["state"] for line in json.loads(said)} == {"not seen yet"}


def test_the_list_shows_a_lock_of_a_task_that_nobody_declares_any_more() -> None:
    now = timezone.now()
    ScheduledLock.objects.create(task="gone.task", last_due_at=now, schedule_since=now, not_before=now)
    said, _ = call("schedule", "list")
    assert "gone.task\n    next -; not declared" in said


def test_the_list_shows_until_when_a_lock_is_held_and_in_which() -> None:
    call("runschedule", "--inline")
    hold("shop.broken", renewed=timedelta(0))
    said, _ = call("schedule", "list")
    assert re.search(r"^shop\.broken\n    next .*; running on web9 since [\d-]+ [\d:]+ until [\d:-]+", said, re.M)
    line = next(line for line in json.loads(call("schedule", "list", "--json")[0]) if line["name"] == "shop.broken")
    assert (line["lock"], line["held_in"], line["holder"]) == ("default", "default", "web9")
    assert line["since"] < line["as_of"] < line["until"]


DOWN = {"BACKEND": "tests.test_operate.Away"}


def test_the_list_names_the_lock_of_each_task_where_there_is_more_than_one(settings: Any) -> None:
    call("runschedule", "--inline")
    assert "[lock" not in call("schedule", "list")[0]
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    assert "shop.digest  [lock default]\n    next " in call("schedule", "list")[0]


def test_a_store_that_is_down_makes_its_tasks_unknown_and_the_status_1(settings: Any) -> None:
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"default": DOWN}}
    errors = StringIO()
    said, status = call("schedule", "list", stderr=errors)
    assert status == 1
    assert errors.getvalue() == "The lock 'default' does not answer: ConnectionError: Connection refused\n"
    assert re.search(r"shop\.digest\n    next .*; unknown: ConnectionError: Connection refused", said)
    listed = json.loads(call("schedule", "list", "--json", stderr=errors)[0])
    assert {line["state"] for line in listed} == {"unknown: ConnectionError: Connection refused"}


def test_what_is_long_in_the_list_is_wrapped(settings: Any) -> None:
    call("runschedule", "--inline")
    hold("shop.broken", renewed=timedelta(hours=30), server="a-server-with-quite-a-long-name.example.org")
    why = "held by a-server-with-quite-a-long-name.example.org since 2030-01-01T03:00:00Z, and so on and so forth"
    ScheduledRun.objects.create(task="shop.broken", due_at=timezone.now(), status="skipped", reason=why)
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    said, _ = call("schedule", "list")
    lines = said[said.index("shop.broken") :].split("\nshop")[0].splitlines()
    assert max(map(len, lines)) <= 96
    assert [line.split()[0] for line in lines[1:5]] == ["next", "stale", "until", "last"]
    assert [len(line) - len(line.lstrip()) for line in lines[1:]] == [4, 4, 8, 4, 8]


def test_unlock_frees_a_lock_and_says_so() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=timedelta(minutes=5))
    said, status = call("schedule", "unlock", "shop.digest")
    assert status == 0
    assert re.fullmatch(r"shop\.digest: freed the lock that web9 held since .*Z \(released_by_hand\)\n", said)
    assert ScheduledLock.objects.get(task="shop.digest").owner is None
    log = CleanupLog.objects.get()
    assert (log.reason, log.cleaned_by) == ("released_by_hand", "web1")


def test_unlock_refuses_while_the_holder_looks_alive_unless_forced() -> None:
    call("runschedule", "--inline")
    hold("shop.digest", renewed=timedelta(seconds=1))
    with pytest.raises(CommandError, match=r"shop\.digest is held by web9 since .*, and that server looks alive"):
        call_command("schedule", "unlock", "shop.digest")
    assert call("schedule", "unlock", "shop.digest", "--force")[1] == 0
    assert ScheduledLock.objects.get(task="shop.digest").owner is None


def test_unlock_of_what_nobody_holds_is_refused_with_status_1() -> None:
    call("runschedule", "--inline")
    with pytest.raises(CommandError, match=r"Nobody holds the lock of shop\.digest") as refused:
        call_command("schedule", "unlock", "shop.digest")
    assert refused.value.returncode == 1


def test_unlock_of_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(CommandError, match=r"No task is named 'shop.digset'. Did you mean shop.digest\?"):
        call_command("schedule", "unlock", "shop.digset")


def test_unlock_says_what_the_database_did_not_take(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("the server is shutting down")

    monkeypatch.setattr("multiserver_schedule.history.History.cleaned", refuse)
    settings.MULTISERVER_SCHEDULE = {"LOCKS": {"cache": {"BACKEND": "tests.test_operate.Board"}}}
    errors = StringIO()
    test_operate.Board.held.clear()
    test_operate.in_cache("shop.digest", renewed=timedelta(minutes=5))
    assert call("schedule", "unlock", "shop.digest", stderr=errors)[1] == 0
    assert "freed, but the clean-up is not recorded yet" in errors.getvalue()
    assert "the server is shutting down" in errors.getvalue()


def test_unlock_in_one_of_two_locks(settings: Any) -> None:
    with pytest.raises(CommandError, match="There is no lock 'cache'"):
        call_command("schedule", "unlock", "shop.digest", "--lock=cache")


def test_an_unknown_zone_is_refused() -> None:
    with pytest.raises(CommandError, match="Europe/Berlin"):
        call_command("schedule", "list", "--timezone=Mars/Olympus")


def test_a_pass_inside_a_transaction_is_refused(settings: Any) -> None:
    call("runschedule", "--inline")
    settings.MULTISERVER_SCHEDULE = {"RUNNER": "fork"}
    with transaction.atomic(), pytest.raises(UnsafeTransaction, match="run_due"):
        call_command("runschedule")


PROJECT = {
    "manage.py": """
import os, sys
from django.core.management import execute_from_command_line
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
execute_from_command_line(sys.argv)
""",
    "shop/__init__.py": "",
    "shop/urls.py": "urlpatterns = []",
    "shop/settings.py": """
from pathlib import Path
SECRET_KEY = "x"
USE_TZ = True
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["multiserver_schedule"]
PLACE = Path(__file__).parent
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": PLACE / "db.sqlite3"}}
MULTISERVER_SCHEDULE = {"RUNNER": "spawn", "SERVER_NAME": "web1"}
""",
    "shop/schedule.py": """
from multiserver_schedule import schedule
@schedule.task().daily()
def hello():
    from django.conf import settings
    (settings.PLACE / "hello").write_text("hello")
""",
}


def test_a_spawned_run_finds_the_project_wherever_cron_starts_it(tmp_path: Path) -> None:
    for name, text in PROJECT.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    environ.pop("DJANGO_SETTINGS_MODULE", None)

    def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(tmp_path / "project" / "manage.py"), *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    manage("migrate", "--verbosity=0")
    assert " shop.hello succeeded in " in manage("schedule", "trigger", "shop.hello").stdout
    assert (tmp_path / "project" / "shop" / "hello").read_text() == "hello"


def test_nothing_runs_while_everything_is_paused() -> None:
    call("runschedule", "--inline")
    make_due("shop.digest")
    ScheduleState.objects.filter(key=ScheduleState.PROJECT).update(paused_at=timezone.now())
    assert call("runschedule", "--inline") == ("", 0)
    assert not ScheduledRun.objects.exists()

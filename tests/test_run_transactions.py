"""RUN: what a task leaves uncommitted is rolled back and told, on every database; what it committed stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from django.contrib.auth.models import Group
from django.db import connections, transaction
from django.test import TestCase

from multiserver_schedule.exceptions import ScheduleError, UnsafeTransaction
from multiserver_schedule.run.base import boot_time
from multiserver_schedule.run.handle import ProcessRunner
from multiserver_schedule.run.inline import InlineRunner
from multiserver_schedule.run.report import deliver_one

from . import run_support
from .run_support import Drive, alone, claim, running, task
from .stores import Store


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(run_support.PLACE, str(tmp_path))
    return tmp_path


def leaves_a_block_open(alias: str) -> None:
    Group.objects.using(alias).create(name="committed")
    transaction.atomic(using=alias).__enter__()
    Group.objects.using(alias).create(name="left open")


def turns_autocommit_off(alias: str) -> None:
    transaction.set_autocommit(False, using=alias)
    Group.objects.using(alias).create(name="committed")
    transaction.commit(using=alias)
    Group.objects.using(alias).create(name="left open")


def begins_by_hand(alias: str) -> None:
    Group.objects.using(alias).create(name="committed")
    with connections[alias].cursor() as cursor:
        cursor.execute("BEGIN")
    Group.objects.using(alias).create(name="left open")


def commits(alias: str) -> None:
    with transaction.atomic(using=alias):
        Group.objects.using(alias).create(name="committed")


def commits_with_autocommit_off(alias: str) -> None:
    transaction.set_autocommit(False, using=alias)
    Group.objects.using(alias).create(name="committed")
    transaction.commit(using=alias)


@pytest.mark.parametrize("leave", [leaves_a_block_open, turns_autocommit_off, begins_by_hand])
def test_work_that_was_left_open_is_rolled_back_and_the_run_has_failed(
    store: Store, leave: Callable[[str], None]
) -> None:
    left = task("left", leave, store.alias)
    connections.close_all()
    with running(tasks={"left": left}) as runner:
        drive = Drive(runner)
        outcome = drive.outcome(drive.run(left, lease=20.0))
    assert outcome.status == "failed"
    assert outcome.error.startswith(f"a transaction was left open on {store.alias!r} when the task returned, and what")
    assert [group.name for group in Group.objects.using(store.alias).all()] == ["committed"]


@pytest.mark.parametrize("commit", [commits, commits_with_autocommit_off])
def test_work_that_was_committed_is_a_success(store: Store, commit: Callable[[str], None]) -> None:
    done = task("done", commit, store.alias)
    connections.close_all()
    with running(tasks={"done": done}) as runner:
        drive = Drive(runner)
        outcome = drive.outcome(drive.run(done, lease=20.0))
    assert (outcome.status, outcome.error) == ("succeeded", "")
    assert Group.objects.using(store.alias).count() == 1


@pytest.mark.django_db(transaction=True)
def test_no_runner_is_forked_while_a_connection_is_open() -> None:
    alone()
    runner = ProcessRunner({}, deliver=print, heartbeat=1.0)
    Group.objects.count()
    with pytest.raises(ScheduleError, match="connection 'default' is open"):
        runner.start()
    with transaction.atomic(), pytest.raises(UnsafeTransaction, match="inside a transaction"):
        runner.start()
    connections.close_all()
    runner.start()
    runner.close(1.0)


class InATestCase(TestCase):
    def run_inline(self, done: Callable[[], object]) -> str:
        runner = InlineRunner({}, deliver=lambda event: deliver_one(event, print))
        runner.run(claim(task("inline", done)), until=boot_time() + 5, finish_by=None)
        return str(runner.poll(0)[1].outcome.status)  # type: ignore[union-attr]

    def test_inline_uses_the_tests_own_transaction_and_leaves_it_alone(self) -> None:
        Group.objects.create(name="of the test")
        assert self.run_inline(lambda: Group.objects.get(name="of the test")) == "succeeded"
        assert self.run_inline(lambda: Group.objects.create(name="of the task")) == "succeeded"
        assert self.run_inline(lambda: Group.objects.get(name="nobody")) == "failed"
        assert Group.objects.count() == 2

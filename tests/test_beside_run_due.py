"""BESIDE: hooks and mail in the tests of a project, where ``run_due`` runs everything inside the test's transaction."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from multiserver_schedule import schedule
from multiserver_schedule.declare import registry
from multiserver_schedule.testing import run_due

from .run_support import mail_by

TOLD: list[Any] = []


def prints() -> None:
    print("hello")


def tells(run: Any, output: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    TOLD.append((run.name, output, connection.in_atomic_block))


@pytest.mark.django_db
def test_run_due_calls_hooks_sends_mail_and_leaves_the_tests_transaction_alone(
    mailoutbox: list[Any], tmp_path: Path, settings: Any
) -> None:
    mail_by(settings, "locmem")
    TOLD.clear()
    with registry.set_aside():
        declared = schedule.call(prints).name("hello").daily_at("3:00").after(tells)
        declared.email_output_to("a@b").append_output_to(tmp_path / "out")
        (ran,) = run_due(datetime(2030, 1, 1, 3, tzinfo=timezone.utc))

    assert (ran.status, ran.output) == ("succeeded", "hello\n")
    assert [mail.to for mail in mailoutbox] == [["a@b"]]
    assert TOLD == [("hello", "hello\n", True)]
    assert (tmp_path / "out").read_text() == "hello\n"

"""The admin shows everything, to the second, and changes nothing."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from multiserver_schedule.models import CleanupLog, ScheduledLock, ScheduledRun

THREE = datetime(2030, 1, 1, 3, 0, 7, tzinfo=timezone.utc)
MODELS = ("scheduledlock", "scheduledrun", "cleanuplog")


@pytest.fixture
def browser(db: None) -> Client:
    ScheduledLock.objects.create(task="a.b", last_due_at=THREE, schedule_since=THREE, not_before=THREE)
    ScheduledRun.objects.create(task="a.b", due_at=THREE, status="failed", output="<script>alert(1)</script>")
    CleanupLog.objects.create(task="a.b", owner="x", fence=1, cleaned_at=THREE, cleaned_by="web1", reason="overran")
    client = Client()
    client.force_login(User.objects.create_superuser("anna"))
    return client


@pytest.mark.parametrize("model", MODELS)
def test_the_lists_are_shown_to_the_second(browser: Client, model: str) -> None:
    page = browser.get(reverse(f"admin:multiserver_schedule_{model}_changelist")).content.decode()
    assert "a.b" in page
    assert "2030-01-01 03:00:07" in page


@pytest.mark.parametrize("model", MODELS)
def test_nothing_can_be_added_changed_or_deleted_by_hand(browser: Client, model: str) -> None:
    assert browser.get(reverse(f"admin:multiserver_schedule_{model}_add")).status_code == 403
    pk = apps.get_model("multiserver_schedule", model).objects.get().pk
    assert browser.post(reverse(f"admin:multiserver_schedule_{model}_delete", args=[pk])).status_code == 403
    page = browser.get(reverse(f"admin:multiserver_schedule_{model}_change", args=[pk])).content.decode()
    assert "Close" in page
    assert 'name="_save"' not in page


def test_what_a_task_printed_is_shown_escaped(browser: Client) -> None:
    pk = ScheduledRun.objects.get().pk
    page = browser.get(reverse("admin:multiserver_schedule_scheduledrun_change", args=[pk])).content.decode()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page

"""The rows. All of them live in the lock's database, so that a claim and its record are one transaction."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _


class ScheduledLock(models.Model):
    """
    One row per task (per task and server, for a task on every server); never deleted, since its fence must only rise.

    ``last_due_at`` rises strictly: that is "once per due time". ``owner`` empty or not: that is "no overlap".
    """

    task = models.CharField(_("task"), max_length=255, unique=True)
    last_due_at = models.DateTimeField(_("last due at"), help_text=_("The last due time that was claimed or skipped."))
    next_due_at = models.DateTimeField(_("next due at"), null=True, blank=True, db_index=True)
    schedule = models.TextField(_("schedule"), blank=True)
    fingerprint = models.CharField(max_length=64)
    schedule_since = models.DateTimeField(_("schedule since"))
    owner = models.CharField(max_length=36, null=True, blank=True)  # noqa: DJ001 - null is "nobody"; two empty texts are not
    stamp = models.CharField(max_length=36, blank=True)
    server = models.CharField(_("server"), max_length=64, blank=True)
    fence = models.BigIntegerField(_("fencing token"), default=0)
    acquired_at = models.DateTimeField(_("acquired at"), null=True, blank=True)
    renewed_at = models.DateTimeField(_("renewed at"), null=True, blank=True)
    expires_at = models.DateTimeField(_("expires at"), null=True, blank=True, db_index=True)
    finish_by = models.DateTimeField(_("finish by"), null=True, blank=True)
    not_before = models.DateTimeField(_("not before"))
    paused_at = models.DateTimeField(_("paused at"), null=True, blank=True)
    paused_reason = models.CharField(_("paused because"), max_length=255, blank=True)
    attempt = models.PositiveIntegerField(_("attempt"), default=1)
    trigger = models.CharField(_("trigger"), max_length=10, default="schedule")
    rerun_up_to = models.PositiveIntegerField(
        default=0, help_text=_("Up to which attempt the death of its server leads to another one.")
    )
    retry_at = models.DateTimeField(_("retry at"), null=True, blank=True, db_index=True)
    wanted_at = models.DateTimeField(
        _("wanted at"), null=True, blank=True, db_index=True, help_text=_("When somebody asked for a run.")
    )
    cancelled_at = models.DateTimeField(_("cancelled at"), null=True, blank=True)
    moved_to = models.CharField(
        _("moved to"), max_length=100, blank=True, help_text=_("The lock that has the task by now.")
    )
    moved_from = models.CharField(
        _("moved from"), max_length=100, blank=True, help_text=_("The lock whose last run of the task is waited for.")
    )

    class Meta:
        verbose_name = _("scheduled lock")
        verbose_name_plural = _("scheduled locks")
        ordering = ["task"]
        permissions = [
            ("release_scheduledlock", "Can release scheduled lock by hand"),
            ("pause_scheduledlock", "Can pause and resume scheduled tasks"),
            ("trigger_scheduledlock", "Can ask for a run of a scheduled task"),
        ]

    def __str__(self) -> str:
        return self.task


class ScheduledRun(models.Model):
    """
    One attempt at one due time, or a due time that was given up (``status`` skipped).

    The constraint is a tripwire: safety rests on ``ScheduledLock.last_due_at``.
    """

    class Trigger(models.TextChoices):
        SCHEDULE = "schedule", _("schedule")
        CATCH_UP = "catch_up", _("catch-up")
        MANUAL = "manual", _("manual")
        BACKFILL = "backfill", _("backfill")

    class Status(models.TextChoices):
        RUNNING = "running", _("running")
        SUCCEEDED = "succeeded", _("succeeded")
        FAILED = "failed", _("failed")
        TIMED_OUT = "timed_out", _("timed out")
        CANCELLED = "cancelled", _("cancelled")
        SKIPPED = "skipped", _("skipped")
        ABANDONED = "abandoned", _("abandoned")
        LOST = "lost", _("lost")

    task = models.CharField(_("task"), max_length=255)
    due_at = models.DateTimeField(_("due at"))
    trigger = models.CharField(_("trigger"), max_length=10, choices=Trigger.choices, default=Trigger.SCHEDULE)
    attempt = models.PositiveIntegerField(_("attempt"), default=1)
    status = models.CharField(_("status"), max_length=10, choices=Status.choices, default=Status.RUNNING)
    reason = models.CharField(_("reason"), max_length=255, blank=True)
    count = models.PositiveIntegerField(_("count"), default=1, help_text=_("Due times that this row stands for."))
    server = models.CharField(_("server"), max_length=64, blank=True)
    owner = models.CharField(max_length=36, blank=True)
    fence = models.BigIntegerField(_("fencing token"), default=0)
    started_at = models.DateTimeField(_("started at"), null=True, blank=True)
    finished_at = models.DateTimeField(_("finished at"), null=True, blank=True)
    expires_at = models.DateTimeField(
        _("expires at"), null=True, blank=True, db_index=True, help_text=_("Of a run that may overlap, while it runs.")
    )
    error = models.TextField(_("error"), blank=True)
    output = models.TextField(_("output"), blank=True)

    class Meta:
        verbose_name = _("scheduled run")
        verbose_name_plural = _("scheduled runs")
        ordering = ["-pk"]
        constraints = [
            models.UniqueConstraint(
                fields=["task", "due_at", "trigger", "attempt"], name="multiserver_schedule_run_once"
            )
        ]
        indexes = [
            models.Index(fields=["status", "server"], name="multiserver_schedule_run_busy"),
            models.Index(fields=["finished_at"], name="multiserver_schedule_run_done"),
        ]

    def __str__(self) -> str:
        return f"{self.task} {self.due_at:%Y-%m-%d %H:%M:%S} {self.status}"


class CleanupLog(models.Model):
    """One stale lock that was taken from its owner: written in the same transaction as the take-over."""

    class Reason(models.TextChoices):
        LEASE_EXPIRED = "lease_expired", _("lease expired")
        OVERRAN = "overran", _("overran its limit")
        RUNNER_LOST = "runner_lost", _("its runner was lost")
        RELEASED_BY_HAND = "released_by_hand", _("released by hand")

    task = models.CharField(_("task"), max_length=255)
    due_at = models.DateTimeField(_("due at"), null=True, blank=True)
    server = models.CharField(_("server"), max_length=64, blank=True)
    owner = models.CharField(max_length=36)
    fence = models.BigIntegerField(_("fencing token"))
    acquired_at = models.DateTimeField(_("acquired at"), null=True, blank=True)
    expired_at = models.DateTimeField(_("expired at"), null=True, blank=True)
    cleaned_at = models.DateTimeField(_("cleaned at"))
    cleaned_by = models.CharField(_("cleaned by"), max_length=64)
    reason = models.CharField(_("reason"), max_length=20, choices=Reason.choices)

    class Meta:
        verbose_name = _("clean-up")
        verbose_name_plural = _("clean-ups")
        ordering = ["-pk"]
        constraints = [models.UniqueConstraint(fields=["owner"], name="multiserver_schedule_cleanup_once")]
        indexes = [models.Index(fields=["task", "cleaned_at"], name="multiserver_schedule_cleanups")]

    def __str__(self) -> str:
        return f"{self.task} {self.reason} {self.cleaned_at:%Y-%m-%d %H:%M:%S}"


class ScheduleState(models.Model):
    """
    What holds for all tasks, in one small table read by one statement at each pass.

    Four kinds of row, told apart by ``key``: ``project`` (pause of everything, interrupt), ``declared:<digest>`` (one
    for each set of declarations seen, with ``aside:`` before it for one to be synced anew; its ``scope`` is empty, or
    the server whose own tasks it lists), ``server:<name>`` (touched by each claim of that server, which puts its claims
    in a row) and ``paused:<lock>:<digest>`` (a pause in a lock that may lose data, which then takes it from here; where
    ``row`` is empty, of all that the lock has).
    """

    PROJECT = "project"

    key = models.CharField(max_length=255, unique=True)
    scope = models.CharField(max_length=64, blank=True)
    row = models.CharField(max_length=255, blank=True, help_text=_("Of a pause: what is paused."))
    paused_at = models.DateTimeField(_("paused at"), null=True, blank=True)
    paused_reason = models.CharField(_("paused because"), max_length=255, blank=True)
    interrupted_at = models.DateTimeField(_("interrupted at"), null=True, blank=True)
    first_seen_at = models.DateTimeField(_("first seen at"), null=True, blank=True)
    seen_at = models.DateTimeField(_("seen at"), null=True, blank=True)

    class Meta:
        verbose_name = _("schedule state")
        verbose_name_plural = _("schedule states")

    def __str__(self) -> str:
        return self.key

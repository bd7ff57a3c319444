"""Locks, runs and clean-ups, to be looked at: nothing is added, changed or deleted here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone

from ..models import CleanupLog, ScheduledLock, ScheduledRun

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:  # generic for the type checker alone
    ModelAdmin = admin.ModelAdmin


def to_the_second(name: str) -> Any:
    """Return a column of this moment: by the minute, as dates are shown otherwise, all would look alike."""

    @admin.display(description=name.replace("_", " "), ordering=name)
    def column(row: Any) -> str:
        moment = getattr(row, name)
        return "" if moment is None else timezone.localtime(moment).strftime("%Y-%m-%d %H:%M:%S")

    return column


class ReadOnlyAdmin(ModelAdmin):
    """Rows are history: a fence that fell, or a due time that was forgotten, would run a task twice."""

    show_full_result_count = False
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody adds rows by hand."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody changes rows by hand."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody deletes rows by hand."""
        return False


@admin.register(ScheduledLock)
class ScheduledLockAdmin(ReadOnlyAdmin):
    """What is due next, and who holds it."""

    list_display = (
        "task",
        to_the_second("next_due_at"),
        to_the_second("last_due_at"),
        "server",
        to_the_second("acquired_at"),
        to_the_second("renewed_at"),
        to_the_second("expires_at"),
        "fence",
    )
    list_filter = ("server",)
    search_fields = ("task",)
    ordering = ("task",)


@admin.register(ScheduledRun)
class ScheduledRunAdmin(ReadOnlyAdmin):
    """How it went."""

    list_display = (
        "task",
        to_the_second("due_at"),
        "trigger",
        "status",
        "reason",
        "count",
        "server",
        to_the_second("started_at"),
        to_the_second("finished_at"),
    )
    list_filter = ("status", "trigger", "server")
    search_fields = ("task",)
    date_hierarchy = "due_at"


@admin.register(CleanupLog)
class CleanupLogAdmin(ReadOnlyAdmin):
    """Whose locks were taken away, when and by whom."""

    list_display = (
        "task",
        to_the_second("due_at"),
        "server",
        "reason",
        to_the_second("acquired_at"),
        to_the_second("expired_at"),
        to_the_second("cleaned_at"),
        "cleaned_by",
    )
    list_filter = ("reason", "server")
    search_fields = ("task",)
    date_hierarchy = "cleaned_at"

"""Locks, runs and clean-ups, to be looked at: nothing is added, changed or deleted here, and a lock can be released."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from .. import operate
from ..models import CleanupLog, ScheduledLock, ScheduledRun

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:  # generic for the type checker alone
    ModelAdmin = admin.ModelAdmin


STORES: Final = "multiserver_schedule_scheduledlock_stores"
RELEASE: Final = "multiserver_schedule_scheduledlock_release"


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

    def get_urls(self) -> list[URLPattern]:
        """Add the page of all stores, and the one that asks before a lock is released."""
        wrap = self.admin_site.admin_view
        return [
            path("stores/", wrap(self.stores_view), name=STORES),
            path("stores/release/", wrap(self.release_view), name=RELEASE),
            *super().get_urls(),
        ]

    def has_release_permission(self, request: HttpRequest) -> bool:
        """May this user free a lock by hand?"""
        return bool(request.user.has_perm("multiserver_schedule.release_scheduledlock"))

    # A lock is never used inside a transaction, and so not inside that of ATOMIC_REQUESTS.
    @method_decorator(transaction.non_atomic_requests)
    def stores_view(self, request: HttpRequest) -> HttpResponse:
        """Show who holds what, in every store, whatever it is made of: the held ones first."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        listing = operate.overview()
        lines = sorted(listing.lines, key=lambda line: not line.holder)
        labels = dict(ScheduledRun.Status.choices)
        release = self._url(RELEASE)
        page = Paginator(
            [
                (
                    line,
                    labels.get(line.last_status, line.last_status),
                    f"{release}?{urlencode({'task': line.name, 'lock': line.held_in})}" if line.held_in else "",
                )
                for line in lines
            ],
            100,
        )
        may_release = self.has_release_permission(request)
        return self._page(
            request,
            "stores.html",
            title=_("Locks in all stores"),
            headings=[
                *(_("Task"), _("Lock"), _("State"), _("Holder")),
                *([""] if may_release else []),
                *(_("Since"), _("Until"), _("Next due"), _("Last result")),
            ],
            troubles=listing.troubles,
            page=page.get_page(request.GET.get("p")),
            may_release=may_release,
        )

    @method_decorator(transaction.non_atomic_requests)
    def release_view(self, request: HttpRequest) -> HttpResponse:
        """Ask before a lock is released (GET), and release it (POST)."""
        if not self.has_view_permission(request) or not self.has_release_permission(request):
            raise PermissionDenied
        given = request.POST if request.method == "POST" else request.GET
        task, lock = given.get("task", ""), given.get("lock", "")
        try:
            if request.method == "POST":
                force = "force" in given
                released = operate.unlock(task, lock=lock, owner=given.get("owner", ""), force=force)
                self._log(request, released, force)
            else:
                return self._page(
                    request, "release.html", title=_("Release a lock"), holder=operate.holder(task, lock=lock)
                )
        except operate.UnlockRefused as refused:
            self.message_user(request, str(refused), messages.ERROR)
        return HttpResponseRedirect(self._url(STORES))

    def _log(self, request: HttpRequest, released: operate.Released, force: bool) -> None:
        held = released.holder
        said = gettext("Released the lock of %(task)s (in %(lock)s), which %(server)s had held.") % {
            "task": held.name,
            "lock": held.lock,
            "server": held.server,
        }
        # The row of a task that is locked in a cache is not in the database: then there is nothing to link to.
        row = ScheduledLock.objects.filter(task=held.name).first() or ScheduledLock(task=held.name)
        self.log_change(request, row, f"{said}{' By force.' if force and held.looks_alive else ''}")
        self.message_user(request, said, messages.SUCCESS)
        if released.unrecorded:
            unrecorded = gettext("The clean-up is not recorded yet, since the database did not take it: %s")
            self.message_user(request, unrecorded % released.unrecorded, messages.WARNING)

    def _page(self, request: HttpRequest, name: str, **context: Any) -> HttpResponse:
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "stores_url": self._url(STORES),
            **context,
        }
        return TemplateResponse(request, f"admin/multiserver_schedule/scheduledlock/{name}", context)

    def _url(self, name: str) -> str:
        return reverse(f"admin:{name}", current_app=self.admin_site.name)


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

"""
Locks, runs and clean-ups, to be looked at: nothing is added, changed or deleted here.

A lock can be released, a task paused and resumed, and a run asked for, each with a permission of its own: by the same
functions of ``operate`` as the command, never in the web request itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from .. import operate
from ..models import CleanupLog, ScheduledLock, ScheduledRun

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:  # generic for the type checker alone
    ModelAdmin = admin.ModelAdmin


STORES: Final = "multiserver_schedule_scheduledlock_stores"
RELEASE: Final = "multiserver_schedule_scheduledlock_release"
STEER: Final = {
    "pause": "multiserver_schedule_scheduledlock_pause",
    "resume": "multiserver_schedule_scheduledlock_resume",
    "run": "multiserver_schedule_scheduledlock_run",
}
"""What is asked for before it is done: each verb with the name of its page."""


def to_the_second(name: str) -> Any:
    """Return a column of this moment: by the minute, as dates are shown otherwise, all would look alike."""

    @admin.display(description=name.replace("_", " "), ordering=name)
    def column(row: Any) -> str:
        moment = getattr(row, name)
        return "" if moment is None else timezone.localtime(moment).strftime("%Y-%m-%d %H:%M:%S")

    return column


def _not_done(refused: operate.Refused) -> str:
    # The admin writes the first letter of a message large, which must not be that of a task's name.
    return gettext("Not done: %s") % refused


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
        to_the_second("paused_at"),
        "paused_reason",
        to_the_second("retry_at"),
        "fence",
    )
    list_filter = ("server",)
    search_fields = ("task",)
    ordering = ("task",)
    actions = ("pause_selected", "resume_selected", "run_selected")

    def get_urls(self) -> list[URLPattern]:
        """Add the page of all stores, and those that ask before something is done."""
        wrap = self.admin_site.admin_view
        return [
            path("stores/", wrap(self.stores_view), name=STORES),
            path("stores/release/", wrap(self.release_view), name=RELEASE),
            *(
                path(f"stores/{verb}/", wrap(self.steer_view), {"verb": verb}, name=name)
                for verb, name in STEER.items()
            ),
            *super().get_urls(),
        ]

    def has_release_permission(self, request: HttpRequest) -> bool:
        """May this user free a lock by hand?"""
        return bool(request.user.has_perm("multiserver_schedule.release_scheduledlock"))

    def has_pause_permission(self, request: HttpRequest) -> bool:
        """May this user pause and resume tasks?"""
        return bool(request.user.has_perm("multiserver_schedule.pause_scheduledlock"))

    def has_run_permission(self, request: HttpRequest) -> bool:
        """May this user ask for a run?"""
        return bool(request.user.has_perm("multiserver_schedule.trigger_scheduledlock"))

    @admin.action(description=_("Pause"), permissions=["pause"])
    def pause_selected(self, request: HttpRequest, queryset: Any) -> HttpResponse:
        """Ask for the reason."""
        return self._asked_first("pause", queryset)

    @admin.action(description=_("Resume"), permissions=["pause"])
    def resume_selected(self, request: HttpRequest, queryset: Any) -> HttpResponse:
        """Ask before it is done."""
        return self._asked_first("resume", queryset)

    @admin.action(description=_("Run now"), permissions=["run"])
    def run_selected(self, request: HttpRequest, queryset: Any) -> HttpResponse:
        """Ask before it is done."""
        return self._asked_first("run", queryset)

    def _asked_first(self, verb: str, queryset: Any) -> HttpResponse:
        given = [("task", task) for task in queryset.values_list("task", flat=True)]
        return HttpResponseRedirect(f"{self._url(STEER[verb])}?{urlencode(given)}")

    # A lock is never used inside a transaction, and so not inside that of ATOMIC_REQUESTS.
    @method_decorator(transaction.non_atomic_requests)
    def stores_view(self, request: HttpRequest) -> HttpResponse:
        """Show who holds what, in every store, whatever it is made of: the held ones first."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        listing = operate.overview()
        lines = sorted(listing.lines, key=lambda line: not line.holder)
        labels = dict(ScheduledRun.Status.choices)
        may = {"pause": self.has_pause_permission(request), "run": self.has_run_permission(request)}
        may_release = self.has_release_permission(request)

        def links(line: operate.Overview) -> list[tuple[Any, str]]:
            here = urlencode({"task": line.name, "lock": line.lock})
            is_known = not line.state.startswith(("not seen yet", "unknown", "not declared", "moved"))
            is_paused = bool(line.paused_at) and not line.paused_with_everything
            found = []
            if line.held_in and may_release:
                held = urlencode({"task": line.name, "lock": line.held_in})
                found.append((_("Release"), f"{self._url(RELEASE)}?{held}"))
            if is_known and may["pause"]:
                verb, label = ("resume", _("Resume")) if is_paused else ("pause", _("Pause"))
                found.append((label, f"{self._url(STEER[verb])}?{here}"))
            if is_known and may["run"] and not line.paused_at and not line.paused_with_everything:
                found.append((_("Run now"), f"{self._url(STEER['run'])}?{here}"))
            return found

        page = Paginator([(line, labels.get(line.last_status, line.last_status), links(line)) for line in lines], 100)
        may_act = may_release or any(may.values())
        return self._page(
            request,
            "stores.html",
            title=_("Locks in all stores"),
            headings=[
                *(_("Task"), _("Lock"), _("State"), _("Holder"), _("Next due"), _("Last result")),
                *([""] if may_act else []),
            ],
            troubles=listing.troubles,
            everything=list({line.lock: line for line in lines if line.paused_with_everything}.values()),
            page=page.get_page(request.GET.get("p")),
            may_act=may_act,
            may_pause=may["pause"],
            pause_all_url=f"{self._url(STEER['pause'])}?all=yes",
            resume_all_url=f"{self._url(STEER['resume'])}?all=yes",
        )

    @method_decorator(transaction.non_atomic_requests)
    def steer_view(self, request: HttpRequest, verb: str) -> HttpResponse:
        """Ask before tasks are paused, resumed or run (GET), and do it (POST)."""
        may = self.has_run_permission(request) if verb == "run" else self.has_pause_permission(request)
        if not self.has_view_permission(request) or not may:
            raise PermissionDenied
        given = request.POST if request.method == "POST" else request.GET
        everything = "all" in given and verb != "run"
        names, lock = given.getlist("task"), given.get("lock", "")
        if request.method != "POST":
            return self._page(
                request,
                "steer.html",
                title={"pause": _("Pause"), "resume": _("Resume"), "run": _("Run now")}[verb],
                verb=verb,
                names=names,
                everything=everything,
                lock=lock,
            )
        try:
            if not names and not everything:
                raise operate.Refused(gettext("No task was chosen."))
            if verb == "run":
                self._run(request, names, lock)
            else:
                self._steer(request, verb, None if everything else names, lock, given.get("reason", ""))
        except operate.Refused as refused:
            self.message_user(request, _not_done(refused), messages.ERROR)
        return HttpResponseRedirect(self._url(STORES))

    def _steer(self, request: HttpRequest, verb: str, names: Sequence[str] | None, lock: str, reason: str) -> None:
        deed = partial(operate.pause, reason=reason) if verb == "pause" else operate.resume
        done = deed(names, lock=lock)
        because = f" ({reason})" if reason else ""
        for name, alias in done.rows:
            said = gettext("Paused, in %(lock)s.") if verb == "pause" else gettext("Resumed, in %(lock)s.")
            self._log_of(request, name, said % {"lock": alias} + because)
        for alias in done.locks:
            said = (
                gettext("Paused everything in %(lock)s.")
                if verb == "pause"
                else gettext("Resumed everything in %(lock)s.")
            )
            self._log_of(request, gettext("everything"), said % {"lock": alias} + because)
        count = len(done.rows) + len(done.locks)
        if count:
            said = gettext("Paused: %s") if verb == "pause" else gettext("Resumed: %s")
            what = ", ".join(name for name, _alias in done.rows) or gettext("everything")
            self.message_user(request, said % what, messages.SUCCESS)
        if done.unchanged:
            self.message_user(request, gettext("It was not paused."), messages.INFO)
        for note in (*done.notes, *done.troubles):
            self.message_user(request, note, messages.WARNING)

    def _run(self, request: HttpRequest, names: Sequence[str], lock: str) -> None:
        asked = []
        try:
            for name in names:
                wanted = operate.want(name, lock=lock)
                asked.append(wanted.name)
                self._log_of(request, wanted.name, gettext("Asked for a run, in %(lock)s.") % {"lock": wanted.lock})
        finally:
            if asked:
                said = ngettext(
                    "A run of %(names)s is asked for: the next service or pass that looks starts it.",
                    "Runs of %(names)s are asked for: the next service or pass that looks starts them.",
                    len(asked),
                )
                self.message_user(request, said % {"names": ", ".join(asked)}, messages.SUCCESS)

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
            self.message_user(request, _not_done(refused), messages.ERROR)
        return HttpResponseRedirect(self._url(STORES))

    def _log(self, request: HttpRequest, released: operate.Released, force: bool) -> None:
        held = released.holder
        said = gettext("Released the lock of %(task)s (in %(lock)s), which %(server)s had held.") % {
            "task": held.name,
            "lock": held.lock,
            "server": held.server,
        }
        self._log_of(request, held.name, f"{said}{' By force.' if force and held.looks_alive else ''}")
        self.message_user(request, said, messages.SUCCESS)
        if released.unrecorded:
            unrecorded = gettext("The clean-up is not recorded yet, since the database did not take it: %s")
            self.message_user(request, unrecorded % released.unrecorded, messages.WARNING)

    def _log_of(self, request: HttpRequest, name: str, said: str) -> None:
        # The row of a task that is locked in a cache is not in the database: then there is nothing to link to.
        row = ScheduledLock.objects.filter(task=name).first() or ScheduledLock(task=name)
        self.log_change(request, row, said)

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

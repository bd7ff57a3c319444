"""
Servers, what is wanted of them and why, to be looked at: no row is added, changed or deleted here.

Servers can be drained, rebooted, deleted at their provider, and have their next step tried again, each with a
permission of its own: by the same functions of ``operate`` as the command, and never by a call to a provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import PermissionDenied
from django.db.models import Count, IntegerField, OuterRef, Q, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from django.utils.text import Truncator
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from multiserver_schedule.admin import ReadOnlyAdmin, to_the_second
from multiserver_schedule.logs import distance
from multiserver_schedule.operate import Refused

from . import ledger, operate, picture
from .exceptions import FleetError
from .models import Decision, Provider, Server, Target, Transition
from .states import CHOICES, PROVISIONED, Status

if TYPE_CHECKING:
    TabularInline = admin.TabularInline[Transition, Server]
else:  # generic for the type checker alone
    TabularInline = admin.TabularInline

DAY: Final = timedelta(days=1)
MOST_STEPS: Final = 3000
"""As many decisions as a picture is drawn of: two a minute, for a day."""
_SHORT: Final = 70

VERBS: Final[dict[str, tuple[Any, str, Callable[[Iterable[str], str], list[operate.Done]]]]] = {
    "drain": (_("Drain"), "drain_server", operate.drain),
    "reboot": (_("Reboot"), "reboot_server", operate.reboot),
    "retire": (_("Delete at the provider"), "retire_server", operate.retire),
    "retry": (_("Retry the next step now"), "retry_server", operate.retry),
}
"""What may be done to a server: how it is called, who may, and what does it."""


def _url_of(verb: str) -> str:
    return f"multiserver_schedule_servers_server_{verb}"


def shortened(name: str) -> Any:
    """Return a column of the first words of a text; the server's page has all of it."""

    @admin.display(description=name.replace("_", " "))
    def column(row: Any) -> str:
        return Truncator(getattr(row, name)).chars(_SHORT)

    return column


class StatusFilter(admin.SimpleListFilter):
    """Shows what is there, unless one asks for what was."""

    title = _("status")
    parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Offer each status, and all together."""
        return [("all", _("All")), *CHOICES]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """Leave out what is deleted, where nothing was chosen."""
        chosen = self.value()
        shown: QuerySet[Any] = queryset
        if chosen != "all":
            shown = queryset.filter(status=chosen) if chosen else queryset.exclude(status=Status.DELETED)
        return shown

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        """Name what is shown where nothing was chosen."""
        first, *rest = super().choices(changelist)
        yield {**first, "display": _("All but deleted")}
        yield from rest


class TransitionInline(TabularInline):
    """What became of a server, the last change first."""

    model = Transition
    fields = ("moment", "previous", "status", "by", "reason")
    readonly_fields = fields
    ordering = ("-pk",)
    extra = 0
    max_num = 0
    can_delete = False
    moment = staticmethod(to_the_second("at"))

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Who may see a server may see what became of it."""
        return True

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody adds rows by hand."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody changes rows by hand."""
        return False


@admin.register(Server)
class ServerAdmin(ReadOnlyAdmin):
    """Which servers there are, how each stands, and why it exists."""

    list_display = (
        "name",
        "type",
        "provider",
        "standing",
        "age",
        "jobs",
        shortened("why"),
        shortened("error"),
    )
    list_filter = (StatusFilter, "type", "provider", "failed_as")
    search_fields = ("name", "key", "machine_id", "address")
    ordering = ("-pk",)
    actions = ("drain_selected", "reboot_selected", "retire_selected", "retry_selected")
    inlines = (TransitionInline,)
    fieldsets = (
        (None, {"fields": ("name", "type", "provider", "status", "changed", "reason", "why", "age", "jobs")}),
        (_("Machine"), {"fields": ("machine_id", "address", "key", "configuration", "seen", "missing")}),
        (_("Trouble"), {"fields": ("failed_as", "error", "error_since", "attempts", "step")}),
        (_("Times"), {"fields": ("created", "asked", "running", "reboot", "deleted")}),
    )
    changed = staticmethod(to_the_second("status_changed_at"))
    seen = staticmethod(to_the_second("seen_at"))
    missing = staticmethod(to_the_second("missing_since"))
    error_since = staticmethod(to_the_second("error_at"))
    step = staticmethod(to_the_second("next_step_at"))
    created = staticmethod(to_the_second("created_at"))
    asked = staticmethod(to_the_second("asked_at"))
    running = staticmethod(to_the_second("running_at"))
    reboot = staticmethod(to_the_second("reboot_requested_at"))
    deleted = staticmethod(to_the_second("deleted_at"))
    readonly_fields = (
        *("age", "changed", "seen", "missing", "error_since", "step"),
        *("created", "asked", "running", "reboot", "deleted"),
    )

    @admin.display(description=_("status"), ordering="status")
    def standing(self, row: Server) -> str:
        """Say in which status it is, and for how long it has been."""
        span = distance(timezone.now() - row.status_changed_at)
        return gettext("%(status)s for %(span)s") % {"status": row.get_status_display(), "span": span}

    @admin.display(description=_("age"), ordering="-created_at")
    def age(self, row: Server) -> str:
        """Say how old it is, or became."""
        return distance((row.deleted_at or timezone.now()) - row.created_at)

    def get_urls(self) -> list[URLPattern]:
        """Add the pages that ask before something is done."""
        wrap = self.admin_site.admin_view
        return [
            *(path(f"{verb}/", wrap(self.act_view), {"verb": verb}, name=_url_of(verb)) for verb in VERBS),
            *super().get_urls(),
        ]

    def may(self, request: HttpRequest, verb: str) -> bool:
        """May this user do this to servers?"""
        return bool(request.user.has_perm(f"multiserver_schedule_servers.{VERBS[verb][1]}"))

    def has_drain_permission(self, request: HttpRequest) -> bool:
        """May this user drain servers?"""
        return self.may(request, "drain")

    def has_reboot_permission(self, request: HttpRequest) -> bool:
        """May this user reboot servers?"""
        return self.may(request, "reboot")

    def has_retire_permission(self, request: HttpRequest) -> bool:
        """May this user have servers deleted at their provider?"""
        return self.may(request, "retire")

    def has_retry_permission(self, request: HttpRequest) -> bool:
        """May this user have steps tried again?"""
        return self.may(request, "retry")

    @admin.action(description=VERBS["drain"][0], permissions=["drain"])
    def drain_selected(self, request: HttpRequest, queryset: QuerySet[Server]) -> HttpResponse:
        """Ask before it is done."""
        return self._asked_first(request, "drain", _names(queryset))

    @admin.action(description=VERBS["reboot"][0], permissions=["reboot"])
    def reboot_selected(self, request: HttpRequest, queryset: QuerySet[Server]) -> HttpResponse:
        """Ask before it is done."""
        return self._asked_first(request, "reboot", _names(queryset))

    @admin.action(description=VERBS["retire"][0], permissions=["retire"])
    def retire_selected(self, request: HttpRequest, queryset: QuerySet[Server]) -> HttpResponse:
        """Ask before it is done."""
        return self._asked_first(request, "retire", _names(queryset))

    @admin.action(description=VERBS["retry"][0], permissions=["retry"])
    def retry_selected(self, request: HttpRequest, queryset: QuerySet[Server]) -> None:
        """Do it at once: it ends nothing."""
        self._do(request, "retry", _names(queryset))

    def act_view(self, request: HttpRequest, verb: str) -> HttpResponse:
        """Ask before something is done to servers (GET), and do it (POST)."""
        if not self.has_view_permission(request) or not self.may(request, verb):
            raise PermissionDenied
        given = request.POST if request.method == "POST" else request.GET
        names = given.getlist("server")
        if request.method != "POST":
            return self._asked_first(request, verb, names)
        self._do(request, verb, names)
        return HttpResponseRedirect(self._back_to(names))

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Offer what this user may do to this server, where it makes sense."""
        server = self.get_object(request, object_id)
        tools = []
        if server is not None:
            tools = [
                (label, f"{self._url(_url_of(verb))}?server={server.name}")
                for verb, (label, _permission, _deed) in VERBS.items()
                if self.may(request, verb) and operate.makes_sense(verb, server)
            ]
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), "tools": tools})

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Say first what is wrong with providers, and what there is no room for."""
        return super().changelist_view(request, {**(extra_context or {}), "troubles": operate.troubles()})

    def _asked_first(self, request: HttpRequest, verb: str, names: Sequence[str]) -> HttpResponse:
        request.current_app = self.admin_site.name
        rows = {row.name: row for row in ledger.servers().filter(name__in=names)}
        servers = [rows[name] for name in names if name in rows]
        drained = operate.with_drain(servers)
        label = VERBS[verb][0]
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": label,
            "verb": verb,
            "servers": servers,
            "drained": drained,
            "broken_off": [server.name for server in servers if server.name not in drained],
            "act_url": self._url(_url_of(verb)),
            "back_url": self._back_to(names),
        }
        return TemplateResponse(request, "admin/multiserver_schedule_servers/server/act.html", context)

    def _do(self, request: HttpRequest, verb: str, names: Sequence[str]) -> None:
        label, _permission, deed = VERBS[verb]
        try:
            if not names:
                raise Refused(gettext("No server was chosen."))
            done = deed(names, by=request.user.get_username())  # type: ignore[call-arg]
        except (Refused, FleetError) as refused:
            self.message_user(request, gettext("Not done: %s") % refused, messages.ERROR)
            return
        rows = {row.name: row for row in ledger.servers().filter(name__in=names)}
        for each in done:
            said = f"{label}: {each.name}: {each.said.rstrip('.')}."
            if each.done and each.name in rows:
                self.log_change(request, rows[each.name], f"{label}: {each.said}.")
            self.message_user(request, said, messages.SUCCESS if each.done else messages.WARNING)

    def _back_to(self, names: Sequence[str]) -> str:
        if len(names) == 1 and (pk := ledger.servers().filter(name=names[0]).values_list("pk", flat=True).first()):
            return self._url("multiserver_schedule_servers_server_change", pk)
        return self._url("multiserver_schedule_servers_server_changelist")

    def _url(self, name: str, *args: Any) -> str:
        return reverse(f"admin:{name}", args=args, current_app=self.admin_site.name)


def _names(queryset: QuerySet[Server]) -> list[str]:
    return list(queryset.values_list("name", flat=True))


def _count(which: Q) -> Coalesce:
    servers = ledger.servers().filter(which, type=OuterRef("type")).order_by()
    counted = servers.values("type").annotate(n=Count("pk")).values("n")
    return Coalesce(Subquery(counted, output_field=IntegerField()), 0)


@admin.register(Target)
class TargetAdmin(ReadOnlyAdmin):
    """What is wanted of each type, what there is, and a picture of the last day."""

    list_display = (
        "type",
        "wanted",
        "running",
        "provisioned",
        to_the_second("changed_at"),
        shortened("why"),
        to_the_second("short_since"),
        shortened("short_because"),
    )
    fields = (
        *("type", "last_day", "wanted", "changed", "why", "running", "provisioned"),
        *("short", "short_because", "raised", "lowered", "busy"),
    )
    changed = staticmethod(to_the_second("changed_at"))
    short = staticmethod(to_the_second("short_since"))
    raised = staticmethod(to_the_second("raised_at"))
    lowered = staticmethod(to_the_second("lowered_at"))
    readonly_fields = ("last_day", "running", "provisioned", "changed", "short", "raised", "lowered")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Target]:
        """Count the servers of each type."""
        rows: QuerySet[Target] = super().get_queryset(request)
        counted: QuerySet[Target] = rows.annotate(
            n_running=_count(Q(status=Status.RUNNING)),
            n_provisioned=_count(Q(status__in=PROVISIONED) | ledger.COMES_BACK),
        )
        return counted

    @admin.display(description=_("running"), ordering="n_running")
    def running(self, row: Any) -> int:
        """Say how many work."""
        count: int = row.n_running
        return count

    @admin.display(description=_("provisioned"), ordering="n_provisioned")
    def provisioned(self, row: Any) -> int:
        """Say how many work, or are on their way to."""
        count: int = row.n_provisioned
        return count

    @admin.display(description=_("last day"))
    def last_day(self, row: Target) -> SafeString:
        """Draw what was wanted and what worked."""
        return _drawn(row.type, "day")

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Draw each type, below the list."""
        names = sorted(ledger.targets().values_list("type", flat=True))
        pictures = [(name, _drawn(name, f"day-{number}")) for number, name in enumerate(names)]
        return super().changelist_view(request, {**(extra_context or {}), "pictures": pictures})


def _drawn(type: str, key: str) -> SafeString:
    now = ledger.now()
    found = ledger.decisions().filter(type=type, until__gte=now - DAY).order_by("-until", "-pk")[:MOST_STEPS]
    steps = [picture.Step(each.at, each.until, each.wanted, each.running) for each in found]
    return picture.draw(type, steps, since=now - DAY, until=now, zone=timezone.get_current_timezone(), key=key)


@admin.register(Decision)
class DecisionAdmin(ReadOnlyAdmin):
    """What was decided, when, by whom and why."""

    list_display = (
        "type",
        to_the_second("at"),
        to_the_second("until"),
        "asked",
        "wanted",
        "running",
        "provisioned",
        shortened("why"),
        "by",
    )
    list_filter = ("type",)
    fields = ("type", "began", "ended", "times", "asked", "wanted", "running", "provisioned", "load", "why", "by")
    began = staticmethod(to_the_second("at"))
    ended = staticmethod(to_the_second("until"))
    readonly_fields = ("began", "ended")


@admin.register(Provider)
class ProviderAdmin(ReadOnlyAdmin):
    """How each provider does, and how much room it has."""

    list_display = (
        "name",
        "used",
        "counted",
        "unknown",
        to_the_second("observed_at"),
        "since",
        shortened("trouble"),
        to_the_second("not_before"),
    )
    fields = (
        *("name", "used", "counted", "unknown", "orphans", "observed"),
        *("trouble", "since", "failures", "closed_until", "look"),
    )
    observed = staticmethod(to_the_second("observed_at"))
    closed_until = staticmethod(to_the_second("not_before"))
    look = staticmethod(to_the_second("next_look_at"))
    readonly_fields = ("used", "observed", "since", "closed_until", "look")

    @admin.display(description=_("trouble since"), ordering="trouble_since")
    def since(self, row: Provider) -> str:
        """Say since when there has been trouble that is told; what nobody looks at is told above the servers."""
        since: str = to_the_second("trouble_since")(row) if row.trouble else ""
        return since

    @admin.display(description=_("used"))
    def used(self, row: Provider) -> str:
        """Say how many places are taken, and of how many."""
        limit = operate.limit_of(row.name)
        used = ledger.used_at(row.name)
        return str(used) if limit is None else gettext("%(used)d of %(limit)d") % {"used": used, "limit": limit}

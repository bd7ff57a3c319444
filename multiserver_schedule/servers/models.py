"""The rows: servers, what became of them, what is wanted of each type and why, and how each provider does."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _

from .entries import ServerInfo
from .states import CHOICES, Status


class Server(models.Model):
    """
    One server, from the wish for it to the end of its machine. Kept until it has been ``deleted`` for PRUNE_DAYS.

    ``version`` rises with every change: whoever takes a step says in the same statement which one it saw.
    """

    name = models.CharField(_("name"), max_length=100, unique=True)
    key = models.CharField(max_length=40, unique=True, help_text=_("The tag of its machine."))
    type = models.CharField(_("type"), max_length=30)
    provider = models.CharField(_("provider"), max_length=64)
    configuration = models.JSONField(_("configuration"), default=dict, blank=True)
    status = models.CharField(_("status"), max_length=10, choices=CHOICES, default=Status.NEW.value)
    status_changed_at = models.DateTimeField(_("status changed at"))
    version = models.PositiveBigIntegerField(default=0)
    why = models.TextField(_("why it exists"), blank=True)
    reason = models.TextField(_("reason"), blank=True, help_text=_("Of its last change."))
    machine_id = models.CharField(_("machine"), max_length=255, blank=True)
    address = models.CharField(_("address"), max_length=255, blank=True)
    booted = models.CharField(max_length=255, blank=True)
    created_at = models.DateTimeField(_("created at"))
    asked_at = models.DateTimeField(
        _("asked for at"), null=True, blank=True, help_text=_("When the provider was first asked for it: billed since.")
    )
    unanswered_at = models.DateTimeField(
        null=True,
        blank=True,
        help_text=_("When its creation was asked for last, as long as nobody knows what came of it."),
    )
    called_at = models.DateTimeField(
        null=True, blank=True, help_text=_("When what the present status stands for was asked for; empty: not yet.")
    )
    next_step_at = models.DateTimeField(_("next step at"), null=True, blank=True)
    attempts = models.PositiveIntegerField(_("failed attempts"), default=0, help_text=_("In the present status."))
    error = models.TextField(_("error"), blank=True, help_text=_("The last one."))
    error_at = models.DateTimeField(_("error at"), null=True, blank=True)
    failed_as = models.CharField(
        _("failed as"),
        max_length=10,
        blank=True,
        choices=[each for each in CHOICES if each[0] in (Status.ERRORED, Status.HANGING)],
        help_text=_("Set when it went wrong; it stays when it is cleaned up."),
    )
    jobs = models.PositiveIntegerField(_("jobs"), null=True, blank=True, help_text=_("That it still runs, last heard."))
    reboot_requested_at = models.DateTimeField(_("reboot requested at"), null=True, blank=True)
    running_at = models.DateTimeField(_("running since"), null=True, blank=True)
    seen_at = models.DateTimeField(_("last seen at"), null=True, blank=True, help_text=_("At the provider."))
    missing_since = models.DateTimeField(_("missing since"), null=True, blank=True)
    deleted_at = models.DateTimeField(_("deleted at"), null=True, blank=True)

    class Meta:
        verbose_name = _("server")
        verbose_name_plural = _("servers")
        ordering = ["-pk"]
        indexes = [
            models.Index(fields=["provider", "next_step_at"], name="multiserver_servers_steps"),
            models.Index(fields=["status", "type"], name="multiserver_servers_status"),
        ]
        permissions = [
            ("drain_server", "Can drain servers"),
            ("reboot_server", "Can reboot servers"),
            ("retire_server", "Can have servers deleted at their provider"),
            ("retry_server", "Can retry the next step of servers"),
        ]

    def __str__(self) -> str:
        return self.name

    def info(self) -> ServerInfo:
        """Return what others may know of it. The options in its configuration are names still."""
        return ServerInfo(
            name=self.name,
            key=self.key,
            type=self.type,
            provider=self.provider,
            configuration=self.configuration,
            machine_id=self.machine_id,
            address=self.address,
        )


class Transition(models.Model):
    """One change of a server's status: written in the same transaction, before the provider is called for it."""

    server = models.ForeignKey(Server, models.CASCADE, related_name="transitions", verbose_name=_("server"))
    previous = models.CharField(_("from"), max_length=10, choices=CHOICES, blank=True)
    status = models.CharField(_("to"), max_length=10, choices=CHOICES)
    at = models.DateTimeField(_("at"))
    by = models.CharField(_("by"), max_length=150, help_text=_("The scheduling server, or the user."))
    reason = models.TextField(_("reason"), blank=True)

    class Meta:
        verbose_name = _("transition")
        verbose_name_plural = _("transitions")
        ordering = ["-pk"]

    def __str__(self) -> str:
        return f"{self.previous or '-'} → {self.status}"


class Target(models.Model):
    """What is wanted of one type. ``version`` rises with each decision and each plan that is carried out."""

    type = models.CharField(_("type"), max_length=30, unique=True)
    wanted = models.PositiveIntegerField(_("wanted"), default=0)
    version = models.PositiveBigIntegerField(default=0)
    why = models.TextField(_("why"), blank=True)
    changed_at = models.DateTimeField(_("changed at"), null=True, blank=True)
    raised_at = models.DateTimeField(null=True, blank=True)
    lowered_at = models.DateTimeField(null=True, blank=True)
    lower_since = models.DateTimeField(null=True, blank=True)
    lower_peak = models.PositiveIntegerField(null=True, blank=True)
    higher_since = models.DateTimeField(null=True, blank=True)
    higher_low = models.PositiveIntegerField(null=True, blank=True)
    asked_at = models.DateTimeField(null=True, blank=True)
    short_since = models.DateTimeField(_("short since"), null=True, blank=True)
    short_because = models.TextField(_("short because"), blank=True)
    busy = models.JSONField(null=True, blank=True, help_text=_("Jobs by server, as the load told them last."))
    failures = models.PositiveIntegerField(
        _("failures"), default=0, help_text=_("In a row: its servers were up, and soon down again.")
    )
    not_before = models.DateTimeField(
        _("not before"), null=True, blank=True, help_text=_("Nothing of it is created until then.")
    )
    registered_at = models.DateTimeField(
        _("registered at"),
        null=True,
        blank=True,
        help_text=_("When a process that knows this type planned for it last."),
    )

    class Meta:
        verbose_name = _("target")
        verbose_name_plural = _("targets")
        ordering = ["type"]

    def __str__(self) -> str:
        return f"{self.type}: {self.wanted}"


class Decision(models.Model):
    """What was wanted of a type, and what there was, from ``at`` until ``until``: equal decisions share a row."""

    type = models.CharField(_("type"), max_length=30)
    at = models.DateTimeField(_("at"))
    until = models.DateTimeField(_("until"))
    times = models.PositiveIntegerField(_("times"), default=1)
    asked = models.PositiveIntegerField(_("asked for"), null=True, blank=True)
    wanted = models.PositiveIntegerField(_("wanted"))
    running = models.PositiveIntegerField(_("running"), help_text=_("Servers that worked then."))
    provisioned = models.PositiveIntegerField(_("provisioned"), help_text=_("Working, or on their way to."))
    load = models.JSONField(_("load"), default=dict, blank=True)
    why = models.TextField(_("why"), blank=True)
    by = models.CharField(_("by"), max_length=150)

    class Meta:
        verbose_name = _("decision")
        verbose_name_plural = _("decisions")
        ordering = ["-pk"]
        indexes = [models.Index(fields=["type", "until"], name="multiserver_servers_decided")]

    def __str__(self) -> str:
        return f"{self.type}: {self.wanted}"


class Provider(models.Model):
    """How a provider does. ``version`` is raised by whoever takes a place at it, so that the limit is exact."""

    name = models.CharField(_("name"), max_length=64, unique=True)
    version = models.PositiveBigIntegerField(default=0)
    counted = models.PositiveIntegerField(_("machines"), null=True, blank=True, help_text=_("As it counted them last."))
    unknown = models.PositiveIntegerField(
        _("not ours"), default=0, help_text=_("Machines that count towards the limit, and have no row.")
    )
    observed_at = models.DateTimeField(_("last answer at"), null=True, blank=True)
    failures = models.PositiveIntegerField(_("failures"), default=0, help_text=_("In a row."))
    trouble = models.TextField(_("trouble"), blank=True)
    trouble_since = models.DateTimeField(_("trouble since"), null=True, blank=True)
    not_before = models.DateTimeField(
        _("not before"), null=True, blank=True, help_text=_("Nothing is created there until then.")
    )
    orphans = models.JSONField(
        _("orphans"),
        default=list,
        blank=True,
        help_text=_("Machines with our tag that no server of this provider has, and that are left alone."),
    )
    next_look_at = models.DateTimeField(_("next look at"), null=True, blank=True)

    class Meta:
        verbose_name = _("provider")
        verbose_name_plural = _("providers")
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

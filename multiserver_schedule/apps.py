"""The composition root: registers checks and the receiver that writes the log. Nothing is discovered or opened here."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from . import checks, logs


class MultiserverScheduleConfig(AppConfig):
    """Scheduled tasks that run once, whatever the number of servers."""

    name = "multiserver_schedule"
    verbose_name = _("Schedule")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the log and register the checks."""
        logs.connect()
        checks.register()

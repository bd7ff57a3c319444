"""The composition root: registers checks and the receiver that writes the log. Nothing is opened here."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _

from . import checks, logs


class ServersConfig(AppConfig):
    """Worker servers that come and go with the load."""

    name = "multiserver_schedule.servers"
    label = "multiserver_schedule_servers"
    verbose_name = _("Dynamic servers")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect the log and register the checks."""
        logs.connect()
        checks.register()

"""The errors of dynamic servers, in the family of the scheduler's."""

from __future__ import annotations

from datetime import timedelta

from django.core.exceptions import ImproperlyConfigured

from multiserver_schedule.exceptions import ScheduleError


class FleetError(ScheduleError, ImproperlyConfigured):
    """A type, a provider or a setting is wrong; the message names it, and says what to write instead."""


class ProviderError(ScheduleError):
    """
    A call to a provider failed, and it is **unknown** what came of it: it may have done what it was asked for.

    Whatever else a provider raises is taken for this one. The subclasses say more.
    """


class ProviderBusy(ProviderError):
    """It certainly did nothing, and would perhaps do so later: throttled, or refused the connection."""

    def __init__(self, text: str = "", *, retry_after: timedelta | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        """How long it asked us to wait."""


class ProviderFull(ProviderBusy):
    """It certainly made nothing: the account's quota is used up, or there is no such machine to be had now."""


class ProviderRefused(ProviderError):
    """It certainly did nothing, and would not do so another time: a wrong image, a missing permission."""


class UnknownState(ProviderError):
    """It answered with a word for a machine's state that is not known."""

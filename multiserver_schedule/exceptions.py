"""The errors of this package, one family. "Another server has it" is not among them: that is an answer."""

from __future__ import annotations

from django.core.exceptions import ImproperlyConfigured


class ScheduleError(Exception):
    """The base of every error that this package raises by itself."""


class DeclarationError(ScheduleError, ImproperlyConfigured):
    """A declaration in a ``schedule.py`` is wrong; the message names its file and line and what to write instead."""


class UnknownWord(DeclarationError, AttributeError):
    """No declaration knows this word. An AttributeError, too: who asks whether it is there, gets the usual answer."""


class ConfigurationError(ScheduleError, ImproperlyConfigured):
    """``MULTISERVER_SCHEDULE``, or a cache that it names, is wrong in the settings; says what, and what to write."""


class LeaseLost(ScheduleError):
    """This run no longer holds its lease: another server may have started the task. Stop, and write nothing more."""


class StoreTimeout(ScheduleError):
    """A call to the lock's store hung, and was cut so that the leases could be renewed over a new connection."""


class StoreRefused(ScheduleError):
    """The lock's store answers, and does not do what the lock needs: a replica, full memory, missing permissions."""


class UnsafeTransaction(ScheduleError):
    """A claim or a fork was asked for inside a transaction of the caller, where it would be undone or shared."""

"""Which states does a server go through, and for how long may it stay in one? Pure."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from typing import Final

from django.utils.translation import gettext_lazy as _


class Status(str, Enum):
    """Where a server stands. The words are those of the field; ``errored`` and ``hanging`` are cleaned up, too."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    REBOOTING = "rebooting"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DELETING = "deleting"
    DELETED = "deleted"
    ERRORED = "errored"
    HANGING = "hanging"

    def __str__(self) -> str:
        """Return the word, as it stands in the row."""
        return self.value


CHOICES: Final = [
    (Status.NEW.value, _("new")),
    (Status.STARTING.value, _("starting")),
    (Status.RUNNING.value, _("running")),
    (Status.REBOOTING.value, _("rebooting")),
    (Status.DRAINING.value, _("draining")),
    (Status.STOPPING.value, _("stopping")),
    (Status.STOPPED.value, _("stopped")),
    (Status.DELETING.value, _("deleting")),
    (Status.DELETED.value, _("deleted")),
    (Status.ERRORED.value, _("errored")),
    (Status.HANGING.value, _("hanging")),
]
"""The statuses with their labels, for a field. (Not TextChoices: the types of its members are lost on Python 3.10.)"""
PROVISIONED: Final = (Status.NEW, Status.STARTING, Status.RUNNING, Status.REBOOTING)
"""Does its work, or is on its way to."""
BILLED: Final = tuple(status for status in Status if status not in (Status.NEW, Status.DELETED))
"""The provider may have a machine of it, so that it counts towards the limit."""
LEAVING: Final = (Status.DRAINING, Status.STOPPING, Status.STOPPED, Status.DELETING)
IN_TRANSIT: Final = tuple(status for status in Status if status not in (Status.RUNNING, Status.DELETED))
"""Has a next step of its own."""

TRANSITIONS: Final = {
    # Nothing was asked of the provider yet.
    Status.NEW: {Status.STARTING, Status.DELETED},
    # Back to new: the provider said that it has no room, and so has made nothing.
    Status.STARTING: {Status.RUNNING, Status.NEW, Status.STOPPING, Status.ERRORED, Status.HANGING, Status.DELETED},
    # Errored: it has stopped, and had hardly begun to work.
    Status.RUNNING: {Status.DRAINING, Status.REBOOTING, Status.STOPPING, Status.ERRORED, Status.DELETED},
    Status.REBOOTING: {
        Status.RUNNING,
        Status.DRAINING,
        Status.STOPPING,
        Status.ERRORED,
        Status.HANGING,
        Status.DELETED,
    },
    Status.DRAINING: {Status.STOPPING, Status.REBOOTING, Status.DELETED},
    # Deleting: its provider stops no machine, or not this one.
    Status.STOPPING: {Status.STOPPED, Status.DELETING, Status.HANGING, Status.DELETED},
    Status.STOPPED: {Status.DELETING, Status.DELETED},
    Status.DELETING: {Status.DELETED, Status.HANGING},
    # Deleted without being stopped first: that is not known to work with them.
    Status.ERRORED: {Status.DELETING, Status.DELETED},
    Status.HANGING: {Status.DELETING, Status.DELETED},
    # Its machine turned up after all.
    Status.DELETED: {Status.DELETING},
}
"""All that may ever happen; to be deleted by the provider, or by hand, may happen to each that had a machine."""

HANGS: Final = (Status.STARTING, Status.REBOOTING, Status.STOPPING, Status.DELETING)
"""Waits for the provider, and is ``hanging`` when that takes too long."""


def backoff(attempts: int, first: timedelta, most: timedelta) -> timedelta:
    """Return how long to wait after so many attempts that failed: ``first``, doubled each time, ``most`` at most."""
    # 2**20 of any ``first`` is beyond every ``most``, and a timedelta overflows long after.
    doubled: timedelta = first * 2 ** min(max(attempts - 1, 0), 20)
    return min(most, doubled)

"""
The lock in the project's own database: two columns of one row carry the whole promise.

``last_due_at`` only rises, in the same statement that takes the lock: once per due time. ``owner`` must be empty for
that statement to hit, and only its owner, or a reaper after the lease, empties it: no overlap.

    look        what is there to do, and what is in the rows?
    sync        which version's schedule holds, and what does a row become by it?
    claim       who has a due time: the server that runs it, or one that passes over it for all?
    release     how long does a lease last, and who ends it?
    steer       what do people ask of a row?
    session     how does a call reach the database, and again where it lost a conflict?
    rows        how is a row read and written? (Pure.)
"""

from __future__ import annotations

from .claim import Claiming
from .look import Looking
from .release import Releasing
from .steer import Steering
from .sync import Syncing


class ORMLock(Looking, Syncing, Claiming, Releasing, Steering):
    """Keeps leases and due times in ``ScheduledLock``, in the database ``OPTIONS["using"]``, never in a replica."""

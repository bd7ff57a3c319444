"""
What happened, for anybody who listens. All are sent with ``send_robust``; the sender is the class ``ScheduledTask``.

They are sent from a process that renews no lease: a receiver that raises or hangs is logged, and changes nothing else.
"""

from __future__ import annotations

from django.dispatch import Signal

# task: ScheduledTask · run: CurrentRun (name, due_at, started_at, attempt, fence, key) · server: str
task_started = Signal()

# task · run · server · seconds: float
task_succeeded = Signal()

# task · run (None when the process of the run was lost) · server · status: "failed", "timed_out", "lost" or "cancelled"
# (for a newer due time). Sent for each attempt: run.attempt says which.
# error: str (a traceback or a sentence) · exception: the exception, where the run's own process sends it, else None
task_failed = Signal()

# task (None where this server does not declare it) · due_at · reason: "held", "filtered" or "missed"
# holder: the server that had it, or "" · held_since · count: due times given up · server
task_skipped = Signal()

# task · due_at · fence · server. Sent by the server that lost the lease, after it has ended the run.
lease_lost = Signal()

# task (None where this server does not declare it) · command: str, the text of what was run, or the row's name
# cleanup: the CleanupLog row · server: that cleaned up · reason: its reason
ensure_cleanup_executed = Signal()

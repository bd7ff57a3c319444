"""``manage.py work``: django-tasks-db's worker, which can be told to end at any moment without a task being lost."""

from types import FrameType
from typing import Any

from django_tasks_db.management.commands import db_worker


class Worker(db_worker.Worker):
    """
    Ends between two tasks.

    The original exits at once when it is told to while it runs none, which may also be after it has claimed one: that
    task then stays "running" for ever, and nobody runs it.
    """

    def shutdown(self, signum: int, frame: FrameType | None) -> None:
        """Take what was claimed to its end; when told twice, do as the original."""
        if not self.running:
            super().shutdown(signum, frame)
        self.running = False


class Command(db_worker.Command):
    """Works on the queue as db_worker does, with its options."""

    help = "Run a worker that can be drained"

    def handle(self, **options: Any) -> None:
        db_worker.Worker = Worker
        super().handle(**options)

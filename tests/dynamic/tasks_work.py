"""The one task of that project."""

from __future__ import annotations

import time

try:
    from django.tasks import task
except ImportError:
    from django_tasks import task


@task()
def work(begun: str, seconds: float) -> None:
    """Write down that it has begun, and take so long."""
    with open(begun, "w"):
        time.sleep(seconds)

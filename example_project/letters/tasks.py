"""What the queue holds."""

import time

from django.utils import timezone

from .models import Letter

try:
    from django.tasks import TaskContext, task
except ImportError:  # before Django 6.0
    from django_tasks import TaskContext, task


@task(takes_context=True)
def write(context: TaskContext, number: int, seconds: float) -> None:
    """Take so long to write a letter; on purpose, nothing here would notice that it was written before."""
    letter = Letter.objects.create(number=number, worker=context.task_result.worker_ids[-1])
    time.sleep(seconds)
    letter.ended_at = timezone.now()
    letter.save(update_fields=["ended_at"])

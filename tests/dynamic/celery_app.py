"""The Celery app of a project whose workers come and go."""

from __future__ import annotations

import os
import time

from celery import Celery

app = Celery("dynamic", broker=os.environ.get("DYNAMIC_BROKER", "redis://127.0.0.1:1/0"))
app.conf.update(broker_connection_retry_on_startup=True, task_ignore_result=True)


@app.task(name="note")
def note(job: str, seconds: float = 0.0) -> None:
    """Take so long, and write down which job it was, and on which worker."""
    time.sleep(seconds)
    # One write of few bytes: whole lines, whoever else writes.
    with open(os.environ["DYNAMIC_NOTES"], "ab", buffering=0) as file:
        file.write(f"{job} {os.environ['DYNAMIC_WORKER']}\n".encode())


@app.task(name="rationed", rate_limit="1/h")
def rationed(job: str, seconds: float = 0.0) -> None:
    """Do the same, once an hour on each worker."""
    note(job, seconds)

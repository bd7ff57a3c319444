"""A Celery app, and jobs, for workers that tests start: ``LOAD_BROKER`` is where they work."""

from __future__ import annotations

import os
import time

try:
    from celery import Celery
except ImportError:
    pass
else:
    app = Celery("load", broker=os.environ.get("LOAD_BROKER", "memory://"), set_as_current=False)

    @app.task(name="load.wait")
    def wait_as_task() -> None:
        wait()


def wait() -> None:
    """Work until the test is over."""
    time.sleep(120)

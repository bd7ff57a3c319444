"""``manage.py at_once``: decide and reconcile again and again, without asking whether somebody else does just that."""

import random
import signal
import time
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand
from django.db import OperationalError

from multiserver_schedule.declare import discover
from multiserver_schedule.servers import conf, monitor, reconcile, visit
from multiserver_schedule.servers.providers.process import ProcessProvider


class Command(BaseCommand):
    """What no project should do: the scheduler's lock lets one server at a time do it."""

    help = "Decide and reconcile with no lock, to see that nothing depends on it"

    def handle(self, **options: Any) -> None:
        discover()
        # Each sees what another is just about to write down, and waits until that would be over: not for a minute here.
        visit.ANSWERS_WITHIN = timedelta(seconds=3)
        ProcessProvider.timeout = timedelta(seconds=1)
        going = True

        def stop(*_: Any) -> None:
            nonlocal going
            going = False

        signal.signal(signal.SIGTERM, stop)
        while going:
            try:
                monitor.run()
                for provider in conf.load().providers:
                    reconcile.run(provider)
            except (OperationalError, RuntimeError) as error:
                # As a run of the scheduler would fail, and its next one go on.
                self.stderr.write(f"{type(error).__name__}: {error}")
            time.sleep(random.uniform(0.1, 0.6))

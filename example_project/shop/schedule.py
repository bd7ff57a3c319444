"""The shop's tasks."""

import asyncio
import time

from multiserver_schedule import current_run, schedule

schedule.call("shop.rates.refresh", base="EUR").every_five_minutes().ensure_finished(minutes=2)


@schedule.task().every_ten_seconds()
async def watch_stock() -> None:
    """Ask three warehouses at once."""
    await asyncio.gather(*(asyncio.sleep(0.1) for _ in range(3)))


@schedule.task().every_twenty_seconds()
def send_digests() -> None:
    """Take eight seconds, and notice when the lease is lost."""
    run = current_run()
    for _ in range(8):
        time.sleep(1)
        if run:
            run.check()  # raises LeaseLost where another server may have taken over


@schedule.task().every_ten_seconds()
def rebuild_search_index() -> None:
    """Take longer than its period: every second due time is skipped, and the history says who held it."""
    time.sleep(13)


@schedule.task().every_thirty_seconds()
def import_broken_feed() -> None:
    """Fail, so that there is a failure to look at."""
    raise ValueError("the feed has no column 'price'")

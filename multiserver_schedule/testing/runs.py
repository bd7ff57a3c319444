"""For the tests of projects: run what is due at a moment, inline, inside a TestCase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from .. import conf, logs
from ..cycle import Cycle
from ..declare import discover, registry
from ..due import Policy
from ..entries import Status
from ..run.base import Ended
from ..run.inline import InlineRunner
from ..service import stores


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run that ``run_due`` made, or that the task's own conditions prevented (status "skipped")."""

    name: str
    due_at: datetime
    status: Status
    error: str
    output: str


class RunFailed(AssertionError):
    """A task that ``run_due`` ran has failed; the message holds its traceback."""


def run_due(at: datetime, *, only: Iterable[str] | None = None, check: bool = True) -> list[Ran]:
    """
    Run every task that is due at ``at``, one after the other in this process, and return how each went.

    It is the real engine with its clock set to ``at``: filters, signals, history and locks are the same, nothing is
    forked, and the test's own transaction is used. A task is due when it has a due time in the minute up to ``at``, or
    since the last call in the same test; as always, each due time runs once. ``only`` names tasks to run.

    Raises RunFailed for the first task that failed, unless ``check`` is False; ValueError for a naive ``at``.
    """
    if at.tzinfo is None:
        raise ValueError(f"at should be an aware datetime, such as datetime(..., tzinfo=UTC), not {at!r}.")
    at = at.astimezone(timezone.utc)
    settings = conf.load()
    # In the database of the test alone, whose transaction ends with it, whatever locks the tasks have otherwise.
    chosen = settings.locks["default"]
    locks = {"default": chosen if chosen.backend == conf.ORM_LOCK else conf.LockSettings()}
    settings = dataclasses.replace(settings, max_concurrency=10_000, locks=locks)
    discover()
    names = None if only is None else set(only)
    unknown = sorted((names or set()) - set(registry.tasks))
    if unknown:
        raise ValueError(f"No task is named {unknown[0]!r}. Declared are: {', '.join(registry.tasks) or 'none'}.")
    tasks = {
        # Without jitter: who says at=03:00 means what is due at 03:00.
        name: dataclasses.replace(task, lock="default", jitter=None)
        for name, task in registry.tasks.items()
        if (not task.is_ours if names is None else name in names)
    }
    runner = InlineRunner(
        registry.tasks,
        deliver=logs.Teller(tasks=lambda: registry.tasks, verbosity=0),
        server=settings.server_name,
    )
    runner.at_once = None  # one after the other, but claimed together: the clock stands still here
    composed = stores(settings, tasks)
    cycle = Cycle(
        stores=composed,
        runner=runner,
        settings=settings,
        policy=Policy(lease=settings.lease, min_break=timedelta(0), catch_up=settings.catch_up),
        maintenance=conf.is_in_maintenance(settings.maintenance_mode),
    )
    for store in composed:
        store.lock.sync(store.declared, now=at - timedelta(minutes=1))
    done: list[Ran] = []
    runner.start()
    try:
        while True:
            step = cycle.step(now=at)
            messages = runner.poll(0)
            for message in messages:
                if isinstance(message, Ended):
                    claim, outcome = cycle.running[message.owner].claim, message.outcome
                    done.append(
                        Ran(
                            name=claim.occurrence.row,
                            due_at=claim.occurrence.due_at,
                            status=outcome.status,
                            error=outcome.error,
                            output=outcome.output,
                        )
                    )
            cycle.take(messages, now=at)
            if not step.claimed and not messages:
                break
    finally:
        runner.close(0)
    failed = next((ran for ran in done if ran.status not in ("succeeded", "skipped")), None)
    if check and failed is not None:
        raise RunFailed(f"{failed.name} {failed.status}, due at {failed.due_at}:\n{failed.error}")
    return done

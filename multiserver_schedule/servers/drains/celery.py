"""
Celery workers: what they run and have fetched comes to its end, and the other workers do the rest.

What is known of Celery, and what follows from it:

- A worker that shuts down in order (SIGTERM, or ``control.shutdown``) ends what it runs, gives back what it has
  fetched, and answers no question meanwhile. So it is asked while it still listens: its consumers are cancelled, and it
  is waited for. Anybody may ask that again, at any time, and gets the same answer.
- What it has fetched and not begun (``worker_prefetch_multiplier`` for each of its processes) it runs in its turn, and
  is waited for. Tasks that wait for an ETA or a rate limit are not: they may wait for hours, are not acknowledged, and
  go back to their queue when the worker ends.
- A consumer that was cancelled stays so when the worker connects to its broker anew, and is back when its process is
  started anew, as service managers do (``Restart=always``) when a worker ends that they have not stopped. So nobody is
  shut down from here by default: to stop the server does that, and takes a second where there is no work left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from celery import Celery, current_app

from .. import providers
from ..broker import find, limits, refuse_unreadable
from ..entries import MachineState, ServerInfo
from ..exceptions import FleetError
from .base import Drain, state_of

_PLACES: Final = ("name", "key", "type", "provider", "machine_id", "address")


class CeleryDrain(Drain):
    """
    Drains the Celery workers of a server, through the broker.

    ``app`` is the Celery app, or its name as for ``celery --app``; without it, the one that the project's package
    imports. ``worker`` is the name of a server's worker (``celery worker --hostname``), or a callable that returns the
    names of all that run there. ``timeout`` is how long a worker has for an answer, and the broker for a command; a
    worker with the solo pool listens between two tasks only, and cannot be drained.

    With ``shutdown=True`` a worker without work is told to end, too. That is for machines that are cut off and not shut
    down, so that tasks with an ETA are back in their queue at once, and not when the broker notices; and not for
    workers that something starts again.
    """

    def __init__(
        self,
        app: Celery | str | None = None,
        *,
        worker: str | Callable[[ServerInfo], Iterable[str]] = "celery@{name}",
        timeout: timedelta = timedelta(seconds=2),
        shutdown: bool = False,
    ) -> None:
        """Open nothing. Raises FleetError where an argument is wrong."""
        if isinstance(app, str):
            app = find(app, f"CeleryDrain({app!r})")
        if app is not None and not isinstance(app, Celery):
            raise FleetError(f"CeleryDrain() takes a Celery app, or its name as for celery --app; not {app!r}.")
        if isinstance(worker, str):
            try:
                worker.format(**dict.fromkeys(_PLACES, ""))
            except (LookupError, ValueError) as error:
                raise FleetError(
                    f"CeleryDrain(): worker={worker!r} cannot be filled in: {error!r}. "
                    f"Known are {', '.join(f'{{{place}}}' for place in _PLACES)}."
                ) from None
        elif not callable(worker):
            raise FleetError(f"CeleryDrain(): worker should be a text or a callable, not {worker!r}.")
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise FleetError(f"CeleryDrain(): timeout should be a timedelta longer than zero, not {timeout!r}.")
        self._app, self._worker, self._timeout, self._shutdown = app, worker, timeout, shutdown

    def drain(self, server: ServerInfo) -> int:
        """
        Cancel the consumers of its workers, and return how many tasks these run or have fetched.

        0 only when each worker has said that it consumes nothing and, after that, that it has nothing to run. One that
        says nothing may be frozen, cut off, or busy with its last task: TimeoutError, unless the provider says that the
        machine is down.
        """
        workers = self._workers(server)
        try:
            with _control(self._app or current_app, self._timeout) as control:
                return self._drain(workers, control)
        except TimeoutError:
            if server.machine_id and state_of(server, providers.make(server.provider)) is MachineState.STOPPED:
                return 0
            raise

    def _drain(self, workers: list[str], control: _Control) -> int:
        consuming = _queues(control.ask(workers, "active_queues"))
        for queue in sorted(set().union(*consuming.values())):
            control.ask([name for name in workers if queue in consuming[name]], "cancel_consumer", queue=queue)
        if any(consuming.values()):
            # "ok" means that it will. What is fetched before it has done so would be missed below.
            consuming = _queues(control.ask(workers, "active_queues"))
        # In the order in which tasks move on, so that none is missed that does so meanwhile; by id, so counted once.
        jobs: set[str] = set()
        for stage in ("reserved", "active"):
            jobs.update(task["id"] for tasks in control.ask(workers, stage).values() for task in tasks)
        if any(consuming.values()):
            return max(len(jobs), 1)
        if self._shutdown and not jobs:
            control.tell(workers, "shutdown")
            if still := control.answers(workers, "ping"):
                raise RuntimeError(f"{', '.join(sorted(still))} was told to shut down, and still answers.")
        return len(jobs)

    def _workers(self, server: ServerInfo) -> list[str]:
        if isinstance(self._worker, str):
            return [self._worker.format(**{place: getattr(server, place) for place in _PLACES})]
        workers = self._worker(server)
        if isinstance(workers, str) or not (names := list(workers)):
            raise FleetError(f"CeleryDrain(): worker should return a list of names for {server.name}, not {workers!r}.")
        return names


class _Control:
    """Celery's remote control of workers, one question at a time."""

    def __init__(self, mailbox: Any, seconds: float) -> None:
        self._mailbox, self._seconds = mailbox, seconds

    def ask(self, workers: list[str], command: str, **arguments: Any) -> dict[str, Any]:
        """Return what each of them answers. Raises TimeoutError where one does not, naming it."""
        answers = self.answers(workers, command, **arguments)
        if silent := [name for name in workers if name not in answers]:
            raise TimeoutError(f"{', '.join(silent)} did not answer {command!r} within {self._seconds:g} s.")
        for name, answer in answers.items():
            if isinstance(answer, dict) and "error" in answer:
                raise RuntimeError(f"{name} could not do {command!r}: {answer['error']}")
        return answers

    def answers(self, workers: list[str], command: str, **arguments: Any) -> dict[str, Any]:
        """Return what those of them answer that do. To be asked again does no harm to any of the commands here."""
        answers: dict[str, Any] = {}
        until = time.monotonic() + self._seconds
        while silent := [name for name in workers if name not in answers]:
            left = until - time.monotonic()
            if left <= 0:
                break
            # Asked twice: Redis forgets what was said while somebody did not listen. And more often where a late
            # answer to an earlier question comes in between, which the mailbox takes for one that it has waited for.
            for reply in self._mailbox.call(silent, command, arguments, timeout=min(left, self._seconds / 2)):
                answers.update(reply)
        return answers

    def tell(self, workers: list[str], command: str) -> None:
        self._mailbox.cast(workers, command)


@contextmanager
def _control(app: Any, timeout: timedelta) -> Iterator[_Control]:
    """
    Give the control of an app's workers, over a connection of its own.

    Those of the app's pool, and Celery's own commands, try for ever to reach a broker that is away.
    """
    seconds = timeout.total_seconds()
    refuse_unreadable(app.conf.broker_write_url, "CeleryDrain()")
    with app.connection_for_write(connect_timeout=seconds) as connection:
        connection.transport_options.update(max_retries=1, interval_start=0, interval_step=0, interval_max=0)
        connection.transport_options.update(limits(connection.transport.driver_type, seconds))
        mailbox = app.control.mailbox(connection)
        mailbox.producer_pool = _Once(connection)
        yield _Control(mailbox, seconds)


class _Once:
    """What looks like a pool of producers to a mailbox: on this connection, and without a second attempt."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @contextmanager
    def acquire(self) -> Iterator[Any]:
        producer = self._connection.Producer(self._connection.default_channel, auto_declare=False)
        publish = producer.publish
        producer.publish = lambda *args, **options: publish(*args, **{**options, "retry": False})
        yield producer


def _queues(answers: Mapping[str, Any]) -> dict[str, set[str]]:
    return {name: {queue["name"] for queue in queues} for name, queues in answers.items()}

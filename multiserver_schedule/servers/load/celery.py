"""The load of Celery, on Redis and on RabbitMQ."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from amqp.exceptions import NotFound
from celery import Celery, current_app
from celery.app.control import Control

from ..broker import LIMITED_BY, find, limits, refuse_unreadable
from ..entries import Load
from ..exceptions import FleetError
from ..hiding import unreadable
from .base import ANSWERS_WITHIN, Queue, by_server, longest_wait

_SECONDS: Final = ANSWERS_WITHIN.total_seconds()
_MOST_UNACKED: Final = 10_000
"""More messages than these in workers' hands are not read through: they would be as many megabytes."""


def stamp(headers: Mapping[str, Any] | None = None, properties: dict[str, Any] | None = None, **_: Any) -> None:
    """
    Write into a message since when it waits, which neither Celery nor Redis or RabbitMQ do. Connect it where tasks are
    sent from, so in the module of the Celery app::

        celery.signals.before_task_publish.connect(stamp)

    It is AMQP's ``timestamp``, in whole seconds and by the clock of whoever sends; for a task with an ``eta``, that.
    """
    if properties is not None:
        now = datetime.now(timezone.utc)
        properties.setdefault("timestamp", int(max(now, _moment((headers or {}).get("eta")) or now).timestamp()))


class CeleryQueue(Queue):
    """
    The messages of these queues of Celery: CeleryQueue("default", "mail").

    ``app`` is the Celery app, or its name as for ``celery --app``; without it, the one that the project's package
    imports. ``broker`` is the URL of another broker or virtual host than the app's.

    ``waiting`` is what the broker has not yet given to a worker. Workers take some in advance, four for each of their
    processes unless ``worker_prefetch_multiplier`` says otherwise, and then those are ``running``:

    - Redis tells of those that no worker has acknowledged: the ones taken in advance, and with ``task_acks_late`` the
      ones that run; none with an ``eta`` to come. Without it, and without ``inspect``, that there are none does not say
      that none runs, and is not told. Those that a killed worker had are among them until Celery's
      ``visibility_timeout`` is over. It can't tell where there are more than 10,000 of them, in all queues.
    - RabbitMQ tells how many are unacknowledged, those for later too and up to five seconds late, where its management
      plug-in is on and ``management`` is its URL: "https://user:password@10.0.0.2:15671".
    - Workers tell what they have, and which of them has how much, where ``inspect`` is True; it takes two seconds. A
      worker is named after its server by ``celery worker --hostname <name>@<server>``.

    ``oldest`` is known where messages bear a time, which ``stamp`` gives them; on RabbitMQ ``management`` is needed as
    well, and a quorum queue may not tell. Messages are never taken out to be looked at.
    """

    def __init__(
        self,
        *names: str,
        app: Celery | str | None = None,
        broker: str | None = None,
        inspect: bool = False,
        management: str | None = None,
    ) -> None:
        super().__init__(*names)
        if management is not None and (wrong := unreadable(management)):
            raise FleetError(f"{self!r}: management {wrong}")
        if management is not None and urlsplit(management).scheme not in ("http", "https"):
            # Without showing it: a password is in it.
            raise FleetError(f"{self!r}: management should be a URL such as 'https://user:password@10.0.0.2:15671'.")
        self._app, self._broker, self._inspect, self._management = app, broker, inspect, management

    def load(self) -> Load:
        app = self._find_app()
        refuse_unreadable(self._broker or app.conf.broker_read_url, repr(self))
        connection = app.connection_for_read(self._broker, connect_timeout=_SECONDS)
        kind = connection.get_transport_cls().driver_type
        if kind not in LIMITED_BY:
            raise FleetError(
                f"{self!r} can't ask a broker of the kind {kind!r}: it knows Redis and RabbitMQ. Give scale_on() a "
                "callable of your own that returns a Load."
            )
        if self._management and kind != "amqp":
            raise FleetError(f"{self!r}: management is RabbitMQ's, and the broker is of the kind {kind!r}.")
        connection.transport_options = {**connection.transport_options, **limits(kind, _SECONDS)}
        try:
            # Each of the broker's addresses is tried once.
            connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0))
            load = self._on_redis(app, connection) if kind == "redis" else self._on_rabbitmq(connection)
            answer = self._with_workers(app, connection, load) if self._inspect else load
            connection.release()
            return answer
        finally:
            # Without a word to a broker that may not answer.
            connection.collect()

    def _on_redis(self, app: Celery, connection: Any) -> Load:
        channel: Any = connection.default_channel
        prefix = channel.global_keyprefix
        with channel.conn_or_acquire() as redis:
            # Kombu's would put it before the keys of some commands, and not of others.
            redis.global_keyprefix = ""
        keys = [
            f"{prefix}{name}{channel.sep}{step}" if step else f"{prefix}{name}"
            for name in self.names
            for step in channel.priority_steps
        ]
        with redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.llen(key)
                # The end that workers take from.
                pipe.lindex(key, -1)
            pipe.hlen(prefix + channel.unacked_key)
            *found, unacked = pipe.execute()
        since = [moment for moment in map(_sent_at, found[1::2]) if moment]
        waiting = sum(found[0::2])
        running: int | None = 0
        if unacked > _MOST_UNACKED:
            running = None
        elif unacked:
            # By their tags: one may be shown twice.
            messages = dict(redis.hscan_iter(prefix + channel.unacked_key, count=200))
            running = sum(self._is_begun(app, *json.loads(message)) for message in messages.values())
        if not running and not (app.conf.task_acks_late or self._inspect):
            # Workers acknowledge a message when they begin it: what runs is not seen here.
            running = None
        now = datetime.now(timezone.utc)
        return Load(waiting, longest_wait(since, now) if since or not waiting else None, running)

    def _on_rabbitmq(self, connection: Any) -> Load:
        waiting = 0
        for name in self.names:
            try:
                # A channel for each: the answer that there is no such queue is also the channel's end.
                waiting += connection.channel().queue_declare(queue=name, passive=True).message_count
            except NotFound:
                continue
        if not self._management:
            return Load(waiting, None if waiting else timedelta(0))
        queues = [queue for name in self.names if (queue := self._managed(connection.virtual_host, name))]
        since = [
            datetime.fromtimestamp(queue["head_message_timestamp"], timezone.utc)
            for queue in queues
            if queue.get("head_message_timestamp")
        ]
        now = datetime.now(timezone.utc)
        return Load(
            waiting,
            # It is behind: what it says of a queue that is empty by now is over.
            timedelta(0) if not waiting else longest_wait(since, now) if since else None,
            sum(queue.get("messages_unacknowledged", 0) for queue in queues),
        )

    def _managed(self, virtual_host: str, queue: str) -> dict[str, Any]:
        """Return what the management plug-in says of a queue; nothing where it knows of none."""
        url = urlsplit(str(self._management))
        user = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
        path = f"{url.path.rstrip('/')}/api/queues/{quote(virtual_host or '/', safe='')}/{quote(queue, safe='')}"
        request = Request(  # noqa: S310  Its scheme was looked at when it was given.
            f"{url.scheme}://{url.netloc.rpartition('@')[2]}{path}",
            headers={"Authorization": f"Basic {b64encode(user.encode()).decode()}"},
        )
        try:
            with urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
                found: dict[str, Any] = json.load(answer)
                return found
        except HTTPError as error:
            with error:
                if error.code == 404:
                    return {}
                raise

    def _with_workers(self, app: Celery, connection: Any, load: Load) -> Load:
        """Add what the workers say that they have."""
        told = [*self._tasks(app, connection, "active"), *self._tasks(app, connection, "reserved")]
        sent = [task.get("delivery_info") or {} for _, tasks in told for task in tasks]
        ours = sum(self._leads_here(app, way.get("exchange"), way.get("routing_key")) for way in sent)
        return replace(
            load,
            # Neither sees all: the broker none that was acknowledged, and a worker may be too busy to answer.
            running=max(load.running or 0, ours),
            busy=by_server((worker, len(tasks)) for worker, tasks in told),
        )

    def _tasks(self, app: Celery, connection: Any, which: str) -> list[tuple[str, list[dict[str, Any]]]]:
        """Return, with their workers, the tasks that those which answer within a second say that they have."""
        control = Control(app)
        # It would ask through a connection of the app's own: to another broker perhaps, and one that may hang.
        control.mailbox.producer_pool = None
        answers = control.broadcast(which, reply=True, timeout=1.0, connection=connection) or []
        return [(worker, tasks) for answer in answers for worker, tasks in answer.items() if isinstance(tasks, list)]

    def _is_begun(self, app: Celery, message: dict[str, Any], exchange: str, routing_key: str) -> bool:
        """Is this message, which a worker has, of one of these queues, and not for later?"""
        eta = _moment(message["headers"].get("eta"))
        return (eta is None or eta <= datetime.now(timezone.utc)) and self._leads_here(app, exchange, routing_key)

    def _leads_here(self, app: Celery, exchange: str | None, routing_key: str | None) -> bool:
        """Is what was sent so in one of these queues? Messages bear where they were sent, and not where that led."""
        if not exchange:
            return routing_key in self.names
        queues = [app.amqp.queues[name] for name in self.names if name in app.amqp.queues]
        return any(
            queue.exchange is not None
            and queue.exchange.name == exchange
            and re.fullmatch(_pattern(queue.routing_key or ""), routing_key or "")
            for queue in queues
        )

    def _find_app(self) -> Celery:
        if isinstance(self._app, str):
            return find(self._app, f"{self!r}: there is no Celery app {self._app!r}")
        if self._app is not None:
            return self._app
        if current_app.main == "default" and not current_app.set_as_current:
            # Celery would make up one, with a broker on this machine.
            raise FleetError(f"{self!r}: no Celery app has been imported here. Name it: app='shop.celery'.")
        return current_app


def _pattern(routing_key: str) -> str:
    """Return what a topic exchange's words mean as a regular expression; other exchanges have no such words."""
    words = {"*": "[^.]+", "#": ".*"}
    return r"\.".join(words.get(word, re.escape(word)) for word in routing_key.split("."))


def _moment(text: str | None) -> datetime | None:
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _sent_at(message: bytes | None) -> datetime | None:
    """Return the time that a message in Redis bears, if there is one."""
    seconds = json.loads(message)["properties"].get("timestamp") if message else None
    return datetime.fromtimestamp(seconds, timezone.utc) if isinstance(seconds, (int, float)) else None

"""The load of RQ."""

from __future__ import annotations

from datetime import datetime, timezone

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue as RedisQueue
from rq import Worker
from rq.connections import parse_connection
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.utils import str_to_date

from ..entries import Load
from ..exceptions import FleetError
from ..hiding import unreadable
from .base import ANSWERS_WITHIN, Queue, by_server, longest_wait


class RQQueue(Queue):
    """
    The jobs of these queues of RQ: RQQueue("default", "mail", connection="redis://10.0.0.2:6379/0").

    ``connection`` is a URL, or a ``redis.Redis`` whose settings are used, but for its times: no answer is waited for
    longer than two seconds. Jobs that are scheduled for later are not waiting before RQ puts them into the queue.

    Give a worker the name of its server: ``rq worker --name <name>``. A worker is busy whatever queue its job is from.
    """

    def __init__(self, *names: str, connection: Redis | str) -> None:
        super().__init__(*names)
        self._connection = connection

    def load(self) -> Load:
        connection = self._connect()
        try:
            return self._load(connection)
        finally:
            connection.connection_pool.disconnect()

    def _load(self, connection: Redis) -> Load:
        queues = [RedisQueue(name, connection=connection) for name in self.names]
        now = datetime.now(timezone.utc)
        with connection.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.llen(queue.key)
                pipe.lindex(queue.key, 0)
                # Its own count would clean up first. An entry that is not renewed in time was a killed worker's.
                pipe.zcount(StartedJobRegistry(queue=queue).key, now.timestamp(), "+inf")
            found = pipe.execute()
            for first in found[1::3]:
                # Not as a job, whose contents would be read too.
                pipe.hget(Job.key_for(first.decode() if first else ""), "enqueued_at")
            since = [str_to_date(moment) for moment in pipe.execute() if moment]
        workers = {worker.name: worker for queue in queues for worker in Worker.all(queue=queue)}
        waiting = sum(found[0::3])
        return Load(
            waiting=waiting,
            # The first of a queue may have been deleted, with its time, and its name be left.
            oldest=longest_wait(since, now) if since or not waiting else None,
            running=sum(found[2::3]),
            busy=by_server((name, int(worker.get_state() == "busy")) for name, worker in workers.items()),
        )

    def _connect(self) -> Redis:
        given = self._connection
        if isinstance(given, str):
            if wrong := unreadable(given):
                raise FleetError(f"{self!r}: its connection {wrong}")
            given = Redis.from_url(given)
        _, kind, settings = parse_connection(given)
        seconds = ANSWERS_WITHIN.total_seconds()
        settings.update(
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
        )
        return Redis(connection_pool=ConnectionPool(connection_class=kind, **settings))

"""RQ. Its workers are in test_load_processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from multiserver_schedule.servers.entries import Load
from tests import servers

from .brokers import marks_of, raises_within
from .load_jobs import wait
from .needs import needs

rq = needs("rq")
redis = needs("redis")

from multiserver_schedule.servers.load.rq import RQQueue  # noqa: E402

pytestmark = marks_of("redis")
MINUTE = timedelta(minutes=1)


@pytest.fixture
def server(cache_server: Callable[[str], servers.Server]) -> servers.Server:
    server = cache_server("redis")
    server.reset()
    return server


@pytest.fixture
def connection(server: servers.Server) -> Any:
    with redis.Redis.from_url(server.url) as connection:
        yield connection


def enqueue(connection: Any, queue: str, count: int = 1, *, since: timedelta | None = None) -> Any:
    """Put in jobs, of which each was, if that is said, put in so long ago."""
    for _ in range(count):
        job = rq.Queue(queue, connection=connection).enqueue(wait)
        if since is not None:
            moment = rq.utils.utcformat(datetime.now(timezone.utc) - since)
            connection.hset(rq.job.Job.key_for(job.id), "enqueued_at", moment)
    return job if count else None


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_jobs_are_counted_exactly(connection: Any, server: servers.Server, count: int) -> None:
    enqueue(connection, "default", count)
    enqueue(connection, "other")
    assert RQQueue("default", connection=server.url).load().waiting == count


def test_several_queues_are_added(connection: Any, server: servers.Server) -> None:
    enqueue(connection, "default", 2)
    enqueue(connection, "mail", 3)
    assert RQQueue("default", "mail", connection=server.url).load().waiting == 5


def test_a_queue_that_is_not_there_yet_is_empty(server: servers.Server) -> None:
    assert RQQueue("nobody-sent-here", connection=server.url).load() == Load(0, timedelta(0), 0)


def test_the_first_job_tells_for_how_long_work_has_waited(connection: Any, server: servers.Server) -> None:
    enqueue(connection, "default", since=7 * MINUTE)
    enqueue(connection, "default", since=8 * MINUTE - 7 * MINUTE)
    load = RQQueue("default", connection=server.url).load()
    assert load.oldest is not None and 7 * MINUTE <= load.oldest < 8 * MINUTE


def test_the_longest_wait_is_found_in_whatever_queue_it_is(connection: Any, server: servers.Server) -> None:
    enqueue(connection, "default", since=MINUTE)
    enqueue(connection, "mail", since=9 * MINUTE)
    load = RQQueue("default", "mail", connection=server.url).load()
    assert load.oldest is not None and 9 * MINUTE <= load.oldest < 10 * MINUTE


def test_a_job_that_is_scheduled_for_later_does_not_wait_yet(connection: Any, server: servers.Server) -> None:
    rq.Queue("default", connection=connection).enqueue_in(5 * MINUTE, wait)
    assert RQQueue("default", connection=server.url).load().waiting == 0


def test_a_deleted_jobs_name_in_the_queue_does_not_tell_a_time(connection: Any, server: servers.Server) -> None:
    job = enqueue(connection, "default")
    connection.delete(rq.job.Job.key_for(job.id))
    assert RQQueue("default", connection=server.url).load() == Load(waiting=1, oldest=None, running=0)


def test_a_killed_workers_job_is_not_running_for_ever(connection: Any, server: servers.Server) -> None:
    started = rq.registry.StartedJobRegistry("default", connection=connection)
    connection.zadd(started.key, {"lives:1": time.time() + 60, "was-killed:1": time.time() - 60, "endless:1": "+inf"})
    assert RQQueue("default", connection=server.url).load().running == 2
    assert connection.zcard(started.key) == 3


def test_a_connection_may_be_given_in_place_of_a_url(connection: Any, server: servers.Server) -> None:
    enqueue(connection, "default", 2)
    given = redis.Redis.from_url(server.url, decode_responses=True)
    assert RQQueue("default", connection=given).load().waiting == 2
    assert given.connection_pool.connection_kwargs["decode_responses"] is True


def test_a_socket_may_be_given_in_place_of_an_address(connection: Any, server: servers.Server) -> None:
    server.restart(unixsocket=str(server.folder / "socket"))
    enqueue(connection, "default", 2)
    given = redis.Redis(unix_socket_path=str(server.folder / "socket"), password=server.password)
    assert RQQueue("default", connection=given).load().waiting == 2


def test_a_redis_that_is_down_is_an_error_at_once(server: servers.Server) -> None:
    server.crash()
    with raises_within(5, redis.ConnectionError) as caught:
        RQQueue("default", connection=server.url).load()
    assert server.password not in str(caught.value)


def test_a_redis_that_does_not_answer_is_an_error_within_seconds(server: servers.Server) -> None:
    server.freeze()
    with raises_within(5, redis.TimeoutError):
        RQQueue("default", connection=redis.Redis.from_url(server.url, socket_timeout=600)).load()


def test_no_connection_is_left_open(server: servers.Server) -> None:
    def clients() -> set[str]:
        return {line.split()[0] for line in server.call("CLIENT", "LIST").splitlines() if "cmd=client" not in line}

    before = clients()
    RQQueue("default", connection=server.url).load()
    assert clients() <= before

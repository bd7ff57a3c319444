"""The load of queues that real workers serve, and all that needs a RabbitMQ: that takes some seconds to start."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from multiserver_schedule.servers.entries import Load
from tests import servers

from .brokers import eventually, marks_of, open_sockets, raises_within, worker
from .needs import needs

celery = needs("celery")
kombu = needs("kombu")
redis = needs("redis")
rq = needs("rq")

from multiserver_schedule.servers.load.celery import CeleryQueue  # noqa: E402
from multiserver_schedule.servers.load.rq import RQQueue  # noqa: E402

from .load_jobs import wait  # noqa: E402

MINUTE = timedelta(minutes=1)
RABBITMQ = marks_of("rabbitmq")


@pytest.fixture(scope="module")
def rabbitmq_server() -> Iterator[servers.Server]:
    with servers.start("rabbitmq") as server:
        # Its port mapper is not its own child.
        pids = {*server.pids(), *servers._descendants(server._supervisor.pid)}
        yield server
    assert not [pid for pid in pids if servers._exists(pid)]
    assert not server.folder.exists()


@pytest.fixture
def rabbitmq(rabbitmq_server: servers.Server) -> servers.Server:
    rabbitmq_server.thaw()
    return rabbitmq_server


@pytest.fixture
def redis_server(cache_server: Callable[[str], servers.Server]) -> servers.Server:
    server = cache_server("redis")
    server.reset()
    return server


@pytest.fixture(params=[pytest.param("redis", marks=marks_of("redis")), pytest.param("rabbitmq", marks=RABBITMQ)])
def broker(request: pytest.FixtureRequest) -> servers.Server:
    server: servers.Server = request.getfixturevalue("redis_server" if request.param == "redis" else "rabbitmq")
    return server


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> str:
    """Return the name of a queue that no other test uses: RabbitMQ is not emptied."""
    return request.node.name.replace("[", "-").replace("]", "")[:100]


def app_on(broker: servers.Server) -> Any:
    return celery.Celery("shop", broker=broker.url, set_as_current=False)


def send(app: Any, queue: str, count: int = 1, *, task: str = "load.wait", **options: Any) -> None:
    with app.connection_for_write() as connection:
        for _ in range(count):
            app.send_task(task, queue=queue, connection=connection, **options)


def ago(**times: float) -> int:
    return int((datetime.now(timezone.utc) - timedelta(**times)).timestamp())


def celery_worker(broker: servers.Server, queue: str, name: str) -> Any:
    return worker(
        *("celery", "-A", "tests.dynamic.load_jobs", "worker", "-Q", queue, "--hostname", name),
        *("--pool", "threads", "--concurrency", "1"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        LOAD_BROKER=broker.url,
    )


# --- RabbitMQ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [pytest.param(count, marks=RABBITMQ) for count in (0, 1, 1000)])
def test_messages_in_rabbitmq_are_counted_exactly(rabbitmq: servers.Server, queue: str, count: int) -> None:
    app = app_on(rabbitmq)
    send(app, queue, count)
    send(app, f"{queue}-other")
    eventually(lambda: CeleryQueue(queue, app=app).load().waiting == count, seconds=5)


@RABBITMQ[0]
def test_several_queues_in_rabbitmq_are_added_and_one_that_is_not_there_is_empty(
    rabbitmq: servers.Server, queue: str
) -> None:
    app = app_on(rabbitmq)
    send(app, queue, 2)
    send(app, f"{queue}-mail", 3)
    names = ("nobody-sent-here", queue, "nor-here", f"{queue}-mail")
    eventually(lambda: CeleryQueue(*names, app=app).load().waiting == 5, seconds=5)
    assert CeleryQueue("nobody-sent-here", app=app).load() == Load(waiting=0, oldest=timedelta(0))


@RABBITMQ[0]
def test_a_message_in_rabbitmq_that_a_worker_has_taken_no_longer_waits(rabbitmq: servers.Server, queue: str) -> None:
    app = app_on(rabbitmq)
    send(app, queue, 3)
    with app.connection_for_read() as connection:
        eventually(lambda: connection.default_channel.basic_get(queue) is not None)
        source = CeleryQueue(queue, app=app, management=rabbitmq.kind.management_url)
        eventually(lambda: source.load().running == 1)
        assert source.load().waiting == 2
    assert CeleryQueue(queue, app=app).load().running is None


@RABBITMQ[0]
def test_rabbitmqs_management_tells_for_how_long_work_has_waited(rabbitmq: servers.Server, queue: str) -> None:
    app = app_on(rabbitmq)
    send(app, queue, timestamp=ago(minutes=7))
    send(app, queue, timestamp=ago(minutes=1))
    source = CeleryQueue(queue, "nobody-sent-here", app=app, management=rabbitmq.kind.management_url)
    # Its figures come late.
    eventually(lambda: source.load().oldest is not None)
    oldest = source.load().oldest
    assert oldest is not None and 7 * MINUTE <= oldest < 8 * MINUTE
    assert CeleryQueue(queue, app=app).load().oldest is None


@RABBITMQ[0]
def test_another_virtual_host_is_another_broker(rabbitmq: servers.Server, queue: str) -> None:
    app = app_on(rabbitmq)
    send(app, queue)
    assert CeleryQueue(queue, app=app, broker=rabbitmq.url).load().waiting == 1
    # It has but the one, and says so.
    with raises_within(5, Exception) as caught:
        CeleryQueue(queue, app=app, broker=f"{rabbitmq.url}-of-nobody").load()
    assert "vhost" in str(caught.value) and rabbitmq.password not in str(caught.value)


@RABBITMQ[0]
def test_a_wrong_password_of_the_management_is_an_error_that_does_not_show_it(
    rabbitmq: servers.Server, queue: str
) -> None:
    app = app_on(rabbitmq)
    send(app, queue)
    url = rabbitmq.kind.management_url.replace(rabbitmq.password, "hunter2")
    with raises_within(5, OSError) as caught:
        CeleryQueue(queue, app=app, management=url).load()
    assert "401" in str(caught.value) and "hunter2" not in str(caught.value)


@RABBITMQ[0]
def test_a_rabbitmq_that_does_not_answer_is_an_error_within_seconds(rabbitmq: servers.Server) -> None:
    rabbitmq.freeze()
    try:
        with raises_within(5, kombu.exceptions.OperationalError):
            CeleryQueue("default", app=app_on(rabbitmq)).load()
    finally:
        rabbitmq.thaw()


@RABBITMQ[0]
def test_a_rabbitmq_that_stops_answering_in_between_is_an_error_within_seconds(
    rabbitmq: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = CeleryQueue._on_rabbitmq

    def frozen(self: CeleryQueue, *connected: Any) -> Load:
        rabbitmq.freeze()
        return ask(self, *connected)

    monkeypatch.setattr(CeleryQueue, "_on_rabbitmq", frozen)
    before = open_sockets(rabbitmq.port)
    try:
        with raises_within(5, OSError) as caught:
            CeleryQueue("default", app=app_on(rabbitmq)).load()
    finally:
        rabbitmq.thaw()
    assert caught.value is not None and open_sockets(rabbitmq.port) == before


def test_a_rabbitmq_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"amqp://shop:hunter2@127.0.0.1:{nobody.getsockname()[1]}/"
        app = celery.Celery("shop", broker=url, set_as_current=False)
        with raises_within(5, kombu.exceptions.OperationalError) as caught:
            CeleryQueue("default", app=app).load()
    assert "hunter2" not in str(caught.value)


@RABBITMQ[0]
def test_no_connection_to_a_rabbitmq_is_left_open(rabbitmq: servers.Server, queue: str) -> None:
    app = app_on(rabbitmq)
    send(app, queue)
    before = open_sockets(rabbitmq.port)
    CeleryQueue(queue, app=app, inspect=True).load()
    assert open_sockets(rabbitmq.port) == before


# --- workers --------------------------------------------------------------------------------------------------------


def test_what_workers_have_is_running_and_their_servers_are_busy_or_idle(broker: servers.Server, queue: str) -> None:
    app = app_on(broker)
    send(app, queue, 10)
    with (
        celery_worker(broker, queue, "mail@web1.internal"),
        celery_worker(broker, f"{queue}-idle", "mail@web2"),
    ):
        # One runs, and has been acknowledged; four are taken in advance.
        management = broker.kind.management_url if broker.name == "rabbitmq" else None
        untold = CeleryQueue(queue, app=app, management=management)
        eventually(lambda: untold.load().running == 4)
        assert untold.load().busy == {}
        told = CeleryQueue(queue, app=app, inspect=True)
        eventually(lambda: told.load() == Load(waiting=5, running=5, busy={"web1": 5, "web2": 0}))
        # A queue of another name has none of them, and the worker is busy nevertheless.
        other = CeleryQueue("other", app=app, inspect=True).load()
        assert (other.running, other.busy) == (0, {"web1": 5, "web2": 0})


@marks_of("redis")[0]
def test_a_job_that_a_worker_of_rq_has_is_running_and_its_server_busy(redis_server: servers.Server) -> None:
    with redis.Redis.from_url(redis_server.url) as connection:
        for _ in range(3):
            rq.Queue("default", connection=connection).enqueue(wait)
        source = RQQueue("default", "mail", connection=redis_server.url)
        with (
            worker("rq.cli", "worker", "--url", redis_server.url, "--name", "2@web1", "default", "mail"),
            worker("rq.cli", "worker", "--url", redis_server.url, "--name", "web2", "mail"),
        ):
            eventually(lambda: source.load().busy == {"web1": 1, "web2": 0})
            load = source.load()
        assert (load.waiting, load.running) == (2, 1)

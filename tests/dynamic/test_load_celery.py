"""Celery on Redis. RabbitMQ, and workers, are in test_load_processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from multiserver_schedule.servers.entries import Load
from multiserver_schedule.servers.exceptions import FleetError
from tests import servers

from .brokers import marks_of, open_sockets, raises_within
from .needs import needs

celery = needs("celery")
kombu = needs("kombu")
needs("redis")

from multiserver_schedule.servers.load import celery as source  # noqa: E402
from multiserver_schedule.servers.load.celery import CeleryQueue, stamp  # noqa: E402

pytestmark = marks_of("redis")
MINUTE = timedelta(minutes=1)


@pytest.fixture
def redis(cache_server: Callable[[str], servers.Server]) -> servers.Server:
    server = cache_server("redis")
    server.reset()
    return server


@pytest.fixture
def app(redis: servers.Server) -> Any:
    return celery.Celery("shop", broker=redis.url, set_as_current=False)


def send(app: Any, queue: str, count: int = 1, **options: Any) -> None:
    with app.connection_for_write() as connection:
        for _ in range(count):
            app.send_task("shop.resize", queue=queue, connection=connection, **options)


def ago(**times: float) -> int:
    return int((datetime.now(timezone.utc) - timedelta(**times)).timestamp())


@contextmanager
def taken(app: Any, *queues: str) -> Iterator[None]:
    """Take a message from each of the queues, as a worker does, and acknowledge none."""
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        assert all(channel.basic_get(queue) for queue in queues)
        yield


@pytest.fixture
def stamped() -> Iterator[None]:
    celery.signals.before_task_publish.connect(stamp)
    yield
    celery.signals.before_task_publish.disconnect(stamp)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_messages_are_counted_exactly(app: Any, count: int) -> None:
    send(app, "default", count)
    send(app, "other")
    assert CeleryQueue("default", app=app).load().waiting == count


def test_messages_of_every_priority_are_counted(app: Any) -> None:
    for priority in range(10):
        send(app, "default", priority=priority)
    assert CeleryQueue("default", app=app).load().waiting == 10


def test_priorities_of_the_projects_own_are_counted(redis: servers.Server) -> None:
    app = celery.Celery("shop", broker=redis.url, set_as_current=False)
    app.conf.broker_transport_options = {"priority_steps": [0, 1, 2], "sep": ":"}
    for priority in range(3):
        send(app, "default", priority=priority)
    assert CeleryQueue("default", app=app).load().waiting == 3


def test_several_queues_are_added(app: Any) -> None:
    send(app, "default", 2)
    send(app, "mail", 3)
    assert CeleryQueue("default", "mail", app=app).load().waiting == 5


def test_a_queue_that_is_not_there_yet_is_empty(app: Any) -> None:
    assert CeleryQueue("nobody-sent-here", app=app).load() == Load(waiting=0, oldest=timedelta(0))


def test_each_database_of_a_redis_is_a_broker_of_its_own(app: Any, redis: servers.Server) -> None:
    send(app, "default", 2)
    assert CeleryQueue("default", app=app, broker=redis.url).load().waiting == 2
    assert CeleryQueue("default", app=app, broker=redis.url.replace("/0", "/1")).load().waiting == 0


def test_a_key_prefix_is_heeded(redis: servers.Server) -> None:
    app = celery.Celery("shop", broker=redis.url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "shop-"}
    send(app, "default", 2, timestamp=ago(minutes=5))
    with taken(app, "default"):
        load = CeleryQueue("default", app=app).load()
    assert (load.waiting, load.running) == (1, 1)
    assert load.oldest is not None and 5 * MINUTE <= load.oldest < 6 * MINUTE


def test_the_first_message_tells_for_how_long_work_has_waited(app: Any) -> None:
    send(app, "default", timestamp=ago(minutes=7))
    send(app, "default", timestamp=ago(minutes=1))
    load = CeleryQueue("default", app=app).load()
    assert load.oldest is not None and 7 * MINUTE <= load.oldest < 8 * MINUTE


def test_the_longest_wait_is_found_at_whatever_priority_and_queue_it_is(app: Any) -> None:
    send(app, "default", timestamp=ago(minutes=1))
    send(app, "default", timestamp=ago(minutes=2), priority=9)
    send(app, "mail", timestamp=ago(minutes=9), priority=6)
    load = CeleryQueue("default", "mail", app=app).load()
    assert load.oldest is not None and 9 * MINUTE <= load.oldest < 10 * MINUTE


def test_a_stamped_message_tells_when_it_was_sent(app: Any, stamped: None) -> None:
    began = time.time()
    send(app, "default")
    load = CeleryQueue("default", app=app).load()
    assert load.oldest is not None
    # It is kept in whole seconds.
    assert load.oldest <= timedelta(seconds=1 + time.time() - began)


def test_a_message_for_later_waits_from_then_on(app: Any, stamped: None) -> None:
    send(app, "default", eta=datetime.now(timezone.utc) + 5 * MINUTE)
    load = CeleryQueue("default", app=app).load()
    assert (load.waiting, load.oldest) == (1, timedelta(0))


def test_an_eta_that_is_over_counts_from_when_it_was_sent() -> None:
    properties: dict[str, Any] = {}
    stamp(headers={"eta": "2020-01-01T00:00:00"}, properties=properties)
    assert ago(seconds=5) <= properties["timestamp"] <= ago()


def test_a_stamp_leaves_the_senders_own_alone() -> None:
    properties = {"timestamp": 5}
    stamp(headers={}, properties=properties)
    assert properties == {"timestamp": 5}


def test_messages_that_bear_no_time_cannot_tell_for_how_long_they_have_waited(app: Any) -> None:
    send(app, "default")
    assert CeleryQueue("default", app=app).load().oldest is None


def test_messages_in_workers_hands_are_shown_as_running(app: Any) -> None:
    send(app, "default", 3)
    send(app, "mail", 2)
    with taken(app, "default", "default", "mail"):
        assert CeleryQueue("default", app=app).load() == Load(waiting=1, running=2)
        assert CeleryQueue("mail", app=app).load() == Load(waiting=1, running=1)
        assert CeleryQueue("default", "mail", app=app).load() == Load(waiting=2, running=3)


def test_a_message_for_later_in_a_workers_hands_is_not_running(app: Any) -> None:
    send(app, "default", eta=datetime.now(timezone.utc) + 5 * MINUTE)
    send(app, "default", eta=datetime.now(timezone.utc) - 5 * MINUTE)
    with taken(app, "default", "default"):
        assert CeleryQueue("default", app=app).load() == Load(waiting=0, oldest=timedelta(0), running=1)


def test_whether_anything_runs_is_not_known_where_messages_are_acknowledged_before_they_are_worked_on(app: Any) -> None:
    assert CeleryQueue("default", app=app).load().running is None
    assert CeleryQueue("default", app=app, inspect=True).load().running == 0
    app.conf.task_acks_late = True
    assert CeleryQueue("default", app=app).load().running == 0


@pytest.mark.parametrize(("key", "running"), [("video.cut", 1), ("video.cut.again", None), ("audio.cut", None)])
def test_a_message_that_was_sent_through_an_exchange_is_found(app: Any, key: str, running: int | None) -> None:
    media = kombu.Exchange("media", type="topic")
    app.conf.task_queues = [
        kombu.Queue("video", media, routing_key="video.*"),
        kombu.Queue("all", media, routing_key="#"),
    ]
    with app.connection_for_write() as connection:
        for queue in app.amqp.queues.values():
            queue(connection).declare()
        app.send_task("shop.resize", queue="all", routing_key=key, connection=connection)
    with taken(app, "all"):
        assert CeleryQueue("video", app=app).load().running == running
        assert CeleryQueue("all", app=app).load().running == 1


def test_more_messages_in_workers_hands_than_can_be_read_are_not_told(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_MOST_UNACKED", 1)
    send(app, "default", 3)
    with taken(app, "default", "default"):
        assert CeleryQueue("default", app=app).load() == Load(waiting=1, running=None)


def test_with_no_worker_to_ask_nobody_is_busy(app: Any) -> None:
    send(app, "default")
    assert CeleryQueue("default", app=app, inspect=True).load() == Load(waiting=1, running=0, busy={})


def test_a_broker_that_is_down_is_an_error_at_once(app: Any, redis: servers.Server) -> None:
    redis.crash()
    with raises_within(5, kombu.exceptions.OperationalError) as caught:
        CeleryQueue("default", app=app).load()
    assert redis.password not in str(caught.value)


def test_a_broker_that_does_not_answer_is_an_error_within_seconds(app: Any, redis: servers.Server) -> None:
    redis.freeze()
    with raises_within(5, kombu.exceptions.OperationalError):
        CeleryQueue("default", app=app).load()


def test_a_broker_that_stops_answering_in_between_is_an_error_within_seconds(
    app: Any, redis: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = CeleryQueue._on_redis

    def frozen(self: CeleryQueue, *connected: Any) -> Load:
        redis.freeze()
        return ask(self, *connected)

    monkeypatch.setattr(CeleryQueue, "_on_redis", frozen)
    before = open_sockets(redis.port)
    with raises_within(5, Exception) as caught:
        CeleryQueue("default", app=app).load()
    assert caught.value is not None and open_sockets(redis.port) == before


def test_another_address_of_the_broker_is_tried(app: Any, redis: servers.Server) -> None:
    send(app, "default", 2)
    nobody = redis.url.replace(str(redis.port), "1")
    assert CeleryQueue("default", app=app, broker=f"{nobody};{redis.url}").load().waiting == 2


def test_no_connection_is_left_open(app: Any, redis: servers.Server) -> None:
    def clients() -> set[str]:
        return {line.split()[0] for line in redis.call("CLIENT", "LIST").splitlines() if "cmd=client" not in line}

    send(app, "default")
    before = clients()
    CeleryQueue("default", app=app, inspect=True).load()
    assert clients() <= before


@pytest.mark.parametrize("broker", ["memory://", "filesystem://"])
def test_a_kind_of_broker_that_is_not_known_is_refused_by_name(app: Any, broker: str) -> None:
    kind = broker.partition(":")[0]
    with pytest.raises(
        FleetError, match=rf"CeleryQueue\('default'\) can't ask a broker of the kind '{kind}': it knows"
    ):
        CeleryQueue("default", app=app, broker=broker).load()


def test_the_management_of_a_redis_is_refused(app: Any) -> None:
    with pytest.raises(FleetError, match="management is RabbitMQ's, and the broker is of the kind 'redis'"):
        CeleryQueue("default", app=app, management="http://localhost").load()


def test_a_wrong_url_of_the_management_is_refused_and_not_shown() -> None:
    with pytest.raises(FleetError, match="management should be a URL such as") as caught:
        CeleryQueue("default", management="admin:hunter2@10.0.0.2")
    assert "hunter2" not in str(caught.value)


def test_the_app_may_be_given_by_its_name(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    send(app, "default", 2)
    monkeypatch.setitem(sys.modules, "shop_of_load", SimpleNamespace(app=app))
    assert CeleryQueue("default", app="shop_of_load:app").load().waiting == 2


def test_an_app_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(FleetError, match=r"there is no Celery app 'shop_of_nobody\.celery': No module named"):
        CeleryQueue("default", app="shop_of_nobody.celery").load()


def test_the_projects_own_app_is_used(app: Any) -> None:
    send(app, "default", 2)
    app.set_current()
    try:
        assert CeleryQueue("default").load().waiting == 2
    finally:
        celery._state._tls.current_app = None


def test_without_an_app_the_one_that_celery_makes_up_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first app that does something becomes it.
    monkeypatch.setattr(celery._state, "default_app", None)
    with pytest.raises(FleetError, match="no Celery app has been imported here"):
        CeleryQueue("default").load()

"""A URL whose password is not percent-encoded is told in words that hold no part of it. Nothing is connected to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from multiserver_schedule.servers import fleet, ledger
from multiserver_schedule.servers.entries import Load, ServerInfo
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.types import ServerType

from .conftest import Site
from .needs import needs

celery = needs("celery")
needs("rq")

from multiserver_schedule.servers.drains.celery import CeleryDrain  # noqa: E402
from multiserver_schedule.servers.load.celery import CeleryQueue  # noqa: E402
from multiserver_schedule.servers.load.rq import RQQueue  # noqa: E402

PASSWORDS = [
    "hunter2/hunter3",
    "hunter2#hunter3",
    "hunter2?hunter3",
    "2/hunter3",
    "2?hunter3",
    "hunter2@1/hunter3",
    "[hunter2]/hunter3",
]


def an_app(url: str) -> Any:
    return celery.Celery("shop", broker=url, set_as_current=False)


def by_rq(password: str) -> Load:
    return RQQueue("default", connection=f"redis://:{password}@127.0.0.1:1/0").load()


def by_celery_on_redis(password: str) -> Load:
    return CeleryQueue("default", app=an_app(f"redis://:{password}@127.0.0.1:1/0")).load()


def by_celery_on_rabbitmq(password: str) -> Load:
    app = an_app("amqp://127.0.0.1:1")
    return CeleryQueue("default", app=app, broker=f"amqp://127.0.0.1:1;amqp://me:{password}@127.0.0.1:1//").load()


def by_management(password: str) -> Load:
    url = f"http://me:{password}@127.0.0.1:1"
    return CeleryQueue("default", app=an_app("amqp://127.0.0.1:1"), management=url).load()


def by_drain(password: str) -> int:
    drain = CeleryDrain(an_app(f"redis://:{password}@127.0.0.1:1/0"), timeout=timedelta(seconds=0.1))
    return drain(ServerInfo("one", "1", "default", "here"))


WAYS = [by_rq, by_celery_on_redis, by_celery_on_rabbitmq, by_management, by_drain]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("ask", WAYS)
def test_a_url_that_cannot_be_read_is_told_without_any_part_of_it(ask: Any, password: str) -> None:
    with pytest.raises(FleetError, match=r"cannot be read as a URL.*Percent-encode.*%2F for '/'") as raised:
        ask(password)
    assert "hunter" not in str(raised.value)
    assert raised.value.__cause__ is None and (raised.value.__context__ is None or raised.value.__suppress_context__)


@pytest.mark.parametrize("ask", [by_rq, by_celery_on_redis, by_celery_on_rabbitmq])
def test_a_url_whose_password_is_percent_encoded_is_read(ask: Any) -> None:
    with pytest.raises(Exception, match="refused") as raised:
        ask("hunter2%2Fhunter3%40%23")
    assert not isinstance(raised.value, FleetError)


def test_no_part_of_a_brokers_password_is_in_a_row_or_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    source = RQQueue("default", connection="redis://:hunter2/hunter3@127.0.0.1:1/0")
    fleet.register_server_type(ServerType("big").scale_on(source, waiting_per_server=20))
    site.monitor()
    decision = ledger.last_decision("big")
    assert decision is not None and "cannot be read as a URL" in decision.why
    assert "hunter" not in decision.why + caplog.text

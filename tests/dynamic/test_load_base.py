from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from multiserver_schedule.servers.entries import Load
from multiserver_schedule.servers.exceptions import FleetError
from multiserver_schedule.servers.load.base import Queue, by_server, longest_wait

THREE = datetime(2030, 1, 1, 3, tzinfo=timezone.utc)


class Paper(Queue):
    def load(self) -> Load:
        return Load(waiting=len(self.names))


def test_a_queue_is_a_source() -> None:
    assert Paper("default")() == Load(waiting=1)


def test_a_queue_that_is_named_twice_is_counted_once() -> None:
    assert Paper("default", "mail", "default")() == Load(waiting=2)


@pytest.mark.parametrize("names", [(), ("",), (None,), (["default", "mail"],)])
def test_a_queue_without_a_name_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(FleetError, match=r'Paper\(\) needs the names of queues: Paper\("default"\)'):
        Paper(*names)


def test_the_longest_wait_is_that_of_the_first() -> None:
    later, first = THREE - timedelta(minutes=1), THREE - timedelta(minutes=7)
    assert longest_wait([later, first, later], THREE) == timedelta(minutes=7)


def test_nothing_has_waited_for_no_time() -> None:
    assert longest_wait([], THREE) == timedelta(0)


def test_what_was_sent_by_a_clock_that_is_ahead_has_not_waited_for_less_than_nothing() -> None:
    assert longest_wait([THREE + timedelta(seconds=30)], THREE) == timedelta(0)


def test_workers_are_counted_by_the_server_that_is_in_their_names() -> None:
    workers = [("celery@web1", 2), ("mail@web1", 1), ("web1", 1), ("celery@web2.internal", 4), ("web3", 0)]
    assert by_server(workers) == {"web1": 4, "web2": 4, "web3": 0}

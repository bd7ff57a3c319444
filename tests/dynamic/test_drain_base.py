"""What counts as an answer of a drain."""

from __future__ import annotations

import pytest

from multiserver_schedule.servers.drains.base import Drain, jobs_left
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.exceptions import FleetError


class Fixed(Drain):
    def drain(self, server: ServerInfo) -> int:
        return len(server.name)


def finish(server: ServerInfo) -> None:
    """Forget the ``return``."""


def test_a_drain_is_as_good_as_a_function() -> None:
    server = ServerInfo(name="web1", key="k", type="default", provider="here")
    assert jobs_left(Fixed()(server)) == 4


@pytest.mark.parametrize("answer", [None, True, False, -1, 0.0, "0", [1]])
def test_what_is_no_count_of_jobs_is_not_taken_for_one(answer: object) -> None:
    with pytest.raises(FleetError, match="return how many jobs the server still runs"):
        jobs_left(answer)


def test_the_message_names_the_drain() -> None:
    with pytest.raises(FleetError, match=r"^finish returned None"):
        jobs_left(None, finish)
    with pytest.raises(FleetError, match=r"^Fixed returned True"):
        jobs_left(True, Fixed())

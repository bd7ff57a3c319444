"""Several processes that decide and act at the same moment, although the scheduler has one do it at a time."""

from __future__ import annotations

from functools import partial

import pytest

from multiserver_schedule.servers import fleet, ledger, monitor, planner, reconcile
from multiserver_schedule.servers.fleet import ServerType

from .conftest import Site
from .lives import at_once

SERVERS = 4


def reconciles(site: Site) -> None:
    reconcile.run("folder", now=site.now)


def test_2_the_limit_is_exact_for_several_that_make_machines_at_once(site: Site) -> None:
    """The original counted in a cache: read, added and wrote back, each for himself."""
    fleet.ensure(9)
    for _ in range(3):
        at_once([partial(reconciles, site)] * SERVERS)
        assert site.cloud.most <= 5
        site.later()
    assert site.statuses() == {"running": 5}
    assert (site.cloud.made, site.cloud.most) == (5, 5)


def test_2_the_limit_is_exact_for_several_that_find_rows_which_wait(site: Site) -> None:
    """More rows than places, as after a smaller limit was set: each takes the place that it is about to use."""
    site.options(MAX_SERVERS=9)
    fleet.ensure(9)
    planner.bring_about(now=site.now)
    assert site.statuses() == {"new": 9}
    site.options(MAX_SERVERS=3)
    for _ in range(4):
        at_once([partial(reconciles, site)] * SERVERS)
        site.later()
    assert site.cloud.most == 3
    assert site.statuses()["running"] == 3


def test_2_places_that_nobody_got_in_a_rush_are_there_afterwards(site: Site) -> None:
    site.cloud.fail("create_server", "full", times=3)
    site.cloud.fail("create_server", "refused", times=3)
    fleet.ensure(5)
    for _ in range(3):
        at_once([partial(reconciles, site)] * SERVERS)
        site.later()
    assert site.cloud.most <= 5
    site.passes(90)
    assert (site.statuses(), len(site.cloud.machines)) == ({"running": 5}, 5)


def test_5_several_that_decide_at_once_make_no_server_twice(site: Site) -> None:
    """The original counted, and created then: two monitors of one minute both did."""
    counts = [2, 4, 5, 5]
    for count in counts:
        fleet.determine_server_count(lambda fleet, count=count: count)
        at_once([lambda: monitor.run(now=site.now)] * SERVERS)
        assert ledger.target("default").wanted == count
        assert fleet.provisioned_count() == len(site.servers()) == count
        site.later()
    site.settle()
    assert site.cloud.made == 5


def test_5_several_that_plan_at_once_let_go_as_many_as_are_too_many_and_no_more(site: Site) -> None:
    fleet.ensure(5)
    site.settle()
    fleet.ensure(2)
    at_once([lambda: planner.bring_about(now=site.now)] * SERVERS)
    assert site.statuses() == {"running": 2, "draining": 3}
    at_once([partial(reconciles, site)] * SERVERS)
    site.settle()
    assert site.statuses() == {"running": 2}
    assert len(site.cloud.machines) == 2


def test_5_of_orders_that_are_given_at_once_none_is_lost(site: Site) -> None:
    site.options(MAX_SERVERS=10 * SERVERS)
    at_once([lambda: [fleet.increase(1) for _ in range(10)]] * SERVERS)
    assert fleet.wanted_count() == 10 * SERVERS


def test_10_of_several_that_take_the_same_step_one_does(site: Site) -> None:
    site.options(looks=1, idempotent=False)
    fleet.ensure(3)
    planner.bring_about(now=site.now)
    at_once([partial(reconciles, site)] * SERVERS)
    assert site.cloud.made == 3
    assert site.cloud.calls.count("create_server") == 3
    for _ in range(3):
        site.later()
        at_once([partial(reconciles, site)] * SERVERS)
    assert site.statuses() == {"running": 3}
    fleet.ensure(0)
    for _ in range(12):
        at_once([partial(reconciles, site)] * 2)
        site.later()
    assert (site.statuses(), site.cloud.machines) == ({}, {})
    became = [[change.status for change in server.transitions.order_by("pk")] for server in site.servers()]
    path = ["new", "starting", "running", "draining", "stopping", "stopped", "deleting", "deleted"]
    assert became == [path] * 3, "no status twice, none left out"


@pytest.mark.parametrize("types", [2])
def test_5_two_types_share_a_provider_and_neither_takes_more_than_there_is(site: Site, types: int) -> None:
    for number in range(types):
        fleet.register_server_type(ServerType(f"kind{number}"))
        fleet.ensure(4, f"kind{number}")
    for _ in range(3):
        at_once([partial(reconciles, site)] * SERVERS)
        site.later()
    assert site.cloud.most == 5
    assert site.statuses()["running"] == 5

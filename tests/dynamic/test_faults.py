"""A provider that is down, slow, lying or full: nothing flaps, nothing is leaked, people see it, and it passes."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.test import Client

from multiserver_schedule.servers import fleet, ledger, visit
from multiserver_schedule.servers.entries import ServerInfo
from multiserver_schedule.servers.fleet import ServerType

from ..fleet.harness import HISTORY_IN_SQLITE
from .cloud import Cloud
from .conftest import MINUTE, NOON, POLL, Site

ON_SQLITE = HISTORY_IN_SQLITE
"""What is about providers; that it is as good on each database is seen by all of it at once, below."""
FUZZ = int(os.environ.get("SERVERS_FUZZ", "20"))
MOST = 5
LOOKS = ("list_servers", "current_server_count", "find_by_tag")
STATES = ("has_started", "has_stopped", "has_been_deleted")
DEEDS = ("create_server", "stop_server", "delete_server", "reboot_server")
WHATS = ("busy", "full", "refused", "lost", "done", "crash", "word")


def changes(site: Site) -> int:
    """Return how many changes of a status there were so far."""
    return int(ledger.transitions().count())


def agrees(site: Site, wanted: int) -> None:
    """See that the provider has what the rows have, and both as many as are wanted."""
    assert site.statuses() == ({"running": wanted} if wanted else {})
    assert set(site.cloud.machines) == {server.machine_id for server in site.servers("running")}
    assert not ledger.servers().filter(next_step_at__isnull=False).exists(), "none has a step left to take"


def calm(site: Site, most: int = 150) -> None:
    """Let passes run until as many work as are wanted, and nothing is left to do."""
    wanted = min(fleet.wanted_count(), MOST)
    for _ in range(most):
        site.passes()
        steps = ledger.servers().filter(next_step_at__isnull=False).exists()
        if not steps and site.statuses() == ({"running": wanted} if wanted else {}):
            return
    raise AssertionError(f"{wanted} are wanted: {site.statuses()} {site.seen[-10:]}")


Outage = tuple[str, str]
ALL_OF_IT: list[Outage] = [("*", what) for what in ("busy", "refused", "lost", "crash", "word")]
WHILE_LOOKING: list[Outage] = [
    *((call, what) for call in ("list_servers", "current_server_count") for what in ("word", "lost")),
    ("list_servers", "blind"),
]
WHILE_COMING: list[Outage] = [
    ("has_started", "word"),
    *(("create_server", what) for what in ("full", "refused", "busy")),
]
WHILE_GOING: list[Outage] = [
    *((call, what) for call in ("has_stopped", "has_been_deleted") for what in ("word", "lost")),
    *((call, what) for call in ("stop_server", "delete_server") for what in ("refused", "busy")),
]
SILENT = {("list_servers", "blind")}
"""Nothing is wrong, as far as anybody can see."""


def is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """See that people learn of an outage, and are not told at each pass."""
    assert 1 <= len(caplog.records) <= 40, "in the log"
    troubles = [ledger.provider("folder").trouble, ledger.target("default").short_because]
    assert any(troubles) or ledger.servers().exclude(error="").exists(), "and in the rows that the admin shows"


@ON_SQLITE
@pytest.mark.parametrize(("call", "what"), [*ALL_OF_IT, *WHILE_LOOKING, *WHILE_COMING])
def test_an_outage_of_forty_minutes_makes_nothing_flap_and_is_over_when_it_is_over(
    site: Site, caplog: pytest.LogCaptureFixture, call: str, what: str
) -> None:
    """Whoever worked goes on, whoever is asked for comes at the end, and in between nobody comes and goes."""
    fleet.ensure(2)
    site.settle()
    before = {server.machine_id for server in site.servers("running")}
    made, changed = site.cloud.made, changes(site)
    site.cloud.fail(call, what, times=100_000)
    fleet.ensure(4)
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        site.passes(40, every=MINUTE)
    assert before <= {server.machine_id for server in site.servers("running")}, "those that worked, work"
    assert site.cloud.made - made <= 2 * 4, "one that never comes up is replaced after ten minutes, and no sooner"
    assert changes(site) - changed <= 50
    assert site.cloud.most <= MOST
    if (call, what) not in SILENT:
        is_seen(caplog)
    site.cloud.mend()
    calm(site)
    agrees(site, 4)
    assert before <= set(site.cloud.machines)


@ON_SQLITE
@pytest.mark.parametrize(("call", "what"), [*ALL_OF_IT, *WHILE_GOING])
def test_an_outage_while_servers_go_leaks_no_machine(
    site: Site, caplog: pytest.LogCaptureFixture, call: str, what: str
) -> None:
    fleet.ensure(3)
    site.settle()
    site.cloud.fail(call, what, times=100_000)
    fleet.ensure(1)
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        site.passes(30, every=MINUTE)
    rows = {server.machine_id for server in site.servers() if server.status != "deleted"}
    assert set(site.cloud.machines) <= rows, "whatever is there has a row"
    is_seen(caplog)
    site.cloud.mend()
    calm(site)
    agrees(site, 1)
    assert site.cloud.made == 3, "and none was made meanwhile"


@ON_SQLITE
def test_out_of_quota_is_told_once_and_asked_for_again_more_and_more_seldom(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ensure(1)
    site.settle()
    site.cloud.fail("create_server", "full", times=100_000)
    fleet.ensure(3)
    asked = site.cloud.calls.count("create_server")
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        site.passes(180)
    assert 1 <= len([record for record in caplog.records if "Fewer servers" in record.getMessage()]) <= 3
    assert site.cloud.calls.count("create_server") - asked <= 20, "in an hour"
    assert len(site.servers()) == 3, "the rows wait, and none is made anew each time"
    site.cloud.mend()
    calm(site)
    agrees(site, 3)


def test_the_place_of_a_machine_that_may_have_been_made_is_given_to_no_other_one(site: Site) -> None:
    """Given up before its answer came, and not shown by the provider for a while."""
    site.options(settles=300, lag=200)
    fleet.ensure(MOST - 1)
    site.settle()
    site.cloud.fail("create_server", "done")
    fleet.ensure(MOST)
    site.reconcile()
    fleet.ensure(MOST - 1)
    site.passes(1)
    assert site.statuses() == {"running": MOST - 1, "stopping": 1}
    fleet.ensure(MOST)
    site.passes(30)
    assert site.cloud.most == MOST
    agrees(site, MOST)


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def patience(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scale half a minute down to half a second, and wait for the calls that go on after their pass."""
    monkeypatch.setattr(visit, "ANSWERS_WITHIN", timedelta(seconds=0.5))
    site.options(timeout=0.1)
    yield
    let_calls_end()


def let_calls_end() -> None:
    """Wait for the calls that go on after their pass."""
    until = time.monotonic() + 20
    while any(thread.name.startswith("provider-") for thread in threading.enumerate()):
        assert time.monotonic() < until, "a call goes on"
        time.sleep(0.01)


def slow(site: Site, call: str, seconds: float, times: int = 100_000) -> None:
    site.cloud.fail(call, "slow", times=times, seconds=seconds)


@ON_SQLITE
def test_a_provider_that_takes_as_long_as_it_may_for_each_answer_is_no_trouble(site: Site, patience: None) -> None:
    slow(site, "*", 0.1)
    fleet.ensure(3)
    site.passes(2)
    assert not ledger.provider("folder").trouble
    assert site.statuses() == {"running": 3}
    fleet.ensure(1)
    site.passes(6)
    agrees(site, 1)
    fleet.reboot()
    site.passes(3)
    agrees(site, 1)


@ON_SQLITE
def test_a_pass_ends_when_a_provider_does_not_answer_in_time_and_concludes_nothing(
    site: Site, patience: None, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ensure(2)
    site.settle()
    slow(site, "list_servers", 4.0, times=1)
    fleet.ensure(3)
    began = time.monotonic()
    report = site.reconcile()
    assert time.monotonic() - began < 3.5
    assert report.trouble
    assert "no answer" in ledger.provider("folder").trouble
    assert "does not answer" in caplog.text
    assert site.statuses() == {"running": 2}
    site.later()
    calm(site)
    agrees(site, 3)


@ON_SQLITE
def test_a_machine_whose_making_took_too_long_is_found_and_not_made_again(site: Site, patience: None) -> None:
    slow(site, "create_server", 2.0, times=2)
    fleet.ensure(2)
    site.reconcile()
    assert site.statuses() == {"starting": 2}
    assert site.cloud.made == 0, "not yet"
    let_calls_end()
    site.later()
    calm(site)
    agrees(site, 2)
    assert site.cloud.made == 2


@ON_SQLITE
@pytest.mark.parametrize("call", [*STATES, "stop_server", "delete_server"])
def test_an_answer_that_comes_too_late_is_asked_for_again(site: Site, patience: None, call: str) -> None:
    slow(site, call, 2.0, times=1)
    fleet.ensure(2)
    site.passes(3)
    fleet.ensure(0)
    site.passes(3)
    let_calls_end()
    calm(site)
    agrees(site, 0)


@pytest.fixture
def stuck(patience: None) -> Iterator[Callable[[ServerInfo], int]]:
    """Return a drain that has no limit of its own, and ends with the test."""
    over = threading.Event()

    def drain(server: ServerInfo) -> int:
        over.wait(20)
        return 0

    yield drain
    over.set()


@ON_SQLITE
def test_a_drain_that_hangs_is_said_of_its_server_and_not_of_the_provider(
    site: Site, stuck: Callable[[ServerInfo], int], caplog: pytest.LogCaptureFixture
) -> None:
    fleet.register_server_type(ServerType("default").drain_with(stuck))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    with caplog.at_level(logging.WARNING, "multiserver_schedule.servers"):
        site.passes(2)
    [server] = site.servers("draining")
    assert server.error.startswith("its drain did not answer within")
    assert server.next_step_at > site.now - POLL, "and is asked again"
    row = ledger.provider("folder")
    assert (row.trouble, row.failures, row.not_before) == ("", 0, None)
    assert [record.getMessage() for record in caplog.records] == [f"{server.name} is draining, and {server.error}."]
    site.passes(60)
    assert site.cloud.machines == {}, "its limit holds"


@ON_SQLITE
def test_while_drains_hang_the_steps_of_other_servers_go_on(site: Site, stuck: Callable[[ServerInfo], int]) -> None:
    site.options(MAX_SERVERS=30)
    fleet.register_server_type(ServerType("default").drain_with(stuck))
    fleet.register_server_type(ServerType("other"))
    fleet.ensure(9)  # more than are asked at once
    fleet.ensure(2, "other")
    site.settle()
    fleet.ensure(0)
    fleet.ensure(12, "other")
    report = site.reconcile()
    assert report.trouble == ""
    assert len([server for server in site.servers("running") if server.type == "other"]) == 12


@ON_SQLITE
def test_a_provider_that_does_not_answer_is_seen_beside_a_drain_that_hangs(
    site: Site, stuck: Callable[[ServerInfo], int]
) -> None:
    fleet.register_server_type(ServerType("default").drain_with(stuck))
    fleet.ensure(1)
    site.settle()
    fleet.ensure(0)
    fleet.register_server_type(ServerType("other"))
    fleet.ensure(1, "other")
    slow(site, "create_server", 2.0, times=1)
    assert "no answer" in site.reconcile().trouble


# -- what people see ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(site: Site) -> Client:
    """Return the browser of somebody who may do everything."""
    client = Client()
    client.force_login(User.objects.create_superuser("anna"))
    return client


def page(root: Client, path: str) -> str:
    answer = root.get(f"/admin/multiserver_schedule_servers/{path}")
    assert answer.status_code == 200
    return answer.content.decode()


@ON_SQLITE
def test_a_provider_that_is_away_is_seen_in_the_admin_with_what_it_said(site: Site, root: Client) -> None:
    site.cloud.fail("*", "lost", times=1000)
    fleet.ensure(1)
    site.passes(3)
    for path in ("provider/", "server/"):
        assert "list_servers: lost" in page(root, path)
    site.cloud.mend()
    calm(site)
    for path in ("provider/", "server/"):
        assert "list_servers: lost" not in page(root, path)


@ON_SQLITE
@pytest.mark.parametrize(
    ("call", "what", "where"),
    [
        ("create_server", "full", "create_server: full"),
        ("create_server", "lost", "create_server: lost"),
        ("has_started", "word", "&#x27;flurbing&#x27; is not known"),
    ],
)
def test_what_a_server_waits_for_is_seen_in_the_admin(
    site: Site, root: Client, call: str, what: str, where: str
) -> None:
    site.cloud.fail(call, what, times=1000)
    fleet.ensure(1)
    site.passes(3)
    [server] = site.servers()
    assert where in page(root, "server/")
    assert where in page(root, f"server/{server.pk}/change/")


# -- all of it at once -------------------------------------------------------------------------------------------------


class Weather:
    """What a seed does to a site: faults of all kinds, machines that go by themselves, and changing wishes."""

    def __init__(self, seed: int, site: Site) -> None:
        self.rng, self.site = random.Random(seed), site

    def rage(self) -> None:
        rng, site = self.rng, self.site
        settles, lag = rng.choice([(60, 0), (60, 40), (300, 200)])
        site.options(looks=rng.choice([0, 0, 1, 3]), idempotent=rng.random() < 0.5, settles=settles, lag=lag)
        if rng.random() < 0.4:
            fleet.register_server_type(ServerType("default").drain_with(lambda server: rng.choice([0, 0, 1])))
        for _ in range(rng.randint(2, 4)):
            fleet.ensure(rng.randint(0, MOST + 1))
            for _ in range(rng.randint(0, 4)):
                call = rng.choice([*LOOKS, *STATES, *DEEDS, *DEEDS, "*"])
                site.cloud.fail(call, rng.choice(WHATS), times=rng.randint(1, 5))
            if rng.random() < 0.2:
                site.cloud.fail("list_servers", "blind", times=rng.randint(1, 3))
            rng.choice([self.calm, self.calm, self.vanishes, self.stops, self.reboots])()
            every = rng.choice([POLL, POLL, MINUTE])
            for _ in range(rng.randint(2, 7)):
                site.passes(every=every)
                assert site.cloud.most <= MOST
        site.cloud.mend()
        # For as long as it takes to see that a machine is gone.
        site.passes(6, every=MINUTE)
        calm(site)
        agrees(site, min(fleet.wanted_count(), MOST))
        assert site.cloud.most <= MOST

    def calm(self) -> None:
        """Let nothing else happen."""

    def vanishes(self) -> None:
        if machines := sorted(self.site.cloud.machines):
            self.site.cloud.put(self.rng.choice(machines), state="gone")

    def stops(self) -> None:
        machines = self.site.cloud.machines
        if running := sorted(id for id, each in machines.items() if each["state"] == "running"):
            self.site.cloud.put(self.rng.choice(running), state="stopped")

    def reboots(self) -> None:
        fleet.reboot()


@pytest.mark.parametrize("batch", range((FUZZ + 9) // 10))
def test_whatever_goes_wrong_together_the_limit_is_kept_and_all_is_well_afterwards(
    site: Site, tmp_path: Path, batch: int, fresh: Callable[[], None]
) -> None:
    seeds = range(batch * 10, min(FUZZ, batch * 10 + 10))
    for seed in seeds:
        if site.alias != "default" and seed % 10 != {"postgresql": 7, "mariadb": 3}[site.alias]:
            continue  # A tenth of them, each database its own.
        fresh()
        site.cloud = Cloud(tmp_path / f"cloud-{seed}")
        site.options(folder=str(tmp_path / f"cloud-{seed}"))
        site.now = NOON
        try:
            Weather(seed, site).rage()
        except AssertionError as error:
            raise AssertionError(f"seed {seed} on {site.alias}: {error}") from error


@pytest.fixture
def fresh() -> Callable[[], None]:
    """Return what forgets all rows and types."""

    def forget() -> None:
        for kept in (ledger.servers(), ledger.targets(), ledger.providers()):
            kept.delete()
        fleet.register_server_type(ServerType("default"))

    return forget

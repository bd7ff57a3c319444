"""A whole fleet at EC2's interface, which nobody here wrote: what the reconciler makes of a real HTTP API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from multiserver_schedule.servers import fleet, ledger
from multiserver_schedule.servers.fleet import ServerType
from multiserver_schedule.servers.providers import make

from .cloud import Cloud
from .conftest import POLL, Heard, Site
from .needs import needs
from .standin import HOST, Proxy
from .test_libcloud_ec2 import BODY, CONFIGURATION, SECRET, Answer, action, asked, lost, refusing

needs("libcloud")

# libcloud signs with it, on Python 3.12 and later.
pytestmark = [
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
    pytest.mark.django_db(transaction=True),
]


@pytest.fixture
def at_ec2(settings: Any, proxy: Proxy, tmp_path: Any) -> Site:
    """Have one provider, EC2, of three machines."""
    arguments = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": SECRET, "region": "eu-west-1", "host": HOST}
    options = {"driver": "ec2", "arguments": {**arguments, "port": proxy.port, "secure": False}}
    settings.MULTISERVER_SCHEDULE = {"SERVER_NAME": "web1", "HOUSEKEEPING": False}
    settings.MULTISERVER_SCHEDULE_SERVERS = {
        "FLEET": "shop",
        "PROVIDERS": {
            "aws": {
                "BACKEND": "multiserver_schedule.servers.providers.libcloud.LibcloudProvider",
                "MAX_SERVERS": 3,
                "OPTIONS": options,
            }
        },
    }
    fleet.register_server_type(ServerType("default").configuration(CONFIGURATION))
    return Site(Cloud(tmp_path), settings)


def passes(site: Site, count: int) -> None:
    for _ in range(count):
        site.reconcile("aws")
        site.later(POLL)


def machines() -> list[str]:
    """Return the keys of the machines that EC2 has."""
    return sorted(machine.key for machine in make("aws").list_servers())


def rows_running() -> list[str]:
    return sorted(server.key for server in ledger.servers().filter(status="running"))


def test_servers_come_are_rebooted_and_go(at_ec2: Site, proxy: Proxy) -> None:
    fleet.ensure(5)
    passes(at_ec2, 3)
    assert len(machines()) == 3, "the limit"
    assert machines() == rows_running()
    fleet.reboot()
    passes(at_ec2, 4)
    assert at_ec2.statuses() == {"running": 3}
    assert len(asked(proxy, "RebootInstances")) == 3
    fleet.ensure(1)
    passes(at_ec2, 6)
    assert machines() == rows_running()
    assert len(machines()) == 1
    fleet.ensure(0)
    passes(at_ec2, 6)
    assert machines() == []
    calls = Counter(request.query.get("Action") for request in proxy.requests)
    assert (calls["RunInstances"], calls["StopInstances"], calls["TerminateInstances"]) == (3, 3, 3)


def test_an_answer_that_is_lost_after_the_machine_was_made_leaves_no_orphan_and_no_double(
    at_ec2: Site, proxy: Proxy, heard: Callable[..., Heard]
) -> None:
    orphans = heard("orphan_found")
    proxy.faults.append(action("RunInstances", lost, times=2))
    fleet.ensure(2)
    passes(at_ec2, 6)
    assert machines() == rows_running()
    assert len(asked(proxy, "RunInstances")) == 2
    assert orphans == []


@pytest.mark.parametrize("name", ["StopInstances", "TerminateInstances", "DescribeInstances"])
def test_an_answer_that_is_lost_while_a_server_goes_leaves_no_machine(at_ec2: Site, proxy: Proxy, name: str) -> None:
    fleet.ensure(2)
    passes(at_ec2, 3)
    fleet.ensure(0)
    proxy.faults.append(action(name, lost, times=2))
    passes(at_ec2, 20)
    assert machines() == []
    assert at_ec2.statuses() == {}


def test_a_throttled_account_gets_its_servers_later_and_none_twice(at_ec2: Site, proxy: Proxy) -> None:
    proxy.faults.append(action("RunInstances", refusing(503, "RequestLimitExceeded"), times=4))
    fleet.ensure(2)
    passes(at_ec2, 12)
    assert machines() == rows_running()
    assert len(machines()) == 2


def test_an_account_without_quota_makes_one_attempt_now_and_then_and_no_rows(at_ec2: Site, proxy: Proxy) -> None:
    proxy.faults.append(action("RunInstances", refusing(400, "VcpuLimitExceeded", "You have requested more")))
    fleet.ensure(2)
    passes(at_ec2, 90)  # half an hour
    assert len(at_ec2.servers()) == 2
    assert len(asked(proxy, "RunInstances")) <= 16
    assert "VcpuLimitExceeded" in at_ec2.servers()[0].error or "requested more" in at_ec2.servers()[0].error
    proxy.faults.clear()
    passes(at_ec2, 40)
    assert machines() == rows_running()
    assert len(machines()) == 2


@pytest.mark.parametrize("answer", ["401", "500", "garbage"])
def test_an_answer_that_says_nothing_of_the_machines_is_no_reason_to_make_or_forget_any(
    at_ec2: Site, proxy: Proxy, answer: str
) -> None:
    fleet.ensure(2)
    passes(at_ec2, 3)
    before = machines()
    text = BODY.format("AuthFailure", "no") if answer == "401" else "<html>busy"
    status = {"401": 401, "500": 500, "garbage": 200}[answer]
    proxy.faults.append(action("DescribeInstances", lambda passed_on: Answer(status, text.encode())))
    passes(at_ec2, 30)
    assert rows_running() == before
    assert ledger.provider("aws").trouble
    assert SECRET not in str(list(ledger.providers().values()))
    proxy.faults.clear()
    passes(at_ec2, 40)
    assert machines() == before
    assert len(asked(proxy, "RunInstances")) == 2

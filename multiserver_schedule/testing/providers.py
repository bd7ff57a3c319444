"""
The facts that every provider of servers keeps. An author of another one inherits them, and is told where it breaks a
promise:

    from multiserver_schedule.testing import ProviderContract

    class TestMyProvider(ProviderContract):
        @pytest.fixture
        def make_provider(self):
            # A fresh instance each time, as another process would have.
            return lambda fleet="contract": MyProvider("mine", {"token": "…"}, fleet=fleet)

        @pytest.fixture
        def configuration(self):
            return {"size": "small"}

Machines are really made, and ended. What a test leaves behind in its fleets, if it fails, is deleted after it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import pytest

from ..servers.entries import Machine, MachineState, ServerInfo
from ..servers.exceptions import ProviderError, ProviderRefused
from ..servers.providers.base import BaseProvider

FLEET = "contract"
ELSEWHERE = "contract-elsewhere"
Make = Callable[..., BaseProvider]
Start = Callable[..., Machine]


class ProviderContract:
    """Inherit this and give the fixtures ``make_provider`` and ``configuration``; the rest is there to be changed."""

    patience: ClassVar[float] = 30.0
    """For how many seconds a test waits for what has to come true in the end."""
    pause: ClassVar[float] = 0.02
    """How long it waits between two looks."""
    counts_other_fleets: ClassVar[bool] = False
    """Does ``current_server_count`` count the whole account, whosever the machines are?"""
    wrong_configuration: ClassVar[Mapping[str, Any] | None] = {"no_such_key_in_any_configuration": 1}
    """That no machine can be made with; None: every configuration makes one."""

    @pytest.fixture
    def make_provider(self) -> Make:
        """Return what is called with ``fleet="…"``, and returns a new instance of the provider."""
        raise NotImplementedError("Give your test class a fixture 'make_provider' that returns a factory of it.")

    @pytest.fixture
    def configuration(self) -> Mapping[str, Any]:
        """Return what a machine of the tests is made with."""
        return {}

    def look_at_configuration(self, machine: Machine, configuration: Mapping[str, Any]) -> None:
        """Assert that the machine was made with this configuration."""
        pytest.skip("look_at_configuration() does not say how to see what a machine was made with")

    def unknown_machine_id(self, known: str) -> str:
        """Return an id of a machine that has never been, such as the provider gives them, from one that there is."""
        return known[:-1] + ("1" if known[-1:] == "0" else "0")

    def until(self, condition: Callable[[], Any], what: str = "the provider to be done") -> None:
        """Wait until a condition holds. A stand-in whose clock is the test's may move it on here."""
        deadline = time.monotonic() + self.patience
        while not condition():
            assert time.monotonic() < deadline, f"Waited {self.patience:g} s for {what}."
            time.sleep(self.pause)

    # -- what the tests use -------------------------------------------------------------------------------------------

    @pytest.fixture
    def provider(self, make_provider: Make) -> Iterator[BaseProvider]:
        """Return a provider; all machines of the tests' fleets are deleted after the test."""
        yield make_provider(fleet=FLEET)
        for fleet in (FLEET, ELSEWHERE):
            cleaner = make_provider(fleet=fleet)
            left = list(cleaner.list_servers())
            for machine in left:
                cleaner.delete_server(machine.id)
            for machine in left:
                self.until(lambda c=cleaner, m=machine: c.has_been_deleted(m.id), "the machines to be gone")  # type: ignore[misc]

    @pytest.fixture
    def server(self, configuration: Mapping[str, Any]) -> Callable[..., ServerInfo]:
        """Return what makes another server each time, of the tests' configuration or what it is given."""

        def another(**changed: Any) -> ServerInfo:
            mark = uuid.uuid4().hex[:12]
            given = {
                "name": f"contract-{mark}",
                "key": f"contract-{mark}",
                "type": "contract",
                "provider": "contract",
                "configuration": configuration,
            }
            return ServerInfo(**{**given, **changed})

        return another

    @pytest.fixture
    def start(self, provider: BaseProvider, server: Callable[..., ServerInfo]) -> Start:
        """Return what makes a machine, waits until it is up, and returns it as it is listed then."""

        def started(info: ServerInfo | None = None, *, at: BaseProvider = provider) -> Machine:
            info = info or server()
            machine = at.create_server(info)
            self.until(lambda: at.has_started(machine.id), "the machine to be up")
            (found,) = at.find_by_tag(info.key)
            return found

        return started

    def stop(self, provider: BaseProvider, machine: Machine) -> None:
        """Stop a machine, and wait until it is down."""
        provider.stop_server(machine.id)
        self.until(lambda: provider.has_stopped(machine.id), "the machine to be down")

    def end(self, provider: BaseProvider, machine: Machine) -> None:
        """Delete a machine, and wait until it is gone."""
        provider.delete_server(machine.id)
        self.until(lambda: provider.has_been_deleted(machine.id), "the machine to be gone")

    def is_up(self, provider: BaseProvider, machine_id: str) -> bool:
        """Say whether it is up, where to say that there is no such machine means that it is not."""
        try:
            return provider.has_started(machine_id)
        except ProviderError:
            return False

    # -- to make one --------------------------------------------------------------------------------------------------

    def test_a_machine_is_found_by_its_key_as_soon_as_its_creation_was_answered_and_comes_up(
        self, provider: BaseProvider, server: Callable[..., ServerInfo]
    ) -> None:
        info = server()
        assert list(provider.find_by_tag(info.key)) == []
        machine = provider.create_server(info)
        assert machine.id
        assert machine.key == info.key
        self.until(lambda: provider.find_by_tag(info.key), "the machine to be found")
        assert [found.id for found in provider.find_by_tag(info.key)] == [machine.id]
        self.until(lambda: provider.has_started(machine.id), "the machine to be up")
        assert not provider.has_stopped(machine.id)
        assert not provider.has_been_deleted(machine.id)

    def test_a_machine_is_listed_with_its_key_and_name_and_counted(
        self, provider: BaseProvider, server: Callable[..., ServerInfo], start: Start
    ) -> None:
        before = provider.current_server_count()
        info = server()
        machine = start(info)
        (listed,) = provider.list_servers()
        assert (listed.id, listed.key, listed.name) == (machine.id, info.key, info.name)
        assert listed.state is MachineState.RUNNING
        assert listed == machine
        assert provider.current_server_count() == before + 1

    def test_another_process_sees_the_same_and_goes_on_with_it(self, make_provider: Make, start: Start) -> None:
        machine = start()
        assert list(make_provider(fleet=FLEET).find_by_tag(machine.key)) == [machine]
        assert list(make_provider(fleet=FLEET).list_servers()) == [machine]
        assert make_provider(fleet=FLEET).has_started(machine.id)
        make_provider(fleet=FLEET).stop_server(machine.id)
        self.until(lambda: make_provider(fleet=FLEET).has_stopped(machine.id), "the machine to be down")
        make_provider(fleet=FLEET).delete_server(machine.id)
        self.until(lambda: make_provider(fleet=FLEET).has_been_deleted(machine.id), "the machine to be gone")
        assert list(make_provider(fleet=FLEET).list_servers()) == []

    def test_two_servers_have_two_machines(self, provider: BaseProvider, start: Start) -> None:
        one, two = start(), start()
        assert one.id != two.id
        assert {m.id for m in provider.list_servers()} == {one.id, two.id}
        assert [m.id for m in provider.find_by_tag(one.key)] == [one.id]
        assert [m.id for m in provider.find_by_tag(two.key)] == [two.id]

    def test_a_machine_whose_creation_is_asked_for_again_is_made_once(
        self, provider: BaseProvider, make_provider: Make, server: Callable[..., ServerInfo]
    ) -> None:
        if not provider.idempotent:
            pytest.skip("not idempotent: nobody asks twice")
        before = provider.current_server_count()
        info = server()
        machine = provider.create_server(info)
        assert provider.create_server(info).id == machine.id
        assert make_provider(fleet=FLEET).create_server(info).id == machine.id
        self.until(lambda: provider.has_started(machine.id), "the machine to be up")
        assert make_provider(fleet=FLEET).create_server(info).id == machine.id
        assert [m.id for m in provider.find_by_tag(info.key)] == [machine.id]
        assert provider.current_server_count() == before + 1

    def test_a_machine_is_made_with_the_configuration_of_its_server(
        self, start: Start, configuration: Mapping[str, Any]
    ) -> None:
        self.look_at_configuration(start(), configuration)

    def test_a_configuration_that_no_machine_can_be_made_with_is_refused_and_nothing_is_made(
        self, provider: BaseProvider, server: Callable[..., ServerInfo], configuration: Mapping[str, Any]
    ) -> None:
        if self.wrong_configuration is None:
            pytest.skip("every configuration makes a machine")
        before = provider.current_server_count()
        info = server(configuration={**configuration, **self.wrong_configuration})
        with pytest.raises(ProviderRefused):
            provider.create_server(info)
        assert list(provider.find_by_tag(info.key)) == []
        assert list(provider.list_servers()) == []
        assert provider.current_server_count() == before

    # -- whose it is --------------------------------------------------------------------------------------------------

    def test_another_fleet_is_neither_shown_a_machine_nor_ends_it(
        self, provider: BaseProvider, make_provider: Make, start: Start
    ) -> None:
        elsewhere = make_provider(fleet=ELSEWHERE)
        before = elsewhere.current_server_count()
        machine = start()
        assert list(elsewhere.list_servers()) == []
        assert list(elsewhere.find_by_tag(machine.key)) == []
        if not self.counts_other_fleets:
            assert elsewhere.current_server_count() == before
        for call in (elsewhere.stop_server, elsewhere.delete_server):
            with suppress(ProviderError):  # to say that it is not theirs is as good
                call(machine.id)
        time.sleep(5 * self.pause)
        assert list(provider.list_servers()) == [machine]
        assert provider.has_started(machine.id)

    def test_the_machines_of_two_fleets_are_each_shown_to_their_own(
        self, provider: BaseProvider, make_provider: Make, start: Start
    ) -> None:
        elsewhere = make_provider(fleet=ELSEWHERE)
        ours, theirs = start(), start(at=elsewhere)
        assert [m.id for m in provider.list_servers()] == [ours.id]
        assert [m.id for m in elsewhere.list_servers()] == [theirs.id]
        self.end(elsewhere, theirs)
        assert [m.id for m in provider.list_servers()] == [ours.id]

    # -- to stop it ---------------------------------------------------------------------------------------------------

    def test_a_machine_that_is_stopped_is_down_in_the_end_and_still_there(
        self, provider: BaseProvider, start: Start
    ) -> None:
        machine = start()
        self.stop(provider, machine)
        assert not provider.has_started(machine.id)
        assert not provider.has_been_deleted(machine.id)
        (listed,) = provider.list_servers()
        assert (listed.id, listed.key, listed.state) == (machine.id, machine.key, MachineState.STOPPED)
        assert list(provider.find_by_tag(machine.key)) == [listed]

    def test_to_stop_it_again_does_nothing(self, provider: BaseProvider, start: Start) -> None:
        machine = start()
        provider.stop_server(machine.id)
        provider.stop_server(machine.id)
        self.until(lambda: provider.has_stopped(machine.id), "the machine to be down")
        provider.stop_server(machine.id)
        assert provider.has_stopped(machine.id)

    # -- to delete it -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("state", ["running", "stopped"])
    def test_a_machine_that_is_deleted_is_gone_in_the_end_and_neither_listed_nor_counted(
        self, provider: BaseProvider, start: Start, state: str
    ) -> None:
        before = provider.current_server_count()
        machine = start()
        if state == "stopped":
            self.stop(provider, machine)
        self.end(provider, machine)
        assert list(provider.list_servers()) == []
        assert list(provider.find_by_tag(machine.key)) == []
        assert provider.current_server_count() == before
        assert provider.has_stopped(machine.id)
        assert not self.is_up(provider, machine.id)

    def test_to_stop_or_delete_what_is_gone_does_nothing(self, provider: BaseProvider, start: Start) -> None:
        machine = start()
        provider.delete_server(machine.id)
        provider.delete_server(machine.id)
        self.until(lambda: provider.has_been_deleted(machine.id), "the machine to be gone")
        provider.delete_server(machine.id)
        provider.stop_server(machine.id)
        assert provider.has_been_deleted(machine.id)
        assert list(provider.list_servers()) == []

    def test_a_machine_that_was_just_made_can_be_deleted_before_it_is_up(
        self, provider: BaseProvider, server: Callable[..., ServerInfo]
    ) -> None:
        info = server()
        self.end(provider, provider.create_server(info))
        assert list(provider.find_by_tag(info.key)) == []
        assert list(provider.list_servers()) == []

    def test_to_delete_one_leaves_the_others(self, provider: BaseProvider, start: Start) -> None:
        one, two = start(), start()
        self.end(provider, one)
        assert list(provider.list_servers()) == [two]
        assert provider.has_started(two.id)
        assert not provider.has_been_deleted(two.id)

    def test_a_machine_that_has_never_been_is_gone_and_not_up(self, provider: BaseProvider, start: Start) -> None:
        machine = start()
        unknown = self.unknown_machine_id(machine.id)
        assert provider.has_been_deleted(unknown)
        assert provider.has_stopped(unknown)
        assert not self.is_up(provider, unknown)
        provider.stop_server(unknown)
        provider.delete_server(unknown)
        assert list(provider.list_servers()) == [machine]
        assert list(provider.find_by_tag("no-such-key")) == []

    # -- to reboot it -------------------------------------------------------------------------------------------------

    def test_a_machine_that_is_rebooted_comes_up_as_the_same_machine(
        self, provider: BaseProvider, make_provider: Make, start: Start
    ) -> None:
        before = start()
        provider.reboot_server(before.id)

        def is_up_again() -> bool:
            if not make_provider(fleet=FLEET).has_started(before.id):
                return False
            (now,) = provider.find_by_tag(before.key)
            return now.state is MachineState.RUNNING and (not before.booted or now.booted != before.booted)

        self.until(is_up_again, "the machine to be up again")
        (now,) = provider.list_servers()
        assert (now.id, now.key, now.name) == (before.id, before.key, before.name)
        assert bool(now.booted) is bool(before.booted)
        assert not provider.has_stopped(now.id)
        self.stop(provider, now)
        self.end(provider, now)

    def test_to_reboot_what_is_gone_brings_nothing_back(self, provider: BaseProvider, start: Start) -> None:
        machine = start()
        self.end(provider, machine)
        with suppress(ProviderError):  # to say so is as good
            provider.reboot_server(machine.id)
        time.sleep(5 * self.pause)
        assert not self.is_up(provider, machine.id)
        assert provider.has_been_deleted(machine.id)
        assert list(provider.list_servers()) == []

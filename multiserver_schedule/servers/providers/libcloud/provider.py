"""``LibcloudProvider``: what is the same in every cloud."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from django.core.checks import CheckMessage, Error, Warning
from libcloud.common.types import LibcloudError
from libcloud.compute.providers import get_driver
from libcloud.compute.types import OLD_CONSTANT_TO_NEW_MAPPING, Provider

from ... import conf
from ...entries import Machine, MachineState, ServerInfo
from ...exceptions import FleetError, ProviderBusy, ProviderError, ProviderRefused, UnknownState
from ..base import BaseProvider
from .dialects import DIALECTS, Dialect, Seen, can
from .errors import PRIVATE, SECRET, NotThere, redacted, shortened, text_of, texts, translate
from .wire import Clock, tame

OPTIONS: Final = ("driver", "arguments", "configuration", "timeout", "count_all", "idempotent")
_NAMES: Final = sorted({str(each.value) for each in Provider} - set(map(str, OLD_CONSTANT_TO_NEW_MAPPING)))
_AMAZON: Final = (".amazonaws.com", ".amazonaws.com.cn")


class LibcloudProvider(BaseProvider):
    """
    Machines of a cloud that apache-libcloud knows. ``OPTIONS``:

    - ``driver``: its name in libcloud: ``"ec2"``, ``"upcloud"``, ``"digitalocean"``, ``"openstack"``, … These four are
      known well; any other one has the tag in its machines' names, and is believed in what it lists.
    - ``arguments``: what the driver's constructor takes: ``{"key": …, "secret": …, "region": …}``, ``host``, ``port``.
    - ``configuration``: what machines are created with where their type does not say: the arguments of the driver's
      ``create_node``. ``size``, ``image`` and ``location`` are ids or names, ``ssh_key`` is a public key.
    - ``timeout``: how many seconds a call may take, 30 by default.
    - ``count_all``: let every machine of the account count towards ``MAX_SERVERS``, and not only those of this fleet.
    - ``idempotent``: whether the cloud itself makes no second machine with the same key. Known of Amazon's EC2; at an
      address of another one that speaks like it, say so if it does.

    Whatever else is there is for ``option("NAME")`` in configurations, and never shown.
    """

    def __init__(self, name: str, options: Mapping[str, Any], *, fleet: str) -> None:
        super().__init__(name, options, fleet=fleet)
        self._where = f"{conf.SETTING}['PROVIDERS'][{name!r}]['OPTIONS']"
        driver = options.get("driver")
        if not isinstance(driver, str) or driver not in _NAMES:
            near = conf.nearest(driver, _NAMES) if driver else ""
            raise FleetError(
                f"{self._where}['driver'] should be the name of a driver of libcloud, not {driver!r}.{near}"
            )
        for key in options:
            near = conf.nearest(key, OPTIONS)
            if key not in OPTIONS and "Did you mean" in near:
                raise FleetError(f"{self._where} has no {key!r}.{near}")
        for key in ("arguments", "configuration"):
            if not isinstance(options.get(key, {}), Mapping):
                raise FleetError(f"{self._where}[{key!r}] should be a dict, not {type(options[key]).__name__}.")
        for key in ("count_all", "idempotent"):
            if not isinstance(options.get(key, False), bool):
                raise FleetError(f"{self._where}[{key!r}] should be True or False, not {options[key]!r}.")
        seconds = options.get("timeout", 30)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= 600:
            raise FleetError(f"{self._where}['timeout'] should be a number of seconds up to 600, not {seconds!r}.")
        self.timeout = timedelta(seconds=seconds)
        self._driver = driver
        self._dialect: type[Dialect] = DIALECTS.get(driver, Dialect)
        self._arguments = {**self._dialect.defaults, **options.get("arguments", {})}
        self.idempotent = options.get("idempotent", self._dialect.idempotent and self._is_amazon())
        self._clock = Clock(float(seconds))
        self._opened: Dialect | None = None

    # The eight, and two

    def create_server(self, server: ServerInfo) -> Machine:
        given = {**self.options.get("configuration", {}), **server.configuration}
        with self._call(f"create {server.name}", given, nothing_done=True) as cloud:
            self._refuse_unknown(cloud, given)
            arguments = cloud.prepare(server, given)
        with self._call(f"create {server.name}", given, begin=False, creates=True) as cloud:
            self._clock.forget()
            return cloud.create(arguments).machine

    def has_started(self, machine_id: str) -> bool:
        return self._state(machine_id) is MachineState.RUNNING

    def stop_server(self, machine_id: str) -> None:
        with self._call(f"stop {machine_id}") as cloud:
            seen = self._ours(cloud, machine_id)
            if seen is None or seen.machine.state in (MachineState.STOPPED, MachineState.DELETING):
                return
            try:
                cloud.stop(machine_id)
            except Exception as error:
                self._unless_it_is_so(cloud, machine_id, error, MachineState.STOPPING, MachineState.STOPPED)

    def has_stopped(self, machine_id: str) -> bool:
        return self._state(machine_id) in (MachineState.STOPPED, None)

    def delete_server(self, machine_id: str) -> None:
        with self._call(f"delete {machine_id}") as cloud:
            seen = self._ours(cloud, machine_id)
            if seen is None or seen.machine.state is MachineState.DELETING:
                return
            try:
                cloud.delete(machine_id)
            except Exception as error:
                self._unless_it_is_so(cloud, machine_id, error, MachineState.DELETING)

    def has_been_deleted(self, machine_id: str) -> bool:
        with self._call(f"look at {machine_id}") as cloud:
            return self._look(cloud, machine_id) is None

    def reboot_server(self, machine_id: str) -> None:
        with self._call(f"reboot {machine_id}") as cloud:
            if self._ours(cloud, machine_id) is None:
                raise NotThere(f"there is no machine {machine_id}")
            cloud.reboot(machine_id)

    def current_server_count(self) -> int:
        everybodys = bool(self.options.get("count_all"))
        with self._call("count the machines") as cloud:
            seen = cloud.all(ours=not everybodys)
        return sum(not each.gone and (everybodys or each.fleet == self.fleet) for each in seen)

    def find_by_tag(self, key: str) -> Sequence[Machine]:
        with self._call(f"look for {key}") as cloud:
            seen = cloud.keyed(key)
        # A filter of the cloud's may have wildcards, or ignore the case.
        return [m for m in self._shown(seen) if m.key == key]

    def list_servers(self) -> Sequence[Machine]:
        with self._call("list the machines") as cloud:
            return self._shown(cloud.all())

    def check(self) -> list[CheckMessage]:
        """E004: the driver cannot be made of its arguments. W004: it cannot do what servers need."""
        try:
            driver: Any = get_driver(self._driver)
            taken = _parameters(driver.__init__)
            if inspect.isfunction(driver.__new__):
                # Of a class that picks another one.
                taken = {**_parameters(driver.__new__), **taken}
        except Exception as error:
            return [self._wrong(f"{self._where}['driver'] {self._driver!r}: {error}")]
        found: list[CheckMessage] = []
        for name, parameter in taken.items():
            needed = parameter.default is inspect.Parameter.empty and parameter.kind in _NAMED
            # Optional for libcloud, and nothing can be signed without it.
            needed = needed or (name == "secret" and self._driver in ("ec2", "openstack"))
            if needed and not self._arguments.get(name):
                found.append(self._wrong(f"{self._where}['arguments'] has no {name!r}, which the driver needs."))
        regions = driver.list_regions() if self._driver == "ec2" else ()
        region = self._arguments.get("region")
        if regions and region is not None and region not in regions:
            found.append(
                self._wrong(
                    f"{self._where}['arguments']['region'] {region!r} is not known to libcloud."
                    f"{conf.nearest(region, regions)}"
                )
            )
        lacks = [verb for verb in ("create_node", "list_nodes", "destroy_node", "reboot_node") if not can(driver, verb)]
        if lacks and not inspect.isfunction(driver.__new__):
            found.append(
                Warning(
                    f"{self._where}['driver'] {self._driver!r} has no {', '.join(lacks)} in libcloud.",
                    hint="Servers there cannot be looked after in full; choose another driver, or write a provider.",
                    id="multiserver_schedule_servers.W004",
                )
            )
        return found

    # How

    @contextmanager
    def _call(
        self,
        what: str,
        given: Mapping[str, Any] | None = None,
        *,
        begin: bool = True,
        nothing_done: bool = False,
        creates: bool = False,
    ) -> Iterator[Dialect]:
        """Make one call: in time, with the errors of this package, and without a secret in them."""
        if begin:
            self._clock.begin()

        def tell(text: str) -> str:
            hidden = [text for key, value in (given or {}).items() if PRIVATE.search(str(key)) for text in texts(value)]
            return shortened(redacted(f"{self.name}: cannot {what}: {text}", [*self._secrets(), *hidden]))

        # ``from None``: the original's text, or that of an error inside of it, may be a URL with a signature.
        try:
            yield self._open()
        except FleetError:
            raise
        except ProviderError as error:
            raise _retold(error, tell(str(error))) from None
        except Exception as error:
            found = translate(error, tell, is_not_there=self._dialect.is_not_there)
            if nothing_done and type(found) is ProviderError:
                raise ProviderBusy(str(found)) from None
            if creates and self._may_be_made(found):
                raise ProviderError(str(found)) from None
            raise found from None

    def _may_be_made(self, found: ProviderError) -> bool:
        """
        Say whether a machine may be there, whatever the error says of the request that failed.

        A driver that waits for its machine asks again after the creation: out of time, throttled or without a
        connection then, "nothing was done" is true of that question alone.
        """
        if self._clock.is_blind:
            return isinstance(found, ProviderBusy)
        return any(self._dialect.may_make(method, url) for method, url in self._clock.passed)

    def _open(self) -> Dialect:
        if self._opened is None:
            driver: Any = get_driver(self._driver)
            try:
                opened = driver(**self._dialect.constructor(driver, self._arguments, self._clock.seconds))
            except (TypeError, ValueError, KeyError, LibcloudError) as error:
                text = redacted(f"{self._where}['arguments']: {text_of(error)}", self._secrets())
                raise FleetError(shortened(text)) from None
            tame(
                opened,
                self._clock,
                host=self._arguments.get("host"),
                port=self._arguments.get("port"),
                secure=self._arguments.get("secure"),
            )
            self._opened = self._dialect(opened, self.fleet, self._clock)
        return self._opened

    def _look(self, cloud: Dialect, machine_id: str) -> Seen | None:
        """Return a machine; None where the cloud clearly says that it is not there, or is there no more."""
        try:
            seen = cloud.look(machine_id)
        except Exception as error:
            if isinstance(translate(error, str, is_not_there=cloud.is_not_there), NotThere):
                return None
            raise
        return None if seen is None or seen.gone else seen

    def _ours(self, cloud: Dialect, machine_id: str) -> Seen | None:
        """Look before anything is done to a machine: an id may have come from anywhere."""
        seen = self._look(cloud, machine_id)
        if seen is not None and seen.fleet != self.fleet:
            raise ProviderRefused(f"{machine_id} does not bear the tag of the fleet {self.fleet!r}")
        return seen

    def _unless_it_is_so(self, cloud: Dialect, machine_id: str, error: Exception, *wanted: MachineState) -> None:
        """Raise the error, unless the machine was brought there by somebody else meanwhile."""
        found = translate(error, str, is_not_there=cloud.is_not_there)
        if isinstance(found, (ProviderBusy, ProviderRefused)):
            seen = self._look(cloud, machine_id)
            if seen is None or seen.machine.state in wanted:
                return
        raise error

    def _state(self, machine_id: str) -> MachineState | None:
        with self._call(f"look at {machine_id}") as cloud:
            seen = self._look(cloud, machine_id)
            if seen is None:
                return None
            if seen.machine.state is MachineState.UNKNOWN:
                raise UnknownState(f"{machine_id} is {seen.machine.word!r}, which tells neither up nor down")
            return seen.machine.state

    def _shown(self, seen: Sequence[Seen]) -> list[Machine]:
        return [each.machine for each in seen if each.fleet == self.fleet and not each.gone]

    def _refuse_unknown(self, cloud: Dialect, given: Mapping[str, Any]) -> None:
        taken = _parameters(cloud.driver.create_node)
        known = {*taken, "ssh_key"} - cloud.reserved
        for key in given:
            if key in cloud.reserved:
                raise ProviderRefused(f"the configuration has {key!r}, which is not for it to say")
            if key not in known and not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
                raise ProviderRefused(
                    f"the configuration has {key!r}, which the driver does not take.{conf.nearest(key, known)}"
                )
        for name, parameter in taken.items():
            if (
                name in known
                and parameter.default is inspect.Parameter.empty
                and parameter.kind in _NAMED
                and name not in given
            ):
                raise ProviderRefused(f"the configuration has no {name!r}, which the driver needs")

    def _secrets(self) -> Iterator[str]:
        """Yield what may never be shown: arguments with such a name, and all that is there for configurations."""
        for key, value in self._arguments.items():
            if SECRET.search(str(key)):
                yield from texts(value)
        for key, value in self.options.items():
            if key not in OPTIONS:
                yield from texts(value)

    def _is_amazon(self) -> bool:
        host = self._arguments.get("host")
        return host is None or str(host).endswith(_AMAZON)

    def _wrong(self, text: str) -> CheckMessage:
        return Error(
            redacted(text, self._secrets()),
            hint="See docs/servers.rst for OPTIONS, and libcloud's documentation of the driver for its arguments.",
            id="multiserver_schedule_servers.E004",
        )


_NAMED: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in inspect.signature(function).parameters.items() if name not in ("self", "cls")}


def _retold(error: ProviderError, text: str) -> ProviderError:
    """Return the same error with another text."""
    if isinstance(error, ProviderBusy):
        return type(error)(text, retry_after=error.retry_after)
    return type(error)(text)

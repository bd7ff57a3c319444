"""Which kinds of servers are there? What ``register_server_type`` was told, and the type ``default``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

from django.utils.module_loading import import_string

from . import conf
from .demand import MOST, Policy
from .entries import Load, ServerInfo
from .exceptions import FleetError
from .hiding import has_password, is_secret

DEFAULT: Final = "default"
Configuration = Mapping[str, Any] | Callable[[ServerInfo], Mapping[str, Any]]
Source = Callable[[], Load]
Draining = Callable[[ServerInfo], int]

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,28}[a-z0-9])?")


def option(name: str) -> dict[str, str]:
    """
    Stand, in a configuration, for ``OPTIONS[name]`` of the server's provider: put in when the provider is called.

    So a secret that a machine needs is in the settings alone, and in no row, log line or page.
    """
    return {"$option": name}


class ServerType:
    """
    A kind of server: where it is made, from what, how many there may be, and what decides that.

    Each method returns the type itself, so that calls can be chained::

        ServerType("big").provider("upcloud").configuration({"size": "4xCPU-8GB"}).between(0, 5)

    Raises FleetError where a value is wrong.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise FleetError(
                f"The server type {name!r} should have a name of at most 30 small letters, digits and inner hyphens: "
                "it becomes a part of host names."
            )
        self.name = name
        self.providers: tuple[str, ...] = ()
        self.policy = Policy()
        self.sources: tuple[Source, ...] = ()
        self.drain: Draining | None = None
        self.drain_limit = timedelta(minutes=10)
        self.billing_period: timedelta | None = timedelta(hours=1)
        self.max_age: timedelta | None = None
        self._configuration: Configuration = {}

    def __repr__(self) -> str:
        return f"<ServerType {self.name}>"

    def provider(self, *names: str) -> ServerType:
        """Make these servers there; where several are named, at the first that has room and answers."""
        if not names:
            raise FleetError(f"The server type {self.name!r}: provider() needs the name of a provider.")
        self.providers = names
        return self

    def configuration(self, configuration: Configuration) -> ServerType:
        """
        Create machines with this: a dict, or a callable that is given the ``ServerInfo`` and returns one.

        It is asked once for each server, and kept in its row. For a secret, write ``option("NAME")`` in its place.
        """
        if not isinstance(configuration, Mapping) and not callable(configuration):
            raise FleetError(
                f"The server type {self.name!r}: configuration() takes a dict, or a callable that returns one; "
                f"not {configuration!r}."
            )
        self._configuration = configuration
        return self

    def between(self, minimum: int, maximum: int | None = None) -> ServerType:
        """Have at least and at most so many, whatever is asked for; None: as many as the provider's limit allows."""
        return self._changed(minimum=minimum, maximum=maximum)

    def step(self, *, up: int | None = None, down: int | None = None) -> ServerType:
        """Change the count by at most so many at a time."""
        return self._changed(**_given(step_up=up, step_down=down))

    def cool_down(self, *, up: timedelta | None = None, down: timedelta | None = None) -> ServerType:
        """Leave the count as it is for so long after a change, before it rises (``up``) or falls (``down``)."""
        return self._changed(**_given(cool_down_up=up, cool_down_down=down))

    def stabilization(self, *, up: timedelta | None = None, down: timedelta | None = None) -> ServerType:
        """Change the count only when that was asked for all the time for so long; five minutes before it falls."""
        return self._changed(**_given(stabilization_up=up, stabilization_down=down))

    def scale_on(
        self,
        *sources: Source,
        waiting_per_server: float | None = None,
        waited: Mapping[timedelta, int] | None = None,
        hysteresis: float = 0.1,
    ) -> ServerType:
        """
        Let the load decide: that of all ``sources`` together. Of two rules, the one that asks for more.

        ``waiting_per_server``: one server for each so many jobs that wait or run. ``waited``: so many servers when the
        oldest job has waited for so long, as ``{timedelta(minutes=1): 1, timedelta(minutes=5): 3}``. ``hysteresis``:
        how far below its threshold the load has to be before the count falls, as a share of it.
        """
        if not sources:
            raise FleetError(f"The server type {self.name!r}: scale_on() needs a source of the load.")
        for source in sources:
            if not callable(source):
                raise FleetError(
                    f"The server type {self.name!r}: scale_on() takes callables that return a Load, not {source!r}."
                )
        if waiting_per_server is None and not waited:
            raise FleetError(
                f"The server type {self.name!r}: scale_on() needs a rule, waiting_per_server=… or waited={{…}}: "
                "a load alone does not say how many servers it takes."
            )
        self.sources = sources
        return self._changed(waiting_per_server=waiting_per_server, waited=waited or {}, hysteresis=hysteresis)

    def drain_with(self, drain: Draining | str | None, *, limit: timedelta = timedelta(minutes=10)) -> ServerType:
        """
        Let running work end, for ``limit`` at most, before a server is stopped or rebooted.

        ``drain`` is a ``Drain``, or a callable (or its dotted path) that is given the ``ServerInfo``, tells the server
        to take no more work, and returns how many jobs it still runs.
        """
        if isinstance(drain, str):
            try:
                drain = import_string(drain)
            except ImportError as error:
                raise FleetError(f"The server type {self.name!r}: drain_with({drain!r}): {error}.") from error
        if drain is not None and not callable(drain):
            raise FleetError(f"The server type {self.name!r}: drain_with() takes a callable, not {drain!r}.")
        if not isinstance(limit, timedelta) or limit < timedelta(0):
            raise FleetError(f"The server type {self.name!r}: the limit of drain_with() should be a timedelta.")
        self.drain, self.drain_limit = drain, limit
        return self

    def billed_by(self, period: timedelta | None) -> ServerType:
        """Say by which period machines are billed, an hour by default: whose period ends soonest is let go first."""
        if period is not None and (not isinstance(period, timedelta) or period <= timedelta(0)):
            raise FleetError(f"The server type {self.name!r}: billed_by() takes a timedelta or None, not {period!r}.")
        self.billing_period = period
        return self

    def lifetime(self, most: timedelta) -> ServerType:
        """Replace servers that are older than this, one at a time: the new one runs before the old one is drained."""
        if not isinstance(most, timedelta) or most <= timedelta(0):
            raise FleetError(f"The server type {self.name!r}: lifetime() takes a timedelta, not {most!r}.")
        self.max_age = most
        return self

    @property
    def is_static(self) -> bool:
        """Is its configuration the same for every server, so that it can be looked at before there is one?"""
        return not callable(self._configuration)

    def configuration_for(self, server: ServerInfo) -> dict[str, Any]:
        """
        Return what this server is to be created with, to be kept in its row: options are still names in it.

        Raises FleetError where it is no dict, where it holds what looks like a secret, or what no database can keep.
        """
        given = self._configuration(server) if callable(self._configuration) else self._configuration
        if not isinstance(given, Mapping):
            raise FleetError(
                # Not the value: it may be a secret.
                f"The configuration of the server type {self.name!r} should be a dict, not {type(given).__name__}."
            )
        _refuse_secrets(self.name, given, "")
        _refuse_what_is_no_json(self.name, given)
        return dict(given)

    def _changed(self, **values: Any) -> ServerType:
        try:
            self.policy = self.policy.changed(**values)
        except ValueError as error:
            raise FleetError(f"The server type {self.name!r}: {error}") from None
        return self


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _refuse_secrets(type: str, value: Any, path: str, name: str = "") -> None:
    """Refuse what looks like a secret; ``name``: of the entry that the value is in, a list's too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, str) and inner and is_secret(key):
                raise _secret(type, f"{path}{key!s} in plain text", str(key))
            _refuse_secrets(type, inner, f"{path}{key}.", str(key))
    elif isinstance(value, str):
        if has_password(value):
            raise _secret(type, f"a URL with a password in {path.rstrip('.')}", name)
    elif isinstance(value, Sequence):
        for number, inner in enumerate(value):
            _refuse_secrets(type, inner, f"{path}{number}.", name)


def _secret(type: str, what: str, name: str) -> FleetError:
    return FleetError(
        f"The configuration of the server type {type!r} has {what}, which would be kept in the database. "
        f"Put it into the OPTIONS of the provider, and write option({name!r})."
    )


def _refuse_what_is_no_json(type: str, value: Mapping[str, Any]) -> None:
    """Refuse what a database would: here it is told of one type, and there it would be of all that are planned."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FleetError(f"The configuration of the server type {type!r} is no JSON: {error}.") from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise FleetError(f"The configuration of the server type {type!r} has a NUL in a text, which no database keeps.")


def resolved(value: Any, options: Mapping[str, Any]) -> Any:
    """Return a configuration with each ``option("NAME")`` replaced. Raises FleetError where there is no such option."""
    if isinstance(value, Mapping):
        if set(value) == {"$option"}:
            name = value["$option"]
            if name not in options:
                raise FleetError(
                    f"A configuration asks for option({name!r}), which the provider's OPTIONS do not have."
                )
            return options[name]
        return {key: resolved(inner, options) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [resolved(inner, options) for inner in value]
    return value


def name_of(source: object) -> str:
    """Return how a source calls itself, or else where it is found: a place in memory is another one in each process."""
    while isinstance(source, partial):
        source = source.func
    if " at 0x" not in (name := repr(source)):
        return name
    named = source if hasattr(source, "__qualname__") else type(source)
    return f"{named.__module__}.{named.__qualname__}"


_registered: dict[str, ServerType] = {}


def register(type: ServerType) -> ServerType:
    """Make a type known; one that was registered under the same name is replaced (``default`` may be)."""
    if not isinstance(type, ServerType):
        raise FleetError(f"register_server_type() takes a ServerType, not {type!r}.")
    _registered[type.name] = type
    return type


def known() -> dict[str, ServerType]:
    """
    Return all types by name, each with the providers that it is made at.

    Raises FleetError where one names a provider that is not in the settings.
    """
    for trouble in troubles():
        raise FleetError(trouble)
    return declared()


def declared() -> dict[str, ServerType]:
    """Return all types by name, to be looked at: also those that can be made nowhere, since their provider is wrong."""
    types = {DEFAULT: ServerType(DEFAULT)} if conf.load().providers else {}
    return types | _registered


def troubles() -> list[str]:
    """Return which types name a provider that is not in the settings: a sentence for each."""
    providers = conf.load().providers
    return [
        f"The server type {type.name!r} is to be made at {name!r}, which is no provider.{conf.nearest(name, providers)}"
        for type in declared().values()
        for name in type.providers
        if name not in providers
    ]


def is_registered(name: str) -> bool:
    """Say whether a type of this name was registered; ``default`` is a type without that."""
    return name in _registered


def get(name: str) -> ServerType:
    """Return the type of this name. Raises FleetError, with the nearest known one, where there is none."""
    types = known()
    if name not in types:
        raise FleetError(f"No server type is named {name!r}.{conf.nearest(name, types)}")
    return types[name]


def bounded(type: ServerType) -> Policy:
    """Return a type's policy, with its providers' limits where it has no maximum: what can't be had is no aim."""
    if type.policy.maximum is not None:
        return type.policy
    limits = conf.load().providers
    most = sum(limits[name].max_servers for name in providers_of(type))
    return type.policy.changed(maximum=min(MOST, max(type.policy.minimum, most)))


def providers_of(type: ServerType) -> tuple[str, ...]:
    """Return the names of the providers that it is made at, by preference: the first of the settings by default."""
    return type.providers or tuple(conf.load().providers)[:1]

"""The one setting, ``MULTISERVER_SCHEDULE_SERVERS``: its keys, their defaults, and what a wrong value is told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Final

from django.conf import settings

from multiserver_schedule import conf as schedule_conf

from .exceptions import FleetError

SETTING: Final = "MULTISERVER_SCHEDULE_SERVERS"
PROVIDER_KEYS: Final = ("BACKEND", "MAX_SERVERS", "OPTIONS", "ONLY_ON")
_FLEET: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,16}[a-z0-9])?")

_PROVIDER: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """One entry of ``PROVIDERS``."""

    backend: str
    max_servers: int = 20
    """As many machines as may be there at once; what a provider says that it has counts, and not only our rows."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The provider's own settings, secrets among them: never shown."""
    only_on: tuple[str, ...] = ()
    """The SERVER_NAMEs that may call it; empty: all. For a provider whose machines are seen on one host alone."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the project set."""

    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)
    fleet: str = ""
    """Whose machines they are: each bears it as a tag. Another one for staging than for production."""
    poll: timedelta = timedelta(seconds=20)
    """How often a provider is asked whether it is done."""
    monitor_every: timedelta = timedelta(minutes=1)
    """How often the load is asked, and decided upon."""
    hanging_after: timedelta = timedelta(minutes=10)
    orphans: str = "delete"
    """What becomes of machines with our tag and without a row: "delete", or "report"."""
    prune_days: int = 7
    """For how many days deleted servers, and decisions, are kept."""


KEYS: Final = tuple(f.name.upper() for f in fields(Settings))


def load() -> Settings:
    """Return the settings as they are now. Raises FleetError, naming the key, where one is unknown or wrong."""
    given = getattr(settings, SETTING, {})
    if not isinstance(given, Mapping):
        raise FleetError(f"{SETTING} should be a dict, not {type(given).__name__}.")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in KEYS:
            raise FleetError(f"{SETTING} has no option {key!r}.{nearest(key, KEYS)}")
        if key == "PROVIDERS":
            values["providers"] = _providers(value)
        elif key == "FLEET":
            if not isinstance(value, str) or not _FLEET.fullmatch(value):
                raise FleetError(
                    f"{SETTING}['FLEET'] should be a name of at most 18 small letters, digits and inner hyphens, "
                    f"such as 'shop-production'; not {value!r}."
                )
            values["fleet"] = value
        elif key == "ORPHANS":
            if value not in ("delete", "report"):
                raise FleetError(f"{SETTING}['ORPHANS'] should be 'delete' or 'report', not {value!r}.")
            values["orphans"] = value
        elif key == "PRUNE_DAYS":
            most = schedule_conf.MOST_DAYS
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise FleetError(f"{SETTING}['PRUNE_DAYS'] should be a whole number from 0 to {most}, not {value!r}.")
            values["prune_days"] = value
        else:
            if not isinstance(value, timedelta) or value <= timedelta(0):
                raise FleetError(f"{SETTING}[{key!r}] should be a timedelta longer than zero, not {value!r}.")
            values[key.lower()] = value
    values.setdefault("fleet", _own_name())
    return Settings(**values)


def provider(name: str) -> ProviderSettings:
    """Return the settings of one provider. Raises FleetError, with the nearest known one, where there is none."""
    providers = load().providers
    if name not in providers:
        raise FleetError(f"{SETTING}['PROVIDERS'] has no {name!r}.{nearest(name, providers)}")
    return providers[name]


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a sentence that helps whoever misspelt a name, with a space before it."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1) or difflib.get_close_matches(str(name).upper(), known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known are: {', '.join(known)}." if known else " There is none."


def is_named() -> bool:
    """Say whether the project gave its fleet a name of its own."""
    given = getattr(settings, SETTING, {})
    return isinstance(given, Mapping) and "FLEET" in given


def _own_name() -> str:
    """Name the fleet after the project's package and environment, so that not all projects have the same name."""
    urls = str(getattr(settings, "ROOT_URLCONF", "") or "")
    environment = schedule_conf.load().environment
    name = "-".join(filter(None, (urls.rpartition(".")[0].rpartition(".")[2], environment)))
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:18].strip("-") or "default"


def _providers(value: object) -> dict[str, ProviderSettings]:
    if not isinstance(value, Mapping):
        raise FleetError(f"{SETTING}['PROVIDERS'] should be a dict of name to {{'BACKEND': …}}.")
    providers = {}
    for name, entry in value.items():
        where = f"{SETTING}['PROVIDERS'][{name!r}]"
        if not isinstance(name, str) or not _PROVIDER.fullmatch(name):
            raise FleetError(
                f"{where}: the name of a provider should have at most 64 letters, digits, dots, hyphens, underscores "
                "and colons, such as 'web1'; it becomes a part of the name of its task."
            )
        if not isinstance(entry, Mapping) or not isinstance(entry.get("BACKEND"), str):
            raise FleetError(f"{where} should be a dict with a 'BACKEND', a dotted path.")
        for key in entry:
            if key not in PROVIDER_KEYS:
                raise FleetError(f"{where} has no option {key!r}.{nearest(key, PROVIDER_KEYS)}")
        most = entry.get("MAX_SERVERS", 20)
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise FleetError(f"{where}['MAX_SERVERS'] should be a whole number from 0 up, not {most!r}.")
        options = entry.get("OPTIONS", {})
        if not isinstance(options, Mapping):
            # Not the value: it may be a secret.
            raise FleetError(f"{where}['OPTIONS'] should be a dict, not {type(options).__name__}.")
        only_on = entry.get("ONLY_ON", ())
        if not isinstance(only_on, list | tuple | set | frozenset) or not all(
            isinstance(each, str) for each in only_on
        ):
            raise FleetError(
                f"{where}['ONLY_ON'] should be a list of SERVER_NAMEs, such as ['web1'], not {only_on!r}. "
                "Leave it out where each server may call the provider."
            )
        providers[name] = ProviderSettings(entry["BACKEND"], most, dict(options), tuple(only_on))
    return providers

"""
``manage.py check`` for dynamic servers: what would keep servers from being made, or lose sight of them.

Nothing is asked of a provider. No value of its OPTIONS is ever in what is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from django.apps import apps
from django.core.checks import CheckMessage, Error, Warning
from django.core.checks import register as register_check
from django.db import connections, router

from multiserver_schedule.declare import discover_errors
from multiserver_schedule.exceptions import ScheduleError

from . import conf, providers, types
from .entries import ServerInfo
from .exceptions import FleetError
from .hiding import without

TAG: Final = "multiserver_schedule_servers"
MODELS: Final = ("Server", "Transition", "Target", "Decision", "Provider")


def register() -> None:
    """Register every check; called once, by the app."""
    register_check(check_settings, TAG)
    register_check(check_providers, TAG)
    register_check(check_types, TAG)
    register_check(check_database, TAG)


def check_settings(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E001 a setting is wrong, E005 the scheduler is missing, W002 a fleet without a name of its own."""
    found: list[CheckMessage] = []
    if not apps.is_installed("multiserver_schedule"):
        found.append(
            Error(
                "'multiserver_schedule' is not in INSTALLED_APPS: nothing would ever look after the servers.",
                hint="Add it, and run `manage.py runschedule` on each server that may look after them.",
                id="multiserver_schedule_servers.E005",
            )
        )
    try:
        settings = conf.load()
    except FleetError as error:
        found.append(Error(str(error), hint="See docs/servers.rst.", id="multiserver_schedule_servers.E001"))
        return found
    except ScheduleError:  # of the scheduler's own settings, which says it itself
        return found
    if not conf.is_named():
        found.extend(_unnamed(settings))
    return found


def check_providers(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """
    E002 a provider that cannot be made, W001 one whose machines are seen on one host, W005 two with one account; and
    what each says itself.
    """
    try:
        chosen = conf.load().providers
    except ScheduleError:  # E001, or the scheduler's
        return []
    found: list[CheckMessage] = []
    sound: dict[str, conf.ProviderSettings] = {}
    for name, settings in chosen.items():
        where = f"{conf.SETTING}['PROVIDERS'][{name!r}]"
        try:
            provider = providers.make(name)
            said = provider.check()
        except Exception as error:  # whatever somebody's constructor raises
            if isinstance(error, FleetError):
                text = str(error)
            else:
                # Its author did not think of whom it is shown to.
                text = f"{where}: {type(error).__name__}: {without(str(error), settings.options)}"
            found.append(
                Error(
                    text,
                    hint="Correct its BACKEND and OPTIONS; nothing is created or deleted there until then.",
                    id="multiserver_schedule_servers.E002",
                )
            )
            continue
        found.extend(said)
        if not provider.local:
            twin = next((each for each, other in sound.items() if _is_one_account(other, settings)), None)
            if twin is not None:
                found.append(
                    Warning(
                        f"{conf.SETTING}['PROVIDERS'] has {twin!r} and {name!r} with the same BACKEND and OPTIONS: "
                        "each shows the machines of both, and counts them towards its MAX_SERVERS.",
                        hint="Keep one of them. To make machines of several kinds at one account, register several "
                        "types. To give a provider another name, take the old one out: its servers go over.",
                        id="multiserver_schedule_servers.W005",
                    )
                )
            sound[name] = settings
        if provider.local and not settings.only_on:
            found.append(
                Warning(
                    f"{where}: its machines are seen on one host only, and it has no ONLY_ON: each server that runs "
                    "the schedule would take the machines of the others for gone.",
                    hint="Name the host that has them: 'ONLY_ON': ['<its SERVER_NAME>']. Where a single server runs "
                    "the schedule that is fine: silence this there.",
                    id="multiserver_schedule_servers.W001",
                )
            )
    return found


def check_types(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E003 a type that cannot be made, W003 one that may be wanted more often than there is room."""
    try:
        settings = conf.load().providers
        # A module that cannot be read is E010 of the scheduler's.
        discover_errors()
    except ScheduleError:
        return []
    try:
        known = types.known()
    except FleetError as error:
        return [_wrong_type(str(error))]
    except ScheduleError:
        return []
    found: list[CheckMessage] = []
    for type in known.values():
        names = types.providers_of(type)
        if not names:
            found.append(_wrong_type(f"The server type {type.name!r} has no provider: {conf.SETTING} has none."))
            continue
        found.extend(_wrong_type(problem) for problem in _configuration_of(type, names, settings))
        room = sum(settings[name].max_servers for name in names)
        most = max(type.policy.maximum or 0, type.policy.minimum)
        if most > room:
            found.append(
                Warning(
                    f"The server type {type.name!r} may be wanted {most} times, and its providers "
                    f"({', '.join(names)}) take {room} machines together: the rest is never made.",
                    hint="Raise MAX_SERVERS, or lower the type's between().",
                    id="multiserver_schedule_servers.W003",
                )
            )
    return found


def check_database(app_configs: Any = None, **options: Any) -> list[CheckMessage]:
    """E006 tables in several databases, E007 a database with a TIME_ZONE."""
    models = [apps.get_model("multiserver_schedule_servers", name) for name in MODELS]
    written = list(dict.fromkeys(router.db_for_write(model) for model in models))
    if len(written) > 1:
        return [
            Error(
                f"The models of multiserver_schedule_servers are routed to several databases ({', '.join(written)}): a "
                "change of a server and its record are one transaction.",
                hint="Route all of them to one.",
                id="multiserver_schedule_servers.E006",
            )
        ]
    [using] = written
    found: list[CheckMessage] = []
    if using in connections.settings and connections.settings[using].get("TIME_ZONE"):
        found.append(
            Error(
                f"The database {using!r} has a TIME_ZONE, so that the times of its clock and of its rows would differ.",
                hint=f"Remove TIME_ZONE from DATABASES[{using!r}], or route multiserver_schedule_servers to another "
                "alias.",
                id="multiserver_schedule_servers.E007",
            )
        )
    return found


def _is_one_account(one: conf.ProviderSettings, other: conf.ProviderSettings) -> bool:
    return bool(one.options) and (one.backend, one.options) == (other.backend, other.options)


def _unnamed(settings: conf.Settings) -> Iterator[CheckMessage]:
    """
    Say whose machines could be taken for others', where the fleet's name was made up.

    Those of this host, too: every project whose package is "config" has one name, and the same folder in the home of
    its user. Nothing that tells two projects apart stays the same over deploys (a release has a folder of its own, and
    settings are called "config.settings" in both), and with another folder a project would lose its workers. A provider
    that was given a 'directory' has one of its own.
    """
    known = {name: _is_local(name) for name in sorted(settings.providers)}
    away = [name for name, is_local in known.items() if is_local is False]
    here = [
        name for name, is_local in known.items() if is_local and "directory" not in settings.providers[name].options
    ]
    at_the_account = "Another project, or your staging, that has the same name at the same account"
    on_this_host = "Another project, or your staging, that this user runs here and that has the same name"
    for names, are, who in ((away, "are tagged", at_the_account), (here, "of this host are those of", on_this_host)):
        if names:
            yield Warning(
                f"{conf.SETTING} has no FLEET, so that machines at {', '.join(names)} {are} {settings.fleet!r}, a "
                f"name made of ROOT_URLCONF. {who} would take them for its own, and delete them.",
                hint=f"Give each environment a name of its own: {conf.SETTING}['FLEET'] = 'shop-production'. Write "
                f"{settings.fleet!r} where machines run already: under another name they are not seen any more.",
                id="multiserver_schedule_servers.W002",
            )


def _is_local(name: str) -> bool | None:
    try:
        return providers.make(name).local
    except Exception:  # E002 says it
        return None


def _configuration_of(
    type: types.ServerType, names: Sequence[str], settings: Mapping[str, conf.ProviderSettings]
) -> Iterator[str]:
    """Say what is wrong with a configuration that is a dict; a callable is asked only when a server is made."""
    if not type.is_static:
        return
    info = ServerInfo(name=f"{type.name}-check", key="check", type=type.name, provider=names[0])
    try:
        configuration = type.configuration_for(info)
        for name in names:
            types.resolved(configuration, settings[name].options)
    except FleetError as error:
        yield str(error)


def _wrong_type(text: str) -> CheckMessage:
    return Error(
        text,
        hint="Correct what register_server_type() is given.",
        id="multiserver_schedule_servers.E003",
    )

"""What docs/servers.rst and the README say of dynamic servers: each block can be run, each name and number is there."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
import textwrap
from argparse import ArgumentParser, _SubParsersAction
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.management import load_command_class
from django.db import connections
from django.dispatch import Signal
from django.test.utils import CaptureQueriesContext

from multiserver_schedule.declare import registry
from multiserver_schedule.servers import (
    checks,
    conf,
    fleet,
    ledger,
    monitor,
    observe,
    plan,
    providers,
    signals,
    types,
    visit,
)
from multiserver_schedule.servers.demand import Policy
from multiserver_schedule.servers.drains.term import TermDrain
from multiserver_schedule.servers.entries import Load, ServerInfo
from multiserver_schedule.servers.exceptions import ProviderError
from multiserver_schedule.servers.models import Decision, Provider, Server, Target
from multiserver_schedule.servers.providers import process
from multiserver_schedule.servers.providers.base import BaseProvider
from multiserver_schedule.servers.providers.process import OPTIONS, ProcessProvider
from multiserver_schedule.servers.states import Status
from multiserver_schedule.testing import ProviderContract

from ..stores import ROOT, Store
from ..test_docs_operating import said_by_the_code
from .conftest import NOON, Site
from .needs import needs

PAGE = (ROOT / "docs" / "servers.rst").read_text()
README = (ROOT / "README.rst").read_text()
PROSE = " ".join(PAGE.split())
NAMED = re.findall(r"``([^`]+)``", PROSE)
WORKER = ROOT / "example_project" / "letters" / "management" / "commands" / "work.py"


def blocks(language: str, page: str = PAGE) -> list[str]:
    """Return what is in the code blocks of this language."""
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?:(?:    .*)?\n)+)", page, re.MULTILINE)
    return [textwrap.dedent(each) for each in found]


PYTHON = blocks("python")


def block(text: str) -> str:
    """Return the one block with this text in it."""
    [found] = [each for each in PYTHON if text in each]
    return found


def section(title: str) -> str:
    """Return what is under a title, up to the next one of its rank."""
    found = re.search(rf"^{re.escape(title)}\n=+\n(.*?)(?=^[^\n]+\n={{5,}}\n|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def run(text: str, **values: Any) -> dict[str, Any]:
    """Run a block, and return what it defines."""
    exec(compile(text, "docs/servers.rst", "exec"), values)  # noqa: S102
    return values


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Celery app of which the page speaks."""
    celery = needs("celery")
    module = ModuleType("shop.celery")
    module.app = celery.Celery("shop", broker="memory://", set_as_current=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop", ModuleType("shop"))
    monkeypatch.setitem(sys.modules, "shop.celery", module)


def set_(settings: Any, text: str) -> Mapping[str, Any]:
    """Use the settings of a block, and return the providers."""
    values = run(text, INSTALLED_APPS=[])
    settings.MULTISERVER_SCHEDULE_SERVERS = values["MULTISERVER_SCHEDULE_SERVERS"]
    return conf.load().providers


# -- what it says to write --------------------------------------------------------------------------------------------

RUN_ELSEWHERE = ("fleet.ensure(3", "db_worker.Worker", "before_task_publish")


@pytest.mark.parametrize("text", [text for text in PYTHON if not any(each in text for each in RUN_ELSEWHERE)])
def test_every_block_of_the_page_can_be_run(text: str, shop: None, settings: Any) -> None:
    for module in ("rq", "django_tasks_db"):
        needs(module)
    run(text, INSTALLED_APPS=[])


def test_the_first_settings_and_the_first_schedule_make_a_fleet(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("rq")
    # They are of a machine, wherever this is run.
    monkeypatch.setattr(process, "_is_in_a_container", lambda: False)
    [(name, chosen)] = set_(settings, block("INSTALLED_APPS")).items()
    assert (name, chosen.max_servers, chosen.only_on) == ("here", 4, ("web1",))
    assert isinstance(providers.make(name), ProcessProvider)
    run(block("schedule.py, in any of your apps"))
    kind = types.get("worker")
    assert (kind.policy.minimum, kind.policy.maximum, kind.policy.waiting_per_server) == (1, 4, 20)
    assert isinstance(kind.drain, TermDrain) and types.providers_of(kind) == ("here",)
    assert [each.id for each in checks.check_settings() + checks.check_providers()] == []


def test_the_first_settings_go_on_from_those_of_the_readme() -> None:
    """Named twice, an app keeps the whole project from starting."""
    [first] = re.findall(r"^    (INSTALLED_APPS \+= .+)$", README, re.MULTILINE)
    apps = run(block("INSTALLED_APPS"), **run(first, INSTALLED_APPS=[]))["INSTALLED_APPS"]
    assert apps == ["multiserver_schedule", "multiserver_schedule.servers"]


def test_the_option_of_the_page_is_filled_in_and_not_kept(settings: Any) -> None:
    set_(settings, block("INSTALLED_APPS"))
    run(block('option("DB_PASSWORD")'))
    kind = types.get("encoder")
    kept = kind.configuration_for(ServerInfo("encoder-1", "1", "encoder", "here"))
    assert kept["env"]["DB_PASSWORD"] == {"$option": "DB_PASSWORD"}
    assert types.resolved(kept, {"DB_PASSWORD": "x"})["env"] == {"DB_PASSWORD": "x", "WORKER": "{name}"}


def test_the_calls_by_hand_do_what_is_beside_them(site: Site) -> None:
    fleet.register_server_type(fleet.ServerType("worker"))
    values = run(block("fleet.ensure(3"))
    assert values["fleet"].wanted_count("worker") == 3 + 2 - 1
    called = set(re.findall(r"fleet\.(\w+)\(", block("fleet.ensure(3")))
    assert called == set(fleet.__all__) - {"ServerType", "determine_server_count", "option", "register_server_type"}


@pytest.mark.parametrize(("waited", "count"), [(0, 1), (2, 2), (6, 3)])
def test_the_function_of_the_page_asks_for_as_many_as_it_seems(waited: int, count: int) -> None:
    needs("rq")
    values = run(block("by_waiting_time"))
    values["queue"].load = lambda: Load(oldest=timedelta(minutes=waited, seconds=1))
    assert values["by_waiting_time"](fleet) == count


def test_the_stamp_is_one_that_celery_can_be_given(shop: None) -> None:
    values = run(block("before_task_publish"))
    assert values["signals"].before_task_publish.disconnect(values["stamp"])


def test_every_cloud_of_the_page_is_one_that_its_driver_takes(settings: Any) -> None:
    needs("libcloud")
    chosen = set_(settings, block("LIBCLOUD ="))
    assert list(chosen) == ["amazon", "upcloud", "digitalocean", "openstack"]
    for name, entry in chosen.items():
        provider: Any = providers.make(name)
        assert provider.check() == []
        provider._refuse_unknown(provider._open(), entry.options["configuration"])
    run(block("def machine(server)"))
    kind = types.get("amazon-worker")
    given = kind.configuration_for(ServerInfo("amazon-worker-1", "1", "amazon-worker", "amazon"))
    amazon: Any = providers.make("amazon")
    amazon._refuse_unknown(amazon._open(), {**chosen["amazon"].options["configuration"], **given})
    assert "hostnamectl set-hostname amazon-worker-1\n" in given["ex_userdata"]


def test_the_worker_of_the_page_is_that_of_the_example_project() -> None:
    def methods(source: str) -> dict[str, str]:
        found = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                is_documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
                found[node.name] = "\n".join(map(ast.unparse, node.body[is_documented:]))
        return found

    assert methods(block("db_worker.Worker")) == methods(WORKER.read_text())


def test_the_tests_of_the_page_are_those_of_the_contract() -> None:
    kind = run(block("class TestMine"))["TestMine"]
    assert issubclass(kind, ProviderContract)
    assert {name for name in vars(kind) if not name.startswith("_")} == {"make_provider"}


def test_the_block_of_the_readme_can_be_run_and_is_short(settings: Any, shop: None) -> None:
    title = README.index("Dynamic servers\n=====")
    lines = README[title : README.index("Settings\n=====")].strip().splitlines()
    assert len([line for line in lines if line]) <= 15 and "<docs/servers.rst>`_" in README[title:]
    [text] = [each for each in blocks("python", README) if "register_server_type" in each]
    run(text)
    assert types._registered["worker"].policy.maximum == 10


# -- what it names ----------------------------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    """Return that of the command, as for a command line."""
    loaded = load_command_class("multiserver_schedule.servers", "servers")
    loaded._called_from_command_line = True  # type: ignore[attr-defined]
    return loaded.create_parser("manage.py", "servers")


SERVERS = parser()
[VERBS] = [action.choices for action in SERVERS._actions if isinstance(action, _SubParsersAction)]
CALLS = [line[2:] for text in blocks("console") for line in text.splitlines() if line.startswith("$ manage.py")]


def test_every_call_is_understood_and_every_verb_is_at_work() -> None:
    shown = set()
    for call in CALLS:
        program, command, *arguments = shlex.split(call)
        assert (program, command) == ("manage.py", "servers")
        SERVERS.parse_args(arguments)
        shown.add(arguments[0])
    assert shown == set(VERBS)


def test_every_verb_and_option_that_the_text_names_exists() -> None:
    known = {text for each in VERBS.values() for action in each._actions for text in action.option_strings}
    for text in NAMED:
        if words := re.fullmatch(r"(?:manage\.py )?servers ([a-z]+)\b(.*)", text):
            assert words[1] in VERBS, text
            assert set(re.findall(r"--[a-z-]+", words[2])) <= known, text
    assert {"--all", "--type", "--timezone", "--json", "--dry-run", "--days", "--provider"} <= known


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    table = section("Settings")
    assert set(re.findall(r"^   \* - ``([A-Z_]+)``", table, re.MULTILINE)) == set(conf.KEYS)
    assert all(f"``{key}``" in table for key in conf.PROVIDER_KEYS)
    capitals = {word for text in NAMED for word in re.findall(r"\b[A-Z][A-Z_]{3,}\b", text)}
    known = {*conf.KEYS, *conf.PROVIDER_KEYS, conf.SETTING, "SERVER_NAME", "ENVIRONMENT", "TIME_ZONE", "DB_PASSWORD"}
    assert capitals <= known, capitals - known


def test_the_defaults_of_the_table_are_those_of_the_code() -> None:
    default, table = conf.Settings(), section("Settings")
    for key, value, text in (
        ("POLL", default.poll, "20 seconds"),
        ("MONITOR_EVERY", default.monitor_every, "1 minute"),
        ("HANGING_AFTER", default.hanging_after, "10 minutes"),
    ):
        assert f"``{key}``\n     - {text}\n" in table
        number, unit = text.split()
        assert value == timedelta(**{unit.rstrip("s") + "s": int(number)})
    assert f"``PRUNE_DAYS``\n     - {default.prune_days}\n" in table
    assert f'``ORPHANS``\n     - ``"{default.orphans}"``\n' in table
    assert f"``MAX_SERVERS`` ({conf.ProviderSettings('x').max_servers})" in table


def test_every_signal_is_in_the_table_and_nothing_else() -> None:
    there = {name for name, value in vars(signals).items() if isinstance(value, Signal)}
    assert set(re.findall(r"^``(\w+)``", section("Signals"), re.MULTILINE)) == there


def test_every_status_is_in_the_table_and_nothing_else() -> None:
    named = re.findall(r"^``(\w+)`` ", section("How a server lives"), re.MULTILINE)
    assert Counter(named) == Counter(str(status) for status in Status)


def test_every_call_of_a_type_and_of_the_fleet_is_named() -> None:
    methods = {name for name, each in vars(types.ServerType).items() if inspect.isfunction(each) and name[0] != "_"}
    table = section("Types")
    assert set(re.findall(r"^   \* - ``\.(\w+)\(", table, re.MULTILINE)) == methods - {"configuration_for"}
    assert [name for name in fleet.__all__ if name not in PAGE] == []


def test_every_check_is_in_the_table_and_nothing_else() -> None:
    folder = Path(inspect.getfile(checks)).parent
    said = {
        found
        for path in folder.rglob("*.py")
        for found in re.findall(r'"multiserver_schedule_servers\.([EW]\d{3})"', path.read_text())
    }
    named = re.findall(r"^``multiserver_schedule_servers\.([EW]\d{3})``", section("System checks"), re.MULTILINE)
    assert sorted(said) == named


def test_the_permissions_are_all_that_there_are() -> None:
    rows = re.findall(r"^(``\w+``(?:, ``\w+``)*) ", section("In the admin"), re.MULTILINE)
    views = {f"view_{model._meta.model_name}" for model in (Server, Target, Decision, Provider)}
    given = {name for name, _ in Server._meta.permissions}
    assert {name for row in rows for name in re.findall(r"\w+", row)} == given | views


def test_every_method_and_error_of_a_provider_is_named() -> None:
    told = section("A provider of your own")
    assert all(f"``{name}``" in told for name in BaseProvider.__abstractmethods__)
    kinds = {kind.__name__ for kind in _below(ProviderError) if kind.__module__ == ProviderError.__module__}
    assert set(re.findall(r"^``(\w+)`` ", told, re.MULTILINE)) == kinds
    assert BaseProvider.settles == timedelta(minutes=5) and "only after five minutes" in PROSE


def _below(kind: type[Exception]) -> list[type[Exception]]:
    return [each for direct in kind.__subclasses__() for each in (direct, *_below(direct))]


def test_every_option_of_the_providers_is_named() -> None:
    told = section("Providers")
    assert all(f"``{name}``" in told for name in OPTIONS)
    needs("libcloud")
    from multiserver_schedule.servers.providers.libcloud.provider import OPTIONS as CLOUD

    assert all(f"``{name}``" in told or f'"{name}":' in told for name in CLOUD)


def test_the_dotted_paths_can_be_imported() -> None:
    needs("libcloud")
    for path in {text for text in NAMED if re.fullmatch(r"multiserver_schedule\.servers\.\w+\.\w+\.[A-Z]\w+", text)}:
        providers.import_string(path)


# -- its numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    policy = Policy()
    assert policy.stabilization_down == timedelta(minutes=5) and "``stabilization(down=)``   5 minutes" in PAGE
    assert policy.stabilization_up == policy.cool_down_up == policy.cool_down_down == timedelta(0)
    assert policy.hysteresis == 0.1 and "``hysteresis=``            0.1 " in PAGE
    assert (policy.minimum, policy.maximum, policy.step_up, policy.step_down) == (0, None, None, None)
    assert types.ServerType("x").drain_limit == timedelta(minutes=10) and "ten minutes, unless you say" in PROSE
    assert types.ServerType("x").billing_period == timedelta(hours=1)
    assert ProcessProvider.stop_timeout == timedelta(minutes=1) and "a ``timedelta``, a minute" in PROSE
    assert timedelta(seconds=30) == monitor.ANSWERS_WITHIN and "does not answer within 30 seconds" in PROSE
    assert timedelta(seconds=30) == observe.GONE_AFTER and "missing for 30 seconds" in PROSE
    assert timedelta(minutes=10) == visit.MOST_BACKOFF and "up to 10 minutes" in PROSE
    assert max(visit.ANSWERS_WITHIN, 3 * BaseProvider.timeout) == timedelta(seconds=90)
    assert "after three times the provider's timeout, 90 seconds" in PROSE
    assert timedelta(minutes=1) == plan.PATIENCE and "the next provider is tried after a minute" in PROSE
    default = conf.Settings()
    assert default.poll + default.monitor_every == timedelta(seconds=80) and "within about eighty seconds" in PROSE


@pytest.mark.parametrize(
    ("given", "monitor", "reconcile"),
    [
        ({}, 60, 20),
        ({"POLL": timedelta(seconds=5), "MONITOR_EVERY": timedelta(seconds=30)}, 30, 5),
        ({"POLL": timedelta(minutes=2)}, 60, 20),
    ],
)
def test_the_tasks_run_as_often_as_the_settings_say(
    settings: Any, monkeypatch: pytest.MonkeyPatch, given: Mapping[str, Any], monitor: int, reconcile: int
) -> None:
    set_(settings, block("INSTALLED_APPS"))
    settings.MULTISERVER_SCHEDULE_SERVERS = {**settings.MULTISERVER_SCHEDULE_SERVERS, **given}
    module = "multiserver_schedule.servers.schedule"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with registry.set_aside():
        import_module(module)
        registry.complete_all()
        tasks = dict(registry.tasks)
    assert set(tasks) == {f"multiserver_schedule_servers.{name}" for name in ("monitor", "reconcile.here", "prune")}
    for name, seconds in (("monitor", monitor), ("reconcile.here", reconcile)):
        first = tasks[f"multiserver_schedule_servers.{name}"].next(NOON)
        assert first is not None
        second = tasks[f"multiserver_schedule_servers.{name}"].next(first)
        assert second is not None and second - first == timedelta(seconds=seconds)
    assert "``multiserver_schedule_servers.prune``" in PROSE


def test_it_costs_what_the_page_says(site: Site, rows: Store) -> None:
    if rows.name != "sqlite":
        pytest.skip("counted on one database")
    site.options(MAX_SERVERS=20, looks=2)

    def minute() -> tuple[Counter[str], int]:
        before = len(site.cloud.calls)
        with CaptureQueriesContext(connections[rows.alias]) as statements:
            site.monitor()
            for _ in range(3):
                site.reconcile()
                site.later()
        return Counter(site.cloud.calls[before:]), len(statements)

    def total(minutes: int) -> tuple[Counter[str], int]:
        calls, statements = Counter[str](), 0
        for _ in range(minutes):
            calls, statements = calls + minute()[0], statements + minute()[1]
        return calls, statements

    fleet.ensure(10)
    up, _ = minute()
    assert up == {"list_servers": 3, "current_server_count": 3, "create_server": 10, "has_started": 30}
    assert "six a minute" in PROSE and "To start ten took 10 creations" in PROSE
    minute()
    calls, statements = minute()
    assert calls == {"list_servers": 1, "current_server_count": 1} and "on its way, two a minute" in PROSE
    [told] = re.findall(r"(\d+) a minute, while nothing is on its way", PROSE)
    assert statements <= int(told) + 2
    fleet.ensure(0)
    down, _ = minute()
    assert (down["stop_server"], down["delete_server"]) == (10, 10)
    assert ledger.servers().exclude(status=Status.DELETED).count() <= 10


# -- what it says that people read ------------------------------------------------------------------------------------


def test_what_the_commands_print_is_what_is_quoted() -> None:
    told = said_by_the_code()
    for text in (
        "*: * wanted, from the next pass on",
        "*: not *, since the type allows *.",
        "another one is made in its place, since * of its type are wanted as before: to have fewer, ask for fewer",
        "its next step is tried at the next look at *",
        "a reboot is asked for of * server*",
        "would forget",
        "+ create one at *: *",
        "\nNothing was changed.",
        "No server type is named *.*",
        "it is deleted already",
        "its machine is * from the next look at * on",
        "*: its load is asked again soon, and changes this as its rules say.",
        "type *: *",
        "* → * wanted",
        "* for now: * when * are asked for until *",
    ):
        assert text in told, text
        assert all(part.strip() in PROSE for part in text.split("*")), text


def test_no_line_is_longer_than_a_terminal_of_120() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 120] == []


def test_the_page_is_linked_to() -> None:
    assert "<docs/servers.rst>`_" in README

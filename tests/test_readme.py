"""What the README says is run: its schedules declare, its settings load, its first lines are enough to start."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from django.test import override_settings

from multiserver_schedule import conf
from multiserver_schedule.declare import registry, verify

README = (Path(__file__).resolve().parent.parent / "README.rst").read_text()
BLOCKS = [
    textwrap.dedent(found)
    for found in re.findall(r"^\.\. code-block:: python\n\n((?:(?:    .*)?\n)+)", README, re.MULTILINE)
]


def block(start: str) -> str:
    """Return the one block with this text in it."""
    [found] = [text for text in BLOCKS if start in text]
    return found


def declare(source: str, name: str) -> dict[str, Any]:
    """Run a block as the module of that name, and return the tasks that it declares."""
    module = sys.modules[name] = ModuleType(name)
    try:
        with registry.set_aside():
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)  # noqa: S102
            registry.complete(name)
            return dict(registry.tasks)
    finally:
        del sys.modules[name]


def test_the_first_schedule_declares_two_tasks() -> None:
    tasks = declare(block('schedule.command("clearsessions")'), "shop.schedule")
    assert sorted(tasks) == ["shop.clearsessions", "shop.refresh"]
    assert verify(tasks["shop.clearsessions"]) == []
    assert tasks["shop.refresh"].limit is not None


def test_the_schedule_under_declaring_declares_three_tasks() -> None:
    tasks = declare(block("send_reminders"), "shop.schedule")
    assert sorted(tasks) == ["shop.pg_dump", "shop.send_digests", "shop.send_reminders"]


def test_the_settings_are_the_defaults() -> None:
    values: dict[str, Any] = {}
    exec(block('"HOUSEKEEPING"'), values)  # noqa: S102
    with override_settings(MULTISERVER_SCHEDULE=values["MULTISERVER_SCHEDULE"]):
        given = conf.load()
    with override_settings(MULTISERVER_SCHEDULE={}):
        default = conf.load()
    assert {k: v for k, v in vars_of(given).items() if k != "locks"} == {
        k: v for k, v in vars_of(default).items() if k != "locks"
    }
    assert set(values["MULTISERVER_SCHEDULE"]) == set(conf.KEYS)


def vars_of(settings: conf.Settings) -> dict[str, Any]:
    """Return the fields of the settings."""
    return {name.lower(): getattr(settings, name.lower()) for name in conf.KEYS}


def test_it_runs_within_forty_lines() -> None:
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if "runschedule" in line) < 40


def test_every_word_of_the_vocabulary_that_it_names_is_there() -> None:
    from multiserver_schedule.declare import Declaration

    text = README[README.index("*When*") : README.index("When clocks change")]
    named = (set(re.findall(r"``([a-z_]+)", text)) | {"at"}) - {"with"}
    assert [word for word in sorted(named) if not hasattr(Declaration, word)] == []


def test_every_python_block_compiles() -> None:
    assert len(BLOCKS) >= 6
    for text in BLOCKS:
        compile(text, "README.rst", "exec")

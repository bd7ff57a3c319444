"""Where declarations are looked for, and that nothing that goes wrong there is hidden."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from multiserver_schedule import schedule
from multiserver_schedule.declare import Registry, discover, discover_errors, registry
from multiserver_schedule.exceptions import DeclarationError

START = "from multiserver_schedule import schedule\n"
Write = Callable[[Mapping[str, str]], None]


@pytest.fixture(autouse=True)
def declared() -> Iterator[Registry]:
    with registry.set_aside() as empty:
        yield empty


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules, given as ``{"shop/schedule": text}``, below a package ``site_of_test``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(modules: Mapping[str, str]) -> None:
        for name, text in modules.items():
            file = tmp_path / "site_of_test" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            for folder in file.relative_to(tmp_path).parents:
                if folder.name:
                    (tmp_path / folder / "__init__.py").touch()
            file.write_text(START + text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("site_of_test"):
            del sys.modules[name]


def names() -> list[str]:
    return list(schedule.tasks)


def test_the_schedule_of_every_app_and_of_the_project_is_read(write: Write, settings: Any) -> None:
    write(
        {
            "shop/schedule": 'schedule.command("a").hourly()\n',
            "blog/views": "",
            "config/schedule": 'schedule.command("b").hourly()\n',
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.blog", "multiserver_schedule"]
    settings.ROOT_URLCONF = "site_of_test.config.urls"

    found = discover()

    assert names() == ["shop.a", "config.b"]
    assert found.found == ("site_of_test.shop.schedule", "site_of_test.config.schedule")
    assert found.searched == (
        "site_of_test.shop.schedule",
        "site_of_test.blog.schedule",
        "multiserver_schedule.schedule",
        "site_of_test.config.schedule",
    )
    assert found.broken == ()


def test_the_public_schedule_is_not_replaced_by_looking_for_one_of_ours(write: Write) -> None:
    discover()

    assert sys.modules["multiserver_schedule"].schedule is schedule


def test_a_project_whose_package_is_an_app_is_read_once(write: Write, settings: Any) -> None:
    write({"shop/schedule": 'schedule.command("a").hourly()\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop"]
    settings.ROOT_URLCONF = "site_of_test.shop.urls"

    assert discover().searched == ("site_of_test.shop.schedule",)
    assert names() == ["shop.a"]


def test_discovering_again_declares_nothing_twice(write: Write, settings: Any) -> None:
    write({"shop/schedule": 'schedule.command("a").hourly()\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop"]

    assert discover() == discover()
    assert names() == ["shop.a"]


def test_nested_apps_have_names_of_their_own(write: Write, settings: Any) -> None:
    write(
        {
            "shop/schedule": 'schedule.command("a").hourly()\n',
            "shop/reports/schedule": 'schedule.command("a").hourly()\n',
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.shop.reports"]
    discover()

    assert names() == ["shop.a", "reports.a"]


def test_a_schedule_may_be_a_folder(write: Write, settings: Any) -> None:
    write(
        {
            "shop/schedule/nightly": '@schedule.task().daily()\ndef clean(): ...\nschedule.command("a").daily()\n',
            "shop/schedule/__init__": "from . import nightly\n",
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop"]
    discover()

    assert names() == ["shop.clean", "shop.a"]


def test_a_schedule_that_imports_another_registers_each_task_with_its_own_module(write: Write, settings: Any) -> None:
    write(
        {
            "shop/schedule": 'schedule.command("a").hourly()\nfrom site_of_test.blog.schedule import tidy\n',
            "blog/schedule": "@schedule.task().daily()\ndef tidy(): ...\n",
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.blog"]
    discover()

    assert {task.name: task.module for task in schedule.tasks.values()} == {
        "shop.a": "site_of_test.shop.schedule",
        "blog.tidy": "site_of_test.blog.schedule",
    }


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import site_of_test.nowhere\n", ModuleNotFoundError),
        ("from site_of_test.shop import nothing\n", ImportError),
        ("import schedule_that_is_nowhere\n", ModuleNotFoundError),
        ("def broken(:\n", SyntaxError),
        ("1 / 0\n", ZeroDivisionError),
        ('schedule.command("b")\n', DeclarationError),
        ('schedule.command("b").daily_at("25:00")\n', DeclarationError),
    ],
)
def test_whatever_a_schedule_raises_comes_out_as_it_is(
    text: str, error: type[Exception], write: Write, settings: Any
) -> None:
    write(
        {
            "shop/schedule": f'schedule.command("a").hourly()\n{text}',
            "blog/schedule": 'schedule.command("c").hourly()\n',
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.blog"]

    for _ in range(2):  # a second look must not find less to complain of
        with pytest.raises(error) as caught:
            discover()
        assert type(caught.value) is error
    assert "shop.a" not in registry.completed


def test_check_is_told_of_every_broken_module_with_its_traceback_and_of_the_sound_tasks(
    write: Write, settings: Any
) -> None:
    write(
        {
            "shop/schedule": 'schedule.command("a").hourly()\nimport site_of_test.nowhere\n',
            "blog/schedule": 'schedule.command("b")\n',
            "news/schedule": 'schedule.command("c").hourly()\n',
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.blog", "site_of_test.news"]

    for _ in range(2):
        shop, blog = discover_errors()

        assert (shop.module, type(shop.error)) == ("site_of_test.shop.schedule", ModuleNotFoundError)
        assert f'{Path("shop", "schedule.py")}", line 3' in shop.traceback
        assert "import site_of_test.nowhere" in shop.traceback
        assert (blog.module, type(blog.error)) == ("site_of_test.blog.schedule", DeclarationError)
        assert "no frequency" in blog.traceback
    assert list(registry.completed) == ["news.c"]


def test_a_broken_declaration_of_one_module_is_not_told_of_the_next(write: Write, settings: Any) -> None:
    write({"shop/schedule": 'schedule.command("a")\n', "blog/schedule": 'schedule.command("b").hourly()\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop", "site_of_test.blog"]

    assert [broken.module for broken in discover_errors()] == ["site_of_test.shop.schedule"]
    assert list(registry.completed) == ["blog.b"]


def test_a_wrong_declaration_outside_of_a_schedule_is_told_by_discovery_and_by_the_tasks(
    write: Write, settings: Any
) -> None:
    write({"shop/models": 'schedule.command("a")\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop"]

    assert discover_errors() == ()
    for look in (discover, names):
        with pytest.raises(DeclarationError, match=r"models\.py:2"):
            look()


def test_a_broken_module_of_a_schedule_folder_is_told(write: Write, settings: Any) -> None:
    write({"shop/schedule/nightly": 'schedule.command("a")\n', "shop/schedule/__init__": "from . import nightly\n"})
    settings.INSTALLED_APPS = ["site_of_test.shop"]

    assert [broken.module for broken in discover_errors()] == ["site_of_test.shop.schedule.nightly"]


def test_leaving_the_process_is_left_to_whoever_wrote_it(write: Write, settings: Any) -> None:
    write({"shop/schedule": 'schedule.command("a").hourly()\nraise SystemExit(3)\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop"]

    for look in (discover, discover_errors):
        with pytest.raises(SystemExit):
            look()
    assert names() == []


@pytest.mark.parametrize("urls", [None, "urls", "site_of_test_is_nowhere.urls", "site_of_test.nowhere.urls", 5])
def test_a_project_without_a_package_of_its_own_is_fine(urls: Any, write: Write, settings: Any) -> None:
    write({"shop/schedule": 'schedule.command("a").hourly()\n'})
    settings.INSTALLED_APPS = ["site_of_test.shop"]
    settings.ROOT_URLCONF = urls

    assert discover().searched == ("site_of_test.shop.schedule",)


def test_a_project_package_that_cannot_be_imported_is_not_hidden(write: Write, settings: Any) -> None:
    write({"config/__init__": "import site_of_test.gone\n"})
    settings.INSTALLED_APPS = []
    settings.ROOT_URLCONF = "site_of_test.config.urls"

    with pytest.raises(ModuleNotFoundError, match=r"site_of_test\.gone"):
        discover()


def test_a_task_can_be_found_by_the_names_of_its_app_config(write: Write, settings: Any) -> None:
    write(
        {
            "shop/schedule": 'schedule.command("a").hourly()\n',
            "shop/apps": "from django.apps import AppConfig\n"
            'class Shop(AppConfig):\n    name = "site_of_test.shop"\n    label = "the_shop"\n',
        }
    )
    settings.INSTALLED_APPS = ["site_of_test.shop.apps.Shop"]
    discover()

    assert names() == ["the_shop.a"]

"""What a declaration is called, when it is complete, and what happens to it when its module is loaded again."""

from __future__ import annotations

import copy
import functools
import importlib
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import multiserver_schedule
from multiserver_schedule import schedule
from multiserver_schedule.declare import Registry, registry
from multiserver_schedule.entries import ScheduledTask
from multiserver_schedule.exceptions import DeclarationError

START = "from multiserver_schedule import schedule\n"
Load = Callable[..., ModuleType]


@pytest.fixture(autouse=True)
def declared() -> Iterator[Registry]:
    with registry.set_aside() as empty:
        yield empty


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Write a module below a package ``site_of_test`` and import it; a second time writes it anew and reloads it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write_and_import(text: str, name: str = "site_of_test.shop.schedule") -> ModuleType:
        folder = tmp_path
        for part in name.split(".")[:-1]:
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / f"{name.rpartition('.')[2]}.py").write_text(START + text)
        importlib.invalidate_caches()
        if name in sys.modules:
            return importlib.reload(sys.modules[name])
        return importlib.import_module(name)

    yield write_and_import
    for name in set(sys.modules) - before:
        if name.startswith("site_of_test"):
            del sys.modules[name]


def refresh() -> None:
    """Stand for a function of some app."""


async def refresh_later(base: str) -> None:
    """Stand for an asynchronous one."""


class Report:
    """Stand for what has methods, and can itself be called."""

    def run(self) -> None:
        """Be called."""

    def __call__(self) -> None:
        """Be called."""


def only_task() -> ScheduledTask:
    (task,) = registry.tasks.values()
    return task


# Names.


@pytest.mark.parametrize(
    ("declare", "name"),
    [
        (lambda: schedule.command("clearsessions"), "tests.clearsessions"),
        (lambda: schedule.call(refresh), "tests.refresh"),
        (lambda: schedule.call(refresh_later, "EUR"), "tests.refresh_later"),
        (lambda: schedule.call("shop.rates.refresh_all", base="EUR"), "tests.refresh_all"),
        (lambda: schedule.call(Report().run), "tests.run"),
        (lambda: schedule.call(Report), "tests.Report"),
        (lambda: schedule.exec(["pg_dump", "-Fc"]), "tests.pg_dump"),
        (lambda: schedule.exec([Path("/usr/bin/pg_dump")]), "tests.pg_dump"),
        (lambda: schedule.exec(["C:\\tools\\backup.exe"]), "tests.backup.exe"),
        (lambda: schedule.call(lambda: None).name("shop:a-b.C_1"), "shop:a-b.C_1"),
        (lambda: schedule.command("clearsessions").name("x" * 190), "x" * 190),
    ],
)
def test_a_name_is_what_was_given_or_the_label_and_what_is_run(declare: Callable[[], Any], name: str) -> None:
    declare().hourly()

    assert list(registry.tasks) == [name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("django.contrib.auth.schedule", "auth.clearsessions"),  # the label of an app that is installed
        ("django.contrib.auth.nightly.schedule", "auth.clearsessions"),
        ("site_of_test.config.schedule", "config.clearsessions"),  # not an app: the package's last component
        ("site_of_test.schedule", "site_of_test.clearsessions"),
        ("lonely", "lonely.clearsessions"),
    ],
)
def test_a_default_name_starts_with_the_app_or_the_package_of_its_module(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    code = compile('schedule.command("clearsessions").daily()', "f.py", "exec")
    exec(code, {"__name__": module, "schedule": schedule})  # noqa: S102

    assert list(registry.tasks) == [name]


def test_what_has_no_name_of_its_own_needs_one_given() -> None:
    def nested() -> None: ...

    for target in (lambda: None, nested, functools.partial(refresh), Report()):
        with registry.set_aside():
            schedule.call(target).hourly()
            with pytest.raises(DeclarationError, match=r"gives the task no name.*\.name\("):
                registry.tasks  # noqa: B018
        with registry.set_aside():
            schedule.call(target).hourly().name("given")
            assert list(registry.tasks) == ["given"]


@pytest.mark.parametrize("name", ["", "a b", "a@b", "é", "a/b", "x" * 191, "a\n", 5, None])
def test_a_name_that_no_row_could_have_is_refused(name: Any) -> None:
    with pytest.raises(DeclarationError, match="is not a name"):
        schedule.command("clearsessions").name(name)


def test_a_default_name_that_no_row_could_have_is_refused() -> None:
    schedule.exec(["/opt/my tool"]).hourly()
    with pytest.raises(DeclarationError, match=r"'tests\.my tool'.*\.name\("):
        registry.tasks  # noqa: B018


@pytest.mark.parametrize("second", ["shop.a", "Shop.A"])
def test_a_name_that_two_tasks_share_but_for_its_case_names_both_lines(load: Load, second: str) -> None:
    first = load('schedule.command("clearsessions").hourly().name("shop.a")\n', "site_of_test.one.schedule")
    other = load(f'\n\nschedule.command("migrate").daily().name("{second}")\n', "site_of_test.two.schedule")

    with pytest.raises(DeclarationError) as caught:
        registry.tasks  # noqa: B018

    assert f"{other.__file__}:4: task {second!r}" in str(caught.value)
    assert f"{first.__file__}:2 has" in str(caught.value)


def test_two_tasks_of_one_module_with_one_name_are_refused(load: Load) -> None:
    load('schedule.command("a").hourly()\nschedule.command("a").daily()\n')

    with pytest.raises(DeclarationError, match=r"schedule\.py:3: task 'shop\.a':.*schedule\.py:2 has the same name"):
        registry.tasks  # noqa: B018


def test_one_file_imported_under_two_names_is_told_as_what_it_is(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load('schedule.command("a").hourly()\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site_of_test"))
    importlib.import_module("shop.schedule")
    try:
        with pytest.raises(DeclarationError, match=r"imported as site_of_test\.shop\.schedule and as shop\.schedule"):
            registry.tasks  # noqa: B018
    finally:
        del sys.modules["shop.schedule"], sys.modules["shop"]


# Ways to start.


def test_the_decorator_leaves_the_function_as_it_is() -> None:
    def send_digests() -> int:
        return 3

    decorated = schedule.task("shop.send_digests").hourly().between("8:00", "18:00")(send_digests)

    assert decorated is send_digests
    assert only_task().target is send_digests
    assert only_task().kind == "call"


def test_an_asynchronous_function_is_a_call() -> None:
    schedule.task().hourly()(refresh_later)

    assert (only_task().kind, only_task().target) == ("call", refresh_later)


def test_a_function_decorated_twice_is_two_tasks() -> None:
    schedule.task().hourly()(schedule.task("second").daily()(refresh))

    assert {task.name: task.target for task in registry.tasks.values()} == {"tests.refresh": refresh, "second": refresh}


def test_arguments_are_kept_as_they_were_given() -> None:
    schedule.command("loaddata", "rates", verbosity=0, name="a").hourly()
    task = only_task()

    assert (task.kind, task.target, task.args, dict(task.kwargs)) == (
        "command",
        "loaddata",
        ("rates",),
        {"verbosity": 0, "name": "a"},
    )
    with pytest.raises(TypeError):
        task.kwargs["verbosity"] = 3  # type: ignore[index]


def test_a_program_and_its_arguments_are_kept_apart() -> None:
    schedule.exec(["/bin/echo", "a b; rm -rf /", ""]).hourly()

    assert only_task().target == ("/bin/echo", "a b; rm -rf /", "")


class DjangoTask:
    """As ``django.tasks`` makes them."""

    func = staticmethod(refresh)

    def enqueue(self) -> None:
        """Put it on the queue."""


class CeleryTask:
    """As Celery makes them."""

    def __call__(self) -> None:
        """Run it."""

    def delay(self) -> None:
        """Put it on the queue."""

    apply_async = delay


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (
            lambda: schedule.task(refresh),  # type: ignore[arg-type]
            r"@schedule\.task was used without parentheses.*@schedule\.task\(\)\.hourly\(\)",
        ),
        (lambda: schedule.task().hourly(refresh), r"\.hourly was used without parentheses"),  # type: ignore[call-arg]
        (lambda: schedule.task().daily_at(refresh), r"\.daily_at was used without parentheses"),  # type: ignore[arg-type]
        (lambda: schedule.task().hourly()(5), "5 is not a function"),  # type: ignore[type-var]
        (lambda: schedule.task().hourly()(staticmethod(refresh)), "staticmethod"),
        (lambda: schedule.exec("pg_dump -Fc shop"), r"a list.*Write schedule\.exec\(\['pg_dump', '-Fc', 'shop'\]\)"),
        (lambda: schedule.exec(b"pg_dump"), "a list"),  # type: ignore[arg-type]
        (lambda: schedule.exec([]), "a list"),
        (lambda: schedule.exec(["sleep", 5]), "5 is not a text"),  # type: ignore[list-item]
        (lambda: schedule.exec([""]), "'' is not a text"),
        (lambda: schedule.exec(["a", "b\0c"]), "is not a text"),
        (lambda: schedule.command(5), "5 is not the name of a command"),  # type: ignore[arg-type]
        (lambda: schedule.command("loaddata rates"), r'stands alone.*Write schedule\.command\("loaddata", "rates"\)'),
        (lambda: schedule.command(""), "stands alone"),
        (lambda: schedule.call(refresh()), r"schedule\.call\(None\): .*without calling it"),  # type: ignore[func-returns-value,arg-type]
        (lambda: schedule.call(), r"schedule\.call\(\): missing .*'function'.*Write schedule\.call\("),  # type: ignore[call-arg]
        (lambda: schedule.exec("pg_dump", "-Fc"), r'exec\(\): too many .*schedule\.exec\(\["pg_dump", "-Fc"'),  # type: ignore[call-arg]
        (lambda: schedule.command(), r"schedule\.command\(\): missing .*Write schedule\.command\("),  # type: ignore[call-arg]
        (lambda: schedule.task(title="a.b"), r"schedule\.task\(\): .*'title'.*Write @schedule\.task\(\)"),  # type: ignore[call-arg]
        (lambda: schedule.group("UTC"), r"schedule\.group\(\): too many .*Write schedule\.group\(timezone="),  # type: ignore[call-arg]
        (lambda: schedule.comand("a"), r"schedule\.comand\. Did you mean schedule\.command\(\)\?"),  # type: ignore[attr-defined]
        (lambda: schedule.hourly(), r"starts with schedule\.hourly\. Write @schedule\.task\(\)\.hourly\("),  # type: ignore[attr-defined]
        (lambda: schedule.hourley(), r"starts with schedule\.hourley\. Write @schedule\.task\(\)\.hourly\("),  # type: ignore[attr-defined]
        (lambda: schedule.qqqqqqqqqqqq(), r"It starts with command, call, exec, task, group\."),  # type: ignore[attr-defined]
        (lambda: schedule.call("refresh"), "not a dotted path"),
        (lambda: schedule.call("shop.rates:refresh"), "not a dotted path"),
        (lambda: schedule.call(DjangoTask()), r"task of a queue.*schedule\.enqueue"),  # type: ignore[arg-type]
        (lambda: schedule.call(CeleryTask()), r"task of a queue.*schedule\.enqueue"),
        (lambda: schedule.task().hourly()(CeleryTask()), r"task of a queue.*schedule\.enqueue"),
        (lambda: schedule.enqueue(CeleryTask()), r"schedule\.enqueue is reserved"),
    ],
)
def test_a_wrong_start_is_refused_where_it_stands(declare: Callable[[], Any], message: str) -> None:
    with pytest.raises(DeclarationError, match=rf"^{__file__}:\d+: .*{message}"):
        declare()


def test_to_ask_for_what_is_not_there_is_answered_as_anywhere() -> None:
    """By copies, pickles and mocks, which look for their own names; and by whoever looks before they call."""
    declaration = schedule.command("a").hourly()
    for each in (schedule, declaration):
        assert [name for name in ("_pytestfixturefunction", "__wrapped__", "no_such_word") if hasattr(each, name)] == []
        assert getattr(each, "no_such_word", 5) == 5
        assert type(copy.copy(each)) is type(each)
        with pytest.raises(AttributeError, match="object has no attribute '_wrapped'"):
            each._wrapped  # type: ignore[attr-defined]  # noqa: B018
    assert mock.create_autospec(declaration, instance=True).weekdays


def test_what_goes_wrong_inside_a_start_stays_what_it_was() -> None:
    class Path:
        def __fspath__(self) -> str:
            raise TypeError("of somebody's own")

    with pytest.raises(TypeError, match="of somebody's own"):
        schedule.exec([Path()])  # type: ignore[list-item]


def test_a_real_task_of_django_is_refused() -> None:
    tasks = pytest.importorskip("django.tasks", reason="Django 6 has it")
    with pytest.raises(DeclarationError, match=r"schedule\.enqueue"):
        schedule.call(tasks.task(refresh))


def test_a_decorator_without_a_function_is_told() -> None:
    schedule.task("shop.forgotten").hourly()
    with pytest.raises(DeclarationError, match="decorates no function"):
        registry.tasks  # noqa: B018


def test_a_decorator_above_a_second_function_is_told() -> None:
    decorator = schedule.task().hourly()
    decorator(refresh)
    with pytest.raises(DeclarationError, match="decorates a second function"):
        decorator(refresh)


# Being complete.


def test_a_declaration_is_no_task_before_its_module_has_been_imported(load: Load) -> None:
    module = load(
        """
early = schedule.command("a")
seen = list(schedule.tasks)
early.hourly()
"""
    )

    assert module.seen == []
    assert list(schedule.tasks) == ["shop.a"]


def test_what_is_wrong_stays_wrong_however_often_it_is_asked(load: Load) -> None:
    load('schedule.command("a")\nschedule.command("b").daily()\nschedule.command("c")\n')
    for _ in range(2):
        with pytest.raises(DeclarationError) as caught:
            schedule.tasks  # noqa: B018
        assert [
            line.split(" ")[0].rpartition(":")[0].rpartition(":")[2] for line in str(caught.value).splitlines()
        ] == [
            "2",
            "4",
        ]


def test_a_module_with_one_wrong_declaration_registers_nothing_of_it(load: Load) -> None:
    load('schedule.command("a").hourly()\nschedule.command("b")\n', "site_of_test.broken.schedule")
    load('schedule.command("c").hourly()\n', "site_of_test.sound.schedule")

    with pytest.raises(DeclarationError):
        schedule.tasks  # noqa: B018
    assert list(registry.completed) == ["sound.c"]


def test_a_module_that_fails_half_way_registers_nothing_of_it(load: Load) -> None:
    with pytest.raises(ZeroDivisionError):
        load('schedule.command("a").hourly()\n1 / 0\n')

    assert list(schedule.tasks) == []


def test_a_module_that_failed_and_then_is_repaired_registers_what_it_says_now(load: Load) -> None:
    with pytest.raises(ZeroDivisionError):
        load('schedule.command("a").hourly()\n1 / 0\n')
    load('schedule.command("a").daily()\nschedule.command("b").daily()\n')

    assert list(schedule.tasks) == ["shop.a", "shop.b"]
    assert schedule.tasks["shop.a"].line == 2


def test_a_reload_replaces_what_the_module_declared(load: Load) -> None:
    load('schedule.command("a").hourly()\nschedule.command("b").hourly()\n')
    load('schedule.command("other").hourly()\n', "site_of_test.blog.schedule")
    before = schedule.tasks["shop.a"].timetable.text, registry.digests("web1")

    load('schedule.command("c").hourly()\nschedule.command("A").daily()\n')

    assert sorted(schedule.tasks) == ["blog.other", "shop.A", "shop.c"]
    assert (schedule.tasks["shop.A"].timetable.text, registry.digests("web1")) != before


def test_a_reload_before_anybody_asked_replaces_too(load: Load) -> None:
    load('schedule.command("a").hourly()\n')
    load('schedule.command("a").daily()\n')

    assert [task.timetable.text for task in schedule.tasks.values()] == ["0 0 * * * UTC"]


def test_a_wrong_reload_leaves_what_was_declared_before(load: Load) -> None:
    load('schedule.command("a").hourly()\n')
    assert list(schedule.tasks) == ["shop.a"]
    load('schedule.command("a").daily()\nschedule.command("b")\n')

    with pytest.raises(DeclarationError):
        schedule.tasks  # noqa: B018
    assert [task.timetable.text for task in registry.completed.values()] == ["0 * * * * UTC"]


def test_what_a_script_declares_is_ignored(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(START + 'schedule.command("a").hourly()\n')

    runpy.run_path(str(script), run_name="__main__")

    assert list(schedule.tasks) == []


def test_a_function_that_declares_belongs_to_the_module_whose_import_calls_it(load: Load) -> None:
    """Otherwise a reload of one app would replace what the others declared through the same function."""
    load("def nightly(name):\n    return schedule.command(name).daily()\n", "site_of_test.helpers")
    use = "from site_of_test.helpers import nightly\nnightly('a')\n"
    load(use, "site_of_test.shop.schedule")
    load(use, "site_of_test.blog.schedule")
    assert {task.name: (task.module, task.line) for task in schedule.tasks.values()} == {
        "shop.a": ("site_of_test.shop.schedule", 3),
        "blog.a": ("site_of_test.blog.schedule", 3),
    }

    load(use + "nightly('b')\n", "site_of_test.shop.schedule")

    assert sorted(schedule.tasks) == ["blog.a", "shop.a", "shop.b"]


def test_what_a_ready_declares_belongs_to_its_own_module_and_is_kept_by_a_reload(load: Load) -> None:
    """Not to the module that calls django.setup(): that is a wsgi.py here and a manage.py there."""
    apps = load("def ready():\n    schedule.command('late').daily()\n", "site_of_test.shop.apps")
    registry_of_django = ModuleType("django.apps.registry")
    exec("def populate(ready):\n    ready()\n", registry_of_django.__dict__)  # noqa: S102
    wsgi: dict[str, Any] = {
        "__name__": "site_of_test.wsgi",
        "populate": registry_of_django.populate,
        "ready": apps.ready,
    }
    exec(compile("populate(ready)", "wsgi.py", "exec"), wsgi)  # noqa: S102

    load('schedule.command("a").daily()\n', "site_of_test.shop.schedule")
    load('schedule.command("b").daily()\n', "site_of_test.shop.schedule")

    assert {name: task.module for name, task in schedule.tasks.items()} == {
        "shop.late": "site_of_test.shop.apps",
        "shop.b": "site_of_test.shop.schedule",
    }


def test_the_mapping_of_tasks_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        schedule.tasks["a"] = None  # type: ignore[index]


def test_threads_that_ask_at_once_complete_each_declaration_once() -> None:
    for number in range(200):
        schedule.command("a").name(f"task.{number}").hourly()
    faults: list[BaseException] = []

    def ask() -> None:
        try:
            barrier.wait()
            assert len(schedule.tasks) == 200
        except BaseException as fault:
            faults.append(fault)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert faults == []


def test_the_line_is_right_in_long_modules_and_in_loops(load: Load) -> None:
    lines = [f'schedule.command("a").name("task.{number}").hourly()' for number in range(500)]
    lines += ["for n in range(3):", '    schedule.command("a").name(f"loop.{n}").hourly()']
    lines += ["(", "    schedule", '    .command("a")', '    .name("last")', "    .hourly()", ")"]
    load("\n".join(lines) + "\n")

    assert [schedule.tasks[f"task.{number}"].line for number in range(500)] == list(range(2, 502))
    assert {schedule.tasks[f"loop.{n}"].line for n in range(3)} == {503}
    assert schedule.tasks["last"].line in (505, 506)


# Digests.


def digests_of(*declared: Callable[[], Any], server: str = "web1") -> tuple[str, str]:
    with registry.set_aside():
        for each in declared:
            each()
        return registry.digests(server)


def test_equal_declarations_have_equal_digests_in_any_order() -> None:
    a = lambda: schedule.command("a").hourly()  # noqa: E731
    b = lambda: schedule.command("b").daily().on_every_server()  # noqa: E731
    c = lambda: schedule.command("c").daily()  # noqa: E731

    assert digests_of(a, b, c) == digests_of(c, b, a)


def test_a_digest_tells_names_schedules_and_servers_apart() -> None:
    def a() -> Any:
        return schedule.command("a").hourly()

    everywhere = digests_of(a, lambda: schedule.command("b").daily().on_every_server())
    seen = {
        digests_of(a),
        digests_of(lambda: schedule.command("a").daily()),
        digests_of(lambda: schedule.command("a").hourly().timezone("Asia/Tokyo")),
        digests_of(lambda: schedule.command("a").hourly().mondays()),
        digests_of(lambda: schedule.command("a").hourly().name("b")),
        everywhere,
        digests_of(a, lambda: schedule.command("b").daily().on_every_server(), server="web2"),
    }

    assert len(seen) == 7
    assert digests_of(a)[1] == ""
    assert everywhere[0] == digests_of(a)[0]


def test_a_digest_is_not_of_what_is_run() -> None:
    assert digests_of(lambda: schedule.call("shop.a", 1).hourly()) == digests_of(
        lambda: schedule.call("blog.a", 2).hourly().ensure_finished(minutes=3)
    )


def test_digests_of_some_of_the_tasks_are_of_these() -> None:
    schedule.command("a").hourly()
    every = registry.digests("web1")
    schedule.command("b").hourly()

    assert registry.digests("web1") != every
    assert registry.digests("web1", {"tests.a": registry.tasks["tests.a"]}) == every


# Being light.


def test_importing_the_package_loads_no_model_no_admin_and_no_croniter() -> None:
    heavy = "django.db.models", "django.contrib.admin", "django.core.management", "croniter", "multiserver_schedule.run"
    code = f"""
import sys
from multiserver_schedule import schedule, __version__
schedule.command("a").hourly()
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_package_offers_the_current_run_and_nothing_that_is_not_there() -> None:
    assert callable(multiserver_schedule.current_run)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        multiserver_schedule.nothing  # type: ignore[attr-defined]  # noqa: B018

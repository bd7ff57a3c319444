"""What declaring leaves unasked: whether what is to be run is there, takes these arguments, and is ever due."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from django.core.management import get_commands
from django.core.management.base import BaseCommand

from multiserver_schedule import schedule
from multiserver_schedule.declare import Registry, registry, verify

HERE = __name__


@pytest.fixture(autouse=True)
def declared() -> Iterator[Registry]:
    with registry.set_aside() as empty:
        yield empty


def problems(declare: Callable[[], Any]) -> list[str]:
    declare()
    (task,) = registry.tasks.values()
    return verify(task)


def refresh(base: str, *, quick: bool = False) -> None:
    raise AssertionError("verifying runs nothing")


async def later() -> None:
    raise AssertionError("verifying runs nothing")


def generator() -> Iterator[int]:
    yield 1


async def generator_later() -> AsyncIterator[int]:
    yield 1


class Queued:
    func = staticmethod(refresh)

    def enqueue(self) -> None:
        """Put it on the queue."""


queued = Queued()
number = 5
RAN: list[str] = []


class Command(BaseCommand):
    """One that requires something, and tells when it is run."""

    stealth_options = ("secret",)

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("what", nargs="+")
        parser.add_argument("--as-of", required=True, type=int)
        parser.add_argument("--dry-run", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        RAN.append("handle")


@pytest.fixture
def own_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    command = Command()
    monkeypatch.setitem(get_commands(), "report", command)
    return command


@pytest.mark.parametrize(
    "declare",
    [
        lambda: schedule.command("clearsessions").hourly(),
        lambda: schedule.command("loaddata", "rates.json", verbosity=0, database="default").hourly(),
        lambda: schedule.command("migrate", "--noinput").hourly(),
        lambda: schedule.call(refresh, "EUR", quick=True).hourly(),
        lambda: schedule.call(f"{HERE}.refresh", base="EUR").hourly(),
        lambda: schedule.call(later).hourly(),
        lambda: schedule.call(print, "a", sep="").hourly(),
        lambda: schedule.call(dict, a=1).hourly(),
        lambda: schedule.exec(["no-such-program"]).hourly(),
        lambda: schedule.call(later).hourly().when(f"{HERE}.later").skip(later),
    ],
)
def test_what_can_run_has_no_problem(declare: Callable[[], Any]) -> None:
    assert problems(declare) == []


@pytest.mark.parametrize(
    ("declare", "parts"),
    [
        (lambda: schedule.command("clearsesions").hourly(), ["no command 'clearsesions'", "'clearsessions'?"]),
        (lambda: schedule.command("qqqqqqqqqqqq").hourly(), ["no command 'qqqqqqqqqqqq'."]),
        (lambda: schedule.command("migrate", nonput=True).hourly(), ["refuses", "nonput", "Did you mean 'noinput'?"]),
        (lambda: schedule.command("migrate", "--nonput").hourly(), ["refuses", "--nonput"]),
        (lambda: schedule.command("loaddata").hourly(), ["refuses", "fixture"]),
        (lambda: schedule.command("migrate", "--version").hourly(), ["help or its version"]),
        (lambda: schedule.call("site_of_test.nowhere.refresh").hourly(), ["cannot be imported", "ModuleNotFoundError"]),
        (lambda: schedule.call(f"{HERE}.refesh").hourly(), ["cannot be imported", "refesh"]),
        (lambda: schedule.call(f"{HERE}.number").hourly(), ["int, which cannot be called"]),
        (lambda: schedule.call(f"{HERE}.queued").hourly(), ["task of a queue", "schedule.enqueue"]),
        (lambda: schedule.call(f"{HERE}.refresh").hourly(), ["cannot be called so", "'base'"]),
        (lambda: schedule.call(refresh, "EUR", slow=True).hourly(), ["cannot be called so", "'slow'"]),
        (lambda: schedule.task().hourly()(refresh), ["cannot be called so", "'base'"]),
        (lambda: schedule.task().hourly()(of_a_run), ["'run'", "from multiserver_schedule.current_run()"]),
        (lambda: schedule.call(generator).hourly(), ["generator"]),
        (lambda: schedule.call(generator_later).hourly(), ["generator"]),
        (lambda: schedule.call(later).hourly().when(refresh), [".when(): ", "'base'"]),  # type: ignore[arg-type]
        (lambda: schedule.call(later).hourly().skip("site_of_test.nowhere"), [".skip(): ", "cannot be imported"]),
    ],
)
def test_what_cannot_run_is_told_in_one_sentence(declare: Callable[[], Any], parts: list[str]) -> None:
    (problem,) = problems(declare)

    assert [part for part in parts if part not in problem] == []


def test_a_schedule_that_is_never_due_is_told() -> None:
    problem = "".join(problems(lambda: schedule.command("clearsessions").every(hours=24).between("1:00", "2:00")))

    assert "never due" in problem


@pytest.mark.parametrize(
    ("args", "options", "told"),
    [
        (("shop", "blog"), {"as_of": 3}, ""),
        (("shop", "--as-of=3"), {}, ""),
        (("shop",), {"as_of": 3, "dry_run": True, "secret": object()}, ""),
        (("shop",), {}, "--as-of"),
        ((), {"as_of": 3}, "what"),
        (("shop",), {"as_of": "yesterday"}, "invalid int value"),
        (("shop",), {"as_of": 3, "dryrun": True}, "Did you mean 'dry_run'?"),
    ],
)
def test_a_command_is_asked_as_call_command_would_ask_and_is_not_run(
    args: tuple[str, ...], options: dict[str, Any], told: str, own_command: Command
) -> None:
    found = problems(lambda: schedule.command("report", *args, **options).hourly())

    assert [told in problem for problem in found] == [True] * bool(told)
    assert RAN == []
    assert "execute" not in vars(own_command)


def test_a_command_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(get_commands(), "broken", "site_of_test.nowhere")

    (problem,) = problems(lambda: schedule.command("broken").hourly())

    assert problem.startswith("The command 'broken' cannot be loaded: ModuleNotFoundError")


def of_a_run(run: object) -> None:
    raise AssertionError("verifying runs nothing")


def of_its_end(*, status: str, error: str, subject: str = "x") -> None:
    raise AssertionError("verifying runs nothing")


def of_everything(**known: object) -> None:
    raise AssertionError("verifying runs nothing")


def of_something_else(run: object, subject: str) -> None:
    raise AssertionError("verifying runs nothing")


@pytest.mark.parametrize("hook", [of_a_run, of_everything, later, f"{HERE}.of_a_run", lambda: None])
def test_a_hook_names_what_it_wants_to_be_given(hook: Any) -> None:
    assert problems(lambda: schedule.call(later).hourly().before(hook).after(hook)) == []


def test_a_hook_that_needs_what_it_is_not_given_is_wrong() -> None:
    (problem,) = problems(lambda: schedule.call(later).hourly().on_failure(of_something_else))

    assert problem == (
        ".on_failure(): 'of_something_else' cannot be called so: missing a required argument: 'subject'. "
        "It is offered run, status, output, error, seconds by name."
    ).replace("'of_something_else'", "of_something_else")


def test_before_a_run_nothing_is_known_of_its_end() -> None:
    (problem,) = problems(lambda: schedule.call(later).hourly().before(of_its_end).on_success(of_its_end))

    # Python 3.12 says "missing a required keyword-only argument".
    assert problem.startswith(".before(): of_its_end cannot be called so: missing a required ")
    assert "argument: 'status'. It is offered run" in problem


def test_a_hook_that_is_not_there_or_does_nothing_when_called_is_wrong() -> None:
    (gone,) = problems(lambda: schedule.call(later).hourly().after(f"{HERE}.no_such_hook"))
    with registry.set_aside():
        (lazy,) = problems(lambda: schedule.call(later).hourly().on_success(generator))

    assert gone.startswith(f".after(): '{HERE}.no_such_hook' cannot be imported: ImportError")
    assert lazy.startswith(".on_success(): generator is a generator")

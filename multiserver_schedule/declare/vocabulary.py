"""
The vocabulary: what can be said of a task, and how a sentence starts.

**To add a word**, go to the file of its heading, ``when``, ``whether``, ``across`` or ``around`` (or make one, and add
its class to ``Declaration``): a method decorated with ``@word()`` that puts what it was told into
``self._draft.fields`` under the name of a field of ``ScheduledTask``, and returns ``self``. Whatever only the whole
sentence can show goes to ``Draft.finish``. Its row in ``tests/test_declare_vocabulary.py`` says what it gives.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

from ..entries import ScheduledTask
from ..exceptions import DeclarationError, UnknownWord
from .across import Coordination
from .around import Surroundings
from .draft import NAME, NAME_RULE, Draft
from .groups import Group, Saying
from .registry import Registry
from .sources import Source, caller
from .when import Restrictions
from .whether import Conditions
from .words import WHERE_WORDS_ARE, WORDS, Method, misfit, nearest, no_attribute, word

if TYPE_CHECKING:
    from typing_extensions import Self

Function = TypeVar("Function", bound=Callable[..., Any])

STARTS: Final = ("command", "call", "exec", "task", "group")
OURS: Final = "Call a function that puts it on the queue; schedule.enqueue is reserved for queues, and comes later."


class Declaration(Restrictions, Conditions, Coordination, Surroundings):
    """
    One task as it is being declared: every method adds to it and returns it, in any order.

    It is complete, and can be said no more of, when the module that it stands in has been imported.
    """

    __slots__ = ()

    @word()
    def name(self, name: str) -> Self:
        """
        Set the task's name: its identity on all servers and over all deploys, so that a new name is a new task.

        1 to 190 letters, digits and ``_ . : -``, unique also when case is ignored. By default it is
        ``<app label>.<command | function | program>``.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            self._fail(f"{name!r} is not a name", f"Write another: {NAME_RULE}.")
        self._draft.name = name
        return self


class Decorator(Declaration):
    """A declaration that still has to be put above its function."""

    __slots__ = ()

    def __call__(self, function: Function) -> Function:
        """Return the function unchanged, declared as what is run: ``async def`` too, with no arguments."""
        draft = self._draft
        if draft.target is not None:
            draft.fail("it decorates a second function", "Write @schedule.task() and its words above each.")
        if isinstance(function, (staticmethod, classmethod)):
            draft.fail(f"it stands above a {type(function).__name__}", "Decorate a function of the module.")
        if not callable(function):
            draft.fail(f"{function!r} is not a function", "Write it in the line above a function.")
        if is_queue_task(function):
            draft.fail("it stands above a task of a queue", OURS)
        draft.target = function
        return function


def starts(example: str) -> Callable[[Method], Method]:
    """Make a method one that starts a declaration: the ``example`` is told to who gives it too much or too little."""

    def of(method: Method) -> Method:
        @functools.wraps(method)
        def start(self: Schedule, /, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except TypeError as error:
                if wrong := misfit(method, self, *args, **kwargs):
                    text = f"{caller()}: schedule.{method.__name__}(): {wrong}. Write {example}."
                    raise DeclarationError(text) from error
                raise

        return cast(Method, start)

    return of


class Schedule:
    """
    The object ``schedule``: starts each declaration, and holds what was declared.

    Each of the starting words returns a ``Declaration``, whose methods say the rest.
    """

    __slots__ = ("_registry",)

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    @property
    def tasks(self) -> Mapping[str, ScheduledTask]:
        """
        The declared tasks by name, read-only, of all modules imported so far.

        Raises DeclarationError while one of these modules has a declaration that cannot be completed.
        """
        return self._registry.tasks

    @starts('schedule.command("clearsessions")')
    def command(self, name: str, /, *args: object, **options: object) -> Declaration:
        """Declare a run of this management command, with arguments and options as ``call_command`` takes them."""
        draft = Draft(caller(2), "command", name, args, options)
        if not isinstance(name, str):
            draft.fail(f"{name!r} is not the name of a command", 'Write schedule.command("clearsessions").')
        if not name.strip() or len(name.split()) != 1 or name != name.strip():
            first, *rest = name.split() or ["clearsessions"]
            shape = ", ".join(f'"{text}"' for text in (first, *rest))
            draft.fail("the name of a command stands alone", f"Write schedule.command({shape}).")
        return self._declare(draft)

    @starts('schedule.call("shop.rates.refresh")')
    def call(self, function: Callable[..., object] | str, /, *args: object, **kwargs: object) -> Declaration:
        """
        Declare a call of this function, ``async def`` too, or of the one at this dotted path, with these arguments.

        A dotted path is imported where it runs, not when it is declared.
        """
        draft = Draft(caller(2), "call", function, args, kwargs)
        if is_queue_task(function):
            draft.fail("this is a task of a queue", OURS)
        if isinstance(function, str):
            if not all(part.isidentifier() for part in function.split(".")) or "." not in function:
                draft.fail("this is not a dotted path", 'Write schedule.call("shop.rates.refresh").')
        elif not callable(function):
            # Not as the draft says it, which is the decorator's where there is no function.
            raise DeclarationError(
                f"{draft.source}: schedule.call({function!r}): this is neither a function nor a dotted path. "
                "Give the function itself, without calling it; its arguments come after it."
            )
        return self._declare(draft)

    @starts('schedule.exec(["pg_dump", "-Fc", "shop"])')
    def exec(self, program: Sequence[str | os.PathLike[str]], /) -> Declaration:
        """Declare a run of a program: a list of it and its arguments. No shell reads it."""
        source = caller(2)
        if isinstance(program, (str, bytes)) or not isinstance(program, Sequence) or not program:
            words = program.split() if isinstance(program, str) else []
            shape = list(words) or ["pg_dump", "-Fc", "shop"]
            Draft(source, "exec", (str(program),)).fail(
                "a program is a list, as no shell takes it apart", f"Write schedule.exec({shape!r})."
            )
        parts: list[str] = []
        for part in program:
            text = os.fspath(part) if isinstance(part, os.PathLike) else part
            if not isinstance(text, str) or "\0" in text or not (text or parts):
                Draft(source, "exec", tuple(map(str, program))).fail(f"{part!r} is not a text", "Write texts.")
            parts.append(text)
        return self._declare(Draft(source, "exec", tuple(parts)))

    @starts("@schedule.task()")
    def task(self, name: str | None = None) -> Decorator:
        """
        Declare the function below: ``@schedule.task().hourly()``. The function stays what it is.

        ``name`` is short for ``.name(…)``.
        """
        draft = Draft(caller(2), "call", None)
        if callable(name):
            draft.target = name
            draft.fail("@schedule.task was used without parentheses", "Write @schedule.task().hourly().")
        decorator = Decorator(draft)
        if name is not None:
            decorator.name(name)
        self._registry.declare(draft)
        return decorator

    @starts('schedule.group(timezone="UTC", weekdays=True)')
    def group(self, **words: object) -> Group:
        """
        Say these words of all that is declared in a ``with`` block; what a declaration says itself goes before.

        ``with schedule.group(timezone="UTC", weekdays=True, on_failure=notify):`` True is a word without arguments, a
        tuple its arguments, a dict its arguments by their names, anything else its one argument. Groups nest: an inner
        one goes before an outer one, and what may be repeated (hooks, pings, mails, conditions) adds up.
        """
        source = caller(2)
        said = _InAGroup(source)
        sayings = tuple(_saying(said, name, value) for name, value in words.items())
        for saying in sayings:
            saying.say(said)  # what is wrong with a word by itself is told here, once
        return Group(source, sayings)

    def enqueue(self, *args: object, **kwargs: object) -> NoReturn:
        """Reserved for queues (tasks of ``django.tasks`` and Celery); raises DeclarationError until then."""
        Draft(caller(), "call", args[0] if args and callable(args[0]) else "enqueue").fail(
            "schedule.enqueue is reserved for queues, and does nothing yet",
            "Until then declare a function that puts the task on its queue.",
        )

    def _declare(self, draft: Draft) -> Declaration:
        self._registry.declare(draft)
        return Declaration(draft)

    if not TYPE_CHECKING:  # a type checker would take every word for known

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise no_attribute(self, name)
            start = "" if name in WORDS else nearest(name, STARTS)
            close = nearest(name, WORDS)
            if start:
                instead = f"Did you mean schedule.{start}()?"
            elif close:
                instead = f'Write @schedule.task().{close}(…), or schedule.command("clearsessions").{close}(…).'
            else:
                instead = f"It starts with {', '.join(STARTS)}. {WHERE_WORDS_ARE}."
            raise UnknownWord(f"{caller()}: no declaration starts with schedule.{name}. {instead}")


class _InAGroup(Draft):
    """Nobody's declaration, of which the words of a group are said to see whether they can be."""

    __slots__ = ()

    def __init__(self, source: Source) -> None:
        super().__init__(source, "call", None)

    def __str__(self) -> str:
        return "schedule.group()"


def _saying(said: Draft, name: str, value: object) -> Saying:
    known = WORDS.get(name)
    if name == "name":
        said.fail("a name is one task's", "Say .name() of each.")
    if known is None:
        close = nearest(name, WORDS)
        said.fail(
            f"there is no word {name!r}",
            f"Did you mean {close!r}?" if close else "Write words of a declaration, as in timezone='UTC'.",
        )
    args: tuple[Any, ...] = () if value is True else value if isinstance(value, tuple) else (value,)
    kwargs: dict[str, Any] = {}
    if isinstance(value, dict):
        args, kwargs = (), value
    return Saying(name, lambda draft: known.say(Declaration(draft), *args, **kwargs), known.is_frequency, known.repeats)


def is_queue_task(target: object) -> bool:
    """Tell a task of ``django.tasks`` or Celery, or what looks like one, from a function; neither is imported."""
    return any(
        all(callable(getattr(target, name, None)) for name in names)
        for names in (("enqueue", "func"), ("delay", "apply_async"))
    )

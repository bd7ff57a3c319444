"""What makes a method a word of the vocabulary, and what the words share."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

from ..exceptions import UnknownWord
from .draft import Draft

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the vocabulary, for who says it of many declarations."""

    say: Callable[..., Any]
    """The method."""
    is_frequency: bool
    repeats: bool


WORDS: Final[dict[str, Word]] = {}
"""All of them, by their names."""
WHERE_WORDS_ARE: Final = "The README lists the words, under Declaring"


def word(*, frequency: bool = False, repeats: bool = False, asks: bool = False) -> Callable[[Method], Method]:
    """
    Make a method a word: refused when it is said twice, without its parentheses, or of a task that is complete.

    ``frequency``: exactly one of these words is said. ``repeats``: may be said again. ``asks``: takes a function.
    """

    def of(method: Method) -> Method:
        name = method.__name__

        @functools.wraps(method)
        def say(self: Words, /, *args: Any, **kwargs: Any) -> Any:
            draft = self._draft
            if draft.complete:
                draft.fail(
                    f".{name}() comes after its module was imported", "Say everything where the task is declared."
                )
            if args and not asks and callable(args[0]):
                draft.fail(f".{name} was used without parentheses", f"Write .{name}(…) and decorate with that.")
            if not repeats and name in draft.said:
                draft.fail(f".{name}() is said twice", "Say it once.")
            if frequency:
                if draft.frequency:
                    draft.fail(
                        f"it has two frequencies, .{draft.frequency}() and .{name}()",
                        "Keep one, or declare two tasks, each with a .name() of its own.",
                    )
                draft.frequency = name
            draft.said.append(name)
            try:
                return method(self, *args, **kwargs)
            except TypeError as error:
                self._does_not_fit(method, args, kwargs, error)

        WORDS[name] = Word(say, frequency, repeats)
        return cast(Method, say)

    return of


class Words:
    """What the words share: the draft that they fill in, and how to read what they are given."""

    __slots__ = ("_draft",)

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def __repr__(self) -> str:
        return f"<{self._draft} at {self._draft.source}>"

    if not TYPE_CHECKING:  # a type checker would take every word for known

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise no_attribute(self, name)
            close = nearest(name, WORDS)
            instead = f"Did you mean .{close}()?" if close else f"{WHERE_WORDS_ARE}."
            raise UnknownWord(str(self._draft.error(f"there is no word .{name}. {instead}")))

    def _fail(self, wrong: str, instead: str, cause: BaseException | None = None) -> NoReturn:
        self._draft.fail(wrong, instead, cause)

    def _contradicts(self, name: str, *others: str) -> None:
        """Refuse a word that says the opposite of one that was said before."""
        for other in others:
            if other in self._draft.said:
                self._fail(f".{name}() contradicts .{other}()", "Keep one of them.")

    def _duration(
        self,
        name: str,
        given: timedelta | None,
        *,
        unit: str = "",
        zero: bool = False,
        **units: float,
    ) -> timedelta:
        """
        Return what was given as a timedelta or by units: never a bare number, and longer than zero unless ``zero``.

        ``unit`` is the argument that takes the timedelta, for the message, where it is not the first.
        """
        example = f".{name}({unit}=timedelta(minutes=30))" if unit else f".{name}(minutes=30)"
        for key, number in units.items():
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                self._fail(f".{name}({key}={number!r}) is not a number", f"Write .{name}({key}=30).")
        if given is not None and not isinstance(given, timedelta):
            bare = isinstance(given, (int, float)) and not isinstance(given, bool)
            wrong = f".{name}({unit + '=' if unit else ''}{given!r}) {'has no unit' if bare else 'is not a timedelta'}"
            self._fail(wrong, f"Write {example.replace('30', str(given)) if bare else example}, if it is minutes.")
        if given is not None and any(units.values()):
            self._fail(f".{name}() was given a timedelta and units", "Give one of them.")
        try:
            duration = timedelta(**units) if given is None else given
        except (OverflowError, ValueError) as error:
            self._fail(f".{name}(): {error}", f"Write {example}.", error)
        if duration < timedelta(0) or not (duration or zero):
            self._fail(f".{name}() was given {duration if duration else 'no time'}", f"Write {example}.")
        return duration

    def _names(self, name: str, given: tuple[object, ...]) -> tuple[str, ...]:
        """Return one or more texts, given one by one or as one list."""
        several = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple, set, frozenset)) else given
        if not several:
            self._fail(f".{name}() names none", f'Write .{name}("…").')
        for each in several:
            if not isinstance(each, str) or not each.strip():
                self._fail(f".{name}(): {each!r} is not a name", f'Write .{name}("…", "…").')
        return tuple(dict.fromkeys(cast("tuple[str, ...]", several)))

    def _does_not_fit(
        self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: TypeError
    ) -> NoReturn:
        """Tell of a word that was given too much, too little or wrong names; any other TypeError goes on."""
        if wrong := misfit(method, self, *args, **kwargs):
            signature = inspect.signature(method)
            plain = [
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in list(signature.parameters.values())[1:]
            ]
            shape = signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)
            self._fail(f".{method.__name__}(): {wrong}", f"It is .{method.__name__}{shape}.", error)
        raise error


def misfit(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> str:
    """Say why a method cannot be called so; "" where it can, and what it raised is its own."""
    try:
        inspect.signature(method).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known word that was probably meant; "" where none is like it."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")


def no_attribute(of: object, name: str) -> AttributeError:
    """Return what Python itself raises: a name with an underscore is no word, but what copy, pickle and mocks ask."""
    return AttributeError(f"{type(of).__name__!r} object has no attribute {name!r}", name=name, obj=of)

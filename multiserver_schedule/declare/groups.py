"""
Words that are said once for several declarations: ``with schedule.group(timezone="UTC"): …``.

A group is told of to each declaration that is made inside it, and said when the declaration is complete: only then is
known what it says itself, which goes before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing_extensions import Self

    from .draft import Draft
    from .sources import Source

RIVALS: Final = (
    frozenset({"catch_up", "no_catch_up"}),
    frozenset({"send_output_to", "append_output_to"}),
)
"""Words of which each says the opposite of the other: saying one outdoes a group's other."""


@dataclass(frozen=True, slots=True)
class Saying:
    """One word of a group, with what it is said with."""

    name: str
    say: Callable[[Draft], object]
    is_frequency: bool
    repeats: bool


class Group:
    """What ``schedule.group(…)`` returns: while it is entered, its words are said of what its module declares."""

    __slots__ = ("_before", "sayings", "source")

    def __init__(self, source: Source, sayings: tuple[Saying, ...]) -> None:
        self.source = source
        self.sayings = sayings
        self._before: list[tuple[Group, ...]] = []

    def __enter__(self) -> Self:
        self._before.append(_open.get())
        _open.set((*self._before[-1], self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _open.set(self._before.pop())

    def __repr__(self) -> str:
        return f"<schedule.group() at {self.source}>"

    def holds(self, source: Source) -> bool:
        """
        Is a declaration that stands there one of this group's?

        Those of other modules are not, should one be imported in here: whether it is, or had been before, is chance.
        """
        mine = self.source
        same_import = mine.code is source.code or not (mine.importing and source.importing)
        return mine.module == source.module and same_import


_open: ContextVar[tuple[Group, ...]] = ContextVar("multiserver_schedule_groups", default=())
# Of this thread alone: what another one declares meanwhile is none of the group's.


def groups_of(source: Source) -> tuple[Group, ...]:
    """Return the groups that a declaration stands in, the outermost first."""
    groups = _open.get()
    return tuple(group for group in groups if group.holds(source)) if groups else ()


def said_with_groups(draft: Draft) -> Draft:
    """
    Return the draft with what its groups say; itself, it stays as it is.

    A word that the declaration says is not said by a group, nor one of an inner group by an outer one. What may be
    repeated adds up: the outermost group's first, the declaration's own last.
    """
    full = copy.copy(draft)
    full.fields, full.said = dict(draft.fields), [*draft.said]
    for group in reversed(draft.groups):
        for saying in group.sayings:
            if not saying.repeats and not _is_outdone(saying, full):
                saying.say(full)
    own = {name: value for name, value in full.fields.items() if isinstance(value, tuple)}
    for group in draft.groups:
        for saying in group.sayings:
            if saying.repeats:
                saying.say(full)
    for name, value in own.items():
        full.fields[name] = (*full.fields[name][len(value) :], *value)
    return full


def _is_outdone(saying: Saying, draft: Draft) -> bool:
    if saying.is_frequency:
        return bool(draft.frequency)
    rivals = next((words for words in RIVALS if saying.name in words), {saying.name})
    return not rivals.isdisjoint(draft.said) or (saying.name == "at" and draft.time is not None)

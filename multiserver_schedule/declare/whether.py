"""The words for *whether*: asked of the run, or of the server. A new one sets a field of ``ScheduledTask``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..entries import Filter
from .words import Words, word

if TYPE_CHECKING:
    from typing_extensions import Self


class Conditions(Words):
    """Whether a due time is run, and where."""

    __slots__ = ()

    @word(repeats=True, asks=True)
    def when(self, test: Callable[[], Any] | str) -> Self:
        """
        Run only if this function (or the one at this dotted path) returns something true. May be repeated: all must.

        It is asked in the run's own process, once for all servers; no means that the due time is skipped everywhere.
        """
        return self._ask("when", test, runs_if=True)

    @word(repeats=True, asks=True)
    def skip(self, test: Callable[[], Any] | str) -> Self:
        """Skip the due time, on all servers, if this function (or dotted path) returns something true. Repeatable."""
        return self._ask("skip", test, runs_if=False)

    @word()
    def environments(self, *names: str | list[str] | tuple[str, ...]) -> Self:
        """Run only on servers whose ENVIRONMENT setting is one of these; the others leave the task alone."""
        self._draft.fields["environments"] = self._names("environments", names)
        return self

    @word()
    def only_on(self, *servers: str | list[str] | tuple[str, ...]) -> Self:
        """Run only on servers whose SERVER_NAME (by default the host's name) is one of these; others leave it alone."""
        self._draft.fields["servers"] = self._names("only_on", servers)
        return self

    @word()
    def even_in_maintenance_mode(self) -> Self:
        """Run also while the MAINTENANCE_MODE setting says that the project is in maintenance."""
        self._draft.fields["even_in_maintenance_mode"] = True
        return self

    def _ask(self, name: str, test: object, *, runs_if: bool) -> Self:
        if not callable(test) and not (isinstance(test, str) and "." in test):
            self._fail(
                f".{name}({test!r}): this was decided when the module was imported"
                if isinstance(test, bool)
                else f".{name}({test!r}) is neither a function nor a dotted path",
                f"Give the function itself, without calling it: .{name}(is_open).",
            )
        fields = self._draft.fields
        fields["filters"] = (*fields.get("filters", ()), Filter(test, runs_if))
        return self

"""The words for what happens *around* a run: hooks, pings, where its output goes. A new one adds to a field."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..entries import Hook, Mail, Moment, OutputFile, Ping
from .words import Words, word

if TYPE_CHECKING:
    from typing_extensions import Self

Function = Callable[..., Any] | str


class Surroundings(Words):
    """What is called, told and kept beside a run; nothing of it changes how the run went."""

    __slots__ = ()

    @word(repeats=True, asks=True)
    def before(self, function: Function) -> Self:
        """
        Call this function (or the one at this dotted path) before the run, once its conditions have agreed to it.

        It is given ``run``, if it names that. What it raises is recorded, and the run goes on. May be repeated.
        """
        return self._hook("before", "before", function)

    @word(repeats=True, asks=True)
    def after(self, function: Function) -> Self:
        """
        Call this function (or dotted path) after each run, however it went. May be repeated.

        It is given what it names of ``run``, ``status``, ``output``, ``error`` and ``seconds``.
        """
        return self._hook("after", "after", function)

    @word(repeats=True, asks=True)
    def on_success(self, function: Function) -> Self:
        """Call this function (or dotted path) after a run that succeeded, as ``after`` does. May be repeated."""
        return self._hook("on_success", "success", function)

    @word(repeats=True, asks=True)
    def on_failure(self, function: Function) -> Self:
        """
        Call this function (or dotted path) after a run that did not succeed, as ``after`` does. May be repeated.

        Where the task is tried again, only after the last attempt.
        """
        return self._hook("on_failure", "failure", function)

    @word(repeats=True)
    def ping_before(self, url: str) -> Self:
        """GET this address before the run; like every ping for 10 s at most, and never failing a run. Repeatable."""
        return self._ping("ping_before", "before", url)

    @word(repeats=True)
    def then_ping(self, url: str) -> Self:
        """GET this address after each run, however it went. May be repeated."""
        return self._ping("then_ping", "after", url)

    @word(repeats=True)
    def ping_on_success(self, url: str) -> Self:
        """GET this address after a run that succeeded. May be repeated."""
        return self._ping("ping_on_success", "success", url)

    @word(repeats=True)
    def ping_on_failure(self, url: str) -> Self:
        """GET this address after a run that did not succeed, and is not tried again. May be repeated."""
        return self._ping("ping_on_failure", "failure", url)

    @word()
    def send_output_to(self, path: str | os.PathLike[str]) -> Self:
        """Write what the run prints to this file, which each run begins anew; its end is kept in the history too."""
        self._contradicts("send_output_to", "append_output_to")
        return self._output("send_output_to", path, append=False)

    @word()
    def append_output_to(self, path: str | os.PathLike[str]) -> Self:
        """Append what the run prints to this file; its end is kept in the history too."""
        self._contradicts("append_output_to", "send_output_to")
        return self._output("append_output_to", path, append=True)

    @word(repeats=True)
    def email_output_to(self, *addresses: str | list[str] | tuple[str, ...]) -> Self:
        """Mail the output of a run that printed something, or that failed, to these addresses. May be repeated."""
        return self._mail("email_output_to", addresses, only_on_failure=False)

    @word(repeats=True)
    def email_output_on_failure(self, *addresses: str | list[str] | tuple[str, ...]) -> Self:
        """Mail the output of a run that failed, and is not tried again, to these addresses. May be repeated."""
        return self._mail("email_output_on_failure", addresses, only_on_failure=True)

    def _hook(self, name: str, moment: Moment, function: object) -> Self:
        is_path = isinstance(function, str) and "." in function and all(map(str.isidentifier, function.split(".")))
        if not callable(function) and not is_path:
            self._fail(
                f".{name}({function!r}) is neither a function nor a dotted path",
                f"Give the function itself, without calling it: .{name}(notify).",
            )
        self._add("hooks", Hook(moment, function))  # type: ignore[arg-type]
        return self

    def _ping(self, name: str, moment: Moment, url: object) -> Self:
        # What is given is not repeated whole: such addresses hold secrets, and this message may go to a log.
        instead = f'Write .{name}("https://…").'
        if not isinstance(url, str):
            self._fail(f".{name}() was given {type(url).__name__}, not an address", instead)
        if not url.isascii() or not url.isprintable() or " " in url:
            self._fail(f".{name}() was given an address with characters that none has", "Write them percent-encoded.")
        try:
            parts = urlsplit(url)
            is_whole = bool(parts.hostname) and parts.port != 0
        except ValueError as error:
            self._fail(f".{name}(): {error}", instead)
        if parts.scheme not in ("http", "https"):
            self._fail(f".{name}() was given an address of the scheme {parts.scheme!r}, not http or https", instead)
        if not is_whole:
            self._fail(f".{name}() was given an address without a host", instead)
        self._add("pings", Ping(moment, url))
        return self

    def _output(self, name: str, path: object, *, append: bool) -> Self:
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            self._fail(f".{name}({path!r}) is not a path", f'Write .{name}("/var/log/nightly.log").')
        if text.endswith(("/", os.sep)):
            self._fail(f".{name}({text!r}) is a folder", f'Write a file in it: .{name}("{text}nightly.log").')
        self._draft.fields["output_file"] = OutputFile(text, append)
        return self

    def _mail(self, name: str, addresses: tuple[object, ...], *, only_on_failure: bool) -> Self:
        to = self._names(name, addresses)
        for each in to:
            if "@" not in each or not each.isprintable():
                self._fail(f".{name}(): {each!r} is no address of mail", f'Write .{name}("ops@example.com").')
        self._add("mails", Mail(to, only_on_failure))
        return self

    def _add(self, field: str, item: Hook | Ping | Mail) -> None:
        fields = self._draft.fields
        fields[field] = (*fields.get(field, ()), item)

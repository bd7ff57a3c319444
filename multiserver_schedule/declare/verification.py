"""
What declaring does not look at, as it would import everything at every pass: is there what is to be run, and when?

``verify`` is for ``manage.py check`` and for the first time that a set of declarations is seen.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from django.utils.module_loading import import_string

from ..entries import ScheduledTask
from .vocabulary import is_queue_task

if TYPE_CHECKING:
    from django.core.management.base import BaseCommand


def verify(task: ScheduledTask) -> list[str]:
    """
    Return what is wrong with a task, each in a sentence; nothing when all is well. It runs nothing of the task.

    A command that is not there or does not take these arguments, a dotted path that cannot be imported, a function that
    does not take these arguments, a schedule that is never due.
    """
    problems = list(_command(task) if task.kind == "command" else _call(task) if task.kind == "call" else ())
    for each in task.filters:
        word = "when" if each.runs_if else "skip"
        problems += [f".{word}(): {problem}" for problem in _function(each.test, (), {})]
    for hook in task.hooks:
        word = hook.moment if hook.moment in ("before", "after") else f"on_{hook.moment}"
        problems += [f".{word}(): {problem}" for problem in _function(hook.function, (), {}, offered=hook.offered)]
    try:
        task.timetable.check()
    except ValueError as error:
        problems.append(str(error))
    return problems


def _call(task: ScheduledTask) -> Iterator[str]:
    if isinstance(task.target, tuple):
        return
    yield from _function(task.target, task.args, dict(task.kwargs))


def _function(
    target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any], *, offered: tuple[str, ...] = ()
) -> Iterator[str]:
    """Tell what is wrong with a function; ``offered`` are arguments of which it gets those that it names."""
    name = repr(target) if isinstance(target, str) else getattr(target, "__qualname__", repr(target))
    if isinstance(target, str):
        try:
            target = import_string(target)
        except Exception as error:
            yield f"{name} cannot be imported: {type(error).__name__}: {error}"
            return
    if is_queue_task(target):
        yield f"{name} is a task of a queue; schedule.enqueue is reserved for these. Call a function that enqueues it."
    elif not callable(target):
        yield f"{name} is {type(target).__name__}, which cannot be called."
    elif inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        yield f"{name} is a generator: calling it runs nothing of it. Write a function without yield."
    else:
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):  # some built-in functions have none that can be read
            return
        named = {each: None for each in offered if each in signature.parameters}
        try:
            signature.bind(*args, **kwargs, **named)
        except TypeError as error:
            told = f" It is offered {', '.join(offered)} by name." if offered else ""
            if not offered and "'run'" in str(error):
                told = " A run is not given to it: it gets it from multiserver_schedule.current_run()."
            yield f"{name} cannot be called so: {error}.{told}"


def _command(task: ScheduledTask) -> Iterator[str]:
    # Not at the top: whoever imports this package to declare, a web server say, has no use for the commands' machinery.
    from django.core.management import call_command, get_commands, load_command_class
    from django.core.management.base import BaseCommand

    name = str(task.target)
    commands = get_commands()
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        yield f"There is no command {name!r}." + (f" Did you mean {close[0]!r}?" if close else "")
        return
    app = commands[name]
    try:
        command = copy.copy(app) if isinstance(app, BaseCommand) else load_command_class(app, name)
    except Exception as error:
        yield f"The command {name!r} cannot be loaded: {type(error).__name__}: {error}"
        return
    # Django has no way to ask whether a command takes these arguments without running it. So it is run, up to the last
    # step, which does nothing: what Django refuses here it refuses at 03:00, in whatever version.
    command.execute = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            call_command(command, *task.args, **task.kwargs)
    except SystemExit:
        yield f"The command {name!r} would only print its help or its version."
    except Exception as error:
        yield f"The command {name!r} refuses its arguments: {error}" + _nearest_option(command, task.kwargs)


def _nearest_option(command: BaseCommand, options: Mapping[str, Any]) -> str:
    actions = command.create_parser("manage.py", "")._actions
    known = {text.lstrip("-").replace("-", "_") for action in actions for text in action.option_strings}
    for option in options:
        if option not in known and (close := difflib.get_close_matches(option, known, n=1)):
            return f" Did you mean {close[0]!r}?"
    return ""

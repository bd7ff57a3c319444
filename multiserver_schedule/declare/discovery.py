"""Finding the declarations: the ``schedule`` module of every installed app, and the project's own."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Final

from django.apps import apps
from django.conf import settings
from django.utils.module_loading import module_has_submodule

from .. import conf
from ..exceptions import DeclarationError
from .registry import Registry

MODULE: Final = "schedule"
OURS: Final[tuple[str, ...]] = ("multiserver_schedule.housekeeping",)
"""Modules of this package that declare tasks, too, unless HOUSEKEEPING is False."""
_PLACES: Final = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")})
_PACKAGE: Final = os.path.join(os.path.dirname(conf.__file__), "")


@dataclass(frozen=True, slots=True)
class Broken:
    """A module whose declarations cannot be had; as a text, in one line, where and why."""

    module: str
    error: Exception
    traceback: str
    """Of wrong declarations, which say their own lines, the message alone."""

    def __str__(self) -> str:
        error = self.error
        if isinstance(error, DeclarationError):
            return f"{self.module} cannot be read: {' '.join(str(error).split())}"  # it says where itself
        where, text = "", f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError) and error.filename:
            where, text = f"{error.filename}:{error.lineno}: ", f"{type(error).__name__}: {error.msg}"
        else:
            lines = [line for line in traceback.extract_tb(error.__traceback__) if _is_the_projects(line.filename)]
            where = f"{lines[-1].filename}:{lines[-1].lineno}: " if lines else ""
        return f"{self.module} cannot be read: {where}{' '.join(text.split()).rstrip(': .')}"


@dataclass(frozen=True, slots=True)
class Discovered:
    """Where declarations were looked for."""

    searched: tuple[str, ...] = ()
    """The modules that would have been read, whether there or not."""
    found: tuple[str, ...] = ()
    """Those that are there."""
    broken: tuple[Broken, ...] = ()
    """What went wrong in these, where it is collected and not raised."""


def discover(registry: Registry, *, collect: bool = False) -> Discovered:
    """
    Import the ``schedule`` module of every installed app and of the project's package (that of ROOT_URLCONF).

    A package without one is fine. Whatever such a module raises comes out as it is, an ImportError too; with
    ``collect`` it is kept in what is returned, and the other modules are read.
    """
    searched: list[str] = []
    found: list[str] = []
    broken: list[Broken] = []
    for package in _packages():
        module = f"{package.__name__}.{MODULE}"
        searched.append(module)
        if not module_has_submodule(package, MODULE):
            continue
        found.append(module)
        try:
            import_module(module)
        except Exception as error:
            if not collect:
                raise
            broken.append(Broken(module, error, "".join(traceback.format_exception(error))))
    if conf.load().housekeeping:
        for module in OURS:
            import_module(module)
    if not collect:
        registry.complete_all()
    for module, wrong in registry.complete_each():
        # A schedule/ folder declares in modules of its own. What is declared elsewhere, in a models.py say, is told by
        # whoever reads the tasks.
        if any(module == each or module.startswith(f"{each}.") for each in found):
            broken.append(Broken(module, wrong, str(wrong)))
    return Discovered(tuple(searched), tuple(found), tuple(broken))


def _is_the_projects(file: str) -> bool:
    return not file.startswith(("<", _PACKAGE, *_PLACES))


def _packages() -> Iterator[ModuleType]:
    """Yield the package of every installed app, then the project's unless it is one of them."""
    seen: set[str] = set()
    for app in apps.get_app_configs():
        if app.module is not None and app.name not in seen:
            seen.add(app.name)
            yield app.module
    urls = getattr(settings, "ROOT_URLCONF", None)
    name = urls.rpartition(".")[0] if isinstance(urls, str) else ""
    if name and name not in seen:
        try:
            package = import_module(name)
        except ModuleNotFoundError as error:
            # A ROOT_URLCONF that is nowhere is for Django to tell of; anything that is missing inside it is not.
            if not (name == error.name or name.startswith(f"{error.name}.")):
                raise
        else:
            yield package

"""What users install."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from .stores import ROOT

NOT_COPIED = ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info", "build", "dist", "*.sqlite3*")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, because a build leaves its own folders where it runs.
    return Path(copytree(ROOT, tmp_path_factory.mktemp("packaging") / "source", ignore=NOT_COPIED))


def build(source: Path, what: str) -> Path:
    target = source.parent / what
    target.mkdir()
    # The backend itself and not pip: no isolated environment is made, and nothing is downloaded.
    script = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(target)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(source, "wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_whole_package_and_nothing_else(source: Path, wheel: zipfile.ZipFile) -> None:
    package = {str(path.relative_to(source)) for path in (source / "multiserver_schedule").rglob("*") if path.is_file()}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package


@pytest.mark.parametrize(
    "name",
    [
        "multiserver_schedule/py.typed",
        "multiserver_schedule/models.py",
        "multiserver_schedule/migrations/0001_initial.py",
    ],
)
def test_the_wheel_holds(wheel: zipfile.ZipFile, name: str) -> None:
    assert name in wheel.namelist()


def test_installing_it_brings_django_and_croniter_alone(metadata: Message) -> None:
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(always) == ["Django>=5.2", "croniter<8,>=7"]


def test_the_extra_of_the_tests_needs_no_compiler(metadata: Message) -> None:
    lines = [line for line in metadata.get_all("Requires-Dist", []) if 'extra == "tests"' in line]
    assert lines
    assert not [line for line in lines if "mysqlclient" in line]


def test_the_metadata_names_licence_python_and_version(metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == "0.1.0"


def test_the_fixtures_for_users_tests_are_found_by_pytest(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "[pytest11]\nmultiserver_schedule = multiserver_schedule.testing.plugin" in wheel.read(name).decode()
    assert "multiserver_schedule/testing/plugin.py" in wheel.namelist()


def test_the_source_archive_can_be_tested(source: Path) -> None:
    with tarfile.open(build(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.rst", "setup.cfg", "tests/conftest.py", "tests/servers.py", "tox.ini"} <= names

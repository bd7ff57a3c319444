"""The vocabulary, as an editor and a type checker see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_a_type_checker_knows_every_word_and_finds_the_usual_mistakes() -> None:
    pytest.importorskip("mypy")
    done = subprocess.run(
        # One cache with a developer's own runs: from nothing, mypy reads Django's stubs for half a minute.
        [sys.executable, "-m", "mypy", "--config-file=setup.cfg", "tests/typing/declarations.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, ""), done.stdout

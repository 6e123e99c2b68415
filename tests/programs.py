"""Programs that tests run in a process of their own, where JAX has not counted its devices yet."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap

TESTS = pathlib.Path(__file__).parent


def run(program: str) -> None:
    """Ends the test with what the program said last where it fails or warns."""
    places = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert done.returncode == 0, done.stderr

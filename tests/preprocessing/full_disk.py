"""A process that the system lets write only so much a file, as on a full disk."""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CATCH = """
import sys
def attempt(action):
    try:
        action()
    except OSError as error:
        sys.exit(f"refused: {error}")
"""


def on_a_full_disk(code: str, *arguments: object, limit: int) -> str:
    """Run code in a process of its own.

    Args:
        code: calls ``attempt(action)`` for what is to be refused; its arguments are sys.argv[1:].
        arguments: for it.
        limit: bytes a file may have.

    Returns:
        What the process said. A process that crashed, or that was not refused, is a failure.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CATCH + code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, (done.returncode, done.stderr)  # a signal is negative
    assert done.stderr.startswith("refused: "), done.stderr
    return done.stderr

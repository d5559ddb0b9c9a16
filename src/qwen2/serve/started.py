"""A server of our own in a process of its own, for as long as something needs one."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from qwen2.common.errors import UserError

ENDING = 10.0  # seconds that it has to end by itself


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[str]:
    """`qwen2 serve ARGUMENTS` on a free port of this machine; gives its URL.

    Raises:
        UserError: it ends before it serves; tells its last words.
    """
    command = [sys.executable, "-m", "qwen2.cli", "serve", *arguments, "--port", "0"]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()  # empty when it has ended
            place = re.search(r"http://[\w.:\[\]-]+", ready)
            if place is None:
                process.wait()
                words.seek(0)
                said = (words.read().strip().splitlines() or ["nothing"])[-1]
                raise UserError(f"the server did not start: {said.removeprefix('qwen2: ')}")
            yield place.group()
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

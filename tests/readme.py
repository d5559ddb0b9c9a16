"""Runs every command that the README shows: `python tests/readme.py RUN`.

RUN is the folder of a finished quickstart. Commands are the lines that begin with `$ ` in blocks of
the language `console`; they run in a scratch folder where RUN is called `quickstart`. A command
fails when its exit code is not 0 or it prints nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def commands(text: str) -> list[str]:
    """The commands of a page, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def main() -> None:
    run = Path(sys.argv[1]).resolve()
    programs = Path(sys.executable).parent
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(run, Path(scratch) / "quickstart")
        for command in (found := commands(README.read_text())):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=scratch,
                env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            good = done.returncode == 0 and done.stdout.strip()
            print(f"{'ok  ' if good else 'FAIL'} {command}", flush=True)
            if not good:
                failed += 1
                print(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if failed or not found:
        sys.exit(f"README: {failed} of {len(found)} commands failed")
    print(f"README: all {len(found)} commands ran")


if __name__ == "__main__":
    main()

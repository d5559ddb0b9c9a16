"""Time to `qwen2 --help`, and from the start of `qwen2 generate` to the first token on the screen.

The goals are 0.3 s and 3 s with files in cache; beside them what Python and torch alone take.

    python benchmarks/startup.py MODEL.gguf [--json] [--rounds 5]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import alternate, finish, options, spread

QWEN2 = [str(Path(sys.executable).with_name("qwen2"))]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("QWEN2_REAL_CHECKPOINT"))
    chosen = parser.parse_args()
    if not chosen.model:
        parser.error("give a model, or set QWEN2_REAL_CHECKPOINT")
    generate = [*QWEN2, "generate", chosen.model, "-p", "def main(", "-n", "1"]
    seconds = alternate(
        {
            "python": lambda: first_byte([sys.executable, "-c", "print(1)"]),
            "help": lambda: first_byte([*QWEN2, "--help"]),
            "import_torch": lambda: first_byte([sys.executable, "-c", "import torch; print(1)"]),
            "first_token": lambda: first_byte(generate),
        },
        chosen.rounds,
    )
    finish(
        "startup", {f"{name}_seconds": spread(column) for name, column in seconds.items()}, chosen
    )


def first_byte(command: list[str]) -> float:
    """Seconds from the start of a command to the first byte on its standard output."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1), f"{command} printed nothing"
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


if __name__ == "__main__":
    main()

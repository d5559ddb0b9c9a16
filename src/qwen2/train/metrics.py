"""The training log: one JSON object a line, cut back to the checkpoint when a run resumes.

Others get the same lines and are told of the same end, see watch.py.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Literal

from qwen2.common.errors import UserError

State = Literal["running", "finished", "stopped", "failed"]
"""Of a run."""


class MetricsFile:
    """Appends JSON lines to `path`; only its first `keep` bytes stay.

    Raises:
        UserError: the disk is full.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(min(keep, path.stat().st_size))

    def write(self, line: dict[str, Any]) -> None:
        """Append `line`; other processes see it at once."""
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{self.path}: the disk is full; free some and resume") from error
            raise

    def sync(self) -> int:
        """Force everything to the disk; returns the file's length in bytes."""
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self, state: State = "finished", reason: str = "") -> None:
        """No more lines; how the run ended is not for the log."""
        self._file.close()

"""The metrics of a run for TensorBoard: scalars by step, in event files of `out`/tensorboard.

Of a mixture's experts it gets the largest and the smallest share; run.html has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from qwen2.common.errors import UserError
from qwen2.train.curves import Line, flatten
from qwen2.train.metrics import State


def require_tensorboard() -> None:
    """Make sure that the package is there.

    Raises:
        UserError: it is not; says how to get it.
    """
    if find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard: true needs a package that is not installed: "
            "pip install 'qwen2[track]', or set tensorboard=false"
        )


class TensorBoard:
    """Writes into `folder`; what an earlier process wrote of steps after `step` no longer counts.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: Line) -> None:
        """The scalars of a line."""
        # A batch passed over has the number of the step before it, which may be before the purge.
        step = int(line["step"]) + ("skipped" in line)
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, step)

    def close(self, state: State, reason: str = "") -> None:
        """All is on the disk."""
        self._writer.close()


def scalars(line: Line) -> Iterator[tuple[str, float]]:
    """Names and values of what a line holds."""
    for name, value in line.items():
        if name in ("skipped", "rolled_back"):
            yield f"train/{name}", 1.0
        elif name == "evaluation":
            yield from ((f"held_out/{kind}", figure) for kind, figure in flatten(value).items())
        elif name == "expert_share":
            yield "train/expert_share_most", max(value)
            yield "train/expert_share_least", min(value)
        elif name != "step":
            yield f"train/{name}", value

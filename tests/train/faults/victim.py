"""A process that forks others, which train a little and die of the file system's faults.

Reads orders from its input, a JSON object a line, and answers each with what became of the ranks:
whether it was killed, or the error that it told. It has imported what takes seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import qwen2  # noqa: F401  before torch

# isort: split
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qwen2.common.errors import UserError
from qwen2.model.config import PUBLISHED
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.loop import LoopSettings

EVERY = 2  # steps between checkpoints


def train(folder: Path, steps: int, asynchronous: bool = False) -> dict[str, torch.Tensor]:
    """Train up to `steps`, from the newest checkpoint on; the weights, of this rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def share(tensor: torch.Tensor) -> torch.Tensor:
        if not dist.is_initialized():
            return tensor
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return distribute_tensor(tensor, mesh, [Shard(0)])

    shapes = {"model.a.weight": (6, 4), "model.b.bias": (5,)}
    masters = {name: nn.Parameter(share(torch.rand(shape))) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.1)
    checkpoints, state = Checkpointer(folder, 1, None, asynchronous), RunState()
    if (newest := checkpoints.newest()) is not None:
        state, _ = load_checkpoint(newest, masters, optimizer)
    with checkpoints:
        while state.step < steps:
            for name, shape in shapes.items():
                masters[name].grad = share(torch.rand(shape) - 0.5)
            optimizer.step()
            state.step += 1
            if state.step % EVERY == 0:
                arguments = {"row": state.step}, LoopSettings(), PUBLISHED["0.5b"]
                checkpoints.save(state, masters, optimizer, *arguments)
    return {name: master.detach() for name, master in masters.items()}


def _rank(order: dict[str, Any], rank: int, answer: Path) -> None:
    """Be a rank of `order`; the one that has the fault counts its calls."""
    faults = ctypes.CDLL(None)
    faults.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    faults.faults_calls.restype = ctypes.c_char_p
    folder, ranks = Path(order["folder"]), order["ranks"]
    if ranks > 1:
        store = f"file://{answer.parent}/store"
        dist.init_process_group("gloo", store, rank=rank, world_size=ranks)
    if rank == order["rank"]:
        faults.faults_arm(str(folder).encode(), order["at"], order["error"])
    said = None
    try:
        train(folder, order["steps"], order["asynchronous"])
    except UserError as error:
        said = str(error)
    _tell(answer, {"said": said, "calls": faults.faults_calls().decode()})


def _tell(answer: Path, values: dict[str, Any]) -> None:
    """Whole or not at all: this rank may be killed meanwhile."""
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(values))
    partial.rename(answer)


def _child(order: dict[str, Any], rank: int, answer: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _rank(order, rank, answer)
    except BaseException:
        _tell(answer, {"crashed": traceback.format_exc()})
    os._exit(0)


def _serve() -> None:
    with tempfile.TemporaryDirectory() as place:  # what is made at first use, every child has then
        for steps in (EVERY, 2 * EVERY):
            train(Path(place), steps)
    for line in sys.stdin:
        order = json.loads(line)
        answers = [Path(order["place"]) / f"answer-{rank}" for rank in range(order["ranks"])]
        children = {_child(order, rank, answer) for rank, answer in enumerate(answers)}
        while children:  # one that is killed takes the others along, as torchrun does
            ended, status = os.wait()
            children.remove(ended)
            if os.WIFSIGNALED(status):
                for other in children:
                    os.kill(other, signal.SIGKILL)
        told = [json.loads(a.read_text()) if a.exists() else {"killed": True} for a in answers]
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

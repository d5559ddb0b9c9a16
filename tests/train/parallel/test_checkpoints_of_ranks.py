"""Checkpoints of several ranks: shards of each in one folder, read by any other number of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.train import checkpointer
from qwen2.train.checkpointer import Checkpointer, newest_checkpoint
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.loop import LoopSettings

RunInRanks = Callable[..., list[Any]]
SHAPES = {"model.a.weight": (7, 4), "model.b.bias": (5,), "lm_head.weight": (2, 3)}
STATE = RunState(step=3, tokens=9, skipped=1, metrics_bytes=8)


def whole(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def trainee(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters over all ranks, uneven shards too, and an optimizer after a step."""
    tensors, slopes = whole(seed), whole(seed + 1)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensors, slopes = (
            {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in of.items()}
            for of in (tensors, slopes)
        )
    masters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.1)
    for name, master in masters.items():
        master.grad = slopes[name]
    optimizer.step()
    return masters, optimizer


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(folder: Path, seed: int = 0, step: int = 3, asynchronous: bool = False) -> None:
    masters, optimizer = trainee(seed)
    state = RunState(step, STATE.tokens, STATE.skipped, STATE.metrics_bytes)
    checkpoints = Checkpointer(folder, keep=2, asynchronous=asynchronous)
    with checkpoints:
        checkpoints.save(state, masters, optimizer, {"row": 5}, LoopSettings(), ModelConfig())
        with torch.no_grad():
            for master in masters.values():
                master.zero_()


def load(folder: Path) -> None:
    """What is read is what one process would have computed."""
    masters, optimizer = trainee(seed=7)
    path = Checkpointer(folder, keep=2).newest()
    assert path == folder / "step-00000003"
    assert load_checkpoint(path, masters, optimizer) == (STATE, {"row": 5})
    expected = {name: nn.Parameter(tensor) for name, tensor in whole(0).items()}
    reference = torch.optim.AdamW(expected.values(), lr=0.1)
    for name, slope in whole(1).items():
        expected[name].grad = slope
    reference.step()
    for name, master in masters.items():
        torch.testing.assert_close(full(master.detach()), expected[name].detach(), rtol=0, atol=0)
        for key, value in reference.state[expected[name]].items():
            found = full(optimizer.state[master][key])
            torch.testing.assert_close(found, value, rtol=0, atol=0, msg=f"{key}.{name}")


def save_where_one_rank_fails(folder: Path) -> None:
    """All ranks are told, and what there was stays."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer, "write", refuse)
        with pytest.raises(UserError) as caught:
            save(folder, step=4)
    assert str(caught.value).startswith("rank 1: ") == (dist.get_rank() == 0)
    assert "step-00000004: the disk is full" in str(caught.value)
    assert f"the last good one is {folder}/step-00000003" in str(caught.value)
    dist.barrier()  # the first rank has removed what was half-written
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


@pytest.mark.slow
def test_what_any_number_of_ranks_saved_any_other_reads(
    in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(4, save, tmp_path)
    load(tmp_path)
    in_ranks(3, load, tmp_path)
    for work in (load, save_where_one_rank_fails, load):
        in_ranks(2, work, tmp_path)
    assert len(list((tmp_path / "step-00000003/rng").iterdir())) == 4


def test_one_process_saves_for_many(in_ranks: RunInRanks, tmp_path: Path) -> None:
    save(tmp_path)
    in_ranks(2, load, tmp_path)

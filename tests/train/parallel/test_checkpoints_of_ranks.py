"""Checkpoints of several ranks: shards of each in one folder, read by any other number of them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qwen2.common import files
from qwen2.common.errors import UserError
from qwen2.common.files import MANIFEST
from qwen2.model.config import PUBLISHED
from qwen2.train import checkpointer, ranks
from qwen2.train.checkpointer import Checkpointer, newest_checkpoint
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.loop import LoopSettings
from qwen2.train.ranks import gather

RunInRanks = Callable[..., list[Any]]
SHAPES = {"model.a.weight": (7, 4), "model.b.bias": (5,), "lm_head.weight": (2, 3)}
CONFIG = PUBLISHED["0.5b"]
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
        checkpoints.save(state, masters, optimizer, {"row": 5}, LoopSettings(), CONFIG)
        with torch.no_grad():
            for master in masters.values():
                master.zero_()


def load(folder: Path) -> None:
    """What is read is what one process would have computed."""
    masters, optimizer = trainee(seed=7)
    path = Checkpointer(folder, keep=2).newest()
    assert path == folder / "step-00000003"
    assert load_checkpoint(path, masters, optimizer) == (STATE, {"row": 5})
    assert_loaded(masters, optimizer)


def assert_loaded(masters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
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


def save_where_one_rank_fails(folder: Path, asynchronous: bool) -> None:
    """All ranks are told, and what there was stays."""
    write = checkpointer.write

    def refuse(*arguments: Any) -> list[Path]:
        write(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer, "write", refuse)
        with pytest.raises(UserError) as caught:
            save(folder, step=4, asynchronous=asynchronous)
    assert str(caught.value).startswith("rank 1: ") == (dist.get_rank() == 0)
    assert "step-00000004: the disk is full" in str(caught.value)
    assert f"the last good one is {folder}/step-00000003" in str(caught.value)
    dist.barrier()  # the first rank has removed what was half-written
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]


def save_beside_collectives(folder: Path) -> None:
    """The thread's collectives and those of training do not meet, however slow a rank writes."""
    masters, optimizer = trainee(seed=0)
    flush = ranks.flushed_entry

    def slow(path: Path) -> dict[str, Any]:
        time.sleep(0.01 * dist.get_rank())
        return flush(path)

    with pytest.MonkeyPatch.context() as patch, Checkpointer(folder, 2, None, True) as checkpoints:
        patch.setattr(ranks, "flushed_entry", slow)
        for step in (2, 3):
            state = replace(STATE, step=step)
            arguments = state, masters, optimizer, {"row": 5}, LoopSettings(), CONFIG
            checkpoints.save(*arguments)
            if step == 3:
                with torch.no_grad():
                    for master in masters.values():
                        master.zero_()
            for number in range(50):
                mine = torch.tensor([float(number + dist.get_rank())])
                dist.all_reduce(mine)
                size = dist.get_world_size()
                assert mine.item() == number * size + size * (size - 1) / 2
                assert gather((step, number)) == [(step, number)] * size


def hashed(folder: Path) -> tuple[set[str], set[str]]:
    """The files that this rank reads for the manifest, and to verify it."""
    seen: set[str] = set()
    read = files.sha256_of

    def note(path: Path) -> str:
        seen.add("/".join(path.parts[-2:]))
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sha256_of", note)
        save(folder)
        dist.barrier()
        written, seen = seen, set()
        assert newest_checkpoint(folder) is not None
    return written, seen


def part(asynchronous: bool, folder: Path) -> None:
    """Each rank has some of the weights alone, as pipeline stages have; two of them share one."""
    rank = dist.get_rank()
    own = [name for i, name in enumerate(SHAPES) if i in (rank, rank + 1)]
    masters = {name: nn.Parameter(whole(0)[name]) for name in own}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.1)
    for name, master in masters.items():
        master.grad = whole(1)[name]
    optimizer.step()
    with Checkpointer(folder, 2, None, asynchronous) as checkpoints:
        checkpoints.save(STATE, masters, optimizer, {"row": 5}, LoopSettings(), CONFIG)


def load_part(folder: Path) -> None:
    own = list(SHAPES)[dist.get_rank() :: 2]
    masters = {name: nn.Parameter(torch.zeros(SHAPES[name])) for name in own}
    optimizer = torch.optim.AdamW(masters.values(), lr=0.1)
    path = newest_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, masters, optimizer)
    assert_loaded(masters, optimizer)
    del masters[own[0]]
    with pytest.raises(UserError, match="is only in it"):
        load_checkpoint(path, masters, optimizer)


@pytest.mark.slow
def test_what_any_number_of_ranks_saved_any_other_reads(
    in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(4, save, tmp_path)
    load(tmp_path)
    in_ranks(3, load, tmp_path)
    in_ranks(2, load, tmp_path)
    for asynchronous in (False, True):
        in_ranks(2, save_where_one_rank_fails, tmp_path, asynchronous)
    in_ranks(2, load, tmp_path)
    assert len(list((tmp_path / "step-00000003/rng").iterdir())) == 4


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_process_saves_for_many(
    asynchronous: bool, in_ranks: RunInRanks, tmp_path: Path
) -> None:
    save(tmp_path, asynchronous=asynchronous)
    in_ranks(2, load, tmp_path)


def test_ranks_save_beside_their_collectives(in_ranks: RunInRanks, tmp_path: Path) -> None:
    in_ranks(2, save_beside_collectives, tmp_path)
    load(tmp_path)


def test_each_rank_reads_what_it_wrote_and_a_share_of_what_it_verifies(
    in_ranks: RunInRanks, tmp_path: Path
) -> None:
    (first, verified), (second, too) = in_ranks(2, hashed, tmp_path)
    mine = "shard-00001-model-00001-of-00001.safetensors"
    name = tmp_path / "step-00000003"
    texts = {"state.json", "config.json", "recipe.yaml"}
    assert {Path(n).name for n in first} == {mine, "00000.safetensors", *texts}
    assert {Path(n).name for n in second} == {mine.replace("1-m", "2-m"), "00001.safetensors"}
    assert not verified & too
    everything = {file.name for file in name.rglob("*") if file.is_file()} - {MANIFEST}
    assert {Path(n).name for n in verified | too} == everything


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ranks_with_weights_of_their_own_make_one_checkpoint(
    asynchronous: bool, in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(2, part, asynchronous, tmp_path)
    load(tmp_path)
    in_ranks(2, load_part, tmp_path)

"""What a rank knows of its world."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.train.mesh import Mesh
from qwen2.train.world import Place, World, find_place, open_world

RunInRanks = Callable[..., list[Any]]


def test_a_plain_process_is_a_world_of_its_own(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with open_world(Mesh(), tiny, 32, "cpu") as world:
        assert not dist.is_initialized()
        assert (world.is_first, world.dp_rank, world.mesh.dp) == (True, 0, 1)
        assert world.sum(torch.tensor(3), "dp") == 3


def test_a_world_that_the_mesh_does_not_want_is_refused(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        pytest.raises(UserError, match="tp 2 is 2 ranks, but the world has 4"),
        open_world(Mesh(tp=2, dp_shard=1), tiny, 32, "cpu"),
    ):
        pass
    assert not dist.is_initialized()


def test_the_environment_is_that_of_torchrun_or_refused() -> None:
    assert find_place({}) is None
    assert find_place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK not set"):
        find_place({"RANK": "3"})
    with pytest.raises(UserError, match="RANK=x"):
        find_place({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})


def test_one_process_of_torchrun_has_a_group_that_ends(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setitem(os.environ, name, str(value))
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    with open_world(Mesh(), tiny, 32, "cpu") as world:
        assert world.sum(torch.tensor(3), "stage") == 3
        assert world.is_first
    assert not dist.is_initialized()


OVER = ("dp", "data", "stage", "pp", "world")


def sums(sizes: dict[str, int]) -> tuple[int, bool, list[int]]:
    """The rank of the rows, who speaks, and the sums of 1, 10, 100, 1000 by rank."""
    world = World(Mesh(**sizes), torch.device("cpu"))
    mine = torch.tensor(10 ** dist.get_rank())
    return (
        world.dp_rank,
        world.is_first,
        [int(world.sum(mine, over)) for over in OVER],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # rank = 2 dp + cp
        (
            {"dp_shard": 2, "cp": 2},
            [
                (0, True, [101, 1111, 1111, 1, 1111]),
                (0, False, [1010, 1111, 1111, 10, 1111]),
                (1, False, [101, 1111, 1111, 100, 1111]),
                (1, False, [1010, 1111, 1111, 1000, 1111]),
            ],
        ),
        # rank = 2 dp + tp
        (
            {"dp_shard": 1, "dp_replicate": 2, "tp": 2},
            [
                (0, True, [101, 101, 1111, 1, 1111]),
                (0, False, [1010, 1010, 1111, 10, 1111]),
                (1, False, [101, 101, 1111, 100, 1111]),
                (1, False, [1010, 1010, 1111, 1000, 1111]),
            ],
        ),
        # rank = 2 pp + tp
        (
            {"pp": 2, "dp_shard": 1, "tp": 2},
            [
                (0, True, [1, 101, 11, 101, 1111]),
                (0, False, [10, 1010, 11, 1010, 1111]),
                (0, False, [100, 101, 1100, 101, 1111]),
                (0, False, [1000, 1010, 1100, 1010, 1111]),
            ],
        ),
    ],
)
def test_ranks_and_their_sums(in_ranks: RunInRanks, sizes: dict[str, int], expected: Any) -> None:
    assert in_ranks(4, sums, sizes) == expected

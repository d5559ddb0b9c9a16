import pytest

from qwen2.common.errors import UserError
from qwen2.model.config import PUBLISHED
from qwen2.train.mesh import Mesh

DENSE, MOE, TIED = PUBLISHED["72b"], PUBLISHED["57b-a14b"], PUBLISHED["0.5b"]


def test_what_is_left_open_is_filled() -> None:
    mesh = Mesh(tp=8, cp=2, dp_replicate=2).resolve(256, DENSE, 4096)
    assert mesh.sizes() == {"pp": 1, "dp_replicate": 2, "dp_shard": 8, "cp": 2, "tp": 8}
    assert (mesh.dp, mesh.fsdp, mesh.world_size) == (16, 16, 256)
    assert Mesh().resolve(1, TIED, 512).world_size == 1
    assert mesh.resolve(256, DENSE, 4096) == mesh


@pytest.mark.parametrize(
    ("mesh", "model", "says"),
    [
        ({"tp": 3}, DENSE, "tp 3 is 15 ranks, but the world has 16"),
        ({"dp_shard": 4}, DENSE, "dp_shard 4 is 4 ranks, but the world has 16"),
        ({"tp": 16}, DENSE, "tp 16 does not divide the 8 key-value heads"),
        ({"cp": 16, "tp": 1}, MOE, "cp 16 does not divide the 28 query and 4 key-value heads"),
        ({"ep": 2}, DENSE, "ep 2, but the model is dense"),
        ({"ep": 3}, MOE, "ep 3 does not divide the 64 experts"),
        ({"ep": 16, "dp_replicate": 2}, MOE, "ep 16 does not divide dp_shard x cp = 8"),
        ({"pp": 2}, TIED, "pp 2: embedding and head are one tensor"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    mesh: dict[str, int], model: object, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        Mesh(**mesh).resolve(16, model, 4096)  # type: ignore[arg-type]


def test_more_stages_than_layers_and_rows_that_do_not_divide() -> None:
    with pytest.raises(UserError, match="pp 128 is more stages than the model's 80 layers"):
        Mesh(pp=128).resolve(128, DENSE, 4096)
    with pytest.raises(UserError, match="context 4095 is no multiple of cp x tp = 8"):
        Mesh(cp=2, tp=4).resolve(8, DENSE, 4095)


def test_few_key_value_heads_are_repeated_for_more_ranks() -> None:
    assert Mesh(cp=14, dp_shard=1).problems(TIED, 4096 * 7) == []  # 14 query heads, 2 of keys
    assert "cp 7 does not divide" in Mesh(cp=7, dp_shard=1).problems(TIED, 4096 * 7)[0]

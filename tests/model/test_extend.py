"""Longer contexts by configuration: what is turned on, and that nothing else is."""

from __future__ import annotations

import pytest

from qwen2.common.errors import UserError
from qwen2.model.config import PUBLISHED, DualChunk, ModelConfig, SlidingWindow, Yarn
from qwen2.model.extend import METHODS, describe_context, extend_context

BASE = PUBLISHED["7b"]


@pytest.mark.parametrize("method", METHODS)
def test_within_the_trained_length_nothing_is_turned_on(method: str) -> None:
    assert extend_context(BASE, 32_768, method) == BASE


def test_beyond_it_the_report_s_way_is_the_default() -> None:
    config = extend_context(BASE, 131_072)
    assert config.dual_chunk == DualChunk(
        chunk_size=32_768, local_size=2048, original_max_position_embeddings=32_768
    )
    assert config.yarn is None
    assert config.context_length == 131_072
    assert config.trained_length == 32_768
    without = extend_context(BASE, 131_072, "dca").dual_chunk
    assert without is not None
    assert without.original_max_position_embeddings is None


def test_static_yarn_only_by_name() -> None:
    config = extend_context(BASE, 131_072, "yarn")
    assert config.yarn == Yarn(factor=4, original_max_position_embeddings=32_768)
    assert config.dual_chunk is None
    odd = extend_context(BASE, 50_000, "yarn").yarn
    assert odd is not None
    assert odd.factor == pytest.approx(50_000 / 32_768)


def test_none_changes_the_limit_alone(tiny: ModelConfig) -> None:
    longer = extend_context(tiny, 2048, "none")
    assert longer == tiny.model_copy(update={"max_position_embeddings": 2048})


def test_a_checkpoint_s_own_way_is_kept_as_far_as_it_reaches(tiny: ModelConfig) -> None:
    own = tiny.model_copy(update={"yarn": Yarn(factor=4, original_max_position_embeddings=512)})
    assert extend_context(own, 2048) == own
    further = extend_context(own, 4096)
    assert further.yarn is None
    assert further.dual_chunk is not None
    assert further.dual_chunk.chunk_size == 512
    again = extend_context(further, 8192, "yarn")
    assert again.yarn == Yarn(factor=16, original_max_position_embeddings=512)


def test_the_smallest_model_still_has_a_window(tiny: ModelConfig) -> None:
    short = tiny.model_copy(update={"max_position_embeddings": 8})
    chunk = extend_context(short, 64).dual_chunk
    assert chunk is not None
    assert (chunk.chunk_size, chunk.local_size) == (8, 1)


def test_what_cannot_be_is_one_line(tiny: ModelConfig) -> None:
    with pytest.raises(UserError, match="extend 'dcs': choose one of dca\\+yarn, dca, yarn, none"):
        extend_context(tiny, 4096, "dcs")
    sliding = tiny.model_copy(update={"sliding": SlidingWindow(size=8, layers=(0,))})
    with pytest.raises(UserError, match=r"context 4096: .* 'yarn' or 'none'"):
        extend_context(sliding, 4096)
    assert extend_context(sliding, 4096, "yarn").sliding == sliding.sliding


def test_what_is_on_is_said_in_one_line() -> None:
    said = {
        method: describe_context(extend_context(BASE, 131_072, method), BASE.trained_length)
        for method in METHODS
    }
    assert said["dca+yarn"] == (
        "context 131,072 tokens: dual chunk attention (chunks of 32,768, window 2,048) and YARN's "
        "temperature; up to 32,768 tokens nothing changes"
    )
    assert "temperature" not in said["dca"]
    assert "static YARN, factor 4 over 32,768" in said["yarn"]
    assert "beyond the 32,768 tokens of training" in said["none"]
    assert describe_context(BASE.model_copy(update={"max_position_embeddings": 512}), 512) == (
        "context 512 tokens: as trained"
    )


def test_what_is_said_of_a_miniature_is_so(tiny: ModelConfig) -> None:
    """Trained on 512 tokens: an extended configuration alone does not say so any more."""
    said = {m: describe_context(extend_context(tiny, 4096, m), 512) for m in METHODS}
    assert "ordinary attention, beyond the 512 tokens of training" in said["none"]
    assert "up to 512 tokens nothing changes" in said["dca"]
    assert "up to 512 tokens nothing changes" in said["dca+yarn"]
    chunk = DualChunk(chunk_size=64, local_size=40)
    own = tiny.model_copy(update={"dual_chunk": chunk})
    assert "up to 48 tokens nothing changes" in describe_context(own, 512)

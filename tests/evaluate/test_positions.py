"""Loss by position: against the plain loss, by hand, and as a chart."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.common.plot import standalone
from qwen2.evaluate.positions import PositionNats, nats_by_position, position_chart
from qwen2.evaluate.score import token_nats
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def model(tiny: ModelConfig, generator: torch.Generator) -> Qwen2:
    model = Qwen2(tiny).eval()
    init_weights(model, generator)
    with torch.no_grad():  # far from uniform, so that places differ
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def documents(count: int, length: int) -> list[list[int]]:
    ids = torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(1))
    return ids.tolist()


def test_the_means_are_those_of_the_tokens_at_these_positions(model: Qwen2) -> None:
    given = documents(3, 41)
    by = nats_by_position(model, given, 40, buckets=3)
    assert by.edges == [0, 13, 26, 40]
    assert by.tokens == [39, 39, 42]
    nats = torch.stack([token_nats(model, ids, 40) for ids in given])
    for start, stop, value in zip(by.edges, by.edges[1:], by.nats, strict=False):
        assert value == pytest.approx(nats[:, start:stop].mean().item(), rel=1e-5)
    assert by.perplexity == pytest.approx([math.exp(value) for value in by.nats])


def test_buckets_tile_the_length_and_short_documents_are_left_out(model: Qwen2) -> None:
    long, short = documents(1, 30), documents(2, 20)
    by = nats_by_position(model, [*short, *long], 20, buckets=64)
    assert by.edges == list(range(21)), "no bucket is empty"
    assert by.tokens == [1] * 20
    assert by == nats_by_position(model, long, 20, buckets=64)
    assert by.nats == pytest.approx(token_nats(model, long[0][:21], 20).tolist())


def test_lengths_that_cannot_be_are_refused(model: Qwen2) -> None:
    with pytest.raises(UserError, match="configuration ends at 512 positions"):
        nats_by_position(model, documents(1, 600), 513)
    with pytest.raises(UserError, match="no document has so many tokens"):
        nats_by_position(model, documents(2, 20), 20)  # 19 tokens after <|endoftext|>


def test_a_perplexity_beyond_all_floats_is_still_a_number() -> None:
    assert math.isfinite(PositionNats([0, 1], [800.0], [1]).perplexity[0])


def test_the_chart_has_a_line_for_each_series_and_stands_alone() -> None:
    by = PositionNats([0, 100, 200], [2.0, 1.0], [100, 100])
    chart = standalone(position_chart({"before": by, "after & more": by}))
    root = ElementTree.fromstring(chart)
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 2
    assert all(len(line.attrib["points"].split()) == 2 for line in lines)
    assert {"before", "after & more"} <= {text.text for text in root.iter(f"{SVG}text")}
    assert "var(" not in chart
    assert '<rect width="100%" height="100%" fill="#fff"/>' in chart

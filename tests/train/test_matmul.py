"""The recipe's `matmul`: products of fp32 with rounded operands, in a run and not after it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.train import stage
from qwen2.train.pretrain import PretrainRecipe, pretrain


def test_a_run_with_rounded_products_stays_close(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, seen, losses = torch.backends.mkldnn.matmul, [], []
    before, train = backend.fp32_precision, stage.Run.train

    def watched(run: stage.Run, steps: int) -> bool:
        seen.append(backend.fp32_precision)
        return train(run, steps)

    monkeypatch.setattr(stage.Run, "train", watched)
    for matmul in ("fp32", "rounded"):
        changes = {"out": f"{recipe['out']}-{matmul}", "dtype": "fp32", "matmul": matmul}
        asked = PretrainRecipe.parse({**recipe, **changes})
        pretrain(asked)
        lines = [json.loads(x) for x in (asked.out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert backend.fp32_precision == before
    assert seen == [before, "bf16"]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_rounded_products_of_bf16_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="dtype fp32"):
        PretrainRecipe.parse({**recipe, "dtype": "bf16", "matmul": "rounded"})

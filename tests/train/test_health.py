"""Each sign of trouble, and none for a run without."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2.train.curves import History
from qwen2.train.health import signs


def history(steps: int = 200, evaluations: dict[int, float] | None = None, **late: Any) -> History:
    """A run whose loss falls from 4 to 3; `late` are the figures of its last tenth."""
    run = History(steps)
    for step in range(1, steps + 1):
        line = {
            "step": step, "loss": 4 - step / steps, "lr": 1e-3, "grad_norm": 0.5,
            "tokens": 100 * step, "tokens_per_s": 200.0, "mfu": 0.2, "expert_share": [0.25] * 4,
        }  # fmt: skip
        run.add(line | (late if step > 0.9 * steps else {}))
        if evaluations and step in evaluations:
            run.add({"step": step, "evaluation": {"code": evaluations[step]}})
    return run


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ({"loss": 3.9}, "the loss is lately 25% above its lowest, 3.1"),
        ({"grad_norm": 3.0}, "the gradient norm is lately 3, 6.0 times its median"),
        ({"tokens_per_s": 120.0}, "lately 120 tokens/s, 60% of the median"),
        ({"expert_share": [0.49, 0.01, 0.49, 0.01]}, "experts 1, 3 get under 10% of an even share"),
        ({"expert_share": [0.4, 0.01, 0.3, 0.29]}, "expert 1 gets under 10%"),
        ({"evaluations": {50: 1.0, 180: 1.05}}, "held-out code is 5% above its lowest, at step 50"),
    ],
)
def test_a_sign(late: dict[str, Any], said: str) -> None:
    (sign,) = signs(history(**late))
    assert sign.startswith(said)


@pytest.mark.parametrize(
    "late",
    [
        {},
        {"loss": 3.2},
        {"grad_norm": 1.0},
        {"tokens_per_s": 180.0},
        {"expert_share": [0.4, 0.1, 0.4, 0.1]},
        {"evaluations": {50: 1.0, 180: 1.01}},
    ],
)
def test_no_sign(late: dict[str, Any]) -> None:
    assert signs(history(**late)) == []


def test_a_loss_with_noise_about_one_height_has_not_risen() -> None:
    run = History(2000)
    for step in range(1, 2001):
        loss = 0.1 + 0.05 * ((step * 7919) % 100) / 100
        run.add({"step": step, "loss": loss, "tokens": step, "tokens_per_s": 1.0})
    assert signs(run) == []


def test_batches_passed_over() -> None:
    run = History(10)
    assert signs(run) == []
    run.add({"step": 3, "skipped": "loss nan"})
    assert signs(run) == ["1 batch was passed over as not finite, the last after step 3: loss nan"]
    run.add({"step": 7, "skipped": "loss inf"})
    assert signs(run)[0].startswith("2 batches were passed over as not finite, the last after st")

"""What a person looking at a training run should be told of: signs of trouble, in plain words.

Rules of thumb of ours, each on the run's own past. None of them stops a run.
"""

from __future__ import annotations

from statistics import fmean as mean
from statistics import median

from qwen2.train.curves import Curves, History

LOSS_RISE = 0.1  # of the loss lately above its lowest
HELD_OUT_RISE = 0.02  # of a held-out figure above its lowest
NORM_RISE = 5.0  # times the median gradient norm
SLOW = 0.7  # of the median speed
STARVED = 0.1  # of an even share of the tokens
LATELY = 0.05  # of the run so far is what "lately" means
FEWEST = 20  # points of a curve that say something


def signs(history: History) -> list[str]:
    """Sentences, each a reason to look closer; none for a run that goes as it should."""
    return [
        *_skipped(history),
        *_returned(history),
        *_risen_loss(history.figures),
        *_norm(history.figures),
        *_speed(history.figures),
        *_held_out(history.held_out),
        *_experts(history.shares),
    ]


def _skipped(history: History) -> list[str]:
    if not history.skipped:
        return []
    step, why = history.skips[-1]
    batches = "1 batch was" if history.skipped == 1 else f"{history.skipped:,} batches were"
    return [f"{batches} passed over as not finite, the last after step {step:,}: {why}"]


def _returned(history: History) -> list[str]:
    if not history.returns:
        return []
    step, why = history.returns[-1]
    times = "once" if len(history.returns) == 1 else f"{len(history.returns):,} times"
    return [f"the run went back {times} after a loss spike, last to step {step:,}: {why}"]


def _risen_loss(figures: Curves) -> list[str]:
    loss = figures.mean("loss")
    if len(loss) < FEWEST:
        return []
    many = max(3, int(LATELY * len(loss)))  # points of a stretch; the last one is whole
    stretches = [loss[max(stop - many, 0) : stop] for stop in range(len(loss), 0, -many)]
    means = [(mean(value for _, value in points), points[-1][0]) for points in stretches]
    lowest, at = min(means[:-1])  # the first stretch may be short
    rise = means[0][0] / lowest - 1
    if lowest <= 0 or rise <= LOSS_RISE:
        return []
    return [f"the loss is lately {rise:.0%} above its lowest, {lowest:.3f} up to step {at:,}"]


def _norm(figures: Curves) -> list[str]:
    lately, before = _lately(figures, "grad_norm")
    if not before or lately <= NORM_RISE * before:
        return []
    return [f"the gradient norm is lately {lately:.3g}, {lately / before:.1f} times its median"]


def _speed(figures: Curves) -> list[str]:
    lately, before = _lately(figures, "tokens_per_s")
    if lately >= SLOW * before:
        return []
    return [f"lately {lately:,.0f} tokens/s, {lately / before:.0%} of the median"]


def _held_out(held_out: Curves) -> list[str]:
    said = []
    for name in held_out.names:
        points = held_out.mean(name)
        if len(points) > 1:
            at, lowest = min(points, key=lambda point: point[1])
            if lowest > 0 and points[-1][1] > (1 + HELD_OUT_RISE) * lowest:
                rise = points[-1][1] / lowest - 1
                said.append(f"held-out {name} is {rise:.0%} above its lowest, at step {at:,}")
    return said


def _experts(shares: Curves) -> list[str]:
    even = 1 / max(len(shares.names), 1)
    starved = [name for name in shares.names if shares.mean(name)[-1][1] < STARVED * even]
    if not starved:
        return []
    names = ", ".join(starved[:8]) + (" …" if len(starved) > 8 else "")
    which = f"expert {names} gets" if len(starved) == 1 else f"experts {names} get"
    return [f"{which} under {STARVED:.0%} of an even share of the tokens"]


def _lately(figures: Curves, name: str) -> tuple[float, float]:
    """Median of a figure lately and over all; equal while there is too little."""
    values = [value for _, value in figures.mean(name)]
    if len(values) < FEWEST:
        return 0.0, 0.0
    return median(values[-max(3, int(LATELY * len(values))) :]), median(values)

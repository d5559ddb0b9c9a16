"""What a checkpoint costs training: the stall of an asynchronous save, and a synchronous one whole.

Both are durable: flushed, hashed, renamed. The peer is `torch.save` of the same weights and
optimizer state, synchronous and flushed, which neither hashes nor can be read by other ranks. The
stall is from the call to its return; what the thread takes from the steps beside it shows in their
time. Figures are medians of `--rounds`, on the file system of `--place`.

    python benchmarks/checkpoints.py [--json] [--out FOLDER] [--rounds 5] [--place FOLDER]
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import qwen2  # noqa: F401  before torch

# isort: split
import torch

from harness import finish, options
from qwen2.common.runtime import keep_freed_memory, set_threads
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokens.packing import PackedBatch
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState
from qwen2.train.loop import LoopSettings
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.step import Trainee, train_step

SHAPE = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
CONTEXT, ROWS = 512, 8


def new_trainee() -> Trainee:
    model = Qwen2(SHAPE)
    init_weights(model, torch.Generator().manual_seed(0))
    weights = MasterWeights(model, torch.float32)
    return Trainee(PackedLoss(model), weights, AdamWConfig(lr=1e-4).build(weights.masters))


def step(trainee: Trainee) -> float:
    """Seconds of a training step."""
    tokens = torch.randint(SHAPE.vocab_size, (ROWS * CONTEXT,))
    positions = torch.arange(CONTEXT).repeat(ROWS)
    batch = PackedBatch(tokens, tokens.roll(-1), positions, [CONTEXT] * ROWS)
    began = time.perf_counter()
    train_step(trainee, [batch], 1e-4, clip=1.0)
    return time.perf_counter() - began


def save(to: Checkpointer, trainee: Trainee, number: int) -> float:
    """Seconds until training may go on."""
    masters, optimizer = trainee.weights.masters, trainee.optimizer
    began = time.perf_counter()
    to.save(RunState(number), masters, optimizer, {}, LoopSettings(), SHAPE)
    return time.perf_counter() - began


def torch_save(path: Path, trainee: Trainee) -> float:
    """Seconds of torch's own file, flushed."""
    state = {"model": trainee.weights.masters, "optimizer": trainee.optimizer.state_dict()}
    began = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def measure(place: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by name, after a round to warm up."""
    trainee = new_trainee()
    at_once = Checkpointer(place / "at once", keep=1)
    later = Checkpointer(place / "later", keep=1, asynchronous=True)
    names = ("step", "step beside a save", "stall", "until written", "synchronous", "torch.save")
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        row = [step(trainee)]
        began = time.perf_counter()
        stall = save(later, trainee, number)
        row.append(step(trainee))
        later.wait()
        row += [stall, time.perf_counter() - began]
        row += [save(at_once, trainee, number), torch_save(place / "torch.pt", trainee)]
        if number:
            for name, seconds in zip(names, row, strict=True):
                figures[name].append(seconds)
    return figures


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--place", type=Path, help="where checkpoints go; default: temporary")
    chosen = parser.parse_args()
    set_threads(None)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=chosen.place) as place:
        seconds = measure(Path(place), chosen.rounds)
    middle = {name: median(values) for name, values in seconds.items()}
    figures = {
        "parameters": SHAPE.num_parameters(),
        "checkpoint_mb": round(SHAPE.num_parameters() * 12 / 1e6),
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "all_seconds": {n: [round(v, 4) for v in values] for n, values in seconds.items()},
        "stall_share_of_a_step": round(middle["stall"] / middle["step"], 4),
        "ratio": round(middle["torch.save"] / middle["stall"], 2),
    }
    finish("checkpoints", figures, chosen)


if __name__ == "__main__":
    main()

"""Training speed of the 47M miniature in bf16: our step against the Hugging Face Trainer's.

The peer is `transformers.Trainer` as it comes, on the CPU: eager, bf16=True, adamw_torch_fused,
clipping at 1.0, logging off. Both sides start from the same weights and see the same rows, each of
one document of 512 tokens, so that both compute the same; the loss curves are compared. They live
in two processes and take turns, one step each, both with OMP_WAIT_POLICY=passive: threads that spin
would slow whoever has its turn. On a machine that others use too, the ratio of processor times is
the steadier one.

    python benchmarks/training.py [--json] [--out FOLDER] [--rounds 5] [--steps 4]
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch, and so for the children.
from harness import finish, options, ratios, spread

ROWS, CONTEXT, LR = 8, 512, 3e-4
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
}


def rows_of_text(count: int) -> list[list[int]]:
    """`count` rows of token ids: the standard library's code, ids numbered as they appear."""
    from qwen2.tokenizer import Tokenizer

    tokenizer = Tokenizer.qwen2()
    numbers: dict[int, int] = {}
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for id_ in tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore")):
            ids.append(numbers.setdefault(id_, len(numbers) % SHAPE["vocab_size"]))
        if len(ids) >= count * CONTEXT:
            return [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(count)]
    raise SystemExit("the standard library is too small for so many steps")


def ours(connection: Connection, folder: str, rows: list[list[int]]) -> None:
    """Answer every message with (seconds, processor seconds, loss) of one of our steps."""
    import torch

    from qwen2.common.runtime import keep_freed_memory
    from qwen2.model.hub import load_model
    from qwen2.tokens.packing import PackedBatch
    from qwen2.train.loss import IGNORE
    from qwen2.train.optimizers import AdamWConfig
    from qwen2.train.packed_loss import PackedLoss
    from qwen2.train.precision import MasterWeights
    from qwen2.train.step import Trainee, train_step

    keep_freed_memory()
    model = load_model(folder, dtype="fp32")
    weights = MasterWeights(model, torch.bfloat16)
    recipe = AdamWConfig(lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    trainee = Trainee(PackedLoss(model), weights, recipe.build(weights.masters))
    for first in range(0, len(rows), ROWS):
        connection.recv()
        clock = Clock()
        tokens = torch.tensor(rows[first : first + ROWS])
        targets = torch.cat((tokens[:, 1:], torch.full((ROWS, 1), IGNORE)), dim=1)
        positions = torch.arange(CONTEXT).repeat(ROWS)
        batch = PackedBatch(tokens.flatten(), targets.flatten(), positions, [CONTEXT] * ROWS)
        result = train_step(trainee, [batch], LR, clip=1.0)
        connection.send((*clock.read(), result.loss))
    connection.send(peak_memory())


def peer(connection: Connection, folder: str, rows: list[list[int]]) -> None:
    """Answer every message as `ours` does, with a step of the Hugging Face Trainer."""
    import torch
    import transformers

    class TakeTurns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            connection.recv()
            self.clock = Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            connection.send((*self.clock.read(), losses[-1].item()))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=out,
                use_cpu=True,
                bf16=True,
                per_device_train_batch_size=ROWS,
                learning_rate=LR,
                lr_scheduler_type="constant",
                max_steps=len(rows) // ROWS,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            # The first label is never predicted; -100 keeps it out of the Trainer's token count.
            train_dataset=[{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows],
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # it would print beside our JSON
        trainer._get_train_sampler = lambda dataset=None: torch.utils.data.SequentialSampler(rows)
        losses: list[Any] = []
        step = trainer.training_step
        trainer.training_step = lambda *a, **k: losses.append(step(*a, **k)) or losses[-1]
        trainer.train()
    connection.send(peak_memory())


class Clock:
    """Seconds since it was made: on the wall, and of this process's threads on processors."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Alternate single steps of both sides; a round's figure is the mean of its `steps`."""
    from qwen2.model.config import ModelConfig

    rows = rows_of_text((1 + rounds * steps) * ROWS)
    config = ModelConfig(**SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        write_model(config, folder)
        sides = {side.__name__: start(side, folder, rows) for side in (ours, peer)}
        for connection in sides.values():  # a step to warm up
            turn(connection)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
            for _ in range(steps):
                for name, connection in sides.items():
                    taken[name].append(turn(connection))
            for name, turns in taken.items():
                seconds[name].append(statistics.mean(t[0] for t in turns))
                cpu_seconds[name].append(statistics.mean(t[1] for t in turns))
                losses[name] += [t[2] for t in turns]
        memory = {name: connection.recv() for name, connection in sides.items()}
    tokens = ROWS * CONTEXT
    apart = [abs(o - p) for o, p in zip(losses["ours"], losses["peer"], strict=True)]
    return {
        "parameters": config.num_parameters(),
        "tokens_per_second": spread([tokens / s for s in seconds["ours"]]),
        "peer_tokens_per_second": spread([tokens / s for s in seconds["peer"]]),
        "training_ratio": ratios(seconds["peer"], seconds["ours"]),
        "training_cpu_time_ratio": ratios(cpu_seconds["peer"], cpu_seconds["ours"]),
        "loss_steps": len(apart),
        "loss_max_difference": max(apart),
        "loss_first_last": [losses["ours"][0], losses["ours"][-1]],
        "peak_rss_bytes": memory["ours"],
        "peer_peak_rss_bytes": memory["peer"],
    }


def write_model(config: Any, folder: str) -> None:
    """A model with first weights in the Hugging Face layout, for both sides to load."""
    import torch

    from qwen2.model.decoder import Qwen2, init_weights
    from qwen2.model.hub import save
    from qwen2.tokenizer import Tokenizer

    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    save(model, Tokenizer.qwen2(), Path(folder), overwrite=True)


def start(side: Callable[..., None], folder: str, rows: list[list[int]]) -> Connection:
    """Run `side` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=side, args=(there, folder, rows), daemon=True).start()
    return here


def turn(connection: Connection) -> tuple[float, float, float]:
    """Let a side take one step: (seconds, processor seconds, loss)."""
    connection.send("go")
    result: tuple[float, float, float] = connection.recv()
    return result


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4, help="steps of a run")
    chosen = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    finish("training", measure(chosen.rounds, chosen.steps), chosen)


if __name__ == "__main__":
    main()

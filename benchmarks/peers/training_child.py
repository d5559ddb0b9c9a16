"""One trainer, a step at a time: side, model folder, file of rows, dtype, rows of a step.

    ours, ours-compiled           train_step of this package; with `compile: true`
    trainer, trainer-compiled     transformers.Trainer as it comes; with torch_compile=True
    litgpt                        the step of litgpt's `pretrain`, eager: as it is written there,
                                  with Lightning's Fabric and litgpt's own model of the same shape

`dtype` is fp32, bf16 (fp32 master weights on all sides) or, of ours alone, fp32-rounded (`matmul:
rounded`). AdamW of one learning rate, clipping at 1.0. All but litgpt begin with the weights in the
folder. A step is answered with seconds, processor seconds and the loss.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Threads that spin would slow whoever has its turn.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from child import answer

LR = 3e-4
Batch = list[list[int]]
Batches = list[Batch]
Step = Callable[[Batch], float]


def load(side: str, folder: str, rows: str, dtype: str, count: str) -> Mapping[str, Any]:
    """The calls: version, step, memory, and for ours the peak of products."""
    import torch

    text, size = json.loads(Path(rows).read_text()), int(count)
    whole = len(text) - len(text) % size
    every = [text[first : first + size] for first in range(0, whole, size)]
    batches = itertools.cycle(every)
    name, _, mode = side.partition("-")
    make = {"ours": _ours, "trainer": _trainer, "litgpt": _litgpt}[name]
    take, peak = make(folder, dtype, mode == "compiled", every)

    def step() -> list[float]:
        batch = next(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = take(batch)
        return [time.perf_counter() - wall, time.process_time() - cpu, loss]

    return {
        "version": lambda: f"torch {torch.__version__}",
        "step": step,
        "memory": _peak_memory,
        "matmul_peak": peak,
    }


def _ours(folder: str, dtype: str, compile_: bool, _: Batches) -> tuple[Step, Callable[[], float]]:
    import torch

    from qwen2.common.runtime import fp32_products, keep_freed_memory, parse_dtype
    from qwen2.model.hub import load_model
    from qwen2.tokens.packing import PackedBatch
    from qwen2.train.compiling import compiled
    from qwen2.train.flops import measure_matmul_peak
    from qwen2.train.loss import IGNORE
    from qwen2.train.optimizers import AdamWConfig
    from qwen2.train.packed_loss import PackedLoss
    from qwen2.train.precision import MasterWeights
    from qwen2.train.step import Trainee, train_step

    keep_freed_memory()
    cpu, number = torch.device("cpu"), parse_dtype(dtype.partition("-")[0])
    modes = ExitStack()  # until the process ends
    modes.enter_context(fp32_products(dtype.endswith("-rounded"), cpu))
    modes.enter_context(compiled(compile_, cpu))
    model = load_model(folder, dtype="fp32")
    weights = MasterWeights(model, number)
    recipe = AdamWConfig(lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    trainee = Trainee(PackedLoss(model), weights, recipe.build(weights.masters))

    def step(rows: Batch) -> float:
        tokens = torch.tensor(rows)
        targets = torch.cat((tokens[:, 1:], torch.full((len(rows), 1), IGNORE)), dim=1)
        lengths = [len(row) for row in rows]
        positions = torch.arange(lengths[0]).repeat(len(rows))
        batch = PackedBatch(tokens.flatten(), targets.flatten(), positions, lengths)
        return train_step(trainee, [batch], LR, clip=1.0).loss

    step.modes = modes  # type: ignore[attr-defined]  # they end when this does
    return step, lambda: measure_matmul_peak(number, cpu)


def _trainer(folder: str, dtype: str, compile_: bool, batches: Batches) -> tuple[Step, Any]:
    """Its loop runs in a thread of its own and waits before each step.

    It reads a batch ahead, so it has the same batches from the beginning, in the same order.
    """
    import torch
    import transformers

    asked: queue.Queue[None] = queue.Queue()
    done: queue.Queue[float | BaseException] = queue.Queue()

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, list[int]]]:
            for row in itertools.chain.from_iterable(itertools.cycle(batches)):
                # The first label is never predicted; -100 keeps it out of the token count.
                yield {"input_ids": row, "labels": [-100, *row[1:]]}

    class TakeTurns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            asked.get()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.put(losses.pop().item())

    out = tempfile.mkdtemp()
    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=transformers.TrainingArguments(
            output_dir=out, use_cpu=True, bf16=dtype == "bf16", torch_compile=compile_,
            per_device_train_batch_size=len(batches[0]), learning_rate=LR,
            lr_scheduler_type="constant",
            max_steps=10**6, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, accelerator_config={"dispatch_batches": False},
        ),
        train_dataset=Rows(),
        callbacks=[TakeTurns()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    losses: list[Any] = []
    inner = trainer.training_step
    trainer.training_step = lambda *a, **k: losses.append(inner(*a, **k)) or losses[-1]

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()

    def step(_: Batch) -> float:
        asked.put(None)
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    return step, lambda: 0.0


def _litgpt(folder: str, dtype: str, compile_: bool, _: Batches) -> tuple[Step, Any]:
    import lightning as L
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    assert not compile_
    shape = json.loads((Path(folder) / "config.json").read_text())
    config = Config(
        block_size=shape["max_position_embeddings"], padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"], n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, attn_bias=True, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[dtype]
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(0)
    model = GPT(config)
    if shape["tie_word_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)

    def step(rows: Batch) -> float:
        data = torch.tensor(rows)
        # litgpt's rows have a token more than they give to the model
        targets = torch.cat((data[:, 1:], torch.full((len(rows), 1), -100)), dim=1)
        loss = chunked_cross_entropy(model(data), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, lambda: 0.0


def _peak_memory() -> int:
    """Peak resident bytes of this process; getrusage would begin with the peak of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    answer(load)

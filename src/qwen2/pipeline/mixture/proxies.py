"""Training proxies: many small runs side by side, each a durable file when it is finished.

A run depends on its job and the text alone: one thread, fixed seeds. So a killed experiment loses
the runs under way and nothing else, and begun again gives the same figures. All proxies of a fit
have the same first weights and the same order of text, so that they differ by their mixture alone.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen2.common.files import durable_write
from qwen2.common.progress import Progress
from qwen2.common.runtime import parse_dtype
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.pipeline.mixture.data import SMALL_HELD_OUT, SMALL_TRAIN
from qwen2.pipeline.mixture.recipe import ProxyConfig
from qwen2.pipeline.stages import Stopped
from qwen2.pipeline.workers import open_workers
from qwen2.tokens.held_out import held_out_batches
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.remap import END_OF_TEXT
from qwen2.tokens.shards import Shards
from qwen2.tokens.weighted import Subset, WeightedLoader, by_kind
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.schedules import cosine
from qwen2.train.step import Trainee, train_step

WARMUP, FLOOR = 0.1, 0.05
EVALUATED_ROWS = 16  # in a pass


@dataclass(frozen=True)
class Job:
    """One proxy: what it reads, and what its file is called."""

    name: str
    proxy: ProxyConfig
    seed: int
    weights: dict[str, float]
    """Share of rows of each kind."""
    documents: str | None = None
    """A .npy file with the documents of the small shards that it may read; None: all."""

    def identity(self) -> dict[str, Any]:
        """What a finished file must agree with."""
        return {
            "proxy": self.proxy.model_dump(mode="json"),
            "seed": self.seed,
            "weights": self.weights,
            "documents": self.documents and Path(self.documents).name,
        }


def run_jobs(
    title: str, jobs: Sequence[Job], text: Path, out: Path, workers: int
) -> list[dict[str, float]]:
    """Bits per byte by kind of each job's proxy, in the order of `jobs`.

    What has its file in `out` is not run again. `text` is the folder with the small shards.

    Raises:
        Stopped: a signal came; the proxies under way have been finished, and are kept.
    """
    todo = [job for job in jobs if not _is_done(out, job)]
    done = len(jobs) - len(todo)
    with open_workers(workers) as pool, Progress(title, len(jobs), start=done) as progress:
        for _ in pool.map(functools.partial(_work, text, out), todo):
            done += 1
            progress.update(done)
        if (name := pool.stopped()) and done < len(jobs):
            raise Stopped(
                f"{name}: {done} of {len(jobs)} proxies are kept; run the same command again"
            )
    return [_result(out, job)["bits_per_byte"] for job in jobs]


def train_proxy(job: Job, text: ProxyText) -> dict[str, float]:
    """Train the proxy of `job` from random weights; its bits per byte by kind."""
    proxy = job.proxy
    model = Qwen2(proxy.model)
    init_weights(model, torch.Generator().manual_seed(job.seed))
    weights = MasterWeights(model, parse_dtype(proxy.dtype))
    trainee = Trainee(PackedLoss(model), weights, AdamWConfig(lr=proxy.lr).build(weights.masters))
    loader = text.loader(job)
    warmup = max(1, round(WARMUP * proxy.steps))
    for step in range(proxy.steps):
        lr = proxy.lr * cosine(step, proxy.steps, warmup, FLOOR)
        train_step(trainee, [next(loader)], lr, 1.0)
    return text.bits_per_byte(model.eval(), proxy.context)


class ProxyText:
    """The small shards of an experiment, opened once in each process."""

    def __init__(self, folder: Path) -> None:
        self.train, self.held_out = Shards(folder / SMALL_TRAIN), Shards(folder / SMALL_HELD_OUT)
        self._bytes = {
            kind: values["held_out_bytes"]
            for kind, values in json.loads((folder / "stages/small.json").read_text())[
                "kinds"
            ].items()
        }

    def loader(self, job: Job) -> PackedLoader:
        """The batches of `job`."""
        sources = by_kind(self.train)
        if job.documents is not None:
            allowed = np.load(job.documents)
            kinds = self.train.kinds
            sources = {
                kind: Subset(self.train, allowed[kinds[allowed] == index], Path(job.documents).stem)
                for index, kind in enumerate(self.train.index.kinds)
            }
        return WeightedLoader(sources, job.weights, job.proxy.context, job.proxy.rows, job.seed)

    @torch.no_grad()
    def bits_per_byte(self, model: Qwen2, context: int) -> dict[str, float]:
        """Of the held-out text of each kind; the ends of documents, which have no bytes, do not
        count."""
        return {
            kind: sum(
                PackedLoss(model)(batch, 1).item()
                for batch in held_out_batches(source, END_OF_TEXT, context, EVALUATED_ROWS)
            )
            / math.log(2)
            / self._bytes[kind]
            for kind, source in by_kind(self.held_out).items()
        }


def _path(out: Path, job: Job) -> Path:
    return out / f"{job.name}.json"


def _result(out: Path, job: Job) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(_path(out, job).read_text())
    return values


def _is_done(out: Path, job: Job) -> bool:
    """Whether its file is there, and of this very job."""
    if not _path(out, job).exists():
        return False
    values = _result(out, job)
    return all(values[key] == value for key, value in job.identity().items())


def _keep(out: Path, job: Job, bits: dict[str, float]) -> None:
    values = job.identity() | {"bits_per_byte": bits}
    durable_write(_path(out, job), json.dumps(values, indent=1).encode())


@functools.lru_cache(maxsize=1)  # once a process
def _opened(text: Path) -> ProxyText:
    return ProxyText(text)


def _work(text: Path, out: Path, job: Job) -> None:
    """Train the proxy of `job` and write its file."""
    with _one_thread():
        _keep(out, job, train_proxy(job, _opened(text)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, wherever the work is done."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_documents(path: Path, numbers: NDArray[np.int64]) -> str:
    """Write the documents that some jobs may read; their `Job.documents`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, numbers)
    return str(path)

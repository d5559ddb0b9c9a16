"""The quality head: a small classifier of what a frozen Qwen2 model makes of a document.

Report section 3.1: Qwen models themselves filter out low-quality data. The head reads the mean of
the hidden states after the final norm. It learns from labels, which may be soft: a judge's scores
over 5 (so it is distilled from the judge). The model is not trained, so its documents are read
once, and the head is fitted to their means in seconds.

A head is worth nothing on another model: it names its model's fingerprint, and is refused there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, sha256_of
from qwen2.corpus.quality.config import Extent
from qwen2.corpus.quality.files import read_json, read_tensors
from qwen2.model.hub import locate

CONFIG, WEIGHTS = "config.json", "head.safetensors"
STEPS = 200  # of L-BFGS, at most


class HeadConfig(Config):
    """The shape of a head and how it is trained."""

    hidden: int = Field(default=0, ge=0)
    """Width of a hidden layer (GELU); 0: a linear head."""
    l2: PositiveFloat = 0.01
    """Half of it times the sum of squared weights is added to the mean loss."""
    seed: int = 0


class HeadIdentity(Config):
    """What a head was trained on, beside its weights."""

    head: HeadConfig
    extent: Extent
    hidden_size: PositiveInt
    fingerprint: str
    """Of the model; see `fingerprint`."""


class Head(nn.Module):
    """Means of hidden states (n, C) -> logits (n,)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.up = nn.Linear(width, config.hidden) if config.hidden else nn.Identity()
        self.out = nn.Linear(config.hidden or width, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled (n, C) in fp32 -> (n,)."""
        x = self.up((pooled - self.mean) / self.scale)
        return self.out(F.gelu(x) if self.config.hidden else x)[:, 0]

    @torch.inference_mode()
    def scores(self, pooled: NDArray[np.float32]) -> NDArray[np.float64]:
        """How good documents with means (n, C) are, (n,) from 0 to 1."""
        return self(torch.from_numpy(pooled)).double().sigmoid().numpy()

    @classmethod
    def fit(
        cls,
        pooled: NDArray[np.float32],
        targets: NDArray[np.float64],
        importance: NDArray[np.float64],
        config: HeadConfig,
    ) -> Self:
        """Fit a head by L-BFGS on all documents at once.

        Args:
            pooled: (documents, C).
            targets: (documents,) from 0, bad, to 1, good.
            importance: (documents,) how much each counts, 1 on average.
        """
        x = torch.from_numpy(pooled)
        goal, weight = torch.from_numpy(targets).float(), torch.from_numpy(importance).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = cls(x.shape[1], config)
        head.mean.copy_(x.mean(0))
        head.scale.copy_(x.std(0).clamp_min(1e-6))
        matrices = [p for p in head.parameters() if p.ndim > 1]
        if not config.hidden:  # the one minimum is found from anywhere
            nn.init.zeros_(head.out.weight)
        search = torch.optim.LBFGS(head.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            fit = F.binary_cross_entropy_with_logits(head(x), goal, weight)
            total = fit + config.l2 / 2 * torch.stack([p.square().sum() for p in matrices]).sum()
            total.backward()
            return total

        search.step(loss)
        return head.eval().requires_grad_(False)

    def save(self, folder: Path, extent: Extent, model: str) -> None:
        """Write head.safetensors, and config.json with what it was trained on, durably.

        `model` is the fingerprint of the base model, `extent` how much it read of a document.
        """
        identity = HeadIdentity(
            head=self.config, extent=extent, hidden_size=len(self.mean), fingerprint=model
        )
        with durable_folder(folder) as partial:
            (partial / CONFIG).write_text(identity.model_dump_json(indent=1) + "\n")
            save_file(self.state_dict(), partial / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> tuple[Self, HeadIdentity]:
        """The head in `folder`, and what it was trained on.

        Raises:
            UserError: it is missing, damaged, or its files are not of one head.
        """
        identity = HeadIdentity.parse(read_json(folder / CONFIG), str(folder / CONFIG))
        head = cls(identity.hidden_size, identity.head)
        shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
        tensors = read_tensors(folder / WEIGHTS, shapes)
        head.load_state_dict({name: torch.from_numpy(tensors[name]) for name in shapes})
        return head.eval().requires_grad_(False), identity


def fingerprint(model: str) -> str:
    """sha256 of a checkpoint's files: weights, configuration and tokenizer.

    Raises:
        UserError: there is no such checkpoint.
    """
    path = locate(model)
    if path.is_file():
        return sha256_of(path)
    kinds = (".safetensors", ".json", ".txt")
    files = sorted(p for p in path.iterdir() if p.suffix in kinds and p.name != "manifest.json")
    whole = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(whole.encode()).hexdigest()


def check_model(folder: Path, identity: HeadIdentity, model: str) -> None:
    """Refuse a model that the head in `folder` was not trained on.

    Raises:
        UserError: `model` is another one.
    """
    if fingerprint(model) != identity.fingerprint:
        raise UserError(
            f"{folder}: trained on another model than {model} (sha256 "
            f"{identity.fingerprint[:12]}); name that one, or train the head again"
        )

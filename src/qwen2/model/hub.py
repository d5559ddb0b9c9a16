"""MODEL, as every command takes it: a folder in HF layout, a GGUF file or a hub name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.runtime import parse_dtype, pick_device
from qwen2.model import hf_folder
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.extend import DEFAULT, extend_context
from qwen2.model.gguf_file import GGUFFile
from qwen2.model.hf_folder import save
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import NORM, build

if TYPE_CHECKING:
    from qwen2.model.calibrate import Calibration
    from qwen2.tokenizer import Tokenizer

__all__ = ["Checkpoint", "load", "load_config", "load_model", "locate", "open_checkpoint", "save"]

_WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read, and no weights yet."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]  # by published name
    dtype: torch.dtype  # its own; bf16, the published type, for GGUF
    read_tokenizer: Callable[[], Tokenizer]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: it is missing or broken, or has ids beyond the embedding.
        """
        tokenizer = self.read_tokenizer()
        if tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{self.path}: token ids up to {tokenizer.vocab_size - 1}, but "
                f"{self.config.vocab_size} embeddings; the tokenizer is another model's"
            )
        return tokenizer

    def choose_dtype(self, name: str) -> torch.dtype:
        """The number type called `name`; its own for `auto`."""
        return self.dtype if name == "auto" else parse_dtype(name)

    def model(
        self,
        dtype: str,
        device: str,
        config: ModelConfig | None = None,
        *,
        quantize: str | None = None,
        calibration: Calibration | None = None,
        joined: bool = False,
    ) -> Qwen2:
        """The module with its parameters, by its own configuration or `config`; see `load`.

        `calibration` is for int4, see calibrate.py.
        """
        chosen, place = self.choose_dtype(dtype), pick_device(device)
        config = config or self.config
        if quantize is None or (config.quantisation and quantize == config.quantisation.method):
            return build(config, self.tensors, self.path, chosen, place, joined)
        from qwen2.model.quantise import build_quantised

        return build_quantised(
            config, self.tensors, self.path, chosen, place, quantize, calibration
        )


def load(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    extend: str = DEFAULT,
    quantize: str | None = None,
    inference: bool = False,
) -> tuple[Qwen2, Tokenizer]:
    """The model and tokenizer of `name`: a folder in HF layout, a .gguf file or a hub name.

    `dtype` is fp32, bf16 or fp16; `auto` is the checkpoint's own type for safetensors, and bf16,
    the published type, for GGUF. Parameters already in that type stay mapped from the file, copy
    on write. `context` makes the model ready for so many tokens; beyond the length that it was
    trained on `extend` says by what (see extend.py).

    `quantize` is int8 or int4, for inference (see quantise.py): weights are rounded while they are
    read. `inference` lays weights of one product end to end at once, as `fuse_projections` does
    later, but without a second copy in the pages of the mapping.

    Raises:
        UserError: nothing of that name, or a checkpoint that is broken or not of this model.
    """
    checkpoint = open_checkpoint(name)
    with ThreadPoolExecutor(1) as other:  # the one computes while the other reads
        reading = other.submit(checkpoint.tokenizer)
        config = checkpoint.config
        if context is not None:
            config = extend_context(config, context, extend)
        model = checkpoint.model(dtype, device, config, quantize=quantize, joined=inference)
        return model, reading.result()


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    inference: bool = False,
) -> Qwen2:
    """The model alone; see `load`."""
    return open_checkpoint(name).model(dtype, device, quantize=quantize, joined=inference)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Read the headers of `name` alone; see `load`."""
    path = locate(name)
    if path.is_dir():
        config, tensors = hf_folder.read_config(path), hf_folder.stored_tensors(path)
        # Not the embedding's: that may be quantised.
        dtype = tensors[NORM].dtype if NORM in tensors else torch.bfloat16
        return Checkpoint(path, config, tensors, dtype, lambda: _tokenizer_of(path))
    file = GGUFFile(path)
    return Checkpoint(path, file.config(), file.tensors, torch.bfloat16, file.tokenizer)


def load_config(name: str | Path) -> ModelConfig:
    """The configuration alone; see `load`. A hub name is fetched whole."""
    path = locate(name)
    return hf_folder.read_config(path) if path.is_dir() else GGUFFile(path).config()


def locate(name: str | Path) -> Path:
    """The local folder or file of MODEL; a hub name is fetched, unless it is in the cache.

    Raises:
        UserError: there is no such place, and no such name on the hub or no way to it.
    """
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) or path.suffix == ".gguf":
        raise UserError(f"{name}: no such folder or file, and not a hub name like Qwen/Qwen2-0.5B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_WANTED))
    except Exception as error:  # the library's and its transport's errors have no common base
        raise UserError(
            f"{name}: no such folder here, and not to be had from the hub: {one_line(error)}"
        ) from error


def _tokenizer_of(folder: Path) -> Tokenizer:
    from qwen2.tokenizer import Tokenizer

    return Tokenizer.load(folder)

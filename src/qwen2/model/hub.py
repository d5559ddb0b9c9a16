"""MODEL, as every command takes it: a folder in HF layout, a GGUF file or a hub name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
from qwen2.model.weights import EMBEDDING, StoredTensor, build

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer

__all__ = ["load", "load_config", "load_model", "locate", "save"]

_WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json"]


def load(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    extend: str = DEFAULT,
) -> tuple[Qwen2, Tokenizer]:
    """The model and tokenizer of `name`: a folder in HF layout, a .gguf file or a hub name.

    `dtype` is fp32, bf16 or fp16; `auto` is the checkpoint's own type for safetensors, and bf16,
    the published type, for GGUF. Parameters already in that type stay mapped from the file, copy
    on write. `context` makes the model ready for so many tokens; beyond the length that it was
    trained on `extend` says by what (see extend.py).

    Raises:
        UserError: nothing of that name, or a checkpoint that is broken or not of this model.
    """
    from qwen2.tokenizer import Tokenizer

    path = locate(name)
    source = _open(path)
    read = source.tokenizer if isinstance(source, GGUFFile) else lambda: Tokenizer.load(path)
    with ThreadPoolExecutor(1) as other:  # the one computes while the other reads
        reading = other.submit(read)
        config = _config(source)
        if context is not None:
            config = extend_context(config, context, extend)
        model = _build(source, config, dtype, device)
        tokenizer = reading.result()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: token ids up to {tokenizer.vocab_size - 1}, but {model.config.vocab_size} "
            "embeddings; the tokenizer is another model's"
        )
    return model, tokenizer


def load_model(name: str | Path, *, dtype: str = "auto", device: str = "auto") -> Qwen2:
    """The model alone; see `load`."""
    source = _open(locate(name))
    return _build(source, _config(source), dtype, device)


def load_config(name: str | Path) -> ModelConfig:
    """The configuration alone; see `load`. A hub name is fetched whole."""
    return _config(_open(locate(name)))


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


def _open(path: Path) -> Path | GGUFFile:
    """A folder as it is, a file by its reader."""
    return path if path.is_dir() else GGUFFile(path)


def _config(source: Path | GGUFFile) -> ModelConfig:
    return source.config() if isinstance(source, GGUFFile) else hf_folder.read_config(source)


def _build(source: Path | GGUFFile, config: ModelConfig, dtype: str, device: str) -> Qwen2:
    """The model of `config` with the weights of a folder or file."""
    tensors: Mapping[str, StoredTensor]
    if isinstance(source, Path):
        where, tensors = source, hf_folder.stored_tensors(source)
        own = tensors[EMBEDDING].dtype if EMBEDDING in tensors else None
    else:
        where, tensors, own = source.path, source.tensors, None
    chosen = (own or torch.bfloat16) if dtype == "auto" else parse_dtype(dtype)
    return build(config, tensors, where, chosen, pick_device(device))

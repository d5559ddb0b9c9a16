"""MODEL, as every command takes it: a folder in HF layout, a GGUF file or a hub name."""

from __future__ import annotations

import re
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
from qwen2.model.gguf_file import GGUFFile
from qwen2.model.hf_folder import save
from qwen2.model.weights import EMBEDDING, build

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer

__all__ = ["load", "load_config", "load_model", "locate", "save"]

_WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.json"]


def load(name: str | Path, *, dtype: str = "auto", device: str = "auto") -> tuple[Qwen2, Tokenizer]:
    """The model and tokenizer of `name`: a folder in HF layout, a .gguf file or a hub name.

    `dtype` is fp32, bf16 or fp16; `auto` is the checkpoint's own type for safetensors, and bf16,
    the published type, for GGUF. Parameters already in that type stay mapped from the file, copy
    on write.

    Raises:
        UserError: nothing of that name, or a checkpoint that is broken or not of this model.
    """
    from qwen2.tokenizer import Tokenizer

    path = locate(name)
    file = None if path.is_dir() else GGUFFile(path)
    with ThreadPoolExecutor(1) as other:  # the one computes while the other reads
        reading = other.submit(file.tokenizer if file else lambda: Tokenizer.load(path))
        model = _load_gguf(file, dtype, device) if file else _load_folder(path, dtype, device)
        tokenizer = reading.result()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: token ids up to {tokenizer.vocab_size - 1}, but {model.config.vocab_size} "
            "embeddings; the tokenizer is another model's"
        )
    return model, tokenizer


def load_model(name: str | Path, *, dtype: str = "auto", device: str = "auto") -> Qwen2:
    """The model alone; see `load`."""
    path = locate(name)
    if path.is_dir():
        return _load_folder(path, dtype, device)
    return _load_gguf(GGUFFile(path), dtype, device)


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


def _load_folder(folder: Path, dtype: str, device: str) -> Qwen2:
    config = hf_folder.read_config(folder)
    tensors = hf_folder.stored_tensors(folder)
    own = tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.bfloat16
    return build(config, tensors, folder, _choose(dtype, own), pick_device(device))


def _load_gguf(file: GGUFFile, dtype: str, device: str) -> Qwen2:
    chosen = _choose(dtype, torch.bfloat16)
    return build(file.config(), file.tensors, file.path, chosen, pick_device(device))


def _choose(name: str, own: torch.dtype) -> torch.dtype:
    return own if name == "auto" else parse_dtype(name)

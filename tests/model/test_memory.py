"""Loading and upcycling need little memory: measured, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from qwen2.model import native
from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hub import load_config, load_model, save
from qwen2.model.quantise import quantise_model
from qwen2.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

# Loads a small model first, so that only the weights of the other one count.
CHILD = """
import json, pathlib, sys
from qwen2.model.hub import load_model

def kilobytes(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, path, dtype, options = sys.argv[1:]
options = json.loads(options)
load_model(small, dtype=dtype, **options)
before = kilobytes("VmRSS:")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = load_model(path, dtype=dtype, **options)
loaded = kilobytes("VmHWM:") - before
weights = sum(p.nbytes for p in model.parameters()) / 1024
if options.get("inference"):
    model.fuse_projections()
for p in model.parameters():
    p.detach().flatten()[:: 4096 // p.element_size()].clone()  # a number of every page
touched = kilobytes("VmHWM:") - before
print(json.dumps({"loaded": loaded / weights, "touched": touched / weights}))
"""


def peaks(small: Path, path: Path, dtype: str, **options: object) -> dict[str, float]:
    """Peak resident memory over the loaded weights: after loading, and after use of all of them.

    `options` are more of `load_model`; with `inference` projections are joined before use.
    """
    command = [sys.executable, "-c", CHILD, str(small), str(path), dtype, json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


@pytest.fixture(scope="module")
def middling() -> ModelConfig:
    """82 million parameters, 164 MB in bf16: what conversion holds is little beside them."""
    return ModelConfig(
        vocab_size=32_768,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    middling: ModelConfig,
    random_model: Callable[..., Qwen2],
    tokenizer: Tokenizer,
) -> Path:
    """A middling and a small checkpoint in bf16."""
    folder = tmp_path_factory.mktemp("memory")
    small = middling.model_copy(update={"num_hidden_layers": 1, "vocab_size": 320})
    for name, config in {"middling": middling, "small": small}.items():
        save(random_model(config, torch.bfloat16), tokenizer, folder / name)
    return folder


def test_mapped_weights_cost_nothing_until_used(folder: Path) -> None:
    peak = peaks(folder / "small", folder / "middling", "bf16")
    assert peak["loaded"] < 0.15
    assert 0.9 < peak["touched"] < 1.15


def test_weights_for_inference_are_in_memory_once(folder: Path) -> None:
    """Those that are joined are not mapped besides."""
    peak = peaks(folder / "small", folder / "middling", "bf16", inference=True)
    assert 0.9 < peak["touched"] < 1.15


DECODING = """
import pathlib, re, sys, torch
from qwen2.model.cache import KVStore
from qwen2.model.decode_step import DecodeStep
from qwen2.model.hub import load_model

model = load_model(sys.argv[1], inference=True)
step = DecodeStep(model, KVStore(model.config, 32, model.dtype, model.device), 16)
step([5, 7000], [0, 1], [2], [[0]], [1])
resident, of_file = 0, False
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        of_file = line.endswith(".safetensors")
    elif of_file and line.startswith("Rss:"):
        resident += 1024 * int(line.split()[1])
print(resident)
"""


@pytest.mark.skipif(native.why_not() is not None, reason="no native kernels here")
def test_an_embedding_stays_in_its_file(
    tmp_path: Path, folder: Path, middling: ModelConfig
) -> None:
    """Decoding reads the rows of its tokens alone, in int8 too."""
    path = tmp_path / "int8"
    save(
        quantise_model(load_model(folder / "middling"), "int8"),
        Tokenizer.load(folder / "middling"),
        path,
    )
    command = [sys.executable, "-c", DECODING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    embedding = middling.vocab_size * middling.hidden_size
    # What is joined is copied out of the file. The rest is read, the head among it.
    joined = sum(
        parameter.nbytes
        for name, parameter in load_model(path).named_parameters()
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    )
    read = (path / "model.safetensors").stat().st_size - joined - embedding
    # With each page that is read the kernel maps the 64 kB around it.
    assert 0.95 * read < int(done.stdout) < read + 0.7 * embedding


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantising_on_load_holds_the_result_and_little_more(folder: Path, method: str) -> None:
    # Two threads round. What glibc keeps for them is by chance up to a third of the result; holes
    # that the code leaves are there every time.
    for _ in range(3):
        peak = peaks(folder / "small", folder / "middling", "bf16", quantize=method)
        if peak["touched"] < 1.2:
            break
    assert 0.9 < peak["loaded"] <= peak["touched"] < 1.2


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_converted_weights_do_not_keep_their_source(folder: Path, dtype: str) -> None:
    peak = peaks(folder / "small", folder / "middling", dtype)
    assert 0.9 < peak["loaded"] <= peak["touched"] < 1.15


@pytest.mark.parametrize("type_", [Type.Q8_0, Type.F32], ids=lambda t: t.name)
def test_gguf_to_bf16(
    tmp_path: Path,
    middling: ModelConfig,
    write_gguf: Callable[..., None],
    type_: Type,
) -> None:
    small = middling.model_copy(update={"num_hidden_layers": 1, "vocab_size": 320})
    write_gguf(tmp_path / "middling.gguf", middling, type_)
    write_gguf(tmp_path / "small.gguf", small, type_)
    peak = peaks(tmp_path / "small.gguf", tmp_path / "middling.gguf", "bf16")
    assert 0.9 < peak["loaded"] <= peak["touched"] < 1.15


UPCYCLING = """
import json, pathlib, sys
from qwen2.model.upcycle import UpcycleConfig, upcycle

def kilobytes(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, path, out = sys.argv[1:]
upcycle(small, pathlib.Path(out) / "small", UpcycleConfig(experts=8))
before = kilobytes("VmRSS:")
pathlib.Path("/proc/self/clear_refs").write_text("5")
config = upcycle(path, pathlib.Path(out) / "mixture", UpcycleConfig(expert_size=304))
print(json.dumps({"peak": 1024 * (kilobytes("VmHWM:") - before)}))
"""


def test_upcycling_holds_one_layer(tmp_path: Path, folder: Path, middling: ModelConfig) -> None:
    command = [sys.executable, "-c", UPCYCLING, str(folder / "small"), str(folder / "middling")]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    peak = json.loads(result.stdout)["peak"]
    mixture = load_config(tmp_path / "mixture")
    written = sum(p.stat().st_size for p in (tmp_path / "mixture").glob("*.safetensors"))
    embedding = mixture.vocab_size * mixture.hidden_size
    layer = 2 * (mixture.num_parameters() - 2 * embedding) // mixture.num_hidden_layers
    dense_ffn = 2 * 3 * mixture.hidden_size * mixture.intermediate_size
    assert written > 5 * layer
    # A file of the output, of a layer at most; the dense FFN; what makes a tensor of it; and holes
    # in the heap as large as the embedding, when that follows smaller tensors.
    assert peak < 1.1 * layer + 2 * dense_ffn + 2 * embedding
    assert peak < 2 * middling.num_parameters() + layer


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_experts_are_stacked_without_keeping_their_source(
    tmp_path: Path,
    middling: ModelConfig,
    random_model: Callable[..., Qwen2],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """16 experts of 8 layers, a file of single matrices, and saving it in two shards."""
    moe = Mixture(
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
    )
    config = middling.model_copy(update={"moe": moe})
    small = config.model_copy(update={"num_hidden_layers": 1, "vocab_size": 320})
    for name, shape in {"middling": config, "small": small}.items():
        model = random_model(shape, torch.bfloat16)
        save(model, tokenizer, tmp_path / name, max_shard_bytes=10**8)
    peak = peaks(tmp_path / "small", tmp_path / "middling", dtype)
    assert peak["loaded"] <= peak["touched"] < 1.15

"""What storing weights in fewer bits costs: bytes, bits per byte, KL to bf16, equal first choices.

Text: beginnings of documents of this machine (see corpus/machine.py) that share nothing with those
that int4 was calibrated on, as many of each kind. KL(bf16 || quantised) is the mean over tokens, in
nats; top-1 is how often the likeliest token is that of bf16. GGUF files are read by this package,
into bf16; those that the export can write are made here, others are named by --gguf.

    python benchmarks/quantisation.py MODEL [--gguf Q4_K_M.gguf ...] [--only int8 ...] [--json]
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from harness import finish, options
from qwen2.common.progress import say
from qwen2.corpus.documents import Document
from qwen2.corpus.machine import SOURCES, local_documents
from qwen2.corpus.split import split_key
from qwen2.evaluate.score import LOGIT_ROWS
from qwen2.model.calibrate import calibration_documents, calibration_windows
from qwen2.model.decoder import Qwen2
from qwen2.model.gguf_write import TYPES, write_gguf
from qwen2.model.hub import load, load_model, open_checkpoint, save
from qwen2.model.quantise import quantise_model
from qwen2.tokenizer import Tokenizer

WINDOW = 1024  # tokens of a document


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("QWEN2_REAL_CHECKPOINT"))
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="further files of it")
    parser.add_argument("--only", nargs="*", help="names of the forms to measure")
    parser.add_argument("--documents", type=int, default=4, help="of each kind")
    chosen = parser.parse_args()
    if not chosen.model:
        parser.error("give a model, or set QWEN2_REAL_CHECKPOINT")
    chosen.rounds = 1  # figures do not vary
    torch.set_grad_enabled(False)
    finish("quantisation", measure(chosen), chosen)


def measure(chosen: Any) -> dict[str, Any]:
    """Every form of the model beside bf16."""
    model, tokenizer = load(chosen.model, dtype="bf16")
    truth = Truth(model, held_out(tokenizer, chosen.documents))
    say(f"{truth.tokens} tokens, {truth.bytes} bytes")
    with tempfile.TemporaryDirectory() as scratch:
        forms = forms_of(chosen.model, model, tokenizer, Path(scratch), chosen.gguf)
        forms = {n: form for n, form in forms.items() if not chosen.only or n in chosen.only}
        figures = {}
        for name, form in forms.items():
            size, quantised = form()
            figures[name] = {"file_bytes": size, **truth.compare(quantised)}
            say(f"{name}: {figures[name]}")
    return {"tokens": truth.tokens, "bytes": truth.bytes, "kinds": truth.kinds, "forms": figures}


Form = Callable[[], tuple[int, Qwen2]]


def forms_of(
    source: str, model: Qwen2, tokenizer: Tokenizer, scratch: Path, files: list[Path]
) -> dict[str, Form]:
    """Each form by its name: a function that makes it and gives the file's size and the model."""

    def folder(name: str, make: Callable[[], Qwen2]) -> tuple[int, Qwen2]:
        save(make(), tokenizer, scratch / name)
        size = sum(path.stat().st_size for path in (scratch / name).glob("*.safetensors"))
        return size, load_model(scratch / name)

    def exported(kind: str) -> tuple[int, Qwen2]:
        path = scratch / f"{kind}.gguf"
        write_gguf(path, open_checkpoint(source), kind)
        quantised = load_model(path, dtype="bf16")
        size = path.stat().st_size
        path.unlink()
        return size, quantised

    forms: dict[str, Form] = {
        "bf16": lambda: folder("bf16", lambda: model),
        "int8": lambda: folder("int8", lambda: load_model(source, quantize="int8")),
        "int4": lambda: folder(
            "int4", lambda: quantise_model(model, "int4", calibration_windows(tokenizer))
        ),
        "int4 without calibration": lambda: folder(
            "int4-plain", lambda: load_model(source, quantize="int4")
        ),
    }
    kinds = [kind for kind in TYPES if kind not in ("F32", "BF16")]
    forms |= {f"GGUF {kind}": lambda kind=kind: exported(kind) for kind in kinds}
    return forms | {
        f"GGUF {path.stem}": lambda path=path: (path.stat().st_size, load_model(path, dtype="bf16"))
        for path in files
    }


@dataclass(frozen=True)
class Window:
    """The beginning of a document."""

    kind: str
    ids: torch.Tensor  # (T,), the first ends the document before
    size: int  # bytes of ids[1:]


def held_out(tokenizer: Tokenizer, count: int) -> list[Window]:
    """Windows of `count` documents of each kind, none of them calibrated on."""
    seen = {split_key(document) for document in calibration_documents()}
    windows = []
    for kind in SOURCES:
        for number, document in enumerate(long_documents(local_documents(kind), seen)):
            if number == count:
                break
            ids = [tokenizer.end_of_text_id, *tokenizer.encode(document.text)][:WINDOW]
            size = len(tokenizer.decode_bytes(ids[1:]))
            windows.append(Window(kind, torch.tensor(ids), size))
    return windows


def long_documents(found: Iterator[Document], seen: set[str]) -> Iterator[Document]:
    """Documents of several windows, not of the groups `seen`."""
    for document in found:
        if document.size > 8 * WINDOW:
            key = split_key(document)
            if key not in seen:
                yield document


@dataclass
class Truth:
    """The bf16 model's states on the held-out text, from which its logits follow."""

    model: Qwen2
    windows: list[Window]
    states: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.states = [hidden(self.model, window.ids) for window in self.windows]
        self.tokens = sum(len(window.ids) - 1 for window in self.windows)
        self.bytes = sum(window.size for window in self.windows)
        self.kinds = sorted({window.kind for window in self.windows})

    def compare(self, other: Qwen2) -> dict[str, Any]:
        """Figures of another form of the model."""
        sums: Counter[str] = Counter()
        by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in self.kinds}
        for window, states in zip(self.windows, self.states, strict=True):
            theirs = hidden(other, window.ids)
            for start in range(0, len(window.ids) - 1, LOGIT_ROWS):
                rows = slice(start, min(start + LOGIT_ROWS, len(window.ids) - 1))
                goals = window.ids[1:][rows]
                true = self.model.lm_head(states[rows]).float().log_softmax(-1)
                found = other.lm_head(theirs[rows]).float().log_softmax(-1)
                part = {
                    "true_nats": float(F.nll_loss(true, goals, reduction="sum")),
                    "nats": float(F.nll_loss(found, goals, reduction="sum")),
                    "kl": float(F.kl_div(found, true, reduction="sum", log_target=True)),
                    "same": int((true.argmax(-1) == found.argmax(-1)).sum()),
                    "tokens": len(goals),
                }
                sums.update(part)
                by_kind[window.kind].update(part)
        return {
            "bits_per_byte": round(sums["nats"] / math.log(2) / self.bytes, 5),
            **summary(sums),
            "by_kind": {kind: summary(each) for kind, each in by_kind.items()},
        }


def summary(sums: Counter[str]) -> dict[str, float]:
    """Loss in bits per byte, relative to bf16; KL; equal first choices."""
    return {
        "loss_percent": round(100 * (sums["nats"] / sums["true_nats"] - 1), 3),
        "kl": round(sums["kl"] / sums["tokens"], 5),
        "top1": round(sums["same"] / sums["tokens"], 4),
    }


def hidden(model: Qwen2, ids: torch.Tensor) -> torch.Tensor:
    """States after the final norm (T, C)."""
    return model.model(ids, torch.arange(len(ids)), model.packed([len(ids)]))


if __name__ == "__main__":
    main()

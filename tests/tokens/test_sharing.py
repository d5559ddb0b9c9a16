"""Shards are mapped, not read; and any number of processes may read them."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from qwen2.tokens import Encoded, Origin, PackedLoader, Packing, Shards, write_shards

GIGABYTES = 3


def documents(count: int = 40) -> list[Encoded]:
    return [
        Encoded("ab"[n % 2], [n % 7] * (n % 13 + 1), Origin(f"id{n}", "here")) for n in range(count)
    ]


def write(folder: Path) -> Shards:
    write_shards(folder, documents(), vocab_size=10, end_of_text=9, tokenizer="t", shard_tokens=100)
    return Shards(folder)


def read(shards: Shards, rank: int, packing: Packing) -> list[Any]:
    """What one process reads of its batches, and where that comes from."""
    loader = PackedLoader(shards, 8, 2, rank=rank, world_size=2, packing=packing)
    pieces = loader.row_pieces(rank)
    origins = [shards.provenance(piece.document) for piece in pieces if piece.document >= 0]
    return [next(loader).targets.tolist() for _ in range(4)] + origins


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_forks_share_shards_that_were_read_before(tmp_path: Path, packing: Packing) -> None:
    """The maps are inherited, and the place in the file is no one's."""
    shards = write(tmp_path / "x")
    alone = [read(shards, rank, packing) for rank in (0, 1)]
    fork = multiprocessing.get_context("fork")
    answers: Any = fork.Queue()
    processes = [
        fork.Process(target=lambda rank=rank: answers.put((rank, read(shards, rank, packing))))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    together = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert [together[0], together[1]] == alone


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_loader_goes_to_a_new_process(tmp_path: Path, packing: Packing) -> None:
    shards = write(tmp_path / "x")
    loader = PackedLoader(shards, 8, 2, packing=packing)
    next(loader)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        batch = pool.submit(next, loader).result()
        origin = pool.submit(methodcaller("provenance", 5), shards).result()
    assert batch.targets.tolist() == next(loader).targets.tolist()
    assert origin == shards.provenance(5) == Origin("id5", "here")


SCRIPT = """
import resource, sys
from pathlib import Path
from qwen2.tokens import PackedLoader, Shards

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = resident()
shards = Shards(Path(sys.argv[1]))
loader = PackedLoader(shards, 4096, 4)
for _ in range(5):
    next(loader)
print(resident() - before, shards.tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_batch_does_not_read_the_whole_file(tmp_path: Path) -> None:
    """A sparse shard of 3 GB: what is resident grows by less than a fiftieth of it."""
    folder = tmp_path / "x"
    write_shards(folder, [("a", [1])], vocab_size=10, end_of_text=9, tokenizer="t")
    tokens = GIGABYTES * 1_000_000_000 // 2
    path = folder / "shard-00000.safetensors"
    metadata = json.loads(path.read_bytes()[8:].split(b"\0")[0].rsplit(b"}", 1)[0] + b"}")
    header = {
        "__metadata__": metadata["__metadata__"],
        "offsets": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
        "tokens": {"dtype": "U16", "shape": [tokens], "data_offsets": [16, 16 + 2 * tokens]},
        "kinds": {"dtype": "U16", "shape": [1], "data_offsets": [16 + 2 * tokens, 18 + 2 * tokens]},
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write((0).to_bytes(8, "little") + tokens.to_bytes(8, "little"))
        file.truncate(8 + len(text) + 18 + 2 * tokens)
    index = json.loads((folder / "shards.json").read_text())
    index["shards"][0]["tokens"] = tokens
    (folder / "shards.json").write_text(json.dumps(index))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, check=True
    )
    grown, seen = map(int, done.stdout.split())
    assert seen == tokens
    assert grown < GIGABYTES * 1e9 / 50

"""The loader: an endless, deterministic sequence of packed batches that can start anywhere.

Batch s of rank r takes places [(s·world + r)·rows, (s·world + r + 1)·rows) in the shuffled order of
the rows, so ranks share no row and leave none out. The only state is the next place, the same for
all ranks: resuming is a search, and a resumed run may have another number of rows or ranks. Each
epoch has every token exactly once; packed as a stream, its last tokens that do not fill a row are
carried into a row with the first of the next epoch.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.tokens.best_fit import BestFitRows
from qwen2.tokens.packing import PackedBatch, Piece, StreamRows, pack

Packing = Literal["stream", "best_fit"]
ROWS: dict[Packing, type[StreamRows] | type[BestFitRows]] = {
    "stream": StreamRows,
    "best_fit": BestFitRows,
}


class TokenSource(Protocol):
    """Documents of token ids, such as `Shards`."""

    fingerprint: str
    lengths: NDArray[np.int64]

    def document(self, number: int, /) -> NDArray[Any]: ...


class PackedLoader:
    """Endless iterator over `PackedBatch`es of `rows` x `context` tokens.

    Args:
        source: the documents; none may be empty.
        context: tokens of a row.
        rows: rows of a batch of this rank.
        seed: of the order of the documents, which differs from epoch to epoch.
        packing: `stream` (packing.py) cuts a document wherever a row ends; `best_fit` (best_fit.py)
            cuts hardly any that is shorter than the context, and pads up to 1 %.

    Raises:
        UserError: a size below 1, a negative seed or a rank outside the world.
    """

    def __init__(
        self,
        source: TokenSource,
        context: int,
        rows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "stream",
    ) -> None:
        for name, value in (("context", context), ("rows", rows), ("world size", world_size)):
            if value < 1:
                raise UserError(f"loader: {name} {value}; at least 1")
        if seed < 0:
            raise UserError(f"loader: seed {seed}; at least 0")
        if not 0 <= rank < world_size:
            raise UserError(f"loader: rank {rank} of {world_size}; from 0 to {world_size - 1}")
        self.source, self.context, self.rows, self.seed = source, context, rows, seed
        self.rank, self.world_size = rank, world_size
        self.epoch_tokens = int(source.lengths.sum())
        if not self.epoch_tokens:
            raise UserError("loader: a source without documents; give it no weight")
        self.row = 0
        """The next place in the order of rows that any rank takes."""
        self.packing = packing
        self._rows = ROWS[packing](source.lengths, context, seed)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        first = self.row + self.rank * self.rows
        pieces = [p for row in range(first, first + self.rows) for p in self.row_pieces(row)]
        batch = pack(pieces, self.source.document)
        self.row += self.rows * self.world_size
        return batch

    @property
    def epochs(self) -> float:
        """Epochs that all ranks together have taken, by tokens; padding counts too."""
        return self.row * self.context / self.epoch_tokens

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue; the same on all ranks."""
        return {"row": self.row, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: it was taken with other shards, context, seed or packing.
        """
        state = {"packing": "stream"} | state  # all that there was once
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"loader: the saved state has {name} {state.get(name)}, this run {value}; "
                    "resume with the same shards, context, seed and packing"
                )
        self.row = int(state["row"])

    def _identity(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "seed": self.seed,
            "packing": self.packing,
            "shards": self.source.fingerprint,
        }

    def row_pieces(self, place: int) -> list[Piece]:
        """The pieces of the row at `place`, which fill it."""
        return self._rows.pieces(place)

"""General compressors on the same bytes: what a model's bits per byte stand beside."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import pyarrow


def compressor_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the texts laid end to end, by `xz -9` and `zstd -19`.

    A compressor that sees all texts at once may use one for another, which a model that scores each
    alone may not; on the other hand the model has read its training text before.
    """
    data = "".join(texts).encode()
    sizes = {
        "xz -9": len(lzma.compress(data, preset=9)),
        "zstd -19": len(pyarrow.Codec("zstd", compression_level=19).compress(data, asbytes=True)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}

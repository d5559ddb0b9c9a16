"""Blocks of the KV cache: who has which, which are free, and which can be used again.

A full block is known by a chained sha256: the digest of the block before it and the block's own
ids, so that equal digests mean equal tokens from the start of the sequence on. The chain begins
with a root made of the model and of a salt of the caller's, so callers with different salts never
share anything, not even by the time an answer takes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def root_digest(model: bytes, salt: str) -> bytes:
    """Where the chain of a sequence begins."""
    own = salt.encode(errors="surrogatepass")  # JSON can bring what is no Unicode
    return hashlib.sha256(hashlib.sha256(model).digest() + own).digest()


def chain(previous: bytes, ids: Sequence[int]) -> bytes:
    """The digest of a block of `ids` after the block with digest `previous`."""
    return hashlib.sha256(previous + array("q", ids).tobytes()).digest()


class BlockPool:
    """`size` blocks, each free, held by one or more sequences, or kept for who comes again.

    A block whose digest is registered stays when nobody holds it any more, until its room is
    needed: the least recently held goes first. Every method leaves each block in exactly one of
    the three states.
    """

    def __init__(self, size: int, keep: bool = True) -> None:
        self.size, self.keep = size, keep
        self._forget_all()

    def _forget_all(self) -> None:
        self._free = list(range(self.size - 1, -1, -1))  # the lowest first, so that they adjoin
        self._holders = [0] * self.size
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept, held by nobody; oldest first
        self._unsettled: list[bytes] = []

    @property
    def available(self) -> int:
        """Blocks that can be had: free, or kept and held by nobody."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.size - self.available

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Hold the blocks of the longest beginning of `digests` that is here."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._idle.pop(block, None)
            self._holders[block] += 1
            blocks.append(block)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Hold `count` blocks of unknown content; None, and nothing, when there are not so many."""
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Say what a held block contains, or will after this pass; the first of equals is kept."""
        if not self.keep or digest in self._block_of or block in self._digest_of:
            return
        assert self._holders[block] > 0
        self._unsettled.append(digest)
        self._block_of[digest] = block
        self._digest_of[block] = digest

    def settle(self) -> None:
        """The pass is over: what was registered for it is there."""
        self._unsettled.clear()

    def release(self, blocks: Sequence[int]) -> None:
        """Hold each of a sequence's blocks once less; its last ones are the first to be reused."""
        for block in reversed(blocks):
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Keep nothing for later, as when the weights have changed; what is held stays held."""
        self._free += self._idle
        self._idle.clear()
        self._block_of.clear()
        self._digest_of.clear()
        self._unsettled.clear()

    def recover(self) -> None:
        """After a pass or a method that was broken off: nobody holds anything.

        What was registered for that pass may not be there, and is forgotten.
        """
        kept = {d: b for d, b in self._block_of.items() if d not in set(self._unsettled)}
        self._forget_all()
        self._block_of = kept
        self._digest_of = {block: digest for digest, block in kept.items()}
        self._idle.update(dict.fromkeys(kept.values()))
        self._free = [block for block in self._free if block not in self._idle]

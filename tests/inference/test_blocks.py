"""The block pool: digests by hand, and no block lost or held twice whatever happens."""

from __future__ import annotations

import copy
import hashlib
import struct

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2.inference.blocks import BlockPool, chain, root_digest


def digests(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_the_chain_by_hand() -> None:
    root = root_digest(b"model", "me")
    assert root == hashlib.sha256(hashlib.sha256(b"model").digest() + b"me").digest()
    first = chain(root, [1, 2])
    assert first == hashlib.sha256(root + struct.pack("<2q", 1, 2)).digest()
    roots = {root_digest(m, s) for m in (b"model", b"mode") for s in ("me", "lme", "")}
    assert len(roots) == 6  # no pair runs into another
    assert len({first, chain(first, [1, 2]), chain(root, [2, 1]), chain(root, [1])}) == 4


def test_blocks_adjoin_at_first() -> None:
    assert BlockPool(8).allocate(5) == [0, 1, 2, 3, 4]


def test_a_block_is_found_again_and_shared() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, digest in zip(blocks, digests("a", "b"), strict=False):
        pool.register(block, digest)
    assert pool.match(digests("a", "b", "c")) == blocks[:2]  # while another holds them
    pool.release(blocks)
    assert (pool.held, pool.available) == (2, 2)
    pool.release(blocks[:2])
    assert (pool.held, pool.available) == (0, 4)
    assert pool.match(digests("b")) == [blocks[1]]
    assert pool.match(digests("x", "a")) == []  # only a beginning counts
    assert pool.match(digests("a")) == [blocks[0]]


def test_the_least_recently_held_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    for names in ("ab", "cd"):
        blocks = pool.allocate(2)
        assert blocks is not None
        for block, digest in zip(blocks, digests(*names), strict=True):
            pool.register(block, digest)
        pool.release(blocks)
    pool.release(pool.match(digests("a", "b")))  # used again: now the latest
    for left in ("abc", "ab", "a", ""):
        assert pool.allocate(1)
        there = [name for name in "abcd" if copy.deepcopy(pool).match(digests(name))]
        assert "".join(there) == left
    assert pool.allocate(1) is None


def test_equal_blocks_are_kept_once() -> None:
    pool = BlockPool(4)
    one, other = pool.allocate(2) or []
    pool.register(one, b"a")
    pool.register(other, b"a")
    pool.release([one, other])
    assert pool.match([b"a"]) == [one]


def test_without_keeping_nothing_is_found() -> None:
    pool = BlockPool(2, keep=False)
    blocks = pool.allocate(1) or []
    pool.register(blocks[0], b"a")
    pool.release(blocks)
    assert pool.match([b"a"]) == []
    assert pool.available == 2


def test_recovery_keeps_what_was_settled() -> None:
    pool = BlockPool(3)
    one, other, _ = pool.allocate(3) or []
    pool.register(one, b"a")
    pool.settle()
    pool.register(other, b"b")
    pool.recover()
    assert pool.available == 3
    assert pool.match([b"a", b"b"]) == [one]
    assert pool.allocate(2) is not None
    assert pool.allocate(1) is None


class Pool(RuleBasedStateMachine):
    """Sequences that come and go, checked against what each of them holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7)
        self.sequences: list[list[int]] = []
        self.content: dict[int, int] = {}  # of blocks that were registered

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        available = self.pool.available
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > available)
        if blocks is not None:
            assert len(blocks) == len(set(blocks)) == count
            assert not set(blocks) & {b for held in self.sequences for b in held}
            for block in blocks:
                self.content.pop(block, None)
            self.sequences.append(blocks)

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data(), name=st.integers(0, 5))
    def register(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from([b for held in self.sequences for b in held]))
        if block not in self.content and name not in self.content.values():
            self.content[block] = name
        self.pool.register(block, bytes([name]))

    @rule(names=st.lists(st.integers(0, 5), max_size=4, unique=True))
    def match(self, names: list[int]) -> None:
        blocks = self.pool.match([bytes([name]) for name in names])
        assert [self.content[block] for block in blocks] == names[: len(blocks)]
        if len(blocks) < len(names):
            assert names[len(blocks)] not in self.content.values()
        self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.content.clear()

    @rule(settled=st.booleans())
    def recover(self, settled: bool) -> None:
        if settled:
            self.pool.settle()
        unsettled = {digest[0] for digest in self.pool._unsettled}
        self.pool.recover()
        self.sequences.clear()
        self.content = {b: name for b, name in self.content.items() if name not in unsettled}

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        held = {block for sequence in self.sequences for block in sequence}
        assert self.pool.held == len(held)
        free, idle = self.pool._free, list(self.pool._idle)
        assert sorted([*free, *idle, *held]) == list(range(7))
        assert set(idle) == self.content.keys() - held


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)

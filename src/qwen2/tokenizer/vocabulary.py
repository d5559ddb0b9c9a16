"""The regular tokens of a byte-level BPE vocabulary: spelling, checks, and merges from ranks.

A token is a byte string and its id is its rank: the lower, the earlier it is merged. Hugging Face
files and GGUF spell bytes as printable characters (the table of GPT-2) and list the merges beside
the tokens; the ranks alone determine them (report, section 2.1; see `merges_of`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise

from qwen2.common.errors import UserError

# The bytes that GPT-2's table leaves as they are; the others take the code points from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER_OF_BYTE = {b: b for b in _PRINTABLE} | {b: 256 + i for i, b in enumerate(_OTHERS)}
_BYTE_OF_CHARACTER = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}


def spell(token: bytes) -> str:
    """The printable spelling of a token's bytes, e.g. b" a" -> "Ġa"."""
    return token.decode("latin-1").translate(_CHARACTER_OF_BYTE)


def unspell(token: str) -> bytes:
    """The bytes of a printable spelling.

    Raises:
        UserError: a character outside the table.
    """
    try:
        return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")
    except UnicodeEncodeError:
        raise UserError(f"token {token!r}: not in the byte-level spelling of GPT-2") from None


def parse_tiktoken(data: bytes, where: str) -> dict[bytes, int]:
    """Read lines of "base64-token rank".

    Raises:
        UserError: a line of another form, or a token or rank that occurs twice.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{where}, line {number}: not 'base64 rank'") from None
        if len(ranks) != number:
            raise UserError(f"{where}, line {number}: this token occurred before")
    return ranks


def check_ids(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> None:
    """Every byte has a token, every id one token, and no id below the last regular one is free.

    Special tokens may leave ids free among themselves (rows of the embedding without text).

    Raises:
        UserError: naming the byte or the id.
    """
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(
                f"vocabulary: byte 0x{byte:02x} has no token, so not every text can be encoded"
            )
    if b"" in ranks or "" in special_tokens:
        raise UserError("vocabulary: a token is empty")
    used: dict[int, bytes | str] = {}
    for tokens in (ranks, special_tokens):
        for token, id_ in tokens.items():
            if id_ < 0:
                raise UserError(f"vocabulary: token {token!r} has the id {id_}; ids start at 0")
            if id_ in used:
                raise UserError(f"vocabulary: id {id_} is given to {used[id_]!r} and to {token!r}")
            used[id_] = token
    free = next((id_ for id_ in range(max(ranks.values())) if id_ not in used), None)
    if free is not None:
        raise UserError(f"vocabulary: id {free} has no token; the file is incomplete")


def check_merges(ranks: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> None:
    """The listed merges are the ones that the ids imply: one for each longer token, in their order.

    That is what lets ids serve as ranks. It holds for every published Qwen2 checkpoint.

    Raises:
        UserError: a merge is missing, repeated, out of order or not of tokens.
    """
    last = -1
    for left, right in merges:
        id_ = ranks.get(left + right, -1)
        if id_ < 0 or left not in ranks or right not in ranks:
            raise UserError(f"merge {_spell_pair(left, right)} is not of tokens in the vocabulary")
        if id_ <= last:
            raise UserError(f"merge {_spell_pair(left, right)} is not in the order of the ids")
        last = id_
    longer = sum(len(token) > 1 for token in ranks)
    if len(merges) != longer:
        raise UserError(f"{len(merges)} merges for {longer} tokens that need one; some are missing")


def _spell_pair(left: bytes, right: bytes) -> str:
    return f"'{spell(left)} {spell(right)}'"


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, in the order of their ranks.

    Run BPE on the token with only the ranks below its own: two pieces remain, and they are its
    merge. 151,387 for the Qwen2 vocabulary, the list that its published files carry.

    Raises:
        UserError: a token that no merge of lower tokens makes.
    """
    return [
        _merge_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]


def _merge_of(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            raise UserError(f"vocabulary: no merge of lower tokens makes token {limit}, {token!r}")
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]

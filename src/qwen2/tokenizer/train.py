"""Train a byte-level BPE vocabulary on texts, in the same form as Qwen2's (report, section 2.1).

The `tokenizers` library counts and merges. Normalisation, the pre-tokenizing expression and the
control tokens, which take the last ids, are those of the published vocabulary; so is the result's
type, and nothing downstream tells them apart. The same texts give the same vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainee

from qwen2.common.errors import UserError
from qwen2.tokenizer.chatml import default_source
from qwen2.tokenizer.tokenizer import CONTROL_TOKENS, PRE_TOKENS, Tokenizer
from qwen2.tokenizer.vocabulary import unspell

SMALLEST = 256 + len(CONTROL_TOKENS)  # every byte, and the control tokens


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, control tokens included.

    Raises:
        UserError: `vocab_size` is below 259, or the texts do not have that many merges in them.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocabulary size {vocab_size}: {SMALLEST} at least, for every byte has a token"
        )
    trainee = Trainee(models.BPE())
    trainee.normalizer = normalizers.NFC()
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = json.loads(trainee.to_str())["model"]["vocab"]
    if len(vocabulary) + len(CONTROL_TOKENS) < vocab_size:
        raise UserError(
            f"vocabulary size {vocab_size}: the texts have merges for only "
            f"{len(vocabulary) + len(CONTROL_TOKENS)} tokens; give more text or ask for fewer"
        )
    ranks = {unspell(token): rank for token, rank in vocabulary.items()}
    special_tokens = {token: len(ranks) + i for i, token in enumerate(CONTROL_TOKENS)}
    tokenizer = Tokenizer.from_ranks(ranks, special_tokens, chat_template=default_source())
    assert len(tokenizer.merges) == len(ranks) - 256
    return tokenizer

"""Byte-level BPE and ChatML (report, section 2.1)."""

from qwen2.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]

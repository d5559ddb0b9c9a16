"""Text from token ids that come one by one."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Text of ids that come one by one: what is pushed out is always complete UTF-8.

    The pieces joined equal `Tokenizer.decode` of all ids.
    """

    def __init__(self, bytes_of: Callable[[list[int]], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The characters that this token completes; perhaps none.

        Raises:
            UserError: an id that has no text.
        """
        return self._utf8.decode(self._bytes_of([id_]))

    def finish(self) -> str:
        """U+FFFD if the last character is still incomplete."""
        return self._utf8.decode(b"", final=True)

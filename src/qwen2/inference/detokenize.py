"""Text as it grows: whole characters only, and stop strings that straddle tokens."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text that may be shown at once and never has to be taken back.

    Text that might be the beginning of a stop string is held until it is or is not one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream()
        self._stop = [text for text in stop if text]
        self._held = ""
        self.text = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        """The text that `token` completes; after a stop string `stopped` is true."""
        return self._emit(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return self._emit(self._decoder.finish(), last=True)

    def _emit(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            size, self.stopped_by = min(found)
        else:
            size = len(self._held) - (0 if last else self._possible_stop())
        out, self._held = self._held[:size], self._held[size:]
        self.text += out
        return out

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )

"""What a server is told when it starts: names, keys, limits."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Self

from pydantic import Field

from qwen2.common.config import Config
from qwen2.common.errors import UserError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Limits(Config):
    """What is asked of clients before any of their requests is looked at."""

    header_bytes: int = Field(default=32 * 1024, ge=1)
    headers: int = Field(default=100, ge=1)
    body_bytes: int = Field(default=4 * 1024 * 1024, ge=1)
    bodies_bytes: int = Field(default=64 * 1024 * 1024, ge=1)  # of all requests at a time
    depth: int = Field(default=64, ge=1)  # JSON containers inside each other
    connections: int = Field(default=512, ge=1)
    header_seconds: float = Field(default=10.0, gt=0)  # from the first byte of a request
    body_seconds: float = Field(default=30.0, gt=0)
    keep_alive_seconds: int = Field(default=30, ge=1)  # that an idle connection is kept
    stalled_seconds: float = Field(default=60.0, gt=0)  # that a client may read nothing


class Keys:
    """The API keys that open this server; without any, everyone is let in.

    Kept and compared as sha256 digests, so that neither a comparison's time nor a copy of the
    process's memory tells much.
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> Self:
        """One key a line; blank lines and those that begin with # don't count.

        Raises:
            UserError: the file can't be read, has no key, or has one that no header can carry.
        """
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no file of API keys: {error}") from None
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys:
            raise UserError(f"{path}: it has no API key; write one a line")
        for number, key in enumerate(keys, 1):
            if not re.fullmatch(r"[!-~]([ -~]{6,510}[!-~])", key):
                raise UserError(
                    f"{path}: key {number} is not of 8 to 512 printable ASCII characters"
                )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, key: bytes) -> str | None:
        """A name for the owner of `key`, in which the key can't be found; None: not a key.

        Every key is compared, each in constant time.
        """
        digest = hashlib.sha256(key).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return hashlib.sha256(b"caller" + digest).hexdigest() if any(found) else None


class Settings:
    """A server's settings.

    Args:
        names: what the model is called: the first in answers, any of them in requests.
        keys: the API keys.
        hosts: names by which clients may call this server in their Host header, without port; None
            allows any. Bound to the loopback interface it must be told, or a web page could reach
            it under a name of its own that resolves to 127.0.0.1.
        limits: see there.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        keys: Keys | None = None,
        hosts: tuple[str, ...] | None = LOOPBACK_NAMES,
        limits: Limits | None = None,
    ) -> None:
        assert names
        self.names, self.hosts = names, hosts
        self.keys, self.limits = keys or Keys(), limits or Limits()

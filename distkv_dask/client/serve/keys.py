"""API keys: read from a file or the environment, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

from distkv_dask.errors import ConfigError

VARIABLE = "DISTKV_API_KEYS"
"""Environment variable that holds keys, separated by commas or white space."""

OWNER = "owner"
"""What says whose key a call has, in its state, and whose a file or batch is, in what is known of it."""

SHORTEST = 16
"""Characters of a key; shorter ones can be guessed."""


class Keys:
    """The keys that a server takes; with none of them, it takes every call.

    Parameters
    ----------
    keys
        As clients send them.
    """

    def __init__(self, keys: frozenset[str]) -> None:
        self._digests = [_digest(key) for key in sorted(keys)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, header: str | None) -> str | None:
        """Whose key an ``Authorization`` header names, None if nobody's; as fast for a wrong one as for a right one.

        The owner of a key is a digest of it, and is ``""`` for everybody where there are no keys.
        """
        if not self._digests:
            return ""
        scheme, _, key = (header or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, one) for one in self._digests]
        if not any(matches) or scheme.lower() != "bearer":
            return None
        return hashlib.blake2b(given, digest_size=12, person=b"distkv-owner").hexdigest()


def read_keys(path: Path | None) -> Keys:
    """Read the keys of a file, one a line (``#`` begins a comment), and of the variable ``DISTKV_API_KEYS``.

    Raises
    ------
    ConfigError
        When the file cannot be read or holds none, or when a key is short or has other characters than headers may.
    """
    found = set(re.split(r"[,\s]+", os.environ.get(VARIABLE, "")))
    if path is not None:
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the file of API keys {path} cannot be read: {error}") from error
        in_file = {line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")}
        if not in_file:
            raise ConfigError(f"the file of API keys {path} holds none: write one a line")
        found |= in_file
    found.discard("")
    for key in found:
        if len(key) < SHORTEST or not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                f"an API key has {len(key)} characters: it needs at least {SHORTEST}, printable ASCII without spaces. "
                f"`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one."
            )
    return Keys(frozenset(found))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()

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
"""Name of the owner in the state of a call, and in the record of a file or batch."""

SHORTEST = 16
"""Characters of a key; shorter ones can be guessed."""


class Keys:
    """The keys that a server accepts; without keys it accepts every call.

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
        """Owner of the key in an ``Authorization`` header; None for a wrong key, which takes as long as a right one.

        The owner of a key is a digest of it; without keys, everybody is the owner ``""``.
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
        When the file cannot be read or has no keys, or when a key is too short or has characters that headers cannot.
    """
    found = set(re.split(r"[,\s]+", os.environ.get(VARIABLE, "")))
    if path is not None:
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the file of API keys {path} cannot be read: {error}") from error
        in_file = {line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")}
        if not in_file:
            raise ConfigError(f"the file {path} has no API keys: write one per line")
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

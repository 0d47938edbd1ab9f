"""Checks of texts and names from users and files, before they are used."""

from __future__ import annotations

import unicodedata

from distkv_dask.errors import InvalidRequestError

LONGEST_TEXT = 1 << 26
"""Characters of the longest text; ten times what today's longest windows hold."""
LONGEST_NAME = 200


def checked_text(text: str, what: str) -> str:
    r"""Return a text unchanged, if it is valid.

    Parameters
    ----------
    text
        Any string.
    what
        Its name in the message, such as ``"the prompt"``.

    Raises
    ------
    InvalidRequestError
        When it holds half a surrogate pair, which no encoding of text can hold, or is longer than :data:`LONGEST_TEXT`.
        The message names the position and does not quote the text.

    Examples
    --------
    >>> checked_text("a\N{GRINNING FACE}", "the prompt") == "a\N{GRINNING FACE}"
    True
    >>> checked_text("a\ud83d", "the prompt")
    Traceback (most recent call last):
    distkv_dask.errors.InvalidRequestError: the prompt holds half a surrogate pair (U+D83D) at character 1...
    """
    if len(text) > LONGEST_TEXT:
        raise InvalidRequestError(
            f"{what} has {len(text)} characters, more than the {LONGEST_TEXT} of the longest text: split it"
        )
    if (at := _half_pair(text)) is not None:
        raise InvalidRequestError(
            f"{what} holds half a surrogate pair (U+{ord(text[at]):04X}) at character {at}: the text was cut inside a "
            "character. Replace it, for example by U+FFFD"
        )
    return text


def well_formed(text: str) -> str:
    r"""Return what a file says with its surrogate pairs joined, and U+FFFD for halves of them.

    For texts that were not typed, such as a PDF's: refusing them would not help.

    Examples
    --------
    >>> well_formed("\ud83d\ude00 \ud83d") == "\N{GRINNING FACE} \N{REPLACEMENT CHARACTER}"
    True
    """
    if _half_pair(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def checked_name(name: object, what: str) -> str:
    """Return a name that status, logs and pages can show on one line.

    Raises
    ------
    InvalidRequestError
        When it is not a text, is empty or longer than :data:`LONGEST_NAME`, or holds control characters or halves of
        surrogate pairs.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequestError(f"{what} is {name!r:.100}, but must be a text that is not empty")
    if len(name) > LONGEST_NAME:
        raise InvalidRequestError(f"{what} has {len(name)} characters: give one of at most {LONGEST_NAME}")
    for at, character in enumerate(name):
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise InvalidRequestError(
                f"{what} holds U+{ord(character):04X} at character {at}: leave out line breaks, other control "
                "characters and halves of surrogate pairs"
            )
    return str(name)


def _half_pair(text: str) -> int | None:
    """Index of the first character that is half a surrogate pair."""
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None

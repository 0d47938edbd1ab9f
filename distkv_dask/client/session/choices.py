"""Choices as tokens: each has at least one token, and no two have the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.config import Config
from distkv_dask.errors import InvalidRequestError
from distkv_dask.messages.client_calls import Generate


def choice_ids(
    choices: Sequence[str | Sequence[int]], tokenizer: Tokenizer, config: Config
) -> tuple[tuple[int, ...], ...]:
    """Tokens of choices.

    Raises
    ------
    InvalidRequestError
        When the model has no tokens for one, or the same for two, or tasks by layer cannot score them.
    """
    found: dict[tuple[int, ...], object] = {}
    for choice in choices:
        try:
            ids = tuple(tokenizer.encode_more(choice))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"the choice {choice!r:.100} has no tokens: {error}") from error
        if isinstance(choice, str) and tokenizer.unknown in ids:
            raise InvalidRequestError(f"the choice {choice!r:.100} has characters for which the model has no token")
        if ids in found:
            raise InvalidRequestError(f"the choices {found[ids]!r:.100} and {choice!r:.100} are the same tokens")
        if len(ids) > 1 and config.granularity == "layer":
            raise InvalidRequestError(
                f"the choice {choice!r:.100} has {len(ids)} tokens, but tasks by layer score choices of one token "
                'only: open the engine with granularity="window"'
            )
        found[ids] = choice
    return tuple(found)


def chosen_text(submission: Generate, tokens: Sequence[int], text: str) -> str:
    """The answered choice as it was given, if it is a text; otherwise the ``text`` of its tokens."""
    if not submission.choices or submission.sampling.choices is None:
        return text
    chosen = submission.sampling.choices[submission.choices.index(tuple(tokens))]
    return chosen if isinstance(chosen, str) else text

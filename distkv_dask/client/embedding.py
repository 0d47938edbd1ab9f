"""Embeddings of texts: of one or some as an array, of a table or a folder as a column."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from distkv_dask.client.batch.process import Processing
from distkv_dask.client.session.generation import Generation
from distkv_dask.client.session.request import checked
from distkv_dask.client.tokenizer import is_one_text
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import Embed, Prompt, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


class Embedding(Processing):
    """The part of an engine that embeds texts."""

    def embed(
        self,
        source: Any,
        embed: Embed = "mean",
        *,
        normalize: bool | None = None,
        priority: int = 0,
        adapter: str | PathLike[str] | None = None,
        out: str | PathLike[str] | None = None,
        **how: Any,
    ) -> Any:
        """Embed texts as long as the model's window, without an answer to any of them.

        An embedding is what transformers' ``AutoModel`` returns as ``last_hidden_state``, pooled. Chat templates are
        not used.

        Parameters
        ----------
        source
            A text, or a list of token ids; or a list of such texts. Everything else is a source for :meth:`process`:
            a :class:`~pathlib.Path`, a frame, an Arrow table.
        embed
            ``"mean"`` of the hidden states of all tokens, or that of the ``"last"`` one.
        normalize
            Whether embeddings have length 1.
        priority, adapter
            As in :class:`~distkv_dask.SamplingParams`.
        out, **how
            For a source of :meth:`process`: where the table goes, and its other parameters, except for questions.

        Returns
        -------
        numpy.ndarray
            float32 [hidden size]; of several texts [texts, hidden size]. Of a source, what :meth:`process` returns: the
            column ``embedding`` of the table has lists of fixed size. With an asynchronous client, an awaitable.

        Raises
        ------
        InvalidRequestError
            When a text is empty, or longer than the model's window.
        DistKVError
            When one of several texts fails: then there is no array. A table has error rows.
        """
        sampling = SamplingParams(embed=embed, normalize=normalize, priority=priority, adapter=adapter)
        if not isinstance(source, str | list | tuple):
            return self.process(source, sampling=sampling, out=out, **how)
        if out is not None or how:
            given = ", ".join(["out"] * (out is not None) + sorted(how))
            raise InvalidRequestError(f"{given}: for a table or a folder (Path), not for texts: leave them out")
        session = self._session
        is_one = is_one_text(source)
        window, texts = session.facts.max_positions, [source] if is_one else source
        prompts = [session.tokenizer.encode(_text(one)) for one in texts]
        if not prompts:
            raise InvalidRequestError("there is no text to embed: the list is empty")
        for one in prompts:
            checked(sampling, len(one), window)
        return session.client.sync(_arrays, [session.ask_ids(one, sampling) for one in prompts], is_one)


def _text(one: Any) -> Prompt:
    """The text, or its token ids; anything else is refused."""
    if is_one_text(one):
        return cast(Prompt, one)
    raise InvalidRequestError(f"{one!r:.100} is not a text: give a text, or a list of token ids")


async def _arrays(running: Sequence[Generation], is_one: bool) -> NDArray[np.float32]:
    """The embeddings of all texts; if one fails, the others are cancelled."""
    import numpy as np

    try:
        found = [cast("NDArray[np.float32]", (await one).embedding) for one in running]
    finally:
        for one in running:
            one.cancel()
    return found[0] if is_one else np.stack(found)

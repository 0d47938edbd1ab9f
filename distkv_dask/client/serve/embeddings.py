"""``/v1/embeddings``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from distkv_dask.client.batch.openai_embeddings import embedding_content, embeddings_of
from distkv_dask.client.batch.rows import Texts
from distkv_dask.client.serve.answers import until_gone, whole
from distkv_dask.client.serve.asked import Asked
from distkv_dask.client.serve.body import read_json
from distkv_dask.client.serve.serving import Serving, serving_of
from distkv_dask.client.session.request import checked
from distkv_dask.completion import Completion
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams


async def embeddings(request: Request) -> Response:
    """Embed one text or several."""
    serving = serving_of(request)
    said = dict(await read_json(request))
    model = serving.check_name(said.pop("model", None))
    content = embedding_content(said)
    texts = content.prompt
    assert isinstance(texts, Texts)
    most = serving.limits.open_requests
    if len(texts.prompts) > most:
        raise InvalidRequestError(
            f"the request has {len(texts.prompts)} texts, and this server takes {most} at once: send several requests"
        )
    how = {**content.sampling, "adapter": serving.adapters.get(model)}
    asked = Asked(await asyncio.to_thread(_checked, texts, how, serving), stream=False, usage=False, model=model)

    def written(done: Sequence[Completion]) -> dict[str, Any]:
        tokens = sum(one.prompt_tokens for one in done)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        data = embeddings_of(done, texts.base64)
        return {"object": "list", "data": data, "model": model, "usage": usage}

    return await whole(asked, written, serving, until_gone(request))


def _checked(texts: Texts, said: Mapping[str, Any], serving: Serving) -> list[tuple[list[int], SamplingParams]]:
    """Checks that may take long for long texts; not run on the event loop."""
    session, sampling = serving.session, SamplingParams(**said)
    ids = [session.tokenizer.encode(text) for text in texts.prompts]
    return [(one, checked(sampling, len(one), session.facts.max_positions)) for one in ids]

"""OpenAI's batch files: each JSONL line is a complete request or answer, with its own messages and sampling."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.openai_embeddings import EMBEDDINGS
from distkv_dask.client.batch.openai_request import CHAT, content_of
from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.text_tables import JSONL, count_lines, endings, jsonl_records
from distkv_dask.errors import InvalidRequestError
from distkv_dask.sampling import SamplingParams

DEFAULTS = SamplingParams(temperature=1.0)
"""Default sampling of requests and batches: OpenAI uses a temperature of 1."""

SAMPLE = 1000
"""Number of lines that decide whether a JSONL file is a batch file."""


class OpenAIBatchSource:
    """Requests of an OpenAI batch file; ``custom_id`` and ``url`` go to the output.

    The engine's model answers, whatever model a request names. A request for an unsupported feature (tools, several
    choices, ...) is an error row, and so is one with a ``custom_id`` that is not text or is repeated. In the output, a
    ``custom_id`` that is not text is written as JSON.

    Parameters
    ----------
    path
        The file.
    endpoint
        The only path that requests may have; None allows all.
    adapters
        Adapters by the model's name in a request.
    """

    label = "row"
    fields = ()
    kept = pa.schema([("custom_id", pa.string()), ("url", pa.string())])

    def __init__(
        self, path: Path, endpoint: str | None = None, adapters: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._path = path
        self._adapters = adapters
        self._endpoint = endpoint

    def count(self) -> int:
        """Number of lines."""
        return count_lines(self._path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read line by line."""
        seen: dict[bytes, int] = {}
        for number, record in enumerate(jsonl_records(self._path)):
            earlier = None
            if isinstance(record, Mapping) and isinstance(name := record.get("custom_id"), str):
                key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                if (found := seen.setdefault(key, number)) != number:
                    earlier = found
            if number >= start:
                yield _row(number, record, earlier, self._endpoint, self._adapters)


def is_openai_batch(path: Path) -> bool:
    """Whether at least half of the readable first lines of a JSONL file are requests in OpenAI's format."""
    records = itertools.islice(jsonl_records(path), SAMPLE)
    found = [_is_request(record) for record in records if isinstance(record, Mapping)]
    return any(found) and 2 * sum(found) >= len(found)


def default_sampling(source: Any) -> SamplingParams:
    """Default sampling of a batch."""
    path = Path(source) if isinstance(source, str | PathLike) else None
    lines = path is not None and path.name.lower().endswith(endings(JSONL)) and path.is_file()
    return DEFAULTS if lines and is_openai_batch(Path(source)) else SamplingParams()


def check_spec(spec: BatchSpec, keep: Any) -> None:
    """Raise :class:`InvalidRequestError` if a batch on an OpenAI batch file has parameters other than sampling."""
    plain = BatchSpec(sampling=spec.sampling)
    if spec.questions != (None,) or spec.template is not None:
        raise InvalidRequestError("an OpenAI batch file has its own prompts: leave out question and template")
    for name in ("text_column", "too_long", "overlap", "combine", "reader", "adapter_column"):
        if getattr(spec, name) != getattr(plain, name):
            raise InvalidRequestError(f"an OpenAI batch file has its own prompts: leave out {name}")
    if keep is not None:
        raise InvalidRequestError("an OpenAI batch file always keeps custom_id and url: leave out keep")
    if spec.sampling.quotes is not None:
        raise InvalidRequestError("an OpenAI batch file has no documents to quote: leave out quotes")
    if spec.sampling.embed is not None:
        raise InvalidRequestError("requests of an OpenAI batch file say how they embed: leave out embed")
    if (form := spec.sampling.form) is not None:
        raise InvalidRequestError(
            f"requests of an OpenAI batch file have their own response_format: leave out {form.kind}"
        )


def _is_request(record: Mapping[str, Any]) -> bool:
    url = record.get("url")
    return (isinstance(url, str) and url.startswith("/v1/")) or (
        "custom_id" in record and isinstance(record.get("body"), Mapping)
    )


def _row(
    number: int,
    record: Mapping[str, Any] | str,
    earlier: int | None,
    endpoint: str | None,
    adapters: Mapping[str, str],
) -> Row:
    known = {} if isinstance(record, str) else record
    kept = {name: None if known.get(name) is None else _text(known[name]) for name in OpenAIBatchSource.kept.names}
    try:
        mark = fingerprint(record if isinstance(record, str) else json.dumps(record, sort_keys=True))
    except (RecursionError, ValueError) as error:  # nested more deeply than it can be written
        record = f"the request cannot be read: {error}"
        mark = fingerprint(record)

    def read() -> Content:
        if isinstance(record, str):
            raise InvalidRequestError(record)
        if earlier is not None:
            raise InvalidRequestError(f"custom_id {kept['custom_id']} is already used by row {earlier}: rename one")
        if endpoint is not None and record.get("url") != endpoint:
            raise InvalidRequestError(f"url is {record.get('url')!r:.100}, but this batch is for {endpoint}")
        content = content_of(record)
        name = record["body"].get("model")
        adapter = adapters.get(name) if isinstance(name, str) else None
        return content if adapter is None else replace(content, sampling={**content.sampling, "adapter": adapter})

    return Row(number, mark, pa.RecordBatch.from_pylist([kept], OpenAIBatchSource.kept), read)


def _text(value: Any) -> str | None:
    """A text unchanged, anything else as JSON."""
    try:
        # Half of a surrogate pair is not text.
        whole = isinstance(value, str) and value.encode("utf-8", "replace").decode() == value
        return value if whole else json.dumps(value)
    except (RecursionError, ValueError):
        return None


def write_openai_answers(table: pa.Table, model: str, file: Any) -> None:
    """Write answers as the lines of an OpenAI output file, in the order of the requests.

    Parameters
    ----------
    table
        The whole output of a batch whose source was an OpenAI file.
    model
        Name of the model that answered.
    file
        A binary file.
    """
    for row in table.sort_by("row").to_pylist():
        file.write(json.dumps(_answer(row, model), ensure_ascii=False).encode() + b"\n")


def _answer(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    name, tokens = f"distkv-{row['fingerprint']}", row["prompt_tokens"]
    if row["error"] is not None:
        error = {"code": "invalid_request_error", "message": row["error"]}
        return {"id": name, "custom_id": row["custom_id"], "response": None, "error": error}
    if row["url"] == EMBEDDINGS:
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"object": "list", **json.loads(row["response"]), "model": model, "usage": usage}
        return _answered(name, row, body)
    chat = row["url"] == CHAT
    said = {"message": {"role": "assistant", "content": row["answer"]}} if chat else {"text": row["answer"]}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": row["finish_reason"]}
    response = {"choices": [choice]} if row["response"] is None else json.loads(row["response"])
    body = {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        **response,
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": row["new_tokens"],
            "total_tokens": tokens + row["new_tokens"],
        },
    }
    return _answered(name, row, body)


def _answered(name: str, row: Mapping[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    answer = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": row["custom_id"], "response": answer, "error": None}

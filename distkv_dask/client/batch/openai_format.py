"""OpenAI's batch files: a JSONL line is a whole request, with its own messages and sampling, and so is an answer's."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from distkv_dask.client.batch.rows import Content, Row, fingerprint
from distkv_dask.client.batch.text_tables import count_lines, jsonl_records
from distkv_dask.errors import InvalidRequestError
from distkv_dask.types import Prompt, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_SAMPLING = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
             "top_p": "top_p", "seed": "seed", "stop": "stop"}  # fmt: skip
_IGNORED = {"model", "messages", "prompt", "user", "metadata", "store", "response_format"}
_DEFAULTS = {"n": 1, "stream": False, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0}
"""What else a body may say, as long as it says what is done anyway."""


class OpenAIBatchSource:
    """Requests of an OpenAI batch file; ``custom_id`` and ``url`` go to the output.

    The engine's model answers, whatever model a request names. A request that asks for something that the engine
    does not do (tools, several choices, ...) is an error row.
    """

    label = "row"
    fields = ()
    kept = pa.schema([("custom_id", pa.string()), ("url", pa.string())])

    def __init__(self, path: Path) -> None:
        self._path = path

    def count(self) -> int:
        """Number of lines."""
        return count_lines(self._path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Read line by line."""
        for number, record in itertools.islice(enumerate(jsonl_records(self._path)), start, None):
            known = {} if isinstance(record, str) else record
            names = {name: known.get(name) for name in self.kept.names}
            kept = {name: value if isinstance(value, str) else None for name, value in names.items()}
            yield Row(
                number,
                fingerprint(record if isinstance(record, str) else json.dumps(record, sort_keys=True)),
                pa.RecordBatch.from_pylist([kept], self.kept),
                lambda record=record: _content(record),  # type: ignore[misc]
            )


def is_openai_batch(path: Path) -> bool:
    """Whether a JSONL file's first line is a request in OpenAI's format."""
    first = next(jsonl_records(path), "")
    return isinstance(first, Mapping) and {"custom_id", "url", "body"} <= first.keys()


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


def _content(record: Mapping[str, Any] | str) -> Content:
    if isinstance(record, str):
        raise InvalidRequestError(record)
    body, url = record.get("body"), record.get("url")
    if not isinstance(body, Mapping) or not isinstance(record.get("custom_id"), str):
        raise InvalidRequestError("a request needs a custom_id (text) and a body (object)")
    if url not in (CHAT, COMPLETIONS):
        raise InvalidRequestError(f"url is {url!r:.100}, but only {CHAT} and {COMPLETIONS} are answered")
    for name, value in body.items():
        if name in _SAMPLING or name in _IGNORED or value is None or _DEFAULTS.get(name, ()) == value:
            continue
        raise InvalidRequestError(f"{name}={value!r:.100} is not supported")
    schema = _schema(body.get("response_format"))
    chosen = {ours: body[name] for name, ours in _SAMPLING.items() if body.get(name) is not None}
    # OpenAI's own default: 1; SamplingParams' is 0.
    sampling = SamplingParams(**{"temperature": 1.0} | chosen, schema=schema)
    return Content({}, _prompt(body, url), sampling)


def _schema(response_format: Any) -> Mapping[str, Any] | None:
    """Read a request's ``response_format``."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
        case {"type": "json_object"}:
            return {"type": "object"}
    raise InvalidRequestError(f"response_format={response_format!r:.100} is not supported")


def _prompt(body: Mapping[str, Any], url: str) -> Prompt:
    if url == COMPLETIONS:
        if not isinstance(prompt := body.get("prompt"), str):
            raise InvalidRequestError(f"prompt should be text: {prompt!r:.100}")
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(f"messages should be a list of chat messages: {messages!r:.100}")
    return messages


def _answer(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    name = f"distkv-{row['fingerprint']}"
    if row["error"] is not None:
        error = {"code": "invalid_request_error", "message": row["error"]}
        return {"id": name, "custom_id": row["custom_id"], "response": None, "error": error}
    chat = row["url"] == CHAT
    said = {"message": {"role": "assistant", "content": row["answer"]}} if chat else {"text": row["answer"]}
    body = {
        "id": name,
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": row["finish_reason"]}],
        "usage": {
            "prompt_tokens": row["prompt_tokens"],
            "completion_tokens": row["new_tokens"],
            "total_tokens": row["prompt_tokens"] + row["new_tokens"],
        },
    }
    response = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": row["custom_id"], "response": response, "error": None}

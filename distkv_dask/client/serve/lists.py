"""Lists of files or batches, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from distkv_dask.client.serve.failures import Refusal

MOST = 1000
"""Records of a page."""


def page(records: Sequence[Mapping[str, Any]], request: Request, also: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The page that a call asks for with ``after`` and ``limit``; parameters named in ``also`` are allowed, too."""
    if unknown := request.query_params.keys() - {"after", "limit"} - also:
        raise Refusal(f"the parameter {min(unknown)!r:.100} is not supported")
    wanted = request.query_params.get("limit", "20")
    if not (wanted.isdecimal() and 1 <= int(wanted) <= MOST):
        raise Refusal(f"limit is {wanted!r:.100}, but must be a whole number from 1 to {MOST}")
    ids = [one["id"] for one in records]
    after = request.query_params.get("after")
    if after is not None and after not in ids:
        raise Refusal(f"after is {after!r:.100}, which is not in the list", 404, "not_found")
    begin = 0 if after is None else ids.index(after) + 1
    found = records[begin : begin + int(wanted)]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": begin + len(found) < len(records),
    }

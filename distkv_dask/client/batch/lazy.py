"""Answers as a lazy Dask DataFrame: every partition is a task that attaches to the engine and asks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from distkv_dask.client.batch.answer_plan import check_servable
from distkv_dask.client.batch.frames import bag_schema
from distkv_dask.client.batch.openai_format import OpenAIBatchSource
from distkv_dask.client.batch.partition_tasks import Asked, answer_frame, answer_records, answer_rows, as_pandas
from distkv_dask.client.batch.results import Results
from distkv_dask.client.batch.rows import Source
from distkv_dask.client.batch.sources import checked, columns_of, kind_of, records_source, source_for
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distkv_dask.client.session.session import Session

PARTS = 4
"""Partitions per worker, for sources without partitions."""


def answers_frame(
    session: Session,
    source: Any,
    spec: BatchSpec,
    keep: Sequence[str] | None,
    max_errors: int | None,
    in_flight: int | None,
) -> Any:
    """Make the Dask DataFrame; :func:`distkv_dask.client.batch.process.process` describes the parameters."""
    import dask.dataframe as dd
    from dask.delayed import delayed

    kind = kind_of(source)
    if kind == "stream":
        raise InvalidRequestError(
            f"a lazy Dask DataFrame is read by tasks, and a {type(source).__name__} by this process only: name an "
            f"output (out=...), or give a path or a Dask DataFrame"
        )
    if kind == "bag":
        schema = bag_schema(source, spec.text_column, session.client)
        opened = checked(records_source(list, columns_of(spec, keep), schema, lambda: None), spec)
    else:
        opened = source_for(source, spec, keep, session.client)
    if not isinstance(opened, OpenAIBatchSource):
        check_servable(spec, session.tokenizer, session.facts.max_positions)
    asked = Asked(session.id, spec, max_errors, in_flight or session.config.window_batch)
    parts = PARTS * session.facts.workers
    if kind == "path":
        path, rows = str(Path(source).absolute()), opened.count() or 0
        cuts = [cut for cut in pairwise(rows * at // parts for at in range(parts + 1)) if cut[0] < cut[1]]
        meta = _meta(session, opened, spec, label=True)
        return dd.from_map(answer_rows, cuts or [(0, 0)], path=path, keep=keep, asked=asked, meta=meta)
    meta = _meta(session, opened, spec, label=False)
    if kind == "bag":
        answers = [delayed(answer_records)(part, keep, schema, asked) for part in source.to_delayed()]
        return dd.from_delayed(answers, meta=meta, verify_meta=False)
    if kind == "arrow":
        source = source.to_pandas(types_mapper=pd.ArrowDtype)
    if kind != "dask":
        source = dd.from_pandas(source, npartitions=max(1, min(parts, len(source))), sort=False)
    kept = [name for wanted in opened.kept.names for name in source.columns if str(name) == wanted]
    meta = pd.concat([source._meta[kept], meta.drop(columns=opened.kept.names).set_axis(source._meta.index)], axis=1)
    return source.map_partitions(answer_frame, kept, asked, meta=meta)


def _meta(session: Session, source: Source, spec: BatchSpec, label: bool) -> pd.DataFrame:
    """An empty frame with the columns of a source's answers."""
    return as_pandas(Results(source, spec, session.model).schema.empty_table(), label)

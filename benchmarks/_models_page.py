"""``docs/models.md``: a table of model types, made from the results of ``model_coverage.py``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from distkv_dask.geometry import Geometry

HEAD = """\
# Which models are served

`python benchmarks/model_coverage.py --page docs/models.md` made this page with transformers {version}; tests repeat
parts of it. For each causal model type of transformers, and some vision-language types as text models, a tiny model
with random weights answers three prompts longer than its windows, in float32, with its KV on three workers. *Exact*
means that all 72 greedy tokens equal those of transformers' `generate`. `distkv models check MODEL` checks one model
and says how much memory it needs.

{counts}

| type | attention | |
|---|---|---|
"""


def attention_of(geometry: Geometry, latent: bool) -> str:
    """Kinds of attention of a model's layers, in words."""
    kinds = geometry.layer_kinds
    words = [word for word in ("full", "sliding", "chunked") if any(kind.visible == word for kind in kinds)]
    words = [*(words or ["full"]), *(["soft cap"] if any(kind.soft_cap for kind in kinds) else [])]
    words = [*words, *(["latent (MLA)"] if latent else []), *(["recurrent layers"] if geometry.state_bytes else [])]
    return ", ".join(words)


def outcome(row: Mapping[str, Any]) -> str:
    """The last column of a row of the table."""
    if row["verdict"] == "exact":
        return "exact"
    said = " ".join(row["reason"].split())
    reason = re.split(r"[.:] [Cc]hoose|, not through|, which DistAttention|, but layers", said)[0]
    reason = re.sub(r"^model type '\S+' |^model 'FOLDER' of type '\S+' |=\[.*\]|=\S+(?=\))", "", reason)
    return f"{row['verdict']}: {reason}".replace("|", "/")


def page(rows: Iterable[Mapping[str, Any]], version: str) -> str:
    """The page; encoders are left out."""
    shown = sorted((row for row in rows if row["verdict"] != "aside"), key=lambda row: row["type"])
    verdicts = [row["verdict"] for row in shown]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts)))
    lines = (f"| {row['type']} | {row['attention']} | {outcome(row)} |\n" for row in shown)
    return HEAD.format(version=version, counts=f"{len(shown)} models: {counts}.") + "".join(lines)

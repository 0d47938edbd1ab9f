"""What does skipping rows for zero activations save: bytes read of down projections, and time, by tokens of a step?

The model has OPT's architecture and random weights; its biases leave about one in ten inner activations nonzero
(``--bias`` changes that), as in larger trained ReLU models. Both modes take turns in one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _report import parser, report

from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.sparse_rows import down_projections

TOKENS = (1, 2, 4, 8)


class EachItself:
    """Replaces attention."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sinks: Any = None
    ) -> torch.Tensor:
        return v


def saved(folder: Path, bias: float, layers: int) -> Path:
    """A model in float32."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        **{"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": layers, "num_attention_heads": 16},
        **{"vocab_size": 8192, "word_embed_proj_dim": 1024, "init_std": 0.05},
    )
    model = transformers.OPTForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "fc1.bias" in name:
                weight.fill_(bias)
    model.save_pretrained(folder)
    return folder


def seconds(model: LoadedModel, tokens: int) -> float:
    """Seconds of a forward."""
    began = time.perf_counter()
    model.forward(torch.arange(tokens), torch.arange(tokens), EachItself())
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bias", type=float, default=-2.0, help="bias of the first linear of each layer")
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--turns", type=int, default=15)
    options = arguments.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(str(saved(Path(folder), options.bias, options.layers)), "float32", options.threads)
    counts = model.weights.rows
    assert counts is not None
    figures["weights"] = model.weights.where
    limits = dict(counts.limits)
    size = next(down_projections(model._model)).in_features
    for tokens in TOKENS:
        turns: dict[bool, list[float]] = {False: [], True: []}
        counts.dense = counts.read = 0
        for _ in range(options.turns):
            for skips in (True, False):
                counts.limits = limits if skips else {}
                turns[skips].append(seconds(model, tokens))
        dense, sparse = (statistics.median(turns[skips]) for skips in (False, True))
        figures[f"{tokens} tokens"] = {
            **{"all_rows_ms": 1e3 * dense, "skipping_ms": 1e3 * sparse, "times_faster": dense / sparse},
            "read_of_down_projections": counts.read / max(1, counts.dense),
            "pays_below_share": limits.get(tokens, 0.0) / (tokens * size),
        }
    named = {name: getattr(options, name) for name in ("bias", "layers", "threads", "turns")}
    report(figures, named, options.json)


if __name__ == "__main__":
    main()

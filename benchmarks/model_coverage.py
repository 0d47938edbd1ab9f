"""Which causal model types of the installed transformers are served, and are their tokens right?

Each type is tried with a tiny model with random weights in float32: three prompts longer than its windows, each with
its KV on three workers, whose 24 greedy tokens are compared with those of transformers' ``generate``. The workers'
runtimes are in this process, without Dask. Verdicts: ``exact``; ``differs`` (``differs`` says from which token on);
``fails`` (loading or a request failed); ``refused`` with its reason; ``not built`` (no tiny model could be made);
``aside`` (an encoder, or an encoder and a decoder).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers
from _fakes import fleet, state
from _models_page import attention_of, page
from _report import environment, parser, report
from _tiny import NOT_CAUSAL, VOCAB, tiny_model, types
from transformers.utils import logging

from distkv_dask.errors import ModelError
from distkv_dask.models.source import resolve_model
from distkv_dask.worker.model.load import load_model

NEW = 24
SEEDS, LEAD = 8, 1e-3
"""Weights are drawn again, up to this many times, until every token leads the second best by this much."""
SPLITS = {
    45: [("w1", 16), ("w2", 16), ("w0", 45)],
    29: [("w2", 8), ("w0", 8), ("w1", 8), ("w2", 45)],
    38: [("w0", 8), ("w1", 16), ("w0", 8), ("w2", 45)],
}
"""Tokens of a prompt -> placement of its KV; all decode at ``w0``, in one batch."""


def prompt(length: int) -> list[int]:
    return torch.randint(1, VOCAB - 4, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def expected(model: Any, length: int) -> tuple[list[int], float]:
    """Greedy tokens, and the smallest lead of any of them over the second best."""
    ids = torch.tensor([prompt(length)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(made.logits).float().topk(2).values
    return list(made.sequences[0, length:].tolist()), float((best[:, 0] - best[:, 1]).min())


def build(kind: str, folder: str) -> dict[int, list[int]]:
    """Save a tiny model; returns its tokens for every prompt, none of which depend on rounding."""
    for seed in range(8, 8 + SEEDS):
        model = tiny_model(kind, seed)
        model.save_pretrained(folder)
        read: Any = type(model).from_pretrained(folder)  # Youtu's sets the padding's embedding to 0
        right = {length: expected(read.eval(), length) for length in SPLITS}
        if min(lead for _, lead in right.values()) > LEAD:
            break
    return {length: tokens for length, (tokens, _) in right.items()}


def answered(model: Any) -> dict[int, list[int]]:
    """Greedy tokens of every prompt, by its length; ``w0`` has the states of recurrent layers from the first chunk."""
    prefill_at = "w0" if model.geometry.home_bytes else None
    with fleet(model, 3, timeout_start=60.0, timeout_receive=60.0) as workers:
        tokens, batch = {}, []
        for length, room in SPLITS.items():
            placement = workers.place(length, *room)
            tokens[length] = [workers.prefill(length, placement, prompt(length), 24, prefill_at)]
            batch.append(state(length, placement, length, tokens[length][0], NEW - 1))
        while batch:
            result, batch = workers.decode("w0", batch, 7)
            if result.errors:
                raise next(iter(result.errors.values()))
            for length, new in result.tokens.items():
                tokens[length] += new
    return tokens


def verdict(kind: str) -> dict[str, Any]:
    """Build, load and run one type, and compare its tokens."""
    if kind in NOT_CAUSAL:
        return {"verdict": "aside", "reason": "an encoder, or an encoder and a decoder"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            right = build(kind, folder)
        except Exception as error:
            return {"verdict": "not built", "reason": f"{type(error).__name__}: {error}"}
        try:
            loaded = load_model(folder, "float32", 1)
        except ModelError as error:
            return {"verdict": "refused", "reason": str(error).replace(folder, "FOLDER")}
        except Exception as error:
            return {"verdict": "fails", "reason": f"when loading: {type(error).__name__}: {error}"}
        config = resolve_model(folder).config().get_text_config()
        try:
            found = answered(loaded)
        except Exception as error:
            return {"verdict": "fails", "reason": f"{type(error).__name__}: {error}"}
    return compared(found, right) | {
        "attention": attention_of(loaded.geometry, bool(getattr(config, "kv_lora_rank", None)))
    }


def compared(found: dict[int, list[int]], right: dict[int, list[int]]) -> dict[str, Any]:
    """Whether the tokens of all prompts are right, and the first wrong one."""
    for length, tokens in found.items():
        if tokens != right[length]:
            at = next(at for at, (ours, theirs) in enumerate(zip(tokens, right[length], strict=True)) if ours != theirs)
            return {
                "verdict": "differs",
                "differs": at,
                "reason": f"prompt of {length} tokens, from token {at} of {NEW}",
            }
    varied = len({token for tokens in right.values() for token in tokens})
    return {"verdict": "exact", "reason": f"{varied} different tokens"}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--types", nargs="+", default=types(), metavar="TYPE", help="only these model types")
    arguments.add_argument("--page", type=Path, metavar="FILE", help="also write the table of docs/models.md to FILE")
    options = arguments.parse_args()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for kind in options.types:
        row = {"type": kind, "verdict": "", "differs": None, "reason": "", "attention": ""} | verdict(kind)
        rows.append(row)
        print(f"{kind:28} {row['verdict']:10} {' '.join(str(row['reason']).split())[:200]}", flush=True)
    counts = dict(Counter(row["verdict"] for row in rows))
    report(counts, {"new tokens": NEW, "prompts": sorted(SPLITS)}, None)
    if options.page is not None:
        options.page.write_text(page(rows, transformers.__version__))
    if options.json is not None:
        options.json.write_text(json.dumps(environment() | {"counts": counts, "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How fast are transformers, vLLM's CPU build and llama.cpp at the same work, in turns with this project in one run?

The model is SmolLM2-135M in bfloat16, the text is Python's language reference, and answers are greedy and of fixed
length. Each system has its own process, all threads, and its best settings. All get the same token ids, case by case in
turns, and a different system begins each turn. The machine's floors (read bandwidth and bfloat16 matrix products of the
same run) are measured before each turn. Cases: short prompts decoded together; one document (first token and decoding);
a passage of it repeated word for word, with speculation if a system supports it; questions on one document; documents;
and the same documents where each worker (or system) has room for the KV of only 40 % of one.

`benchmarks/peers/setup.sh` builds the environments of vLLM and llama.cpp; a system without its environment is left out.
transformers answers documents and questions one after the other, and llama.cpp computes prompts one after the other,
which takes minutes: there only some are measured, and the time of all is extrapolated (``measured`` says how many). The
JSON has a row for each system and case.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from _report import environment, parser, report
from _systems.cases import FULL, QUICK, Case, Sizes, cases
from _systems.comparison import Comparison
from _systems.floors import Model, measure
from _systems.process import System
from _systems.results import compared, tables
from _systems.weights import model_files

from distkv_dask.models.source import resolve_model

CORES = len(os.sched_getaffinity(0))
OURS = {f"distkv {CORES}x1": (CORES, 1), f"distkv 1x{CORES}": (1, CORES)}
"""Workers and threads of each of our systems."""
PEERS = {"transformers": "transformers", "vllm": "vllm", "vllm ngram": "vllm", "llama.cpp": "llama_cpp"}
"""Names of the peers, and the modules that drive them."""
SPREAD, SPREAD_OVER = 0.4, 3
"""Share of a document that a pool has room for in the last case, and the number of our workers there."""
POOLED = ("vllm", "llama.cpp")
"""Peers that have a pool of KV memory, too."""
BLOCK = 64
"""Tokens of one of our blocks."""
LONGEST = 8192
"""Maximum tokens of a sequence for which the model was trained."""


def systems(names: list[str], files: dict[str, str], sizes: Sizes, token_bytes: int) -> dict[str, System]:
    """Systems by name, with room for the KV of all cases."""
    tokens = sizes.documents * (sizes.tokens + sizes.extracted + 256) + 4096
    every = {"threads": CORES, "longest": LONGEST, "pool_tokens": None, **files}
    found: dict[str, System] = {}
    for name in names:
        workers, threads = OURS.get(name, (1, CORES))
        own = {"workers": workers, "threads": threads, "pool_bytes": -(-tokens // workers) * token_bytes}
        ngram = name == "vllm ngram"
        only = ("extraction",) if ngram else ()
        found[name] = System(PEERS.get(name, "distkv"), every | own | {"speculate": ngram}, only=only)
    return found


def small_systems(names: list[str], files: dict[str, str], sizes: Sizes, token_bytes: int) -> dict[str, System]:
    """The systems that have pools, each of which has room for a part of a document."""
    tokens = -(-int(SPREAD * sizes.tokens) // BLOCK) * BLOCK
    every = {"longest": LONGEST, "pool_tokens": tokens, "pool_bytes": tokens * token_bytes, "speculate": False, **files}
    own = {"workers": SPREAD_OVER, "threads": 1}
    ours = {f"distkv {SPREAD_OVER}x1": System("distkv", every | own, small=True)} if {*OURS} & {*names} else {}
    peers = {name: System(PEERS[name], every | {"threads": CORES}, small=True) for name in names if name in POOLED}
    return ours | peers


def installed(environments: Path) -> list[str]:
    """Names of the systems whose environments exist."""
    there = [name for name, driver in PEERS.items() if System(driver, {}).python(environments).exists()]
    return ["distkv", *there]


def titles(sizes: Sizes) -> dict[str, dict[str, str]]:
    """Titles of the tables, and the headings of their columns by case."""
    tokens = f"{sizes.tokens:,} tokens"
    return {
        f"{sizes.documents} documents of {tokens}, {sizes.new} new tokens each": {"documents": "all"},
        f"One document of {tokens}": {
            "first-token": "first token",
            "decode-6k": "each token after it",
            "extraction": "each token of a passage repeated word for word",
        },
        f"Short prompts, {sizes.new} new tokens each": {f"short-{n}": f"a step of {n}" for n in sizes.short},
        f"{sizes.questions} questions on one document, {sizes.answer} new tokens each": {"questions": "all"},
        f"The same {sizes.documents} documents, each pool with room for {SPREAD:.0%} of one": {"spread": "all"},
        "From the start of the process to the first answer, caches warm": {"start": "seconds"},
    }


def run(comparison: Comparison, names: list[str], todo: list[Case], sizes: Sizes, model: Model) -> None:
    """Run all cases but the last with one set of processes, then the last with a new process for each system."""
    files = model_files(comparison.environments, "llama.cpp" in names)
    if roomy := [case for case in todo if case.name != "spread"]:
        comparison.run(systems(names, files, sizes, model.kv_bytes), roomy)
    for case in todo:
        if case.name == "spread":
            for name, system in small_systems(names, files, sizes, model.kv_bytes).items():
                comparison.run({name: system}, [case])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--environments", type=Path, default=Path("build/peers"), help="what setup.sh has built")
    arguments.add_argument("--systems", nargs="+", choices=["distkv", *PEERS], help="default: all that are installed")
    arguments.add_argument("--only", nargs="+", metavar="CASE", help="only these cases, such as documents or short-8")
    arguments.add_argument("--turns", type=int, default=3, help="turns of each case; several documents: one")
    arguments.add_argument("--quick", action="store_true", help="use small sizes, whose figures have no meaning")
    options = arguments.parse_args()
    sizes, source = QUICK if options.quick else FULL, resolve_model("smollm2-135m")
    tokenizer: Any = source.tokenizer()

    def encode(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False)]

    everything = cases(encode("\n".join(topics[name] for name in sorted(topics))), encode, sizes)
    todo = [case for case in everything if options.only is None or case.name in options.only]
    if not todo:
        raise SystemExit(f"--only: the cases are {', '.join(case.name for case in everything)}")
    environments = options.environments.absolute()
    comparison = Comparison(environments, options.turns, lambda: measure(CORES, 1 << (20 if options.quick else 27)))
    model, before = Model.of(source.config().get_text_config()), os.getloadavg()[0]
    chosen = options.systems or installed(environments)
    names = [*(OURS if "distkv" in chosen else ()), *(name for name in PEERS if name in chosen)]
    environments.mkdir(parents=True, exist_ok=True)
    run(comparison, names, todo, sizes, model)
    found = compared(comparison.rows(model))
    print(tables(found, titles(sizes), f"{environment()['processor']}, {CORES} cores"), end="\n\n")
    figures = {
        "systems": comparison.about,
        "read_gb_per_s": comparison.machine.read / 1e9,
        "gemm_bf16_gflops": comparison.machine.gemm / 1e9,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "rows": found,
    }
    report(figures, {"turns": options.turns, **asdict(sizes)}, options.json)


if __name__ == "__main__":
    main()

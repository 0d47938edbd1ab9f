"""How close is MicroAttention to the limits of the machine: read bandwidth in decode, matrix products in prefill?

    python benchmarks/micro_attention.py --json results.json [--device cuda] [--only 64K]

Every figure is the best of several repetitions in which the roof, the kernels and other implementations take turns, so
that load from other processes affects all of them equally. `gbps` counts each key and value once; in the shared-prefix
cases it counts them once per question.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _report
import torch
from _roof import best_seconds, read_roof

from distkv_dask.kernels import (
    IMPLEMENTATIONS,
    PreparedAttention,
    advise_huge_pages,
    choose,
    micro_attention,
    native_kernel,
    numba_kernel,
)
from distkv_dask.kernels.instruction_sets import time_sets

BLOCK_TOKENS = 64
SHAPES = {"8 kv heads, group 4, d 128": (8, 4, 128), "3 kv heads, group 3, d 64": (3, 3, 64)}
CONTEXTS = {"8K": 8192, "64K": 65536, "512K": 524288}
QUESTIONS = 16
WINDOW, LONG = 1024, 65536

Rows = list[dict[str, Any]]


def pool(lengths: list[int], kv_heads: int, d: int, device: str) -> dict[str, Any]:
    """Bf16 pool with randomly placed blocks, as keyword arguments of micro_attention."""
    counts = [math.ceil(n / BLOCK_TOKENS) for n in lengths]
    storage = torch.empty(sum(counts), 2, kv_heads, BLOCK_TOKENS, d, dtype=torch.bfloat16, device=device)
    advise_huge_pages(storage)
    storage.view(torch.int16).random_(0x3C00, 0x3F00)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, ids in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        tables[row, : counts[row]] = ids
    return {
        "k_pool": storage[:, 0],
        "v_pool": storage[:, 1],
        "block_tables": tables.to(device),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
        "scale": d**-0.5,
    }


def flash(arguments: dict[str, Any], q: torch.Tensor) -> Callable[[], object]:
    """Torch's bf16 CPU flash attention over one row's KV, laid out contiguously beforehand (no paging to pay for)."""
    keys, values = (arguments[name].transpose(0, 1).flatten(1, 2)[None].contiguous() for name in ("k_pool", "v_pool"))
    folded = q.view(q.shape[0], keys.shape[1], -1, q.shape[2]).permute(1, 0, 2, 3).flatten(1, 2)[None]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return lambda: attend(folded, keys, values, 0.0, False, scale=arguments["scale"])


def call(impl: str, q: torch.Tensor, arguments: dict[str, Any], threads: int) -> Callable[[], object]:
    """A call of an implementation; on a GPU the prepared call of a layer."""
    if q.is_cuda and impl == "triton":
        fixed = {name: values for name, values in arguments.items() if name != "scale"}
        attention = PreparedAttention(*q.shape[:2], **fixed)
        return lambda: attention(q, arguments["k_pool"], arguments["v_pool"], arguments["scale"])
    return lambda: micro_attention(q, **arguments, threads=threads, implementation=impl)


def rivals(device: str, slow: bool) -> list[str]:
    """Implementations to compare: the one that would be chosen, and alternatives."""
    served = choose(device, torch.bfloat16, 128, BLOCK_TOKENS).name
    useless = {served, "reference", "native", "triton", "native:portable"}
    useless |= {name for name in IMPLEMENTATIONS if "model" in name}  # software
    if device != "cpu":
        useless |= {name for name in IMPLEMENTATIONS if name.startswith(("native", "numba"))}
    return [served] if slow else [served, *[name for name in IMPLEMENTATIONS if name not in useless]]


def use_the_fastest_sets() -> str:
    """Make 'native' use the instruction sets that an engine would choose on this machine; returns them, and why."""
    if native_kernel.missing() is not None:
        return "no C++ core"
    times = time_sets(torch.bfloat16)
    few, many = times.fastest()
    native_kernel.serve_with(torch.bfloat16, few=few, many=many)
    return f"decode {few}, prefill {many}, {times}"


def decode_case(name: str, lengths: list[int], shape: tuple[int, int, int], device: str, threads: int) -> Rows:
    """One decode case: every implementation compared with the roof."""
    kv_heads, group, d = shape
    arguments = pool(lengths, kv_heads, d, device)
    q = torch.randn(len(lengths), kv_heads * group, d, device=device).bfloat16()
    roof, roof_bytes = read_roof(device, threads)
    runs: dict[str, Callable[[], object]] = {"roof": roof}
    for impl in rivals(device, slow=False):
        runs[impl] = call(impl, q, arguments, threads)
    if device == "cpu" and len(lengths) == 1:
        runs["flash, contiguous KV"] = flash(arguments, q)
    best = best_seconds(runs, device)
    size = sum(lengths) * 2 * kv_heads * d * 2
    return [row(name, threads, impl, size / best[impl], roof_bytes / best["roof"]) for impl in runs if impl != "roof"]


def shared_case(name: str, tokens: int, shape: tuple[int, int, int], device: str, threads: int) -> Rows:
    """Sixteen questions over one prefix: stacked into one row, and one by one."""
    kv_heads, group, d = shape
    arguments = pool([tokens], kv_heads, d, device)
    q = torch.randn(QUESTIONS, kv_heads * group, d, device=device).bfloat16()
    stacked = torch.tensor([0, QUESTIONS], dtype=torch.int32, device=device)
    impl = rivals(device, slow=True)[0]
    roof, roof_bytes = read_roof(device, threads)

    separate = [call(impl, question, arguments, threads) for question in q.split(1)]
    runs = {
        "roof": roof,
        f"{impl}, stacked": call(impl, q, arguments | {"query_offsets": stacked}, threads),
        f"{impl}, one by one": lambda: [run() for run in separate],
    }
    best = best_seconds(runs, device)
    size = QUESTIONS * tokens * 2 * kv_heads * d * 2
    return [row(name, threads, run, size / best[run], roof_bytes / best["roof"]) for run in runs if run != "roof"]


def prefill_case(
    name: str, queries: int, tokens: int, shape: tuple[int, int, int], causal: bool, device: str, threads: int
) -> Rows:
    """One prefill chunk compared with the matrix-product rates."""
    kv_heads, group, d = shape
    arguments = pool([tokens], kv_heads, d, device)
    arguments["query_offsets"] = torch.tensor([0, queries], dtype=torch.int32, device=device)
    if causal:
        arguments |= {"causal": True, "q_start": torch.tensor([tokens - queries], dtype=torch.int32, device=device)}
    q = torch.randn(queries, kv_heads * group, d, device=device).bfloat16()
    size = 2048
    runs: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        runs[str(dtype)] = lambda a=a, b=b: a @ b
    for impl in rivals(device, slow=False):
        runs[impl] = call(impl, q, arguments, threads)
    if device == "cpu" and not causal:
        runs["flash, contiguous KV"] = flash(arguments, q)
    best = best_seconds(runs, device)
    pairs = queries * tokens - (queries * (queries - 1) // 2 if causal else 0)
    work = 4 * pairs * kv_heads * group * d
    gemm = {f"gemm_{kind}_gflops": round(2 * size**3 / best[dtype] / 1e9, 1)
            for kind, dtype in (("bf16", "torch.bfloat16"), ("fp32", "torch.float32"))}  # fmt: skip
    rows = []
    for impl in list(runs)[2:]:
        gflops = round(work / best[impl] / 1e9, 1)
        ratio = round(gflops / gemm["gemm_bf16_gflops"], 3)
        rows.append({"case": name, "threads": threads, "impl": impl, "gflops": gflops, "ratio": ratio, **gemm})
    return rows


def window_case(name: str, queries: int, shape: tuple[int, int, int], device: str, threads: int) -> Rows:
    """The last queries of a long row with a sliding window, compared with a row that consists of their windows only."""
    kv_heads, group, d = shape
    q = torch.randn(queries, kv_heads * group, d, device=device).bfloat16()
    runs: dict[str, Callable[[], object]] = {}
    for tokens in (LONG, WINDOW + queries - 1):
        arguments, start = pool([tokens], kv_heads, d, device), tokens - queries
        positions = torch.arange(start, tokens, dtype=torch.int32, device=device)
        arguments |= {
            "query_offsets": torch.tensor([0, queries], dtype=torch.int32, device=device),
            "causal": True, "q_start": torch.tensor([start], dtype=torch.int32, device=device),
            "first_keys": positions - (WINDOW - 1),
        }  # fmt: skip
        for impl in rivals(device, slow=False):
            runs[f"{impl}, {tokens}"] = call(impl, q, arguments, threads)
    best = best_seconds(runs, device)
    rows = []
    for impl in rivals(device, slow=False):
        there, alone = best[f"{impl}, {LONG}"], best[f"{impl}, {WINDOW + queries - 1}"]
        rows.append({"case": name, "threads": threads, "impl": impl, "us": round(there * 1e6, 1),
                     "us_alone": round(alone * 1e6, 1), "ratio": round(there / alone, 3)})  # fmt: skip
    return rows


def latent_case(name: str, heads: int, device: str, threads: int) -> Rows:
    """Decode over latents of 576 numbers whose first 512 are the value, compared with the matrix-product rate."""
    d, dv, tokens = 576, 512, 16384
    arguments = pool([tokens], 1, d, device)
    arguments["v_pool"] = arguments["k_pool"][..., :dv]
    q = torch.randn(1, heads, d, device=device).bfloat16()
    a, b = torch.randn(2, 2048, 2048, device=device).bfloat16()
    runs: dict[str, Callable[[], object]] = {"gemm": lambda: a @ b}
    for impl in rivals(device, slow=False):
        runs[impl] = call(impl, q, arguments, threads)
    best = best_seconds(runs, device)
    gemm = 2 * 2048**3 / best["gemm"]
    rows = []
    for impl in list(runs)[1:]:
        rate = 2 * heads * tokens * (d + dv) / best[impl]
        rows.append({"case": name, "threads": threads, "impl": impl, "gflops": round(rate / 1e9, 1),
                     "gbps": round(tokens * d * 2 / best[impl] / 1e9, 2), "gemm_bf16_gflops": round(gemm / 1e9, 1),
                     "ratio": round(rate / gemm, 3)})  # fmt: skip
    return rows


def row(name: str, threads: int, impl: str, rate: float, roof: float) -> dict[str, Any]:
    """One decode result; rates in bytes per second."""
    gbps, roof_gbps = round(rate / 1e9, 2), round(roof / 1e9, 2)
    return {"case": name, "threads": threads, "impl": impl, "gbps": gbps, "roof_gbps": roof_gbps,
            "ratio": round(rate / roof, 3)}  # fmt: skip


def cases(device: str) -> list[tuple[str, Callable[[int], Rows]]]:
    """All cases: a name and a callable that takes a thread count."""
    found: list[tuple[str, Callable[[int], Rows]]] = []

    def add(name: str, run: Callable[..., Rows], *arguments: Any) -> None:
        found.append((name, lambda threads: run(name, *arguments, device, threads)))

    for label, shape in SHAPES.items():
        for context, tokens in CONTEXTS.items():
            add(f"decode {context}, {label}", decode_case, [tokens], shape)
        add(f"shared prefix 64K, 16 questions, {label}", shared_case, 65536, shape)
    ragged = [1000 + 900 * i for i in range(16)]
    add("decode 16 ragged sequences, 8 kv heads, group 4, d 128", decode_case, ragged, (8, 4, 128))
    for label, shape in SHAPES.items():
        add(f"prefill 512 after 6K, full, {label}", prefill_case, 512, 6144, shape, False)
        add(f"prefill 512 at 6K, causal, {label}", prefill_case, 512, 6144, shape, True)
        add(f"prefill first 512, causal, {label}", prefill_case, 512, 512, shape, True)
        add(f"decode, window 1K of 64K, {label}", window_case, 1, shape)
        add(f"prefill 512, window 1K of 64K, {label}", window_case, 512, shape)
    for heads in (16, 128):
        add(f"decode 16K latents, {heads} heads", latent_case, heads)
    return found


def environment(device: str) -> dict[str, Any]:
    """Machine and versions."""
    machine = _report.environment()
    on_cpu = f"{machine['processor']}, {use_the_fastest_sets()}"
    hardware = torch.cuda.get_device_name() if device == "cuda" else on_cpu
    return {
        "commit": machine["commit"],
        "hardware": hardware,
        "torch": torch.__version__,
        "block_tokens": BLOCK_TOKENS,
    }


def main() -> None:
    """Run the cases, print a line for each result and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU thread counts")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    if options.device == "cpu" and "numba" in IMPLEMENTATIONS:
        numba_kernel.compiled(torch.bfloat16)  # compilation is not measured
    about = environment(options.device)
    print(about)
    results: Rows = []
    for threads in options.threads if options.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        for name, run in cases(options.device):
            if options.only in name:
                for result in run(threads):
                    print(result, flush=True)
                    results.append(result)
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

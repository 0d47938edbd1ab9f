"""Performance models that need no measurement: published figures of an A100, and our own of a small CPU worker."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.scheduler.costs.model import Curve, Link, PerformanceModel, Shape

LINKS = {
    "nvlink": Link(latency=10e-6, bandwidth=300e9),
    "pcie": Link(latency=15e-6, bandwidth=25e9),
    "ib-200": Link(latency=10e-6, bandwidth=25e9),
    "10gbe": Link(latency=30e-6, bandwidth=1.25e9),
    "1gbe": Link(latency=50e-6, bandwidth=125e6),
}
"""Links by name: one-way latency in seconds, bytes per second."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A model on a kind of worker.

    Parameters
    ----------
    model
        The performance model.
    kv_tokens
        Tokens of KV that a worker has room for.
    per_host
        Workers of one host.
    launch
        Seconds of a decode step that do not shrink when several workers share it.
    weight_tokens
        Tokens of KV that the model's weights would have room for.
    """

    model: PerformanceModel
    kv_tokens: int
    per_host: int
    launch: float
    weight_tokens: int


def _a100_7b() -> Preset:
    """LLaMA2-7B in fp16 on A100-80GB: 6.74e9 parameters, 32 layers, hidden size 4096, no grouped queries.

    HBM 2.04 TB/s (weights reach 80 % of it, paged attention 70 %); 312 TFLOP/s (prefill reaches 60 %).
    A decode step has about 1.6 ms of launches, and 50 us per sequence that no batch hides (sampling, block tables). Of
    90 % of 79.2 GiB, weights and 2 GB of activations leave 61e9 bytes: 116,000 tokens.
    """
    parameters, layers, hidden = 6.74e9, 32, 4096
    kv_bytes = 2 * layers * hidden * 2
    flops = 0.6 * 312e12
    curve = Curve(
        step=2 * parameters / (0.8 * 2.04e12) + 1.6e-3,
        row=50e-6,
        token=kv_bytes / (0.7 * 2.04e12),
        prompt=2 * parameters / flops,
        pair=4 * layers * hidden / flops,
    )
    shape = Shape(layers, kv_bytes, query_bytes=2 * hidden, partial_bytes=2 * hidden)
    model = PerformanceModel(shape, curve, LINKS["nvlink"], LINKS["1gbe"])
    weights = round(2 * parameters / kv_bytes)
    return Preset(model, kv_tokens=116_000, per_host=8, launch=1.6e-3, weight_tokens=weights)


def _cpu_smollm2() -> Preset:
    """SmolLM2-135M in bfloat16 on one thread of a Zen 4 core, as measured: 1 GiB of KV, Unix sockets."""
    curve = Curve(step=50e-3, row=1.7e-3, token=2.1e-6, prompt=1.9e-3, pair=0.7e-6)
    shape = Shape(layers=30, kv_bytes=23_040, query_bytes=2304, partial_bytes=2340)
    socket = Link(latency=15e-6, bandwidth=3e9)
    model = PerformanceModel(shape, curve, socket, LINKS["10gbe"])
    return Preset(model, kv_tokens=46_000, per_host=4, launch=5e-3, weight_tokens=11_000)


PRESETS = {"a100-7b": _a100_7b(), "cpu-smollm2": _cpu_smollm2()}

PRESET = PRESETS["cpu-smollm2"].model
"""The model for workers that were not timed."""

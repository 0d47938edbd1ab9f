"""All workers as one instance, as engines without a distributed cache build it: the baseline vLLM-single."""

from __future__ import annotations

from dataclasses import replace

from distkv_dask.scheduler.costs.model import Curve
from distkv_dask.scheduler.costs.presets import Preset


def one_instance(preset: Preset, workers: int, *, pipeline: bool = True) -> Curve:
    """Costs of ``workers`` GPUs as one instance: tensor parallel inside a host, a pipeline from host to host.

    This is the best known form over a slow network. Without ``pipeline`` all GPUs are tensor parallel, as in engines of
    early 2024: a host's share of each all-reduce crosses the network in both directions. Attention and arithmetic are
    divided by all GPUs. In each turn of the pipeline every stage reads its weights once for each microbatch (as many as
    stages), all layers pay two all-reduces, and a token's hidden state crosses the network at the link's rate; rows and
    prompt tokens cost the slower of this and the arithmetic.
    """
    shape, curve = preset.model.shape, preset.model.curve
    width = min(workers, preset.per_host)
    hidden = shape.query_bytes
    inside, between = preset.model.inside, preset.model.between
    reduce_latency = 0.0 if width == 1 else 2 * shape.layers * 2 * inside.latency
    reduce_token = 0.0 if width == 1 else 2 * shape.layers * 2 * hidden / inside.bandwidth
    hop = hidden / between.bandwidth if workers > width else 0.0
    if not pipeline and workers > width:
        reduce_latency += 2 * shape.layers * 2 * between.latency
        reduce_token += 2 * shape.layers * 2 * hidden / between.bandwidth
        width, hop = workers, 0.0
    return Curve(
        step=preset.launch + (curve.step - preset.launch) / width + reduce_latency,
        row=max(curve.row + reduce_token, hop),
        token=curve.token / workers,
        prompt=max(curve.prompt / workers + reduce_token, hop),
        pair=curve.pair / workers,
    )


def as_one(preset: Preset, workers: int, *, pipeline: bool = True) -> Preset:
    """The preset of a cluster whose only worker has the memory of ``workers`` workers.

    Each GPU keeps only its share of the weights, so the instance has more room for KV than the workers together.
    """
    model = replace(preset.model, curve=one_instance(preset, workers, pipeline=pipeline))
    spare = preset.weight_tokens * (workers - 1)
    return replace(preset, model=model, kv_tokens=preset.kv_tokens * workers + spare, per_host=1)

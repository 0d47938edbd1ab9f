"""The performance model of an engine, fitted to its workers' own timings. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.scheduler.costs.model import Curve, Link, PerformanceModel, Shape, fit_decode

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def fit_model(
    geometry: Geometry, measured: Mapping[str, Measurement | None], preset: PerformanceModel
) -> PerformanceModel:
    """Curves of all workers that were measured, with the preset for missing values.

    The curve of other workers is the first measured one's, and the latency inside a host the median of those measured.
    """
    curves = {worker: fit_curve(one, preset.curve) for worker, one in measured.items() if one is not None}
    first = next((curves[worker] for worker, one in measured.items() if one is not None and one.decode), preset.curve)
    inside = preset.inside
    exchanges = [one.exchange for one in measured.values() if one is not None and one.exchange is not None]
    if exchanges:
        inside = Link(median(exchanges) / (2 * len(geometry.far_layers)), inside.bandwidth)
    return PerformanceModel(shape_of(geometry), first, inside, preset.between, curves)


def fit_curve(measured: Measurement, preset: Curve) -> Curve:
    """One worker's curve."""
    curve = replace(preset, step=0.0, row=0.0) if measured.attention and not measured.decode else preset
    if measured.attention:  # timed separately, since in a step of a small model it is below the noise
        (few, short), (many, long) = measured.attention[0], measured.attention[-1]
        curve = replace(curve, token=max(0.0, (long - short) / max(1, many - few)))
    if measured.decode and measured.attention:
        bare = [(batch, max(seconds - tokens * curve.token, 0.0)) for batch, tokens, seconds in measured.decode]
        step, row = _line(bare)
        curve = replace(curve, step=step, row=row)
    elif measured.decode:
        step, row, token = fit_decode(measured.decode)
        curve = replace(curve, step=step, row=row, token=token)
    if measured.prompt:
        tokens, _, seconds = measured.prompt[0]
        pair = curve.pair
        if len(measured.prompt) > 1:
            more, before, longer = measured.prompt[-1]
            pair = max(0.0, (longer - seconds) / (more * before))
        curve = replace(curve, prompt=max(0.0, seconds / tokens - pair * tokens / 2), pair=pair)
    return curve


def _line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Non-negative intercept and slope of (batch, seconds)."""
    small, large = min(batch for batch, _ in samples), max(batch for batch, _ in samples)
    one, many = (fmean(seconds for batch, seconds in samples if batch == size) for size in (small, large))
    row = min(max(0.0, (many - one) / max(1, large - small)), one / small)
    return max(0.0, one - small * row), row  # rounding may make it slightly negative


def shape_of(geometry: Geometry) -> Shape:
    """A model's sizes in bytes: KV and queries in its dtype, partials (out and log-sum-exp) in float32."""
    size = _BYTES.get(geometry.dtype, 4)
    return Shape(
        layers=len(geometry.far_layers),
        kv_bytes=geometry.kv_numbers * size,
        query_bytes=geometry.heads * geometry.head_dim * size,
        partial_bytes=geometry.heads * (geometry.value_dim + 1) * 4,
    )

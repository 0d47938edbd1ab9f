"""Length of windows: within its bounds, within the scheduler's budget, and as short as both allow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distkv_dask.scheduler.costs.pacer import AIM, LEAST_FOR_DECODE, Pace, Pacer

paces = st.builds(
    Pace,
    watched=st.floats(0.01, 2),
    unwatched=st.floats(0.01, 5),
    longest=st.floats(0.01, 60),
    share=st.floats(0.01, 1),
)
rounds = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2000))


@given(paces, rounds, st.floats(0, 500), st.booleans())
def test_a_window_keeps_its_bounds_and_the_budget_and_is_no_longer_than_needed(pace, tasks, prefill, watched):
    pacer = Pacer(tasks, prefill_rate=prefill)
    seconds = pacer.window_seconds(pace, watched)
    wish = min(pace.watched, pace.unwatched) if watched else pace.unwatched
    assert wish <= seconds <= max(wish, pace.longest)
    decode = sum(tasks.values()) * pacer.task_seconds  # CPU seconds of a round of windows
    prompts = min(prefill * pacer.task_seconds, (1 - LEAST_FOR_DECODE) * AIM * pace.share)
    if seconds < pace.longest:
        assert decode / seconds + prompts <= AIM * pace.share * 1.000001
    if seconds > wish * 1.000001:
        assert decode / (seconds * 0.999) + prompts > AIM * pace.share or seconds == pace.longest


@given(paces, st.integers(1, 500), st.integers(1, 500), st.booleans())
def test_more_workers_never_make_windows_shorter(pace, few, more, watched):
    small, large = Pacer({"engine": few}), Pacer({"engine": few + more})
    assert small.window_seconds(pace, watched) <= large.window_seconds(pace, watched)


@given(st.floats(0.0005, 0.009), st.integers(1, 600), st.floats(0, 0.08))
def test_the_scheduler_keeps_its_share_whatever_a_task_costs_there(cost, tasks, idle):
    """``idle`` is the share of a core that the scheduler uses without tasks."""
    pacer, pace = Pacer(), Pace(watched=0.25, unwatched=1.0, longest=100.0, share=0.2)
    for _ in range(30):
        pacer.measured(10.0, 10 * idle, 0, others=0)
    pacer.rounds["engine"] = tasks
    for _ in range(100):
        rate = tasks / pacer.window_seconds(pace, watched=True)
        pacer.measured(10.0, 10 * (idle + rate * cost), round(10 * rate), others=0)
    ended = tasks / pacer.window_seconds(pace, watched=True)
    assert idle + ended * cost <= 0.2


def test_others_tasks_do_not_make_ours_look_cheap_or_dear():
    pacer = Pacer()
    before = pacer.task_seconds
    for _ in range(20):
        pacer.measured(1.0, 0.9, tasks=100, others=5000)
    assert pacer.task_seconds == before


def test_prompts_and_windows_share_the_budget():
    pacer, pace = Pacer({"engine": 100}), Pace(watched=0.25, unwatched=1.0, longest=100.0, share=0.2)
    alone = pacer.window_seconds(pace, watched=True)
    for _ in range(40):
        pacer.prefilled(30)
        pacer.measured(1.0, 30 * pacer.task_seconds, tasks=30, others=0)
    assert pacer.window_seconds(pace, watched=True) > 1.5 * alone

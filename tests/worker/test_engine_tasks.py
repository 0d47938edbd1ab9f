"""Tasks of an engine's gangs on a worker, and the messages that its gManager gets at each beginning and end."""

from __future__ import annotations

from concurrent.futures import CancelledError
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from _open_engine import GANG, W1, WINDOW, Open

from distkv_dask.errors import ChannelError, DistKVError, EngineClosedError, GangAbortedError
from distkv_dask.gang import Attended, WindowResult
from distkv_dask.messages import from_worker as did
from distkv_dask.worker import engine as engine_module


@pytest.fixture
def made() -> Open:
    return Open()


# Windows


def test_a_window_is_told_from_its_beginning_to_its_tokens(made: Open) -> None:
    made.join()
    assert made.engine.decode(WINDOW) == 2
    assert made.told == [
        did.WindowStarted("w0", 7),
        did.WindowDone("w0", 7, 0, WindowResult({5: [8, 9]}, {}, 2, 0.5), ("w1",)),
    ]
    assert made.runtime.decoded == [(replace(WINDOW, gang=replace(GANG, holders=(W1,))), [5])]
    made.engine.decode(WINDOW)
    (now,) = made.engine._batch.of_window(WINDOW)[0]
    assert now.length == 14


def test_a_window_without_sequences_computes_nothing_and_is_complete(made: Open) -> None:
    assert made.engine.decode(WINDOW) == 0
    assert not made.runtime.decoded
    assert made.told == [did.WindowStarted("w0", 7), did.WindowDone("w0", 7, 0, WindowResult({}, {}, 0, 0.0), ())]


def test_a_window_of_an_older_epoch_commits_nothing(made: Open) -> None:
    made.join()

    def superseded(*_: Any) -> WindowResult:
        made.engine.reset(1)
        return WindowResult({5: [8]}, {}, 1, 0.1)

    made.runtime.decode = superseded  # type: ignore[method-assign]
    with pytest.raises(GangAbortedError, match="superseded"):
        made.engine.decode(WINDOW)
    assert [type(one).__name__ for one in made.told] == ["WindowStarted", "GangFailed"]


FAILURES = [
    (ChannelError("w1 is gone"), ChannelError, "w1 is gone"),
    (ValueError("a bug"), DistKVError, "ValueError on worker w0 in gang-4: a bug"),
    (CancelledError(), EngineClosedError, "worker w0 closed its lanes before it ran gang-4"),
]


@pytest.mark.parametrize(("error", "kind", "words"), FAILURES, ids=lambda one: getattr(one, "__name__", None))
@pytest.mark.parametrize("task", ["decode", "attend"])
def test_a_gang_that_fails_here_is_told_once_with_an_error_that_travels(
    made: Open, task: str, error: BaseException, kind: type[Exception], words: str
) -> None:
    made.join()
    made.runtime.result = made.runtime.session = error
    with pytest.raises(type(error)):
        made.engine.decode(WINDOW) if task == "decode" else made.engine.attend(GANG)
    (failed,) = [one for one in made.told if isinstance(one, did.GangFailed)]
    assert (failed.gang, type(failed.error), str(failed.error)) == (4, kind, words)
    assert failed.error.__traceback__ is None


@pytest.mark.parametrize("task", ["decode", "attend"])
def test_a_gang_that_was_aborted_does_not_begin_and_tells_nothing(made: Open, task: str) -> None:
    made.join()
    made.engine.abort(4, "a holder died", unused=False)
    assert made.runtime.aborted == [(4, "a holder died")]
    with pytest.raises(GangAbortedError, match="gang gang-4 was aborted: a holder died"):
        made.engine.decode(WINDOW) if task == "decode" else made.engine.attend(GANG)
    assert made.told == []


def test_a_holder_that_was_not_needed_ends_without_an_error(made: Open) -> None:
    made.engine.abort(4, "nobody asked", unused=True)
    assert made.engine.attend(GANG) == Attended()
    assert made.told == []


def test_a_holder_says_what_it_did(made: Open) -> None:
    assert made.engine.attend(GANG) == Attended(requests=3, bytes_in=10, bytes_out=20)


def test_aborts_of_long_ago_are_forgotten(made: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_REMEMBERED", 3)
    for number in range(4, 8):
        made.engine.abort(number, "old", unused=False)
    made.engine.check(GANG)
    with pytest.raises(GangAbortedError):
        made.engine.check(replace(GANG, number=5))


# Forms


def test_forms_are_compiled_before_a_window_if_all_wait_for_them(made: Open) -> None:
    made.join(5, "[0-9]")
    made.join(6, "[a-z]")
    made.engine.prepare_window()
    assert made.model.compiled == ["[0-9]", "[a-z]"]
    assert made.engine._preparing is None


def test_forms_are_compiled_beside_the_windows_of_others(made: Open) -> None:
    made.join(5, "[0-9]")
    made.join(6)
    made.engine.prepare_window()
    assert made.engine._preparing is not None
    made.engine._preparing.join(20)
    assert made.model.compiled == ["[0-9]"]
    before = made.engine._preparing
    made.engine.prepare_window()
    assert made.engine._preparing is before, "nothing is left to do"


def test_closing_waits_for_what_is_compiled(made: Open) -> None:
    order: list[str] = []
    made.runtime.close = lambda: order.append("runtime")  # type: ignore[attr-defined]
    made.engine.files = SimpleNamespace(close=lambda: order.append("files"))  # type: ignore[assignment]
    made.engine._preparing = SimpleNamespace(join=lambda: order.append("forms"))  # type: ignore[assignment]
    made.engine.close()
    assert order == ["runtime", "files", "forms"]

"""All messages between processes survive Dask's serialisation, whatever values they hold."""

from __future__ import annotations

import dataclasses
import inspect
from array import array
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from distributed.protocol import dumps, loads
from hypothesis import given, settings
from hypothesis import strategies as st

from distkv_dask import errors
from distkv_dask.adapter import Adapter
from distkv_dask.config import Config
from distkv_dask.gang import SequenceState
from distkv_dask.messages import client_calls, from_worker, names, status, to_worker
from distkv_dask.messages.names import FROM_WORKER, TO_WORKER, pack, unpack
from distkv_dask.placement import Placement
from distkv_dask.sampling import SamplingParams
from distkv_dask.version import VERSION
from distkv_dask.worker.rmanager import RManager

MODULES = (client_calls, from_worker, names, status, to_worker)


def messages_of(module: ModuleType) -> list[type]:
    """The dataclasses and named tuples that a module defines."""
    found = (one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__)
    return [one for one in found if dataclasses.is_dataclass(one) or hasattr(one, "_fields")]


MESSAGES = [one for module in MODULES for one in messages_of(module)]
ERRORS = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, errors.DistKVError)]

words = st.text(max_size=8)
numbers = st.integers(-(2**62), 2**62)
a_sampling = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    top_k=st.integers(0, 9),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.5, 2),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2),
    ignore_eos=st.booleans(),
    priority=st.integers(-100, 100),
) | st.sampled_from(
    [SamplingParams(schema={"type": "object"}), SamplingParams(regex="[a-z]+"), SamplingParams(grammar='start: "é"')]
)


def an_error(kind: type) -> st.SearchStrategy[Exception]:
    return st.builds(kind, words, numbers) if kind is errors.PlanError else st.builds(kind, words)


st.register_type_strategy(int, numbers)
st.register_type_strategy(str, words)
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(SamplingParams, a_sampling)
st.register_type_strategy(Exception, st.one_of([an_error(one) for one in ERRORS]))


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda some: array("i", some))
an_adapter = st.none() | st.builds(Adapter, words, words)
GIVEN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "EngineSpec": {
        "engine": words,
        "model": words,
        "dtype": words,
        "token": words,
        "config": st.builds(Config.load, window_seconds=st.floats(0.1, 2)),
        "rope_scaling": st.none() | st.just({"rope_type": "yarn", "factor": 4.0}),
        "span": st.none() | st.just({"name": ("a",), "ids": ("b",)}),
    },
    "Generate": {
        "number": numbers,
        "prompt": tokens,
        "sampling": a_sampling,
        "streamed": st.booleans(),
        "document": st.none() | numbers,
        "keeps": st.booleans(),
        "choices": st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple), max_size=3).map(tuple),
        "adapter": an_adapter,
    },
    "Ingest": {"number": numbers, "prompt": tokens, "name": words, "adapter": an_adapter},
    "Load": {
        "number": numbers,
        "prompt": tokens,
        "saved": st.from_type(names.Saved),
        "name": words,
        "adapter": an_adapter,
    },
}
"""Values of fields whose types do not say enough about them."""
GIVEN["Attached"] = {
    "spec": st.builds(names.EngineSpec, **GIVEN["EngineSpec"]),
    "facts": st.from_type(client_calls.EngineFacts),
    "handle": numbers,
}
a_state = st.builds(
    SequenceState,
    numbers,
    st.from_type(Placement),
    *[numbers] * 3,
    a_sampling,
    tokens,
    st.lists(numbers, max_size=5).map(tuple),
)
st.register_type_strategy(SequenceState, a_state)
st.register_type_strategy(names.EngineSpec, st.builds(names.EngineSpec, **GIVEN["EngineSpec"]))


def sent(message: Any) -> Any:
    """A message as it arrives in another process through Dask's comms."""
    frames = [bytes(frame) for frame in dumps({"op": "op", "message": pack(message)})]
    return unpack(loads(frames)["message"])


def plain(value: Any) -> Any:
    """A value in which errors are replaced by their class and arguments, so that they can be compared."""
    if isinstance(value, Exception):
        return type(value), value.args, str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        return type(value), [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_arrives_as_it_was_sent_whatever_it_holds(kind: type) -> None:
    @settings(max_examples=25, deadline=None, database=None)
    @given(st.builds(kind, **(dict.fromkeys(fields(kind), ...) | GIVEN.get(kind.__name__, {}))))
    def travel(message: Any) -> None:
        assert plain(sent(message)) == plain(message)

    travel()


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else [*kind._fields]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kind", [one for one in MESSAGES if dataclasses.is_dataclass(one)], ids=lambda one: one.__name__
)
def test_no_message_can_be_changed_or_given_fields_that_nobody_knows(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)
    with pytest.raises(TypeError, match="unexpected keyword"):
        kind(unknown=1)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_the_class_that_was_raised_with_all_that_it_knows(kind: type[Exception]) -> None:
    about_a_sequence = kind in (errors.PlanError, errors.StateLostError)
    error = kind("why", 7) if about_a_sequence else kind("why")
    arrived = sent(error)
    assert type(arrived) is kind
    assert (arrived.args, str(arrived), vars(arrived)) == (error.args, str(error), vars(error))


def test_a_message_between_two_plugins_of_one_process_is_the_same_object() -> None:
    message = to_worker.Reserve("tcp://a", 7, 0, 8)
    assert unpack(pack(message)) is message
    assert unpack(message) is message


def test_hello_is_of_plain_values_that_any_version_can_read() -> None:
    told: list[dict[str, Any]] = []

    class Stream(NamedTuple):
        send: Any

    class Worker(NamedTuple):
        batched_stream: Stream

    manager = RManager()
    manager.worker = Worker(Stream(told.append))  # type: ignore[assignment]
    manager._send()
    assert told == [{"op": FROM_WORKER, "version": VERSION, "engine": ""}]
    assert all(type(value) is str for value in told[0].values())
    assert TO_WORKER != FROM_WORKER

"""Anything that goes wrong with one row, wherever it happens, is that row's error and costs no other row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_runner import FakeEngine, Queue

from distkv_dask.client.batch import job as job_module
from distkv_dask.client.batch import runner as runner_module
from distkv_dask.client.batch.job import Job
from distkv_dask.client.batch.rows import Content, Row
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.client.batch.target import Target
from distkv_dask.completion import Completion
from distkv_dask.config import Config
from distkv_dask.errors import EngineClosedError, InvalidRequestError, SourceError
from distkv_dask.messages.client_calls import EngineFacts
from distkv_dask.sampling import SamplingParams
from tests._examples import examples

KEPT = pa.schema([("id", pa.int64()), ("when", pa.timestamp("s"))])


class Engine(FakeEngine):
    """A fake engine with everything that a batch needs."""

    config = Config.load(block_tokens=4)
    facts = EngineFacts(10_000, 100, 1, "float32", "f00d", 1)
    model = SimpleNamespace(name="m", rope_scaling=None)
    dtype = "float32"

    def __init__(self, answer: Callable[[str], str] = lambda text: f"re {text}") -> None:
        super().__init__(lambda *_: None)
        self.answer = answer
        self.store = SimpleNamespace(
            begin_ingest=lambda ids, adapter=None: SimpleNamespace(number=7), end=lambda number: None
        )

    def adapter(self, path: Any) -> None:
        """Requests of these tests have no adapter."""
        assert path is None

    def in_span(self, *tags: str) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def submit(self, prompt: list[int], sampling: SamplingParams) -> Any:
        generation = super().submit(prompt[:80], sampling)
        text, _ = self.flying.pop()
        self.flying.append((text, generation))
        return generation

    def land(self) -> None:
        flying, self.flying = self.flying[::-1], []
        for text, generation in flying:
            generation.set_result(Completion(self.answer(text), (1, 2), len(text), "length"))


class Rows:
    """A source of rows, some of which may be any object."""

    label = "row"
    kept = KEPT
    fields = ("text", "price")

    def __init__(self, values: list[Any], kept: list[Any] | None = None) -> None:
        self.values, self._kept = values, kept

    def count(self) -> int:
        return len(self.values)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for at, values in enumerate(self.values):
            if at < start:
                continue
            if isinstance(values, BaseException) and not isinstance(values, Exception):
                raise SystemError("not of this test")
            kept = pa.RecordBatch.from_pylist([{"id": at, "when": 0}], KEPT)
            if self._kept is not None and self._kept[at] is not None:
                kept = self._kept[at]
            yield Row(at, f"f{at}", kept, lambda values=values: self._read(values))  # type: ignore[misc]

    def _read(self, values: Any) -> Content:
        if isinstance(values, Exception):
            raise values
        return Content({"text": "", "price": None, **values})


@pytest.fixture(autouse=True)
def landing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners wait for the fake engine."""
    made = runner_module.Runner

    def with_queue(engine: Any, spec: BatchSpec, in_flight: int) -> Any:
        runner = made(engine, spec, in_flight)
        runner._ended = Queue(engine)  # type: ignore[assignment]
        return runner

    monkeypatch.setattr(job_module, "Runner", with_queue)


def write(path: Path, source: Any, spec: BatchSpec, engine: Any = None) -> list[dict[str, Any]]:
    Job(engine or Engine(), source, spec).write(Target(path), False, False)
    return answers(path)


def answers(path: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = (
        pq.read_table(path).sort_by([("row", "ascending"), ("question", "ascending")]).to_pylist()
    )
    return table


class Odd(Exception):
    """An error of another library, whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def texts(*values: str) -> list[Any]:
    return [{"text": value} for value in values]


def test_whatever_reading_a_row_raises_is_its_error(tmp_path: Path) -> None:
    values = [
        *texts("a"),
        KeyError("x"),
        Odd(),
        MemoryError(),
        RecursionError("deep"),
        UnicodeError("\ud83d"),
        *texts("b"),
    ]
    found = write(tmp_path / "out", Rows(values), BatchSpec())
    assert [one["answer"] for one in found] == ["re a", None, None, None, None, None, "re b"]
    assert [one["error"] for one in found[1:4]] == [
        "KeyError: 'x'",
        "Odd: it gives no reason",
        "MemoryError: it gives no reason",
    ]
    assert "ud83d" in found[5]["error"]


def test_a_template_that_a_rows_values_do_not_fit_is_the_error_of_that_row(tmp_path: Path) -> None:
    values = [{"text": "a", "price": price} for price in (1.5, None, "dear", 2)]
    found = write(tmp_path / "out", Rows(values), BatchSpec(template="{text} {price:.2f}"))
    assert [one["answer"] for one in found] == ["re a 1.50", None, None, "re a 2.00"]
    assert all("{price:.2f} cannot be filled in" in found[at]["error"] for at in (1, 2))


def test_answers_that_are_no_object_of_the_schema_are_errors_and_keep_their_text(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    said = {"a": "[1]", "b": '{"n": 7}', "c": "null", "d": '{"n": "x"}', "e": "{", "f": '{"n": 1e400}', "g": '{"n": 3}'}
    spec = BatchSpec(sampling=SamplingParams(schema={"properties": {"n": {"type": "integer"}}}))
    found = write(tmp_path / "out", Rows(texts(*said)), spec, Engine(lambda text: said[text]))
    assert [one["n"] for one in found] == [None, 7, None, None, None, None, 3]
    assert [one["error"] is None for one in found] == [False, True, False, False, False, False, True]
    assert [one["answer"] for one in found] == list(said.values())


def test_values_that_the_output_cannot_hold_are_errors_of_their_rows(tmp_path: Path) -> None:
    far = pa.RecordBatch.from_pydict({"id": [1], "when": [2**62]}, KEPT)  # no such time in a Parquet file
    other = pa.RecordBatch.from_pydict({"id": ["x"], "when": [0]})
    found = write(tmp_path / "out", Rows(texts("a", "b", "c", "d"), [None, far, other, None]), BatchSpec())
    assert [one["error"] is None for one in found] == [True, False, False, True]
    assert [one["id"] for one in found] == [0, None, None, 3]
    assert [one["answer"] for one in found] == ["re a", "re b", "re c", "re d"]


STEPS = [
    ("distkv_dask.client.batch.spec.BatchSpec.render", 1),
    ("distkv_dask.client.batch.row_documents.RowDocuments.begin_question", 1),
    ("distkv_dask.client.batch.runner.plan_answer", 1),
    ("distkv_dask.client.batch.answer_plan.prompt_ids", 1),
    ("distkv_dask.client.batch.answer_plan.Answer", 1),
    ("distkv_dask.client.batch.runner._Ask", 1),
    ("distkv_dask.client.batch.results.answer_values", 1),
]


@pytest.mark.parametrize("error", [ValueError("bad"), Odd(), MemoryError(), RuntimeError("\udcff"), StopIteration(3)])
@pytest.mark.parametrize(("step", "_"), STEPS)
def test_an_exception_in_any_step_of_one_row_ends_that_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, _: int, error: Exception
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    import importlib

    module, _dot, name = step.rpartition(".")
    try:
        holder: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        above, _dot, owner = module.rpartition(".")
        holder = getattr(importlib.import_module(above), owner)
    real, calls = getattr(holder, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, broken)
    spec = BatchSpec(sampling=SamplingParams(schema={"type": "object", "properties": {"n": {"type": "integer"}}}))
    found = write(tmp_path / "out", Rows(texts(*"abcdef")), spec, Engine(lambda text: '{"n": 7}'))
    assert len(found) == 6
    assert sum(one["error"] is not None for one in found) == 1
    assert [one["n"] for one in found if one["error"] is None] == [7] * 5


def test_a_source_that_breaks_ends_the_batch_after_what_was_begun_and_with_our_error(tmp_path: Path) -> None:
    class Broken(Rows):
        def rows(self, start: int = 0) -> Iterator[Row]:
            yield from super().rows(start)
            raise pa.ArrowInvalid("half a file")

    with pytest.raises(SourceError, match="any further: ArrowInvalid: half a file"):
        write(tmp_path / "out", Broken(texts("a", "b", "c")), BatchSpec())
    assert [one["answer"] for one in answers(tmp_path / "out")] == ["re a", "re b", "re c"]


def test_rows_answered_with_the_one_that_finds_the_engine_closed_are_kept(tmp_path: Path) -> None:
    engine = Engine()
    engine.fate = lambda text, _: EngineClosedError("gone") if text == "a" else None
    engine.land = lambda: FakeEngine.land(engine)  # type: ignore[method-assign]
    with pytest.raises(EngineClosedError):
        write(tmp_path / "out", Rows(texts("a", "b", "c")), BatchSpec(), engine)
    assert [one["answer"] for one in answers(tmp_path / "out")] == ["re b", "re c"]


def test_what_can_never_work_is_one_error_at_the_start() -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    for options in (
        {"template": "{text:.2f}"},
        {"template": "{text!x}"},
        {"template": "{text} {price!x}"},
        {"template": "{text:{price}}"},
        {"questions": ("Who?\ud83d",)},
        {"template": "{text} \ud83d"},
        *(
            {"sampling": SamplingParams(schema=schema)}
            for schema in (
                {"type": "nonsense"},
                {"properties": []},
                {"type": "integer", "minimum": 3, "maximum": 1},
                {"enum": []},
                {"not": {}},
                {"$ref": "#/nowhere"},
                {"type": "array", "properties": {"n": {}}},
                {"type": "object", "properties": {"n\ud83d": {"type": "string"}}},
            )
        ),
    ):
        with pytest.raises(InvalidRequestError):
            BatchSpec(**options)


def test_a_batch_of_which_no_row_can_be_answered_is_one_error_at_the_start(tmp_path: Path) -> None:
    from distkv_dask.client.tokenizer import Tokenizer

    with pytest.raises(InvalidRequestError, match="leaves no room for a prompt"):
        write(tmp_path / "out", Rows(texts("a")), BatchSpec(sampling=SamplingParams(max_new_tokens=10_000)))
    engine = Engine()
    engine.tokenizer = Tokenizer(None, 100)  # type: ignore[assignment]
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        write(tmp_path / "out", Rows(texts("a")), BatchSpec(), engine)
    assert not (tmp_path / "out").exists()


VALUES = (
    st.none()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.booleans()
    | st.binary(max_size=3)
)
FORMATS = st.sampled_from(["", ":.2f", ":d", ":>9", "!r", "!s:5", ":x", ":%Y"])


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(), max_size=6), VALUES), min_size=1, max_size=6), FORMATS)
def test_any_values_in_any_template_give_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, Any]], how: str
) -> None:
    source = Rows([{"text": text, "price": price} for text, price in values])
    found = write(tmp_path_factory.mktemp("out") / "out", source, BatchSpec(template=f"{{text}} {{price{how}}}"))
    assert [one["row"] for one in found] == list(range(len(values)))
    assert all((one["error"] is None) == (one["answer"] is not None) for one in found)


ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "s", "l", "o"]), inner, max_size=4)
    ),
    max_leaves=8,
).map(json.dumps) | st.text(max_size=5)
PROPERTIES = {
    "n": {"type": "integer"},
    "s": {"type": ["string", "null"]},
    "l": {"type": "array", "items": {"type": "number"}},
    "o": {"type": "object", "properties": {"n": {"type": "boolean"}}, "additionalProperties": False},
}


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=6))
def test_any_answers_to_a_schema_give_every_row_once(tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra: schema)")
    spec = BatchSpec(sampling=SamplingParams(schema={"type": "object", "properties": PROPERTIES}))
    names = [f"t{at}" for at in range(len(said))]
    engine = Engine(lambda text: said[int(text[1:])])
    found = write(tmp_path_factory.mktemp("out") / "out", Rows(texts(*names)), spec, engine)
    assert [one["answer"] for one in found] == said

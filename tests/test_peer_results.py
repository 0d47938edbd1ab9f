"""How benchmarks/peers.py turns systems' answers into rows, floors, ratios and tables, tested with known times."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from _systems.cases import FULL, QUICK, Case, cases
from _systems.floors import Floor, Machine, Model, floor
from _systems.results import Run, compared, refused, rows, tables
from plots.peers import draw

MODEL = Model(linears=1_000_000, head=100_000, layers=10, heads=4, kv_heads=2, head_dim=8)
MACHINE = Machine(read=1e9, gemm=1e12)
DOCUMENTS = Case("documents", ((1,) * 100,) * 4, 11, few=(("slow", 2),))


def answered(seconds: float, *times: tuple[float, float], shared: float = 0.0) -> dict[str, Any]:
    firsts, ends = zip(*times, strict=True)
    tokens = [[7, 8]] * len(firsts)
    return {"seconds": seconds, "shared": shared, "firsts": firsts, "ends": ends, "tokens": tokens}


def test_all_systems_get_the_same_tokens_and_documents_have_no_common_beginning() -> None:
    everything = {case.name: case for case in cases(range(60_000), lambda text: [ord(one) for one in text], FULL)}
    assert len({prompt[0] for prompt in everything["documents"].prompts}) == FULL.documents
    assert {len(prompt) for prompt in everything["documents"].prompts} == {FULL.tokens}
    assert [len(everything[f"short-{n}"].prompts) for n in FULL.short] == [1, 8, 32]
    assert len({prompt[:8] for prompt in everything["short-32"].prompts}) == 32
    passage = everything["extraction"].prompts[0][-24:]
    document = everything["document"].prompts[0]
    assert any(document[at : at + 24] == passage for at in range(len(document)))
    assert len(everything["questions"].request("transformers")["prompts"]) == 4
    assert len(everything["questions"].request("vllm")["prompts"]) == FULL.questions


def test_a_model_of_known_shape_takes_the_operations_and_bytes_that_a_hand_count_gives() -> None:
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=10, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip
    model = Model.of(config)
    assert model.linears == 10 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert model.head == 3200
    assert model.kv_bytes == 10 * 2 * 2 * 8 * 2
    one = floor(MODEL, MACHINE, Case("document", ((1,) * 100,), 11))
    operations = 2 * 1_000_000 * 100 + 4 * 32 * 10 * 5050 + 2 * 100_000
    assert one.first == pytest.approx(operations / 1e12)
    assert one.step == pytest.approx((1_100_000 * 2 + 105.5 * 640) / 1e9)
    many = floor(MODEL, replace(MACHINE, read=1e15), Case("short-32", ((1,),) * 32, 2))
    assert many.step == pytest.approx((2 * 32 * 1_100_000 + 4 * 32 * 10 * 32 * 2) / 1e12), "arithmetic bounds it"
    shared = floor(MODEL, MACHINE, Case("questions", ((1,) * 10,) * 16, 2, document=(1,) * 1000))
    assert shared.step == pytest.approx((1_100_000 * 2 + (1000 + 176) * 640) / 1e9), "a document is read once"


def test_prompts_that_were_left_out_count_as_those_that_were_measured_and_shared_work_once() -> None:
    run = Run.of(answered(10.0, (2.0, 4.0), (7.0, 9.0), shared=2.0), 1.0, prompts=16)
    assert run.seconds == 2.0 + 8.0 * 8
    assert run.measured == 2
    assert run.step(new=11) == pytest.approx(0.2)


def test_rows_are_medians_and_ratios_are_to_the_floor_and_to_the_best_of_ours() -> None:
    limits = Floor(first=1.0, step=0.1)
    found = []
    for system, times in (("distkv 2x1", (8.0, 6.0, 7.0)), ("distkv 1x2", (9.0,)), ("vllm", (14.0,))):
        runs = [Run.of(answered(one, *[(1.0, one)] * 4), 0.5, prompts=4) for one in times]
        found += rows(system, DOCUMENTS, runs, limits)
    found.append(refused("llama.cpp", "documents", "no room"))
    plain = compared(found)
    assert [row.get("ratio_to_ours") for row in plain] == [1.0, 1.29, 2.0, None]
    first, _, vllm, none = plain
    assert vllm["begins_as_ours"] == 1.0
    assert (first["figure"], first["lowest"], first["highest"], first["ratio_to_floor"]) == (7.0, 6.0, 8.0, 3.5)
    assert vllm["decode_tps"] == pytest.approx(4 / 1.3, rel=1e-3)
    assert none == {"system": "llama.cpp", "case": "documents", "error": "no room"}
    text = tables(plain, {"Documents": {"documents": "all"}, "Start": {"start": "s"}}, "a processor")
    assert "| vllm | 14 s (7, 2.00) |" in text
    assert "| llama.cpp | refused: no room |" in text
    assert "Start" not in text, "nothing was measured"


def test_one_document_gives_a_first_token_and_a_rate_after_it() -> None:
    case = Case("document", ((1,) * 100,), 11)
    one, other = rows("vllm", case, [Run.of(answered(3.5, (2.5, 3.5)), 0.5, 1)], Floor(first=0.5, step=0.02))
    assert (one.case, one.figure, one.ratio_to_floor, one.prompt_tps) == ("first-token", 2.5, 5.0, 40.0)
    assert (other.case, other.figure, other.unit) == ("decode-6k", pytest.approx(100.0), "ms")
    assert other.ratio_to_floor == pytest.approx(5.0)


def test_the_picture_has_a_bar_for_each_row_and_its_floor() -> None:
    configuration = {"documents": QUICK.documents, "tokens": 300, "new": 6, "questions": 2, "answer": 3}
    row = {"case": "documents", "unit": "s", "ratio_to_floor": 4.0}
    found = [row | {"system": "<ours>", "figure": 8.0}, row | {"system": "vllm", "figure": 16.0}]
    found.append({"case": "spread", "system": "vllm", "error": "no room"})
    text = draw({"rows": found, "processor": "CPU", "cores": 2, "configuration": configuration})
    bars = [one for one in ElementTree.fromstring(text).iter() if one.tag.endswith("rect")][1:]
    ours, limit, theirs, _ = (float(bar.get("width", "")) for bar in bars)
    assert theirs == pytest.approx(2 * ours, abs=0.2)
    assert limit == pytest.approx(ours / 4, abs=0.2)

"""Models with DistAttention give the tokens of plain transformers, and those that would not are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from _models import FAMILIES, MAX_POSITIONS, model_dir, prompt_ids, reference_generate, save_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from distkv_dask.errors import ModelError, UnsupportedModelError
from distkv_dask.geometry import LayerKind
from distkv_dask.models.source import resolve_model
from distkv_dask.models.support import check_supported
from distkv_dask.worker.model.layer_kinds import MaskFunction, kind_of
from distkv_dask.worker.model.load import load_model
from distkv_dask.worker.model.loaded import LoadedModel
from distkv_dask.worker.model.probe import probe

NEW_TOKENS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class DenseStep:
    """The simplest attention step: every sequence's keys and values in one tensor per layer."""

    def __init__(self, sequences: int, kinds: Sequence[LayerKind] = ()) -> None:
        self.counts = [0] * sequences
        self.kinds = kinds
        self.kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        parts = zip(*(tensor.split(self.counts) for tensor in (q, k, v)), strict=True)
        return torch.cat([self._one(layer, at, *part, scale, sinks) for at, part in enumerate(parts) if len(part[0])])

    def _one(
        self, layer: int, sequence: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        before = self.kv.get((layer, sequence), (k[:0], v[:0]))
        k, v = torch.cat((before[0], k)), torch.cat((before[1], v))
        self.kv[layer, sequence] = k, v
        kind = self.kinds[layer] if self.kinds else LayerKind()
        visible = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        for row, at in zip(visible, range(len(k) - len(q), len(k)), strict=True):
            begin = {"full": 0, "sliding": at + 1 - kind.size, "chunked": at - at % (kind.size or 1)}[kind.visible]
            row[: max(0, begin)] = False
        group = q.shape[1] // k.shape[1]
        keys, values = (tensor.float().repeat_interleave(group, 1).transpose(0, 1) for tensor in (k, v))
        scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if kind.soft_cap:
            scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, len(q), 1)), -1)
        return (scores.softmax(-1)[..., : len(k)] @ values).transpose(0, 1).to(q.dtype)


def run(model: LoadedModel, step: DenseStep, pieces: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Feed each sequence its piece in one flattened call; returns the logits after each non-empty piece."""
    step.counts = [len(piece) for piece in pieces]
    tokens = torch.tensor([token for piece in pieces for token in piece])
    positions = torch.cat([torch.arange(at, at + len(p)) for at, p in zip(starts, pieces, strict=True)])
    ends = torch.tensor(step.counts).cumsum(0)[torch.tensor(step.counts) > 0] - 1
    return list(model.forward(tokens, positions, step, keep=ends))


def decode(model: LoadedModel, step: DenseStep, first: list[Tensor], lengths: list[int]) -> tuple[list, list]:
    """Continue greedily; returns tokens and logits of each sequence."""
    logits = [[row] for row in first]
    tokens = [[int(row.argmax())] for row in first]
    for done in range(NEW_TOKENS - 1):
        rows = run(model, step, [sequence[-1:] for sequence in tokens], [length + done for length in lengths])
        for at, row in enumerate(rows):
            logits[at].append(row)
            tokens[at].append(int(row.argmax()))
    return tokens, [torch.stack(rows) for rows in logits]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_plain_transformers(family: str) -> None:
    prompt = prompt_ids(33)
    (expected,) = reference_generate(model_dir(family), [prompt], NEW_TOKENS)
    assert len(set(expected.tokens)) > 5, "the reference must not be one token over and over"
    model = load_model(str(model_dir(family)), "float32", 1)
    step = DenseStep(1, model.geometry.layer_kinds)
    tokens, logits = decode(model, step, run(model, step, [prompt], [0]), [len(prompt)])
    assert tokens == [expected.tokens]
    torch.testing.assert_close(logits[0], expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_flattened_into_one_call_do_not_see_each_other(family: str) -> None:
    prompts = [prompt_ids(17, 1), prompt_ids(1, 2), prompt_ids(50, 3)]
    lengths = [len(prompt) for prompt in prompts]
    expected = reference_generate(model_dir(family), prompts, NEW_TOKENS, attention="eager")
    model = load_model(str(model_dir(family)), "float32", 1)
    step = DenseStep(3, model.geometry.layer_kinds)
    run(model, step, [prompts[0][:16], [], prompts[2][:20]], [0, 0, 0])
    first = run(model, step, [prompts[0][16:], prompts[1], prompts[2][20:]], [16, 0, 20])
    tokens, logits = decode(model, step, first, lengths)
    assert tokens == [one.tokens for one in expected]
    atol = (
        5e-4 if family == "gpt-oss" else 1e-4
    )  # products of experts combine other rows: 2.5e-4 on an Intel processor with AMX
    for ours, one in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, one.logits, rtol=0, atol=atol)


def test_smollm2_answers_as_in_plain_transformers() -> None:
    try:
        source = resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    prompt = source.tokenizer()("The capital of France is")["input_ids"]
    model, step = load_model("smollm2-135m", "float32", 1), DenseStep(1)
    tokens, logits = decode(model, step, run(model, step, [prompt], [0]), [len(prompt)])
    (expected,) = reference_generate(model._model.name_or_path, [prompt], NEW_TOKENS)
    assert tokens == [expected.tokens]
    torch.testing.assert_close(logits[0], expected.logits, rtol=0, atol=1e-4)
    assert model.eos_token_ids == {2}


def test_geometry_is_that_of_the_layers() -> None:
    geometry = load_model(str(model_dir("llama-mqa")), "bfloat16", 1).geometry
    assert (geometry.layers, geometry.heads, geometry.kv_heads, geometry.head_dim) == (2, 4, 1, 80)
    assert (geometry.vocab_size, geometry.max_positions, geometry.dtype) == (499, MAX_POSITIONS, "bfloat16")


@pytest.mark.parametrize("rows", [[6], [5, 2], []])
def test_only_kept_positions_get_logits(rows: list[int]) -> None:
    model, tokens = load_model(str(model_dir("llama-gqa")), "bfloat16", 1), torch.tensor(prompt_ids(7))
    steps = DenseStep(1), DenseStep(1)
    for step in steps:
        step.counts = [7]
    logits = model.forward(tokens, torch.arange(7), steps[0], torch.tensor(rows, dtype=torch.int64))
    everything = model.forward(tokens, torch.arange(7), steps[1])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, everything[rows])


def test_models_of_two_engines_run_at_once_on_their_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def tokens(family: str) -> list[int]:
        model, step = load_model(str(model_dir(family)), "float32", 1), DenseStep(1)
        return decode(model, step, run(model, step, [prompt_ids(9)], [0]), [9])[0][0]

    families = ["llama-gqa", "phi3"]
    for family in families:
        model_dir(family)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(tokens, families)) == [tokens(family) for family in families]


def config(kind: str, **settings: object) -> transformers.PreTrainedConfig:
    return transformers.CONFIG_MAPPING[kind](**settings)


REFUSED = [
    (config("deepseek_v32"), "DSA"),
    (config("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
    (config("t5"), "is_encoder_decoder"),
    (config("llama", is_causal=False), "is_causal"),
    (config("qwen4_exp_text"), "indexed_attention"),
    (config("mamba"), "state-space"),
    (config("xlstm"), "max_position_embeddings=None"),
    (config("bloom"), "ALiBi"),
    (config("mpt"), "ALiBi"),
    (config("falcon", alibi=True), "alibi"),
]


@pytest.mark.parametrize(("refused", "named"), REFUSED, ids=lambda value: getattr(value, "model_type", None))
def test_unsupported_attention_is_refused_by_its_configuration(
    refused: transformers.PreTrainedConfig, named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        check_supported(refused)
    assert repr(refused.model_type) in str(caught.value)


@pytest.mark.parametrize(
    "accepted",
    [
        config("mistral", sliding_window=4096, max_position_embeddings=4096),
        config("mistral", sliding_window=None),
        config("qwen2", use_sliding_window=False, sliding_window=512),
        config("qwen3"),
        config("phi3", max_position_embeddings=4096, original_max_position_embeddings=4096),
        config("gpt2"),
        config("olmo2"),
        config("granitemoehybrid", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        config("qwen3_next"),
        config("jamba"),
        config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]),
        config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
    ids=lambda value: value.model_type,
)
def test_full_attention_is_accepted(accepted: transformers.PreTrainedConfig) -> None:
    check_supported(accepted)


def tiny(kind: str, **settings: object) -> torch.nn.Module:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    made = config(kind, **(sizes | settings), pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("bert", {"is_decoder": False}, "neither causal"),
        ("mamba", {}, "should each attend"),
        ("falcon", {}, "should each attend"),
        ("diffllama", {}, "should each attend"),
        ("gptj", {"rotary_dim": 16}, "should each attend"),
        ("minimax", {"num_local_experts": 2, "head_dim": 16}, "cache of its own"),
    ],
)
def test_probe_refuses_what_a_configuration_check_would_miss(kind: str, settings: dict, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        probe(tiny(kind, **settings))


SLIDING, FULL = LayerKind("sliding", 64), LayerKind()
MIXED = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: list[tuple[str, dict, tuple[LayerKind, ...]]] = [
    ("llama", {}, ()),
    ("mistral", {"sliding_window": 64}, (SLIDING, SLIDING)),
    ("mistral", {"sliding_window": 64, "use_sliding_window": False}, (SLIDING, SLIDING)),  # a key that it does not know
    ("mistral", {"sliding_window": 256}, ()),  # no longer than the longest sequence
    ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, ()),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (FULL, SLIDING)),
    ("gemma2", {"head_dim": 16, **MIXED}, (replace(SLIDING, soft_cap=50.0), replace(FULL, soft_cap=50.0))),
    ("gemma3_text", {"head_dim": 16, **MIXED}, (SLIDING, FULL)),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, **MIXED}, (SLIDING, FULL)),
    ("cohere2", MIXED, (SLIDING, FULL)),
    (
        "llama4_text",
        {"head_dim": 16, "attention_chunk_size": 32, "layer_types": ["chunked_attention", "full_attention"]},
        (LayerKind("chunked", 32), FULL),
    ),
]


@pytest.mark.parametrize(("kind", "settings", "kinds"), KINDS, ids=lambda value: value if type(value) is str else "")
def test_what_a_layer_sees_is_learned_from_the_model(kind: str, settings: dict, kinds: tuple[LayerKind, ...]) -> None:
    assert probe(tiny(kind, **settings)).layer_kinds == kinds


def test_latent_attention_stores_a_latent_a_token() -> None:
    model = load_model(str(model_dir("deepseek-v3")), "float32", 1)
    assert (model.geometry.kv_heads, model.geometry.head_dim, model.geometry.value_dim) == (1, 24 + 32, 24)
    assert model.geometry.kv_numbers == 3 * (24 + 32)


def test_deterministic_engines_expand_latents(tmp_path: Path) -> None:
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 24}
    tiny("youtu", num_key_value_heads=4, **sizes).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "float32", 1).geometry.latent_dim == 24
    assert load_model(str(tmp_path), "float32", 1, deterministic=True).geometry.latent_dim == 0


def test_latents_are_expanded_where_a_layer_is_of_another_kind() -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir("deepseek-v3"), attn_implementation="distkv").eval()
    attention = model.model.layers[1].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)  # no weight to read, as if quantised
    geometry = probe(model)
    assert (geometry.kv_heads, geometry.head_dim, geometry.latent_dim) == (4, 64, 0)


@given(st.sampled_from(["sliding", "chunked"]), st.integers(1, 70), st.integers(2, 60))
def test_kinds_of_masks_are_found_by_asking(visible: str, size: int, longest: int) -> None:
    kind = LayerKind(visible, size)
    found = kind_of(lambda batch, head, q, k: (k <= q) & (k >= kind.first(q)), longest)
    everywhere = range(longest)
    assert found is not None
    assert [max(0, found.first(at)) for at in everywhere] == [max(0, kind.first(at)) for at in everywhere]


@pytest.mark.parametrize(
    "mask",
    [
        lambda batch, head, q, k: q >= 0,  # sees later tokens
        lambda batch, head, q, k: (k <= q) & ((k > q - 8) | (k < 2)),  # a window, and the first tokens
        lambda batch, head, q, k: (k <= q) & (k % 2 == q % 2),
        lambda batch, head, q, k: (k <= q) & (k > q - 8 - q // 9),
        lambda batch, head, q, k: k < q,
    ],
)
def test_other_masks_have_no_kind(mask: MaskFunction) -> None:
    assert kind_of(mask, 100) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "gemma", "olmo2", "cohere", "stablelm", "granite", "glm4"])
def test_families_nobody_listed_work_when_they_are_plain_attention(kind: str) -> None:
    settings = {"ffn_dim": 64, "word_embed_proj_dim": 64} if kind == "opt" else {}
    assert probe(tiny(kind, **settings)).layers == 2


def test_probe_refuses_a_layer_that_keeps_a_state_of_its_own() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def shifted(hidden_states: Tensor, **keywords: object) -> tuple:
        mixed = hidden_states + torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]  # a token shift
        return plain(hidden_states=mixed, **keywords)

    attention.forward = shifted
    with pytest.raises(UnsupportedModelError, match="does not compute the causal attention"):
        probe(model)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "falcon"}, {"kind": "gptj", "rotary_dim": 16}, {"kind": "gpt_neo", "attention_types": [[["global"], 2]]}],
    ids=lambda settings: settings["kind"],
)
def test_attention_in_code_of_its_own_is_refused_before_weights_are_read(settings: dict, tmp_path: Path) -> None:
    tiny(**settings).config.save_pretrained(tmp_path)  # a configuration and no weights
    with pytest.raises(UnsupportedModelError, match="computes attention in its own code"):
        load_model(str(tmp_path), "float32", 1)


def test_layers_of_different_sizes_are_no_error_of_transformers(tmp_path: Path) -> None:
    config("gemma4_text", num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_model(str(tmp_path), "float32", 1)


def test_unsupported_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config("mamba").save_pretrained(tmp_path)  # a configuration and no weights
    with pytest.raises(UnsupportedModelError, match="state-space"):
        load_model(str(tmp_path), "float32", 1)


def test_end_of_sequence_tokens_come_from_the_generation_configuration(tmp_path: Path) -> None:
    saved = save_model(FAMILIES["llama-gqa"](), "llama-eos")
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load_model(str(saved), "float32", 1).eos_token_ids == {5, 7}


def test_model_without_weights_is_a_model_error(tmp_path: Path) -> None:
    FAMILIES["llama-gqa"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        load_model(str(tmp_path), "float32", 1)


def test_unknown_dtype_error_names_the_choices() -> None:
    with pytest.raises(ModelError, match="bfloat16"):
        load_model(str(model_dir("llama-gqa")), "int8", 1)


def test_check_reads_the_text_part_of_a_model_of_several_parts() -> None:
    text = config("mamba")
    with pytest.raises(UnsupportedModelError, match="state-space"):
        check_supported(SimpleNamespace(get_text_config=lambda: text))

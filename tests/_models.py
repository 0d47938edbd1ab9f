"""Tiny models with random weights, one per family, and the tokens that plain transformers generates with them.

Weights are large so that greedy tokens vary and lead clearly: only then are token-exact comparisons meaningful.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB = 499
MAX_POSITIONS = 4096


def _config(kind: str, heads: int, kv_heads: int, head_dim: int, **settings: object) -> transformers.PreTrainedConfig:
    common: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": heads * head_dim if kind == "Phi3" else 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return getattr(transformers, f"{kind}Config")(**(common | settings))


FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama-mha": lambda: _config("Llama", 4, 4, 64),
    "llama-gqa": lambda: _config("Llama", 6, 2, 64),
    "llama-mqa": lambda: _config("Llama", 4, 1, 80, num_hidden_layers=2),
    "qwen2": lambda: _config("Qwen2", 4, 2, 80),
    "qwen3": lambda: _config("Qwen3", 4, 2, 128),
    "mistral": lambda: _config("Mistral", 4, 2, 128, sliding_window=None),
    "phi3": lambda: _config("Phi3", 4, 2, 64, original_max_position_embeddings=MAX_POSITIONS),
    "qwen3-moe": lambda: _config(
        "Qwen3Moe", 4, 2, 64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, num_hidden_layers=4
    ),
    "mixtral": lambda: _config("Mixtral", 4, 4, 64, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2),
    "gemma2": lambda: _config("Gemma2", 4, 2, 64, sliding_window=40, query_pre_attn_scalar=64),  # windows, soft caps
    "gpt-oss": lambda: _config(  # windows, sinks
        "GptOss", 4, 2, 64, sliding_window=40, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None
    ),
    "llama4": lambda: _config(  # chunks, temperatures by position
        "Llama4Text", 4, 2, 64, attention_chunk_size=40, floor_scale=30, num_hidden_layers=4, num_local_experts=2,
        intermediate_size_mlp=64,
    ),
    "deepseek-v3": lambda: _config(  # latent attention: values shorter than keys
        "DeepseekV3", 4, 4, 32, q_lora_rank=24, kv_lora_rank=24, qk_nope_head_dim=32, qk_rope_head_dim=32,
        v_head_dim=40, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32,
    ),
}  # fmt: skip
"""Name of a tiny model -> its configuration."""


_SHORT = {"max_position_embeddings": 179}
PAGED: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gemma2-short": lambda: _config("Gemma2", 4, 2, 64, sliding_window=45, query_pre_attn_scalar=64, **_SHORT),
    "gpt-oss-short": lambda: _config(
        "GptOss", 4, 2, 64, sliding_window=45, num_local_experts=4, num_experts_per_tok=2, rope_scaling=None, **_SHORT
    ),
    "llama4-short": lambda: _config(
        "Llama4Text", 4, 2, 64, attention_chunk_size=45, floor_scale=30, num_hidden_layers=4, num_local_experts=2,
        intermediate_size_mlp=64, **_SHORT,
    ),
    "mistral-window": lambda: _config("Mistral", 4, 2, 64, sliding_window=45),
}  # fmt: skip
"""The same for models whose windows are long compared with their longest sequence, or that have only windows."""


_TINY_MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
HYBRIDS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen3-next": lambda: _config(
        "Qwen3Next", 4, 2, 32, layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
    ),
    "granite4-h": lambda: _config(
        "GraniteMoeHybrid", 4, 2, 24, layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=4, mamba_d_head=48, mamba_n_groups=2, mamba_chunk_size=16, shared_intermediate_size=64,
        num_local_experts=4, num_experts_per_tok=2, **_TINY_MAMBA,
    ),
    "lfm2": lambda: _config("Lfm2", 4, 2, 24, layer_types=["conv", "full_attention", "conv"], block_ff_dim=128),
    "jamba": lambda: _config(
        "Jamba", 4, 2, 24, attn_layer_period=3, attn_layer_offset=1, num_experts=4, num_experts_per_tok=2,
        mamba_dt_rank=8, **_TINY_MAMBA,
    ),
    "nemotron-h": lambda: _config(
        "NemotronH", 4, 2, 24, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=48, n_groups=2, chunk_size=16, ssm_state_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
    ),
}  # fmt: skip
"""The same for tiny models with recurrent layers, one of each kind."""


WINDOWED = ("gemma2", "gpt-oss", "llama4")
"""Models in which one layer sees everything, and the others see windows, whose KV stays at homes."""


def block_bytes(family: str, tokens: int = 8) -> int:
    """Bytes of a block of a tiny model's KV in float32."""
    config = {**FAMILIES, **PAGED}[family]()
    latent = getattr(config, "kv_lora_rank", 0)
    numbers = latent + config.qk_rope_head_dim if latent else 2 * config.num_key_value_heads * config.head_dim
    return (1 if family in WINDOWED else config.num_hidden_layers) * numbers * tokens * 4


def kv_memory(family: str, blocks: int, sequences: int = 1) -> int:
    """Bytes for ``blocks`` blocks of 8 tokens, and for the windows of ``sequences`` with prompt chunks of 32 tokens.

    A home keeps a sequence's windows after the last commit and after the chunk since then, in whole blocks.
    """
    config = FAMILIES[family]()
    near = config.num_hidden_layers - 1 if family in WINDOWED else 0
    return (blocks + near * (sequences * (3 + (40 + 32) // 8) + 1 + 32 // 8)) * block_bytes(family)


_SEEDS = {"llama-mqa": 9, "qwen2": 7, "qwen3": 9, "phi3": 9, "qwen3-moe": 10, "mixtral": 7}
"""Seeds of the weights (8 for the others) that give varied tokens, each well ahead of the second best."""

_saved = tempfile.TemporaryDirectory(prefix="distkv-models-")


@cache
def model_dir(family: str) -> Path:
    """Return the directory of the tiny model called ``family``, saved in float32 on first use in the test session."""
    return save_model({**FAMILIES, **PAGED, **HYBRIDS}[family](), family)


def save_model(config: transformers.PreTrainedConfig, name: str) -> Path:
    """Save a model with random weights (the same ones each time) and no tokenizer."""
    torch.manual_seed(_SEEDS.get(name, 8))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if name in HYBRIDS:
        for weight in model.parameters():
            weight.data.normal_(0, 0.3) if weight.ndim > 1 else weight.data.add_(0.1 * torch.randn_like(weight))
    model.lm_head.weight.data *= 0.3  # logits of a few units, so that an absolute tolerance of 1e-4 is meaningful
    target = Path(_saved.name) / name
    model.save_pretrained(target)
    return target


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of one prompt, and the float32 logits [new tokens, vocab] they were chosen from."""

    tokens: list[int]
    logits: Tensor


def reference_generate(
    model: Path | str, prompts: Sequence[Sequence[int]], max_new_tokens: int, attention: str | None = None
) -> list[Reference]:
    """Generate greedily with plain transformers in float32, one prompt at a time, past any end-of-sequence token."""
    return [_reference(str(model), tuple(prompt), max_new_tokens, attention) for prompt in prompts]


@cache
def _reference(model: str, prompt: tuple[int, ...], max_new_tokens: int, attention: str | None) -> Reference:
    return generated(_plain(model, attention), prompt, max_new_tokens)


def generated(model: Any, prompt: tuple[int, ...], max_new_tokens: int) -> Reference:
    """Tokens that a model of transformers or peft generates greedily, past any end-of-sequence token."""
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Reference(output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float())


def choice_probabilities(
    model: Path | str, prompt: Sequence[int], choices: Sequence[tuple[int, ...]], end: int | None = None
) -> list[float]:
    """Probabilities of choices, from one forward of plain transformers each; ``end`` ends those that begin others."""
    likelihoods = []
    for choice in choices:
        begins = any(other != choice and other[: len(choice)] == choice for other in choices)
        tokens = [*choice, end] if begins and end is not None else [*choice]
        with torch.no_grad():
            logits = _plain(str(model), None)(torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
        likelihoods.append(sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens)))
    return torch.tensor(likelihoods, dtype=torch.float64).softmax(-1).tolist()


@lru_cache(maxsize=2)
def _plain(model: str, attention: str | None) -> transformers.PreTrainedModel:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
    return plain.eval()


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """Return ``length`` random token ids, the same for the same arguments."""
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def text_model_dir(end: bool = False) -> Path:
    """Return a tiny model with a tokenizer (a token for each byte, then words ``w256`` ...) and a chat template.

    With ``end``, its last token is ``<end>`` and ends sequences.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = FAMILIES["llama-gqa"]()
    config.eos_token_id = VOCAB - 1 if end else None
    folder = save_model(config, "text-end" if end else "text")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"w{number}" for number in range(len(letters), VOCAB))]
    words[-1] = "<end>" if end else words[-1]
    plain = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>" if end else None)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder

"""Small tokenizers of every kind, each with control tokens and chat templates of several kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from distkv_dask.models.source import resolve_model

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["the quick brown fox jumps over the lazy dog, and the dog stops.  a < b | c > d <im start> [INST] think"] * 3

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "stripped": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}<|im_end|>"
    "{% endfor %}<|im_start|>assistant:",
    "built": "{{ bos_token }}{% for m in messages %}{{ '<|im_' ~ 'start|>' }}{% if m.name %}{{ m.name | upper }}"
    "{% endif %}{{ m.content.replace('q', 'k') }}{{ eos_token }}{% endfor %}<|im_start|>",
    "touching": "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}",
    "json": "{{ bos_token }}{{ messages | tojson }}<|im_start|>",
    "reasoning": "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in "
    "content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
}


def _byte_bpe(special: bool) -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    add = raw.add_special_tokens if special else raw.add_tokens
    add([AddedToken(name, special=special, normalized=False) for name in [*CONTROL, "<think>", "</think>"]])
    raw.add_tokens(["  ", "    ", "lazydog", "<table>", "\n\n"])  # what other vocabularies hold as ordinary text
    return raw


def _metaspace_bpe() -> RawTokenizer:
    """Like Llama 2: the control tokens are in the vocabulary, and merges lead to them."""
    raw = RawTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=alphabet, show_progress=False)
    raw.train_from_iterator([line.replace(" ", "\u2581") for line in CORPUS], trainer)
    parts = json.loads(raw.to_str())
    known = parts["model"]["vocab"]
    for name in ["s", ">", "<", "/", "|", "s>", "</"]:  # pieces that meet in control tokens
        known.setdefault(name, len(known))
    parts["model"]["merges"] = [
        ["s", ">"], ["<", "s>"], ["<", "/"], ["</", "s>"],
        *(merge for merge in parts["model"]["merges"] if merge not in (["s", ">"], ["<", "/"])),
    ]  # fmt: skip
    parts["model"]["byte_fallback"] = True
    parts["added_tokens"] = [one for one in parts["added_tokens"] if not one["content"].startswith("<0x")]
    raw = RawTokenizer.from_str(json.dumps(parts))
    begin = raw.token_to_id("<s>")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return raw


def _unigram() -> RawTokenizer:
    """Like T5 and Gemma's ancestors: the control tokens are pieces that score better than any text."""
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in CONTROL), ("\u2581", -2.0), ("\u2581the", -3.0), ("dog", -4.0)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)] + [("\n", -6.0)]
    raw = RawTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(["<unk>", *CONTROL])
    return raw


def _word_piece() -> RawTokenizer:
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_tokens(  # matched after the normalizer, which lowercases letters, so that "<|IM_START|>" also is one
        [AddedToken(name, normalized=True, special=False) for name in CONTROL[2:]]
    )
    return raw


def _clinging() -> RawTokenizer:
    """Control tokens that include the spaces around them, and one that never is a part of a word."""
    raw = _byte_bpe(special=True)
    raw.add_special_tokens(
        [
            AddedToken("<|wide|>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<alone>", single_word=True, normalized=False),
        ]
    )
    return raw


_KINDS: dict[str, Callable[[], RawTokenizer]] = {
    "byte-bpe": lambda: _byte_bpe(special=True),
    "not-special": lambda: _byte_bpe(special=False),
    "metaspace": _metaspace_bpe,
    "unigram": _unigram,
    "word-piece": _word_piece,
    "clinging": _clinging,
}
KINDS = (*_KINDS, "smollm2")


@cache
def _raw(kind: str) -> RawTokenizer:
    return _KINDS[kind]()


@cache
def _smollm2() -> Any:
    return resolve_model("smollm2-135m").tokenizer()


@cache
def tokenizer(kind: str, template: str = "chatml") -> Any:
    """A transformers tokenizer of a kind in :data:`KINDS`, with one of the :data:`TEMPLATES`."""
    if kind == "smollm2":
        names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=_smollm2().backend_tokenizer,
            chat_template=_smollm2().chat_template if template == "chatml" else TEMPLATES[template],
            **names,
        )
    if kind != "not-special":
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=_raw(kind), chat_template=TEMPLATES[template], **names
        )
    spelled = TEMPLATES[template].replace("bos_token", "'<s>'").replace("eos_token", "'</s>'")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=_raw(kind), chat_template=spelled)

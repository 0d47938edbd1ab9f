"""Prompts get the ids of transformers; answers stream without half characters or stop strings."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep

import pytest
import transformers
from _models import model_dir
from _texts import any_text
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from distkv_dask.client import tokenizer as module
from distkv_dask.client.time_limit import OutOfTime, TimeLimit
from distkv_dask.client.tokenizer import Tokenizer
from distkv_dask.errors import InvalidRequestError, ModelError
from distkv_dask.models.source import resolve_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role') }}{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_tokenizer(chat_template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: characters beyond ASCII take several tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the dog stops. STOP END"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


LOADED = byte_tokenizer()
TOKENIZER = Tokenizer(LOADED, len(LOADED))
CHAT = [{"role": "user", "content": "the dog?"}]


def test_text_is_encoded_as_transformers_does() -> None:
    assert TOKENIZER.encode("the lazy dog") == LOADED("the lazy dog")["input_ids"]


def test_chat_messages_go_through_the_models_template() -> None:
    expected = LOADED.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert TOKENIZER.encode(CHAT) == expected
    assert LOADED.decode(expected) == "<s>user: the dog?\n<s>assistant: "


@pytest.mark.parametrize("prompt", [[5, 0, 319], (5, 0, 319), range(3)])
def test_token_ids_are_taken_as_given(prompt: list[int]) -> None:
    assert Tokenizer(None, 320).encode(prompt) == list(prompt)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "empty"),
        ([], "empty"),
        ([3, 320], "token id 320 at position 1"),
        ([-1], "token id -1"),
        ([1.5], r"prompt item 0 is 1\.5"),
        ([True], "prompt item 0 is True"),
        (["the", "dog"], "prompt item 0 is 'the'"),
        (b"the", "not bytes"),
        (7, "not int"),
        (None, "not NoneType"),
        (CHAT[0], "not dict"),
        ([{"role": "user"}], "chat message 0"),
        ([*CHAT, 5], "chat message 1"),
        ([{"role": "robot", "content": "x"}], "no such role"),
        ("the \ud83d dog", r"the prompt holds half a surrogate pair \(U\+D83D\) at character 4"),
        ([{"role": "user", "content": "\udc00"}], r"'content' of chat message 0 holds half .* at character 0"),
        ([{"role": "user", "content": "x", "name": "\udc00"}], "'name' of chat message 0 holds half"),
    ],
    ids=repr,
)
def test_prompt_that_cannot_be_served_is_refused(prompt: object, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        Tokenizer(LOADED, 320).encode(prompt)  # type: ignore[arg-type]


@given(any_text.filter(bool))
def test_any_text_at_all_is_encoded_or_refused(text: str) -> None:
    whole = not any("\ud800" <= character <= "\udfff" for character in text)
    for encode in (
        TOKENIZER.encode,
        TOKENIZER.encode_more,
        lambda one: TOKENIZER.encode([{**CHAT[0], "content": one}]),
    ):
        if whole:
            assert text in TOKENIZER.decode(encode(text))
        else:
            with pytest.raises(InvalidRequestError, match="surrogate"):
                encode(text)


def test_chat_without_a_template_says_what_to_give_instead() -> None:
    with pytest.raises(InvalidRequestError, match="give a text or token ids"):
        Tokenizer(byte_tokenizer(chat_template=None), 320).encode(CHAT)


def test_model_without_tokenizer_serves_token_ids_only() -> None:
    source = resolve_model(str(model_dir("llama-gqa")))
    tokenizer = Tokenizer(source.tokenizer(), 499)
    stream = tokenizer.stream()
    assert stream.add([4, 8]) + stream.finish() == ""
    assert (stream.text, stream.token_ids, stream.stopped) == ("", [4, 8], False)
    with pytest.raises(InvalidRequestError, match="give token ids"):
        tokenizer.encode("text")
    with pytest.raises(InvalidRequestError, match="stop strings"):
        tokenizer.stream(("END",))


def test_saved_tokenizer_is_found_beside_the_model(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    LOADED.save_pretrained(tmp_path)
    loaded = resolve_model(str(tmp_path)).tokenizer()
    assert Tokenizer(loaded, 320).encode("the fox") == TOKENIZER.encode("the fox")


def test_broken_tokenizer_is_an_error_not_a_missing_one(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer"):
        resolve_model(str(tmp_path)).tokenizer()


def ids_of(text: str) -> list[int]:
    return LOADED(text)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(1, 5))
def test_pieces_are_whole_characters_and_add_up_to_the_text(text: str, step: int) -> None:
    stream, ids = TOKENIZER.stream(), ids_of(text)
    pieces = [stream.add(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" not in text)
    assert "".join(pieces) + stream.finish() == stream.text == LOADED.decode(ids)
    assert stream.token_ids == ids


@given(st.lists(st.integers(0, 319), max_size=30), st.integers(1, 7))
def test_any_tokens_at_all_add_up_to_what_decoding_them_at_once_gives(ids: list[int], step: int) -> None:
    stream = TOKENIZER.stream()
    pieces = [stream.add(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert "".join(pieces) + stream.finish() == stream.text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("the dog STOP and more", ("STOP",), "the dog "),
        ("the dog STOP END", ("END", "STOP"), "the dog "),
        ("the dog ST", ("STOP",), "the dog ST"),
        ("STOP", ("STOP",), ""),
        ("a aab", ("aab",), "a "),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE} au lait", ("\N{LATIN SMALL LETTER E WITH ACUTE}",), "caf"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("stops here", ("top", "stops"), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], kept: str, step: int) -> None:
    stream, ids = TOKENIZER.stream(stop), ids_of(text)
    given_out = ""
    for at in range(0, len(ids), step):
        given_out += stream.add(ids[at : at + step])
        assert kept.startswith(given_out), "what was given out cannot be taken back"
    given_out += stream.finish()
    assert given_out == stream.text == kept
    assert stream.stopped == (kept != text)


def test_tokens_that_only_the_stop_string_needs_are_dropped() -> None:
    before, stop = ids_of("the dog "), ids_of("STOP")
    stream = TOKENIZER.stream(("STOP",))
    stream.add([*before, *stop, *before])
    assert stream.token_ids == before
    assert stream.add(before) == ""
    assert stream.token_ids == before


def test_special_tokens_leave_no_text() -> None:
    stream = TOKENIZER.stream()
    assert stream.add([*ids_of("dog"), LOADED.eos_token_id]) + stream.finish() == "dog"


def test_unfinished_character_at_the_end_is_shown_as_such() -> None:
    stream = TOKENIZER.stream()
    cut = ids_of("ok \N{GRINNING FACE}")[:-1]
    assert stream.add(cut) == "ok "
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP + "{% endfor %}{% endfor %}",
        LOOP + "{% if i is number %}{{ messages[0].content | length }}{% endif %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n else 1 }}{% endfor %}{% endmacro %}{{ f(30) }}",
        "{% set n = namespace(x=0) %}" + LOOP + "{% set n.x = n.x + 1 %}{{ n.x }}{% endfor %}{% endfor %}",
    ],
)
def test_a_chat_template_without_end_is_ended_and_others_go_on(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEMPLATE_SECONDS", 0.2)
    endless = byte_tokenizer(template)
    with pytest.raises(InvalidRequestError, match=r"takes more than 0.2 s .* was ended"):
        Tokenizer(endless, len(endless)).encode(CHAT)
    assert Tokenizer(endless, len(endless)).encode("the dog?") == LOADED("the dog?")["input_ids"]
    assert TOKENIZER.encode(CHAT)


def test_a_template_of_one_huge_loop_is_refused_at_once() -> None:
    huge = byte_tokenizer("{% for i in range(10**9) %}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="MAX_RANGE"):
        Tokenizer(huge, len(huge)).encode(CHAT)


def test_time_that_is_over_at_the_last_moment_ends_nothing_later() -> None:
    for number in range(200):
        with contextlib.suppress(KeyError, OutOfTime), TimeLimit(0.002):
            for _ in range(number * 500):
                pass
            if number % 3 == 0:
                raise KeyError(number)
        assert [count for count in range(1000) if count % 500 == 0] == [0, 500]


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "time-limits"]


def test_one_thread_watches_all_chat_templates_and_ends_when_none_is_rendered() -> None:
    with ThreadPoolExecutor(8) as pool:
        for ids in pool.map(lambda _: TOKENIZER.encode(CHAT), range(400)):
            assert ids == TOKENIZER.encode(CHAT)
            assert len(watchers()) == 1
    deadline = monotonic() + 30
    while watchers() and monotonic() < deadline:
        sleep(0.05)
    assert not watchers()
    assert TOKENIZER.encode(CHAT)


def test_each_of_several_limits_ends_its_own_block() -> None:
    ended = []

    def run(seconds: float) -> None:
        try:
            with TimeLimit(seconds):
                while True:
                    pass
        except OutOfTime:
            ended.append(seconds)

    blocks = [threading.Thread(target=run, args=[seconds]) for seconds in (0.9, 0.1, 0.5)]
    for block in blocks:
        block.start()
    for block in blocks:
        block.join(30)
    assert sorted(ended) == [0.1, 0.5, 0.9]

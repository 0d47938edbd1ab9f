"""A model's folder comes from a stranger: it runs no code and fetches nothing, and errors say what is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from _models import model_dir, text_model_dir
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distkv_dask.errors import ModelError
from distkv_dask.models.files import _SIZES, DEEPEST, check_sizes, read_json, safe_config
from distkv_dask.models.source import resolve_model
from distkv_dask.models.weight_files import INDEX, WEIGHTS
from distkv_dask.worker.model.load import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model's folder to spoil."""
    return shutil.copytree(text_model_dir(), tmp_path / "model")


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def load(folder: Path) -> Any:
    return load_model(str(folder), "float32", 1)


def logits(folder: Path) -> torch.Tensor:
    model: Any = load(folder)._model
    model.set_attn_implementation("eager")
    return model(torch.arange(9)[None]).logits


EVIL_KEYS = [
    {"_attn_implementation": "owner/kernel:fn"},
    {"attn_implementation": "owner/kernel"},
    {"attn_implementation": {"": "owner/kernel"}},
    {"_attn_implementation_internal": "owner/kernel"},
    {"_experts_implementation": "owner/kernel:fn"},
    {"experts_implementation": "owner/kernel:fn"},
    {"auto_map": {"AutoConfig": "owner/code--config.C", "AutoModelForCausalLM": "owner/code--model.M"}},
    {"custom_pipelines": {"evil": {"impl": "evil.Pipeline", "pt": ["AutoModel"]}}},
    {"configuration_files": ["config.4.0.0.json"]},
    {"transformers_weights": "../other.safetensors"},
    {"fusion_config": {"patch_embeddings": True}},
    {"distributed_config": {"tp_size": 2}},
    {"_name_or_path": "owner/model", "name_or_path": "owner/model"},
]


@pytest.mark.parametrize("keys", EVIL_KEYS, ids=lambda keys: next(iter(keys)))
def test_keys_that_name_code_or_kernels_have_no_effect(
    keys: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(folder)
    change(folder, **keys)
    (folder / "config.4.0.0.json").write_text('{"model_type": "bert"}')
    asked: list[Any] = []
    import transformers.modeling_utils as modeling

    monkeypatch.setattr(modeling, "lazy_import_flash_attention", lambda *given, **more: asked.append(given))
    assert torch.equal(logits(folder), wanted)
    assert not asked
    assert resolve_model(str(folder)).tokenizer() is not None
    config = resolve_model(str(folder)).config()
    assert config._attn_implementation_internal is None
    assert not hasattr(config, "auto_map")


names = st.sampled_from(sorted({key for keys in EVIL_KEYS for key in keys}))
values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
nested = st.recursive(
    st.dictionaries(names | st.text(max_size=5), values, max_size=3),
    lambda inner: st.dictionaries(names | st.text(max_size=5), inner | st.lists(inner, max_size=2), max_size=3),
    max_leaves=8,
)


@given(nested)
def test_no_such_key_is_left_at_any_depth(config: dict[str, Any]) -> None:
    text = json.dumps(safe_config({**config, "model_type": "llama", "quantization_config": None}, "m"))
    for key in {key for keys in EVIL_KEYS for key in keys}:
        assert f'"{key}":' not in text


@pytest.mark.parametrize("key", _SIZES)
@pytest.mark.parametrize("value", [0, -1, 10**12, "8", 2.5, [4], {}])
def test_sizes_of_no_model_are_named(key: str, value: Any, folder: Path) -> None:
    change(folder, **{key: value})
    with pytest.raises(ModelError, match=f"{key}|cannot be read"):
        load(folder)


def test_layers_with_other_numbers_of_heads_each_have_a_multiple_of_their_own_kv_heads() -> None:
    config: Any = transformers.CONFIG_MAPPING["dots3_note_text"]()
    assert {(one.num_attention_heads, one.num_key_value_heads) for one in config.per_layer_config} == {
        (64, 64),
        (128, 128),
    }
    check_sizes(config, "m")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_key_value_heads": 4}, "6 heads for 4 kv heads"),
        ({"model_type": None}, "model_type"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": "no-such"}, "does not know model type 'no-such'.*upgrade transformers"),
        ({"model_type": "no-such", "auto_map": {"AutoConfig": "a.B"}}, "never run here"),
        ({"quantization_config": "evil"}, "quantization_config"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "fetched from the hub"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "'modelopt'.*does not know"),
        ({"quantization_config": {}}, "unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "eetq"}}}, "fetched from the hub"),
        ({"vocab_size": 1 << 23}, "too small"),
        ({"num_hidden_layers": 4}, "drawn at random"),
        ({"num_hidden_layers": 2}, r"does not use: model\.layers\.2"),
        ({"head_dim": 66}, r"self_attn\.k_proj\.weight is \(128, 96\), not \(132, 96\)"),
        ({"sliding_window": "x"}, None),
        *(({"text_config": value}, "parts that no model of its type has") for value in ("x", 7, True, ["x"])),
        ({"head_dim": 65}, "cannot be read"),
        ({"text_config": {"_attn_implementation": "owner/kernel:fn"}}, "parts that no model of its type has"),
    ],
)
def test_what_a_configuration_cannot_say_is_an_error_of_ours(
    values: dict[str, Any], words: str | None, folder: Path
) -> None:
    change(folder, **values)
    if words is None:  # the change has no effect
        load(folder)
        return
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", INDEX, "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"x"', "[" * 200_000, '{"a":' * 2000 + "1" + "}" * 2000, "\xff\xfe", "\0"]
)
def test_damaged_files_are_errors_of_ours(file: str, text: str, folder: Path) -> None:
    if file == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(text.encode("latin-1"))

    def open_all() -> None:
        load(folder)
        resolve_model(str(folder)).tokenizer()

    with pytest.raises(ModelError):
        open_all()


@given(values | nested)
def test_any_json_is_read_as_an_object_or_refused(value: Any) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(value))
        if isinstance(value, dict):
            assert read_json(file) == value
        else:
            with pytest.raises(ModelError, match="not a JSON object"):
                read_json(file)


def test_depth_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for depth, good in ((DEEPEST - 1, True), (DEEPEST, False)):
        file.write_text('{"a":' * depth + "1" + "}" * depth)
        if good:
            read_json(file)
        else:
            with pytest.raises(ModelError, match="deeper"):
                read_json(file)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._file),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("evil", [True, False])
def test_pickled_weights_are_refused_without_reading_them(name: str, evil: bool, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if evil:
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        torch.save(weights, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"pickled.*safetensors") as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model"}')
    with pytest.raises(ModelError, match="adapter"):
        load(folder)


def shard(folder: Path, place: Callable[[str], str]) -> None:
    """Split the weights in two; ``place`` gives the name of a file in the index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(weights)
    where = {}
    for number, part in enumerate((keys[:3], keys[3:])):
        name = f"part-{number}.safetensors"
        save_file({key: weights[key] for key in part}, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(part, place(name)))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_weights_in_several_files_are_those_of_one(folder: Path) -> None:
    wanted = logits(folder)
    shard(folder, lambda name: name)
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize(
    "place", ["../model/{}", "/etc/{}", "./{}", "sub/{}", "..\\{}", "{}\0", "", "{}.bin", "https://example.org/{}"]
)
def test_an_index_names_files_of_the_folder_only(place: str, folder: Path) -> None:
    shard(folder, lambda name: place.replace("{}", name))
    with pytest.raises(ModelError, match=r"in the folder itself|cannot be read|missing"):
        load(folder)


@pytest.mark.parametrize("where", [[], None, {}, {"a": 7}, {"a": ["x"]}, "x"])
def test_an_index_of_another_form_is_refused(where: Any, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(ModelError, match="weight_map"):
        load(folder)


@pytest.mark.parametrize("sharded", [True, False])
def test_links_lead_nowhere_else_but_into_the_hubs_cache(sharded: bool, folder: Path, tmp_path: Path) -> None:
    if sharded:
        shard(folder, lambda name: name)
    name = "part-0.safetensors" if sharded else WEIGHTS
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / "w.safetensors")
    (folder / name).symlink_to(tmp_path / "elsewhere" / "w.safetensors")
    with pytest.raises(ModelError, match="link"):
        load(folder)
    cached = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(folder, cached, symlinks=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    shutil.copy(tmp_path / "elsewhere" / "w.safetensors", tmp_path / "models--a--b" / "blobs" / "1234")
    (cached / name).unlink()
    (cached / name).symlink_to("../../blobs/1234")
    load(cached)


def test_a_pipe_is_no_file_and_nobody_waits_for_it(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(ModelError, match="not a file"):
        load(folder)
    os.mkfifo(folder / "special_tokens_map.json")
    with pytest.raises(ModelError, match="not a file"):
        resolve_model(str(folder)).tokenizer()


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 3000, -1])
def test_weights_cut_short_are_an_error_that_says_so(kept: int, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(ModelError, match="cut short"):
        load(folder)


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_that(file: str, folder: Path) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")

    def open_all() -> None:
        load(folder)
        resolve_model(str(folder)).tokenizer()

    with pytest.raises(ModelError, match=rf"{file} is a git-lfs pointer.*git lfs pull"):
        open_all()


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=r"drawn at random: model\.layers\.1\.self_attn\.q_proj\.weight"):
        load(folder)


def test_tensors_that_the_model_does_not_use_are_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    scale = "model.layers.1.self_attn.q_proj.weight_scale"
    save_file(weights | {scale: torch.ones(1)}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(f"does not use: {scale}")):
        load(folder)


@pytest.mark.parametrize(
    "left_out",
    [
        "model.vision_tower.blocks.0.weight",
        "visual.patch_embed.weight",
        "mtp.fc.weight",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_parts_beside_the_text_model_are_left_out(left_out: str, folder: Path) -> None:
    wanted = logits(folder)
    save_file(load_file(folder / WEIGHTS) | {left_out: torch.ones(1)}, folder / WEIGHTS, {"format": "pt"})
    change(folder, num_nextn_predict_layers=1)
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize("eos", ["x", [None], {"a": 1}, 1.5])
def test_ends_of_sequences_are_token_ids(eos: Any, folder: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=eos)
    with pytest.raises(ModelError):
        load(folder)


def test_a_chat_template_of_megabytes_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("x" * (1 << 21))
    with pytest.raises(ModelError, match="longer than"):
        resolve_model(str(folder)).tokenizer()
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template="x" * (1 << 21))
    with pytest.raises(ModelError, match="longer than"):
        resolve_model(str(folder)).tokenizer()


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": 7},
        {"tokenizer_class": "os.system"},
        {"auto_map": {"AutoTokenizer": ["owner/code--t.T", None]}},
        {"auto_map": 7},
        {"added_tokens_decoder": []},
        {"chat_template": 7},
        {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd"},
        {"extra_special_tokens": 7},
    ],
    ids=str,
)
def test_a_tokenizers_settings_are_harmless_or_refused(values: dict[str, Any], folder: Path) -> None:
    change(folder, "tokenizer_config.json", **values)
    try:
        loaded = resolve_model(str(folder)).tokenizer()
    except ModelError:
        return
    assert loaded("w300")["input_ids"]


def test_a_gguf_file_is_read_without_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distkv_dask.models import gguf_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "adapter_config.json").write_text("{}")
    seen: list[str] = []

    class Model:
        def __init__(self, parts: Sequence[Path]) -> None:
            self.fields: dict[str, Any] = {}

    def read(folder: Path, **_: Any) -> None:
        seen.extend(one.name for one in folder.iterdir())
        raise RecursionError("of a damaged file")

    monkeypatch.setattr(gguf_cache, "GgufModel", Model)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    with pytest.raises(ModelError, match="cannot be converted"):
        gguf_cache.converted_text(tmp_path / "model.gguf")
    assert seen == ["model.gguf"]
    assert not [one for one in (tmp_path / "cache").rglob("text.*") if one.is_dir()]


def test_other_models_still_load() -> None:
    for family in ("llama-gqa", "qwen2", "phi3", "mixtral"):
        assert load(model_dir(family)).geometry.vocab_size == 499

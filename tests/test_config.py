"""Configuration: sources of values, what is refused, and that YAML, schema and dataclass agree."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from importlib.resources import files

import dask.config
import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator

from distkv_dask.config import Config
from distkv_dask.errors import ConfigError
from distkv_dask.scheduler.policies import POLICIES

KEYS = [field.metadata["key"] for field in fields(Config)]


def read(name):
    return yaml.safe_load(files("distkv_dask").joinpath(name).read_text())


def paths(tree, root="distkv"):
    """Full keys of a nested mapping."""
    found = []
    for name, value in tree.items():
        found += paths(value, f"{root}.{name}") if isinstance(value, dict) else [f"{root}.{name}"]
    return found


def schema_paths(schema, root="distkv"):
    found = []
    for name, value in schema["properties"].items():
        found += schema_paths(value, f"{root}.{name}") if "properties" in value else [f"{root}.{name}"]
    return found


def test_defaults_file_schema_and_dataclass_have_the_same_keys():
    schema = read("distkv-schema.yaml")
    assert paths(read("distkv.yaml")["distkv"]) == schema_paths(schema["properties"]["distkv"]) == KEYS


def test_every_policy_can_be_set():
    policies = read("distkv-schema.yaml")["properties"]["distkv"]["properties"]["policy"]["enum"]
    assert sorted(policies) == sorted(POLICIES)


def test_defaults_file_is_valid_for_any_json_schema_tool():
    schema = read("distkv-schema.yaml")
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(read("distkv.yaml"))


def test_defaults_arrive_as_numbers():
    config = Config.load()
    assert config.kv_memory is None
    assert config.block_tokens == 64
    assert config.window_seconds == 1
    assert config.timeout_open == 600.0
    assert config.timeout_receive == 30.0


def test_config_cannot_change_after_it_was_read():
    config = Config.load()
    with dask.config.set({"distkv.window.steps": 3}):
        assert config.window_steps is None
    with pytest.raises(FrozenInstanceError):
        config.window_steps = 3


def test_dask_config_overrides_defaults_and_arguments_override_both():
    with dask.config.set({"distkv.window.steps": 3, "distkv.kv-memory": "1 MiB"}):
        assert Config.load().window_steps == 3
        assert Config.load(window_steps=5).window_steps == 5
        assert Config.load(kv_memory=None).kv_memory == 2**20, "None means: not given"


def test_either_spelling_of_a_key_is_read():
    with dask.config.set({"distkv": {"block_tokens": 16, "prefill": {"chunk-tokens": 7}}}):
        config = Config.load()
    assert (config.block_tokens, config.prefill_chunk_tokens) == (16, 7)
    assert config.window_steps is None, "a section given in part keeps the defaults of its other keys"


def test_environment_variables_reach_the_config():
    code = "from distkv_dask.config import Config; c = Config.load(); print(c.window_steps, c.kv_memory)"
    given = {"DASK_DISTKV__WINDOW__STEPS": "8", "DASK_DISTKV__KV_MEMORY": "64 MiB"}
    assert run(code, given).stdout.split() == ["8", str(64 * 2**20)]


def test_a_misspelt_environment_variable_is_an_error_and_not_silently_ignored():
    done = run("from distkv_dask.config import Config; Config.load()", {"DASK_DISTKV__WINDOW__STPES": "8"})
    assert "distkv.window.stpes is not a setting. Did you mean distkv.window.steps?" in done.stderr


def run(code, environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("kv_memory", "64 MiB", 64 * 2**20),
        ("kv_memory", "1.5GB", 1_500_000_000),
        ("kv_memory", "4096", 4096),
        ("kv_memory", np.int64(4096), 4096),
        ("kv_memory", 4096.0, 4096),
        ("block_tokens", 1, 1),
        ("threads", 2, 2),
        ("granularity", "layer", "layer"),
        ("speculation", "off", "off"),
        ("speculation", False, "off"),  # as YAML reads it without quotes
        ("speculation", 8, 8),
        ("window_seconds", "250 ms", 0.25),
        ("window_seconds", 2, 2.0),
        ("timeout_close", "1 minute", 60.0),
    ],
)
def test_text_and_numbers_are_read(field, given, expected):
    value = getattr(Config.load(**{field: given}), field)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("field", "bad", "allowed"),
    [
        ("kv_memory", 0, 'a whole number of bytes or text such as "64 MiB", of at least 1, or null'),
        ("kv_memory", "-1 MiB", "at least 1"),
        ("kv_memory", "lots", "64 MiB"),
        ("kv_memory", "MiB", "64 MiB"),
        ("kv_memory", "64 mebibites", "64 MiB"),
        ("kv_memory", "1e400 GB", "64 MiB"),
        ("kv_memory", 1.5, "a whole number"),
        ("kv_memory", True, "a whole number"),
        ("kv_memory", [1], "a whole number"),
        ("block_tokens", 48, "one of 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024"),
        ("block_tokens", "64", "one of 1, 2"),
        ("threads", 0, "a whole number of at least 1, or null"),
        ("granularity", "step", "one of window, layer"),
        ("granularity", 1, "one of window, layer"),
        ("speculation", True, "one of auto, off, 1, 2, 4"),
        ("speculation", 0, "one of auto, off, 1, 2, 4"),
        ("channel", "pigeon", "one of auto, tcp, unix, ucx"),
        ("channel", 1, "one of auto, tcp, unix, ucx"),
        ("unencrypted_channels", "yes", "true or false"),
        ("cuda_graphs", "yes", "true or false"),
        ("prefill_chunk_tokens", 0, "a whole number of at least 1"),
        ("window_steps", -1, "a whole number of at least 1"),
        ("window_steps", "many", "a whole number of at least 1"),
        ("window_seconds", 0, 'a number of seconds or text such as "2 minutes", above 0'),
        ("window_seconds", float("nan"), "above 0"),
        ("window_seconds", float("inf"), "above 0"),
        ("window_seconds", "soon", "above 0"),
        ("window_batch", False, "a whole number"),
        ("timeout_open", "-3 s", "above 0"),
        ("timeout_receive", "3 lightyears", "above 0"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(field, bad, allowed):
    key = next(f.metadata["key"] for f in fields(Config) if f.name == field)
    with pytest.raises(ConfigError) as by_argument:
        Config.load(**{field: bad})
    with dask.config.set({key: bad}), pytest.raises(ConfigError) as by_dask:
        Config.load()
    assert str(by_argument.value).startswith(f"{key} (argument {field}) is {bad!r}, but must be ")
    assert str(by_dask.value).startswith(f"{key} is {bad!r}, but must be ")
    assert allowed in str(by_argument.value)
    assert allowed in str(by_dask.value)


NULLABLE = {"distkv.host-memory", "distkv.kv-memory", "distkv.threads", "distkv.trace", "distkv.window.steps"}


@pytest.mark.parametrize("key", sorted({*KEYS} - NULLABLE))
def test_null_is_refused_where_it_means_nothing(key):
    with dask.config.set({key: None}), pytest.raises(ConfigError, match=f"{key} is None, but must be"):
        Config.load()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"distkv.window.stepz": 1}, r"distkv\.window\.stepz is not a setting\. Did you mean distkv\.window\.steps\?"),
        ({"distkv.kv-memroy": 1}, r"distkv\.kv-memroy is not a setting\. Did you mean distkv\.kv-memory\?"),
        ({"distkv.xyzzy": 1}, r"distkv\.xyzzy is not a setting\. (Did you mean|Settings are:) .*distkv\."),
        ({"distkv.window": 3}, r"distkv\.window is 3, but must be a section with the keys seconds, .*steps, batch\."),
        ({"distkv": "on"}, r"distkv is 'on', but must be a section"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tree, message):
    with dask.config.set(tree), pytest.raises(ConfigError, match=message):
        Config.load()


def test_an_unknown_argument_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"window_step is not a setting\. Did you mean window_steps\?"):
        Config.load(window_step=1)
    with pytest.raises(ConfigError, match=r"Settings are: kv_memory, block_tokens"):
        Config.load(qqqqqq=1)

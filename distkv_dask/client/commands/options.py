"""Options that commands share: cluster, model and sampling; each is checked when it is parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource
from dask.utils import parse_bytes

from distkv_dask.client.commands.failures import clear_failures
from distkv_dask.client.documents.readers import Reader
from distkv_dask.config import Config
from distkv_dask.errors import DistKVError
from distkv_dask.filesystems import local_path
from distkv_dask.models.adapter_files import read_adapter
from distkv_dask.models.rope_scaling import checked
from distkv_dask.sampling import YES_NO, SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])


class LocalFile(click.Path):
    """A file on this machine, as a path or a ``file:`` URI."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A :class:`Path`."""
        path = local_path(value)
        if path is None:
            self.fail(f"{value} is not on this machine: copy it here, or mount it", param, ctx)
        return super().convert(path, param, ctx)


def scheduler_option(command: Command) -> Command:
    """Add ``--scheduler`` to a command that starts a cluster without it."""
    return click.option(
        "--scheduler",
        metavar="ADDRESS",
        envvar="DASK_SCHEDULER_ADDRESS",
        help="Dask scheduler of a running cluster, such as tcp://10.0.0.1:8786. Without it, a cluster is "
        "started on this machine.",
    )(command)


def running_option(command: Command) -> Command:
    """Add ``--scheduler`` to a command that inspects a running cluster."""
    return click.option(
        "--scheduler",
        metavar="ADDRESS",
        envvar="DASK_SCHEDULER_ADDRESS",
        required=True,
        help="Dask scheduler of the cluster, such as tcp://10.0.0.1:8786; or set DASK_SCHEDULER_ADDRESS.",
    )(command)


def engine_option(command: Command) -> Command:
    """Add ``--engine`` to a command that opens one without it."""
    return click.option(
        "--engine",
        metavar="ID",
        help="Ask an engine that is already open on the cluster, with its model. Give its id, as shown by distkv "
        "status, or auto if only one is open.",
    )(command)


def size_options(command: Command) -> Command:
    """Add the options that size a cluster on this machine."""
    for option in (
        click.option(
            "--memory-limit",
            metavar="BYTES",
            callback=_memory_limit,
            help="Memory limit of each worker, such as '8 GiB'. With --workers, by default its part of the machine's "
            "memory, and the weights, which they share.",
        ),
        click.option("--threads", type=click.IntRange(1), help="Compute threads of each worker."),
        click.option(
            "--workers", type=click.IntRange(1), help="Worker processes. By default all three suit the machine."
        ),
    ):
        command = option(command)
    return command


def reader_option(command: Command) -> Command:
    """Add ``--reader`` to a command that reads documents."""
    return click.option(
        "--reader",
        type=click.Choice(get_args(Reader)),
        default="auto",
        show_default=True,
        help="What reads documents: pypdf reads PDFs, docling also their layout and tables, .docx, .pptx and .epub.",
    )(command)


def adapter_option(command: Command) -> Command:
    """Add ``--adapter`` to a command that computes something."""
    return click.option(
        "--adapter",
        metavar="FOLDER",
        callback=_adapter,
        help="LoRA adapter, as peft saves it, with which answers are computed; all workers must be able to read it.",
    )(command)


def _adapter(_: click.Context, __: click.Parameter, place: str | None) -> str | None:
    if place is None:
        return None
    with clear_failures():
        return read_adapter(place).path


def sampling_options(command: Command) -> Command:
    """Add the sampling options."""
    command = _further_options(command)
    for option in (
        click.option(
            "--score",
            is_flag=True,
            help="The question is a yes/no question: give the probability of Yes relative to No, one number.",
        ),
        click.option(
            "--choices",
            metavar="A,B,C",
            callback=_choices_of,
            help="Answer with exactly one of these, and give each one's probability. Choices with commas: as JSON.",
        ),
        click.option("--regex", metavar="PATTERN", help="Regular expression that whole answers match."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends an answer; may be repeated."),
        click.option("--seed", type=int, help="Seed that makes draws repeatable."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw from the most likely tokens only."
        ),
        click.option(
            "--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token."
        ),
        click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Longest answer, in tokens."),
    ):
        command = option(command)
    return command


def _further_options(command: Command) -> Command:
    """Add those for log probabilities, several answers, quotes and grammars."""
    for option in (
        adapter_option,
        click.option(
            "--grammar",
            type=LocalFile(),
            callback=_text_of,
            help="File with a grammar in llguidance's variant of Lark. Answers follow it.",
        ),
        click.option(
            "--evidence",
            is_flag=True,
            help="Answer in one line, followed by a quote of the document, word for word.",
        ),
        click.option(
            "--quotes", is_flag=True, help="Answer with a quote of the document, word for word, and say where it is."
        ),
        click.option("--best-of", type=int, metavar="COUNT", help="Answers to draw; the -n best of them are kept."),
        click.option("-n", "n", type=int, default=1, metavar="COUNT", help="Answers to draw for each prompt."),
        click.option(
            "--prompt-logprobs", type=int, metavar="COUNT", help="As --logprobs, for the tokens of the prompt."
        ),
        click.option(
            "--logprobs",
            type=int,
            metavar="COUNT",
            help="Give the log probabilities of answers' tokens, and of this many of the most likely ones.",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Add the options for the model and the memory of its KV cache."""
    model = click.option(
        "--model", default="smollm2-135m", show_default=True, help="Directory, GGUF file or Hugging Face name."
    )
    return model(loading_options(command))


def loading_options(command: Command) -> Command:
    """Add the options that say how a model is loaded, and the memory of its KV cache."""
    for option in (
        click.option(
            "--kv-memory",
            metavar="BYTES",
            callback=_kv_memory,
            help="Memory of each worker's KV cache, such as '4 GiB'; by default half of what the weights leave of its "
            "memory limit.",
        ),
        click.option(
            "--rope-scaling",
            metavar="KIND:FACTOR",
            callback=_rope_scaling,
            help="Allow sequences longer than the model was trained for: yarn:4 or linear:2, for example.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(("auto", "bfloat16", "float16", "float32")),
            default="auto",
            show_default=True,
            help="Dtype of weights and KV cache; auto takes the checkpoint's.",
        ),
    ):
        command = option(command)
    return command


def _rope_scaling(_: click.Context, __: click.Parameter, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    kind, _colon, factor = text.partition(":")
    try:
        return checked({"rope_type": kind, "factor": float(factor)})
    except (ValueError, DistKVError) as error:
        raise click.BadParameter(f"{text!r} is not like yarn:4 ({error})") from error


def _text_of(_: click.Context, __: click.Parameter, path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} cannot be read as text: {error}") from error


def _choices_of(_: click.Context, __: click.Parameter, text: str | None) -> list[str] | None:
    if text is None or not text.lstrip().startswith("["):
        return None if text is None else [one.strip() for one in text.split(",")]
    try:
        choices: list[str] = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a JSON list: {error}") from error
    return choices


def _kv_memory(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    try:
        if text is not None:
            Config.load(kv_memory=text)
    except DistKVError as error:
        raise click.BadParameter(str(error)) from error
    return text


def _memory_limit(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    try:
        if text not in (None, "auto") and parse_bytes(text) < 0:
            raise ValueError("it is negative")
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r} is not an amount of memory such as '8 GiB' ({error})") from error
    return text


def sampling_of(options: dict[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
    """Sampling parameters of a command, and those that were given explicitly; removes them from ``options``."""
    names = (
        "max_new_tokens", "temperature", "top_p", "seed", "stop", "regex", "grammar", "choices", "logprobs",
        "prompt_logprobs", "n", "best_of", "adapter",
    )  # fmt: skip
    given = {name: options.pop(name) for name in names}
    given |= {name: options.pop(name) for name in ("embed", "normalize") if name in options}
    scores = options.pop("score")
    if scores and given["choices"] is not None:
        raise click.UsageError("--score has its own choices, Yes and No: leave out --choices")
    given["choices"] = YES_NO if scores else given["choices"]
    if (quotes := options.pop("quotes")) and options["evidence"]:
        raise click.UsageError("--quotes makes the whole answer a quote, but --evidence does not: give one of them")
    given["quotes"] = "evidence" if options.pop("evidence") else quotes
    with clear_failures():
        said = {name: value for name, value in given.items() if was_given(name)}
        said |= {"choices": YES_NO} if scores else {}
        return SamplingParams(**given), said | ({"quotes": given["quotes"]} if given["quotes"] else {})


def check_drawn(sampling: SamplingParams) -> None:
    """Refuse sampling options for greedy answers."""
    for name in ("top_p", "seed"):
        if sampling.temperature == 0 and was_given(name):
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for sampled answers, but --temperature 0 takes the most likely token: "
                f"leave it out, or add --temperature 1"
            )


def was_given(name: str) -> bool:
    """Whether an option of the current command was given."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT

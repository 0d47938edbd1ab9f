"""What every system is asked, as token ids: documents, one document, a passage of it, short prompts, questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GIVEN = 24
"""Tokens of a passage that its extraction begins with."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the cases are: numbers of prompts, tokens of a document, new tokens of each answer."""

    documents: int
    tokens: int
    new: int
    extracted: int
    short: tuple[int, ...]
    questions: int
    answer: int


FULL = Sizes(documents=8, tokens=6070, new=64, extracted=96, short=(1, 8, 32), questions=16, answer=32)
QUICK = Sizes(documents=2, tokens=300, new=6, extracted=6, short=(1, 2), questions=2, answer=3)


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts that come at once, each answered with ``new`` tokens; questions on ``document`` where there is one.

    Attributes
    ----------
    speculate
        Whether systems that can do so shall guess tokens from the text.
    few
        By system that answers one prompt after the other and would take minutes: how many it is measured with.
    slow
        Whether one turn has to do.
    """

    name: str
    prompts: tuple[Ids, ...]
    new: int
    document: Ids = ()
    speculate: bool = False
    few: tuple[tuple[str, int], ...] = ()
    slow: bool = False

    def request(self, system: str) -> dict[str, Any]:
        """What a system's process is sent."""
        prompts = self.prompts[: dict(self.few).get(system, len(self.prompts))]
        return {"prompts": prompts, "new": self.new, "document": self.document, "speculate": self.speculate}

    @property
    def shortest(self) -> dict[str, Any]:
        """A request for two tokens after a few."""
        return {"prompts": [self.prompts[0][:16]], "new": 2, "document": (), "speculate": False}


def cases(ids: Sequence[int], encode: Callable[[str], Sequence[int]], sizes: Sizes) -> list[Case]:
    """All cases, in the order in which they run, from a text's tokens; ``encode`` makes tokens of what follows it."""
    pieces = tuple((*ids[at * sizes.tokens : (at + 1) * sizes.tokens],) for at in range(sizes.documents))
    passage = sizes.tokens * 2 // 3
    again = encode("\n\nThe same passage once more, word for word:\n\n")
    extraction = (*pieces[0], *again, *pieces[0][passage : passage + GIVEN])
    short = tuple((*ids[at * 97 : at * 97 + 20 + at * 7 % 60],) for at in range(max(sizes.short)))
    asked = tuple(
        (*encode(f"\n\nQuestion {at}: what does the text say about this?\nAnswer:"),) for at in range(sizes.questions)
    )
    one_by_one = (("transformers", 2), ("llama.cpp", 2))
    return [
        *(Case(f"short-{n}", short[:n], sizes.new) for n in sizes.short),
        Case("document", pieces[:1], sizes.new),
        Case("extraction", (extraction,), sizes.extracted, speculate=True),
        Case("questions", asked, sizes.answer, pieces[0], few=(("transformers", 4),)),
        Case("documents", pieces, sizes.new, few=one_by_one, slow=True),
        Case("spread", pieces, sizes.new, few=one_by_one, slow=True),
    ]

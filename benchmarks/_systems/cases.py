"""Cases that all systems are given, as token ids: documents, one document, its extraction, short prompts, questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GIVEN = 24
"""Tokens of a passage that the prompt of its extraction ends with."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the cases: numbers of prompts, tokens of a document, new tokens of each answer."""

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
    """Prompts that arrive at once, each answered with ``new`` tokens; questions on ``document`` if there is one.

    Attributes
    ----------
    speculate
        Whether systems that support it speculate, with tokens guessed from the text.
    few
        Numbers of prompts for systems that answer one after the other, where all prompts would take minutes.
    slow
        Whether the case is measured in one turn only.
    """

    name: str
    prompts: tuple[Ids, ...]
    new: int
    document: Ids = ()
    speculate: bool = False
    few: tuple[tuple[str, int], ...] = ()
    slow: bool = False

    def request(self, system: str) -> dict[str, Any]:
        """The request that is sent to a system's process."""
        prompts = self.prompts[: dict(self.few).get(system, len(self.prompts))]
        return {"prompts": prompts, "new": self.new, "document": self.document, "speculate": self.speculate}

    @property
    def shortest(self) -> dict[str, Any]:
        """A request for two tokens with a short prompt."""
        return {"prompts": [self.prompts[0][:16]], "new": 2, "document": (), "speculate": False}


def cases(ids: Sequence[int], encode: Callable[[str], Sequence[int]], sizes: Sizes) -> list[Case]:
    """All cases, in the order in which they run, from a text's tokens; ``encode`` encodes what is appended to it."""
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

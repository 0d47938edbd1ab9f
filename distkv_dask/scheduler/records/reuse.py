"""What a request shares with others: the sequence that it continues, and the tokens that it did not compute."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.placement import Placement


@dataclass(frozen=True, slots=True)
class Parent:
    """The sequence whose blocks a request shares: the client named it, or it is ``borrowed``, found by its tokens."""

    number: int
    borrowed: bool = False


@dataclass(slots=True)
class Reuse:
    """What a request did not have to compute since it last waited for room.

    ``shared`` of its first tokens are its parent's; ``restored`` tokens were read from lower tiers. It ``awaits``
    another request with which it begins alike: its number, and how many tokens they will share. The blocks that it has
    ``given`` are its own work, which it now shares with others (:mod:`~distkv_dask.scheduler.cache.common`).

    If homes have state besides KV, it ``begins`` with a snapshot of this sequence; ``common`` is how many tokens it has
    in common with some sequence, snapshot or not.
    """

    shared: int = 0
    restored: int = 0
    awaits: tuple[int, int] | None = None
    given: Placement = ()
    begins: int | None = None
    common: int = 0

    @property
    def spared(self) -> int:
        """Tokens that were not computed for it: others had, or lower tiers gave them back."""
        return self.shared + self.restored - sum(span.tokens for span in self.given)

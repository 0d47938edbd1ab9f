"""What documents and chats have in common: a ``with`` block that frees their KV at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from distkv_dask.client.session.session import Session


class Kept(ABC):
    """Something that stays on the cluster until its user leaves the ``with`` (or ``async with``) block."""

    _session: Session

    @abstractmethod
    async def _end(self) -> None:
        """Release it."""

    def _leave(self) -> Any:
        return self._session.leave(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._end()

"""The workers among which an engine's layers are divided, by stage; others stand by. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distkv_dask.config import Config
from distkv_dask.errors import ClusterError, ConfigError
from distkv_dask.messages.from_worker import Opened
from distkv_dask.placement import Stage


class Group:
    """One worker a stage; the home, which is the first stage, opens once the others have.

    Parameters
    ----------
    count
        Number of stages.
    """

    def __init__(self, count: int) -> None:
        self.places = [""] * count
        self.closing: set[str] = set()
        """Workers that were told to close the engine because they lost a stage: until they answer, what they tell is
        of that time."""
        self.failed: set[str] = set()
        """Workers that could not open a stage."""
        self._asked = False

    @property
    def home(self) -> str:
        """The worker with the first stage; empty where there is none."""
        return self.places[0]

    def take(self, worker: str) -> int | None:
        """Give a worker a stage that has none, the first one last; None where none needs it."""
        if worker in self.places or worker in self.failed or "" not in self.places:
            return None
        number = next((at for at in range(1, len(self.places)) if not self.places[at]), 0)
        self.places[number] = worker
        return number

    def leave(self, worker: str) -> int | None:
        """A worker is gone; the number of its stage, if it had one."""
        if worker not in self.places:
            return None
        number = self.places.index(worker)
        self.places[number] = ""
        self._asked &= number > 0
        return number

    def first_stage(self, facts: Mapping[str, Opened]) -> Stage | None:
        """What the home is told, once, when all other stages are open."""
        others = self.places[1:]
        if self._asked or not self.home or not all(worker in facts for worker in others):
            return None
        self._asked = True
        opened = [facts[worker] for worker in others]
        blocks = min(one.capacity_blocks for one in opened)
        return Stage(0, len(self.places), tuple(one.endpoint for one in opened), blocks)


def check_stages(config: Config, workers: Sequence[str]) -> None:
    """Refuse an engine with several stages before anything is started.

    Parameters
    ----------
    config
        Its settings.
    workers
        Those that may load a model.

    Raises
    ------
    ConfigError
        A setting does not go together with stages.
    ClusterError
        There are too few workers.
    """
    wrong = {
        "distkv.granularity: layer": config.granularity == "layer",
        "distkv.deterministic: true": config.deterministic,
        "distkv.weights: disk": config.weights == "disk",
        "distkv.device: cuda": config.device == "cuda",
        "distkv.trace": config.trace is not None,
    }
    if found := [name for name, is_set in wrong.items() if is_set]:
        raise ConfigError(
            f"distkv.stages is {config.stages}, which does not go together with {' and '.join(found)}: change that, or "
            "set distkv.stages to 1"
        )
    if len(workers) < config.stages:
        raise ClusterError(
            f"distkv.stages is {config.stages}, but the cluster has {len(workers)} workers that may load a model: "
            "start more (cluster.scale(n)), or lower distkv.stages"
        )

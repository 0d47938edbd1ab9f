"""The workers among which an engine's layers are divided, by stage; others stand by. Pure: messages out, none sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distkv_dask.config import Config
from distkv_dask.errors import ClusterError, ConfigError
from distkv_dask.messages.from_worker import Closed, FromWorker, Opened
from distkv_dask.messages.names import EngineSpec
from distkv_dask.messages.to_worker import Open
from distkv_dask.placement import Stage


class Group:
    """One worker a stage; the home, which is the first stage, opens once the others have.

    Parameters
    ----------
    spec
        The engine.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self.places = [""] * spec.config.stage_count
        self._closing: set[str] = set()
        """Workers told to close the engine because they lost a stage: messages before their answers are outdated."""
        self._failed: set[str] = set()
        self._asked = False

    @property
    def home(self) -> str:
        """The worker with the first stage; empty if there is none."""
        return self.places[0]

    def assign_stage(self, worker: str) -> bool:
        """Give a worker a stage that has no worker, the first one last; False if all stages have one."""
        if worker in self.places or worker in self._failed or "" not in self.places:
            return False
        self.places[next((at for at in range(1, len(self.places)) if not self.places[at]), 0)] = worker
        return True

    def openings(self, worker: str, facts: Mapping[str, Opened]) -> list[Open]:
        """What is sent once a worker has taken a stage, or has opened it.

        Parameters
        ----------
        worker
            The worker.
        facts
            Of all workers that have opened the engine.
        """
        number, found = self.places.index(worker), list[Open]()
        if number and worker not in facts:
            found.append(Open(worker, self._spec, None, Stage(number, len(self.places))))
        if (stage := self.first_stage(facts)) is not None:
            found.append(Open(self.home, self._spec, None, stage))
        return found

    def fail(self, worker: str) -> None:
        """A worker could not open its stage; it gets no other."""
        self._failed.add(worker)

    def leave(self, worker: str) -> str | None:
        """A worker is gone.

        Returns
        -------
        str or None
            The home, which must close: without a stage it has nothing of its sequences, or nothing to wait for. Empty
            if there is none, and None if the worker had no stage, so that nothing changes.
        """
        if worker not in self.places:
            return None
        self.places[self.places.index(worker)] = ""
        home, self.places[0], self._asked = self.home, "", False
        if home:
            self._closing.add(home)
        return home

    def gone(self, worker: str) -> None:
        """A worker's process has ended, or left the cluster."""
        self._closing.discard(worker)

    def is_old(self, message: FromWorker) -> bool:
        """Whether a message is of a worker's time before it lost a stage; takes note of the last one."""
        if message.worker not in self._closing:
            return False
        if isinstance(message, Closed):
            self._closing.discard(message.worker)
        return True

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
        A setting cannot be combined with stages.
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
            f"distkv.stages is {config.stage_count}, which cannot be combined with {' and '.join(found)}: change that, "
            "or set distkv.stages to 1"
        )
    if len(workers) < config.stage_count:
        raise ClusterError(
            f"distkv.stages is {config.stage_count}, but the cluster has {len(workers)} workers that may load a model: "
            "start more (cluster.scale(n)), or lower distkv.stages"
        )

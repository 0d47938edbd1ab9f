"""From commands to Dask graphs at the engine's granularity: the same plan, lowered to few tasks or to many. Pure."""

from __future__ import annotations

from distkv_dask.errors import CapacityError
from distkv_dask.gang import DecodeWindow, Gang
from distkv_dask.graphs.build import StepGraph, attend_graph, prefill_graph, window_graph
from distkv_dask.graphs.layers import layer_prefill_graph, layer_window_graph
from distkv_dask.scheduler.commands import AddHolders, SubmitPrefill, SubmitWindow
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState


def lower(
    command: SubmitPrefill | SubmitWindow | AddHolders, granularity: str, layers: int
) -> tuple[StepGraph, list[Gang]]:
    """The graph that carries out a command, and its gangs.

    A graph of layers has all its dependencies from the start: holders cannot be added, and a sequence that needs others
    waits for the next window.
    """
    by_layer = granularity == "layer"
    match command:
        case SubmitPrefill(chunks):
            graph = layer_prefill_graph(chunks, layers) if by_layer else prefill_graph(chunks)
            return graph, [chunk.gang for chunk in chunks]
        case SubmitWindow(window, after):
            graph = layer_window_graph(window, layers, after) if by_layer else window_graph(window)
            return graph, [window.gang]
        case AddHolders(gang, holders):
            return attend_graph(gang, () if by_layer else holders), [gang]


def step_graph(life: MachineState, tokens: int, granularity: str, layers: int) -> StepGraph:
    """The graph of one decode step of a sequence with room for ``tokens`` tokens, placed as it would be now.

    Raises
    ------
    CapacityError
        There is no room for it now.
    """
    placement = life.policy.place(life.ledger, Ask(-1, tokens, tokens))
    if placement is None:
        raise CapacityError(
            f"a sequence of {tokens} tokens needs {life.ledger.blocks(tokens)} blocks, which the workers of the engine "
            f"do not have free now: wait for requests to finish, shorten the prompt, or raise kv_memory"
        )
    home = placement[-1].worker
    gang = Gang(life.engine, 0, "step", life.ledger.epoch, home, tuple(life.ledger.holders(placement, but=home)))
    window = DecodeWindow(gang, 0, 1, life.config.window_seconds)
    return lower(SubmitWindow(window, None), granularity, layers)[0]

"""How long does a round trip of one layer's queries and partials take on each kind of channel?

The home is this process. The holder, in its own process, answers every frame with the same number of bytes, through
the classes that the engine uses. The kinds take turns.
"""

from __future__ import annotations

import multiprocessing
import selectors
import statistics
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection

from _report import parser, report

from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.base import Inlet, Listener
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.channels.optional_ucx import ucx_listener
from distkv_dask.worker.channels.tcp import TcpListener
from distkv_dask.worker.channels.unix import UnixListener

SIZES = {"4 KB": 4096, "64 KB": 65_536, "1 MB": 1 << 20}
HELLO = Header(Kind.HELLO)


def hold(kind: str, said: Connection) -> None:
    """Answer one home until it closes the channel."""
    maximum = max(SIZES.values())
    listener: Listener
    if kind == "unix":
        listener = unix = UnixListener(maximum)
        said.send(Endpoint("holder", "127.0.0.1", 9, unix.name))
    elif kind == "ucx":
        listener = ucx = ucx_listener(maximum)
        said.send(Endpoint("holder", "127.0.0.1", 9, ucx=ucx.port))
    else:
        listener = tcp = TcpListener("127.0.0.1", 0, maximum)
        said.send(Endpoint("holder", "127.0.0.1", tcp.port))
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    reply = memoryview(bytes(maximum))
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                while (inlet := listener.accept()) is not None:
                    selector.register(inlet, selectors.EVENT_READ)
            elif not serve(key.fileobj, reply):  # type: ignore[arg-type]
                return


def serve(inlet: Inlet, reply: memoryview) -> bool:
    try:
        while (header := inlet.receive()) is not None:
            inlet.send(header, reply[: header.length])
            while inlet.sending:
                inlet.flush()
            inlet.consume(header)
    except ConnectionError:
        return False
    return True


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=200, help="round trips in a turn")
    arguments.add_argument("--turns", type=int, default=5, help="turns of each kind and size")
    options = arguments.parse_args()
    kinds = ["tcp", "unix", *(["ucx"] if find_spec("ucxx") else [])]
    spawn = multiprocessing.get_context("spawn")
    homes, processes = {}, []
    for kind in kinds:
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=hold, args=(kind, there), daemon=True))
        processes[-1].start()
        homes[kind] = Dialer(kind, None).connect(here.recv(), 10.0)
        homes[kind].send(HELLO)
        homes[kind].recv_into(HELLO)
    times: dict[str, list[float]] = {f"{kind}, {size}": [] for kind in kinds for size in SIZES}
    for _ in range(options.turns):
        for size, count in SIZES.items():
            header, question = Header(Kind.ATTEND, length=count), bytes(count)
            answer = memoryview(bytearray(count))
            for kind, home in homes.items():
                for _ in range(options.rounds):
                    began = time.perf_counter()
                    home.send(header, question)
                    home.recv_into(header, answer)
                    times[f"{kind}, {size}"].append(time.perf_counter() - began)
    figures = {}
    for name, seconds in times.items():
        figures[f"round trip us, {name}"] = statistics.median(seconds) * 1e6
    for home in homes.values():
        home.close()
    report(figures, {"rounds": options.rounds, "turns": options.turns}, options.json)


if __name__ == "__main__":
    main()

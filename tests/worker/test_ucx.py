"""Over UCX, too, a killed or frozen holder gives an error in time; channels that cannot be encrypted are refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from _channels import TLS, UCX, Way, certificates, skip_without
from _peers import Holder, ask, begin, connect, gang, serves
from _processes import freeze

from distkv_dask.errors import ChannelError, ChannelTimeoutError, ConfigError, MissingProgramError
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.channels.frames import Header, Kind

over_ucx = pytest.mark.parametrize("way", [UCX], indirect=True, ids=["ucx"])
ucxx_may_keep_sockets = pytest.mark.xfail(
    strict=False, reason="on a busy machine ucxx 0.52 now and then keeps sockets that were closed while in use"
)
FOREVER = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from _channels import UCX
from _fakes import TOKEN
from _peers import Holder, KV_HEADS, HEAD_DIM, gang
from distkv_dask.worker.blocks.pool import BlockShape, Pool
from distkv_dask.worker.holder.service import Limits, Service
pool = Pool(BlockShape(2, KV_HEADS, HEAD_DIM, "float32", 8), 16)
pool.reserve(1, 0, 40)
lane = Holder(UCX)
lane.attach(Service("engine", TOKEN.encode(), pool, Limits(60.0, 60.0)))
lane.open_session("engine", gang())
print(lane.ucx, flush=True)
threading.Event().wait()
"""


def sockets() -> int:
    return len(psutil.Process().net_connections("all"))


class Elsewhere:
    """A holder lane in another process, as homes see it."""

    def __init__(self, port: int, dialer: Dialer | None = None) -> None:
        self._port = port
        self._dialer = dialer or Dialer("ucx", None)

    def by(self, dialer: Dialer) -> Elsewhere:
        return Elsewhere(self._port, dialer)

    def open(self):
        return self._dialer.connect(Endpoint("w1", "127.0.0.1", 9, ucx=self._port), 10.0)


@contextmanager
def holder_process() -> Iterator[tuple[subprocess.Popen[str], Elsewhere]]:
    command = [sys.executable, "-c", FOREVER, str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = (line for line in process.stdout if line.strip().isdigit())  # UCX prints warnings there
            yield process, Elsewhere(int(next(lines)))
        finally:
            process.kill()


@pytest.mark.ucx
@pytest.mark.parametrize("frozen", [False, True], ids=["killed", "frozen"])
def test_a_holder_process_that_is_killed_or_frozen_is_an_error_in_time(frozen: bool) -> None:
    skip_without(UCX)
    with holder_process() as (process, holder):
        home = connect(holder)  # type: ignore[arg-type]
        begin(home)
        home.recv_into(Header(Kind.READY, 1, 1))
        ask(home)
        home.limit(1.0 if frozen else 30.0)
        if frozen:
            freeze(process.pid)
        else:
            process.kill()
            process.wait(30)
        began = time.monotonic()
        with pytest.raises(ChannelError) as caught:
            ask(home, layer=1)
        assert isinstance(caught.value, ChannelTimeoutError) is frozen
        assert time.monotonic() - began < 10
        assert caught.value.__cause__ is not caught.value  # Dask follows causes to their end, and would never find it
        assert not home.idle() or frozen
        home.close()


@pytest.mark.ucx
@ucxx_may_keep_sockets
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGCONT], ids=["dies", "wakes up"])
def test_a_question_given_up_to_a_frozen_holder_costs_no_sockets_once_it(how: signal.Signals) -> None:
    skip_without(UCX)
    dialer, before = Dialer("ucx", None), sockets()
    with holder_process() as (process, holder):
        home = connect(holder.by(dialer))  # type: ignore[arg-type]
        begin(home)
        home.recv_into(Header(Kind.READY, 1, 1))
        freeze(process.pid)
        home.limit(0.5)
        with pytest.raises(ChannelTimeoutError, match="w1 did not take"):
            home.send(Header(Kind.ATTEND, 1, 1, length=1 << 20), bytes(1 << 20))
        home.close()
        os.kill(process.pid, how)
        deadline = time.monotonic() + 10
        while sockets() > before and time.monotonic() < deadline:
            holder.by(dialer).open().close()
        assert sockets() <= before


@over_ucx
def test_a_killed_home_ends_its_session_at_once(lane: Holder, way: Way) -> None:
    code = f"""
import sys, os, signal
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from _channels import UCX
from _peers import begin, connect
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels.frames import Header, Kind
class There:
    open = lambda self: UCX.open(Endpoint("w1", "127.0.0.1", 9, ucx={lane.ucx}))
home = connect(There())
print("welcome", flush=True)
begin(home)
home.recv_into(Header(Kind.READY, 1, 1))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("welcome" in line for line in process.stdout)
        session = lane.open_session("engine", gang())
        process.wait(60)
    with pytest.raises(ChannelError, match="w0 closed the channel"):
        session.wait(10)
    assert serves(lane, 2)


@over_ucx
def test_strangers_on_the_sockets_of_ucx_disturb_nobody(lane: Holder, way: Way) -> None:
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            with socket.create_connection(connection.laddr, 5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
    assert serves(lane, 2)


@ucxx_may_keep_sockets
@over_ucx
def test_homes_that_come_and_go_leave_no_sockets_at_the_holder(lane: Holder, way: Way) -> None:
    assert serves(lane, 1)
    before = sockets()
    for number in range(2, 12):
        assert serves(lane, number)
    deadline = time.monotonic() + 5
    while sockets() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sockets() <= before


def test_ucx_is_refused_on_a_cluster_with_certificates_unless_the_user_says_so() -> None:
    with pytest.raises(ConfigError, match=r"cannot be encrypted.*auto.*distkv.unencrypted-channels"):
        Dialer("ucx", certificates())
    dialer = Dialer("ucx", certificates(), unencrypted=True)
    assert dialer.uses_ucx
    assert "not encrypted" in dialer.explain()


def test_auto_takes_ucx_only_between_machines_of_a_cluster_that_speaks_it() -> None:
    assert not Dialer("auto", None).uses_ucx
    assert not Dialer("auto", TLS.certificates, cluster_ucx=True).uses_ucx
    dialer = Dialer("auto", None, cluster_ucx=True)
    assert dialer.uses_ucx
    assert dialer.explain().startswith("unix to workers on the same machine, ucx to others")


def test_a_worker_without_ucxx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ucxx", "ucxx._lib"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("ucx", "ucx_inlet", "ucx_line"):
        monkeypatch.delitem(sys.modules, f"distkv_dask.worker.channels.{name}", raising=False)
    lane = Holder(TLS)
    with pytest.raises(MissingProgramError, match=r"pip install 'distkv-dask\[ucx\]'"):
        lane.offer_ucx()
    lane.close()

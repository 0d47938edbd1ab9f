"""Two workers find the right kind of channel; certificates are never skipped, nor another user's socket used."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace

import pytest
from _channels import TCP, TLS, UNIX, Bare, Way, certificates
from _peers import Holder, connect, serves
from distributed.security import Security

from distkv_dask.errors import ChannelError, ChannelTimeoutError
from distkv_dask.placement import Endpoint
from distkv_dask.worker.channels import unix
from distkv_dask.worker.channels.dial import Dialer
from distkv_dask.worker.channels.frames import Header, Kind
from distkv_dask.worker.channels.tcp import TcpChannel
from distkv_dask.worker.channels.tls import Certificates, TlsChannel
from distkv_dask.worker.channels.unix import UnixChannel, UnixListener


def endpoint_of(lane: Holder) -> Endpoint:
    return Endpoint("w1", "127.0.0.1", lane.port, lane.unix)


@pytest.mark.parametrize("choice", ["auto", "tcp", "unix"])
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("way", [TCP, TLS], indirect=True, ids=["tcp", "tls"])
def test_a_home_takes_the_channel_that_the_setting_and_the_machines_ask_for(
    lane: Holder, way: Way, choice: str, near: bool
) -> None:
    endpoint = endpoint_of(lane)
    if not near:
        endpoint = replace(endpoint, unix=endpoint.unix.replace(unix.machine(), "another-machine"))
    dialer = Dialer(choice, way.certificates)
    if choice == "unix" and not near:
        with pytest.raises(ChannelError, match=r"w1 is on another machine.*auto"):
            dialer.connect(endpoint, 5.0)
        return
    channel = dialer.connect(endpoint, 5.0)
    channel.close()
    far = TlsChannel if way is TLS else TcpChannel
    assert type(channel) is (UnixChannel if near and choice != "tcp" else far)


@pytest.mark.parametrize("way", [TCP], indirect=True, ids=["tcp"])
def test_where_the_machine_is_unknown_there_is_tcp(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distkv_dask.worker.holder.lane.machine", lambda: "")
    lane = Holder(way)
    assert lane.unix == ""
    channel = Dialer("auto", None).connect(endpoint_of(lane), 5.0)
    assert type(channel) is TcpChannel
    channel.close()
    lane.close()


def test_the_rule_is_told_in_words() -> None:
    assert Dialer("auto", None).explain().startswith("unix to workers on the same machine, tcp to others")
    assert "TLS to others" in Dialer("auto", certificates()).explain()
    assert Dialer("tcp", certificates()).explain().startswith("tcp with the cluster's TLS")


@pytest.mark.parametrize("way", [UNIX], indirect=True, ids=["unix"])
def test_another_users_socket_is_refused_on_both_sides(
    lane: Holder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    me = os.geteuid()
    monkeypatch.setattr(unix.os, "geteuid", lambda: me + 1)
    with pytest.raises(ChannelError, match=f"w1 belongs to user {me}, this worker to {me + 1}.*tcp"):
        lane.open()
    with caplog.at_level(logging.WARNING), socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(5)
        stranger.connect(f"\0{lane.unix}")
        assert stranger.recv(100) == b""
    assert f"of user {me}" in caplog.text
    monkeypatch.undo()
    assert serves(lane, 2)


def test_a_unix_socket_leaves_no_file() -> None:
    listener = UnixListener(100)
    assert os.fsencode(listener._sock.getsockname())[:1] == b"\0"
    listener.close()


@pytest.mark.parametrize("way", [TLS], indirect=True, ids=["tls"])
@pytest.mark.parametrize("wrong", ["no TLS", "certificates of another cluster"])
def test_a_home_without_the_clusters_certificates_is_refused(
    lane: Holder, way: Way, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = None if wrong == "no TLS" else Certificates.of(Security.temporary())
    lane._way = replace(way, encrypted=False)  # opens plain TCP
    if other is not None:
        lane.open = lambda: Dialer("tcp", other).connect(endpoint_of(lane), 5.0)
    with caplog.at_level(logging.WARNING), pytest.raises(ChannelError):
        connect(lane)
    lane.close()
    assert "dropped a connection from 127.0.0.1" in caplog.text


def test_a_home_of_a_tls_cluster_never_speaks_plain() -> None:
    server = Bare(TCP)
    home = TLS.open(server.endpoint, 0.5)
    peer = server.accept()
    with pytest.raises(ChannelTimeoutError):
        home.send(Header(Kind.HELLO, length=6), b"secret")
    seen = peer.recv(10_000)
    assert seen[:2] == b"\x16\x03"  # a TLS handshake
    assert b"secret" not in seen
    peer.close()
    home.close()
    server.close()

"""The daemon as its supervisors see it: health and metrics over HTTP, word to systemd, draining on SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from shardkit.errors import PreconditionFailed
from shardkit.mapstore import open_store
from shardkit.shardmap import ShardMap
from shardkit.telemetry import RelayMetrics
from shardkit.testing import LocalZooKeeper, free_port
from shardkit_cdc.daemon import Relay
from shardkit_cdc.health import HealthServer, parse_address
from shardkit_cdc.pause import pause, resume
from shardkit_cdc.relay import HopOptions
from shardkit_cdc.sd_notify import Supervisor
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]

UNIT = Path(__file__).resolve().parents[2] / "examples" / "systemd" / "shardkit-relay.service"
OPTIONS = HopOptions(retry_seconds=(0.05, 0.5))


def shard_map(chain: Chain, cluster: str = "relayhealth") -> ShardMap:
    master, *copies = [server.endpoint(chain.database).url for server in chain.servers]
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": cluster,
            "version": 1,
            "keyspaces": {"all": {"tables": ["t"], "placement": chain.shard}},
            "shards": {chain.shard: {"master": master, "replicas": copies}},
        }
    )


@contextmanager
def daemon(chain: Chain, *, source: str = "") -> Iterator[tuple[Relay, str]]:
    """A relay in this process, with its health server; the server's address."""
    store = open_store(source or shard_map(chain))
    relay = Relay(store, chain.master.credentials, options=OPTIONS)
    health = HealthServer(("127.0.0.1", 0), unready=relay.unready, registry=relay.metrics.registry)
    at = f"http://127.0.0.1:{health.port}"
    assert httpx.get(f"{at}/readyz").status_code == 503  # no map yet
    relay.start()
    try:
        yield relay, at
    finally:
        relay.stop()
        assert httpx.get(f"{at}/readyz").text == "stopping\n"
        health.close()
        store.close()


def ready(at: str) -> bool:
    return httpx.get(f"{at}/readyz").status_code == 200


# --- over HTTP


def test_ready_while_every_hop_runs(pair: Chain) -> None:
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    with daemon(pair) as (_, at):
        wait_for(lambda: ready(at), "the daemon is ready")
        assert httpx.get(f"{at}/readyz").text == "ready\n"
        assert httpx.get(f"{at}/livez").status_code == 200
        pair.settle()
        connection = pair.last.connect(pair.database, autocommit=True)
        with connection:
            pause(connection, "hop:shop-0", by="ops@here")
            wait_for(lambda: not ready(at), "a paused hop makes it not ready")
            answer = httpx.get(f"{at}/readyz")
            wait_for(lambda: "paused by ops@here" in httpx.get(f"{at}/readyz").text, "it says who")
            assert pair.specs[0].name in answer.text
            assert httpx.get(f"{at}/livez").status_code == 200
            resume(connection, "hop:shop-0")
        wait_for(lambda: ready(at), "the daemon is ready again")


def test_not_ready_says_which_hop_and_why(pair: Chain) -> None:
    pair.sql("CREATE TABLE in_the_way (id INT)", server=pair.last)
    with daemon(pair) as (_, at):
        wait_for(lambda: "in_the_way" in httpx.get(f"{at}/readyz").text, "the reason is given")
        answer = httpx.get(f"{at}/readyz")
        assert answer.status_code == 503
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.text.startswith(f"{pair.specs[0].name}: ")
        for _ in range(20):  # also while the next attempt is under way
            assert "in_the_way" in httpx.get(f"{at}/readyz").text
            time.sleep(0.1)


def test_waiting_for_the_election_is_ready(zookeeper: LocalZooKeeper, pair: Chain) -> None:
    source = f"zookeeper://127.0.0.1:{zookeeper.port}/{pair.database}"
    store = open_store(source)
    store.publish(shard_map(pair, pair.database), expected_version=0)
    store.close()
    with daemon(pair, source=source) as (_, first):
        wait_for(lambda: ready(first), "the first runs")
        with daemon(pair, source=source) as (second, at):
            wait_for(lambda: ready(at), "the second stands by")
            assert [hop.report.state for hop in second.hops] == ["standby"]


def test_metrics_are_those_of_the_relay(pair: Chain) -> None:
    with daemon(pair) as (_, at):
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        pair.settle()
        name = pair.specs[0].name

        def counted() -> bool:
            return f'shardkit_relay_transactions_total{{hop="{name}"}}' in httpx.get(f"{at}/metrics").text

        wait_for(counted, "the hop's transactions are counted")
        answer = httpx.get(f"{at}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")


def test_what_is_asked_otherwise() -> None:
    health = HealthServer(("127.0.0.1", 0), unready=list, registry=RelayMetrics().registry)
    at = f"http://127.0.0.1:{health.port}"
    try:
        assert httpx.get(f"{at}/").status_code == 404
        assert httpx.get(f"{at}/readyz?verbose").status_code == 200
        head = httpx.head(f"{at}/livez")
        assert (head.status_code, head.content) == (200, b"")
        assert httpx.post(f"{at}/livez").status_code == 501
        with pytest.raises(PreconditionFailed, match=f"127.0.0.1:{health.port}"):
            HealthServer(("127.0.0.1", health.port), unready=list, registry=RelayMetrics().registry)
        # a client that says nothing holds up neither the others nor the end
        with socket.create_connection(("127.0.0.1", health.port)):
            assert httpx.get(f"{at}/livez").status_code == 200
            began = time.monotonic()
            health.close()
            assert time.monotonic() - began < 5
    finally:
        health.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9187", ("127.0.0.1", 9187)),
        (":9187", ("127.0.0.1", 9187)),
        ("0.0.0.0:9187", ("0.0.0.0", 9187)),
        ("[::1]:9187", ("::1", 9187)),
        ("relay-1:0", ("relay-1", 0)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:65536", "host:-1", "host:٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


# --- systemd


@contextmanager
def notified(tmp_path: Path, *, abstract: bool = False) -> Iterator[tuple[socket.socket, str]]:
    """A socket such as systemd gives, and its name."""
    name = f"@shardkit-test-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name[1:]}" if abstract else name)
        sock.settimeout(60)
        yield sock, name


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    with notified(tmp_path, abstract=abstract) as (sock, name):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        supervisor = Supervisor()
        supervisor.ready()
        supervisor.alive()
        supervisor.alive()  # too early
        supervisor.stopping()
        assert [sock.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
        time.sleep(0.11)
        supervisor.alive()
        assert sock.recv(100) == b"WATCHDOG=1"


def test_no_watchdog_unless_it_is_set_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with notified(tmp_path) as (sock, name):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        for usec, pid in [("", str(os.getpid())), ("200000", "1"), ("soon", str(os.getpid()))]:
            monkeypatch.setenv("WATCHDOG_USEC", usec)
            monkeypatch.setenv("WATCHDOG_PID", pid)
            Supervisor().alive()
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)


def test_without_systemd_and_with_a_socket_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Supervisor().ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Supervisor().ready()


# --- the process


def run(chain: Chain, path: Path, *words: str, port: int | None = None, **environment: str) -> subprocess.Popen[str]:
    """The daemon as a process.

    :param port: of the target, in place of its own.
    """
    path.write_text(shard_map(chain).dump().replace(f":{chain.last.port}/", f":{port or chain.last.port}/"))
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from shardkit.cli import main; main()",
            "relay",
            "run",
            "--map",
            f"file:{path}",
            *words,
        ],
        env=os.environ | {"SHARDKIT_USER": "root", "SHARDKIT_PASSWORD": ""} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_drains_under_load_and_tells_systemd(pair: Chain, tmp_path: Path) -> None:
    """Many times, so that it falls into reading, applying and committing; a big transaction is in the middle too."""
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY AUTO_INCREMENT, body LONGTEXT)")
    # The table goes over first: where it takes longer than the first round, there would be nothing to look at.
    pair.run(pair.hop(0))
    pair.settle()
    pair.stop()
    stop = threading.Event()

    def write() -> None:
        connection = pair.master.connect(pair.database)
        with connection, connection.cursor() as cursor:
            number = 0
            while not stop.is_set():
                number += 1
                for _ in range(300 if number % 20 == 0 else 2):
                    cursor.execute(
                        "INSERT INTO t (body) VALUES (REPEAT('x', %s))", (20_000 if number % 20 == 0 else 9,)
                    )
                connection.commit()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round_ in range(3):
            port = free_port()
            with notified(tmp_path, abstract=True) as (sock, name):
                process = run(
                    pair,
                    tmp_path / "map.yaml",
                    "--listen",
                    str(port),
                    NOTIFY_SOCKET=name,
                    WATCHDOG_USEC="1000000",
                )
                assert sock.recv(100) == b"READY=1"
                assert sock.recv(100) == b"WATCHDOG=1"
                assert ready(f"http://127.0.0.1:{port}")
                time.sleep(0.3 + 0.17 * round_)
                process.send_signal(signal.SIGTERM)
                told = {sock.recv(100)}
                while b"STOPPING=1" not in told:
                    told.add(sock.recv(100))
                _, log = process.communicate(timeout=60)
            assert process.returncode == 0, log
            assert "Traceback" not in log
            assert "stopped" in log
            # What the position says is there, and nothing besides: a whole number of the source's transactions.
            assert_at_a_boundary(pair)
    finally:
        stop.set()
        writer.join(60)
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def assert_at_a_boundary(pair: Chain) -> None:
    """The target holds a prefix of the source's rows, and whole transactions: 2 rows each, or 300 big ones."""
    rows = pair.last.execute("SELECT id, LENGTH(body) FROM t ORDER BY id", database=pair.database)
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    big = sum(1 for row in rows if row[1] > 9)
    assert big % 300 == 0
    assert (len(rows) - big) % 2 == 0


def test_sigterm_while_the_first_attempts_are_under_way(pair: Chain, tmp_path: Path) -> None:
    """A target that takes connections and never answers: a supervisor's patience is shorter than ours."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = run(pair, tmp_path / "map.yaml", port=silent.getsockname()[1])
        waiting, _ = silent.accept()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=25)
        waiting.close()
    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_a_port_that_is_taken_is_said_before_anything_is_relayed(pair: Chain, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = run(pair, tmp_path / "map.yaml", "--listen", str(port))
        _, log = process.communicate(timeout=60)
    assert process.returncode == 4
    assert f"cannot listen on 127.0.0.1:{port}" in log
    assert pair.last.execute("SHOW TABLES", database=pair.database) == []
    process = run(pair, tmp_path / "map.yaml", "--listen", "nowhere")
    process.communicate(timeout=60)
    assert process.returncode == 2


def test_the_unit_file_says_what_the_daemon_does() -> None:
    text = UNIT.read_text()
    assert "Type=notify" in text
    assert "shardkit relay run" in text
    assert "--listen 127.0.0.1:" in text

"""Servers that die under a move, and a Ctrl-C: the job stops with a word, and the same command finishes it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit.rebalance import Plan, State
from shardkit.testing import LocalMariaDB, LocalMySQL, LocalZooKeeper
from shardkit.testing.database import LocalDatabaseServer
from tests.conftest import FLAVOUR
from tests.rebalance_shop import FIRST, SECOND, Shop, ended, open_shop, wait_until

pytestmark = getattr(pytest.mark, FLAVOUR)


@pytest.fixture
def own_server() -> Iterator[LocalDatabaseServer]:
    """A server that the test may kill."""
    with (LocalMariaDB if FLAVOUR == "mariadb" else LocalMySQL)() as server:
        yield server


def is_stopped(process: subprocess.Popen[str]) -> bool:
    """Whether it has sent itself a SIGSTOP."""
    assert process.poll() is None, ended(process)
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stopped_at(shop: Shop, plan: Plan, directory: Path, failpoint: str) -> tuple[subprocess.Popen[str], Path]:
    """``shardkit rebalance apply`` standing still at a point on its way."""
    file = directory / "plan.yaml"
    file.write_text(plan.dump(), encoding="utf-8")
    process = shop.start(file, failpoint=f"{failpoint}:stop")
    wait_until(lambda: is_stopped(process), f"the job reaches {failpoint}", timeout=60)
    return process, file


def go_on(process: subprocess.Popen[str]) -> tuple[int, str]:
    os.kill(process.pid, signal.SIGCONT)
    return ended(process)


def test_servers_that_crash_at_the_worst_moments(own_server: LocalDatabaseServer, tmp_path: Path) -> None:
    with open_shop(own_server, f"file:{tmp_path}/map.yaml") as shop:
        before = shop.contents()
        plan = shop.plan()
        for moment in ("freezing.done", "copying.chunk", "activated.decided"):
            process, _ = stopped_at(shop, plan, tmp_path, moment)
            own_server.kill()
            own_server.start()
            code, output = go_on(process)
            assert code == 5, f"{moment}: {output}"
            assert "the connection was lost" in output
            assert "run" in output
            assert shop.contents_once() == before
            assert all(len(owners) == 1 for owners in shop.owners().values())
        code, output = shop.run(plan)
        assert code == 0, output
        assert shop.contents() == before
        assert shop.misplaced() == []


def test_ctrl_c_stops_at_a_safe_point_and_says_how_to_go_on(
    database_server: LocalDatabaseServer, tmp_path: Path
) -> None:
    with open_shop(database_server, f"file:{tmp_path}/map.yaml") as shop:
        before = shop.contents()
        plan = shop.plan()
        process, file = stopped_at(shop, plan, tmp_path, "copying.chunk")
        os.kill(process.pid, signal.SIGINT)
        code, output = go_on(process)
        assert code == 130, output
        assert f"go on with: shardkit rebalance apply {file} --map {shop.source}" in output
        assert "takes no writes until it goes on or is cancelled" in output
        assert shop.job().state is State.COPYING
        assert shop.contents_once() == before

        code, output = ended(shop.start(file))
        assert code == 0, output
        assert shop.contents() == before
        assert shop.misplaced() == []


def test_zookeeper_dies_between_the_freeze_and_the_publication(
    database_server: LocalDatabaseServer, tmp_path: Path
) -> None:
    with (
        LocalZooKeeper() as zookeeper,
        open_shop(database_server, f"zookeeper://{zookeeper.host}:{zookeeper.port}/shop") as shop,
    ):
        before = shop.contents()
        plan = shop.plan()
        process, _ = stopped_at(shop, plan, tmp_path, "verifying.done")
        zookeeper.stop()
        code, output = go_on(process)
        assert code in {4, 5}, output
        assert "run the same command again" in output or "ZooKeeper" in output
        assert shop.rows(SECOND, "SELECT COUNT(*) FROM shardkit_ownership WHERE state = 'importing'")[0][0] > 0
        assert shop.rows(FIRST, "SELECT COUNT(*) FROM shardkit_ownership WHERE state = 'frozen'")[0][0] > 0
        zookeeper.start()
        code, output = shop.run(plan)
        assert code == 0, output
        assert shop.contents() == before
        assert shop.misplaced() == []

"""The examples do what their README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from shardkit.shardmap import ShardMap
from shardkit.testing import free_port
from shardkit.testing.database import LocalDatabaseServer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(directory: Path, *words: str, **environment: str) -> str:
    """A command in the example's directory. Its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=directory,
        env={**_clean_environment(), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SHARDKIT_")}


def test_quickstart_runs_without_a_server_and_again(tmp_path: Path) -> None:
    script = str(EXAMPLES / "quickstart" / "quickstart.py")
    expected = [
        "user 5 lives on shop-1",
        "orders of user 5: [50, 51] - asked on shop-1",
        "largest orders: [121, 120, 111] - asked on shop-0, shop-1",
        "how many: 16 - asked on shop-0, shop-1",
    ]
    assert run(tmp_path, script).splitlines() == expected
    assert run(tmp_path, script).splitlines() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"shop-0.db", "shop-1.db"}


def test_the_quickstart_page_shows_the_map_that_runs() -> None:
    text = (EXAMPLES.parent / "docs" / "quickstart.md").read_text(encoding="utf-8")
    shard_map = (EXAMPLES / "quickstart" / "shardmap.yaml").read_text(encoding="utf-8")
    kept = "".join(line + "\n" for line in shard_map.splitlines() if not line.startswith("#"))
    assert kept in text


class Shop:
    """The shop, served by uvicorn."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment
        self.url = f"http://127.0.0.1:{free_port()}"

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(self.url + path, json=body, timeout=30)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        answer = httpx.get(self.url + path, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(params=["sqlite", "server"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    directory = tmp_path / "shop"
    shutil.copytree(EXAMPLES / "shop", directory)
    with ExitStack() as stack:
        environment = stack.enter_context(_on_servers(request, directory)) if request.param == "server" else {}
        made = Shop(directory, environment)
        run(directory, "-c", "from shardkit.cli import main; main()", "migrate", "upgrade", **environment)
        served = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "app:app", "--port", made.url.rpartition(":")[2]],
                cwd=directory,
                env={**_clean_environment(), **environment},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(served.terminate)
        _wait_for(made, served)
        yield made


@contextmanager
def _on_servers(request: pytest.FixtureRequest, directory: Path) -> Iterator[dict[str, str]]:
    """The map for servers with addresses of this machine, and the environment that names it."""
    server: LocalDatabaseServer = request.getfixturevalue("database_server")
    databases = {"shop-0": request.getfixturevalue("fresh_database")}
    databases["shop-1"] = databases["shop-0"] + "_b"
    server.execute(f"CREATE DATABASE {databases['shop-1']}")
    shard_map = yaml.safe_load((directory / "shardmap.mysql.yaml").read_text(encoding="utf-8"))
    shard_map["shards"] = {shard: {"master": server.endpoint(name).url} for shard, name in databases.items()}
    (directory / "here.yaml").write_text(ShardMap.parse(shard_map).dump())
    logon = server.credentials(server.endpoint(databases["shop-0"]))
    yield {"SHARDKIT_MAP": "file:here.yaml", "SHARDKIT_USER": logon.user, "SHARDKIT_PASSWORD": logon.password}
    server.execute(f"DROP DATABASE {databases['shop-1']}")


def _wait_for(shop: Shop, served: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            shop.get("/countries")
        except httpx.TransportError:
            assert served.poll() is None, served.stderr.read() if served.stderr else ""
            assert time.monotonic() < deadline, "the shop did not answer"
            time.sleep(0.05)
        else:
            return


def test_the_shop_keeps_each_users_orders_on_one_shard_and_answers_over_all(shop: Shop) -> None:
    checked = run(shop.directory, "-c", "from shardkit.cli import main; main()", "migrate", "check", **shop.environment)
    assert checked == "2 shards are as the revisions and the models say\n"

    users = [shop.post("/users", name=f"user {number}", country="kr") for number in range(12)]
    assert {user["shard"] for user in users} == {"shop-0", "shop-1"}
    for number, user in enumerate(users):
        shop.post(f"/users/{user['id']}/orders", item="tea", total=number)

    one = shop.get(f"/users/{users[3]['id']}")
    assert one["name"] == "user 3"
    assert one["country"] == "Korea"
    assert [order["total"] for order in one["orders"]] == [3]
    largest = shop.get("/orders/largest?limit=3")
    assert [order["total"] for order in largest["orders"]] == [11, 10, 9]
    assert largest["of"] == 12
    assert shop.get("/countries") == {"jp": "Japan", "kr": "Korea"}
    assert httpx.get(f"{shop.url}/users/1").status_code == 404

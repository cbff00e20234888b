"""Settings of servers that decide what a statement answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa

from shardkit.adoption.settings import read_settings, unlike
from shardkit.testing.database import LocalDatabaseServer

Open = Callable[[str], sa.Engine]


@pytest.fixture
def opened(database_server: LocalDatabaseServer) -> Iterator[Open]:
    """Engines to one server, by what each connection begins with."""
    with ExitStack() as stack:

        def opened(init_command: str) -> sa.Engine:
            engine = sa.create_engine(
                "mysql+pymysql://",
                creator=lambda: database_server.connect("mysql", init_command=init_command, ssl_disabled=True),
            )
            stack.callback(engine.dispose)
            return engine

        yield opened


def test_a_server_is_like_itself(opened: Open) -> None:
    settings = read_settings(opened("SELECT 1"))
    assert settings["flavour"] in {"MariaDB", "MySQL"}
    assert settings["time_zone"] not in {"", "SYSTEM"}
    assert not list(unlike({"one": settings, "two": settings, "file": {}}))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("SET time_zone = '+05:30'", "two: time_zone is '+05:30', on one it is "),
        ("SET sql_mode = 'ANSI_QUOTES'", "two: sql_mode is 'ANSI_QUOTES', on one it is "),
        ("SET div_precision_increment = 6", "two: div_precision_increment is '6', on one it is '4': make it alike"),
        ("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", "two: transaction_isolation is 'READ-COMMITTED'"),
        ("SET max_sort_length = 64", "two: max_sort_length is 64: longer text comes in another order"),
    ],
)
def test_what_differs_is_named(opened: Open, command: str, said: str) -> None:
    plain, other = read_settings(opened("SELECT 1")), read_settings(opened(command))
    (finding,) = unlike({"one": plain, "two": other})
    assert finding.startswith(said)
    assert not list(unlike({"one": other}))


def test_the_order_of_modes_says_nothing(opened: Open) -> None:
    one, two = (
        read_settings(opened(f"SET sql_mode = '{modes}'"))
        for modes in ("ANSI_QUOTES,IGNORE_SPACE", "IGNORE_SPACE,ANSI_QUOTES")
    )
    assert not list(unlike({"one": one, "two": two}))


def test_a_map_over_two_flavours_is_named(mariadb: LocalDatabaseServer) -> None:
    engine = sa.create_engine("mysql+pymysql://", creator=lambda: mariadb.connect("mysql", ssl_disabled=True))
    settings = read_settings(engine)
    engine.dispose()
    (finding,) = unlike({"one": settings, "two": settings | {"flavour": "MySQL"}})
    assert finding.startswith("two: flavour is 'MySQL', on one it is 'MariaDB'")

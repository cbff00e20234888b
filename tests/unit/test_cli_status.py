"""What `shardkit status` and `shardkit relay status` say of servers and relays."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from shardkit.cli.relay import MOST_OF_A_POSITION, short_position
from shardkit.cli.status import EndpointStatus, Look, _row, relay_note, relay_state, server_name, with_reads
from shardkit_cdc.livestate import LiveState


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("10.11.19-MariaDB-ubu2204-log", "MariaDB 10.11.19"),
        ("11.4.2-MariaDB", "MariaDB 11.4.2"),
        ("8.4.6", "MySQL 8.4.6"),
        ("8.4.6-0ubuntu1", "MySQL 8.4.6"),
        ("SQLite 3.46.1", "SQLite 3.46.1"),
    ],
)
def test_a_server_by_its_name_and_number(version: str, name: str) -> None:
    assert server_name(version) == name


def test_relays_that_do_not_run_come_with_the_command() -> None:
    assert relay_state("new") == "relay not started"
    assert relay_state("running") == "relay running"
    assert relay_note(["running", None, "failed"]) is None
    note = relay_note(["new", "new", "stopped", None])
    assert note == "relays: 2 not started, 1 stopped; 'shardkit relay run' fills these databases"


def test_a_database_that_only_the_relay_reaches_is_shown_by_its_word() -> None:
    seen = LiveState("mysql://10.0.0.1:3306/shop", "replica", True, 0, "host:7", datetime.now(UTC), lag_seconds=0.25)

    def shown(live: LiveState | None) -> tuple[object, ...]:
        database = EndpointStatus("shop-0", "replica", seen.endpoint, False, live=live)
        return _row(database, weights=False, reads=False, server=False)

    assert shown(None)[3:] == ("unreachable", None, None)
    assert shown(replace(seen, reachable=False, lag_seconds=None))[3:] == ("unreachable", None, None)
    assert shown(seen)[3:] == ("unreachable from here, up for the relay", "0.25", None)


def test_positions_are_short() -> None:
    assert short_position("0-24741-57") == "0-24741-57"
    assert short_position("3e11fa47-71ca-11e1-9e33-c80aa9429562:1-77") == "3e11fa47..:1-77"
    assert short_position("0-24741-57,2716404512-2-8") == "0-24741-57,.."
    many = ",".join(f"{number}e11fa47..:1-12345" for number in range(9))
    assert short_position(many) == f"..{many[2 - MOST_OF_A_POSITION :]}"
    assert len(short_position(many)) == MOST_OF_A_POSITION


def test_reads_are_counted_between_two_looks() -> None:
    def look(at: float, *selects: int | None) -> Look:
        roles = ("master", "staging", "replica", "replica")
        return Look(
            at,
            [
                EndpointStatus("shop-0", role, f"mysql://10.0.0.{number}:3306/shop", True, selects=count)
                for number, (role, count) in enumerate(zip(roles, selects, strict=True))
            ],
        )

    found = with_reads(look(10.0, 100, 50, 1000, 7), look(12.0, 120, 90, 1080, 3))
    assert [each.reads_per_second for each in found] == [10.0, 20.0, 40.0, None]  # the last one was started anew
    assert [each.share_of_reads for each in found] == [0.2, None, 0.8, None]
    assert all(each.share_of_reads is None for each in with_reads(look(1.0, 5, 5, 5, None), look(2.0, 5, 5, 5, 9)))

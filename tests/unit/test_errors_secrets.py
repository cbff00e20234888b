"""No error repeats a password that somebody has typed into a URL."""

from __future__ import annotations

import pytest

from shardkit.errors import ShardkitError, ShardMapError


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("'mysql://root:Geheim@h/x' is no map", "'mysql://***@h/x' is no map"),
        ("'root:Geheim@h/x' is no map", "'root:***@h/x' is no map"),
        ("no hop mysql://root:Ge@heim@127.0.0.1:3306/x", "no hop mysql://***@127.0.0.1:3306/x"),
        ("mysql://h:3306/x, and mail to a@example.org", "mysql://h:3306/x, and mail to a@example.org"),
        ("the account 'app'@'%' on 10.0.0.1:3306", "the account 'app'@'%' on 10.0.0.1:3306"),
    ],
)
def test_passwords_are_left_out(said: str, shown: str) -> None:
    error = ShardMapError(said, hint="see the manual")
    assert error.message == shown
    assert str(error) == f"{shown} (see the manual)"
    assert shown in repr(error)
    assert isinstance(error, ShardkitError)

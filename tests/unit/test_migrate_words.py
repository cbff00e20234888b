"""What migrations say: of statements, of differences, of revisions that stopped."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from shardkit.migrate.drift import describe
from shardkit.migrate.journal import statement_kind
from shardkit.migrate.notes import Unfinished


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("ALTER TABLE t ADD x INT", "ALTER"),
        ("  -- why\n# and how\n/* who */ create table t (x int)", "CREATE"),
        ("(SELECT 1)", "SELECT"),
        ("WITH a AS (SELECT 1) SELECT * FROM a", "WITH"),
        ("WITH a AS (SELECT 1) UPDATE t SET x = 1", "UPDATE"),
        ("/*!40101 SET NAMES utf8 */", ""),
        ("", ""),
    ],
)
def test_a_statement_is_known_by_its_first_word(statement: str, kind: str) -> None:
    assert statement_kind(statement) == kind


def test_differences_are_said_in_words() -> None:
    metadata = sa.MetaData()
    users = sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True))
    name = sa.Column("name", sa.String(5))
    index = sa.Index("by_id", users.c.id)
    said = [
        line
        for diff in (
            ("add_table", users),
            ("remove_table", users),
            ("add_column", None, "users", name),
            ("remove_index", index),
            [("modify_nullable", None, "users", "name", {}, True, False)],
            ("something_new", "users"),
        )
        for line in describe(diff)
    ]
    assert said == [
        "table users is in the models and not in the database",
        "table users is in the database and not in the models",
        "column users.name is in the models and not in the database",
        "index by_id on users is in the database and not in the models",
        "the nullability of users.name is True in the database and False in the models",
        "something_new: users",
    ]


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (Unfinished("r2", "up", 0, None, False, "boom"), "the upgrade to r2 failed: boom (nothing of it applied)"),
        (
            Unfinished("r2", "up", 1, "ALTER", False, "boom"),
            "the upgrade to r2 failed: boom (1 statement of it applied)",
        ),
        (
            Unfinished("r2", "down", 2, "DROP TABLE t", True),
            "the downgrade of r2 was cut off in: DROP TABLE t (2 statements of it applied)",
        ),
        (
            Unfinished("r2", "up", 0, "CREATE TABLE t", True),
            "the upgrade to r2 was cut off in: CREATE TABLE t (its first statement may have been completed)",
        ),
    ],
)
def test_a_revision_that_stopped_says_how_much_of_it_is_there(stopped: Unfinished, said: str) -> None:
    assert stopped.describe() == said

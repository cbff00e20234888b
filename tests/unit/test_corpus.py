"""What of other people's files is run as SQL, and what is not."""

from __future__ import annotations

import pytest

from tests.corpus.choosing import reason_to_skip
from tests.corpus.reading import pieces

TEST_FILE = """\
# a comment
--source include/have_innodb.inc
--disable_warnings
drop table if exists t1; drop table if exists t2;
--enable_warnings
create table t1 (a int, b varchar(9) default ';');   # after it
# between
insert into t1 values
  # inside
  (1, "it's; 'x'");
--error ER_DUP_ENTRY
insert into t1 values (2, 'a\\';');
let $n= 3;
while ($n)
{
  eval insert into t1 values ($n, '');
  if ($n) {
    dec $n;
  }
}
insert into t1 values ($n, 'x');
connect (other,localhost,root,,);
connection other;
select 1 /* ; */ from t1;
--perl
print "drop table t1;";
EOF
delimiter |;
create procedure p() begin select 1; select 2; end|
delimiter ;|
--disable_parsing
select 'never';
--enable_parsing
select 'last';
select 'no end'
"""


def run(text: str, *, commands: bool) -> list[tuple[int, str]]:
    return [(found.line, found.text) for found in pieces(text, commands=commands) if not found.skipped]


def test_plain_statements_of_mysqltest() -> None:
    assert run(TEST_FILE, commands=True) == [
        (4, "drop table if exists t1"),
        (4, "drop table if exists t2"),
        (6, "create table t1 (a int, b varchar(9) default ';')"),
        (8, "insert into t1 values\n  (1, \"it's; 'x'\")"),
        (12, "insert into t1 values (2, 'a\\';')"),
        (24, "select 1 /* ; */ from t1"),
        (29, "create procedure p() begin select 1; select 2; end"),
        (34, "select 'last'"),
    ]


def test_what_is_left_out_has_its_reason() -> None:
    reasons = [found.skipped for found in pieces(TEST_FILE, commands=True) if found.skipped]
    assert reasons == [
        "a command of mysqltest",
        "a command of mysqltest",
        "a block of mysqltest",
        "holds a variable of mysqltest",
        "another client",
        "another client",
        "a program or a file of mysqltest",
        "not ended by its delimiter",
    ]


def test_plain_sql() -> None:
    text = (
        "-- a comment; here\nINSERT INTO t VALUES ('-- no; comment');\nDELIMITER //\nBEGIN; x//\nDELIMITER ;\nEVAL;\n"
    )
    assert run(text, commands=False) == [
        (2, "INSERT INTO t VALUES ('-- no; comment')"),
        (4, "BEGIN; x"),
        (6, "EVAL"),
    ]


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("INSERT INTO t VALUES (1)", ""),
        ("create table t (a int) engine=innodb", ""),
        ("update t set used = 1", ""),
        ("SET sql_mode = ''", ""),
        ("create table t (a int) ENGINE = MyISAM", "an engine without transactions"),
        ("GRANT ALL ON *.* TO x", "accounts belong to one server"),
        ("/* first */ create user x", "accounts belong to one server"),
        ("set global x = 1", "changes the server, or what it logs"),
        ("set sql_log_bin = 0", "changes the server, or what it logs"),
        ("use other", "works on files or on other clients"),
        ("drop database d", "another database"),
        ("delete from mysql.user", "another database"),
        ("select sleep(9)", "waits"),
        ("create trigger g after insert on t for each row insert/*!into*/u values (1)", "MariaDB logs"),
    ],
)
def test_what_is_run(statement: str, reason: str) -> None:
    assert reason_to_skip(statement).startswith(reason)
    assert bool(reason_to_skip(statement)) == bool(reason)

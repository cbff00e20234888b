"""Others' statements through the relay: what is run, and that a difference is seen."""

from __future__ import annotations

from pathlib import Path

from tests.corpus.running import Corpus
from tests.relay_fixtures import servers

FIRST = """\
--disable_warnings
drop table if exists t;
--enable_warnings
create table t (a int primary key, b varchar(20));
insert into t values (1, 'one'), (2, 'two');
--error ER_DUP_ENTRY
insert into t values (1, 'again');
let $x= 5;
insert into t values ($x, 'never');
grant all on *.* to nobody;
truncate t;
insert into t values (3, 'three');
"""
SECOND = "CREATE TABLE t (a INT);\nINSERT INTO t VALUES (1);\nCREATE VIEW v AS SELECT a FROM t;\n"


def test_a_directory_is_run_and_a_difference_is_told(flavour: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
    (good / "1.test").write_text(FIRST)
    (good / "2.sql").write_text(SECOND)
    (bad / "3.sql").write_text("CREATE TABLE planted (a INT);\nINSERT INTO planted VALUES (1);\n")
    with servers(flavour, 4) as started:
        corpus = Corpus(started)
        try:
            tally = corpus.run(good, most=100)
            assert tally.faults == tally.shared == tally.native == []
            assert (tally.executed, tally.failed.total()) == (8, 1)
            assert tally.skipped == {
                "a command of mysqltest": 1,
                "holds a variable of mysqltest": 1,
                "accounts belong to one server": 1,
            }
            assert tally.compared == 3  # before TRUNCATE, and at the end of each file
            started[1].execute("CREATE TABLE planted (other INT)", database=corpus.database)
            tally = corpus.run(bad, most=100)
            assert [fault.split(":")[0] for fault in tally.faults] == ["3.sql"]
            assert not tally.shared
        finally:
            corpus.close()

"""Runs statements on a master, and compares what the relay made of them on staging and on the replica."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymysql
from pymysql.constants import ER
from pymysql.converters import encoders

from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from tests.corpus.choosing import reason_to_skip
from tests.corpus.native import NativeReplica
from tests.corpus.reading import Found, pieces
from tests.relay_chain import Chain

#: Seconds that one statement may take.
PATIENCE = 20
#: Seconds that copies may take: rows without a key are looked for one by one, by any replica.
CATCH_UP = 600.0
#: What is compared goes away with these; it is compared before them.
_TAKES_AWAY = re.compile(r"\s*(DROP|TRUNCATE|CREATE\s+OR\s+REPLACE)\b", re.IGNORECASE)
_READS = re.compile(r"\s*\(*\s*(SELECT|SET|PREPARE|DEALLOCATE|DO|VALUES|WITH)\b", re.IGNORECASE)
_numbers = itertools.count(1)


def _unwatched(_file: Path, _tally: object) -> None:
    """For runs that nobody looks at."""


@dataclass
class Tally:
    """What came of a run.

    :param executed: statements that the master carried out.
    :param changing: those of them that are more than reads.
    :param failed: those that it refused, by error number.
    :param skipped: pieces that were not run, by reason.
    :param compared: how often master, staging and replica were compared.
    :param faults: where they differed, or a hop stopped, and native replication did not.
    :param shared: where native replication differed or stopped as well: the server logged something else than it did.
    :param native: where native replication did, and the relay did not.
    """

    executed: int = 0
    changing: int = 0
    compared: int = 0
    failed: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    native: list[str] = field(default_factory=list)


class Corpus:
    """A directory's statements on three servers.

    :param servers: master, staging, replica, and a native replica of the master.
    """

    def __init__(self, servers: list[LocalDatabaseServer]) -> None:
        *self._servers, beside = servers
        self._native = NativeReplica(beside, servers[0])
        self.tally = Tally()
        self._changed = False
        self._chain = self._begin()

    def run(self, directory: Path, *, most: int, watch: Callable[[Path, Tally], None] = _unwatched) -> Tally:
        """Run the directory's files, in the order of their names, until ``most`` statements were carried out.

        :param watch: is told each file before it is begun.
        """
        for file in files(directory):
            if self.tally.executed >= most:
                break
            watch(file, self.tally)
            self._run_file(file)
        return self.tally

    @property
    def database(self) -> str:
        """The database that statements run in; another one after a fault."""
        return self._chain.database

    def close(self) -> None:
        """Stop the hops."""
        self._chain.stop()

    def _begin(self) -> Chain:
        database = f"corpus_{next(_numbers)}"
        for server in self._servers:
            server.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
        chain = Chain(self._servers, database)
        chain.start()
        return chain

    def _run_file(self, file: Path) -> None:
        connection = self._connect()
        found: Found | None = None
        try:
            for found in pieces(_text(file), commands=file.suffix == ".test"):
                reason = found.skipped or reason_to_skip(found.text)
                if reason:
                    self.tally.skipped[reason] += 1
                    continue
                if self._changed and _TAKES_AWAY.match(found.text):
                    self._compare()
                if not self._execute(connection, found.text):
                    if connection.open:
                        connection.close()
                    connection = self._connect()
            connection.close()  # with all that it has locked, set and not committed
            self._compare()
            connection = self._connect()
            self._empty(connection)
        except _NativeOnly:
            self._chain.stop()
            self._chain = self._begin()
            self._native.begin_anew(self._chain.database)
        except _Different as different:
            where = f"{file.name}:{found.line}" if found else file.name
            native = self._trouble_of_native()
            (self.tally.shared if native else self.tally.faults).append(f"{where}: {different}\n{native}".rstrip())
            self._chain.stop()
            self._chain = self._begin()
            self._native.begin_anew(self._chain.database)
        finally:
            if connection.open:
                connection.close()

    def _connect(self) -> pymysql.Connection[Any]:
        connection = self._servers[0].connect(
            self._chain.database, read_timeout=PATIENCE, use_unicode=False, conv=encoders
        )
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1, lock_wait_timeout = 5")
            cursor.execute("SET SESSION autocommit = 1")
            if self._chain.flavour is Flavour.MARIADB:
                cursor.execute("SET SESSION max_statement_time = 10")
        return connection

    def _execute(self, connection: pymysql.Connection[Any], text: str) -> bool:
        """Carry out one statement; whether the connection can go on."""
        try:
            with connection.cursor() as cursor:
                cursor.execute(text.encode("utf-8", "surrogateescape"))  # type: ignore[arg-type] - bytes pass as they are
                while cursor.nextset():
                    pass
        except (UnicodeDecodeError, LookupError):
            self.tally.skipped["its answer cannot be read"] += 1
            return False
        except pymysql.MySQLError as error:
            number = int(error.args[0]) if error.args and isinstance(error.args[0], int) else 0
            self.tally.failed[number] += 1
            # The log has what was carried out before the error: a procedure's first statements, for instance.
            self._changed = self._changed or number not in {ER.PARSE_ERROR, ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR}
            return number < 2000 and number != 0
        self.tally.executed += 1
        if not _READS.match(text):
            self.tally.changing += 1
            self._changed = True
        return True

    def _compare(self) -> None:
        if not self._changed:
            return
        try:
            self._chain.settle(CATCH_UP)
            self._chain.assert_equal()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _Different(str(error)) from error
        self.tally.compared += 1
        self._changed = False
        trouble = self._trouble_of_native()
        if trouble:
            self.tally.native.append(trouble)
            raise _NativeOnly

    def _trouble_of_native(self) -> str:
        """How the native replica differs from the master; empty where it does not."""
        trouble = self._native.trouble()
        if trouble:
            return trouble
        expected, found = (self._chain.contents(each) for each in (self._servers[0], self._native.server))
        return "" if expected == found else f"native replication differs: {sorted(_differing(expected, found))}"

    def _empty(self, connection: pymysql.Connection[Any]) -> None:
        """Drop what a file left behind."""
        master, database = self._servers[0], self._chain.database
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION foreign_key_checks = 0, sql_mode = ''")
            for kind, name in _objects(master, database):
                cursor.execute(f"DROP {kind} IF EXISTS `{name.replace('`', '``')}`")


class _Different(Exception):
    """Master and copies are not equal, or a hop has stopped."""


class _NativeOnly(Exception):
    """The native replica alone is not equal to the master."""


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[str]:
    return (name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def files(directory: Path) -> list[Path]:
    """The files of statements below a directory."""
    return sorted(each for each in directory.rglob("*") if each.suffix in {".sql", ".test"} and each.is_file())


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "surrogateescape")


def _objects(server: LocalDatabaseServer, database: str) -> Iterator[tuple[str, str]]:
    kinds = {"BASE TABLE": "TABLE", "VIEW": "VIEW", "SEQUENCE": "SEQUENCE", "SYSTEM VERSIONED": "TABLE"}
    for name, kind in server.execute(
        "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = %s", database
    ):
        if kind in kinds and not name.startswith("shardkit_"):
            yield kinds[kind], name
    for name, kind in server.execute(
        "SELECT routine_name, routine_type FROM information_schema.routines WHERE routine_schema = %s", database
    ):
        yield kind, name


def seconds_since(begun: float) -> str:
    """For people: ``12 s``."""
    return f"{time.monotonic() - begun:.0f} s"

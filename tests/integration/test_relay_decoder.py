"""The decoder against mysql-replication's, value by value, on the log of a real server."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

from pymysqlreplication import BinLogStreamReader
from pymysqlreplication.row_event import DeleteRowsEvent, UpdateRowsEvent, WriteRowsEvent

from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.json_binary import json_text
from shardkit_cdc.preflight import end_of_log
from shardkit_cdc.row_image import Image, RowDecoder, Value
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.table_map import Column, ColumnType
from shardkit_cdc.transactions import Assembler
from tests.integration.test_relay_replay import COLUMNS

#: What mysql-replication 1.0.17 decodes wrong: fractions of a negative TIME, the year 0, utf16 (which is big-endian);
#: and an empty SET, which it takes for NULL.
LEFT_OUT = ("clock6", "born", "wide")
#: How Python calls the character sets of these columns.
ENCODINGS = {"latin": "cp1252", "korean": "euc_kr"}


def test_values_are_those_of_mysql_replication(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    server, flavour = database_server, Flavour(database_server.flavour)
    status = "SHOW MASTER STATUS" if flavour is Flavour.MARIADB else "SHOW BINARY LOG STATUS"
    file, place, *_ = server.execute(status)[0]
    with closing(server.connect(fresh_database, autocommit=True)) as connection, connection.cursor() as cursor:
        start = end_of_log(connection, flavour)
        columns = [each for each in COLUMNS if each[0].split()[0] not in LEFT_OUT]
        names = ", ".join(definition.split()[0] for definition, _, _ in columns)
        for statement in (
            f"CREATE TABLE types ({', '.join(definition for definition, _, _ in columns)})",
            f"INSERT INTO types ({names}) VALUES ({', '.join(extreme for _, extreme, _ in columns)})",
            f"INSERT INTO types ({names}) VALUES ({', '.join(small for _, _, small in columns)})",
            f"INSERT INTO types ({names}) VALUES (2{', NULL' * (len(columns) - 1)})",
            "UPDATE types SET name = 'other', price = NULL WHERE id = 1",
            "DELETE FROM types",
        ):
            cursor.execute(statement)
        end = end_of_log(connection, flavour)
    described: tuple[Column, ...] = ()
    ours: list[Image] = []
    assembler = Assembler(flavour)
    endpoint = server.endpoint(fresh_database)
    stream = BinlogStream(endpoint, server.credentials, hop="test", flavour=flavour, after=start, server_id=4711)
    with closing(stream):
        while not start.covers(end):
            found = [each for each in map(assembler.push, stream.read()) if each is not None]
            for table, rows in (row for each in found for row in each.rows if row.table.database == fresh_database):
                decoder = RowDecoder(table)
                described = decoder.columns
                ours += decoder.images(rows)
            start = start.advanced(each.gtid for each in found)
    assert len(ours) == 8
    theirs = list(itertools.islice(_their_rows(server, fresh_database, file, place), len(ours)))
    for our_row, their_row in zip(ours, theirs, strict=True):
        for column, our, their in zip(described, our_row, their_row, strict=True):
            assert _normal(column, our) == _normal_of_theirs(column, their), (column, our, their)


def _their_rows(server: LocalDatabaseServer, database: str, file: str, place: int) -> Any:
    stream = BinLogStreamReader(
        {"host": server.host, "port": server.port, "user": server.user, "passwd": server.password},
        server_id=4712,
        only_events=[WriteRowsEvent, UpdateRowsEvent, DeleteRowsEvent],
        only_schemas=[database],
        log_file=file,
        log_pos=place,
        resume_stream=True,
    )
    with closing(stream):
        for event in stream:
            for row in event.rows:
                for values in ("values", "before_values", "after_values"):
                    if values in row:
                        yield tuple(row[values].values())


def _normal(column: Column, value: Value) -> object:
    """Our value as Python would have it."""
    if value is None:
        return None
    match column.type:
        case ColumnType.NEWDECIMAL:
            return Decimal(str(value))
        case ColumnType.DATE:
            return date.fromisoformat(str(value))
        case ColumnType.TIME2:
            hours, minutes, seconds = str(value).lstrip("-").split(":")
            found = timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))
            return -found if str(value).startswith("-") else found
        case ColumnType.DATETIME2 | ColumnType.TIMESTAMP2:
            return datetime.fromisoformat(str(value))
        case ColumnType.ENUM:
            assert isinstance(value, int)
            return column.members[value - 1].decode()
        case ColumnType.SET:
            assert isinstance(value, int)
            return {member.decode() for bit, member in enumerate(column.members) if value >> bit & 1} or None
        case ColumnType.JSON:
            assert isinstance(value, bytes)
            return json.loads(json_text(value))
    if isinstance(value, bytes) and column.type != ColumnType.GEOMETRY:
        return value.rstrip(b"\0") if column.collation == 63 else value.decode(ENCODINGS.get(str(column.name), "utf-8"))
    return value


def _normal_of_theirs(column: Column, value: Any) -> object:
    """Their value, where its form is a matter of taste."""
    if value is None:
        return None
    match column.type:
        case ColumnType.BIT:
            return int(value, 2)
        case ColumnType.TIMESTAMP2 if value.tzinfo is not None:
            return value.astimezone(UTC).replace(tzinfo=None)
        case ColumnType.SET:
            return set(value)
        case ColumnType.JSON:
            return _texts(value)
    if column.collation == 63:  # an empty one is text there
        return (value if isinstance(value, bytes) else value.encode()).rstrip(b"\0")
    return value


def _texts(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {_texts(key): _texts(each) for key, each in value.items()}
    return [_texts(each) for each in value] if isinstance(value, list) else value

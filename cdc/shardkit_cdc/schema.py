"""Whether a target's table is what the log takes it for.

Row events map columns by their place: on a table with fewer, reordered or differently typed columns they apply
silently wrong. So before the first rows of a table after a start, a reconnect or a schema change, its table map is
compared with the target's information_schema. Extra indexes are nobody's business.

Columns that are only in another order, and those of a server of the other family, fit by name: not for row events as
they are, but for the SQL path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit.errors import BadEvent, Drift
from shardkit_cdc.table_map import Column, ColumnType, TableMap

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

METADATA_HINT = "set binlog_row_metadata=FULL on the source; what is in its log already needs a reseed"


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """One row of information_schema.columns, as far as it matters here.

    :param computed: by the server from other columns: nobody writes it.
    :param extra: the column of that name: what the server does to it by itself.
    """

    name: str
    data_type: str
    column_type: str
    nullable: bool
    octets: int | None
    precision: int | None
    scale: int | None
    fraction: int | None
    collation: int | None
    charset: str | None = None
    computed: bool = False
    extra: str = ""


_BLOB_WIDTHS = {"tiny": 1, "medium": 3, "long": 4}
_INTEGERS = {"tinyint": 1, "smallint": 2, "int": 3, "mediumint": 9, "bigint": 8}
_FRACTIONAL = {"timestamp": 17, "datetime": 18, "time": 19}
_FIXED = {"float": (4, 4), "double": (5, 8), "date": (10, 0), "year": (13, 0), "json": (245, 4), "vector": (242, 4)}
_GEOMETRY = frozenset(
    [
        "geometry",
        "point",
        "linestring",
        "polygon",
        "multipoint",
        "multilinestring",
        "multipolygon",
        "geometrycollection",
        "geomcollection",
    ]
)
_MEMBER = re.compile(r"'((?:[^']|'')*)'")
#: Behind the type of a column that MariaDB keeps compressed.
_COMMENT = re.compile(r"\s*/\*.*?\*/$")


def expected(column: TargetColumn) -> tuple[int, int] | None:
    """The type and metadata by which a log would describe this column; None where only its name can be compared."""
    kind = column.data_type
    if "COMPRESSED" in column.column_type or "mariadb-5.3" in column.column_type:
        return None
    if kind in _INTEGERS:
        return _INTEGERS[kind], 0
    if kind in _FIXED:
        return _FIXED[kind]
    if kind in _FRACTIONAL:
        return _FRACTIONAL[kind], column.fraction or 0
    if kind == "decimal":
        return ColumnType.NEWDECIMAL, (column.precision or 0) << 8 | (column.scale or 0)
    if kind == "bit":
        bits = column.precision or 1
        return ColumnType.BIT, bits // 8 << 8 | bits % 8
    if kind in {"char", "binary"}:
        return ColumnType.STRING, column.octets or 0
    if kind in {"varchar", "varbinary"}:
        return ColumnType.VARCHAR, column.octets or 0
    if kind.endswith(("blob", "text")):
        return ColumnType.BLOB, _BLOB_WIDTHS.get(kind[:-4], 2)
    if kind in _GEOMETRY:
        return ColumnType.GEOMETRY, 4
    if kind in {"enum", "set"}:
        count = len(_MEMBER.findall(column.column_type))
        if kind == "enum":
            return ColumnType.ENUM, 1 if count < 256 else 2
        width = (count + 7) // 8
        return ColumnType.SET, 8 if width > 4 else width
    return None


def differences(logged: Sequence[Column], target: Sequence[TargetColumn]) -> list[str]:
    """Every way in which the target's table is not the logged one, in words; empty when rows fit as they are."""
    found: list[str] = []
    if len(logged) != len(target):
        found.append(f"the source has {len(logged)} columns and the target {len(target)}")
    for place, (source, mine) in enumerate(zip(logged, target, strict=False), 1):
        if source.name != mine.name:
            found.append(f"column {place} is {source.name} on the source and {mine.name} on the target")
            continue
        wanted = expected(mine)
        if wanted is None:
            continue
        if wanted != (source.type, source.metadata):
            found.append(
                f"{mine.name} is {mine.column_type} on the target and "
                f"{_type_name(source.type)}({source.metadata}) in the log"
            )
        elif source.unsigned != _unsigned(mine) and mine.data_type != "year":
            found.append(f"{mine.name} is signed on one side only")
        elif None not in (source.collation, mine.collation) and source.collation != mine.collation:
            found.append(
                f"{mine.name} has another collation on the target (id {mine.collation}, not {source.collation})"
            )
        elif source.members and not _same_members(source.members, mine.column_type):
            found.append(f"{mine.name} has other {mine.data_type} values on the target ({mine.column_type})")
        if source.nullable and not mine.nullable:
            found.append(f"{mine.name} is NOT NULL on the target only")
    return found


#: MariaDB's hidden column of a UNIQUE index over values too long for an index (sql/table.cc, LONG_HASH_FIELD).
_HASH = re.compile(r"DB_ROW_HASH_\d+")


def without_hashes(logged: Sequence[Column]) -> Sequence[Column]:
    """The columns without those that MariaDB adds, at the end, for UNIQUE indexes over long values."""
    hashes = 0
    while hashes < len(logged) and _HASH.fullmatch(logged[-1 - hashes].name or ""):
        hashes += 1
    return logged[: len(logged) - hashes]


def as_logged(column: TargetColumn) -> Column | None:
    """A source's column as its log would describe it, its collation left out; None of a type that only MariaDB has.

    A compressed column as one that is not: its values are the same.
    """
    plain = replace(column, column_type=_COMMENT.sub("", column.column_type))
    described = expected(plain)
    if described is None:
        return None
    return Column(
        *described,
        nullable=column.nullable,
        unsigned=_unsigned(column),
        name=column.name,
        members=tuple(member.encode() for member in members(column)),
    )


def members(column: TargetColumn) -> list[str]:
    """The values of an ENUM or SET column in their order; none of any other."""
    if column.data_type not in {"enum", "set"}:
        return []
    return [_ESCAPED.sub(_plain, member) for member in _MEMBER.findall(column.column_type)]


def in_log_order(logged: Sequence[Column | TargetColumn], target: Sequence[TargetColumn]) -> list[TargetColumn] | None:
    """The target's columns as the log has them, or the source's table; None where one side has a name that the other
    lacks.
    """
    # The name as it is comes first: to the servers `straße` and `strasse` are two names.
    folded = {column.name.casefold(): column for column in target}
    exact = {column.name: column for column in target}
    found = [exact.get(name) or folded.get(name.casefold()) for name in (column.name or "" for column in logged)]
    ordered = [column for column in found if column is not None]
    return ordered if len(ordered) == len(logged) == len(target) else None


def differences_by_name(
    logged: Sequence[Column], ordered: Sequence[TargetColumn], charsets: Mapping[int, str]
) -> list[str]:
    """As `differences`, between server families: character sets are compared, collations are not.

    :param ordered: the target's columns in the log's order.
    :param charsets: of the source's collations by id.
    """
    found: list[str] = []
    plain: list[Column] = []
    for source, mine in zip(logged, ordered, strict=True):
        charset = None if source.collation is None else charsets.get(source.collation, "")
        if charset is not None and charset != (mine.charset or "binary"):
            found.append(
                f"{mine.name} is in {mine.charset or 'binary'} on the target and {charset or 'another'} in the log"
            )
        if source.type == ColumnType.JSON and mine.data_type == "longtext" and mine.charset == "utf8mb4":
            # MariaDB's JSON is a LONGTEXT, which takes the document's text.
            source = replace(source, type=ColumnType.BLOB, metadata=4)
        plain.append(replace(source, collation=None, name=mine.name))
    return found + differences(plain, [replace(column, collation=None) for column in ordered])


def _same_members(logged: Sequence[bytes], column_type: str) -> bool:
    mine = [_ESCAPED.sub(_plain, member) for member in _MEMBER.findall(column_type)]
    if len(mine) != len(logged):
        return False
    return all(_may_be(text, raw) for text, raw in zip(mine, logged, strict=True))


#: How both families show members in column_type, whatever the sql_mode (tried on MariaDB 10.11 and MySQL 9.7).
_ESCAPED = re.compile(r"''|\\.")


def _plain(found: re.Match[str]) -> str:
    mark = found[0][1]
    return {"n": "\n", "r": "\r", "0": "\0"}.get(mark, mark)


def _may_be(text: str, raw: bytes) -> bool:
    """The log has them in the column's character set, whichever that is: only what is ASCII in most is compared.

    A rename or another order shows there, too. UCS-2 and its kin have NUL bytes in such texts.
    """
    return not (text.isascii() and raw.isascii()) or b"\0" in raw or text.encode() == raw


def _type_name(kind: int) -> str:
    try:
        return ColumnType(kind).name.lower()
    except ValueError:
        return f"type {kind}"


def _unsigned(column: TargetColumn) -> bool:
    return "unsigned" in column.column_type or "zerofill" in column.column_type


@dataclass(frozen=True, slots=True)
class _Fit:
    """How a table map and the target's table go together: the target's columns in the log's order."""

    as_it_is: bool
    columns: Sequence[TargetColumn]


class SchemaCheck:
    """Compares each table map once with the target's table.

    :param connection: to the target; only read through.
    :param by_name: whether columns may stand in another order on the target: the SQL path writes them then.
    :param charsets: of a source of the other family: its collations' character sets by id. Then only the SQL path
        writes, and collations may differ.
    """

    def __init__(
        self, connection: Connection, *, by_name: bool = False, charsets: Mapping[int, str] | None = None
    ) -> None:
        self._connection = connection
        self._by_name = by_name
        self._charsets = charsets
        self._seen: dict[TableMap, _Fit] = {}
        self._collations: Mapping[str, int] | None = None

    def forget(self) -> None:
        """A schema change has run: look again."""
        self._seen.clear()

    def check(self, table: TableMap, *, at: str) -> bool:
        """Whether row events fit as they are; false where columns fit by name only.

        :raises Drift: when the target's table is missing or different.
        :raises BadEvent: when the log does not name its columns.
        """
        fit = self._seen.get(table)
        if fit is None:
            fit = self._seen[table] = self._fit(table, at)
        return fit.as_it_is

    def target_columns(self, table: TableMap) -> Sequence[TargetColumn]:
        """The target's columns of a table that has been checked, in the log's order."""
        return self._seen[table].columns

    def _fit(self, table: TableMap, at: str) -> _Fit:
        logged: Sequence[Column] = table.columns()
        if any(column.name is None for column in logged):
            raise BadEvent(f"the log does not name the columns of {table.qualified}", at=at, hint=METADATA_HINT)
        target = self._target_columns(table)
        if not target:
            raise Drift(
                f"there is no table {table.qualified} on the target, but the log has rows for it",
                at=at,
                hint="the target was not filled from this source from the start: fill it anew (shardkit relay seed)",
            )
        self._refuse_engine(table, at)
        hashes = len(logged) - len(without_hashes(logged))
        if hashes != (found := self._hashes(table)):
            raise Drift(
                f"{table.qualified} has {hashes} UNIQUE indexes over long values on the source and {found} on the "
                "target, and row events hold a hidden column for each",
                at=at,
                hint="give the target's table the source's UNIQUE indexes, then start the hop again",
            )
        logged = without_hashes(logged)
        names = [column.name for column in logged]
        if names[-2:] == ["row_start", "row_end"] and len(logged) == len(target) + 2:
            logged = logged[:-2]  # MariaDB's system versioning: implicit columns that information_schema leaves out
        ordered = in_log_order(logged, target) if self._by_name else None
        if ordered is None:
            different = differences(logged, target)
            ordered = target
        elif self._charsets is not None:
            different = differences_by_name(logged, ordered, self._charsets)
        else:
            different = differences(logged, ordered)
        if different:
            raise Drift(
                f"the target's table {table.qualified} is not the source's: {'; '.join(different[:5])}",
                at=at,
                hint="change the target's table to be like the source's, then start the hop again",
            )
        return _Fit(ordered == target, ordered)

    def _hashes(self, table: TableMap) -> int:
        """How many such indexes the target's table has."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT COUNT(DISTINCT index_name) FROM information_schema.statistics "
                "WHERE table_schema = %s AND table_name = %s AND index_type = 'HASH' AND non_unique = 0",
                (table.database, table.table),
            )
            row = cursor.fetchone()
        return int(row[0]) if row else 0

    def _refuse_engine(self, table: TableMap, at: str) -> None:
        """Rows in a table without transactions would stay when their target transaction is undone, and come twice."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT t.engine FROM information_schema.tables t JOIN information_schema.engines e USING (engine) "
                "WHERE t.table_schema = %s AND t.table_name = %s AND e.transactions <> 'YES'",
                (table.database, table.table),
            )
            found = cursor.fetchone()
        if found is not None:
            raise Drift(
                f"the target keeps {table.qualified} in {found[0]}, which has no transactions: after an interruption "
                "its rows would be there twice",
                at=at,
                hint=f"on the target: ALTER TABLE `{table.table}` ENGINE=InnoDB; then start the hop again",
            )

    def _target_columns(self, table: TableMap) -> list[TargetColumn]:
        if self._collations is None:
            self._collations = collation_ids(self._connection)
        return read_columns(self._connection, table.database, table.table, self._collations)


def read_columns(
    connection: Connection, database: str, table: str, collations: Mapping[str, int]
) -> list[TargetColumn]:
    """A table's columns in their order; none where there is no such table.

    :param collations: of the server: as `collation_ids`.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT column_name, data_type, column_type, is_nullable, character_octet_length, numeric_precision, "
            "numeric_scale, datetime_precision, collation_name, character_set_name, extra, generation_expression "
            "FROM information_schema.columns "
            "WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position",
            (database, table),
        )
        return [
            TargetColumn(
                name,
                _text(data_type),
                _text(column_type),
                nullable == "YES",
                octets,
                precision,
                scale,
                fraction,
                collations.get(collation),
                None if charset is None else _same_charset(charset),
                "GENERATED" in extra.upper().replace("DEFAULT_GENERATED", "") or bool(expression),
                extra,
            )
            for (
                name,
                data_type,
                column_type,
                nullable,
                octets,
                precision,
                scale,
                fraction,
                collation,
                charset,
                extra,
                expression,
            ) in cursor
        ]


def collation_ids(connection: Connection) -> dict[str, int]:
    """The id by which the log names each of a server's collations, by the collation's full name."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW COLLATION")
        found = {name: number for name, _charset, number, *_ in cursor.fetchall() if number is not None}
        # MariaDB 10.10+ gives collations that fit several character sets one id for each.
        cursor.execute(
            "SELECT COUNT(*) FROM information_schema.columns WHERE table_schema = 'information_schema' "
            "AND table_name = 'COLLATION_CHARACTER_SET_APPLICABILITY' AND column_name = 'FULL_COLLATION_NAME'"
        )
        if cursor.fetchone() == (1,):
            cursor.execute(
                "SELECT full_collation_name, id FROM information_schema.collation_character_set_applicability"
            )
            found.update({name: number for name, number in cursor.fetchall() if number is not None})
    return found


def charsets_by_id(connection: Connection) -> dict[int, str]:
    """The character set of each of a server's collations, by the collation's id."""
    return {number: _same_charset(name.split("_")[0]) for name, number in collation_ids(connection).items()}


def _same_charset(name: str) -> str:
    return "utf8mb3" if name == "utf8" else name


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value

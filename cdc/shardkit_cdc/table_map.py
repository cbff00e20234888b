"""The table map event: which table the row events after it belong to, and what its columns are. Pure.

Layout: ``Table_map_event`` in MySQL's libs/mysql/binlog/event/rows_event.h; the optional metadata is there only with
``binlog_row_metadata=FULL``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from shardkit.errors import BadEvent
from shardkit_cdc.events import HEADER_BYTES, Cursor, Event, with_length


class ColumnType(IntEnum):
    """Column types as table maps name them (enum_field_types)."""

    TINY = 1
    SHORT = 2
    LONG = 3
    FLOAT = 4
    DOUBLE = 5
    TIMESTAMP = 7
    LONGLONG = 8
    INT24 = 9
    DATE = 10
    TIME = 11
    DATETIME = 12
    YEAR = 13
    VARCHAR = 15
    BIT = 16
    TIMESTAMP2 = 17
    DATETIME2 = 18
    TIME2 = 19
    MARIADB_BLOB_COMPRESSED = 140
    MARIADB_VARCHAR_COMPRESSED = 141
    VECTOR = 242
    JSON = 245
    NEWDECIMAL = 246
    ENUM = 247
    SET = 248
    TINY_BLOB = 249
    MEDIUM_BLOB = 250
    LONG_BLOB = 251
    BLOB = 252
    VAR_STRING = 253
    STRING = 254
    GEOMETRY = 255


NUMERIC = frozenset({1, 2, 3, 4, 5, 8, 9, 246})
#: Types whose collation stands in the metadata's character columns list.
CHARACTER = frozenset({15, 140, 141, 249, 250, 251, 252, 253, 254})
#: The metadata's field COLUMN_VISIBILITY, of MySQL since 8.0.23; MariaDB has none.
_VISIBILITY = 12
#: The metadata's fields SIMPLE_PRIMARY_KEY and PRIMARY_KEY_WITH_PREFIX.
_PRIMARY_KEY = frozenset({8, 9})
_ONE_BYTE = frozenset({4, 5, 17, 18, 19, 140, 242, 245, 249, 250, 251, 252, 255})
_TWO_BYTES = frozenset({15, 16, 141, 246, 247, 248, 253, 254})


@dataclass(frozen=True, slots=True)
class Column:
    """One column as the log describes it.

    :param metadata: length, precision or fractional digits, as the type has it.
    :param collation: collation id of a character, ENUM or SET column; None where there is none.
    :param name: None without ``binlog_row_metadata=FULL``.
    :param members: of ENUM and SET columns their values in order, in the column's character set.
    """

    type: int
    metadata: int
    nullable: bool
    unsigned: bool = False
    collation: int | None = None
    name: str | None = None
    members: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TableMap:
    """One table map. Compared by identity: the reader keeps one object for equal events.

    :param table_id: the six bytes by which row events name it.
    :param data: the whole event without its checksum.
    """

    table_id: bytes
    database: str
    table: str
    data: bytes

    @classmethod
    def parse(cls, event: Event) -> TableMap:
        """:raises BadEvent: when the event is truncated."""
        cursor = Cursor(event.data, "Table_map")
        table_id = cursor.take(6)
        cursor.take(2)
        return cls(table_id, _name(cursor), _name(cursor), with_length(event.data))

    @property
    def qualified(self) -> str:
        return f"{self.database}.{self.table}"

    def in_database(self, database: str) -> TableMap:
        """The same map naming another database: a target may call it differently."""
        name = database.encode("utf-8")
        at = HEADER_BYTES + 8
        after = at + 1 + self.data[at]
        body = self.data[HEADER_BYTES:at] + bytes([len(name)]) + name + self.data[after:]
        return TableMap(self.table_id, database, self.table, with_length(self.data[:HEADER_BYTES] + body))

    def has_primary_key(self) -> bool:
        """Whether the log says so: it does with ``binlog_row_metadata=FULL`` only.

        :raises BadEvent: when the event is truncated.
        """
        cursor = Cursor(self.data, "Table_map")
        cursor.take(8)
        _name(cursor)
        _name(cursor)
        columns = cursor.packed_integer()
        cursor.take(columns)
        cursor.take(cursor.packed_integer())
        cursor.take((columns + 7) // 8)
        return not _PRIMARY_KEY.isdisjoint(_optional(cursor))

    def columns(self) -> tuple[Column, ...]:
        """The table's columns in order, with names and collations where the log holds them.

        :raises BadEvent: when the event is truncated or contradicts itself.
        """
        cursor = Cursor(self.data, "Table_map")
        cursor.take(8)
        _name(cursor)
        _name(cursor)
        types = cursor.take(cursor.packed_integer())
        described = Cursor(cursor.take(cursor.packed_integer()), "Table_map", 0)
        resolved = [_resolved(kind, described) for kind in types]
        nullable = cursor.take((len(types) + 7) // 8)
        extra = _optional(cursor)
        unsigned = _signedness(extra.get(1, b""), [kind for kind, _ in resolved])
        collations = _collations(extra, [kind for kind, _ in resolved])
        names = _names(extra.get(4), len(types))
        members = _members(extra, [kind for kind, _ in resolved])
        return tuple(
            Column(
                kind,
                metadata,
                bool(nullable[index // 8] >> index % 8 & 1),
                unsigned.get(index, False),
                collations.get(index),
                names[index],
                members.get(index, ()),
            )
            for index, (kind, metadata) in enumerate(resolved)
        )


def _name(cursor: Cursor) -> str:
    raw = cursor.take(cursor.integer(1))
    cursor.take(1)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadEvent("a Table_map event holds a name that is not UTF-8") from None


def _resolved(kind: int, described: Cursor) -> tuple[int, int]:
    """The real type and the metadata: ENUM, SET and CHAR all come as STRING (``do_save_field_metadata``)."""
    if kind in _ONE_BYTE:
        return kind, described.integer(1)
    if kind not in _TWO_BYTES:
        return kind, 0
    if kind == ColumnType.STRING:
        first, second = described.take(2)
        if first in {ColumnType.ENUM, ColumnType.SET}:
            return first, second
        # The two high bits of a long CHAR's length hide, inverted, in the type byte.
        return ColumnType.STRING, second | ((first & 0x30) ^ 0x30) << 4
    if kind == ColumnType.NEWDECIMAL:
        precision, scale = described.take(2)
        return kind, precision << 8 | scale
    return kind, described.integer(2)


def _optional(cursor: Cursor) -> dict[int, bytes]:
    fields: dict[int, bytes] = {}
    while cursor.left:
        kind = cursor.integer(1)
        fields[kind] = cursor.take(cursor.packed_integer())
    return fields


def _signedness(bits: bytes, types: list[int]) -> dict[int, bool]:
    numeric = [index for index, kind in enumerate(types) if kind in NUMERIC or kind == ColumnType.YEAR]
    # Servers differ in whether YEAR has a bit; the field's length tells where that matters.
    if len(bits) < (len(numeric) + 7) // 8:
        numeric = [index for index in numeric if types[index] in NUMERIC]
    return {
        index: bool(bits[at // 8] >> 7 - at % 8 & 1) for at, index in enumerate(numeric) if bits and at // 8 < len(bits)
    }


def _collations(extra: dict[int, bytes], types: list[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    # MariaDB's list has the GEOMETRY columns, too (Field_geom::binlog_type_info in sql/field.h).
    characters = CHARACTER if _VISIBILITY in extra else CHARACTER | {ColumnType.GEOMETRY}
    for default, listed, members in (
        (2, 3, [index for index, kind in enumerate(types) if kind in characters]),
        (10, 11, [index for index, kind in enumerate(types) if kind in {ColumnType.ENUM, ColumnType.SET}]),
    ):
        if default in extra:
            cursor = Cursor(extra[default], "Table_map", 0)
            usual = cursor.packed_integer()
            found.update(dict.fromkeys(members, usual))
            while cursor.left:
                at, collation = cursor.packed_integer(), cursor.packed_integer()
                if at >= len(members):
                    raise BadEvent("a Table_map event gives a collation to a column that it does not have")
                found[members[at]] = collation
        elif listed in extra:
            cursor = Cursor(extra[listed], "Table_map", 0)
            found.update({index: cursor.packed_integer() for index in members})
    return {index: collation for index, collation in found.items() if types[index] != ColumnType.GEOMETRY}


def _names(packed: bytes | None, count: int) -> list[str | None]:
    if packed is None:
        return [None] * count
    cursor = Cursor(packed, "Table_map", 0)
    try:
        return [cursor.take(cursor.packed_integer()).decode("utf-8") for _ in range(count)]
    except UnicodeDecodeError:
        raise BadEvent("a Table_map event holds a name that is not UTF-8") from None


def _members(extra: dict[int, bytes], types: list[int]) -> dict[int, tuple[bytes, ...]]:
    found: dict[int, tuple[bytes, ...]] = {}
    for field, kind in ((5, ColumnType.SET), (6, ColumnType.ENUM)):
        cursor = Cursor(extra.get(field, b""), "Table_map", 0)
        for index in (index for index, each in enumerate(types) if each == kind):
            if cursor.left:
                count = cursor.packed_integer()
                found[index] = tuple(cursor.take(cursor.packed_integer()) for _ in range(min(count, cursor.left)))
    return found

"""What sharding would break in a table as it is. Pure: facts in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.adoption.tables import ColumnFacts, TableFacts
from shardkit.normalization import ALPHABET_IN_WORDS, Normalization
from shardkit.partition import KeyType


def no_key(column: ColumnFacts) -> str | None:
    """Why a column cannot be a shard key at all; None where it can."""
    if column.kind is not None:
        return None
    name = _type_name(column)
    if isinstance(column.type, sa.Float):
        return f"{name} does not survive rounding: a shard key needs an exact type"
    if isinstance(column.type, sa.TIMESTAMP):
        return f"{name} reads differently in each time zone: use DATETIME(6)"
    return f"{name} has no exact text: use an integer, a string, bytes, a date, a DATETIME or a DECIMAL"


def key_hazards(table: TableFacts, column: ColumnFacts, normalize: Normalization | None = None) -> Iterator[str]:
    """What may go wrong with a column as the shard key.

    :param normalize: what its partition does to strings.
    """
    where = f"{table.name}.{column.name}"
    if (why := no_key(column)) is not None:
        yield f"{where}: {why}"
        return
    normalized = normalize is not None and column.kind is KeyType.STRING
    if column.collation is not None:
        yield from (f"{where}: {sentence}" for sentence in _collation_hazards(column.collation, normalize))
    if isinstance(column.type, sa.CHAR | sa.BINARY) and (
        column.kind is KeyType.BYTES or (column.kind is KeyType.STRING and not normalized)
    ):
        yield f"{where}: {_type_name(column)} pads what is stored: use a type of varying length"
    if isinstance(column.type, mysql.DATETIME) and (column.type.fsp or 0) < 6:
        yield f"{where}: {_type_name(column)} drops microseconds, so a value may be stored as another: use DATETIME(6)"
    if getattr(column.type, "zerofill", False):
        yield f"{where}: ZEROFILL changes the number's text, and so its bucket: take it away"
    if column.nullable:
        yield f"{where} may be NULL: all such rows are in one bucket, on one shard"


_BINARY = "a binary collation without padding (utf8mb4_0900_bin on MySQL, utf8mb4_nopad_bin on MariaDB)"


def _collation_hazards(collation: str, normalize: Normalization | None) -> Iterator[str]:
    if normalize is not None and not normalize.fits(collation):
        yield (
            f"{collation} is not known to take for the same only what 'normalize: {normalize}' does: give it "
            f"utf8mb4_general_ci, utf8mb4_unicode_ci, the server's default or {_BINARY}"
        )
    elif normalize is None and not _tells_apart(collation):
        fits = Normalization.LOWER.fits(collation)
        other = f", or 'normalize: {Normalization.LOWER}' in the map, for keys of {ALPHABET_IN_WORDS}" if fits else ""
        yield (
            f"{collation} takes different texts for the same ('a' and 'A', or 'a' and 'a '), "
            f"but they hash to different buckets: give it {_BINARY}{other}"
        )


def _tells_apart(collation: str) -> bool:
    """Whether different texts are different to a collation: binary, and without padding."""
    name = collation.lower()
    return name in {"binary", "utf8mb4_0900_bin"} or (name.endswith("_bin") and "nopad" in name)


def sharded_hazards(
    table: TableFacts, key: tuple[str, ...], *, generated: bool = True, local: bool = False
) -> Iterator[str]:
    """What a table loses when it is spread over shards.

    :param generated: shardkit makes the ids (``ids: generated``), or will.
    :param local: what is unique on each shard only is meant to be so.
    """
    if not table.primary_key:
        yield f"{table.name} has no primary key: rows can be neither replicated nor moved safely; add one"
    for unique in () if local else table.uniques:
        if not set(key) <= set(unique):
            yield (
                f"{table.name} ({', '.join(unique)}) is unique on each shard only: "
                f"the index does not hold {' and '.join(key)} (if that is meant: 'local: [{table.name}]' in the map)"
            )
    for column in table.columns.values():
        if column.autoincrement and not generated and (not local or column.name in key):
            meant = "" if column.name in key else f", or 'local: [{table.name}]' if that is meant"
            yield (
                f"{table.name}.{column.name} is AUTO_INCREMENT: two shards give the same number; "
                f"set 'ids: generated' on its keyspace{meant}"
            )
        elif column.autoincrement and not local and not isinstance(column.type, sa.BigInteger):
            yield f"{table.name}.{column.name} is {_type_name(column)}: generated ids need BIGINT"


def foreign_key_hazards(table: TableFacts, beside: frozenset[str]) -> Iterator[str]:
    """Foreign keys that would cross databases.

    :param beside: the tables whose matching rows are on the same shard.
    """
    for key in table.foreign_keys:
        if key.table not in beside:
            yield (
                f"{table.name} ({', '.join(key.columns)}) points at {key.table}, which may live elsewhere: "
                "no server can check that; drop the constraint before the tables part"
            )


def _type_name(column: ColumnFacts) -> str:
    name = str(column.type.compile(mysql.dialect()))
    return name.partition(" CHARACTER SET")[0].partition(" COLLATE")[0]

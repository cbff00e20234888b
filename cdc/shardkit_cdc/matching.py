"""Which tables both ends of a hop have alike, and how their rows are read so that equal ones read alike.

Servers of one family describe tables in the same words, and write equal rows as the same text (`shardkit.rowtext`).
Between families a table is the same where the SQL path takes it for that (`schema.differences_by_name`), and its rows
are read as text that both families write alike. Tried on MariaDB 10.11 and MySQL 9.7, that is:

- numbers, dates and times as they are; ENUM, SET and BIT by number;
- FLOAT and DOUBLE by their bits, in the bytes of a POINT: as text each family writes very small numbers in its own way;
- MySQL's JSON as the text that MySQL shows, which is what arrives in MariaDB;
- all else by its bytes.

What the target computes (generated columns) is compared as a whole, for itself: a division, say, has more digits on
MariaDB than on MySQL. Of rows that are equal otherwise it is no difference that a repair could mend.

Collations may differ between families, and with them the order of keys and which of them count as equal. So a range of
keys may hold other rows on the target than on the source; but all ranges of one end together hold every row of the
other, and a row that is asked for by its key is asked for by its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardkit.rowtext import Column, Form, quoted
from shardkit_cdc.comparison import Difference, Kind
from shardkit_cdc.database import Database
from shardkit_cdc.schema import (
    TargetColumn,
    as_logged,
    collation_ids,
    differences_by_name,
    in_log_order,
    members,
    read_columns,
)
from shardkit_cdc.tables import Table, read_tables

_REAL = frozenset({"float", "double"})


@dataclass(frozen=True, slots=True)
class Matched:
    """What there is to compare.

    :param tables: name -> a table that both ends have alike; its SQL is for both.
    :param written: the same tables as the source's rows are written on the target; without those of which not all can
        be written.
    :param computed: of the other family's tables those with columns that the target computes, as these are read along
        with the primary key; in ``tables`` they are left out.
    :param faults: tables that are there on one side only, or of another shape.
    :param left_out: tables and columns that cannot be compared, and why.
    :param tables_left_out: names of the tables among them.
    """

    tables: dict[str, Table]
    written: dict[str, Table]
    computed: dict[str, Table] = field(default_factory=dict)
    faults: list[Difference] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tables_left_out: list[str] = field(default_factory=list)


def compared_tables(database: Database) -> dict[str, Table]:
    """The tables whose rows are compared, by name."""
    return {name: table for name, table in read_tables(database).items() if not table.own and table.kind != "SEQUENCE"}


def shapes(tables: Mapping[str, Table]) -> dict[str, object]:
    """What both ends of one family have to have alike."""
    return {name: _shape(table) for name, table in tables.items()}


def _shape(table: Table) -> object:
    return table.shape, table.primary


def match(source: Database, target: Database, ours: Mapping[str, Table], theirs: Mapping[str, Table]) -> Matched:
    """Match the two ends' tables.

    :param ours: the source's tables.
    :param theirs: the target's.
    """
    matched = Matched({}, {})
    both = None if source.flavour is target.flavour else _Families(source, target)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            matched.faults.append(Difference(name, Kind.TABLE, "the table is missing"))
        elif name not in ours:
            matched.faults.append(Difference(name, Kind.TABLE, "the table is extra"))
        elif both is not None:
            both.match(ours[name], theirs[name], matched)
        elif _shape(ours[name]) != _shape(theirs[name]):
            matched.faults.append(Difference(name, Kind.TABLE, "the table has other columns or another primary key"))
        else:
            matched.tables[name] = matched.written[name] = ours[name]
    return matched


def computed_columns(table: Table) -> str:
    """The columns that the target computes, for people.

    :param table: as in `Matched.computed`.
    """
    in_key = {name.lower() for name in table.primary}
    return f"{table.name}.{', '.join(column.name for column in table.columns if column.name.lower() not in in_key)}"


def other_values(table: Table) -> str:
    """What there is to say of columns that the target has computed, and which are not the source's.

    :param table: as in `Matched.computed`.
    """
    return f"{computed_columns(table)}: the target computes other values than the source"


# --- between families


class _AlikeColumn(Column):
    """A column whose values both families write as the same text: to be compared, not to be written."""

    __slots__ = ()

    @property
    def literal(self) -> str:
        """SQL for the text that is compared."""
        name = quoted(self.name)
        if self.data_type in _REAL:
            return f"IFNULL(HEX(POINT({name},0)),'NULL')"
        if self.form in {Form.NUMBER, Form.JSON} or (self.form is Form.QUOTED and self.charset is None):
            return super().literal
        return f"IF({name} IS NULL,'NULL',CONCAT('X''',HEX(CAST({name} AS BINARY)),''''))"


@dataclass(frozen=True)
class _AlikeTable(Table):
    """A table of both families: its collations may put keys into another order on each, and take others for equal."""

    @property
    def keys_alike(self) -> bool:
        return not any(map(self._is_text, self.primary))

    def _is_text(self, name: str) -> bool:
        column = self.column(name)
        return column.charset is not None and column.form is not Form.NUMBER  # ENUM and SET have one, too

    def one_of(self, keys: Iterable[Sequence[str]]) -> str:
        """As elsewhere, and text is compared by its bytes, too."""
        keys = list(keys)
        if self.keys_alike:
            return super().one_of(keys)
        if len(self.primary) == 1:
            octets = ",".join(_plain(key[0]) for key in keys)
            return f"({super().one_of(keys)} AND {_bytes_of(self.primary[0])} IN ({octets}))"
        return "(" + " OR ".join(f"({self._is(key)})" for key in keys) + ")"

    def _is(self, key: Sequence[str]) -> str:
        tests = [f"{quoted(name)}={value}" for name, value in zip(self.primary, key, strict=True)]
        for name, value in zip(self.primary, key, strict=True):
            if self._is_text(name):
                tests.append(f"{_bytes_of(name)}={_plain(value)}")
        return " AND ".join(tests)


def _bytes_of(name: str) -> str:
    return f"CAST({quoted(name)} AS BINARY)"


def _plain(literal: str) -> str:
    """A key literal without a character set."""
    mark, digits = literal.rpartition("X'")[1:]
    return mark + digits


class _Families:
    """Matches tables of two families."""

    def __init__(self, source: Database, target: Database) -> None:
        self._ends = source, target
        self._collations = [collation_ids(side.connection) for side in self._ends]

    def match(self, ours: Table, theirs: Table, matched: Matched) -> None:
        name = ours.name
        if "SYSTEM VERSIONED" in {ours.kind, theirs.kind}:
            matched.left_out.append(f"{name} keeps its history (SYSTEM VERSIONING), which only MariaDB has")
            matched.tables_left_out.append(name)
            return
        columns, theirs_by_place = (
            read_columns(side.connection, side.endpoint.database, name, collations)
            for side, collations in zip(self._ends, self._collations, strict=True)
        )
        ordered = in_log_order(columns, theirs_by_place)
        if ordered is None or [each.name for each in columns] != [each.name for each in ours.columns]:
            ordered = None  # or they have changed since ``ours`` was read
            fault = "the table has other columns"
        elif [each.casefold() for each in ours.primary] != [each.casefold() for each in theirs.primary]:
            fault = "the table has another primary key"
        else:
            fault = "; ".join(filter(None, map(_column_fault, columns, ordered)))
        if ordered is None or fault:
            matched.faults.append(Difference(name, Kind.TABLE, fault))
            return
        pairs = list(zip(columns, ordered, strict=True))
        reasons = {mine.name: _reason(mine, other) for mine, other in pairs}
        described = {mine.name: mine for mine in columns}
        in_key = [described[ours.column(each).name] for each in ours.primary]
        key_reason = next(filter(None, (_key_reason(each, reasons[each.name]) for each in in_key)), "")
        if key_reason:
            matched.left_out.append(f"{name}: {key_reason}")
            matched.tables_left_out.append(name)
            return
        matched.left_out.extend(f"{name}.{column}: {reason}" for column, reason in reasons.items() if reason)
        alike = _AlikeTable(
            name=name,
            kind=ours.kind,
            columns=tuple(_alike(each, self._ends[0]) for each in columns if not reasons[each.name]),
            primary=ours.primary,
            shape=ours.shape,
            born=ours.born,
            estimate=ours.estimate,
        )
        computed = {mine.name for mine, other in pairs if other.computed} - {each.name for each in in_key}
        matched.tables[name] = replace(
            alike, columns=tuple(each for each in alike.columns if each.name not in computed)
        )
        if any(each.name in computed for each in alike.columns):
            kept = computed | {each.name for each in in_key}
            matched.computed[name] = replace(alike, columns=tuple(each for each in alike.columns if each.name in kept))
        if not any(reasons[mine.name] and not other.computed for mine, other in pairs):
            written = (
                replace(column, generated=other.computed) for column, other in zip(ours.columns, ordered, strict=True)
            )
            matched.written[name] = replace(ours, columns=tuple(written))


def _alike(column: TargetColumn, source: Database) -> Column:
    """A column as it is compared."""
    return _AlikeColumn(column.name, column.data_type.lower(), column.charset, False, False, source.flavour)


def _column_fault(ours: TargetColumn, theirs: TargetColumn) -> str:
    """How a column differs between the two; empty where the SQL path writes the one as the other."""
    if theirs.computed and not ours.computed:
        return f"{ours.name} is generated on the target, and not on the source"
    logged, other = as_logged(ours), as_logged(theirs)
    if logged is None or other is None:
        return ""
    plain = replace(theirs, column_type=theirs.column_type.partition(" /*")[0])
    same = (
        (ours.charset == theirs.charset or ours.data_type == "json")
        and members(ours) == members(theirs)
        and _zeros(ours) == _zeros(theirs)
    )
    if same and not differences_by_name([logged], [plain], {}):
        return ""
    return f"{ours.name} is {_described(ours)} on the source and {_described(theirs)} on the target"


def _zeros(column: TargetColumn) -> str:
    """What an integer column is filled up to with zeros, which belong to the text of its values; empty for nothing."""
    return column.column_type if "zerofill" in column.column_type and column.data_type.endswith("int") else ""


def _described(column: TargetColumn) -> str:
    charset = f" CHARACTER SET {column.charset}" if column.charset is not None else ""
    return f"{column.column_type}{charset}{'' if column.nullable else ' NOT NULL'}"


def _reason(ours: TargetColumn, theirs: TargetColumn) -> str:
    """Why a column's values cannot be compared; empty where they can."""
    for each in (ours, theirs):
        if as_logged(each) is None:
            return f"{each.data_type} is a type of one family only"
    return ""


def _key_reason(column: TargetColumn, reason: str) -> str:
    if reason:
        return f"{column.name} is in its primary key, and {reason}"
    if column.data_type in _REAL:
        return (
            f"{column.name} is in its primary key, and each family writes a {column.data_type.upper()} in its own way"
        )
    return ""

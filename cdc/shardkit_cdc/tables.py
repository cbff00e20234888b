"""Tables as ``information_schema`` describes them: which there are, their columns and their primary keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from shardkit import own_tables
from shardkit.rowtext import Column, RowTexts, quoted
from shardkit_cdc.database import Database

_PERIOD = frozenset({"ROW START", "ROW END"})


@dataclass(frozen=True)
class Table(RowTexts):
    """A table's shape.

    :param kind: ``BASE TABLE``, or MariaDB's ``SYSTEM VERSIONED`` or ``SEQUENCE``.
    :param primary: columns of the primary key; empty without one.
    :param shape: what has to be equal on both ends of a hop, column by column.
    :param born: when the table of this name was made.
    :param estimate: rows, roughly.
    """

    name: str
    kind: str
    columns: tuple[Column, ...]
    primary: tuple[str, ...]
    shape: tuple[tuple[object, ...], ...]
    born: object
    estimate: int

    @property
    def own(self) -> bool:
        """Whether it is one of shardkit's."""
        return self.name.startswith(own_tables.PREFIX)

    @property
    def keys_alike(self) -> bool:
        """Whether both ends of a hop put its primary keys into one order, and take the same of them for equal."""
        return True

    def walk(self, where: str = "TRUE") -> str:
        """What stands behind SELECT ... FROM to have the rows in the order of the primary key.

        :param where: which of them, of a table with a primary key; else all.
        """
        if self.kind == "SYSTEM VERSIONED":
            return f"{quoted(self.name)} FOR SYSTEM_TIME ALL"
        if not self.primary:
            return quoted(self.name)
        return f"{quoted(self.name)} FORCE INDEX (PRIMARY) WHERE {where} ORDER BY {self.order}"

    @cached_property
    def with_history(self) -> Table:
        """A versioned table with the columns of its period as ordinary ones: they are copied too."""
        if self.kind != "SYSTEM VERSIONED":
            return self
        columns = self.columns
        if not any(column.data_type == "timestamp" and column.generated for column in columns):
            hidden = Column("row_start", "timestamp", None, False, False, columns[0].flavour)
            return replace(self, columns=(*columns, hidden, replace(hidden, name="row_end")))
        period = {str(name) for name, *_, generation in self.shape if generation in _PERIOD}
        return replace(
            self,
            columns=tuple(replace(each, generated=each.generated and each.name not in period) for each in columns),
        )


def read_tables(database: Database) -> dict[str, Table]:
    """Every table and sequence of the database by name, shardkit's own ones too."""
    columns: dict[str, list[Column]] = {}
    shapes: dict[str, list[tuple[object, ...]]] = {}
    for table, name, data_type, charset, extra, expression, column_type, nullable, collation in database.rows(
        "SELECT table_name, column_name, data_type, character_set_name, extra, generation_expression, column_type, "
        "is_nullable, collation_name FROM information_schema.columns WHERE table_schema = DATABASE() "
        "ORDER BY table_name, ordinal_position"
    ):
        words = str(extra).upper()
        columns.setdefault(table, []).append(
            Column(
                name,
                _text(data_type).lower(),
                charset,
                "GENERATED" in words.replace("DEFAULT_GENERATED", "") or bool(expression),
                "AUTO_INCREMENT" in words,
                database.flavour,
            )
        )
        shapes.setdefault(table, []).append(
            (name, _text(column_type), nullable, collation, _text(expression) if expression else "")
        )
    keys: dict[str, list[str]] = {}
    for table, name in database.rows(
        "SELECT table_name, column_name FROM information_schema.statistics WHERE table_schema = DATABASE() "
        "AND index_name = 'PRIMARY' ORDER BY table_name, seq_in_index"
    ):
        keys.setdefault(table, []).append(name)
    return {
        name: Table(
            name, kind, tuple(columns[name]), tuple(keys.get(name, ())), tuple(shapes[name]), born, int(estimate or 0)
        )
        for name, kind, born, estimate in database.rows(
            "SELECT table_name, table_type, create_time, table_rows FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_type IN ('BASE TABLE', 'SYSTEM VERSIONED', 'SEQUENCE') "
            "ORDER BY table_name"
        )
        if name in columns
    }


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)

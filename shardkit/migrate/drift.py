"""Alembic's differences between models and a database, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_MODIFIED = {
    "modify_type": "type",
    "modify_nullable": "nullability",
    "modify_default": "default",
    "modify_comment": "comment",
}


def describe(diff: Sequence[Any]) -> Iterator[str]:
    """One line for each difference.

    :param diff: an entry of ``alembic.autogenerate.compare_metadata``: a tuple, or a list of tuples for one column.
        https://alembic.sqlalchemy.org/en/latest/api/autogenerate.html#alembic.autogenerate.compare_metadata
    """
    if isinstance(diff, list):
        for one in diff:
            yield from describe(one)
        return
    match tuple(diff):
        case ("add_table", table):
            yield f"table {table.name} is in the models and not in the database"
        case ("remove_table", table):
            yield f"table {table.name} is in the database and not in the models"
        case ("add_column", _, table, column):
            yield f"column {table}.{column.name} is in the models and not in the database"
        case ("remove_column", _, table, column):
            yield f"column {table}.{column.name} is in the database and not in the models"
        case ("add_index", index):
            yield f"index {index.name} on {index.table.name} is in the models and not in the database"
        case ("remove_index", index):
            yield f"index {index.name} on {index.table.name} is in the database and not in the models"
        case ("add_constraint" | "add_fk", constraint):
            yield f"constraint {_name(constraint)} is in the models and not in the database"
        case ("remove_constraint" | "remove_fk", constraint):
            yield f"constraint {_name(constraint)} is in the database and not in the models"
        case (str() as what, _, table, column, _, old, new) if what in _MODIFIED:
            yield f"the {_MODIFIED[what]} of {table}.{column} is {old} in the database and {new} in the models"
        case (what, *rest):
            yield f"{what}: {', '.join(str(part) for part in rest)}"


def _name(constraint: Any) -> str:
    columns = ", ".join(column.name for column in constraint.columns)
    return f"{constraint.name or type(constraint).__name__} on {constraint.table.name} ({columns})"

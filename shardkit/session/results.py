"""Results made of several shards' results, as ordinary SQLAlchemy results.

SQLAlchemy has no public way to make one with the metadata of another; what is used of its inside is pinned by
tests/unit/test_session_hooks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Result
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.selectable import CompoundSelect

from shardkit.routing.merge import MergePlan, merge_rows


class MergedResult(IteratorResult[Any]):
    """The rows of several shards.

    :ivar missing_shards: the shards that did not answer (``shardkit_partial_ok``): their rows are not among these.
    """

    missing_shards: tuple[str, ...] = ()


def merged(
    plan: MergePlan,
    results: Sequence[Result[Any]],
    statement: Executable,
    *,
    missing: tuple[str, ...] = (),
    tuples: bool = False,
) -> MergedResult:
    """One result of the rows of several shards. Needs at least one.

    :param statement: as it was given, without hidden columns.
    :param missing: shards whose rows are not among them.
    :param tuples: whether rows of one entity are to stay rows (``Query.only_return_tuples()``).
    """
    first = results[0]
    unique = first._unique_filter_state  # noqa: SLF001 - set by the ORM where joined collections need unique()
    if plan.unique:
        for result in results:
            result.unique()
    else:
        for result in results:
            result._unique_filter_state = None  # noqa: SLF001 - unique() is for the merged rows
    told = _attributes(statement)
    rows: Iterator[Any] = _closing(merge_rows(plan, results), results)
    # as SQLAlchemy's own results of one entity: unique() and scalars() see the objects, not rows
    bare = bool(told["is_single_entity"]) and not tuples
    told["is_single_entity"] = bare
    if bare:
        rows = map(itemgetter(0), rows)
    if told["filtered"] and not first._yield_per:  # noqa: SLF001
        rows = _whole(rows)
    answer = MergedResult(
        _metadata(first, plan.visible, statement),
        rows,
        _source_supports_scalars=bare,
        context=getattr(first, "context", None),  # selectinload() asks it whether rows have to be made unique()
    )
    answer.missing_shards = missing
    answer._attributes = first._attributes.union(told)  # noqa: SLF001 - what Query looks at
    answer._unique_filter_state = unique  # noqa: SLF001
    answer._yield_per = first._yield_per  # noqa: SLF001 - the size of partitions()
    return answer


def _closing(rows: Iterator[Any], results: Sequence[Result[Any]]) -> Iterator[Any]:
    """Rows of these results, which nobody reads on after an error."""
    try:
        yield from rows
    except Exception:
        for result in results:
            result.close()
        raise


def _whole(rows: Iterator[Any]) -> Iterator[Any]:
    """Rows of objects as one database gives them: all are made before the first is given away, and stay until the last.
    What is changed in between they know of, and ``unique()``, which goes by ``id()``, tells them apart."""
    yield from list(rows)


def _metadata(result: Result[Any], visible: int | None, statement: Executable) -> SimpleResultMetaData:
    """The metadata of the statement's own columns, without the hidden ones behind them; None: there are none."""
    frozen: Any = result._metadata._for_freeze()  # noqa: SLF001
    names = frozen._keys  # noqa: SLF001 - with None for an alias that has no name
    keys = names[:visible]
    if isinstance(statement, CompoundSelect):  # what the shards were asked is a SELECT around it
        return _of_union(statement, keys)
    if len(keys) == len(names):
        return frozen  # type: ignore[no-any-return]
    filters = frozen._create_unique_filters  # noqa: SLF001
    return SimpleResultMetaData(
        keys,
        extra=[frozen._keymap[key][2] for key in keys],  # noqa: SLF001
        _create_unique_filters=None if filters is None else lambda answer: filters(answer)[:visible],
    )


def empty(statement: Executable, rows: Iterator[Any]) -> Result[Any]:
    """The result of a SELECT that no shard had to be asked for."""
    if isinstance(statement, CompoundSelect):
        return IteratorResult(_of_union(statement, list(statement.selected_columns.keys())), rows)
    entities: Any = statement.column_descriptions  # type: ignore[attr-defined]
    objects = [_objects(entity["expr"]) for entity in entities]
    metadata = SimpleResultMetaData([entity["name"] for entity in entities], extra=objects)
    answer: Result[Any] = IteratorResult(metadata, rows)
    answer._attributes = answer._attributes.union(_attributes(statement))  # noqa: SLF001
    return answer


def _of_union(statement: CompoundSelect[Any], keys: Sequence[str]) -> SimpleResultMetaData:
    """The metadata of a UNION: a column is known by each of its parts'."""
    columns: Any = zip(*(select.selected_columns for select in statement.selects), strict=False)
    return SimpleResultMetaData(keys, extra=list(columns))


def _objects(expression: Any) -> tuple[Any, ...]:
    """What a selected column may be asked for by: an attribute of a class is a column, too."""
    column = getattr(expression, "__clause_element__", None)
    return (expression,) if column is None or isinstance(expression, type) else (expression, column())


def _attributes(statement: Executable) -> dict[str, Any]:
    """What ``Query`` goes by: whether rows hold objects, and whether they are one object each."""
    columns: Any = getattr(statement, "column_descriptions", ())
    objects = [column.get("entity") is not None and column["expr"] is column["entity"] for column in columns]
    return {"filtered": any(objects), "is_single_entity": objects == [True]}


class WriteResult(IteratorResult[Any]):
    """What a write over several shards (or none) answers: how many rows, and those it returned.

    :param alike: of a reference table, the answer of one shard, which says more: ``inserted_primary_key``, ...
    :ivar rowcount: rows that matched, over all shards; a reference table's rows count once.
    """

    def __init__(self, rowcount: int, returned: Result[Any] | None = None, alike: Result[Any] | None = None) -> None:
        self.rowcount = rowcount
        self._alike = alike
        self.returns_rows = returned is not None
        self.is_insert = False
        metadata = SimpleResultMetaData([]) if returned is None else returned._metadata  # noqa: SLF001
        rows: Iterator[Any] = iter(()) if returned is None else map(tuple, returned)
        super().__init__(metadata, rows)

    def supports_sane_multi_rowcount(self) -> bool:
        """As of `sqlalchemy.CursorResult`: whether ``rowcount`` counts the rows of all parameter sets."""
        return self.rowcount >= 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self._alike is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._alike, name)

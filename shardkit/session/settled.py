"""Values of parameters that are worked out, or read, once: the router looks at them before each shard is sent them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.visitors import cloned_traverse


def listed(parameters: Any) -> Any:
    """Parameters whose iterators, for IN, have been read."""
    if type(parameters) is dict or isinstance(parameters, Mapping):  # the first is quicker to ask
        for value in parameters.values():
            if _passes(value):
                return {name: list(value) if _passes(value) else value for name, value in parameters.items()}
    return parameters


def settled(statement: Any, parameters: Any) -> tuple[Any, Any]:
    """A statement and its parameters, whose values do not change by being looked at: the value of
    ``bindparam(callable_=...)`` is asked for.
    """
    key = None if isinstance(statement, LambdaElement) else statement._generate_cache_key()  # noqa: SLF001 - memoized: SQLAlchemy asks for it anyway
    if key is None:  # of several rows of VALUES, for one
        return _with_settled_rows(statement), parameters
    if key.params and (own := listed(key.params)) is not key.params and not isinstance(parameters, list):
        parameters = {**own, **(parameters or {})}
    unsettled = False
    for bind in key.bindparams:
        if bind.callable is not None:
            if (getattr(bind.callable, "__module__", None) or "").startswith("sqlalchemy."):
                bind.callable()  # of an object: always the same, but it may load it
            else:
                unsettled = True
    if unsettled:
        statement = cloned_traverse(
            statement, {"maintain_key": True, "detect_subquery_cols": True}, {"bindparam": _settle}
        )
    return statement, parameters


def _with_settled_rows(statement: Any) -> Any:
    many = getattr(statement, "_multi_values", ())
    binds = {
        value: _copy(value)
        for rows in many
        for row in rows
        for value in (row.values() if isinstance(row, Mapping) else row)
        if isinstance(value, BindParameter) and value.callable is not None
    }
    if not binds:
        return statement

    def own(value: Any) -> Any:
        return binds.get(value, value) if isinstance(value, BindParameter) else value

    wider = statement._generate()  # noqa: SLF001 - there is no public way to give rows other values
    wider._multi_values = tuple(  # noqa: SLF001
        [
            {name: own(value) for name, value in row.items()} if isinstance(row, Mapping) else [*map(own, row)]
            for row in rows
        ]
        for rows in many
    )
    return wider


def _copy(bind: BindParameter[Any]) -> BindParameter[Any]:
    own: BindParameter[Any] = bind._clone(maintain_key=True)  # noqa: SLF001 - its name stays the same
    _settle(own)
    return own


def _settle(bind: BindParameter[Any]) -> None:
    """What is worked out for a statement's own copy of a parameter."""
    bind.value, bind.callable = bind.effective_value, None


def _passes(value: Any) -> bool:
    """Whether it is gone once it has been read."""
    return hasattr(type(value), "__next__")

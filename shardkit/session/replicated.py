"""Objects of reference tables: the same row on every shard is one object, whichever shard it was read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: (class, primary key, identity token): what SQLAlchemy's identity map knows an object by.
IdentityKey = tuple[type[Any], tuple[Any, ...], Any]


class OneForEachRow(dict[IdentityKey, Any]):
    """The dictionary inside an identity map, which leaves the shard out of the keys of replicated rows.

    A statement gives all its objects the shard that it ran on as their identity token. Of a sharded row that is its
    place; a row of a reference table would be as many objects as there are shards, and changes of one would not show
    in the other.

    :param replicated: whether a class's rows stand on every shard.
    """

    def __init__(self, replicated: Callable[[type[Any]], bool]) -> None:
        super().__init__()
        self._replicated = replicated

    def _key(self, key: Any) -> Any:
        if key is None or key[2] is None or not self._replicated(key[0]):
            return key  # None: of an object that was never written
        return (key[0], key[1], None)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._key(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._key(key), value)

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(self._key(key))

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._key(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """As `dict.get`."""
        return super().get(self._key(key), default)

    def pop(self, key: Any, *default: Any) -> Any:
        """As `dict.pop`."""
        return super().pop(self._key(key), *default)

"""What is worked out once for each shape of statement, and kept: the key that SQLAlchemy caches its SQL by names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from threading import Lock
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.elements import ClauseElement

from shardkit.partition import Bucket
from shardkit.routing.anatomy import Slot, anatomy_of
from shardkit.routing.conditions import Binds
from shardkit.routing.functions import AGGREGATES, OF_THE_STATEMENT_BEFORE, PURE, VOLATILE
from shardkit.routing.keys import KeyPin, Readers
from shardkit.routing.keyvalues import Reader
from shardkit.routing.lineage import Lineage
from shardkit.routing.queries import Occurrence
from shardkit.routing.spread import Parted, Refused, Spread, keyed_groups, keyed_rows, keyed_windows, spread_of
from shardkit.shardmap import Keyspace, ShardMap, TableInfo


@dataclass(frozen=True)
class Pinned:
    """What one execution says about the rows of some tables (those whose keys fulfil the same conditions).

    :param buckets: the only ones that can matter; None: any of the keyspace.
    :param shards: those that hold them.
    """

    buckets: frozenset[Bucket] | None
    shards: tuple[str, ...]


@dataclass(frozen=True)
class _Pin:
    pin: KeyPin
    said: tuple[str, ...]
    occurrences: tuple[Occurrence, ...]


class Shape:
    """What is known of every statement of one shape.

    :param lineage: its tables and what is true of their rows.
    """

    def __init__(self, statement: Executable, lineage: Lineage) -> None:
        self.lineage = lineage
        self.query = lineage.query
        self.infos: tuple[TableInfo, ...] = tuple({each.info.name: each.info for each in lineage.occurrences}.values())
        self.tables = tuple(info.name for info in self.infos)
        self.unreadable = tuple(dict.fromkeys(lineage.unreadable))
        self.locking = getattr(statement, "_for_update_arg", None) is not None
        keyspaces = {info.keyspace.name for info in self.infos if info.kind != "reference"}
        if not keyspaces:
            keyspaces = {info.keyspace.name for info in self.infos}
        self.keyspace = keyspaces.pop() if len(keyspaces) == 1 else None
        self._pins = _pins(lineage)
        self.quick = self._quick()

    def _quick(self) -> tuple[Reader, Slot, Keyspace] | None:
        """The one bound parameter that decides where the statement goes, where it is that simple."""
        if self.unreadable or len(self._pins) != 1 or self.lineage.functions & OF_THE_STATEMENT_BEFORE:
            return None
        only = self._pins[0]
        single = only.pin.single
        home = set(only.pin.keyspace.shards)
        if single is None or any(home.difference(info.shards) for info in self.infos):
            return None
        return (*single, only.pin.keyspace)

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Which conditions pin which key, without values: they may be personal data."""
        found = []
        for pin in self._pins:
            tables = ", ".join(dict.fromkeys(each.info.name for each in pin.occurrences))
            if pin.pin.impossible:
                found.append(f"no row of {tables} can match")
            elif pin.said and all(pin.pin.columns):
                found.append(f"{' and '.join(pin.said)} pins {tables}")
            elif pin.occurrences[0].info.key:
                key = ", ".join(f"{tables}.{column}" for column in pin.occurrences[0].info.key)
                found.append(f"no condition pins {key}")
            else:
                found.append(f"{tables} stands whole in keyspace {pin.pin.keyspace.name}")
        return tuple(found)

    @property
    def sharded(self) -> bool:
        """Whether it reads anything but reference tables."""
        return bool(self._pins)

    @property
    def unknown_functions(self) -> tuple[str, ...]:
        """Functions that may be anything, or that belong to one connection."""
        return tuple(sorted(self.lineage.functions - AGGREGATES - PURE - VOLATILE))

    def pinned(self, binds: Binds) -> tuple[Pinned, ...]:
        """For each group of tables, what this execution pins them to."""
        return tuple(self._pinned(pin, binds) for pin in self._pins)

    def _pinned(self, pin: _Pin, binds: Binds) -> Pinned:
        keyspace = pin.pin.keyspace
        buckets = None if self.unreadable else pin.pin.buckets(binds)
        return Pinned(buckets, keyspace.shards if buckets is None else shards_of(keyspace, buckets))

    def anchored(self, binds: Binds) -> Pinned:
        """Where rows of the whole result can come from, for a statement that is spread over shards."""
        spread = self.spread
        assert isinstance(spread, Parted)  # noqa: S101 - asked for spread statements only
        pins = [pin for pin in self._pins if any(each in pin.occurrences for each in spread.anchors)] or self._pins
        found = [self._pinned(pin, binds) for pin in pins]
        if not spread.anchors:  # a UNION ALL: each part its own
            buckets = _union(each.buckets for each in found)
            return Pinned(buckets, tuple(dict.fromkeys(shard for each in found for shard in each.shards)))
        known = [each.buckets for each in found if each.buckets is not None]
        if not known:
            return Pinned(None, spread.keyspace.shards)
        buckets = frozenset.intersection(*known)
        return Pinned(buckets, shards_of(spread.keyspace, buckets))

    # --- over several shards

    @cached_property
    def _spread(self) -> Spread | Refused:
        try:
            return spread_of(self.lineage, self.query)
        except Refused as refused:
            return refused

    @property
    def spread(self) -> Spread:
        """Where its rows stand.

        :raises Refused: when the shards' own answers do not add up to its result.
        """
        if isinstance(self._spread, Refused):
            raise self._spread
        return self._spread

    @cached_property
    def loads_beside(self) -> bool:
        """Whether the rows that are loaded for those of a subquery stand on the same shard as these."""
        try:
            spread_of(self.lineage, self.query, as_they_come=True)
        except Refused:
            return False
        return not self.unreadable

    @cached_property
    def keyed_groups(self) -> bool:
        """Whether no group stands on two shards."""
        spread = self.spread
        return isinstance(spread, Parted) and keyed_groups(self.lineage, self.query, spread)

    @cached_property
    def keyed_rows(self) -> bool:
        """Whether equal rows of the result stand on one shard."""
        spread = self.spread
        return isinstance(spread, Parted) and keyed_rows(self.lineage, self.query, spread)

    @cached_property
    def keyed_windows(self) -> bool:
        """Whether all rows that a window function sees at once stand on one shard."""
        spread = self.spread
        return isinstance(spread, Parted) and keyed_windows(self.lineage, self.query, spread)

    def is_key(self, element: ClauseElement) -> bool:
        """Whether a column is the whole key of the rows that the result is made of."""
        spread = self.spread
        known = self.query.scope.resolve(element)
        if known is None or not isinstance(spread, Parted):
            return False
        closed = self.lineage.closed(self.query.context)
        return any(
            len(anchor.key) == 1 and closed.find(anchor.key[0]) == closed.find(known.term) for anchor in spread.anchors
        )


def _pins(lineage: Lineage) -> tuple[_Pin, ...]:
    found: dict[tuple[object, ...], _Pin] = {}
    for occurrence in lineage.occurrences:
        if occurrence.info.kind == "reference":
            continue
        pin, said = lineage.pin(occurrence)
        conditions = tuple(tuple((id(read), id(each)) for read, each in column) for column in pin.columns)
        key = (pin.keyspace.name, conditions, pin.impossible)
        before = found[key].occurrences if key in found else ()
        found[key] = _Pin(pin, said, (*before, occurrence))
    return tuple(found.values())


def _union(sets: Iterable[frozenset[Bucket] | None]) -> frozenset[Bucket] | None:
    together: frozenset[Bucket] = frozenset()
    for each in sets:
        if each is None:
            return None
        together |= each
    return together


def shards_of(keyspace: Keyspace, buckets: Iterable[Bucket]) -> tuple[str, ...]:
    """The shards that hold these buckets, in the map's order.

    A keyspace on one shard may hold rows whose keys no bucket takes: there nothing was refused.
    """
    if len(keyspace.shards) == 1:
        return keyspace.shards
    holders = {keyspace.placement[bucket] for bucket in buckets}
    return tuple(shard for shard in keyspace.shards if shard in holders)


# --- keeping them ------------------------------------------------------------------------------------------------

#: Shapes kept by one planner; the longest unused goes first.
MOST_SHAPES: Final = 1000


class Shapes:
    """The shapes of one map's statements."""

    def __init__(self, shard_map: ShardMap, dialect: Dialect, readers: Readers) -> None:
        self._map = shard_map
        self._dialect = dialect
        self._readers = readers
        self._kept: dict[Any, Shape] = {}
        self._lock = Lock()

    def find(self, key: Any) -> Shape | None:
        """A shape that was seen before."""
        return self._kept.get(key)

    def of(
        self, statement: Executable, given: Mapping[str, Any] | None, *, executemany: bool = False
    ) -> tuple[Shape, Binds]:
        """A statement's shape, and the values of its parameters.

        :raises UnknownTable: for a table that the map does not name.
        """
        cache_key: CacheKey | None = statement._generate_cache_key()  # type: ignore[attr-defined]  # noqa: SLF001 - what SQLAlchemy's own cache asks
        changes = isinstance(statement, sa.Update | sa.Delete)
        names = tuple(sorted(given)) if given and changes else ()
        if cache_key is None:
            shape = self._made(statement, None, names, executemany=executemany)
            return shape, Binds({**shape.lineage.params, **(given or {})}, ())
        key = (cache_key.key, names, executemany) if changes else cache_key.key
        known = self._kept.get(key)
        shape = known or self._made(statement, cache_key, names, executemany=executemany)
        if known is None:
            self._keep(key, shape)
        if cache_key.params:
            given = {**cache_key.params, **(given or {})}
        return shape, Binds(given, cache_key.bindparams)

    def fresh(self, statement: Executable, given: Mapping[str, Any] | None) -> Shape:
        """A shape whose elements are this very statement's own.

        What is kept was made of another statement: its aliases are other objects, which must not be put into this one.
        """
        names = tuple(sorted(given)) if given and isinstance(statement, sa.Update | sa.Delete) else ()
        return self._made(statement, None, names, executemany=False)

    def _made(
        self, statement: Executable, cache_key: CacheKey | None, names: Sequence[str], *, executemany: bool
    ) -> Shape:
        anatomy = anatomy_of(statement, self._dialect, cache_key=cache_key, column_keys=names, executemany=executemany)
        return Shape(statement, Lineage(anatomy, self._map, self._dialect, self._readers))

    def _keep(self, key: Any, shape: Shape) -> None:
        with self._lock:
            for oldest in list(islice(self._kept, max(0, len(self._kept) + 1 - MOST_SHAPES))):
                del self._kept[oldest]
            self._kept[key] = shape

"""The rows that a source's log changes behind a position, by their keys, and what its images tell of them before."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from enum import Enum, auto

from shardkit.errors import BadEvent, Drift, Interrupted, PreconditionFailed
from shardkit.gtid import Flavour, Gtid, Position
from shardkit.rowtext import quoted
from shardkit_cdc.events import UPDATE_ROWS, WRITE_ROWS, Event
from shardkit_cdc.retention import SEED_HINT
from shardkit_cdc.row_image import ABSENT, Image, RowDecoder
from shardkit_cdc.schema import SchemaCheck, without_hashes
from shardkit_cdc.selection import Selector
from shardkit_cdc.sql_table import NotCarried, SqlTable, sql_columns
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.survey import Quiet
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.tables import Table
from shardkit_cdc.transactions import Assembler, Rows

#: Keys that are held in memory.
MOST_KEYS = 500_000
#: After how many seconds without an event a log that should go on counts as ended.
_STILL_SECONDS = 10.0


class Before(Enum):
    """Whether the source had a row of a key at the position, as the first change of it behind the position tells."""

    THERE = auto()
    ABSENT = auto()
    UNKNOWN = auto()


class Touched:
    """Collects keys from row events.

    A key is the condition that finds its row, in SQL.

    :param check: of the target's tables.
    :param source: the family that wrote the log.
    :param target: the target's.
    :param tables: of which keys are wanted; of others it is only noted that they changed.
    :param wanted: table -> keys of which the rows are wanted, too.
    """

    def __init__(
        self,
        check: SchemaCheck,
        source: Flavour,
        target: Flavour,
        tables: Mapping[str, Table],
        wanted: Mapping[str, Container[bytes]],
    ) -> None:
        self._check = check
        self._source = source
        self._target = target
        self._tables = tables
        self._wanted = wanted
        self._known: dict[TableMap, tuple[RowDecoder, SqlTable] | None] = {}
        self._number = 0
        #: Table -> its keys, in the order in which they were first changed.
        self.keys: dict[str, dict[bytes, Before]] = {}
        #: Tables that were changed, and whose keys cannot be told.
        self.whole: set[str] = set()
        #: Tables of which rows were updated or deleted.
        self.changed: set[str] = set()
        #: INSERT statements of wanted rows, as they were before their first change.
        self.rows: dict[tuple[str, bytes], bytes] = {}

    def add(self, rows: Iterable[Rows]) -> None:
        """Note the rows of events that come behind all that were given before.

        :raises PreconditionFailed: when there are too many.
        :raises BadEvent: for a row that cannot be read.
        """
        for table, event in rows:
            if event.kind not in WRITE_ROWS:
                self.changed.add(table.table)
            if table not in self._known:
                self._known[table] = self._look(table)
            known = self._known[table]
            if known is None:
                self.whole.add(table.table)
                continue
            keys = self.keys.setdefault(table.table, {})
            wanted = self._wanted.get(table.table, ())
            for key, before, image in _changes(*known, event):
                if key not in keys:
                    keys[key] = before
                    self._number += 1
                    if key in wanted and before is Before.THERE:
                        self.rows[table.table, key] = _insert(known[1], image)
            if self._number > MOST_KEYS:
                raise PreconditionFailed(
                    f"more than {MOST_KEYS:,} rows have changed on the source since the hop stopped: too many to tell "
                    "them from drift",
                    hint=SEED_HINT,
                )

    def _look(self, table: TableMap) -> tuple[RowDecoder, SqlTable] | None:
        described = self._tables.get(table.table)
        if described is None or not described.primary or described.kind != "BASE TABLE" or not described.keys_alike:
            return None
        try:
            self._check.check(table, at="")
        except Drift:  # the table differs as such: that is told elsewhere
            return None
        decoder = RowDecoder(table)
        columns = sql_columns(
            without_hashes(decoder.columns),
            self._check.target_columns(table),
            source=self._source,
            flavour=self._target,
        )
        return decoder, SqlTable(quoted(table.table), columns, described.primary)


def _insert(table: SqlTable, image: Image) -> bytes:
    try:
        return table.insert_head + table.row(image)
    except NotCarried as error:
        raise PreconditionFailed(
            f"a row of {table.name.decode()} cannot be written as the log has it: {error}", hint=SEED_HINT
        ) from None


def _changes(decoder: RowDecoder, table: SqlTable, event: Event) -> Iterator[tuple[bytes, Before, Image]]:
    images = decoder.images(event)
    try:
        if event.kind in UPDATE_ROWS:
            for before, after in zip(images[::2], images[1::2], strict=True):
                yield table.where(before), Before.THERE, before
                # To the server it may be the same key, written in another way. What is not logged has not changed.
                merged = tuple(old if new is ABSENT else new for old, new in zip(before, after, strict=True))
                yield table.where(merged), Before.UNKNOWN, merged
        else:
            told = Before.ABSENT if event.kind in WRITE_ROWS else Before.THERE
            for image in images:
                yield table.where(image), told, image
    except NotCarried as error:
        raise BadEvent(f"a row of {table.name.decode()} cannot be told by its key: {error}") from None


def read_touched(
    touched: Touched,
    stream: BinlogStream,
    flavour: Flavour,
    selector: Selector,
    *,
    after: Position,
    end: Position,
) -> None:
    """Collect all that a log changes between two positions.

    :param stream: the log from ``after`` on.
    :raises PreconditionFailed: when the schema changed on the way, or too many rows.
    :raises BadEvent, Interrupted, PositionLost: when the log cannot be read.
    """
    assembler = Assembler(flavour)
    quiet = Quiet(_STILL_SECONDS)
    while not after.covers(end):
        arrived = stream.read()
        if arrived:
            quiet.over()
        elif quiet:
            raise Interrupted(f"{stream.endpoint.address} does not send its log up to {end}")
        passed: list[Gtid] = []
        for event in arrived:
            transaction = assembler.push(event)
            selected = None if transaction is None else selector.select(transaction)
            if transaction is None:
                continue
            if selected is not None and selected.change is not None:
                raise PreconditionFailed(
                    f"the schema has changed since the hop stopped ({transaction.gtid}): its ends cannot be compared",
                    hint=SEED_HINT,
                )
            touched.add(transaction.rows)
            if transaction.last:
                passed.append(transaction.gtid)
        after = after.advanced(passed)

"""Which of a server's changes belong to one hop: its own database's, under the target's name for it. Pure.

Several shards may share a server, so a log holds other databases' changes too. Row events are told apart by their
table map, schema changes by their default database and the names in them; what cannot be told apart stops the hop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardkit import own_tables
from shardkit.errors import BadEvent
from shardkit_cdc import events, statement
from shardkit_cdc.query import Query
from shardkit_cdc.statement import Effect, Name, Statement
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import STATEMENT_FORMAT_HINT, Outcome, Rows, Transaction

_HISTORY = own_tables.HISTORY_PREFIX.encode()
_ANSI_QUOTES = 1 << 2  # of sql_mode
_WITH_TABLE_NAMES = frozenset({"TABLE", "INDEX", "SEQUENCE", "VIEW"})


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """A statement to replay on the target.

    :param query: the statement and its session, with the target's database name in it.
    :param outline: what it does.
    """

    query: Query
    outline: Statement


@dataclass(slots=True)
class Selected:
    """What is left of a transaction for the hop.

    :param own: whether anything is; else only the position moves.
    """

    transaction: Transaction
    change: SchemaChange | None = None

    @property
    def own(self) -> bool:
        transaction = self.transaction
        ends_branch = transaction.outcome in {Outcome.XA_COMMIT, Outcome.XA_ROLLBACK}
        return bool(transaction.rows or self.change or ends_branch or not transaction.first)


class Selector:
    """Takes out of each transaction what concerns one database.

    :param source: its name on the source.
    :param target: its name on the target.
    :param fold_case: whether the source compares database names without regard to case (lower_case_table_names).
    """

    def __init__(self, source: str, target: str, *, fold_case: bool = False) -> None:
        self._source = source
        self._target = target
        self._fold = fold_case
        self._tables: dict[TableMap, TableMap | None] = {}
        self._begun = False  # whether a part of the big transaction at hand has been handed on

    def select(self, transaction: Transaction) -> Selected | None:
        """What is left of a transaction, or of a part of one; None for a part that leaves nothing.

        :raises BadEvent: for what cannot be replayed, or cannot be told apart from another database's.
        """
        kept: list[Rows] = []
        for rows in transaction.rows:
            try:
                table = self._tables[rows.table]
            except KeyError:
                table = self._choose(rows.table)
            if table is None:
                continue
            if table.table == own_tables.position.name and not events.leading_text(rows.event).startswith(_HISTORY):
                continue
            kept.append(rows if table is rows.table else Rows(table, rows.event))
        if len(kept) != len(transaction.rows):
            transaction.size = sum(len(rows.event.data) for rows in kept)
        transaction.rows = kept
        change = None
        for query in transaction.statements:
            found = self._change(query, str(transaction.gtid))
            if found is not None and change is not None:
                raise BadEvent(f"two schema changes in one group: {_shown(query)}", at=str(transaction.gtid))
            change = found or change
        if not transaction.last and not kept and change is None:
            return None
        # The first part that is handed on counts as the first, whatever came before it.
        transaction.first, self._begun = not self._begun, not transaction.last
        return Selected(transaction, change)

    def _choose(self, table: TableMap) -> TableMap | None:
        chosen: TableMap | None = None
        if self._same(table.database) and table.table not in own_tables.LOCAL_TABLES:
            chosen = table if table.database == self._target else table.in_database(self._target)
        if len(self._tables) >= 10_000:
            self._tables.clear()
        self._tables[table] = chosen
        return chosen

    def _same(self, database: str) -> bool:
        if self._fold:
            return database.casefold() == self._source.casefold()
        return database == self._source

    def _change(self, query: Query, at: str) -> SchemaChange | None:
        """The statement as the target has to run it; None when it is none of this hop's."""
        text = query.text.decode("utf-8", "surrogateescape")
        ansi_quotes = bool((query.session.sql_mode or 0) & _ANSI_QUOTES)
        outline = statement.outline(text, ansi_quotes=ansi_quotes)
        at_home = self._same(query.database)
        concerned = at_home or any(map(self._same, outline.mentioned))
        if outline.effect in {Effect.SERVER, Effect.MARK}:
            return None
        if outline.effect is Effect.DATABASE:
            return self._database_change(query, outline)
        if outline.effect is Effect.SCHEMA and outline.names:
            if not self._all_own(outline.names, at_home, query, at) or _all_shardkits(outline, query, at):
                return None
            return SchemaChange(self._moved(query, outline, text, ansi_quotes, at), outline)
        if not concerned:
            return None
        if outline.effect is Effect.ROWS:
            raise BadEvent(
                f"rows were changed by a statement instead of row events: {_shown(query)}",
                at=at,
                hint=STATEMENT_FORMAT_HINT,
            )
        raise BadEvent(
            f"a statement that shardkit does not know: {_shown(query)}",
            at=at,
            hint="run it on the target by hand if it belongs there, then `shardkit relay skip`",
        )

    def _database_change(self, query: Query, outline: Statement) -> SchemaChange | None:
        named = outline.names[0].name if outline.names else query.database
        # The target's database holds the position, so it is always there already.
        if not self._same(named) or outline.verb == "CREATE":
            return None
        return SchemaChange(replace(query, database=self._target), outline)

    def _all_own(self, names: tuple[Name, ...], at_home: bool, query: Query, at: str) -> bool:
        own = {at_home if name.database is None else self._same(name.database) for name in names}
        if len(own) > 1:
            raise BadEvent(
                f"one statement changes this database and another: {_shown(query)}",
                at=at,
                hint="write one statement per database; run this one's part on the target by hand, then `relay skip`",
            )
        return own.pop()

    def _moved(self, query: Query, outline: Statement, text: str, ansi_quotes: bool, at: str) -> Query:
        database = self._target if self._same(query.database) else ""
        if self._source == self._target:
            return replace(query, database=database)
        if not any(map(self._same, outline.mentioned)):
            return replace(query, database=database)
        if outline.kind not in _WITH_TABLE_NAMES - {"VIEW"}:
            raise BadEvent(
                f"a {outline.kind.lower()} names its database, which the target calls {self._target}: {_shown(query)}",
                at=at,
                hint="leave the database's name out of it, or give both databases the same name",
            )
        moved = text
        for name in outline.mentioned:
            if self._same(name):
                moved = statement.renamed(moved, name, self._target, ansi_quotes=ansi_quotes)
        return replace(query, database=database, text=moved.encode("utf-8", "surrogateescape"))


def _all_shardkits(outline: Statement, query: Query, at: str) -> bool:
    """Whether a statement works on shardkit's own tables only: each server is migrated by itself."""
    if outline.kind not in _WITH_TABLE_NAMES and not (outline.kind == "TRIGGER" and outline.verb == "CREATE"):
        return False
    own = {name.name.startswith(own_tables.PREFIX) for name in outline.names}
    if len(own) > 1:
        raise BadEvent(f"one statement changes shardkit's tables and others: {_shown(query)}", at=at)
    return own.pop()


def _shown(query: Query) -> str:
    text = " ".join(query.text[:400].decode("utf-8", "replace").split())
    return text[:120] + ("..." if len(text) > 120 or len(query.text) > 400 else "")

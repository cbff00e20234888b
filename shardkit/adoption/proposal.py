"""Which tables belong together, and by which key: a proposal for people to mend. Pure.

A *family* is a root table with a key that others point at (``users.id`` and every ``user_id``), or a column that many
tables share. The largest family of a well-known kind (tenant, customer, user, ...) is sharded by its key; small tables
beside it become reference tables; what is left stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardkit.adoption import hazards
from shardkit.adoption.tables import ColumnFacts, TableFacts
from shardkit.errors import PreconditionFailed

#: Whoever owns the rows of most applications: worth two tables when families are compared.
_OWNERS = frozenset(
    {"tenant", "organization", "organisation", "org", "account", "customer", "user", "member", "company", "workspace"}
    | {"shop", "store", "merchant", "client", "player", "device", "patient", "student"}
)
#: A table up to so many rows may stand on every shard.
REFERENCE_ROWS = 10_000
#: A key with fewer values than this spreads nothing, unless it is somebody who owns rows.
_ROOT_ROWS = 1_000
#: A further family is worth a keyspace of its own from so many rows on.
_FAMILY_ROWS = 100_000


@dataclass(frozen=True, slots=True)
class Choice:
    """One table's place, with the reason.

    :param key: the key column; empty for reference tables and whole tables.
    :param warnings: what sharding would break.
    """

    keyspace: str
    table: str
    key: str
    why: str
    rows: int | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProposedKeyspace:
    """One keyspace of the proposal.

    :param sharded: with a key; reference tables stand beside.
    """

    name: str
    sharded: bool
    why: str
    tables: tuple[Choice, ...]
    reference: tuple[Choice, ...] = ()
    generated_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Family:
    name: str
    key: str
    members: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # table -> (key column, why)
    owner: bool = False
    forced: bool = False

    def rows(self, tables: Mapping[str, TableFacts]) -> int:
        return sum(tables[name].rows or 0 for name in self.members)


def propose(tables: Mapping[str, TableFacts], keys: Sequence[str] = ()) -> tuple[ProposedKeyspace, ...]:
    """A keyspace for every table.

    :param keys: ``table.column`` to shard by, instead of a guess.
    :raises PreconditionFailed: for a key that is not there or cannot be one, or a database without tables.
    """
    if not tables:
        raise PreconditionFailed("the database has no tables", hint="check the database's name; shard one with tables")
    families = [_forced(tables, key) for key in keys]
    taken = {table for family in families for table in family.members}
    while not keys and (best := _best(tables, taken, first=not families)) is not None:
        families.append(best)
        taken |= best.members.keys()
    left = {name: facts for name, facts in tables.items() if name not in taken}
    small = [name for name, facts in left.items() if families and (facts.rows or 0) <= REFERENCE_ROWS]
    spaces = [_keyspace(family, tables, small if number == 0 else []) for number, family in enumerate(families)]
    whole = [name for name in left if name not in small]
    if whole:
        names = {space.name for space in spaces}
        spaces.append(_whole(whole, tables, name=next(n for n in ("main", "whole", "whole-tables") if n not in names)))
    return tuple(spaces)


# --- families


def _forced(tables: Mapping[str, TableFacts], key: str) -> _Family:
    table, _, column = key.partition(".")
    if table not in tables or column not in tables[table].columns:
        known = ", ".join(sorted(tables[table].columns if table in tables else tables))
        what = f"the table {table} has no column {column!r}" if table in tables else f"there is no table {table!r}"
        raise PreconditionFailed(f"cannot shard by {key}: {what}", hint=f"write table.column; there is {known}")
    if (why := hazards.no_key(tables[table].columns[column])) is not None:
        raise PreconditionFailed(f"cannot shard by {key}: {why}", hint="choose another key")
    if tables[table].primary_key == (column,):
        family = _rooted(tables, tables[table], set())
    else:
        family = _shared(tables, column, set())
    return _Family(family.name, family.key, family.members or {table: (column, "as asked")}, family.owner, forced=True)


def _best(tables: Mapping[str, TableFacts], taken: set[str], *, first: bool) -> _Family | None:
    """The family that is most worth sharding among the tables not taken yet."""
    candidates = [family for family in _families(tables, taken) if len(family.members) > 1]
    if not first:
        candidates = [family for family in candidates if family.rows(tables) >= _FAMILY_ROWS]
    return max(
        candidates, key=lambda family: (len(family.members) + 2 * family.owner, family.rows(tables)), default=None
    )


def _families(tables: Mapping[str, TableFacts], taken: set[str]) -> Iterator[_Family]:
    free = {name: facts for name, facts in tables.items() if name not in taken}
    for facts in free.values():
        if len(facts.primary_key) == 1 and hazards.no_key(facts.columns[facts.primary_key[0]]) is None:
            family = _rooted(tables, facts, taken)
            if family.owner or facts.rows is None or facts.rows >= _ROOT_ROWS or facts.rows * 20 >= family.rows(tables):
                yield family
    shared = {column for facts in free.values() for column in facts.columns if column.lower().endswith("_id")}
    rooted = {column for facts in free.values() for column in facts.columns if _root_of(column, tables)}
    for column in sorted(shared - rooted):
        yield _shared(tables, column, taken)


def _rooted(tables: Mapping[str, TableFacts], root: TableFacts, taken: set[str]) -> _Family:
    (key,) = root.primary_key
    members = {root.name: (key, "the primary key")}
    for facts in tables.values():
        if facts.name not in taken and facts.name != root.name and (found := _pointer(facts, root)):
            members[facts.name] = found
    owner = any(name in _OWNERS for name in _singulars(root.name))
    return _Family(root.name, f"{root.name}.{key}", members, owner)


def _shared(tables: Mapping[str, TableFacts], column: str, taken: set[str]) -> _Family:
    members = {
        name: (column, f"shares {column}")
        for name, facts in tables.items()
        if name not in taken and column in facts.columns and hazards.no_key(facts.columns[column]) is None
    }
    name = column.lower().removesuffix("_id")
    return _Family(name, column, members, name in _OWNERS)


def _pointer(facts: TableFacts, root: TableFacts) -> tuple[str, str] | None:
    """The column by which a table's rows belong to the root's, and why; the surest first."""
    (key,) = root.primary_key
    kind = root.columns[key].kind
    declared = [
        foreign.columns[0]
        for foreign in facts.foreign_keys
        if foreign.table == root.name and foreign.referred == (key,) and len(foreign.columns) == 1
    ]
    elsewhere = {column for foreign in facts.foreign_keys for column in foreign.columns} - set(declared)
    named = [
        column
        for column in facts.columns
        if column not in elsewhere and column not in declared and column.lower() in _pointing_names(root)
    ]
    found = [
        (column, why)
        for columns, why in ((declared, f"foreign key to {root.name}.{key}"), (named, f"named like {root.name}.{key}"))
        for column in columns
        if facts.columns[column].kind is kind
    ]
    if not found:
        return None
    column, why = min(found, key=lambda one: (facts.columns[one[0]].nullable, one[0] not in facts.primary_key))
    others = [other for other, _ in found if other != column]
    return column, f"{why}; it has {', '.join(others)} too" if others else why


def _pointing_names(root: TableFacts) -> frozenset[str]:
    (key,) = root.primary_key
    names = {f"{name}{mark}id" for name in _singulars(root.name) for mark in ("_", "")}
    generic = {"id", "uuid", "guid", "code", "name", "key", "number", "nr", "no", "year", "date", "day"}
    return frozenset(names | ({key.lower()} - generic))


def _root_of(column: str, tables: Mapping[str, TableFacts]) -> bool:
    return any(len(facts.primary_key) == 1 and column.lower() in _pointing_names(facts) for facts in tables.values())


def _singulars(name: str) -> frozenset[str]:
    """What one row of a table could be called."""
    word = name.lower().rpartition("_")[2]
    forms = {name.lower(), word}
    for plural in (name.lower(), word):
        forms |= {
            plural.removesuffix(end) + new for end, new in (("s", ""), ("es", ""), ("ies", "y")) if plural.endswith(end)
        }
    return frozenset(forms)


# --- keyspaces


def _keyspace(family: _Family, tables: Mapping[str, TableFacts], small: Iterable[str]) -> ProposedKeyspace:
    reference = tuple(small)
    beside = frozenset({*family.members, *reference})
    choices = tuple(
        Choice(family.name, name, column, why, tables[name].rows, tuple(_warnings(tables[name], column, beside)))
        for name, (column, why) in family.members.items()
    )
    automatic = tuple(
        f"{name}.{column.name}"
        for name in family.members
        for column in tables[name].columns.values()
        if column.autoincrement
    )
    spread = "asked for" if family.forced else f"{len(choices)} tables have it"
    return ProposedKeyspace(
        family.name,
        sharded=True,
        why=f"sharded by {family.key}: {spread}",
        tables=choices,
        reference=tuple(
            Choice(family.name, name, "", _why_reference(tables[name]), tables[name].rows) for name in reference
        ),
        generated_ids=automatic,
    )


def _warnings(facts: TableFacts, column: str, beside: frozenset[str]) -> Iterator[str]:
    yield from hazards.key_hazards(facts, facts.columns[column])
    yield from hazards.sharded_hazards(facts, (column,))
    yield from hazards.foreign_key_hazards(facts, beside)


def _why_reference(facts: TableFacts) -> str:
    return (
        "small and without the key: a copy on every shard"
        if facts.rows
        else "empty, without the key: a copy on every shard"
    )


def _whole(names: Sequence[str], tables: Mapping[str, TableFacts], *, name: str) -> ProposedKeyspace:
    return ProposedKeyspace(
        name,
        sharded=False,
        why="whole tables, on one shard: no key was found that others share",
        tables=tuple(Choice(name, table, "", _why_whole(tables[table]), tables[table].rows) for table in names),
    )


def _why_whole(facts: TableFacts) -> str:
    unfit = [column for column in _keyish(facts) if hazards.no_key(column)]
    return f"{unfit[0].name} cannot be a key: {hazards.no_key(unfit[0])}" if unfit else "no shared key"


def _keyish(facts: TableFacts) -> Iterator[ColumnFacts]:
    return (
        column
        for column in facts.columns.values()
        if column.name in facts.primary_key or column.name.lower().endswith("_id")
    )

"""Normalized keys: on three shards every statement does what it does on one database, however its keys are spelled."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import delete, func, insert, or_, select, text, update
from sqlalchemy.dialects.mysql import insert as upsert
from sqlalchemy.orm import Session, foreign, joinedload, registry, relationship, selectinload

import shardkit
from shardkit.cluster import Cluster
from shardkit.errors import KeyChange, MissingKey
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.conftest import driver

SHARDS = ("shard-0", "shard-1", "shard-2")
NAMES = ["Kim", "lee", "PARK", "서울", "金 One", "_x", "[a", "e", "o'hara", "Zed ", ""]
PARTITIONS: dict[str, dict[str, Any]] = {
    "hash": {"by": "hash", "buckets": 64, "exceptions": {"KIM": "own"}},
    "list": {"by": "list", "buckets": {"a": NAMES[:4], "b": NAMES[4:8], "c": [*NAMES[8:], "new one"]}},
    "directory": {"by": "directory", "buckets": ["a", "b", "c"], "home": "shard-1"},
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "hash": {"shard-0": "0-20", "shard-1": "21-41, own", "shard-2": "42-63"},
    "list": {"shard-0": ["a"], "shard-1": ["b"], "shard-2": ["c"]},
    "directory": {"shard-0": ["a"], "shard-1": ["b"], "shard-2": ["c"]},
}
_numbers = itertools.count(1)


@dataclass
class World:
    """Rows on one database, and the same on three shards.

    :param Person: keyed by its name.
    :param Pet: beside its owner, which it may spell otherwise.
    """

    kind: str
    metadata: sa.MetaData
    Person: Any
    Pet: Any
    whole: sa.Engine
    cluster: Cluster
    normalize: bool = True

    def session(self) -> Session:
        made: Session = shardkit.sessionmaker(self.cluster)()
        return made

    def both(self, work: Callable[[Session], Any]) -> tuple[Any, Any]:
        """What some work gives on one database, and on the shards."""
        with Session(self.whole) as one, self.session() as several:
            return work(one), work(several)

    def rows(self) -> tuple[list[Any], list[Any]]:
        """All rows of both tables, from one database and from the shards' own."""
        found: tuple[list[Any], list[Any]] = ([], [])
        engines = [[self.whole], [self.cluster.engine(shard) for shard in SHARDS]]
        for rows, some in zip(found, engines, strict=True):
            for table in self.metadata.sorted_tables:
                for engine in some:
                    with engine.connect() as connection:
                        rows += [(table.name, *row) for row in connection.execute(select(table))]
            rows.sort(key=repr)
        return found

    def shards_with(self, name: str) -> list[str]:
        """The shards where rows of a key are, as the databases say."""
        found = []
        for shard in SHARDS:
            with self.cluster.engine(shard).connect() as connection:
                if connection.execute(select(self.Person.name).where(self.Person.name == name)).all():
                    found.append(shard)
        return found


def _world(
    server: LocalDatabaseServer,
    kind: str,
    collation: str | None,
    *,
    normalize: bool = True,
    foreign_key: bool = False,
) -> Iterator[World]:
    column = sa.String(20, collation=collation)
    mapped = registry()
    people = sa.Table(
        "people", mapped.metadata, sa.Column("name", column, primary_key=True), sa.Column("note", sa.String(20))
    )
    pets = sa.Table(
        "pets",
        mapped.metadata,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("owner", column, *([sa.ForeignKey("people.name")] if foreign_key else []), nullable=False),
        sa.Column("kind", sa.String(20)),
    )

    class Person:
        pass

    class Pet:
        pass

    tie = people.c.name == foreign(pets.c.owner)
    to_pets = relationship(Pet, primaryjoin=tie, back_populates="person", order_by=pets.c.id)
    mapped.map_imperatively(Person, people, properties={"pets": to_pets})
    mapped.map_imperatively(
        Pet, pets, properties={"person": relationship(Person, primaryjoin=tie, back_populates="pets")}
    )
    names = {shard: f"spelled_{next(_numbers)}_{os.getpid()}" for shard in ("whole", *SHARDS)}
    for name in names.values():
        server.execute(f"CREATE DATABASE {name}")
    document = {
        "format": 1,
        "cluster": "spelled",
        "keyspaces": {
            "people": {
                "partition": {**PARTITIONS[kind], **({"normalize": "lower"} if normalize else {})},
                "tables": {"people": "name", "pets": "owner"},
                "placement": PLACEMENTS[kind],
            }
        },
        "shards": {shard: {"master": server.endpoint(names[shard]).url} for shard in SHARDS},
    }
    whole = sa.create_engine(server.dsn(names["whole"], driver().partition("+")[2] or "pymysql"))
    cluster = shardkit.create_cluster(
        ShardMap.parse(document), credentials=server.credentials, driver=driver(), metadata=mapped.metadata
    )
    mapped.metadata.create_all(whole)
    cluster.create_all(mapped.metadata)
    made = World(kind, mapped.metadata, Person, Pet, whole, cluster, normalize)
    owners = ["KIM", "kim", "Lee" if foreign_key else "Lee ", "park", "서울", "金 ONE", "_X", "E"]

    def fill(session: Session) -> None:
        session.execute(insert(Person), [{"name": name, "note": f"n{n}"} for n, name in enumerate(NAMES)])
        pets = [{"id": n, "owner": owner, "kind": "cat"} for n, owner in enumerate(owners)]
        session.execute(insert(Pet), pets)
        session.commit()

    made.both(fill)
    yield made
    cluster.dispose()
    whole.dispose()
    for name in names.values():
        server.execute(f"DROP DATABASE {name}")


@pytest.fixture(params=["hash", "list", "directory"])
def world(request: pytest.FixtureRequest, database_server: LocalDatabaseServer) -> Iterator[World]:
    """With the collation that the server gives where none is declared."""
    yield from _world(database_server, request.param, None)


@pytest.fixture(params=[None, "utf8mb4_general_ci", "utf8mb4_bin"])
def hashed(request: pytest.FixtureRequest, database_server: LocalDatabaseServer) -> Iterator[World]:
    yield from _world(database_server, "hash", request.param)


def _reads(world: World) -> dict[str, sa.Select[Any]]:
    name, note, owner = world.Person.name, world.Person.note, world.Pet.owner
    people = select(name, note)
    return {
        **{f"= {each!r}": people.where(name == each) for each in ["KIM", "kim", "Kim  ", "zed", "ZED ", " kim", ""]},
        **{
            f"= {each!r}": people.where(name == each) for each in ["서울", "서울  ", "金 oNe", "[A", "O'HARA", "nobody"]
        },
        "outside the alphabet": people.where(name == "é"),
        "outside, in a list": people.where(name.in_(["é", "KIM"])),
        "in": people.where(name.in_(["KIM", "kim ", "LEE", "Park", "서울 "])),
        "not in": people.where(name.not_in(["KIM", "LEE"])),
        "two spellings": people.where(name == "Kim", name == "KIM"),
        "two lists": people.where(name.in_(["Kim", "Lee"]), name.in_(["KIM ", "zed"])),
        "or": people.where(or_(name == "KIM", name == "zed")),
        "or of ands": people.where(or_(sa.and_(name == "KIM", name == "kim"), sa.and_(name == "LEE", note == "n1"))),
        "contradiction": people.where(name == "KIM", name == "LEE"),
        # '_' stands before the letters, or behind the small ones
        "ranges": people.where(name == "kim", name < "_", name > "["),
        "other ranges": people.where(name == "KIM", name >= "a", name <= "kIM"),
        "between": people.where(name == "LEE", name.between("LA", "lz")),
        "behind": people.where(name == "_X", name < "a"),
        "before": people.where(name == "_X", name > "A"),
        "null": people.where(name.is_(None)),
        "join": select(name, world.Pet.id).join(world.Pet.person).where(name == "kIM"),
        "join by the other": select(name, world.Pet.id).join(world.Pet.person).where(owner == "kIM "),
        "join by both": select(name, world.Pet.id).join(world.Pet.person).where(owner == "kIM ", name == "KIM"),
        "join of all": select(name, owner, world.Pet.id).join(world.Pet.person),
        "outer join": select(name, world.Pet.id).outerjoin(world.Person.pets).where(name.in_(["E", "KIM"])),
        "exists": people.where(select(1).where(owner == name, world.Pet.id < 3).exists()),
        "in a subquery": people.where(name.in_(select(owner).where(world.Pet.id.in_([0, 2, 7])))),
        "of a subquery": people.where(name == select(owner).where(world.Pet.id == 2).scalar_subquery()),
        "groups": select(func.lower(func.min(owner)), func.count()).group_by(owner),
        "distinct": select(func.count(owner.distinct())),
        "count": select(func.count()).where(name == "KIM ", name == "kim"),
    }


def test_reads(world: World) -> None:
    for what, statement in _reads(world).items():
        one, several = world.both(lambda session, statement=statement: session.execute(statement).all())
        assert sorted(several, key=repr) == sorted(one, key=repr), what


def test_reads_of_declared_collations(hashed: World) -> None:
    test_reads(hashed)


def _spelled(some: random.Random, name: str | None = None) -> str:
    name = name or some.choice([*NAMES, "é", "z", "^", "k", "nobody"])
    name = "".join(some.choice([each.lower(), each.upper()]) for each in name)
    return name + some.choice(["", "", "", " ", "  "])


def _condition(some: random.Random, columns: Sequence[Any], depth: int = 0) -> Any:
    column = some.choice(columns)
    kind = some.choice(
        ["=", "twice", "in", "in", "<", ">=", "between", "null", *(["and", "and", "or", "not"] * (depth < 3))]
    )
    match kind:
        case "=":
            return column == _spelled(some)
        case "twice":
            name, other = some.choice(NAMES), some.choice(columns)
            return sa.and_(column.in_([_spelled(some, name), _spelled(some)]), other == _spelled(some, name))
        case "in":
            return column.in_([_spelled(some) for _ in range(some.randint(0, 5))])
        case "<":
            return column < _spelled(some)
        case ">=":
            return _spelled(some) <= column
        case "between":
            return column.between(_spelled(some), _spelled(some))
        case "null":
            return column.is_(None) if some.random() < 0.2 else column.is_not(None)
        case "not":
            return sa.not_(_condition(some, columns, depth + 1))
    parts = [_condition(some, columns, depth + 1) for _ in range(some.randint(2, 3))]
    return sa.and_(*parts) if kind == "and" else or_(*parts)


def _check_conditions(world: World, seed: int) -> None:
    some = random.Random(seed)
    name, owner = world.Person.name, world.Pet.owner
    pinned = 0
    with Session(world.whole) as one, world.session() as several:
        for _ in range(150):
            if some.random() < 0.5:
                statement = select(name, world.Person.note).where(_condition(some, [name]))
            else:
                statement = select(name, owner, world.Pet.id).join(world.Pet.person)
                statement = statement.where(_condition(some, [name, owner]))
            wanted = sorted(one.execute(statement).all(), key=repr)
            text_of = str(statement.compile(world.whole, compile_kwargs={"literal_binds": True}))
            assert sorted(several.execute(statement).all(), key=repr) == wanted, text_of
            pinned += len(world.cluster.explain(statement).shards) < len(SHARDS)
    assert pinned > 30


def test_conditions_of_all_kinds(world: World) -> None:
    _check_conditions(world, 1)


def test_conditions_of_all_kinds_on_declared_collations(hashed: World) -> None:
    for seed in (2, 3):
        _check_conditions(hashed, seed)


def test_keyed_reads_go_to_one_shard(world: World) -> None:
    reads = _reads(world)
    for what in ("= 'KIM'", "= 'Kim  '", "two spellings", "join by both", "ranges", "= '서울  '"):
        route = world.cluster.explain(reads[what])
        assert len(route.shards) == 1, what
    assert len(world.cluster.explain(reads["outside the alphabet"]).shards) == 3


def test_objects(world: World) -> None:
    some = select(world.Person).order_by(world.Person.note)

    def work(session: Session) -> Any:
        kim = session.get(world.Person, "KIM")
        found = [
            kim.name,
            session.get(world.Person, "kiM") is kim,
            session.get(world.Person, "kim ") is kim,  # as the server pads
            session.get(world.Person, "é") and session.get(world.Person, "é").name,
            [pet.id for pet in kim.pets],
            session.get(world.Pet, 3).person.name,
            [pet.owner for pet in session.get(world.Person, "_X").pets],
            *(
                [(each.name, [pet.id for pet in each.pets]) for each in session.scalars(some.options(eager)).unique()]
                for eager in (selectinload(world.Person.pets), joinedload(world.Person.pets))
            ),
        ]
        kim.note = "changed"
        kim.pets[0].kind = "dog"
        seoul = session.get(world.Person, "서울")
        seoul.pets.append(world.Pet(id=50, kind="fish"))
        session.add(world.Pet(id=51, owner="lEE  ", kind="cow"))
        session.delete(session.get(world.Pet, 7))
        session.delete(session.get(world.Person, "O'HARA"))
        session.commit()
        return found

    one, several = world.both(work)
    assert several == one
    assert one[0] == "Kim"
    whole, shards = world.rows()
    assert shards == whole


def test_writes(world: World) -> None:
    person, pet = world.Person, world.Pet
    statements: list[Any] = [
        update(person).where(person.name == "KIM ").values(note="a"),
        update(person).where(person.name.in_(["LEE", "zed", "park  "])).values(note="b"),
        update(pet).where(pet.owner == "KIM", pet.owner == "kim").values(kind="c"),
        delete(pet).where(pet.owner == "ZED  "),
        delete(person).where(person.name == "zed", person.name != "é"),
        upsert(person).values(name="kIM", note="d").on_duplicate_key_update(note="upserted"),
        upsert(person)
        .values([{"name": name, "note": "d"} for name in ("LEE  ", "LEE", "New One", "서울 ", "서울")])
        .on_duplicate_key_update(note="upserted, too"),
        upsert(person).values(name="NEW ONE ", note="g").on_duplicate_key_update(note="third"),
        text("UPDATE people SET note = 'raw' WHERE name = 'PARK '"),
        text("UPDATE people SET note = 'raw, too' WHERE name = :name").bindparams(name="서울  "),
        text("INSERT INTO pets (id, owner, kind) VALUES (60, 'KIM', 'raw')"),
    ]

    def work(session: Session) -> None:
        for statement in statements:
            session.execute(statement)
        session.execute(
            insert(pet), [{"id": 70 + n, "owner": name} for n, name in enumerate(["kim", "PARK", "金 one"])]
        )
        session.commit()

    world.both(work)
    whole, shards = world.rows()
    assert shards == whole
    people = {(name, note) for table, name, note in (row for row in whole if row[0] == "people")}
    assert {("Kim", "upserted"), ("lee", "upserted, too")} <= people


def test_one_key_is_one_row(world: World) -> None:
    """A second row with the same key, in another spelling, is the database's to refuse: it is on the same shard."""

    def add(session: Session, name: str) -> str:
        session.add(world.Person(name=name, note="second"))
        try:
            session.commit()
        except sa.exc.IntegrityError:
            return "refused"
        return "done"

    assert world.both(lambda session: add(session, "KIM")) == ("refused", "refused")
    one, several = world.both(lambda session: add(session, "kim  "))
    assert several == one  # it depends on whether the server's collation pads
    assert len(world.shards_with("kim")) == 1


def test_a_key_outside_the_alphabet_is_refused(world: World) -> None:
    with world.session() as session:
        for name in ("é", "Kim\t", "\u1100\u1161", "\u212aim"):
            session.add(world.Person(name=name))
            with pytest.raises(MissingKey, match="outside what 'normalize: lower' knows") as caught:
                session.flush()
            assert "Hangul" in (caught.value.hint or "")
            session.rollback()
            with pytest.raises(MissingKey, match="outside what"):
                session.execute(insert(world.Person).values(name=name))
            with pytest.raises(MissingKey, match="outside what"):
                session.execute(select(world.Person), execution_options={"shardkit_key": {"name": name}})
    if world.kind == "directory":
        with pytest.raises(MissingKey, match="outside what"):
            world.cluster.assign("people", "é", "a")


def test_a_key_given_as_an_option(world: World) -> None:
    with world.session() as session:
        options = {"shardkit_key": {"name": "KIM "}}
        found = session.execute(text("SELECT name FROM people WHERE note = 'n0'"), execution_options=options).scalars()
        assert found.all() == ["Kim"]
    shard = world.cluster.locate("people", name="kIM").shard
    assert world.shards_with("kim") == [shard]


def test_the_key_stays_as_it_is(world: World) -> None:
    with world.session() as session:
        kim = session.get_one(world.Person, "KIM")
        kim.name = "lee"
        with pytest.raises(KeyChange):
            session.flush()
        session.rollback()
        with pytest.raises(KeyChange):
            session.execute(update(world.Person).where(world.Person.name == "kim").values(name="KIM"))


@pytest.mark.parametrize("collation", [None, "utf8mb4_general_ci"])
@pytest.mark.parametrize("new", ["kIM", "New One"])
def test_moving(database_server: LocalDatabaseServer, collation: str | None, new: str) -> None:
    """With what belongs to it, spelled as it may be: to another key, and to another spelling of the same."""
    for world in _world(database_server, "hash", collation, foreign_key=True):
        before = world.cluster.locate("people", name="kim").shard
        with world.session() as session:
            kim = session.get_one(world.Person, "KIM")
            assert [pet.owner for pet in kim.pets] == ["KIM", "kim"]
            session.move(kim, new)
            assert kim.name == new
            assert session.get(world.Person, new.upper()) is kim
            session.commit()
        after = world.cluster.locate("people", name=new).shard
        assert (after == before) == (new == "kIM")
        assert world.shards_with(new) == [after]
        with world.session() as session:
            pets = session.scalars(select(world.Pet).where(world.Pet.owner == new.upper())).all()
            assert [(pet.id, pet.owner) for pet in pets] == [(0, new), (1, new)]
            assert (session.get(world.Person, "Kim") is None) == (new != "kIM")


@pytest.mark.parametrize("new", ["kIM", "New"])
def test_moving_rows_that_point_at_each_other_in_other_spellings(
    database_server: LocalDatabaseServer, new: str
) -> None:
    """They go and come in the order that their foreign keys ask for: a toy before its pet, and after it."""
    name = sa.String(20, collation="utf8mb4_general_ci")
    mapped = registry()
    people = sa.Table("people", mapped.metadata, sa.Column("name", name, primary_key=True))
    pets, toys = (
        sa.Table(
            table,
            mapped.metadata,
            sa.Column("owner", name, primary_key=True),
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("pet", sa.Integer),
        )
        for table in ("pets", "toys")
    )
    pets.append_constraint(sa.ForeignKeyConstraint(["owner"], ["people.name"]))
    toys.append_constraint(sa.ForeignKeyConstraint(["owner", "pet"], ["pets.owner", "pets.id"]))

    class Person:
        pass

    class Pet:
        pass

    class Toy:
        pass

    mapped.map_imperatively(Pet, pets)
    mapped.map_imperatively(Toy, toys)
    ties = {table: people.c.name == foreign(table.c.owner) for table in (pets, toys)}
    collections = {
        "a": relationship(Toy, primaryjoin=ties[toys]),  # found before the pets
        "b": relationship(Pet, primaryjoin=ties[pets]),
    }
    mapped.map_imperatively(Person, people, properties=collections)
    names = {shard: f"spelled_{next(_numbers)}_{os.getpid()}" for shard in SHARDS[:2]}
    for database in names.values():
        database_server.execute(f"CREATE DATABASE {database}")
    document = {
        "format": 1,
        "cluster": "spelled",
        "keyspaces": {
            "people": {
                "partition": {"by": "list", "buckets": {"a": ["kim"], "b": ["new"]}, "normalize": "lower"},
                "tables": {"people": "name", "pets": "owner", "toys": "owner"},
                "placement": {"shard-0": ["a"], "shard-1": ["b"]},
            }
        },
        "shards": {shard: {"master": database_server.endpoint(names[shard]).url} for shard in names},
    }
    with shardkit.create_cluster(
        ShardMap.parse(document), credentials=database_server.credentials, driver=driver(), metadata=mapped.metadata
    ) as cluster:
        cluster.create_all(mapped.metadata)
        sessions = shardkit.sessionmaker(cluster, transactions="best_effort")
        with sessions() as session:
            session.execute(insert(people).values(name="Kim"))
            session.execute(insert(pets).values(owner="KIM", id=1))
            session.execute(insert(toys).values(owner="kim", id=1, pet=1))
            session.move(session.get_one(Person, "kIm"), new)
            session.commit()
        with sessions() as session:
            assert session.execute(select(pets.c.owner, pets.c.id)).all() == [(new, 1)]
            assert session.execute(select(toys.c.owner, toys.c.pet)).all() == [(new, 1)]
    for database in names.values():
        database_server.execute(f"DROP DATABASE {database}")


def test_without_the_normalization_rows_are_lost(database_server: LocalDatabaseServer) -> None:
    """What all of this is for; and these tests would see it."""
    for world in _world(database_server, "hash", None, normalize=False):
        lost = []
        for what, statement in _reads(world).items():
            one, several = world.both(lambda session, statement=statement: session.execute(statement).all())
            if sorted(several, key=repr) != sorted(one, key=repr):
                lost.append(what)
        assert {"= 'KIM'", "two spellings", "in"} <= set(lost)

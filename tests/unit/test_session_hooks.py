"""What sessions rely on inside SQLAlchemy 2.1. A failure here says which hook a new version has changed."""

from __future__ import annotations

import inspect
import re

import pytest
import sqlalchemy as sa
from sqlalchemy import insert, select, update
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    SessionTransaction,
    joinedload,
    loading,
    mapped_column,
    persistence,
    relationship,
)
from sqlalchemy.orm import session as sa_session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.context import QueryContext
from sqlalchemy.orm.persistence import _sort_states
from sqlalchemy.sql.base import CompileState

from shardkit.session.statements import RoutedSession
from shardkit.session.transaction import ClusterTransaction


class Base(DeclarativeBase):
    """Tables for these tests."""


class Parent(Base):
    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    children: Mapped[list[Child]] = relationship(back_populates="parent")


class Child(Base):
    __tablename__ = "children"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(sa.ForeignKey("parents.id"))
    parent: Mapped[Parent] = relationship(back_populates="children")


@pytest.fixture
def engine() -> sa.Engine:
    engine = sa.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    return engine


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "_execute_internal",
            [
                "self", "statement", "params", "execution_options", "bind_arguments", "_parent_execute_state",
                "_add_event", "_scalar_result",
            ],
        ),
        ("_autobegin_t", ["self", "begin"]),
        ("_flush", ["self", "objects"]),
        ("_register_persistent", ["self", "states"]),
        (
            "_identity_lookup",
            [
                "self", "mapper", "primary_key_identity", "identity_token", "passive", "lazy_loaded_from",
                "execution_options", "bind_arguments",
            ],
        ),
        (
            "_get_impl",
            [
                "self", "entity", "primary_key_identity", "db_load_fn", "options", "populate_existing",
                "with_for_update", "identity_token", "execution_options", "bind_arguments",
            ],
        ),
        (
            "_bulk_save_mappings",
            [
                "self", "mapper", "mappings", "isupdate", "isstates", "return_defaults", "update_changed_only",
                "render_nulls",
            ],
        ),
        ("_connection_for_bind", ["self", "engine", "execution_options", "kw"]),
    ],
)  # fmt: skip
def test_the_methods_of_session_that_are_replaced(method: str, expected: list[str]) -> None:
    assert parameters(getattr(Session, method)) == expected


def test_what_session_execute_does_with_a_select_once_its_handlers_have_run() -> None:
    """`RoutedSession._run` repeats these steps for a SELECT of mapped classes; `scatter` does for each shard."""
    source = inspect.getsource(Session._execute_internal)
    steps = [
        "compile_state_cls.orm_pre_session_exec(",
        "bind = self.get_bind(**bind_arguments)",
        "conn = self._connection_for_bind(bind)",
        "compile_state_cls.orm_execute_statement(",
    ]
    places = [source.rindex(step) for step in steps]
    assert places == sorted(places)
    assert RoutedSession._execute_internal is not Session._execute_internal


def test_every_path_of_session_goes_through_execute_internal() -> None:
    for method in ("execute", "scalar", "scalars"):
        assert "self._execute_internal(" in inspect.getsource(getattr(Session, method))
    assert "_execute_internal(" in inspect.getsource(sa_session.ORMExecuteState.invoke_statement)


def test_the_last_event_handler_sees_the_final_statement(engine: sa.Engine) -> None:
    seen: list[str] = []
    with Session(engine) as session:
        sa.event.listen(session, "do_orm_execute", lambda _: seen.append("theirs"))
        session._execute_internal(select(Parent), _add_event=lambda _: seen.append("ours"))
    assert seen == ["theirs", "ours"]


def test_commit_of_a_transaction_does_what_ours_repeats() -> None:
    source = inspect.getsource(
        SessionTransaction.commit.__wrapped__
        if hasattr(SessionTransaction.commit, "__wrapped__")
        else SessionTransaction.commit
    )
    for step in ("_prepare_impl()", "should_commit", "dispatch.after_commit", "_remove_snapshot()", "self.close()"):
        assert step in source
    assert issubclass(ClusterTransaction, SessionTransaction)
    assert "SessionTransaction(" in inspect.getsource(Session._autobegin_t)


def test_connections_of_a_transaction_are_tuples_of_four(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(select(Parent))
        transaction = session.get_transaction()
        assert transaction is not None
        entries = {engine: transaction._connections[engine]}
        connection, inner, should_commit, autoclose = entries[engine]
        assert (connection.engine, inner.is_active, should_commit, autoclose) == (engine, True, True, True)


def test_a_flush_asks_for_the_connection_of_each_object_before_it_reads_its_values(engine: sa.Engine) -> None:
    """So a generated id may still be assigned then."""
    with Session(engine) as session:
        connection = session.connection()

        def give(_mapper: object, instance: object) -> sa.Connection:
            if isinstance(instance, Parent) and instance.id is None:
                instance.id = 77
            return connection

        session.connection_callable = give  # type: ignore[assignment]
        session.add(Parent(name="x", children=[Child(id=1)]))
        session.flush()
        assert session.execute(sa.text("SELECT id FROM parents")).scalar_one() == 77
        assert session.execute(sa.text("SELECT parent_id FROM children")).scalar_one() == 77


def test_statements_of_a_flush_come_with_a_compiled_cache() -> None:
    """By which `HandedConnection` tells them from those of event handlers."""
    calls = re.findall(r"connection\.execute\((.*?)\n\s+\)\n", inspect.getsource(persistence), flags=re.DOTALL)
    assert len(calls) == inspect.getsource(persistence).count("connection.execute(")
    assert all("execution_options=execution_options" in call for call in calls)
    for function in (
        persistence._emit_update_statements,
        persistence._emit_post_update_statements,
        persistence._emit_delete_statements,
        persistence._emit_insert_statements,
    ):
        assert '{"compiled_cache": base_mapper._compiled_cache}' in inspect.getsource(function)


def test_new_objects_are_written_in_the_order_of_insert_order(engine: sa.Engine) -> None:
    with Session(engine) as session:
        objects = [Parent(name=str(number)) for number in range(4)]
        session.add_all(objects)
        for number, parent in enumerate(reversed(objects)):
            instance_state(parent).insert_order = number
        mapper = sa.inspect(Parent)
        ordered = _sort_states(mapper, {instance_state(parent) for parent in objects})
        assert [state.obj() for state in ordered] == objects[::-1]


def test_bulk_operations_refuse_a_connection_callable_and_ask_for_their_bind_again(engine: sa.Engine) -> None:
    """Why the shard is carried on the session for the length of a bulk statement."""
    asked: list[dict[str, object]] = []

    class Asking(Session):
        def get_bind(self, mapper: object = None, **arguments: object) -> sa.Engine:  # type: ignore[override]  # noqa: ARG002
            asked.append(arguments)
            return engine

    with Asking() as session:
        session.execute(insert(Parent), [{"name": "x"}], bind_arguments={"ours": 1})
        assert [("ours" in arguments) for arguments in asked] == [True, False]
        session.connection_callable = lambda *_: session.connection()  # type: ignore[assignment]
        with pytest.raises(NotImplementedError):
            session.execute(insert(Parent), [{"name": "x"}])


def test_the_class_that_runs_selects_of_mapped_classes() -> None:
    plugin = CompileState.plugins["orm", "select"]
    assert parameters(plugin.orm_pre_session_exec) == [
        "session", "statement", "params", "execution_options", "bind_arguments", "is_pre_event",
    ]  # fmt: skip
    assert parameters(plugin.orm_execute_statement) == [
        "session", "statement", "params", "execution_options", "bind_arguments", "conn",
    ]  # fmt: skip
    assert parameters(plugin.orm_setup_cursor_result) == [
        "session", "statement", "params", "execution_options", "bind_arguments", "result",
    ]  # fmt: skip


def test_load_options_carry_the_identity_token(engine: sa.Engine) -> None:
    options = QueryContext.default_load_options + {"_identity_token": "shop-1"}
    with Session(engine) as session:
        session.execute(sa.text("INSERT INTO parents VALUES (1, 'x')"))
        found = session.execute(select(Parent), execution_options={"_sa_orm_load_options": options}).scalar_one()
        assert sa.inspect(found).identity_key[2] == "shop-1"
        again = session.get(Parent, 1, identity_token="shop-1")
        assert again is found
        session.expire(found)
        assert found.name == "x"


def test_a_load_by_identity_gives_its_token_in_the_load_options(engine: sa.Engine) -> None:
    seen: list[object] = []
    with Session(engine) as session:
        sa.event.listen(session, "do_orm_execute", lambda state: seen.append(state.load_options._identity_token))
        session.get(Parent, 1, identity_token="shop-1")
    assert seen == ["shop-1"]
    assert {"load_options", "identity_token"} <= set(parameters(loading._load_on_pk_identity))


def test_selectin_loads_name_the_statement_that_they_belong_to(engine: sa.Engine) -> None:
    seen: list[bool] = []
    with Session(engine) as session:
        session.execute(sa.text("INSERT INTO parents VALUES (1, 'x')"))
        sa.event.listen(
            session,
            "do_orm_execute",
            lambda state: seen.append("sa_top_level_orm_context" in state.local_execution_options),
        )
        session.scalars(select(Parent).options(sa.orm.selectinload(Parent.children))).all()
    assert seen == [False, True]


def test_results_can_be_made_with_the_metadata_of_others(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(sa.text("INSERT INTO parents VALUES (1, 'x')"))
        result = session.execute(select(Parent, Parent.name))
        frozen = result._metadata._for_freeze()
        assert list(frozen.keys) == ["Parent", "name"]
        assert frozen._create_unique_filters is not None
        assert [frozen._keymap[key][2] for key in frozen.keys]
        made: IteratorResult[object] = IteratorResult(SimpleResultMetaData(["a"]), iter([(1,), (1,)]))
        assert made.scalars().unique().all() == [1]


def test_joined_collections_mark_their_result(engine: sa.Engine) -> None:
    with Session(engine) as session:
        result = session.execute(select(Parent).options(joinedload(Parent.children)))
        assert result._unique_filter_state is not None
        assert result._attributes["filtered"]
        assert session.execute(select(Parent.id))._unique_filter_state is None


def test_values_of_an_insert_stand_where_we_look() -> None:
    table = Parent.__table__
    assert insert(table)._multi_values == ()
    assert insert(table).values([{"id": 1}])._multi_values
    assert {getattr(column, "key", column) for column in insert(table).values(id=1)._values or ()} == {"id"}
    assert insert(table).is_insert
    assert not update(table).is_insert


def test_objects_can_be_given_another_identity_token(engine: sa.Engine) -> None:
    with Session(engine) as session:
        session.execute(sa.text("INSERT INTO parents VALUES (1, 'x')"))
        parent = session.get_one(Parent, 1, identity_token="shop-0")
        state = instance_state(parent)
        session.identity_map.safe_discard(state)
        assert state.key is not None
        state.key = (*state.key[:2], "shop-1")
        state.identity_token = "shop-1"
        session.identity_map.replace(state)
        assert session.get(Parent, 1, identity_token="shop-1") is parent
        assert parent in session

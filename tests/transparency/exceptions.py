"""What passes with a `sqlalchemy.orm.Session` and cannot pass with a cluster's, and why."""

from __future__ import annotations

_UNBOUND = "wants a session without a bind to fail: a cluster's session knows where every table is"
_OWN_METHODS = "reads the methods to be tested from the class's own namespace, where a subclass inherits them"
_MOCK = "gives a Mock for an engine, and a shard's engine is a real one"

#: Modules that are left out.
LEFT_OUT = {
    "test/orm/test_bind.py": "tests bind= and binds=, which a cluster's sessions refuse: the map says where tables are",
}

#: Test -> why it fails. At most twenty.
EXCEPTIONS = {
    "test/orm/declarative/test_basic.py::DeclarativeBaseSetupsTest::test_unbound_cls_registry": _UNBOUND,
    "test/orm/declarative/test_basic.py::DeclarativeBaseSetupsTest::test_unbound_declarative_base": _UNBOUND,
    "test/orm/test_deprecations.py::BindSensitiveStringifyTest::test_query_unbound_session": _UNBOUND,
    "test/orm/test_session.py::SessionInterface::test_mapped_class_for_instance": _OWN_METHODS,
    "test/orm/test_session.py::SessionInterface::test_missing_state": _OWN_METHODS,
    "test/orm/test_session.py::SessionInterface::test_unmapped_class_for_instance": _OWN_METHODS,
    "test/orm/test_session.py::SessionInterface::test_unmapped_instance": _OWN_METHODS,
    "test/orm/test_session.py::SessionInterface::test_unmapped_primitives": _OWN_METHODS,
    "test/orm/test_scoping.py::ScopedSessionTest::test_attributes": (
        "wants scoped_session to have every public attribute of the session class: ours has more, such as cluster"
    ),
    "test/orm/test_transaction.py::SessionTransactionTest::test_execution_options_begin_transaction": _MOCK,
    "test/orm/test_transaction.py::SessionTransactionTest::test_execution_options_ignored_mid_transaction": _MOCK,
    "test/orm/test_transaction.py::TransactionConnectionsTest::test_multiple_binds": (
        "tests binds= with a class on an engine of its own: the shard map says where tables are"
    ),
}

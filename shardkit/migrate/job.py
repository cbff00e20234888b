"""What a command asks one shard's process to do, as a line of JSON, and what that process tells back.

A job holds a password: it goes through a pipe, never through an argument or the environment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from shardkit.credentials import Credentials
from shardkit.migrate.environment import LOCK_TIMEOUT, Visit
from shardkit.migrate.scope import Scope
from shardkit.topology import Endpoint


class Task(StrEnum):
    """What to do."""

    UPGRADE = "upgrade"
    DOWNGRADE = "downgrade"
    CHECK = "check"
    SQL = "sql"
    REVISION = "revision"
    OWN_TABLES = "own_tables"


@dataclass(frozen=True)
class Job:
    """One shard's part of a command.

    :param targets: revisions to go to, one after the other; for ``sql`` as ``start:end``.
    :param ini, toml, section: the tree's configuration, as in `shardkit.migrate.tree.Tree`.
    :param sys_path: where the command imports from; the tree's ``env.py`` does the same.
    :param options: of Alembic's ``revision`` command.
    """

    task: Task
    shard: str
    url: str
    user: str
    password: str = field(repr=False)
    driver: str
    keyspaces: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    version_table: str = ""
    ini: str | None = None
    toml: str | None = None
    section: str = "alembic"
    sys_path: tuple[str, ...] = ()
    lock_timeout: int = LOCK_TIMEOUT
    wait: float = 0.0
    restart_revision: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Job:
        """What `line` wrote."""
        values = json.loads(line)
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples, "task": Task(values["task"])})

    def visit(self) -> Visit:
        """The job for ``env.py``."""
        return Visit(
            scope=Scope(
                self.shard, self.keyspaces, frozenset(self.tables), frozenset(self.labels), frozenset(self.named)
            ),
            endpoint=Endpoint.parse(self.url),
            credentials=Credentials(self.user, self.password),
            version_table=self.version_table,
            driver=self.driver,
            lock_timeout=self.lock_timeout,
            wait=self.wait,
            restart_revision=self.restart_revision,
            compare_only=self.task in {Task.CHECK, Task.REVISION},
        )

"""An application's migration tree, written to disk for one test."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

from shardkit.mapstore import open_store
from shardkit.migrate import Fleet, Tree
from shardkit.shardmap import ShardMap

ENV = """\
from shardkit.migrate import run_migrations
from {models} import metadata
run_migrations(target_metadata=metadata)
"""

MODELS = """\
import sqlalchemy as sa
metadata = sa.MetaData()
users = sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))
"""

REVISION = '''\
"""{revision}"""
import sqlalchemy as sa
from alembic import op
revision = {revision!r}
down_revision = {down!r}
branch_labels = {labels!r}
depends_on = None


def upgrade():
{up}


def downgrade():
{down_body}
'''


class MigrationTree:
    """``alembic.ini``, ``env.py``, models, and revisions as a test adds them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # a module name of its own: models are imported by workers, and by this process for the command line
        self._models = f"models_{abs(hash(str(directory)))}"
        (directory / "migrations" / "versions").mkdir(parents=True)
        (directory / "migrations" / "env.py").write_text(ENV.format(models=self._models))
        (directory / "migrations" / "script.py.mako").write_text(
            '"""${message}"""\nfrom alembic import op\nimport sqlalchemy as sa\n'
            "revision = ${repr(up_revision)}\ndown_revision = ${repr(down_revision)}\n"
            "branch_labels = ${repr(branch_labels)}\ndepends_on = ${repr(depends_on)}\n\n"
            "def upgrade():\n    ${upgrades if upgrades else 'pass'}\n\n"
            "def downgrade():\n    ${downgrades if downgrades else 'pass'}\n"
        )
        self.models(MODELS)
        self.settings()

    @property
    def ini(self) -> Path:
        return self.directory / "alembic.ini"

    def settings(self, **shardkit: str) -> None:
        """Write alembic.ini."""
        lines = [
            "[alembic]",
            "script_location = %(here)s/migrations",
            "prepend_sys_path = %(here)s",
            "path_separator = os",
            "[shardkit]",
            *(f"{name} = {value}" for name, value in shardkit.items()),
        ]
        self.ini.write_text("\n".join(lines) + "\n")

    def models(self, text: str) -> None:
        (self.directory / f"{self._models}.py").write_text(text)

    def revision(
        self, revision: str, down: str | None, up: str, down_body: str = "pass", *, label: str | None = None
    ) -> None:
        """Write a revision file, or write it anew."""
        text = REVISION.format(
            revision=revision,
            down=down,
            labels=(label,) if label else None,
            up=indent(dedent(up).strip(), "    "),
            down_body=indent(dedent(down_body).strip(), "    "),
        )
        (self.directory / "migrations" / "versions" / f"{revision}.py").write_text(text)

    def fleet(self, shardmap: ShardMap, **options: object) -> Fleet:
        return Fleet(open_store(shardmap), Tree.load(self.ini), **options)  # type: ignore[arg-type]


def two_shards(master_0: str, master_1: str) -> ShardMap:
    """A keyspace of users over two shards, and a vertical one on the second."""
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "shop",
            "keyspaces": {
                "people": {
                    "partition": {"by": "hash", "buckets": 16},
                    "tables": {"users": "id", "notes": "user_id"},
                    "placement": {"s0": "0-7", "s1": "8-15"},
                },
                "billing": {"tables": ["invoices"], "placement": "s1"},
            },
            "shards": {"s0": {"master": master_0}, "s1": {"master": master_1}},
        }
    )

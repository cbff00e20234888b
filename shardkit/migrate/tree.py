"""An application's migration tree: its Alembic configuration, and what it says about shards.

The tree is Alembic's own: ``alembic.ini`` (or ``[tool.alembic]`` in ``pyproject.toml``), ``env.py`` and revision files.
shardkit reads three settings beside Alembic's, from a section ``[shardkit]`` of the ini file or from a table
``[tool.alembic.shardkit]``:

- ``map``: where the shard map is, as for ``create_cluster``;
- ``keyspace``: the tree belongs to this keyspace alone and runs only on the shards that host it;
- ``version_table``: where the shard notes its revision (default ``alembic_version``). Two trees that meet on a shard
  need two names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from shardkit.errors import PreconditionFailed

SECTION = "shardkit"
DEFAULT_VERSION_TABLE = "alembic_version"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a tree's configuration says to shardkit."""

    map_source: str | None = None
    keyspace: str | None = None
    version_table: str = DEFAULT_VERSION_TABLE


def settings_of(config: Config) -> Settings:
    """Read the ``[shardkit]`` section of an Alembic configuration.

    :raises PreconditionFailed: for a setting that does not exist.
    """
    values: Mapping[str, Any] = {}
    if config.file_config.has_section(SECTION):
        # the ini parser hands out its defaults ("here") with every section
        defaults = config.file_config.defaults()
        values = {name: value for name, value in config.file_config.items(SECTION) if name not in defaults}
    elif isinstance(table := config.get_alembic_option(SECTION), Mapping):
        values = table
    if unknown := sorted(values.keys() - {"map", "keyspace", "version_table"}):
        file = config.config_file_name or config.toml_file_name
        raise PreconditionFailed(
            f"[{SECTION}] of {file} has no setting {unknown[0]!r}",
            hint="it takes map, keyspace and version_table",
        )
    return Settings(
        map_source=values.get("map") or None,
        keyspace=values.get("keyspace") or None,
        version_table=values.get("version_table") or DEFAULT_VERSION_TABLE,
    )


@dataclass(frozen=True)
class Tree:
    """An Alembic tree on disk.

    :param ini: the ini file, where there is one.
    :param toml: the ``pyproject.toml``, where there is one.
    :param section: the ini file's main section (Alembic's ``--name``).
    """

    ini: Path | None
    toml: Path | None
    section: str
    settings: Settings

    @classmethod
    def load(cls, path: str | Path = "alembic.ini", *, section: str = "alembic") -> Tree:
        """Find a tree's configuration: the ini file named, and a ``pyproject.toml`` beside it.

        :raises PreconditionFailed: when there is neither, or it has no ``script_location``.
        """
        given = Path(path).absolute()
        beside = given if given.suffix == ".toml" else given.parent / "pyproject.toml"
        ini = given if given != beside and given.exists() else None
        toml = beside if beside.exists() else None
        config = Config(ini, toml, section)
        if (ini is None and toml is None) or not config.get_alembic_option("script_location"):
            raise PreconditionFailed(
                f"{given} is no Alembic configuration: it names no script_location",
                hint="start one with `alembic init migrations`, or name yours with --config",
            )
        return cls(ini, toml, section, settings_of(config))

    def config(self, **attributes: object) -> Config:
        """A fresh Alembic configuration; ``attributes`` are handed to ``env.py``."""
        return Config(self.ini, self.toml, self.section, attributes=dict(attributes))

    def script(self) -> ScriptDirectory:
        """The revision files.

        :raises PreconditionFailed: when they cannot be read as a tree.
        """
        try:
            script = ScriptDirectory.from_config(self.config())
            script.get_heads()
        except CommandError as error:
            raise PreconditionFailed(f"the migration tree cannot be read: {error}") from None
        return script

"""Taking in a database that exists: a proposal for its shard map, and whether a map fits its databases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shardkit.adoption.proposal import Choice, propose
from shardkit.adoption.tables import read_database
from shardkit.adoption.writing import yaml_text
from shardkit.credentials import CredentialSource, fixed, from_environment
from shardkit.errors import PreconditionFailed
from shardkit.mapschema import document_of
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint

__all__ = ["MapProposal", "propose_map"]


@dataclass(frozen=True)
class MapProposal:
    """A map that validates, and why it looks like that.

    :param text: YAML with comments.
    :param document: the same as plain data.
    :param choices: one for each table.
    :param hazards: what sharding would break as the tables are now.
    """

    text: str
    document: dict[str, Any]
    choices: tuple[Choice, ...]
    hazards: tuple[str, ...]


def propose_map(url: str, *, cluster: str | None = None, keys: tuple[str, ...] = ()) -> MapProposal:
    """Read a database and propose the map in which it is the first shard. Changes nothing there.

    :param url: ``mysql://[user[:password]@]host[:port]/database`` or ``sqlite:///file``; without a user the one of the
        environment counts.
    :param cluster: the cluster's name; the database's unless given.
    :param keys: ``table.column`` to shard by, instead of a guess.
    :raises PreconditionFailed: for a URL or a key that makes no sense, or a database without tables.
    :raises ShardUnreachable: when the database does not answer, or refuses the log-on.
    """
    endpoint, credentials = _place(url)
    name = _name(cluster or Path(endpoint.database).stem)
    shard = f"{name[:60]}-0"
    keyspaces = propose(read_database(shard, endpoint, credentials).tables, keys)
    text = yaml_text(name, shard, endpoint, keyspaces)
    choices = tuple(choice for space in keyspaces for choice in (*space.tables, *space.reference))
    hazards = tuple(warning for choice in choices for warning in choice.warnings)
    return MapProposal(text, document_of(ShardMap.parse(text)), choices, hazards)


def _place(url: str) -> tuple[Endpoint, CredentialSource]:
    """The endpoint without credentials, and the credentials: of the URL if it has a user, else the environment's."""
    try:
        parsed = make_url(url)
        endpoint = Endpoint.parse(_bare(parsed))
    except (ArgumentError, ValueError):  # neither error may show: the URL may hold a password
        raise PreconditionFailed(
            "--from is not the URL of a database",
            hint="write mysql://host:3306/database or sqlite:///file.db",
        ) from None
    if parsed.username is None:
        return endpoint, from_environment()
    return endpoint, fixed(parsed.username, str(parsed.password or ""))


def _bare(url: URL) -> str:
    backend = url.get_backend_name()
    if backend == "sqlite" and url.database:
        return f"sqlite:///{Path(url.database).absolute()}"
    return URL.create(
        "mysql" if backend == "mariadb" else backend, host=url.host, port=url.port, database=url.database
    ).render_as_string()


def _name(text: str) -> str:
    """A name as the map allows it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip(".-")[:63] or "cluster"

"""A proposal as YAML with its reasons as comments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml

from shardkit.adoption.proposal import Choice, ProposedKeyspace
from shardkit.partition import HASH_BUCKETS
from shardkit.topology import Endpoint

_COMMENT_COLUMN = 42
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def yaml_text(cluster: str, shard: str, endpoint: Endpoint, keyspaces: Sequence[ProposedKeyspace]) -> str:
    """The whole map."""
    lines = [
        f"# Proposed from {endpoint}, where nothing was changed.",
        "# Read the reasons, mend what is wrong, then: shardkit map apply THIS-FILE --map SOURCE",
        "format: 1",
        f"cluster: {_scalar(cluster)}",
        "keyspaces:",
    ]
    for keyspace in keyspaces:
        lines += _keyspace_lines(keyspace, shard)
    local = "as other machines know it?" if endpoint.host in _LOCAL else ""
    lines += ["shards:", _commented(f"  {shard}: {{master: {_scalar(endpoint.url)}}}", local)]
    return "\n".join(lines) + "\n"


def _keyspace_lines(keyspace: ProposedKeyspace, shard: str) -> Iterator[str]:
    yield _commented(f"  {_scalar(keyspace.name)}:", keyspace.why)
    if keyspace.sharded:
        yield f"    partition: {{by: hash, buckets: {HASH_BUCKETS}}}"
    if keyspace.generated_ids:
        columns = ", ".join(keyspace.generated_ids)
        yield _commented("    ids: generated", f"AUTO_INCREMENT would give two shards the same ids: {columns}")
    yield "    tables:"
    for choice in keyspace.tables:
        name = _scalar(choice.table)
        yield _commented(
            f"      {name}: {_scalar(choice.key)}" if keyspace.sharded else f"      - {name}", _reason(choice)
        )
        yield from (f"      # careful: {warning}" for warning in choice.warnings)
    if keyspace.reference:
        yield "    reference:"
        yield from (_commented(f"      - {_scalar(choice.table)}", _reason(choice)) for choice in keyspace.reference)
    yield f"    placement: {{{shard}: 0-{HASH_BUCKETS - 1}}}" if keyspace.sharded else f"    placement: {shard}"


def _reason(choice: Choice) -> str:
    return choice.why if not choice.rows else f"~{choice.rows:,} rows; {choice.why}"


def _commented(line: str, comment: str) -> str:
    return f"{line.ljust(_COMMENT_COLUMN)} # {comment}" if comment else line


def _scalar(text: str) -> str:
    """One YAML scalar, quoted where it has to be."""
    written: str = yaml.safe_dump({text: 0}, allow_unicode=True, width=10_000, default_flow_style=True)
    return written.strip().removeprefix("{").removesuffix("}").removesuffix(": 0").removeprefix("? ")

"""Settings of the servers that decide what a statement answers: over several shards they have to be alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Engine

from shardkit.routing.sorting import LONGEST_BYTES

#: What each setting decides. As a new connection has them.
_DECIDES: Final = {
    "flavour": "digits, collations and functions",
    "time_zone": "TIMESTAMP columns and NOW()",
    "sql_mode": "what is an error, and what is stored instead",
    "collation_connection": "how values that no column gives a collation are compared",
    "div_precision_increment": "the digits of quotients and averages",
    "group_concat_max_len": "where GROUP_CONCAT is cut off",
    "default_week_format": "WEEK()",
    "lc_time_names": "the names of days and months",
    "transaction_isolation": "what a transaction sees of others",
    "lower_case_table_names": "whether TABLE and table are one",
}
_ISOLATION: Final = ("transaction_isolation", "tx_isolation")


def read_settings(engine: Engine) -> dict[str, str]:
    """What a connection to this server is given, by the settings' names; nothing of SQLite."""
    if engine.dialect.name == "sqlite":
        return {}
    names = [*_DECIDES, *_ISOLATION, "system_time_zone", "max_sort_length", "version"]
    with engine.connect() as connection:
        asked = sa.text("SHOW SESSION VARIABLES WHERE variable_name IN :names").bindparams(
            sa.bindparam("names", names, expanding=True)
        )
        rows = connection.execute(asked)
        found = {str(name): str(value) for name, value in rows}
    if found["time_zone"] == "SYSTEM":
        found["time_zone"] = found["system_time_zone"]
    isolation = next(found[name] for name in _ISOLATION if name in found)
    flavour = "MariaDB" if "mariadb" in found["version"].lower() else "MySQL"
    modes = ",".join(sorted(found["sql_mode"].split(",")))
    return found | {"flavour": flavour, "transaction_isolation": isolation, "sql_mode": modes}


def unlike(settings: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """What differs between shards, and what no shard may have; one sentence each.

    :param settings: by shard.
    """
    known = {shard: found for shard, found in settings.items() if found}
    if len(known) < 2:
        return
    for name, decides in _DECIDES.items():
        first, *others = ((shard, found[name]) for shard, found in known.items())
        for shard, value in others:
            if value != first[1]:
                yield (
                    f"{shard}: {name} is {value!r}, on {first[0]} it is {first[1]!r}: make it alike on all shards "
                    f"({decides})"
                )
    for shard, found in known.items():
        sorted_by = int(found["max_sort_length"])
        if sorted_by < LONGEST_BYTES:
            yield (
                f"{shard}: max_sort_length is {sorted_by}: longer text comes in another order than it is "
                f"merged in; set at least {LONGEST_BYTES}"
            )

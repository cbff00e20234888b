"""What has to hold before a hop starts: asked of both servers before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit.errors import PositionLost, PreconditionFailed
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.topology import Endpoint

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_ASKED = (
    "version",
    "server_id",
    "server_uuid",
    "log_bin",
    "binlog_format",
    "binlog_row_image",
    "binlog_row_metadata",
    "binlog_row_value_options",
    "binlog_transaction_compression",
    "binlog_alter_two_phase",
    "gtid_mode",
    "lower_case_table_names",
    "slave_run_triggers_for_rbr",
    "slave_exec_mode",
    "super_read_only",
    "max_allowed_packet",
)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What one server says about itself.

    :param settings: its global variables, by name in lower case; those that it does not know are missing.
    :param charset: default character set and collation of the endpoint's database.
    """

    endpoint: Endpoint
    flavour: Flavour
    settings: Mapping[str, str]
    charset: tuple[str, str]

    @property
    def identity(self) -> str:
        """What tells this server's log from another's: the UUID (MySQL) or the server id (MariaDB)."""
        if self.flavour is Flavour.MYSQL:
            return f"mysql:{self.settings.get('server_uuid', '')}"
        return f"mariadb:{self.settings.get('server_id', '')}"

    @property
    def folds_names(self) -> bool:
        return self.settings.get("lower_case_table_names", "0") != "0"

    def has(self, name: str, *wanted: str) -> bool:
        """Whether a setting has one of these values, or is unknown to the server."""
        value = self.settings.get(name)
        return value is None or value.upper() in wanted


def ask(connection: Connection, endpoint: Endpoint) -> ServerFacts:
    """Read a server's facts. Changes nothing."""
    marks = ", ".join(["%s"] * len(_ASKED))
    with connection.cursor() as cursor:
        cursor.execute(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({marks})", _ASKED)
        settings = {name.lower(): str(value) for name, value in cursor.fetchall()}
        cursor.execute("SELECT @@character_set_database, @@collation_database")
        charset = cursor.fetchone() or ("", "")
    flavour = Flavour.of_version(settings.get("version", ""))
    return ServerFacts(endpoint, flavour, settings, (str(charset[0]), str(charset[1])))


def end_of_log(connection: Connection, flavour: Flavour) -> Position:
    """The position of the last transaction in a server's log."""
    variable = "gtid_binlog_pos" if flavour is Flavour.MARIADB else "gtid_executed"
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT @@global.{variable}")
        found = cursor.fetchone()
    return parse_position(flavour, str(found[0]) if found else "")


def source_faults(source: ServerFacts) -> list[tuple[str, str]]:
    """Why a server's log cannot be relayed: what is wrong, and the setting that mends it."""
    faults: list[tuple[str, str]] = []
    if not source.has("log_bin", "ON", "1"):
        faults.append(("it keeps no binary log", "log_bin=ON (needs a restart)"))
    if not source.has("binlog_format", "ROW"):
        faults.append((f"its binlog_format is {source.settings['binlog_format']}", "binlog_format=ROW"))
    for name in ("binlog_row_image", "binlog_row_metadata"):
        value = source.settings.get(name, "missing: the server is too old")
        if value.upper() != "FULL":
            faults.append((f"its {name} is {value}", f"{name}=FULL"))
    if not source.has("gtid_mode", "ON"):
        faults.append((f"its gtid_mode is {source.settings['gtid_mode']}", "gtid_mode=ON, enforce_gtid_consistency=ON"))
    if not source.has("binlog_transaction_compression", "OFF", "0"):
        faults.append(("it compresses whole transactions", "binlog_transaction_compression=OFF"))
    if not source.has("binlog_alter_two_phase", "OFF", "0"):
        faults.append(("it logs ALTER TABLE in two phases", "binlog_alter_two_phase=OFF"))
    if not source.has("binlog_row_value_options", ""):
        faults.append(("it logs JSON updates partially", "binlog_row_value_options=''"))
    return faults


def target_faults(target: ServerFacts, *, statements: bool = False) -> list[tuple[str, str]]:
    """Why rows cannot be applied to a server.

    :param statements: they come as statements, not as row events.
    """
    faults: list[tuple[str, str]] = []
    if not target.has("log_bin", "ON", "1"):
        faults.append(
            (
                "it keeps no binary log, by which the relay knows after a crash what it ran",
                "log_bin=ON (needs a restart)",
            )
        )
    if not target.has("gtid_mode", "ON"):
        faults.append((f"its gtid_mode is {target.settings['gtid_mode']}", "gtid_mode=ON, enforce_gtid_consistency=ON"))
    if not statements:
        faults += _row_event_faults(target)
    if not target.has("super_read_only", "OFF", "0"):
        faults.append(("super_read_only refuses BINLOG", "super_read_only=OFF (read_only may stay on)"))
    return faults


def _row_event_faults(target: ServerFacts) -> list[tuple[str, str]]:
    faults: list[tuple[str, str]] = []
    if not target.has("slave_run_triggers_for_rbr", "NO"):
        faults.append(("its triggers would fire for row events", "slave_run_triggers_for_rbr=NO"))
    if target.flavour is Flavour.MARIADB and not target.has("slave_exec_mode", "STRICT"):
        faults.append(("it passes over rows that are missing or there already", "slave_exec_mode=STRICT"))
    return faults


def refuse_faults(source: ServerFacts, target: ServerFacts, *, statements: bool = False) -> None:
    """See that a server's log can be applied to another.

    :param statements: rows come as statements (the SQL path), which pass between server families.
    :raises PreconditionFailed: naming every setting that has to change on either server.
    """
    found = [(source.endpoint, *fault) for fault in source_faults(source)]
    found += [(target.endpoint, *fault) for fault in target_faults(target, statements=statements)]
    if found:
        raise PreconditionFailed(
            "; ".join(f"{endpoint.address}: {fault}" for endpoint, fault, _ in found),
            hint="set " + "; ".join(f"{setting} on {endpoint.address}" for endpoint, _, setting in found),
        )
    if source.identity == target.identity and source.endpoint.database == target.endpoint.database:
        raise PreconditionFailed(
            f"{source.endpoint} and {target.endpoint} are the same database, or two servers with one identity "
            f"({source.identity})",
            hint="give every server a server_id (and on MySQL an auto.cnf) of its own, or mend the map",
        )
    # Between families the collations' names differ: the character set has to be the same.
    same = 2 if source.flavour is target.flavour else 1
    if source.charset[:same] != target.charset[:same]:
        raise PreconditionFailed(
            f"the database {source.endpoint.database} has the default {'/'.join(source.charset)} on "
            f"{source.endpoint.address} and {'/'.join(target.charset)} on {target.endpoint.address}: "
            "tables made without a character set would differ",
            hint=f"on {target.endpoint.address}: ALTER DATABASE `{target.endpoint.database}` "
            f"CHARACTER SET {source.charset[0]}" + (f" COLLATE {source.charset[1]}" if same == 2 else ""),
        )


def refuse_other_log(written: str, source: ServerFacts, target: ServerFacts, *, hop: str) -> None:
    """:raises PositionLost: when the target's position is not one of this source.

    :param written: the identity that stands beside the position.
    """
    if written != source.identity:
        raise PositionLost(
            f"the position in {target.endpoint} is one of {written}, but {source.endpoint.address} is "
            f"{source.identity}",
            hop=hop,
            hint="put the old source back into the map, or fill the target anew from this one (shardkit relay seed)",
        )

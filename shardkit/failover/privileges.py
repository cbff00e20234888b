"""What the account has to be allowed to on each server: asked before anything is done, since half a promotion is worse
than none. Without PROCESS a server does not even complain: it shows none of the connections that have to be ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from shardkit.errors import PreconditionFailed
from shardkit.failover.servers import Server
from shardkit.gtid import Flavour

_GLOBAL = re.compile(r"GRANT (?P<privileges>.+?) ON \*\.\* TO ")
_ALL = "ALL PRIVILEGES"
#: What SUPER stands for where it is (still) granted.
_BY_SUPER = frozenset(
    {
        "CONNECTION ADMIN",
        "BINLOG ADMIN",
        "BINLOG REPLAY",
        "REPLICATION SLAVE ADMIN",
        "SLAVE MONITOR",
        "SYSTEM_VARIABLES_ADMIN",
        "CONNECTION_ADMIN",
        "REPLICATION_SLAVE_ADMIN",
        "REPLICATION CLIENT",
    }
)


def require(
    server: Server,
    *,
    opens: bool = False,
    closes: bool = False,
    locks: bool = False,
    follows: bool,
    takes_over: bool = False,
) -> None:
    """See that this account may do its part on a server.

    :param opens: it is to be the new master.
    :param closes: it is the old one.
    :param locks: accounts are locked on it.
    :param follows: its own replication is started or stopped.
    :param takes_over: the relay's connection to it is ended.
    :raises PreconditionFailed: naming what it may not.
    """
    granted = _granted(server)
    if _ALL in granted:
        return
    able = granted | (_BY_SUPER if "SUPER" in granted else frozenset())
    needed = list(_needed(server.flavour, opens=opens, closes=closes, locks=locks, follows=follows))
    if takes_over:
        needed.append("CONNECTION ADMIN" if server.flavour is Flavour.MARIADB else "CONNECTION_ADMIN")
    missing = [each for each in dict.fromkeys(needed) if each not in able]
    if missing:
        raise PreconditionFailed(
            f"{server.endpoint.address}: this account lacks {', '.join(missing)}",
            hint=f"GRANT {', '.join(missing)} ON *.* TO it; docs/how-to/promote.md says under 'The account' what for",
        )


def _needed(flavour: Flavour, *, opens: bool, closes: bool, locks: bool, follows: bool) -> Iterator[str]:
    mariadb = flavour is Flavour.MARIADB
    if opens or closes:
        yield from (
            ("READ_ONLY ADMIN", "CONNECTION ADMIN") if mariadb else ("SYSTEM_VARIABLES_ADMIN", "CONNECTION_ADMIN")
        )
    if opens and not follows and mariadb:
        yield "BINLOG REPLAY"  # to number its transactions above the old master's
    if opens and follows:
        yield "RELOAD"  # to forget whom it has followed
    if closes:
        yield from ("PROCESS",) if mariadb else ("PROCESS", "XA_RECOVER_ADMIN")
    if locks:
        yield from ("CREATE USER", "BINLOG ADMIN") if mariadb else ("CREATE USER",)
    if follows:
        yield from (
            ("REPLICATION SLAVE ADMIN", "SLAVE MONITOR")
            if mariadb
            else ("REPLICATION_SLAVE_ADMIN", "REPLICATION CLIENT")
        )


def _granted(server: Server) -> set[str]:
    """The account's privileges on the whole server, those of its active roles included."""
    found: set[str] = set()
    for (line,) in server.rows("SHOW GRANTS"):
        match = _GLOBAL.match(str(line))
        found |= {each.strip().upper() for each in match["privileges"].split(",")} if match else set()
    return found

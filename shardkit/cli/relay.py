"""``shardkit relay``: copy every master's changes to its staging database and replicas, and see how that goes."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import chosen_shards, map_option, map_store, output_option
from shardkit.cli.output import Column, Output
from shardkit.cli.relay_control import pause, resume, skip
from shardkit.cli.relay_data import seed, verify
from shardkit.cli.status import relay_note

if TYPE_CHECKING:
    from shardkit_cdc.relay import Hop

#: Characters of a position in a table.
MOST_OF_A_POSITION = 20


@click.group()
def relay() -> None:
    """Copy every master's changes to its replicas (query off-loading)."""


for _command in (pause, resume, seed, skip, verify):
    relay.add_command(_command)


def _address(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    from shardkit_cdc.health import parse_address

    try:
        return None if value is None else parse_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@relay.command()
@map_option
@click.option("--shard", "shards", multiple=True, metavar="SHARD", help="Serve this shard only; may be repeated.")
@click.option(
    "--from-start",
    is_flag=True,
    help="Begin new hops at the source's first transaction, although it has tables older than its log.",
)
@click.option(
    "--apply",
    "asked",
    type=click.Choice(["auto", "raw", "sql"]),
    default="auto",
    show_default=True,
    help="How rows reach the targets: as row events (raw), as statements (sql), or raw wherever possible.",
)
@click.option(
    "--log",
    "log_format",
    type=click.Choice(["console", "json"]),
    default="console",
    show_default=True,
    help="How log lines look, on standard error.",
)
@click.option(
    "--listen",
    metavar="[HOST:]PORT",
    callback=_address,
    help="Serve /livez, /readyz and /metrics there, on 127.0.0.1 where no host is given.",
)
def run(
    map_source: str,
    shards: tuple[str, ...],
    from_start: bool,
    asked: str,
    log_format: str,
    listen: tuple[str, int] | None,
) -> None:
    """Relay until told to stop (Ctrl-C or SIGTERM).

    Every hop goes on from the position in its target, so it may be killed and started again at any time. Several
    daemons may serve the same shards: with the map in ZooKeeper one of them runs each hop and the others stand by.
    """
    from shardkit.cli.failures import explain  # these import the drivers, which --help does not need
    from shardkit.credentials import from_environment
    from shardkit.errors import PreconditionFailed, RelayError
    from shardkit_cdc.apply_path import AskedPath
    from shardkit_cdc.daemon import Relay, tune_process
    from shardkit_cdc.health import HealthServer
    from shardkit_cdc.relay import HopOptions
    from shardkit_cdc.sd_notify import Supervisor

    _log_to_stderr(log_format)
    tune_process()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    supervisor = Supervisor()
    with map_store(map_source) as store, ExitStack() as closing:
        daemon = Relay(
            store,
            from_environment(),
            shards=shards,
            options=HopOptions(from_start=from_start, apply=AskedPath(asked)),
        )
        if listen is not None:
            health = HealthServer(listen, unready=daemon.unready, registry=daemon.metrics.registry)
            closing.callback(health.close)
            logging.getLogger(__name__).info("health and metrics on http://%s:%d", listen[0], health.port)
        daemon.start()
        closing.callback(daemon.stop)
        closing.callback(supervisor.stopping)
        refused = daemon.refused(stop=stop)
        if refused:
            first, *others = refused
            failure = explain(first)
            more = "".join(f"; {explain(error).message}" for error in others)
            raise PreconditionFailed(failure.message + more, hint=failure.hint)
        supervisor.ready()
        while not stop.is_set() and not daemon.wait(0.2):
            supervisor.alive()
        ended = [hop for hop in daemon.hops if hop.report.error is not None] if not stop.is_set() else []
    if ended:
        raise RelayError(_summed_up(ended), hint=ended[0].report.error.hint if ended[0].report.error else None)


def _summed_up(ended: list[Hop]) -> str:
    return "; ".join(str(hop.report.error.message) for hop in ended if hop.report.error is not None)


@relay.command()
@map_option
@click.option("--shard", "shards", multiple=True, metavar="SHARD", help="This shard only; may be repeated.")
@output_option
def status(map_source: str, shards: tuple[str, ...], out: Output) -> int:
    """How every hop stands: state, lag, position. Asks the databases, so it works from any machine.

    Exit code 1 when a hop has failed or cannot be seen.
    """
    from shardkit.credentials import from_environment
    from shardkit_cdc.status import hop_status

    with map_store(map_source) as store:
        current = store.load()
    hops = hop_status(chosen_shards(current, shards), from_environment())
    out.result({"hops": hops})
    out.table(
        [
            Column("hop", whole=True),
            Column("from", whole=True),
            "state",
            Column("lag s", right=True),
            Column("behind", right=True),
            "log kept",
            Column("position", whole=True),
        ],
        [
            [
                hop.hop,
                hop.source,
                "not started" if hop.state == "new" else hop.state,
                None if hop.lag_seconds is None else f"{hop.lag_seconds:.2f}",
                hop.behind,
                _span(hop.retention_left),
                short_position(hop.position),
            ]
            for hop in hops
        ],
    )
    if note := relay_note(hop.state for hop in hops):
        out.note(note)
    if not hops:
        out.note("no shard has a staging database or replicas that the relay fills")
    for hop in hops:
        if hop.apply_reason:
            how = "statements" if hop.apply == "sql" else "row events, some as statements"
            out.note(f"{hop.hop}: rows are applied as {how}: {hop.apply_reason}")
        if hop.paused_at is not None:
            out.note(f"{hop.hop}: paused by {hop.paused_by} since {hop.paused_at.isoformat(timespec='seconds')}")
        if hop.error:
            out.warning(f"{hop.hop}: {hop.error}")
    return 1 if any(hop.state in {"failed", "needs reseed", "no source", "unreachable"} for hop in hops) else 0


def _span(seconds: float | None) -> str | None:
    """``29 d 4 h``, ``3 h 12 min``, ``4 min``: cut, not rounded up."""
    if seconds is None:
        return None
    minutes = int(seconds // 60)
    if minutes >= 24 * 60:
        return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def short_position(position: str) -> str:
    """A position as far as there is room for it; ``--json`` has the whole."""
    shown = re.sub(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}", r"\1..", position)  # MySQL's, by server
    first, comma, _ = shown.partition(",")
    if comma and ":" not in shown:  # of MariaDB's domains the first is the applications'
        shown = f"{first},.."
    return shown if len(shown) <= MOST_OF_A_POSITION else f"..{shown[2 - MOST_OF_A_POSITION :]}"


class _JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC offset), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _log_to_stderr(log_format: str) -> None:
    """A daemon's log is its output: shown from INFO on, without ``-v``."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("shardkit", "shardkit_cdc"):
        logging.getLogger(name).setLevel(logging.INFO)

"""The frame around all commands: groups that are imported when used, and errors that end on one screen.

Only click and rich are imported here, so that ``shardkit --help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import rich_click as click

from shardkit.cli.output import Failure, Output

INTERRUPTED = 128 + signal.SIGINT
USAGE = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """A command that is imported when it is run.

    :param module: ``shardkit.cli.relay``.
    :param attribute: the click command or group in it.
    :param summary: its line in ``shardkit --help``.
    """

    module: str
    attribute: str
    summary: str

    def load(self) -> click.Command:
        """Import it."""
        command: click.Command = getattr(import_module(self.module), self.attribute)
        return command


class _Stub(click.RichCommand):
    """Stands for a command in lists; becomes the command itself when it is run."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name=name, help=entry.summary, short_help=entry.summary)
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.RichContext:
        return self._entry.load().make_context(info_name, args, parent, **extra)  # type: ignore[return-value]


class LazyGroup(click.RichGroup):
    """A group whose commands are imported when they are run, and whose errors end on one screen.

    :param entries: name -> where the command is, in the order in which a newcomer meets them.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Its commands, in the order given."""
        return [*self._entries, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name."""
        if cmd_name in self._entries:
            return _Stub(cmd_name, self._entries[cmd_name])
        return super().get_command(ctx, cmd_name)

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run the command line. In stand-alone mode every outcome is an exit code."""
        if not standalone_mode:
            return super().main(args=args, standalone_mode=False, **extra)
        words = list(sys.argv[1:] if args is None else args)
        sys.exit(run(lambda: super(LazyGroup, self).main(args=words, standalone_mode=False, **extra), words))


def run(command: Callable[[], Any], words: Sequence[str]) -> int:
    """Run a command and turn whatever happens into its exit code.

    :param words: the command line, which says how errors are to be shown.
    """
    try:
        outcome = command()
    except (KeyboardInterrupt, click.Abort):
        Output(as_json="--json" in words).failure(Failure("interrupted", exit_code=INTERRUPTED, kind="Interrupted"))
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone (| head): nothing is wrong, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        failure = _usage_failure(error)
    except Exception as error:
        from shardkit.cli.failures import explain  # imports the drivers whose errors it knows

        logging.getLogger("shardkit.cli").debug("the command failed", exc_info=error)
        failure = explain(error)
    else:
        return outcome if isinstance(outcome, int) else 0
    Output(as_json="--json" in words).failure(failure)
    return failure.exit_code


def _usage_failure(error: click.ClickException) -> Failure:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.MissingParameter) and error.param is not None and error.param.name == "map_source":
        hint = "give --map file:shardmap.yaml or --map zookeeper://zk1:2181/shop, or export SHARDKIT_MAP"
        return Failure(error.format_message(), hint, exit_code=USAGE, kind="UsageError", title="usage")
    hint = f"see '{context.command_path} --help'" if context is not None else "see 'shardkit --help'"
    return Failure(error.format_message(), hint, exit_code=USAGE, kind="UsageError", title="usage")


def configure_logging(verbosity: int) -> None:
    """Log to standard error: nothing but errors unless asked, because what matters is said by the command itself."""
    levels = {0: logging.ERROR, 1: logging.INFO}
    level = levels.get(verbosity, logging.DEBUG)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if verbosity == 0:
        logging.getLogger("kazoo").setLevel(logging.CRITICAL)  # each refused connection is an error to kazoo
    elif verbosity == 1:
        logging.getLogger("shardkit.cli").setLevel(logging.DEBUG)  # with the traceback of what failed

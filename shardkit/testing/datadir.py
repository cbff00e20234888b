"""Prepared data directories: made once per server version, then copied, which takes a fraction of making one."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from shardkit.testing.binaries import Program, cache_directory

#: Raise it when the way in which templates are made changes: older ones are then no longer used.
_FORMAT = 1

# Options that decide how the files look; a server refuses data that were made with others.
_BAKED_IN = frozenset(
    {"innodb_page_size", "lower_case_table_names", "innodb_undo_tablespaces", "innodb_data_file_path"}
)


def baked_in(options: Mapping[str, object]) -> dict[str, object]:
    """The options that have to be known when a data directory is made."""
    return {name: value for name, value in options.items() if name in _BAKED_IN}


def copy_template(
    flavour: str, program: Program, arguments: list[str], make: Callable[[Path], None], target: Path
) -> None:
    """Copy the data directory that ``make`` makes to ``target``, which must not exist yet.

    :param arguments: the arguments that decide how the files look.
    :param make: called with a path that does not exist yet, when there is no template for this program and these
        arguments; fills it. Processes that do this at the same time do not disturb each other.
    """
    identity = json.dumps([_FORMAT, program.command, program.version, arguments])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    template = cache_directory() / "templates" / f"{flavour}-{program.version}-{digest}"
    if not template.is_dir():
        _make_template(template, program, make)
    shutil.copytree(template, target, symlinks=True)


def _make_template(template: Path, program: Program, make: Callable[[Path], None]) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    # A program in a root of its own can only write in there.
    parent = program.root / "tmp" if program.root is not None else template.parent
    building = Path(tempfile.mkdtemp(prefix="shardkit-template-", dir=parent))
    try:
        make(building / "data")
        staged = Path(tempfile.mkdtemp(prefix="new-", dir=template.parent))
        try:
            shutil.move(building / "data", staged / "data")
            (staged / "data").rename(template)
        except OSError:
            if not template.is_dir():  # otherwise another process was faster, and its template is as good
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)

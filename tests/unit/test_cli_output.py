"""What commands print, and how errors end them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import pymysql
import pytest
import rich_click as click
from click.testing import CliRunner, Result
from kazoo.exceptions import ConnectionLoss, NoAuthError
from rich.console import Console
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError

from shardkit import cli as cli_module
from shardkit.cli import cli
from shardkit.cli.failures import explain
from shardkit.cli.frame import Entry, LazyGroup
from shardkit.cli.output import MOST_DETAILS, Column, Failure, Output
from shardkit.cli.progress import Pace, Progress, duration
from shardkit.errors import (
    DifferencesFound,
    InvalidShardMap,
    MapNotFound,
    PartlyApplied,
    PreconditionFailed,
    ShardkitError,
)


class Screen:
    """An `Output` and what it wrote."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        self.out = Output(as_json=as_json, stdout=self.stdout, stderr=self.stderr)


@pytest.fixture
def plain() -> Screen:
    return Screen()


@pytest.fixture
def as_json() -> Screen:
    return Screen(as_json=True)


# --- tables, lines, JSON


def test_a_table_that_is_not_on_a_terminal_is_aligned_and_never_cut(plain: Screen) -> None:
    long = "x" * 200
    plain.out.table(["name", Column("rows", right=True)], [("서울", 5), ("a", 12345), (long, None)], title="all")
    # 서울 takes four cells on a screen
    assert plain.stdout.getvalue() == (
        f"all\n{'NAME':<200}   ROWS\n서울{' ' * 196}      5\n{'a':<200}  12345\n{long}      -\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [80, 40, 20])
def test_an_address_is_never_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    written = Terminal()
    address = "mysql://127.0.0.1:21000/s"
    Output(stdout=written).table(["server", Column("address", whole=True)], [("one word after the other", address)])
    assert written.getvalue().count(address) == 1


def test_brackets_are_text_not_markup(plain: Screen) -> None:
    plain.out.line("[red]a[/] :smile:")
    plain.out.table(["a"], [("[bold]",)])
    assert plain.stdout.getvalue() == "[red]a[/] :smile:\nA\n[bold]\n"


def test_json_is_one_document_and_nothing_else(as_json: Screen) -> None:
    class Colour(Enum):
        RED = "red"

    as_json.out.line("for people")
    as_json.out.table(["a"], [(1,)])
    as_json.out.text("yaml")
    as_json.out.result(
        {
            "at": datetime(2024, 1, 31, tzinfo=UTC),
            "who": "서울",
            "path": Path("a"),
            "c": Colour.RED,
            "n": [1, None],
            5: b"\x01",
        }
    )
    assert json.loads(as_json.stdout.getvalue()) == {
        "at": "2024-01-31T00:00:00+00:00",
        "who": "서울",
        "path": "a",
        "c": "red",
        "n": [1, None],
        "5": "01",
    }


def test_results_are_for_json_only(plain: Screen) -> None:
    plain.out.result({"a": 1})
    assert plain.stdout.getvalue() == ""


def test_notes_and_warnings_stay_out_of_the_result(as_json: Screen) -> None:
    as_json.out.note("by the way")
    as_json.out.warning("careful")
    assert as_json.stdout.getvalue() == ""
    assert as_json.stderr.getvalue() == "by the way\nwarning: careful\n"


# --- errors


def test_an_error_says_what_and_the_fix(plain: Screen) -> None:
    plain.out.failure(Failure("it broke", "mend it", ("line 1: here",)))
    assert plain.stdout.getvalue() == ""
    assert plain.stderr.getvalue() == "error: it broke\n  line 1: here\nfix: mend it\n"


def test_an_error_fits_on_one_screen(plain: Screen) -> None:
    plain.out.failure(Failure("much broke", "mend it", tuple(f"line {number}" for number in range(500))))
    lines = plain.stderr.getvalue().splitlines()
    assert len(lines) == MOST_DETAILS + 3 < 24
    assert "... and 488 more" in lines[-2]


def test_an_error_is_json_too(as_json: Screen) -> None:
    as_json.out.failure(explain(MapNotFound("no map", hint="make one")))
    assert json.loads(as_json.stdout.getvalue()) == {
        "error": {"type": "MapNotFound", "message": "no map", "details": [], "hint": "make one", "exit_code": 4}
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShardkitError("x"), 1),
        (DifferencesFound("x"), 3),
        (PreconditionFailed("x"), 4),
        (InvalidShardMap(["x"]), 4),
        (PartlyApplied("x"), 5),
        (ValueError("x"), 1),
        (OSError(28, "No space left on device", "/data"), 1),
        (ConnectionLoss(), 1),
        (NoAuthError(), 4),
        (RuntimeError("'cryptography' package is required for caching_sha2_password"), 4),
        (pymysql.err.OperationalError(1045, "Access denied"), 4),
        (pymysql.err.OperationalError(1213, "Deadlock"), 1),
    ],
)
def test_errors_end_with_their_exit_code(error: Exception, code: int) -> None:
    assert explain(error).exit_code == code


def test_every_error_of_the_tree_has_an_exit_code_that_is_documented() -> None:
    seen = [ShardkitError]
    for kind in seen:
        seen += kind.__subclasses__()
        assert kind.exit_code in {1, 3, 4, 5, 130}


@pytest.mark.parametrize(
    ("code", "text", "fix"),
    [
        (1045, "Access denied for user 'u'@'h' (using password: YES)", "SHARDKIT_PASSWORD"),
        (1049, "Unknown database 'shop'", "create the database"),
        (2003, "Can't connect to MySQL server on 'h' ([Errno 111] Connection refused)", "check that the server runs"),
        (1227, "Access denied; you need SUPER", "grant"),
    ],
)
def test_database_errors_come_with_their_fix(code: int, text: str, fix: str) -> None:
    for error in (pymysql.err.OperationalError(code, text), _wrapped(pymysql.err.OperationalError(code, text))):
        failure = explain(error)
        assert text in failure.message
        assert str(code) in failure.message
        assert fix in (failure.hint or "")


def _wrapped(error: Exception) -> DBAPIError:
    return DBAPIError("SELECT secret FROM t WHERE a = 'hidden'", {"p": "hidden"}, error)


def test_statements_and_parameters_are_not_shown() -> None:
    failure = explain(_wrapped(pymysql.err.ProgrammingError(1064, "You have an error in your SQL syntax")))
    assert "hidden" not in failure.message


def test_a_wrong_url_does_not_show_its_password() -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011 - whatever SQLAlchemy makes of it
        create_engine("mysql+pymysql://me:secret@127.0.0.1:1/shop", connect_args={"connect_timeout": 1}).connect()
    assert "secret" not in explain(refused.value).message


def test_all_faults_of_a_map_are_shown_apart() -> None:
    failure = explain(InvalidShardMap(["line 1: a", "line 2: b"], source="m.yaml"))
    assert failure.message == "m.yaml: the shard map has 2 faults"
    assert failure.details == ("line 1: a", "line 2: b")


# --- the frame


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(cli_module, "configure_logging", lambda _verbosity: None)
    return lambda *words, **settings: CliRunner().invoke(cli, list(words), **settings)


def failing(error: BaseException) -> LazyGroup:
    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fail(as_json: bool) -> None:
        raise error

    group = LazyGroup("test", entries={})
    group.add_command(fail)
    return group


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PreconditionFailed("not ready", hint="wait"), 4, "error: not ready\nfix: wait\n"),
        (RuntimeError("a bug"), 1, "error: unexpected error: RuntimeError: a bug\nfix: run it again with"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (click.UsageError("no such thing"), 2, "usage: no such thing"),
        (SystemExit(7), 7, ""),
    ],
)
def test_whatever_happens_ends_in_an_exit_code(error: BaseException, code: int, said: str) -> None:
    result = CliRunner().invoke(failing(error), ["fail"])
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_errors_are_json_when_asked() -> None:
    result = CliRunner().invoke(failing(PreconditionFailed("not ready")), ["fail", "--json"])
    assert json.loads(result.stdout)["error"]["type"] == "PreconditionFailed"
    assert result.exit_code == 4


def test_a_command_says_its_own_exit_code() -> None:
    @click.command()
    def three() -> int:
        return 3

    group = LazyGroup("test", entries={})
    group.add_command(three)
    assert CliRunner().invoke(group, ["three"]).exit_code == 3


def test_commands_are_imported_when_they_are_run() -> None:
    group = LazyGroup("test", entries={"gone": Entry("shardkit.cli.no_such_module", "gone", "It is not there.")})
    listed = CliRunner().invoke(group, ["--help"])
    assert "It is not there." in listed.stdout
    assert "no_such_module" in CliRunner().invoke(group, ["gone"]).stderr


def test_every_command_is_there(run: Callable[..., Result]) -> None:
    for name in cli.list_commands(click.Context(cli)):
        result = run(name, "--help")
        assert result.exit_code == 0, result.output
        assert "Usage:" in result.stdout


def test_an_unknown_command_is_a_usage_error(run: Callable[..., Result]) -> None:
    result = run("bogus")
    assert result.exit_code == 2
    assert "No such command 'bogus'" in result.stderr


def test_help_imports_no_driver() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, shardkit.cli; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"sqlalchemy", "kazoo", "pymysql", "pydantic", "alembic"} & set(loaded)


def shardkit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardkit", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_is_quick() -> None:
    """What takes long is importing SQLAlchemy and the drivers: commands do that when they run."""
    look = (
        "import sys; from shardkit.cli import cli; cli(['--help'], standalone_mode=False); "
        "print(sorted({'sqlalchemy', 'pymysql', 'kazoo', 'alembic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_ends_a_command_with_130() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        source = f"zookeeper://127.0.0.1:{deaf.getsockname()[1]}/shop"
        with subprocess.Popen(
            [sys.executable, "-m", "shardkit", "map", "show", "--map", source], stderr=subprocess.PIPE, text=True
        ) as waiting:
            deaf.settimeout(30)
            connection, _ = deaf.accept()  # it has called, and waits for an answer
            waiting.send_signal(signal.SIGINT)
            _, errors = waiting.communicate(timeout=30)
            connection.close()
    assert waiting.returncode == 130
    assert errors.strip() == "error: interrupted"


def test_nobody_reading_is_no_error() -> None:
    """As in ``shardkit --help | true``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shardkit", "--help"]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    finally:
        os.close(writer)
    assert ended.stderr == ""


def test_verbose_shows_where_an_error_comes_from() -> None:
    ended = shardkit("-v", "map", "validate", "no-such-file.yaml")
    assert ended.returncode == 4
    assert "Traceback" in ended.stderr
    assert "error: no-such-file.yaml" in ended.stderr


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


# --- questions


def test_yes_answers_before_it_is_asked(plain: Screen) -> None:
    plain.out.confirm("Drop it?", yes=True, plan=["drop a", "drop b"])
    assert plain.stderr.getvalue() == "  drop a\n  drop b\n"


def test_without_a_terminal_nothing_is_assumed(plain: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(PreconditionFailed, match="nothing was changed") as refused:
        plain.out.confirm("Drop it?", yes=False)
    assert refused.value.hint == "give --yes to go ahead"


@pytest.mark.parametrize(
    ("answer", "agreed"), [("y\n", True), ("YES\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_only_yes_is_yes(plain: Screen, monkeypatch: pytest.MonkeyPatch, answer: str, agreed: bool) -> None:
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    if agreed:
        plain.out.confirm("Drop it?", yes=False)
    else:
        with pytest.raises(PreconditionFailed, match="nothing was changed"):
            plain.out.confirm("Drop it?", yes=False)
    assert "Drop it? [y/N]" in plain.stderr.getvalue()


# --- progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_said_only_once_it_is_credible() -> None:
    pace = Pace(1000, 0.0)
    for second in range(1, 3):
        pace.record(second, second * 20)
        assert pace.seconds_left(second) is None  # too early
    pace.record(3, 60)
    assert pace.rate(3) == 20
    assert pace.seconds_left(3) == 47
    pace.total = 100_000
    assert pace.seconds_left(3) is None  # too small a part of it


def test_no_time_left_is_said_while_the_pace_changes() -> None:
    pace = Pace(10_000, 0.0)
    for second in range(1, 11):
        pace.record(second, second**3)  # faster and faster
    assert pace.rate(10) is not None
    assert pace.seconds_left(10) is None


def test_the_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace(None, 0.0)
    done = 0
    for second in range(1, 61):
        done += 1000 if second <= 30 else 10
        pace.record(second, done)
    assert pace.rate(60) == pytest.approx(10, rel=0.1)
    assert pace.average(60) == pytest.approx(505)
    assert pace.seconds_left(60) is None  # nobody knows the whole


def test_a_stall_shows() -> None:
    pace = Pace(1000, 0.0)
    for second in range(1, 11):
        pace.record(second, second * 10)
    assert pace.rate(40) == pytest.approx(100 / 40, rel=0.2)
    assert pace.seconds_left(40) is None


def test_plain_lines_now_and_then() -> None:
    clock, written = Clock(), io.StringIO()
    with Progress(Console(file=written), clock=clock) as progress:
        task = progress.task("copy flights", total=1000)
        for _ in range(10):
            clock.now += 1
            task.advance(100)
        progress.line("half way")
        task.finish()
    assert written.getvalue().splitlines() == [
        "copy flights: 500 of 1,000 rows (50%), 100 rows/s, 5.0 s left",
        "copy flights: 1,000 of 1,000 rows (100%), 100 rows/s, 0.0 s left",
        "half way",
        "copy flights: 1,000 of 1,000 rows (100%), in 10 s, 100 rows/s",
    ]


def test_what_is_done_stays_as_long_as_it_took() -> None:
    clock = Clock()
    task = Progress(Console(file=io.StringIO()), clock=clock).task("wait", unit="steps")
    clock.now += 20
    task.advance()
    task.finish()
    clock.now += 40
    assert task.speed(clock.now) == "in 20 s"


def test_bars_on_a_terminal() -> None:
    written = io.StringIO()
    with Progress(Console(file=written, force_terminal=True, width=120)) as progress:
        assert written.getvalue() == ""  # a question that is asked before stays on its line
        rows = progress.task("copy flights", total=1000)
        steps = progress.task("wait", unit="steps")
        rows.at(1000)
        rows.finish("copied flights")
        steps.advance()
        steps.expect(2)
        steps.describe("still waiting")
        steps.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "copied flights" in text
    assert "1,000 of 1,000 rows (100%)" in text


@pytest.mark.parametrize("width", [120, 80, 60, 50])
def test_a_task_stays_on_its_line(width: int) -> None:
    clock, written = Clock(), io.StringIO()
    console = Console(file=written, force_terminal=True, width=width)
    with Progress(console, clock=clock) as progress:
        rows = progress.task("copy flights", total=336_776)
        for _ in range(10):
            clock.now += 1
            rows.advance(30_000)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).splitlines()
    assert len(re.sub(r"\r", "", lines[-1])) <= width
    assert sum("300,000" in line for line in lines[-2:]) >= 1
    assert lines[-1].lstrip("\r").split()[1:3] == ["copy", "flights"], lines[-2:]
    assert ("━" in lines[-1]) == (width >= 100)
    assert ("rows/s" in lines[-1]) == (width >= 80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (61, "1 min 1 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

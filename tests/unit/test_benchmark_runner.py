"""The benchmark runner: a missed target is said, a crash is an error, bench.json is the rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks import __main__ as runner

GOOD = {"name": "router get", "value": 1.1, "unit": "x plain", "target": "<= 1.15", "rival": "1.4x", "ok": True}
MISSED = {**GOOD, "name": "router select", "value": 1.3, "ok": False}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run with these parts: name -> run function."""

    def run(parts: dict[str, Any], *words: str) -> tuple[int, Any]:
        monkeypatch.setattr(runner, "PARTS", tuple(parts))
        monkeypatch.setattr(runner, "find_spec", lambda name: name)
        monkeypatch.setattr(
            runner, "import_module", lambda name: SimpleNamespace(run=parts[name.removeprefix("tests.benchmarks.")])
        )
        output = tmp_path / "bench.json"
        code = runner.main([*words, "--output", str(output)])
        return code, json.loads(output.read_text())

    return run


def test_a_missed_target_is_printed_and_is_not_a_failure(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = bench({"router": lambda: [GOOD, MISSED]})
    assert code == 0
    assert rows == [GOOD, MISSED]
    assert "TARGET MISSED: router select: 1.3 x plain, target <= 1.15" in capsys.readouterr().out


def test_a_crash_is_a_failure_and_the_others_still_run(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> list[dict[str, Any]]:
        raise RuntimeError("no server today")

    code, rows = bench({"relay": crash, "router": lambda: [GOOD]})
    assert code == 1
    assert rows == [GOOD]
    captured = capsys.readouterr()
    assert "no server today" in captured.err
    assert "CRASHED: relay" in captured.out


def test_a_row_of_another_form_is_a_crash(bench: Any) -> None:
    assert bench({"router": lambda: [{"name": "router get"}]})[0] == 1
    assert bench({"router": lambda: [{**GOOD, "name": "get"}]})[0] == 1


def test_only_one_part_and_quick_sizes(bench: Any) -> None:
    asked = []

    def sized(quick: bool = False) -> list[dict[str, Any]]:
        asked.append(quick)
        return [GOOD]

    parts = {"router": sized, "relay": lambda: pytest.fail("not asked for")}
    assert bench(parts, "--only", "router", "--quick")[0] == 0
    assert asked == [True]

"""Rows of metrics on a disk that comes and goes."""

import errno
import json
from pathlib import Path

import pytest

from pixelgen_fast.engine.rows import RowFile


def rows(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl", pytest.fail)
    file.append({"nimg": 1, "a": float("inf"), "b": float("nan"), "c": None, "d": 0.5})
    assert rows(file.path) == [{"nimg": 1, "a": None, "b": None, "c": None, "d": 0.5}]


def test_a_folder_that_is_gone_comes_back(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "run" / "rows.jsonl", pytest.fail)
    file.append({"nimg": 1})
    (tmp_path / "run" / "rows.jsonl").unlink()
    (tmp_path / "run").rmdir()
    file.append({"nimg": 2})
    assert rows(file.path) == [{"nimg": 2}]


def test_rows_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    file = RowFile(tmp_path / "rows.jsonl", said.append)
    file.append({"nimg": 1})
    with monkeypatch.context() as patched:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(Path, "open", full)
        file.append({"nimg": 2})
        file.append({"nimg": 3})
        file.close()
    assert rows(file.path) == [{"nimg": 1}]
    assert "No space left" in said[0] and said[1:] == [f"2 rows are not in {file.path}"]
    file.append({"nimg": 4})
    assert rows(file.path) == [{"nimg": n} for n in (1, 2, 3, 4)]
    assert "3 rows of metrics that were kept" in said[-1]

"""A file is the old one or the new one."""

from pathlib import Path

import pytest

from pixelgen_fast.atomic import replaced


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "picture.png"
    with replaced(target) as work:
        work.write_text("old")
        assert not target.exists()
    with pytest.raises(OSError, match="no room"), replaced(target) as work:
        work.write_text("ne")
        raise OSError("no room")
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["picture.png"]


def test_what_a_kill_left_is_used_again(tmp_path: Path) -> None:
    (tmp_path / ".picture.png.part").write_text("half")
    with replaced(tmp_path / "picture.png") as work:
        work.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]

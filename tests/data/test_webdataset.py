"""Tar files with each image's class beside it."""

import io
import json
import tarfile

import pytest

from pixelgen_fast.data.index import open_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))


def write(path, members: dict[str, str]):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return path


def content(index) -> list[tuple[str, int]]:
    return [(index.read(i).decode(), index.label(i)) for i in range(len(index))]


def test_numbers_are_labels_whichever_of_them_occur(tmp_path, caplog):
    write(tmp_path / "0.tar", {"b.jpg": "B", "b.cls": "3", "a.jpg": "A", "a.cls": "10\n"})
    write(tmp_path / "1.tar", {"c.png": "C", "c.cls": "3", "c.json": "{}"})
    index = open_index(tmp_path)
    assert index.classes == [str(k) for k in range(11)]
    assert content(index) == [("B", 3), ("C", 3), ("A", 10)]
    assert ".cls" not in caplog.text and "9 of 11 class folders hold no images" in caplog.text


def test_names_and_json_name_the_class_too(tmp_path):
    members = {"x/1.jpg": "1", "x/1.cls": "dog", "2.jpg": "2", "2.json": json.dumps({"label": "cat", "width": 5})}
    index = open_index(write(tmp_path / "a.tar", members | {"3.v1.jpg": "3", "3.cls": "cat"}))
    assert index.classes == ["cat", "dog"] and content(index) == [("2", 0), ("3", 0), ("1", 1)]


@pytest.mark.parametrize(
    "members, message",
    [
        (
            {"1.jpg": "1"},
            "member 1.jpg has no class folder, and no .cls or .json beside it: members must be CLASS/NAME",
        ),
        ({"1.jpg": "1", "1.cls": "0", "a/2.jpg": "2"}, r"1 of 2 images have a .cls or .json beside them"),
        ({"1.jpg": "1", "1.cls": " "}, "member 1.cls names no class"),
        ({"1.jpg": "1", "1.json": "[3]"}, "member 1.json names no class"),
        ({"1.jpg": "1", "1.json": "{"}, "member 1.json is no JSON"),
        ({"1.jpg": "1", "1.json": '{"label": true}'}, "member 1.json names no class"),
        ({"1.jpg": "1", "1.cls": "1000000000"}, "class number 1,000,000,000 is beyond"),
    ],
)
def test_what_names_no_class_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        open_index(write(tmp_path / "a.tar", members))

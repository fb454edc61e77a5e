"""Where ranks meet."""

import socket

import pytest

from pixelgen_fast.engine.group import meet


def test_a_second_attempt_does_not_read_what_the_first_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    first, again = meet(30.0), meet(30.0)
    first.set("address", "old")
    assert again.get("address") == b"old"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meet(30.0).check(["address"])


def test_a_process_without_a_launcher_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert meet(30.0) is None

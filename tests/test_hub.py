"""The hub: its real library against a server that has a folder for a hub, and what each refusal becomes."""

import re
from pathlib import Path

import pytest
from PIL import Image
from support.hub_server import FolderHub, folder_hub  # noqa: F401  (the fixture)
from support.models import TINY
from support.runs import exported, train

from pixelgen_fast import hub
from pixelgen_fast.cli import main

SMALL = ("optimizer.warmup_images=0", *(f"model.{name}={value}" for name, value in TINY["pixeldit"].items()))
REPO = "hub:me/digits"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("export") / "digits")


@pytest.fixture
def pushed(folder_hub: FolderHub, model: Path) -> FolderHub:  # noqa: F811
    """A hub that has the export in a private repository, in several files."""
    assert main(["push", str(model), "me/digits", "--private", "--license", "mit", "--shard-size", "5KB"]) == 0
    return folder_hub


def test_what_was_pushed_draws_the_same_images(pushed: FolderHub, model: Path, tmp_path: Path) -> None:
    assert pushed.created == [{"name": "digits", "organization": "me", "visibility": "private"}]
    names = {path.name for path in (pushed.root / "me" / "digits").iterdir()}
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= names
    for source, out in ((str(model), "here"), (REPO, "there"), (f"{REPO}@main", "named")):
        options = ["--classes", "1", "--per-class", "2", "--steps", "2", "--out", str(tmp_path / out)]
        assert main(["sample", source, *options]) == 0
    grids = [Image.open(tmp_path / out / "grid.png").tobytes() for out in ("here", "there", "named")]
    assert grids[0] == grids[1] == grids[2]


def test_a_second_push_leaves_no_file_of_the_first(pushed: FolderHub, model: Path) -> None:
    assert main(["push", str(model), "me/digits"]) == 0
    names = {path.name for path in (pushed.root / "me" / "digits").glob("model*")}
    assert names == {"model.safetensors"}, "the index and the parts of the first push would be read instead"


def test_names_go_wherever_an_export_does(pushed: FolderHub, tmp_path: Path) -> None:
    """A run begins from it, an export is written of it, an evaluation judges it; each reads it from the cache."""
    run = tmp_path / "run"
    assert main(train(run, 16, f"run.init={REPO}", *SMALL)) == 0
    assert main(["export", REPO, str(tmp_path / "export")]) == 0
    assert main(["evaluate", REPO, "--samples", "20", "--steps", "1", "--out", str(tmp_path / "found.json")]) == 0
    assert main(["sample", str(run), "--guide", REPO, "--guidance", "2", "--steps", "1", "--per-class", "1"]) == 0


def test_nothing_is_written_into_the_hub(pushed: FolderHub, capsys: pytest.CaptureFixture) -> None:
    for command in (["sample", REPO], ["evaluate", REPO]):
        assert main(command) == 2
        assert "say where with --out" in capsys.readouterr().err
    assert main(["push", REPO, "me/again"]) == 2
    assert "is on the hub already" in capsys.readouterr().err


def test_one_file_of_a_repository(pushed: FolderHub) -> None:
    assert hub.local(f"{REPO}/README.md").read_text().startswith("---\nlicense: mit\n")
    assert hub.local(f"{REPO}@main/config.json").name == "config.json"
    with pytest.raises(hub.HubError, match="the repository has no such file"):
        hub.local(f"{REPO}/nothing.bin")


def test_the_cache_serves_where_there_is_no_network(pushed: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    there = hub.local(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.local(REPO) == there
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE is set, and the cache does not hold it"):
        hub.local("hub:me/other")


REFUSALS = [
    (404, {"X-Error-Code": "RepoNotFound"}, "there is no such repository, or it is private and not yours to read"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no branch, tag or commit v9"),
    (403, {"X-Error-Code": "GatedRepo"}, "its owner asks you to accept terms first"),
    (401, {}, "log in with `hf auth login`"),
    (403, {}, "use a token that may write there"),
    (429, {"Retry-After": "0"}, "too many requests: wait some minutes"),
    (418, {}, "the hub answered 418"),
]


@pytest.mark.parametrize(("status", "headers", "said"), REFUSALS, ids=[said[:30] for *_, said in REFUSALS])
def test_a_refusal_is_one_line(folder_hub: FolderHub, status: int, headers: dict, said: str) -> None:  # noqa: F811
    folder_hub.refuse = (status, headers)
    with pytest.raises(hub.HubError, match=re.escape(said)) as error:
        hub.local("hub:me/digits@v9")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("hub:me/digits@v9: ")


def test_no_token_to_push_with(folder_hub: FolderHub, model: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    folder_hub.refuse = (401, {})
    assert main(["push", str(model), "me/digits"]) == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_a_hub_out_of_reach(folder_hub: FolderHub, model: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    folder_hub.server_close()
    folder_hub.shutdown()
    assert main(["push", str(model), "me/digits"]) == 2
    assert "is out of reach" in capsys.readouterr().err
    with pytest.raises(hub.HubError, match="is out of reach, and the cache does not hold it"):
        hub.local(REPO)


@pytest.mark.parametrize("name", ["hub:", "hub:digits", "hub:/x", "hub:a/b@", "hub:a//b", "hub:a b/c", "hub:../x"])
def test_what_is_no_name_is_said_before_anything_is_asked(folder_hub: FolderHub, name: str) -> None:  # noqa: F811
    with pytest.raises(hub.HubError, match="is no name on the hub; write hub:OWNER/NAME"):
        hub.local(name)
    assert not folder_hub.asked


def test_other_names_are_paths() -> None:
    assert hub.local("runs/hub:x") == Path("runs/hub:x")
    with pytest.raises(hub.HubError, match="is no repository; write OWNER/NAME"):
        hub.check_repo("digits")
    assert hub.check_repo(REPO) == "me/digits"

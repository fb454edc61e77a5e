"""Checkpoints: exact over world sizes and stages; damage is named and passed over; a failed write leaves no trace."""

import json
import logging
import os
import re
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support.engines import SHAPES, Memory, same
from torch import Tensor

from pixelgen_fast.runs import checkpoint, manifest
from pixelgen_fast.runs.checkpoint import CheckpointError, DiskSpaceError


def save(folder: Path, seed: int, keep: int = 3) -> Path:
    return checkpoint.save(folder, Memory(seed), nimg=seed, state={"config": {"seed": seed}}, keep=keep)


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(tmp_path, 7)
    other = Memory(8)
    state = checkpoint.load(path, other)
    assert path.name == "000000000007"
    assert same(other, Memory(7))
    assert (state["nimg"], state["config"], state["format"]) == (7, {"seed": 7}, checkpoint.FORMAT)
    assert state["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_large_model_is_cut_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 300)
    path = save(tmp_path, 7)
    other = Memory(8)
    checkpoint.load(path, other)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert same(other, Memory(7))


@pytest.mark.parametrize("kind", ["raw", "ema_0.9", "ema_0.999"])
def test_weights_can_be_read_without_an_engine(tmp_path, kind):
    weights = checkpoint.read_weights(save(tmp_path, 7), kind)
    key = {"raw": "master"}.get(kind, kind)
    saved = Memory(7)
    expected = {n: saved.state[n][key if n.startswith("body") else "master"] for n in SHAPES} | saved.buffer
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_an_average_that_was_not_kept_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights 'ema_0.5'; it has \['raw', 'ema_0.9', 'ema_0.999'\]"):
        checkpoint.read_weights(save(tmp_path, 7), "ema_0.5")


def truncate(path: Path) -> None:
    os.truncate(shard(path), shard(path).stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(shard(path).read_bytes())
    content[-3] ^= 4
    shard(path).write_bytes(content)


def lose_a_file(path: Path) -> None:
    shard(path).unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def halve_the_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 20)


def misspell_the_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"bytes"', '"cytes"', 1))


def make_the_manifest_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def nest_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def lead_out_of_the_folder(path: Path) -> None:
    manifest.write_manifest(path, {"../../elsewhere": {"bytes": 0, "crc32": 0}})


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (misspell_the_manifest, "manifest.json cannot be read .bytes is missing"),
        (make_the_manifest_a_list, "manifest.json holds a list"),
        (nest_the_manifest, "manifest.json is nested too deeply"),
        (lead_out_of_the_folder, "files has '../../elsewhere', which is no file"),
        (truncate, "rank00000-000.safetensors has .* bytes instead of"),
        (flip_a_bit, "rank00000-000.safetensors has another checksum"),
        (lose_a_file, "rank00000-000.safetensors is missing"),
        (lose_the_manifest, "manifest.json cannot be read"),
        (halve_the_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, harm, reason):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.latest_valid(tmp_path) == second
    harm(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid(tmp_path) == first
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert str(second) in caplog.text and re.search(reason, caplog.text)
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.find(second)
    # The run comes by here again: the damaged one gives way to a whole one.
    assert checkpoint.latest_valid(tmp_path) == first
    assert save(tmp_path, 2) == second and checkpoint.latest_valid(tmp_path) == second


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_every_flipped_bit_of_a_json_file_is_found(tmp_path, name):
    path = save(tmp_path, 1)
    whole = (path / name).read_bytes()
    for position in range(len(whole)):
        for bit in (0, 5, 7) if name == "state.json" else range(8):
            harmed = bytearray(whole)
            harmed[position] ^= 1 << bit
            (path / name).write_bytes(harmed)
            assert checkpoint.damage(path), (position, bit)
    (path / name).write_bytes(whole)
    assert not checkpoint.damage(path)


def test_a_manifest_of_before_it_covered_itself_is_read(tmp_path):
    path = save(tmp_path, 1)
    values = json.loads((path / "manifest.json").read_text())
    del values["crc32"]
    (path / "manifest.json").write_text(json.dumps(values, indent=1))
    assert checkpoint.find(path) == path


def seal_again(path: Path) -> None:
    """Right checksums over whatever the files hold now."""
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    manifest.write_manifest(path, {p.name: manifest.seal(p) for p in files})


def header(values: object) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be used"),
        (b"not safetensors", "cannot be used"),
        (struct.pack("<Q", 2**62) + b"{}", "cannot be used"),
        (header({"master/a": {"dtype": "F32", "shape": [10**9] * 2, "data_offsets": [0, 4 * 10**18]}}), "cannot be"),
        (header({"master/a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8), "cannot be used"),
        (header({"master/a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8), "I32 instead of F32"),
        (header({"master": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8), "which is no state"),
        (header({"master/body.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
         "master of body.weight is [2] instead of [7, 5]"),
    ],
)  # fmt: skip
def test_a_sealed_shard_that_lies_is_one_error(tmp_path, content, reason):
    path = save(tmp_path, 1)
    shard(path).write_bytes(content)
    seal_again(path)
    assert checkpoint.find(path) == path
    other = Memory(8)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        checkpoint.load(path, other)
    assert same(other, Memory(8))
    if "instead of [7, 5]" not in reason:
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            checkpoint.read_weights(path, "ema_0.9")


def test_a_tensor_that_is_there_twice_is_an_error(tmp_path):
    path = save(tmp_path, 1)
    shutil.copy(shard(path), path / "rank00001-000.safetensors")
    assert checkpoint.load(path, Memory(2))["nimg"] == 1, "a file that the manifest does not name is none of it"
    seal_again(path)
    with pytest.raises(CheckpointError, match="which is there twice"):
        checkpoint.load(path, Memory(2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nimg": "7"}, 'nimg is a text ("7"), where a whole number from 0 on belongs'),
        ({"nimg": -7}, "nimg is a whole number (-7)"),
        ({"optimizer": {"step": 1.5}}, "step is a number (1.5), where a whole number from 0 on belongs"),
        ({"optimizer": {"step": 1}}, "does not fit the counter; missing: skipped, skipped_in_a_row"),
        ({"config": [1]}, "config is a list ([1]), where an object belongs"),
        ({"classes": [1]}, "classes is a list ([1]), where a list of texts belongs"),
        ({"classes": None}, "classes is null (null)"),
        ({"seconds": "1"}, "seconds is a text"),
    ],
)
def test_a_sealed_state_of_other_types_is_one_error(tmp_path, change, reason):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text()) | {"config": {}, "classes": ["a"], "seconds": 1}
    (path / "state.json").write_text(json.dumps(state | change))
    seal_again(path)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        checkpoint.read_state(path, checkpoint.RUN)
        checkpoint.load(path, Memory(2))


def test_a_file_that_cannot_be_read_does_not_hide_the_checkpoint_before(tmp_path, monkeypatch):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    real = manifest.checksum

    def failing(file: Path) -> int:
        if second in file.parents:
            raise OSError(5, "Input/output error", str(file))
        return real(file)

    monkeypatch.setattr(manifest, "checksum", failing)
    assert checkpoint.latest_valid(tmp_path) == first


def test_a_path_that_holds_nothing_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
            checkpoint.find(folder)
        assert checkpoint.latest_valid(folder) is None


def test_a_run_a_folder_and_a_checkpoint_all_name_it(tmp_path):
    newest = [save(tmp_path / "checkpoints", seed) for seed in (1, 2)][-1]
    assert all(checkpoint.find(path) == newest for path in (tmp_path, tmp_path / "checkpoints", newest))


def test_only_the_newest_are_kept(tmp_path):
    for seed in range(1, 6):
        save(tmp_path, seed, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["000000000005", "000000000004"]


def test_the_good_one_is_kept_beside_the_newest(tmp_path):
    for seed in range(1, 6):
        checkpoint.save(tmp_path, Memory(seed), nimg=seed, state={}, keep=1, good=[2])
    assert [int(path.name) for path in checkpoint.checkpoints(tmp_path)] == [5, 2]


def test_what_is_set_aside_is_not_used_again(tmp_path):
    first, *newer = [save(tmp_path, seed) for seed in (1, 2, 3)]
    for _ in range(2):  # the run comes by there again
        moved = checkpoint.set_aside(tmp_path, 1)
        assert [path.name for path in moved] == ["suspect-000000000003", "suspect-000000000002"]
        assert checkpoint.latest_valid(tmp_path) == first and not any(path.exists() for path in newer)
        assert checkpoint.find(moved[0]) == moved[0]
        newer = [save(tmp_path, seed) for seed in (2, 3)]
    checkpoint.set_aside(tmp_path, None)
    assert checkpoint.checkpoints(tmp_path) == []


def test_the_one_just_written_is_kept_even_where_a_damaged_one_is_newer(tmp_path):
    newer = save(tmp_path, 9)
    truncate(newer)
    written = save(tmp_path, 5, keep=1)
    assert checkpoint.latest_valid(tmp_path) == written


def test_saving_the_same_image_number_again_changes_nothing(tmp_path):
    path = save(tmp_path, 3)
    inode = shard(path).stat().st_ino
    assert save(tmp_path, 3) == path and shard(path).stat().st_ino == inode


class Crash(BaseException):
    """The end of the process."""


def test_a_crash_before_the_rename_leaves_the_earlier_one(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def crash(*paths: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", crash)
        with pytest.raises(Crash):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir() if path != first] == ["tmp-000000000002"]
    assert checkpoint.latest_valid(tmp_path) == first
    assert list(tmp_path.iterdir()) == [first], "what the crash left has been removed"


def test_whoever_reads_leaves_alone_what_is_being_written(tmp_path):
    first = save(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints" / "tmp-000000000002").mkdir()
    assert checkpoint.find(tmp_path) == first
    assert (tmp_path / "checkpoints" / "tmp-000000000002").is_dir()


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    first = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match=r"needs \d+ bytes and 1000 are free") as error:
        save(tmp_path, 2)
    values = sum(5 * 42 if n.startswith("body.w") else 0 for n in SHAPES)
    assert error.value.free == 1000 and error.value.needed > 4 * values
    assert list(tmp_path.iterdir()) == [first]


def test_a_disk_that_fills_up_while_writing_leaves_no_half_checkpoint(tmp_path):
    first = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to let any file grow past this, as a full disk would.
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"rank 0 could not write rank00000-000.safetensors: .*too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [first]
    assert checkpoint.latest_valid(tmp_path) == first
    assert checkpoint.latest_valid(save(tmp_path, 2).parent).name == "000000000002"


def test_a_model_that_does_not_fit_is_listed_and_left_alone(tmp_path):
    path = save(tmp_path, 7)
    other = Memory(8, {"body.weight": (5, 7), "body.bias": (7,), "head.weight": (2,)})
    before = Memory(8, other.shapes)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, other)
    told = str(error.value)
    assert "missing: ema_0.9 of head.weight, ema_0.999 of head.weight, exp_avg of head.weight" in told
    assert "not in the model: exp_avg of projector.weight, exp_avg_sq of projector.weight, master of proj" in told
    assert "master of body.weight is [7, 5] instead of [5, 7]" in told
    assert same(other, before)


def test_a_format_of_the_future_is_refused(tmp_path):
    path = save(tmp_path, 7)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="it has format 99, and this version reads 1"):
        checkpoint.load(path, Memory(7))


def test_arguments_are_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 1, keep=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, Memory(1), nimg=1, state={"weights": torch.zeros(1)}, keep=1)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def journey(launch, tmp_path_factory) -> tuple[dict, dict, dict]:
    """Two ranks at stage 3, one rank at stage 1, two ranks at stages 2 and 3."""
    folder = tmp_path_factory.mktemp("journey")
    tasks = [("save_at_stage_3", 2), ("move_to_stage_1", 1), ("move_on", 2)]
    for task, world in tasks:
        launch(task, world, folder)
    return tuple(torch.load(folder / f"{task}-{world}.pt") for task, world in tasks)


def identical(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


def test_state_is_exact_over_world_sizes_and_stages(journey):
    start, one, two = journey
    assert start["scalars"] == {"step": 3, "skipped": 1, "skipped_in_a_row": 1}
    for stop in (one, *two.values()):
        assert identical(stop["state"], start["state"])
        assert stop["scalars"] == start["scalars"]
        assert stop["follows"], "the forward pass uses the restored weights and buffers"
    assert one["told"]["config"] == {"size": "B"} and one["told"]["world"] == 2


def test_one_rank_that_cannot_write_is_heard_by_all(journey):
    assert "rank 1 could not write rank00001-000.safetensors" in journey[0]["refusal"]


def test_training_goes_on_alike_at_every_stage(journey):
    runs = [stop["next"] for stop in journey[2].values()]
    for run in runs:
        for name, kinds in run.items():
            for kind, tensor in kinds.items():
                assert not torch.equal(tensor, journey[0]["state"][name][kind])
                assert (tensor - runs[0][name][kind]).norm() < 1e-5 * tensor.norm()

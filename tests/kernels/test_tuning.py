"""Which configuration a plan takes: a forced one, the tuned one of this GPU and these sizes, or the first."""

import json

import pytest
import torch
from pixelgen_kernels import tuning
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.swiglu import CONFIGS

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """tuned(content): this process has an H100, and h100.json that content."""

    def forget():
        tuning._gpu.cache_clear()
        tuning._tuned.cache_clear()

    def write(content):
        (tmp_path / "h100.json").write_text(json.dumps(content))
        forget()

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    yield write
    forget()


def test_the_table_is_found_by_the_name_of_the_gpu(tuned):
    content = {"swiglu": {"3072": list(CONFIGS[3])}}
    tuned(content)
    for gpu in (H100, "NVIDIA H100 PCIe", "NVIDIA-H100-SXM5"):
        assert tuning.table_of(gpu) == content
    for gpu in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GH100X"):
        assert tuning.table_of(gpu) == {}


def test_the_tuned_configuration_is_for_its_sizes_only(tuned):
    tuned({"swiglu": {"3072": list(CONFIGS[3])}, "norm": {"16,72": list(CONFIGS[1])}})
    assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[3]
    assert tuning.chosen("norm", CONFIGS, 16, 72) == CONFIGS[1]
    assert tuning.chosen("swiglu", CONFIGS, 2048) == tuning.chosen("norm", CONFIGS, 72, 16) == CONFIGS[0]
    assert tuning.chosen("other", CONFIGS) == CONFIGS[0]


def test_plans_for_another_gpu_take_its_table(tuned):
    tuned({"swiglu": {"3072": list(CONFIGS[3])}})
    with tuning.planning_for("NVIDIA H200"):
        assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[0]
    assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[3]


def test_without_a_gpu_the_first_is_taken(tuned, monkeypatch):
    tuned({"swiglu": {"3072": list(CONFIGS[3])}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[0]
    with tuning.planning_for(H100):
        assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[3]


def test_an_entry_that_names_no_configuration_is_refused(tuned):
    tuned({"swiglu": {"3072": [1, 2, 3]}})
    message = r"swiglu for \(3072,\) on NVIDIA H100 80GB HBM3 names \[1, 2, 3\], which is none of its configurations"
    with pytest.raises(ValueError, match=message + ".*; measure again, or remove the entry"):
        tuning.chosen("swiglu", CONFIGS, 3072)


def test_a_file_that_is_no_table_is_refused(tuned):
    tuned({"swiglu": list(CONFIGS[0])})
    with pytest.raises(ValueError, match=r"h100\.json: must map operators to sizes to configurations"):
        tuning.chosen("swiglu", CONFIGS, 3072)


def test_using_forces_and_restores(tuned):
    tuned({"swiglu": {"3072": list(CONFIGS[3])}})
    with tuning.using("swiglu", CONFIGS[1]):
        assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[1]
        assert tuning.chosen("other", CONFIGS) == CONFIGS[0]
        with tuning.using("swiglu", CONFIGS[2]), tuning.using("other", CONFIGS[4]):
            assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[2]
            assert tuning.chosen("other", CONFIGS) == CONFIGS[4]
        assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[1]
    with pytest.raises(RuntimeError), tuning.using("swiglu", CONFIGS[1]):
        raise RuntimeError
    assert tuning.chosen("swiglu", CONFIGS, 3072) == CONFIGS[3]


def test_choices_are_written_down_with_what_a_table_goes_by(tuned):
    tuned({})
    with tuning.asked() as outer, tuning.using("swiglu", CONFIGS[1]):
        tuning.chosen("swiglu", CONFIGS, 3072)
        with tuning.asked() as inner:
            tuning.chosen("norm", CONFIGS, 16, 72)
        tuning.chosen("other", CONFIGS)
    tuning.chosen("swiglu", CONFIGS, 8)
    assert outer == [("swiglu", (3072,)), ("other", ())] and inner == [("norm", (16, 72))]


def test_shipped_tables_name_configurations_that_exist():
    for path in tuning.FOLDER.glob("*.json"):
        for name, sizes in tuning.table_of(path.stem).items():
            wanted = [list(config) for config in OPERATORS[name].configs]
            assert all(config in wanted for config in sizes.values()), f"{path.name}: {name}"

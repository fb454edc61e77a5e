"""What is written as safetensors by hand, the library reads; its entry in the manifest is that of the file."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from pixelgen_fast.runs.manifest import seal
from pixelgen_fast.runs.shards import write_shard


def test_tensors_of_every_kind_are_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "strided": torch.randn(3, 4).t(),
        "half": torch.randn(5).bfloat16(),
        "numbers": torch.arange(3),
        "name/with \"quotes\" and é": torch.ones(1, dtype=torch.float64),
    }  # fmt: skip
    file = tmp_path / "a.safetensors"
    assert write_shard(file, tensors) == seal(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name

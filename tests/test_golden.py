"""Every file of reference numbers is met, by what golden_check.py calls."""

from pathlib import Path

import numpy as np
import pytest
import rebuilt

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("body", ["reference", "native"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_of_a_file_is_met(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    errors = rebuilt.errors(path)
    assert errors and max(errors.values()) <= rebuilt.LIMIT, errors


def test_a_file_of_another_system_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, config='{"system": "unheard"}')
    with pytest.raises(ValueError, match="'unheard' cannot be rebuilt"):
        rebuilt.errors(path)

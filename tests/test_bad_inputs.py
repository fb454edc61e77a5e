"""Some of the drill's bad inputs: each gives a result, or one line that names the place (python -m tests.drill)."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.drill.inputs import KINDS, verdict


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_input_gives_a_result_or_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]

    @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=checks)
    @given(KINDS[name].examples)
    def holds(example: object) -> None:
        assert verdict(KINDS[name], example, tmp_path / "given") == ""

    holds()

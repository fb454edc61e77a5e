"""The launches that are judged: those of the registry at the named models, each compiled kernel of a model once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pixelgen_kernels.launch import Launch, Started
from pixelgen_kernels.registry import Operator
from pixelgen_kernels.shapes import ModelShape
from pixelgen_kernels.tuning import planning_for


@dataclass(frozen=True)
class Listed:
    """One launch of a case of an operator at a model's sizes, with the configuration that is shipped or another."""

    operator: str
    model: str
    case: str
    config: str
    shipped: bool
    started: Started

    @property
    def launch(self) -> Launch:
        return self.started.launch

    @property
    def key(self) -> str:
        """Its name in the baseline and in messages."""
        return f"{self.model}/{self.case}/{self.launch.name}"


def listed(
    operators: Mapping[str, Operator], shapes: Iterable[ModelShape], every: bool = False, gpu: str = "H100"
) -> list[Listed]:
    """What the cases of operators start at the shapes that have them. every: all tuning configurations.

    gpu: whose tuned configurations are the shipped ones. Launches of a model that Triton takes for the same kernel are
    listed once: by the first case that starts it, and as shipped if a shipped configuration gives it.
    """
    found = []
    with planning_for(gpu):
        for shape in shapes:
            seen = set()
            cases = [(op, case) for op in operators.values() for case in op.cases() if case in shape.cases]
            wanted = [(op, case, None) for op, case in cases]
            if every:
                wanted += [(op, case, config) for op, case in cases for config in op.configs]
            for operator, case, config in wanted:
                for started in operator.launches(shape, case, config):
                    if started.key not in seen:
                        seen.add(started.key)
                        name = "shipped" if config is None else str(config)
                        found.append(Listed(operator.name, shape.name, case, name, config is None, started))
    return found

"""Which weights are matrices, to be orthogonalised each on its own: what Muon trains.

A layer that packs several matrices in one weight, one over another, says so, and so does one whose linear layer makes
the modulation of a condition (shift, scale, gate), which is no map between hidden states:

    class SwiGLU(nn.Module):
        stacked = {"w13": 2}            the weight of self.w13 is W1 over W3
    class TransformerBlock(nn.Module):
        stacked = {"modulation": 0}     the weight of self.modulation is none

What is not mentioned is one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

Matrices = dict[nn.Parameter, int]


def matrices_of(modules: Iterable[nn.Module]) -> Matrices:
    """{trained weight [n rows, columns]: n, the matrices stacked in it} of all linear layers inside modules.

    Modulations are left out: their gradient has the rank of the conditions in a batch, and orthogonalising scales what
    is left of it, noise, to the same length.
    """
    return {weight: count for weight, count in _stated(modules, (nn.Linear,)).items() if count}


def all_matrices(model: nn.Module) -> Matrices:
    """The same of a whole model, with modulations, embeddings and the layers in front of and behind the blocks."""
    return {weight: count or 1 for weight, count in _stated([model], (nn.Linear, nn.Embedding)).items()}


def _stated(modules: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> Matrices:
    return {
        child.weight: getattr(parent, "stacked", {}).get(name, 1)
        for module in modules
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, kinds) and child.weight.requires_grad
    }

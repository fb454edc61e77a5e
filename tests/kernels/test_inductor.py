"""torch.compile with its default backend, which train.compile_blocks runs: all operators in one graph for each body.

The compiled bodies are opaque to Inductor, which relies on what their fake kernels say about strides. Around csrc it
generates C++ of its own, as in a run on a CPU; around the others it calls PyTorch's kernels, because every generated
one costs a second of the compiler.
"""

import pytest
import torch
from pixelgen_kernels.registry import OPERATORS, Maker, differentiable, leaves, outputs, tensors
from pixelgen_kernels.shapes import RAGGED
from support.operator_runs import exact, inputs
from torch._inductor import config


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_outputs_and_gradients(body, device, assert_close, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # PyTorch cannot trace its fused AdamW, which the reference calls; an optimizer is not compiled
    operators = {name: op for name, op in OPERATORS.items() if not (op.in_place and body == "reference")}
    # csrc has attention for heads of 72; the interpreter is slow and gets the smaller shape
    shape = RAGGED["odd" if body == "triton" else "long"]
    given = {name: inputs(name, shape, device) for name in operators}
    wanted = {name: exact(name, given[name]) for name in operators}
    marked = {(name, x): leaf for name, op in operators.items() for x, leaf in leaves(op, given[name]).items()}

    @torch.compile(fullgraph=True)
    def every(given):
        return {name: op.function(**given[name]) for name, op in operators.items()}

    with config.patch(fallback_by_default=body != "native", compile_threads=1):
        results = {name: outputs(result) for name, result in every(given).items()}
        flowing, cotangents = [], []
        for out in results.values():
            maker = Maker(torch.float32, "cpu", seed=1)
            flowing += differentiable(out)
            cotangents += [maker.normal(*x.shape).to(x) for x in differentiable(out)]
        grads = dict(zip(marked, torch.autograd.grad(flowing, list(marked.values()), cotangents), strict=True))

    found = {(name, f"output {i}"): x for name, out in results.items() for i, x in enumerate(out)}
    found |= {(name, f"gradient of {x}"): grad for (name, x), grad in grads.items()}
    for name, op in operators.items():
        if op.in_place:
            found |= {(name, x): tensor for x, tensor in tensors(given[name]).items() if x not in op.constant}
    assert found.keys() == {(name, x) for name, results in wanted.items() for x in results}
    for (name, x), result in found.items():
        assert_close(name, f"{name}: {x}", result, wanted[name][x])

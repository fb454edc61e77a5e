"""The named parts of a model: from the path of a module to the part that its time and memory are counted for.

    patch_blocks.3.attn.qkv -> patch_blocks.attn      of a stack of blocks: what the module is within its block
    patch_blocks.3          -> patch_blocks           a block outside its named modules
    levels.0.blocks.1.attn  -> levels.blocks.attn     of stacks in stacks: within the innermost block
    head.linear             -> head                   else the first name

A stack, a list of modules, has a name in the plural; the numbers inside other modules count their steps. The profile of
a step and its plan have these names.
"""

from __future__ import annotations

from pixelgen_fast.runs.folder import MODEL

LOSS = "noising and loss"  # what a training objective does itself


def part_of_objective(path: str) -> str:
    """The part of a path inside a training objective: its model's own, another child of it, or the objective itself."""
    first, _, inner = path.partition(".")
    return part_of(inner) if first == MODEL else first or LOSS


def part_of(path: str) -> str:
    """The part that a module's path, or a parameter's, inside the generator belongs to; "model" for the whole."""
    names = path.split(".")
    stacked = [k for k, name in enumerate(names) if name.isdecimal() and k and names[k - 1].endswith("s")]
    if not stacked:
        return names[0] or "model"
    return ".".join(name for name in names[: stacked[-1] + 2] if not name.isdecimal())

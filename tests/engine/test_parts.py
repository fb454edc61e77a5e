"""The part that a module belongs to."""

import pytest

from pixelgen_fast.engine.parts import LOSS, part_of, part_of_objective


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("", "model"),
        ("patch_embed", "patch_embed"),
        ("patch_blocks.3.attn.qkv", "patch_blocks.attn"),
        ("patch_blocks.11.mlp", "patch_blocks.mlp"),
        ("patch_blocks.3", "patch_blocks"),
        ("head.linear", "head"),
        ("t_embed.mlp.0", "t_embed"),
        ("trunk.layers.2.attn.proj", "trunk.layers.attn"),
        ("trunk.y_embed", "trunk"),
        ("levels.0.blocks.1.attn.qkv", "levels.blocks.attn"),
        ("levels.1", "levels"),
        ("patch_blocks.0.mlp.2", "patch_blocks.mlp"),
    ],
)
def test_blocks_of_a_stack_are_one_part_each_of_their_modules(path: str, part: str) -> None:
    assert part_of(path) == part


def test_an_objective_has_its_models_parts_and_others() -> None:
    paths = ("", "model", "model.patch_blocks.0.mlp", "alignment.projector.0")
    assert [part_of_objective(path) for path in paths] == [LOSS, "model", "patch_blocks.mlp", "alignment"]

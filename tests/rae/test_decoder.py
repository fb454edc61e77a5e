"""The decoder: parameter counts of the published sizes, its public names both ways, and latents of another grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.golden import relative

from pixelgen_fast.errors import InputError
from pixelgen_fast.rae import names
from pixelgen_fast.rae.decoder import PUBLISHED, Decoder, DecoderSettings

TINY = DecoderSettings(hidden_size=16, depth=2, num_heads=2, ffn=24, patch_size=4)


def tiny(grid: int = 3, **channels: tuple) -> Decoder:
    decoder = Decoder(TINY, 6, grid, **channels)
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return decoder


@pytest.mark.parametrize(
    ("size", "all_of_them", "trained"),
    [("B", 86_435_328, 86_237_952), ("L", 304_150_272, 303_887_104), ("XL", 415_352_704, 415_056_640)],
)
def test_counts_of_the_published_sizes(size: str, all_of_them: int, trained: int) -> None:
    """The public form counts the position table as a parameter that is not trained."""
    with torch.device("meta"):
        decoder = Decoder(DecoderSettings(**PUBLISHED[size]), 768, 16)
    assert sum(p.numel() for p in decoder.parameters()) == trained
    assert trained + decoder.positions.numel() == all_of_them
    assert decoder.image_size == 256


def test_published_names_there_and_back() -> None:
    settings = DecoderSettings(hidden_size=768, depth=2, num_heads=12, ffn=40, patch_size=2)
    state = Decoder(settings, 5, 3).state_dict()
    public = names.decoder_to_public(state, grid=3)
    assert names.published_decoder(public, "here") == (settings, 5, 3)
    back = names.decoder_to_native(public)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert public["decoder_layers.1.attention.attention.key.weight"].shape == (768, 768)


def test_published_files_of_something_else_are_refused() -> None:
    public = names.decoder_to_public(Decoder(TINY, 6, 3).state_dict(), grid=3)
    with pytest.raises(InputError, match="here: a decoder of width 16, and how many heads it has"):
        names.published_decoder(public, "here")
    with pytest.raises(InputError, match="not a decoder of RAE: it lacks decoder_pred.weight"):
        names.published_decoder({n: v for n, v in public.items() if n != "decoder_pred.weight"}, "here")
    wide = names.decoder_to_public(Decoder(DecoderSettings(768, 1, 12, 8, 2), 6, 3).state_dict(), grid=3)
    with pytest.raises(InputError, match="decoder_pos_embed is not the table"):
        names.published_decoder(wide | {"decoder_pos_embed": wide["decoder_pos_embed"] + 1}, "here")


def test_a_latent_of_another_grid_is_resized_after_its_embedding() -> None:
    """The embedding is linear and its bias constant, so resizing before it is the same."""
    decoder, z = tiny(), torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(z, size=(3, 3), mode="bilinear", align_corners=False)
    assert relative(decoder(z), decoder(resized)) < 1e-5


def test_channels_are_scaled_and_shifted() -> None:
    z = torch.randn(1, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    plain, other = tiny()(z), tiny(mean=(0.1, 0.2, 0.3), std=(2.0, 3.0, 4.0))(z)
    scale, shift = torch.tensor([2.0, 3.0, 4.0])[:, None, None], torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert plain.shape == (1, 3, 12, 12)
    assert torch.allclose(other, plain * scale + shift)

"""AliTok's tokenizer: its counts, its words, its files. Its numbers are those of tests/golden/alitok_tokenizer.npz."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pixelgen_fast.models.alitok_tokenizer import TokenizerSize, load_tokenizer, public_name, save_tokenizer

SMALL = TokenizerSize(
    grid=2, patch=4, prefix=3, words=24, vector=8, encoder_width=16, encoder_depth=1, encoder_heads=2,
    decoder_width=24, decoder_depth=2, decoder_heads=3, decoder_tokens=5,
)  # fmt: skip


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        tokenizer = load_tokenizer(TokenizerSize(), "AliTok.pth")
    parts = (tokenizer, tokenizer.encoder, tokenizer.decoder)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [389_899_308, 86_079_008, 303_479_564]


def test_a_word_is_the_nearest_vector_of_the_codebook() -> None:
    tokenizer = load_tokenizer(SMALL, "random")
    latents, ids = tokenizer.latents(images()), tokenizer.encode(images())
    assert ids.shape == (3, 7) and SMALL.length == 7
    distances = (latents[:, :, None] - tokenizer.quantize.embedding.weight).square().sum(-1)
    torch.testing.assert_close(distances.gather(-1, ids[..., None])[..., 0], distances.amin(-1))


def test_images_of_a_batch_do_not_mix_and_lie_between_zero_and_one() -> None:
    tokenizer = load_tokenizer(SMALL, "random")
    ids = tokenizer.encode(images())
    found = tokenizer.decode(ids)
    assert found.shape == (3, 3, 8, 8) and found.min() > 0 and found.max() < 1
    alone = torch.cat([tokenizer.decode(tokenizer.encode(image[None])) for image in images()])
    torch.testing.assert_close(found, alone)


def test_every_word_reaches_the_image() -> None:
    tokenizer = load_tokenizer(SMALL, "random")
    z = tokenizer.quantize.embedding(tokenizer.encode(images(1))).requires_grad_()
    tokenizer.decoder(z).square().sum().backward()
    assert (z.grad.abs().amax(-1) > 0).all()


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = load_tokenizer(SMALL, "random").state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second = load_tokenizer(SMALL, "random").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_names_in_a_file_are_the_published_ones() -> None:
    with torch.device("meta"):
        names = {public_name(name) for name in load_tokenizer(SMALL, "AliTok.pth").state_dict()}
    block = ["ln_1", "attn.in_proj", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    ends = ["patch_embed ln_pre ln_post conv_out", "decoder_embed ln_pre ln_post ffn.0 conv_out"]
    wanted = {"latent_tokens", "quantize.embedding.weight", "decoder.class_embedding", "encoder.positional_embedding"}
    for part, depth, layers in zip(("encoder", "decoder"), (1, 2), ends, strict=True):
        wanted.add(f"{part}.latent_token_positional_embedding")
        own = [*layers.split(), *(f"transformer.{i}.{name}" for i in range(depth) for name in block)]
        wanted |= {f"{part}.{layer}.{kind}" for layer in own for kind in ("weight", "bias")}
    assert names == wanted


@pytest.mark.parametrize("form", ["folder", "torch", "safetensors", "wrapped", "half"])
def test_a_tokenizer_comes_back_from_its_file(form: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SMALL, "random")
    own, path = tokenizer.state_dict(), tmp_path / "AliTok.pth"
    state = {public_name(name): value for name, value in own.items()}
    if form == "folder":
        save_tokenizer(tokenizer, tmp_path)
        path = tmp_path
    elif form == "safetensors":
        save_file(state, path)
    elif form == "half":
        state = {name: value.bfloat16() for name, value in state.items()}
        torch.save(state, path)
    else:
        torch.save({("module." if form == "wrapped" else "") + name: value for name, value in state.items()}, path)
    found = load_tokenizer(SMALL, str(path))
    assert not any(p.requires_grad for p in found.parameters()) and not found.training
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[public_name(name)].float()), name


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file = tmp_path / "AliTok.pth"

    def refused(message: str, source: str | None = str(file), size: TokenizerSize = SMALL) -> None:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(size, source)

    refused("model.tokenizer is null", None)
    refused("model.tokenizer .*AliTok.pth: no such file or folder")
    state = {public_name(name): value for name, value in load_tokenizer(SMALL, "random").state_dict().items()}
    torch.save(state | {"strange": torch.zeros(2)}, file)
    refused(r"extra strange \[2\]")
    torch.save({name: value for name, value in state.items() if name != "latent_tokens"}, file)
    refused(r"missing latent_tokens \[7, 16\]")
    torch.save({"model": state}, file)
    refused("holds model, which is no weight")
    torch.save(state, file)
    refused(r"positional_embedding is \[4, 16\], wanted \[9, 16\]", size=replace(SMALL, grid=3))
    refused("encoder_heads 3 does not divide model.encoder_width 16", size=replace(SMALL, encoder_heads=3))

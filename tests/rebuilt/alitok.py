"""AliTok's transformer and tokenizer, and the logits of plain and of soft guidance, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from rebuilt import Comparison, GoldenFile
from torch import Tensor
from torch.func import functional_call

from pixelgen_fast.interop import alitok, check_state
from pixelgen_fast.models.alitok import build_transformer
from pixelgen_fast.models.alitok_tokenizer import Tokenizer, TokenizerSize, fill, public_name
from pixelgen_fast.models.alitok_transformer import TokenTransformer
from pixelgen_fast.models.guided_tokens import Guidance, SoftGuidance, draw_tokens, guidance_weight


def opened(file: GoldenFile) -> tuple[TokenTransformer, dict[str, Tensor], dict[str, Tensor]]:
    """(transformer in evaluation, its weights under the public names, the same as it names them, made from those)."""
    sampling = ("gamma", "k", "temperature")
    arguments = {name: value for name, value in file.config.items() if name not in sampling}
    settings, image_size, num_classes = alitok.config(arguments)
    public = {name: value.requires_grad_() for name, value in file.state().items()}
    check_state(public, alitok.public_shapes(settings, image_size, num_classes))
    transformer = build_transformer(settings, image_size // settings.patch_size, num_classes).eval()
    native = alitok.to_native(public, settings)
    return transformer, public, {name.removeprefix("transformer."): value for name, value in native.items()}


def rebuild_transformer(file: GoldenFile) -> Iterator[Comparison]:
    transformer, public, native = opened(file)
    # in the public table classes stand behind the words and a row that nothing reads
    y = file["condition_ids"] - file.config["codebook_size"] - 1
    output = functional_call(transformer, native, (file["ids"], y))
    loss = (output * file["w"]).mean()
    loss.backward()
    yield "output", output, file["output"]
    yield "loss", loss, file["loss"]
    yield "cross_entropy", F.cross_entropy(output[:, :-1].flatten(0, 1), file["ids"].flatten()), file["cross_entropy"]
    yield from file.gradients(public)


def rebuild_tokenizer(file: GoldenFile) -> Iterator[Comparison]:
    """The file's vectors of words are [B, E, 1, N]."""
    c = file.config
    own = file.keys["decoder.class_embedding"][0]
    size = TokenizerSize(c["grid"], c["patch"], c["prefix"], c["codebook"], c["token"], *c["enc"], *c["dec"], own)
    tokenizer = Tokenizer(size)
    fill(tokenizer, file.state(), str(file.path))
    yield "z_q", tokenizer.quantize.embedding(file["ids"]).mT[:, :, None], file["z_q"]
    z_q = file["z_q"].clone().requires_grad_()
    output = tokenizer.decoder(z_q[:, :, 0].mT)
    loss = (output * file["w"]).mean()
    loss.backward()
    yield "output", output, file["output"]
    yield "loss", loss, file["loss"]
    yield "grad_z", z_q.grad, file["grad_z"]
    yield from file.gradients({public_name(name): p for name, p in tokenizer.named_parameters()})
    yield "enc_latent", tokenizer.latents(file["enc_x"]).mT[:, :, None], file["enc_latent"]
    yield "enc_ids", tokenizer.encode(file["enc_x"]), file["enc_ids"]


def rebuild_guidance(file: GoldenFile) -> Iterator[Comparison]:
    """Logits at each step while the file's tokens are what is drawn; all are divided by the temperature."""
    transformer, _, native = opened(file)
    transformer.load_state_dict(native)
    c, ids = file.config, file["ids"]
    weights = [guidance_weight(s, c["seq_len"], c["gamma"], c["k"]) for s in range(c["seq_len"])]
    yield "guidance", torch.tensor(weights), file["guidance"]
    softness = {"cfg_plain": None, "soft_norm": SoftGuidance(), "soft_nonorm": SoftGuidance(step_norm=False)}
    for name, soft in softness.items():
        seen = []

        def forced(s: int, logits: Tensor, conditional: Tensor, seen: list = seen) -> Tensor:
            seen.append((logits, conditional))
            return ids[:, s]

        with torch.no_grad():
            guidance = Guidance(c["gamma"], c["k"], c["temperature"], soft)
            draw_tokens(transformer, file["y"], c["seq_len"], guidance, forced)
        guided, conditional = (torch.stack(steps, dim=1) for steps in zip(*seen, strict=True))
        yield name, guided, file[name]
        if soft is None:
            yield "cond_logits", conditional, file["cond_logits"]


SYSTEMS = {"alitok_ar": rebuild_transformer, "alitok_tokenizer": rebuild_tokenizer, "softcfg": rebuild_guidance}

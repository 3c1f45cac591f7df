"""Stable Diffusion's VAE as an encoder, on random weights: its pretrained ones were never loaded here."""
import sys

import pytest
import torch

import rae
from assets.sdvae import SDVAE
from rae import RAE, UserError, build_encoder

SMALL = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


@pytest.fixture
def diffusers(monkeypatch):
    small = rae.ENCODERS["sdvae"]._replace(options=SMALL)
    monkeypatch.setitem(rae.ENCODERS, "sdvae", small)
    return pytest.importorskip("diffusers", reason="sdvae needs diffusers, which is optional")


def test_tokens_of_sdvae_are_patches_of_the_posteriors_scaled_mean(diffusers):
    vae = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4, **SMALL)
    vae = vae.eval().requires_grad_(False)
    images = torch.rand(2, 3, 256, 256)
    mean = vae.encode(2 * images - 1).latent_dist.mean * 0.18215       # (2, 4, 32, 32)
    autoencoder = RAE("sdvae", "tiny", 256).load_encoder(vae.state_dict())
    tokens = autoencoder.tokens(images)
    assert tokens.shape == (2, 256, 16) and not autoencoder.encoder.training
    # Token 17 is that of row 1, column 1: its values by row, column and channel
    by_hand = torch.stack([mean[:, :, 2 + row, 2 + column] for row in (0, 1) for column in (0, 1)], 1)
    torch.testing.assert_close(tokens[:, 17], by_hand.flatten(1))
    assert autoencoder.decode(autoencoder.encode(images)).shape == images.shape


def test_weights_of_sdvae_are_read_under_their_old_names_too(diffusers, tmp_path):
    images = torch.rand(1, 3, 64, 64)
    encoder = build_encoder("sdvae", 64, "random")
    old = {}
    for key, value in encoder.state_dict().items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert "encoder.mid_block.attentions.0.query.weight" in old
    old["post_quant_conv.weight"] = old["decoder.conv_in.weight"] = torch.zeros(1)      # left behind
    torch.save(old, tmp_path / "vae.pth")
    assert torch.equal(build_encoder("sdvae", 64, tmp_path / "vae.pth")(images), encoder(images))
    del old["quant_conv.bias"]
    with pytest.raises(UserError, match="encoder sdvae: weights of another model: Missing key.*quant_conv.bias"):
        build_encoder("sdvae", 64, old)


def test_sdvae_without_diffusers_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="needs diffusers: pip install diffusers"):
        SDVAE()

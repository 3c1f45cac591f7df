"""Encoders that saw no label: one of MAE, a VAE of its size, and pixels, decoded as they are encoded."""
import re

import pytest
import torch
from conftest import DECODER, DIT, inside, load, losses
from test_encoders import noise, plain_vit, random_weights, relative

from assets.make_demo import pretrain_ssl, trainable
from assets.probe import linear_probe
from assets.shapes import Shapes
from rae import ENCODERS, ROOT, RAE, UserError, default_data, load_rae, open_data, read_weights
from train_decoder import parse_args
from train_dit import parse_args as parse_dit
from train_dit import warn_if_narrow

VAE = ROOT / "assets/tiny_vae.pt"
SSL = ROOT / "assets/tiny_ssl.pt"
LAPTOP = ("tiny", "tiny_ssl", "tiny_vae", "tiny_pixel")


# Pixels

@pytest.mark.parametrize("encoder, size", [
    ("tiny_pixel", 32), ("tiny_pixel", 64), ("pixel", 64), ("pixel", 224), ("pixel", 256)])
def test_pixels_come_back_exactly(encoder, size):
    rae = RAE(encoder, "tiny", size).load_encoder()
    rae.mean.normal_()
    rae.var.uniform_(0.01, 2)
    images = noise(2, 3, size, size)
    z = rae.encode(images)
    assert z.shape == (2, (size // rae.stride) ** 2, 3 * rae.stride ** 2)
    torch.testing.assert_close(rae.decode(z), images, atol=1e-4, rtol=0)
    # What is there of it is nothing that could be trained
    assert not list(rae.parameters())


@pytest.mark.parametrize("encoder", ["pixel", "tiny_pixel"])
def test_pixels_are_not_enlarged(encoder):
    with pytest.raises(UserError, match=f"{encoder} decodes its patches as they are: --upsample 1"):
        RAE(encoder, "tiny", 32, upsample=2)


def test_stage_1_on_pixels_writes_statistics_alone_and_says_so(tmp_path, photos):
    command = ("train_decoder.py", "--encoder", "tiny_pixel", "--data", photos, "--batch", 10, "--workers", 0)
    said = inside(*command, cwd=tmp_path)
    assert "pixels need no decoder" in said
    run = tmp_path / "out/tiny_pixel"
    assert {path.name for path in run.iterdir()} == {".lock", "rae.pt"}         # no step: no log, no picture

    # They are those of the data set: what encode gives has them no more
    saved = load(run / "rae.pt")
    assert saved["step"] == 0 and saved["ema"] == {} and saved["model"] == {}
    rae = load_rae(run)
    dataset = open_data(str(photos), 32)
    images = torch.stack([dataset[i, 0][0] for i in range(40)]) / 255
    z = rae.encode(torch.cat([images, images.flip(-1)])).double()       # (80, 16, 192), mirrored ones too
    torch.testing.assert_close(z.mean(0), torch.zeros(16, 192).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(16, 192).double(), atol=1e-2, rtol=0)
    # Asked again, there is nothing left to do
    assert "finished" in inside(*command, cwd=tmp_path)


# The VAE

def random_vae(seed=0):
    """The weights of a ViT, and of the bottleneck's 16 channels."""
    generator = torch.Generator().manual_seed(seed)
    head = {"head.weight": torch.randn(16, 96, generator=generator) / 96 ** 0.5,
            "head.bias": torch.randn(16, generator=generator)}
    return random_weights("tiny") | head


@pytest.mark.parametrize("size", [32, 64])
def test_a_vaes_tokens_are_its_posteriors_mean(size):
    state = random_vae()
    images = noise(2, 3, size, size)
    tokens = RAE("tiny_vae", "tiny", size).load_encoder(state).tokens(images)
    features = plain_vit("tiny", state, 2 * images.double() - 1, True)  # (2, N, 96), without an affine part
    mean = features @ state["head.weight"].double().T + state["head.bias"]
    assert tokens.shape == (2, (size // 8) ** 2, 16)
    assert relative(tokens, mean) < 1e-5


def test_a_vae_without_its_bottleneck_is_refused():
    with pytest.raises(UserError, match="encoder tiny_vae: weights of another model: Missing key.*head.weight"):
        RAE("tiny_vae", "tiny", 32).load_encoder(random_weights("tiny"))


@pytest.mark.skipif(not VAE.exists(), reason="the VAE's weights are not there")
def test_the_bundled_vae_tells_apart_what_it_must_reconstruct():
    """Of half precision and one megabyte; each of its channels varies from image to image."""
    assert VAE.stat().st_size < 1.1 * 2 ** 20
    assert all(value.dtype == torch.float16 for value in read_weights(VAE).values())
    rae = RAE("tiny_vae", "tiny", 32).load_encoder()
    images, _ = Shapes().render(torch.arange(50_000, 50_200))
    std = rae.tokens(images / 255).std(0)                               # (16, 16)
    assert std.shape == (16, 16) and std.min() > 0.05


# The masked autoencoder

@pytest.mark.skipif(not SSL.exists(), reason="its weights are not there")
def test_the_bundled_masked_autoencoder_tells_classes_apart():
    """Of half precision and one megabyte; a linear reading of its mean token finds them."""
    assert SSL.stat().st_size < 1.1 * 2 ** 20
    assert all(value.dtype == torch.float16 for value in read_weights(SSL).values())
    rae = RAE("tiny_ssl", "tiny", 32).load_encoder()
    images, labels = Shapes().render(torch.arange(48_000, 51_000))
    tokens = rae.tokens(images / 255)                                   # (3000, 16, 96)
    assert tokens.shape == (3000, 16, 96)
    features = tokens.mean(1)
    assert linear_probe(features[:2000], labels[:2000], features[2000:], labels[2000:]) > 0.8


def test_masked_autoencoding_asks_for_pictures_alone():
    """As many as a batch holds at each step, and what it returns is an encoder that has learned from them."""
    asked = []

    def pictures(count):
        asked.append(count)
        return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)

    torch.manual_seed(0)
    untrained = trainable("tiny_ssl").state_dict()
    torch.manual_seed(0)
    trained = pretrain_ssl(pictures, steps=3, batch=6).state_dict()
    assert asked == [6, 6, 6]
    assert trained.keys() == untrained.keys() == read_weights(SSL).keys()
    moved = [key for key, value in trained.items() if not torch.equal(value, untrained[key])]
    assert "pos_embed" in moved and "blocks.0.attn.qkv.weight" in moved


# By the same commands

@pytest.mark.parametrize("encoder", LAPTOP)
def test_the_laptops_encoders_share_recipe_and_data(encoder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_decoder.py", "--encoder", encoder])
    args = parse_args()
    epochs = 0 if encoder == "tiny_pixel" else 2                              # pixels: nothing to train
    assert (args.image_size, args.decoder, args.batch, args.epochs, args.tau) == (32, "tiny", 64, epochs, 0.5)
    assert ENCODERS[encoder].image_side == 32 and ENCODERS[encoder].stride == 8
    rae = RAE(encoder, "tiny", 32)
    assert default_data(rae) == "shapes"
    args = parse_dit([], encoder)
    assert (args.width, args.head, args.batch, args.epochs) == (192, 256, 64, 2.5)
    channels = dict(tiny=96, tiny_ssl=96, tiny_vae=16, tiny_pixel=192)
    assert rae.num_tokens == 16 and rae.token_dim == channels[encoder]


@pytest.mark.parametrize("encoder", ["tiny_vae", "tiny_pixel"])
def test_a_baseline_goes_through_both_stages_and_is_sampled(encoder, tmp_path, photos):
    weights = tmp_path / "vae.pth"
    torch.save(random_vae(), weights)
    given = ("--encoder-weights", weights) if encoder == "tiny_vae" else ()
    inside("train_decoder.py", *DECODER, "--encoder", encoder, *given, "--data", photos, "--steps", 3,
           cwd=tmp_path)
    said = inside("train_dit.py", *DIT, "--data", photos, "--steps", 3, cwd=tmp_path)
    token_dim = ENCODERS[encoder].dim
    assert f"16 x {token_dim} latents of {encoder}" in said
    run = tmp_path / "out" / encoder
    assert len(losses(run, 2)) == 3
    inside("sample.py", "--run", run, "--steps", 2, "--out", tmp_path / "samples.png", cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("encoder", ["tiny", "tiny_ssl", "tiny_vae"])
def test_a_laptops_autoencoder_holds_its_encoder(encoder, tmp_path, photos):
    if not (ROOT / f"assets/{encoder}.pt").exists():
        pytest.skip("the encoder's weights are not there")
    inside("train_decoder.py", *DECODER, "--encoder", encoder, "--data", photos, "--steps", 1, cwd=tmp_path)
    held = load(tmp_path / "out" / encoder / "rae.pt")["encoder"]
    bundled = read_weights(ROOT / f"assets/{encoder}.pt")
    assert held.keys() == bundled.keys()
    for key, value in bundled.items():
        assert torch.equal(held[key], value.float())


@pytest.mark.parametrize("encoder, head, sentence", [
    ("tiny_vae", 12, "rank 12 of 16 token dimensions. .* below 0.250"), ("tiny_vae", 16, None),
    ("tiny_pixel", 96, "rank 96 of 192 token dimensions. .* below 0.500"), ("tiny_pixel", 256, None)])
def test_the_bound_counts_a_baselines_own_channels(encoder, head, sentence, capsys):
    warn_if_narrow(dict(token_dim=ENCODERS[encoder].dim, width=192, head=head, predict="v", base_head=0))
    said = capsys.readouterr().out
    assert re.search(sentence, said) if sentence else said == ""

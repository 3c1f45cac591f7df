"""The frozen encoders give what a plain ViT gives, written here from a state dict and in double precision."""
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from rae import ENCODERS, HALF, IMAGENET, RAE, build_encoder, read_weights, unpatchify

TINY = Path(__file__).parent.parent / "assets/tiny.pt"
# What the encoders were trained as:
#             width depth heads patch table [CLS] registers layer scale, GELU
VITS = {
    "dinov2_s":  ( 384, 12,  6, 14, 37, 1, 4, True,  "none"),
    "mae_b":     ( 768, 12, 12, 16, 14, 1, 0, False, "none"),
    "siglip2_b": ( 768, 12, 12, 16, 16, 0, 0, False, "tanh"),
    "dino_s8":   ( 384, 12,  6,  8, 28, 1, 0, False, "tanh"),
    "tiny":      (  96,  4,  4,  8,  4, 1, 0, False, "none"),
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def noise(*shape, seed=0):
    """Images (B,3,h,w) in [0,1] with detail at all scales."""
    generator, images = torch.Generator().manual_seed(seed), torch.zeros(shape)
    for scale in (1, 4, 16):
        coarse = torch.rand(*shape[:2], shape[2] // scale, shape[3] // scale, generator=generator)
        images += F.interpolate(coarse, shape[2:], mode="bilinear") / 3
    return images


def random_weights(name, seed=0):
    """A state dict under timm's names, every entry random, the final norm's included."""
    width, depth, _, patch, side, cls, registers, scale, _ = VITS[name]
    generator, state = torch.Generator().manual_seed(seed), {}

    def add(key, *shape, std, mean=0.0):
        state[key] = mean + std * torch.randn(*shape, generator=generator)

    def linear(key, out, *into):
        add(f"{key}.weight", out, *into, std=math.prod(into) ** -0.5)
        add(f"{key}.bias", out, std=0.1)

    def norm(key):
        add(f"{key}.weight", width, mean=1, std=0.2)
        add(f"{key}.bias", width, std=0.1)

    if cls:
        add("cls_token", 1, 1, width, std=0.5)
    if registers:
        add("reg_token", 1, registers, width, std=0.5)
    add("pos_embed", 1, side * side + (cls if not registers else 0), width, std=0.5)
    linear("patch_embed.proj", width, 3, patch, patch)
    for i in range(depth):
        linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        linear(f"blocks.{i}.attn.proj", width, width)
        linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
        linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        for j in (1, 2):
            norm(f"blocks.{i}.norm{j}")
            if scale:
                add(f"blocks.{i}.ls{j}.gamma", width, mean=1, std=0.2)
    norm("norm")
    return state


def bicubic(x, side, antialias):
    """x (...,n,n) -> (...,side,side) with Keys' cubic kernel.

    Without antialias a = -0.75 and edge pixels are repeated; with it a = -0.5, and when shrinking the kernel
    is widened, cut off at the edges, and its weights made to sum to 1.
    """
    old = x.shape[-1]
    a = -0.5 if antialias else -0.75
    width = max(1, old / side) if antialias else 1
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) * old / side - 0.5
    taps = torch.arange(-8, old + 8)
    d = (taps - centre[:, None]).abs() / width                          # (side, taps)
    near = (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
    far = a * (d ** 3 - 5 * d ** 2 + 8 * d - 4)
    weight = torch.where(d <= 1, near, far) * (d < 2)
    if antialias:
        matrix = weight[:, 8:-8] / weight[:, 8:-8].sum(1, keepdim=True)       # (side, old)
    else:
        matrix = torch.zeros(side, old, dtype=torch.float64).index_add_(1, taps.clamp(0, old - 1), weight)
    return matrix @ x.double() @ matrix.T


def patches(x, patch):
    """x (B,3,h,w) -> (B,N,3*patch*patch), a token's values ordered (channel, row, column)."""
    return F.unfold(x, patch, stride=patch).mT


def plain_vit(name, state, images, antialias):
    """Normalised pixels (B,3,h,w) -> layer-normed patch tokens (B,N,D)."""
    width, depth, heads, patch, old, cls, registers, scale, gelu = VITS[name]
    w = {key: value.double() for key, value in state.items()}
    linear = lambda x, key: x @ w[f"{key}.weight"].flatten(1).T + w[f"{key}.bias"]
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    affine = lambda x, key: norm(x) * w[f"{key}.weight"] + w[f"{key}.bias"]
    side, position = images.shape[-1] // patch, w["pos_embed"][0]
    table = position[-old * old:].T.reshape(width, old, old)                  # (D, row, column)
    table = table if side == old else bicubic(table, side, antialias)

    x = linear(patches(images, patch), "patch_embed.proj") + table.flatten(1).T               # (B, N, D)
    if cls:
        first = w["cls_token"]
        if not registers:                                               # with them, it has its position
            first = first + position[:1]
        extra = [first, w["reg_token"]] if registers else [first]
        x = torch.cat([token.expand(len(x), -1, -1) for token in extra] + [x], 1)
    for i in range(depth):
        b = f"blocks.{i}"
        qkv = linear(affine(x, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in qkv)  # (B, heads, tokens, D / heads)
        y = ((q @ k.mT) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{b}.attn.proj") * (w[f"{b}.ls1.gamma"] if scale else 1)
        y = F.gelu(linear(affine(x, f"{b}.norm2"), f"{b}.mlp.fc1"), approximate=gelu)
        x = x + linear(y, f"{b}.mlp.fc2") * (w[f"{b}.ls2.gamma"] if scale else 1)
    return norm(x[:, cls + registers:])                                 # no [CLS], no registers, no affine


@pytest.mark.parametrize("name, size, side, antialias, pixels", [
    ("dinov2_s",  256, 224, True,  IMAGENET),
    ("dinov2_s",  512, 448, True,  IMAGENET),
    ("mae_b",     256, 256, False, IMAGENET),
    ("siglip2_b", 256, 256, None,  HALF),
    ("dino_s8",   224, 224, None,  IMAGENET),
    ("tiny",       32,  32, None,  HALF),
    ("tiny",       64,  64, True,  HALF)])
def test_tokens_are_those_of_a_plain_vit(name, size, side, antialias, pixels):
    state, images = random_weights(name), noise(1, 3, size, size)
    mean, std = torch.tensor(pixels, dtype=torch.float64)[..., None, None]
    x = F.interpolate(images, (side, side), mode="bicubic", align_corners=False)      # or unchanged
    tokens = RAE(name, "tiny", size).load_encoder(state).tokens(images)
    assert tokens.shape == (1, (size // ENCODERS[name].stride) ** 2, VITS[name][0])
    assert tokens.dtype == torch.float32
    assert relative(tokens, plain_vit(name, state, (x - mean) / std, antialias)) < 1e-5
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(tokens.shape[:2]), atol=1e-4, rtol=0)


def test_tokens_stay_in_float32_under_autocast():
    state, images = random_weights("tiny"), noise(2, 3, 32, 32)
    rae = RAE("tiny", "tiny", 32).load_encoder(state)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = rae.tokens(images)
    assert torch.equal(tokens, rae.tokens(images))


def test_the_final_norm_of_a_file_has_no_effect():
    state, images = random_weights("tiny"), noise(2, 3, 32, 32)
    bare = {key: value for key, value in state.items() if not key.startswith("norm.")}
    rae = RAE("tiny", "tiny", 32)
    assert torch.equal(rae.load_encoder(state).tokens(images), rae.load_encoder(bare).tokens(images))


def test_images_of_another_size_are_resized_bicubically_without_antialias():
    images = noise(2, 3, 256, 256)
    tokens = RAE("pixel", "tiny", 224).load_encoder().tokens(images)    # (2, 196, 768)
    by_torch = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False, antialias=False)
    by_hand = bicubic(images, 224, antialias=False)
    assert relative(unpatchify(tokens, 16) / 2 + 0.5, by_torch) < 1e-6
    assert relative(by_torch, by_hand) < 1e-5
    assert relative(bicubic(images, 224, antialias=True), by_hand) > 1e-2     # antialias would be seen


def test_the_pixel_encoder_gives_patches_in_the_order_row_column_channel():
    images = noise(2, 3, 64, 64)
    tokens = RAE("pixel", "tiny", 64).load_encoder().tokens(images)     # (2, 16, 768)
    torch.testing.assert_close(tokens, patches(2 * images - 1, 16).unflatten(2, (3, 256)).mT.flatten(2))


@pytest.mark.skipif(not TINY.exists(), reason="the demo's encoder is not there")
def test_the_demo_encoder_is_the_bundled_one():
    images = noise(2, 3, 32, 32)
    expected = plain_vit("tiny", read_weights(TINY), 2 * images.double() - 1, None)
    assert relative(RAE("tiny", "tiny", 32).load_encoder().tokens(images), expected) < 1e-5


def as_dinov2(state):
    """As DINOv2's authors publish it: [CLS] has a position of its own, and there is a mask token."""
    state = dict(state)
    position = torch.linspace(-1, 1, 384).view(1, 1, 384)               # a constant would be normalised away
    return state | dict(register_tokens=state.pop("reg_token"), cls_token=state["cls_token"] - position,
                        pos_embed=torch.cat([position, state["pos_embed"]], 1), mask_token=torch.ones(1, 384))


def as_mae(state):
    """As MAE's authors publish it, with the decoder they trained it with."""
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_embed.weight": torch.ones(8, 96)}
    return {"model": state | decoder}


@pytest.mark.parametrize("name, convert, suffix, size", [
    ("dinov2_s", as_dinov2, ".pth", 256), ("tiny", as_mae, ".pth", 32), ("tiny", dict, ".safetensors", 32)])
def test_weights_are_read_as_timm_and_as_the_authors_publish_them(name, convert, suffix, size, tmp_path):
    state, images = random_weights(name), noise(1, 3, size, size)
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(convert(state), path)
    rae = RAE(name, "tiny", size)
    from_file = rae.load_encoder(path).tokens(images)
    assert relative(from_file, rae.load_encoder(state).tokens(images)) < 1e-6


@pytest.mark.parametrize("break_it, sentence", [
    (lambda s: s.pop("blocks.1.mlp.fc1.bias"),
     "encoder tiny: weights of another model: Missing key.*blocks.1.mlp.fc1.bias"),
    (lambda s: s.update({"blocks.1.ls1.gamma": torch.ones(96)}), "Unexpected key.*blocks.1.ls1.gamma"),
    (lambda s: s.update({"blocks.1.attn.proj.weight": torch.ones(95, 96)}),
     "size mismatch for blocks.1.attn.proj.weight"),
    (lambda s: s.update(pos_embed=torch.ones(1, 26, 96)), "size mismatch for pos_embed"),
    (lambda s: s.clear(), "Missing key.*pos_embed")])
def test_weights_of_another_model_are_refused(break_it, sentence, tmp_path):
    state = random_weights("tiny")
    break_it(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=sentence):
        RAE("tiny", "tiny", 32).load_encoder(tmp_path / "weights.pth")


def test_an_encoder_is_a_function_of_normalised_pixels():
    """What RAE.tokens adds is the resizing and the normalisation of pixels, and nothing else."""
    state, images = random_weights("dinov2_s"), noise(1, 3, 256, 256)
    encoder = build_encoder("dinov2_s", 256, state)
    x = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    mean, std = torch.tensor(IMAGENET)[..., None, None]
    tokens = encoder((x - mean) / std)
    assert torch.equal(tokens, RAE("dinov2_s", "tiny", 256).load_encoder(state).tokens(images))
    assert not encoder.training and not any(weight.requires_grad for weight in encoder.parameters())


def test_an_autoencoder_without_its_encoder_says_so():
    with pytest.raises(ValueError, match="load_encoder.. builds it"):
        RAE("tiny", "tiny", 32).encode(torch.zeros(1, 3, 32, 32))

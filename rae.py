"""The representation autoencoder (RAE): images in, latents out, images back.

    RAE.encode: images (B,3,H,W) in [0,1] -> resize, normalise -> frozen ViT -> patch tokens,
        layer-normed -> standardise per (position, channel) -> z (B,N,D)
    RAE.decode: z -> undo the standardisation -> ViT decoder -> undo the normalisation -> images

The encoder is pretrained and frozen; train_decoder.py trains the decoder and writes rae.pt.

    python rae.py photo.jpg --run out/dinov2_b       # originals above copies: reconstruction.png
    python rae.py photo.jpg --run release:dinov2_b   # with the paper's released decoder

B images, N tokens, D channels of a token. Source: arXiv 2510.11690 ("the paper"), section 3.
"""
import argparse
import atexit
import fcntl
import gc
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import defaultdict
from contextlib import suppress
from copy import copy
from datetime import timedelta
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.utils import save_image

ROOT = Path(__file__).parent


class UserError(SystemExit, ValueError):
    """One sentence: what was given, what was wanted, what to do. It ends a script without a
    traceback; code that imports this file catches it as a ValueError."""


def in_fp32(function):
    """Decorator: run a function of tensors in fp32, also under bf16 autocast."""
    @wraps(function)
    def wrapped(*args):  # the last argument is a tensor
        args = [x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for x in args]
        with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=False):
            return function(*args)
    return wrapped


# Frozen encoders: normalised pixels -> patch tokens

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # pixel mean and standard deviation
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TANH = dict(act_layer=partial(nn.GELU, approximate="tanh"))  # as trained; timm's GELU is exact
TINY = dict(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)


class Encoder(NamedTuple):
    timm: str               # timm's name of the model; empty: pixels
    image_side: int         # side of the images
    input_side: int         # side to which they are resized for the encoder
    patch: int              # pixels per token in the encoder's input
    dim: int                # D, channels of a token
    pixels: tuple           # pixel mean and standard deviation
    antialias: bool = True  # when positions are resampled, as the reference does
    options: dict = {}      # further arguments of timm.create_model

    @property
    def stride(self):
        """Image pixels per token."""
        return self.image_side * self.patch // self.input_side


ENCODERS = {  #            timm's model                          image input patch dim  pixels
    "dinov2_s":  Encoder("vit_small_patch14_reg4_dinov2.lvd142m", 256, 224, 14,  384, IMAGENET),
    "dinov2_b":  Encoder("vit_base_patch14_reg4_dinov2.lvd142m",  256, 224, 14,  768, IMAGENET),
    "dinov2_l":  Encoder("vit_large_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 1024, IMAGENET),
    "siglip2_b": Encoder("vit_base_patch16_siglip_256.v2_webli",  256, 256, 16,  768, HALF, options=TANH),
    "mae_b":     Encoder("vit_base_patch16_224.mae",              256, 256, 16,  768, IMAGENET, False),
    "dino_s8":   Encoder("vit_small_patch8_224.dino",             224, 224,  8,  384, IMAGENET, options=TANH),
    # the paper's baselines: Stable Diffusion's VAE (Table 10), pixels (Table 11)
    "sdvae":     Encoder("stabilityai/sd-vae-ft-ema",             256, 256, 16,   16, HALF),
    "pixel":     Encoder("",                                      256, 256, 16,  768, HALF),
    # for a laptop, 16 tokens of 32 px: `tiny` saw labels; MAE, a VAE and pixels saw none
    "tiny":       Encoder("vit_tiny_patch16_224",                  32,  32,  8,   96, HALF, options=TINY),
    "tiny_ssl":   Encoder("vit_tiny_patch16_224",                  32,  32,  8,   96, HALF, options=TINY),
    "tiny_vae":   Encoder("vit_tiny_patch16_224",                  32,  32,  8,   16, HALF, options=dict(
                          TINY, num_classes=16)),  # a linear bottleneck: the posterior's mean
    "tiny_pixel": Encoder("",                                      32,  32,  8,  192, HALF),
}


def patchify(images, patch):
    """(B,3,h*patch,w*patch) -> (B,h*w,3*patch*patch): by row, column, channel."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, h, row, w, column)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x, patch):
    """(B,N,3*patch*patch) -> (B,3,h*patch,w*patch): the inverse, of square images."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))  # (B, h, w, row, column, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Pixels(nn.Module):
    """The encoder `pixel`, whose tokens are patches, or its decoder: nothing to train (Table 11)."""
    def __init__(self, function, patch):
        super().__init__()
        self.function = function
        self.patch = patch

    def forward(self, x):
        return self.function(x, self.patch)


class PatchNorm(nn.Module):
    """An encoder's last layer: patch tokens, each of mean 0 and variance 1 over its channels.

    [CLS] and registers are dropped. The pretrained norm's scale and shift are left out, because
    tau, the noise of stage 1, is defined relative to tokens of unit variance.
    """
    def __init__(self, prefix_tokens, eps):
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x[:, self.prefix_tokens:], x.shape[-1:], eps=self.eps)


def build_encoder(name, image_size, weights=None):
    """The frozen encoder: normalised pixels (B,3,h,w) -> layer-normed patch tokens (B,N,D).

    name: one of ENCODERS. weights: None for the pretrained ones (of the Hugging Face hub; `tiny`:
    bundled), "random", a state dict as timm, DINOv2's or MAE's authors write it, or the path of
    one. Errors: no network, weights of another model. Source: section 3.
    """
    spec = ENCODERS[name]
    if not spec.timm:
        return Pixels(patchify, spec.patch)
    if name == "sdvae":
        from assets.sdvae import build
        return build(weights, **spec.options)

    # A ViT without its classifier, and with our last layer
    options = dict(num_classes=0, global_pool="") | spec.options
    vit = timm.create_model(spec.timm, **options)
    vit.norm = PatchNorm(vit.num_prefix_tokens, vit.norm.eps)

    # Its positions are resampled to our grid of tokens as the reference does it
    grid = [image_size // spec.stride] * 2
    native = vit.pos_embed.shape
    resample = partial(resample_abs_pos_embed, new_size=grid, antialias=spec.antialias,
                       num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens)
    vit.pos_embed = nn.Parameter(resample(vit.pos_embed.detach()))
    vit.patch_embed.set_input_size(img_size=grid[0] * spec.patch)

    # Weights: the bundled ones, the hub's, or those that were given
    if weights is None:
        bundled = ROOT / f"assets/{name}.pt"  # tiny, tiny_ssl, tiny_vae
        weights = bundled if bundled.exists() else fetch(f"timm/{spec.timm}", "model.safetensors")
    if str(weights) != "random":  # random: as it was initialised
        state = weights if isinstance(weights, dict) else read_weights(weights)
        state = encoder_state(state, vit.state_dict(), native, resample)
        load_strict(vit, state, f"encoder {name}")
    return vit.eval().requires_grad_(False)


def encoder_state(weights, own, native, resample):
    """A published state dict -> ours; own: our ViT's; native: the published positions' shape."""
    state = dict(unwrap(weights))
    if "register_tokens" in state:  # DINOv2's own file: timm has [CLS]'s position in [CLS]
        position, state["pos_embed"] = state["pos_embed"].tensor_split([1], 1)
        state["cls_token"] = state["cls_token"] + position
        state["reg_token"] = state.pop("register_tokens")
    if getattr(state.get("pos_embed"), "shape", None) == native:  # a rae.pt has them resampled
        state["pos_embed"] = resample(state["pos_embed"].float())
    # Not needed: the norm's scale and shift, classifiers, MAE's decoder
    unused = ("norm.", "fc_norm.", "head", "attn_pool.", "decoder", "mask_token")
    return {key: value for key, value in state.items() if key in own or not key.startswith(unused)}


# The decoder: tokens -> normalised pixels

def grid_angles(side, dim):
    """Angles (side*side, dim/2) of a square grid's positions: by row, then by column."""
    exponents = torch.arange(dim // 4).double() / (dim // 4)  # 0 to 1
    angles = torch.arange(side)[:, None] * 10000.0 ** -exponents  # (side, dim/4)
    rows = angles.repeat_interleave(side, 0)  # 0 0 0 1 1 1 2 2 2
    columns = angles.repeat(side, 1)          # 0 1 2 0 1 2 0 1 2
    return torch.cat([rows, columns], 1)


def sincos_2d(side, dim):
    """MAE's fixed position embedding (side*side, dim): columns, then rows."""
    rows, columns = grid_angles(side, dim).chunk(2, 1)  # each (side*side, dim/4)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1).float()


def attention(q, k, v, mask=None):
    """scaled_dot_product_attention (B,heads,N,C); on CPUs in fp32, since bf16 is slower there."""
    if not q.is_cuda:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block, as in ViT-MAE."""
    def __init__(self, width, heads, mlp_hidden):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, C)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, width)
        return x + self.mlp(self.norm2(x))  # (B, N, width)


DECODERS = {
    "tiny": dict(width=160,  depth=3,  heads=5,  mlp_hidden=640),
    "B":    dict(width=768,  depth=12, heads=12, mlp_hidden=3072),
    "L":    dict(width=1024, depth=24, heads=16, mlp_hidden=4096),
    "XL":   dict(width=1152, depth=28, heads=16, mlp_hidden=4096),
}


class Decoder(nn.Module):
    """MAE's ViT decoder: tokens (B,N,D) -> normalised pixels (B,3,h*patch,w*patch).

    Errors: tokens that form no square; a width that is no multiple of its heads and of 4.
    """
    def __init__(self, tokens, token_dim, width, depth, heads, mlp_hidden, patch):
        super().__init__()
        side = math.isqrt(tokens)
        if width % heads or width % 4 or side ** 2 != tokens:
            raise UserError(f"no decoder of width {width}, {heads} heads on {tokens} tokens: the"
                            " width must be a multiple of heads and of 4, tokens a square")
        self.patch = patch
        self.embed = nn.Linear(token_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(side, width), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.predict = nn.Linear(width, 3 * patch * patch)

    def forward(self, x):
        x = self.embed(x) + self.pos_embed  # (B, N, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # [CLS] has no position
        for block in self.blocks:
            x = block(x)                       # (B, 1 + N, width)
        x = self.predict(self.norm(x[:, 1:]))  # (B, N, 3 patch patch)
        return unpatchify(x.float(), self.patch)


# The autoencoder

class RAE(nn.Module):
    """Frozen encoder, latent statistics, decoder; load_encoder and load_rae bring the weights.

    encoder: a name in ENCODERS; decoder: one in DECODERS, or a dict of such sizes; image_size:
    the side of images, which are decoded at image_size * upsample. Errors: unknown names, an
    image size that is no multiple of a token's.
    """
    def __init__(self, encoder="dinov2_b", decoder="XL", image_size=256, upsample=1):
        super().__init__()
        for what, name, table in (("encoder", encoder, ENCODERS), ("decoder", decoder, DECODERS)):
            if isinstance(name, str) and name not in table:
                raise UserError(f"unknown {what} {name!r}; there are {', '.join(table)}")
        sizes = DECODERS[decoder] if isinstance(decoder, str) else decoder

        # What it is, and the shape of its latents
        self.name = encoder
        self.spec = ENCODERS[encoder]
        self.stride = self.spec.stride
        if image_size % self.stride:
            raise UserError(f"image size {image_size} does not fit {encoder}: use a multiple of"
                            f" {self.stride}")
        self.image_size = image_size
        self.upsample = upsample
        self.config = dict(encoder=encoder, decoder=dict(sizes), image_size=image_size, upsample=upsample)
        self.num_tokens = (image_size // self.stride) ** 2  # N, of a square grid
        self.token_dim = self.spec.dim                      # D
        self.output_size = image_size * upsample            # side of decoded images
        self.data = None  # the data set of its training; load_rae sets it ...
        self.step = None  # ... and the number of steps

        # Its decoder; the encoder comes later, or never
        self.encoder = None
        patch = self.stride * upsample  # pixels of a decoded token
        self.decoder = Pixels(unpatchify, patch)
        if self.spec.timm:
            self.decoder = Decoder(self.num_tokens, self.token_dim, patch=patch, **sizes)
        elif upsample > 1:
            raise UserError(f"{encoder} decodes its patches as they are: --upsample 1")

        # Statistics of the latents, which stage 1 measures, and of the encoder's pixels
        self.register_buffer("mean", torch.zeros(self.num_tokens, self.token_dim))
        self.register_buffer("var", torch.ones(self.num_tokens, self.token_dim))
        pixel_mean, pixel_std = torch.tensor(self.spec.pixels).view(2, 3, 1, 1)
        self.register_buffer("pixel_mean", pixel_mean, persistent=False)
        self.register_buffer("pixel_std", pixel_std, persistent=False)

    def load_encoder(self, weights=None):
        """Build the encoder, of weights as build_encoder takes them. Returns this autoencoder."""
        self.encoder = build_encoder(self.name, self.image_size, weights).to(self.mean.device)
        return self

    @property
    def std(self):
        return (self.var + 1e-5).sqrt()  # (N, D), never zero

    @property
    def latents(self):
        """A name of these latents: the encoder's, and the mean of its variances."""
        return f"{self.name} {self.var.double().mean():.6f}"

    @torch.no_grad()
    def tokens(self, images):
        """images (B,3,H,W), H = W, floats in [0,1] -> layer-normed patch tokens (B,N,D), fp32.

        Errors: no encoder; other shapes and types; values far from [0,1], which are looked for on
        CPUs alone, since on a GPU each look would wait for the device.
        """
        if self.encoder is None:
            raise UserError("this RAE was loaded to decode: load_encoder() builds its encoder")
        H = images.shape[-1]
        sound = images.is_floating_point() and images.shape[1:] == (3, H, H)
        if sound and images.is_cpu:
            sound = -.5 < images.min() <= images.max() < 1.5
        if not sound:
            raise UserError(f"images are {images.dtype} {tuple(images.shape)}: give square ones,"
                            " floats (B, 3, H, H) from 0 to 1")
        if self.upsample > 1 and images.shape[-1] == self.output_size:
            images = F.avg_pool2d(images, self.upsample)  # down to image_size
        side = self.image_size // self.stride * self.spec.patch  # of the encoder's input
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bicubic")
        return in_fp32(self.encoder)((images - self.pixel_mean) / self.pixel_std)

    def encode(self, images):
        """images (B,3,H,W) in [0,1] -> z (B,N,D), standardised by position and channel."""
        x = self.tokens(images)            # (B, N, D)
        return (x - self.mean) / self.std  # z: (B, N, D)

    def decode(self, z, decoder=None):
        """z (B,N,D) -> images (B,3,H',W'), not clamped to [0,1]; decoder: EMA's or DDP's."""
        x = z * self.std + self.mean                 # (B, N, D)
        x = (decoder or self.decoder)(x)             # (B, 3, H', W')
        return x * self.pixel_std + self.pixel_mean  # (B, 3, H', W')


# Its files

def fetch(repo, file):
    """The local path of a file of the Hugging Face hub, through the hub's cache."""
    import huggingface_hub
    huggingface_hub.utils.logging.set_verbosity_error()  # one sentence, not every retry
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:  # no network, a wrong proxy or mirror: each has its own kind
        raise UserError(f"cannot fetch {file} of {repo} from the Hugging Face hub"
                        f" ({type(error).__name__}); without a network bring that file: see"
                        " --encoder-weights, --disc-weights, and assets/release.py --from"
                        ) from None


def read_weights(path):
    """The dict in a .safetensors or torch file; no code in the file is run. torch's files are
    memory-mapped: ranks share the pages, and tensors that nobody uses are never read."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # not before torch 1.6
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception as error:  # torch and safetensors have many kinds
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} is cut short or damaged, or holds more than tensors and plain types"
                        f" ({said:.100}): remove it, and copy or download it again") from None


def unwrap(state):
    """The state dict in a published file: bare, or wrapped in `ema` or `model`."""
    return state.get("ema") or state.get("model") or state


def load_strict(module, state, what):
    """load_state_dict, with one sentence that names missing, foreign and misshapen weights."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        said = "; ".join(f"{line.strip():.120}" for line in str(error).split("\n")[1:4])
        raise UserError(f"{what}: weights of another model: {said}") from None


def newest_run(name, captioned=False):
    """The newest out/*/name, else the bundled demo's; captioned: of those trained on captions."""
    runs = sorted(Path("out").glob(f"*/{name}"), key=os.path.getmtime, reverse=True)
    if captioned:
        runs = [run for run in runs if read_weights(run).get("captions")]
        name = "text.pt"  # of the demo
    return runs[0] if runs else ROOT / "assets/demo" / name


def locate(path_or_name, file):
    """The path of a run's `file` (rae.pt, dit.pt). A run is named by its folder, by the file
    itself, or as release:NAME, which is converted to our format on first use."""
    if str(path_or_name).startswith("release:"):
        from assets.release import release
        found = release(str(path_or_name).removeprefix("release:")) / file
        if not found.is_file():
            raise UserError(f"{path_or_name} has no {file}: see python assets/release.py")
        return found
    path = Path(path_or_name)
    return path / file if path.is_dir() else path


def load_rae(path_or_name, device="cpu", decode_only=False):
    """An RAE for use (EMA decoder, eval mode): from a rae.pt, its run's folder or release:NAME.
    decode_only: without its encoder, for sampling. Errors: no file, or another kind of file."""
    path = locate(path_or_name, "rae.pt")
    saved = read_weights(path)
    if not {"config", "mean", "var", "ema"} <= saved.keys():
        raise UserError(f"{path} is no rae.pt, as train_decoder.py writes it (a dit.pt? a released"
                        " file? `release:NAME` reads those)")
    rae = RAE(**saved["config"])
    load_strict(rae.decoder, saved["ema"], path)
    rae.mean.copy_(saved["mean"])  # (N, D)
    rae.var.copy_(saved["var"])    # (N, D)
    rae.data = saved.get("data")
    rae.step = saved.get("step")
    if not decode_only:
        rae.load_encoder(saved["encoder"])
    return rae.eval().requires_grad_(False).to(device)


def default_data(rae):
    """The data set that an autoencoder was trained on, or that of its recipe."""
    return rae.data or ("shapes" if rae.name.startswith("tiny") else "data/imagenet")


# -------------------------------------------------------------------------------------------------
# The autoencoder ends here. What follows is what all scripts share.


# Randomness: every draw is seeded by (seed, step, position in the global batch), so that it is the
# same on any number of processes, for any micro-batch and after a restart

def mix(*parts):
    """Hash ints or int64 tensors, broadcast, to int64 in [0, 2^63): chained splitmix64."""
    def shift(h, bits):  # int64's >> keeps the sign: mask it away
        return (h >> bits) & ((1 << 64 - bits) - 1)

    # splitmix64's published constants, as the negative int64 of the same bits
    h = torch.zeros((), dtype=torch.int64)
    for part in parts:
        h = (h ^ part) + (0x9E3779B97F4A7C15 - 2 ** 64)  # int64 wraps around, as it should
        h = (h ^ shift(h, 30)) * (0xBF58476D1CE4E5B9 - 2 ** 64)
        h = (h ^ shift(h, 27)) * (0x94D049BB133111EB - 2 ** 64)
        h = h ^ shift(h, 31)
    return h & 0x7FFFFFFFFFFFFFFF


def normals(keys, count, device):
    """keys (B,) int64 on the CPU -> standard normals (B, count), row i from keys[i] alone."""
    rows = torch.empty(len(keys), count, device=device)
    generator = torch.Generator(device)  # one object, seeded anew for each row
    for row, key in zip(rows, keys.tolist()):
        row.normal_(generator=generator.manual_seed(key))
    return rows


# Images

def center_crop(image, size):
    """PIL image -> its centre, size x size, as ADM (Dhariwal 2021) crops ImageNet."""
    # ADM halves by boxes first: bicubic alone would give other pixels
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    sides = [round(side * size / min(image.size)) for side in image.size]  # the shorter one is `size`
    left, top = [(side - size) // 2 for side in sides]  # of the crop
    image = image.resize(sides, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, key):
    """Stage 1's augmentation: the shorter side to 1.5 x size, then a crop drawn from key."""
    image = TF.resize(image, size * 3 // 2, TF.InterpolationMode.BICUBIC)  # 384 for 256
    rng = np.random.default_rng(key)  # the sample's own, on any rank, after any resume
    top = rng.integers(image.height - size + 1)
    left = rng.integers(image.width - size + 1)
    return image.crop((left, top, left + size, top + size))


def read_image(path):
    """A file -> upright RGB PIL image. Errors: whatever its decoder raises; ValueError for values
    of unknown range, and for shapes that no crop can use."""
    with Image.open(path) as image:
        if max(image.size) > 20 * min(image.size):  # before a crop enlarges it to gigabytes
            raise ValueError(f"{image.width} x {image.height} pixels, longer than 20:1")
        image.load()  # a file that is cut short fails here, and not where EXIF may fail
        deep = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")  # 0 to 65535
        if image.mode == "F" or image.mode.startswith("I") and not deep:
            raise ValueError(f"mode {image.mode}, whose range of values is unknown")
        with suppress(Exception):  # damaged EXIF: the picture is sound, and stays as it lies
            image = ImageOps.exif_transpose(image)  # cameras write how they were held
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


def visible(name):
    """Whether a file or folder may be data: not hidden, and not what Macs and NAS add."""
    return not name.startswith(".") and name not in ("@eaDir", "__MACOSX")


def walk(path):
    """Yields (folder below path, name) of all files that may be data, sorted; a folder that is linked
    twice is entered once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(filter(visible, folders))
        below = os.path.relpath(folder, path).removeprefix(".")
        for name in sorted(filter(visible, names)):
            yield below, name


def folders_in(path):
    """Names of the folders in a folder that may be data, sorted."""
    names = os.listdir(path) if os.path.isdir(path) else []  # a file, or nothing, has none
    return sorted(name for name in names if visible(name) and os.path.isdir(Path(path, name)))


def splits(path, captioned=False):
    """(path/train, path/val or None) if train/ has images in class folders (captioned: anywhere) and the
    folders beside train/, val/, test/ have none; else (path, None)."""
    def has_images(*parts):
        return any(is_image_file(name) for _, name in walk(Path(path, *parts)))

    names = folders_in(path)
    inside = folders_in(Path(path, "train")) + [""] * captioned if "train" in names else []
    others = [name for name in names if name not in ("train", "val", "test")]
    if not any(has_images("train", name) for name in inside) or any(map(has_images, others)):
        return path, None
    return Path(path, "train"), Path(path, "val") if "val" in names else None


class Folder(Dataset):
    """Class folders, class/**/*.jpg: item (index, key) -> (uint8 (3,size,size), label, key).

    A file that cannot be read: with `train`, an image drawn from the key takes its place; else its
    item is None, which drop_broken leaves out. crop: stage 1's random crops; else the centre.
    size None: all images below path are one class, and stay as they are, all of one size.
    captioned: the label is the text in name.txt beside name.jpg, at any depth: one of its lines,
    chosen by the key.
    Errors: no folder, no class or one without images, classes that are splits.
    """
    SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")

    def __init__(self, path, size, train=False, crop=False, captioned=False):
        flat = captioned or size is None
        self.captioned = captioned
        self.size = size
        self.train = train
        self.crop = crop
        self.classes = [""] if flat else folders_in(path)

        # The files by class, and what is left out
        labels = {name: label for label, name in enumerate(self.classes)}
        self.samples = []  # [(path, label)]
        left_out = defaultdict(list)  # {kind: files}
        for folder, name in walk(path):
            file = os.path.join(path, folder, name)
            label = 0 if flat else labels.get(folder.split(os.sep)[0])
            kind = Path(name).suffix.lower()
            if label is None:
                left_out["beside class folders"].append(file)
            elif is_image_file(name) and captioned and not Path(file).with_suffix(".txt").is_file():
                left_out["images without a text"].append(file)
            elif is_image_file(name):
                self.samples.append((file, label))
            elif not captioned or kind != ".txt":
                left_out[kind].append(file)
        if left_out:
            kinds = sorted(left_out.items(), key=lambda item: -len(item[1]))[:6]
            kinds = (f"{len(files)} {kind} (such as {files[0]})" for kind, files in kinds)
            say(f"files that are not read: {', '.join(kinds)}")

        # Refuse what is no data set, or probably not the one that was meant
        filled = {label for _, label in self.samples}
        empty = [name for name in self.classes if labels[name] not in filled]
        parts = [name for name in self.classes if name.lower() in self.SPLITS]
        if not self.classes or not os.path.isdir(path):
            raise UserError(f"{path}: no such folder, or no class folder in it: images are expected"
                            f" as {path}/CLASS/*.jpg (of a flat folder, `mkdir {path}/all &&"
                            f" mv {path}/*.* {path}/all` makes one class)")
        if empty and captioned:
            raise UserError(f"{path}: no image with a text: photo.txt is expected beside photo.jpg")
        if empty:
            raise UserError(f"{path}: no image that is read in {', '.join(empty[:4]) or 'it'}: remove"
                            f" it, or add images ({', '.join(IMG_EXTENSIONS)})")
        if len(parts) > 1 or parts == self.classes:
            raise UserError(f"{path} has the class folders {', '.join(parts)}: parts of a data set"
                            f" are named {path}/train and {path}/val, with class folders in each")

        # Shared by loader processes: a broken file is named once and not opened again
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self.small = torch.zeros((), dtype=torch.bool).share_memory_()  # one is below `size`
        self.shape = None  # set where all files must have the same

    def __len__(self):
        return len(self.samples)

    def prepare(self, image, path, key):
        """PIL image -> uint8 (3,size,size)."""
        if self.size and min(image.size) < self.size and not self.small:
            self.small.fill_(True)
            print(f"WARNING: {path} has {image.width} x {image.height} pixels, and is enlarged"
                  f" to {self.size}, as are others like it", flush=True)
        if self.train and self.crop:
            image = random_crop(image, self.size, key)
        elif self.size:
            image = center_crop(image, self.size)
        if self.shape and (3, image.height, image.width) != self.shape:
            raise ValueError(f"{image.width} x {image.height} pixels, unlike the others")
        return TF.pil_to_tensor(image)

    def captions(self, index):
        """The lines of the text beside an image; the empty text is a caption."""
        text = Path(self.samples[index][0]).with_suffix(".txt").read_text("utf-8-sig", "replace")
        return [line.strip() for line in text.splitlines() if line.strip()] or [""]

    def read(self, index, key):
        """The item of a file, or None if it is broken: whatever its decoder raises."""
        path, label = self.samples[index]
        if not self.broken[index]:
            try:
                if self.captioned:
                    lines = self.captions(index)
                    label = lines[key % len(lines)]
                return self.prepare(read_image(path), path, key), label, key
            except Exception as error:
                self.broken[index] = True
                print(f"skipped {path}: {error}", flush=True)

    def __getitem__(self, item):
        index, key = item
        found = self.read(index, key)
        draws = np.random.default_rng([key, 1])  # other draws than the crop's
        while found is None and self.train:
            if self.broken.all():
                raise UserError("not one image of the folder can be read: give other --data")
            found = self.read(draws.integers(len(self)), key)
        return found


def open_data(data, size, crop=False, captioned=False):
    """The training set: `shapes`, or an image folder (its train/, if it is laid out in splits).
    Items: (index, key) -> (uint8 image (3,size,size), label or caption, key)."""
    if data == "shapes":
        from assets.shapes import Shapes
        return Shapes(size, captioned=captioned)
    folder, _ = splits(data, captioned)
    return Folder(folder, size, train=True, crop=crop, captioned=captioned)


def open_val(val, data, size, captioned=False):
    """The held-out set, never trained on: --val (its val/, if it has splits), held-out shapes,
    DATA's val/, or None. Items as open_data's."""
    if (val or data) == "shapes":
        from assets.shapes import Shapes
        return Shapes(size, first=50_000, count=10_000, captioned=captioned)
    _, held_out = splits(val or data, captioned)
    return Folder(held_out or val, size, captioned=captioned) if held_out or val else None


def centre_crops(dataset):
    """The data set without augmentation, where a broken file's item is None."""
    dataset = copy(dataset)
    dataset.train = False
    return dataset


# Images in order

def worker_count(dataset, workers=None):
    """The number of loader processes: as asked; else 0 for drawn images, for files one a core, up to 8."""
    if workers is not None or not hasattr(dataset, "samples"):
        return workers or 0
    cores = len(os.sched_getaffinity(0))  # that this process may use
    return min(8, max(1, cores // int(from_torchrun("LOCAL_WORLD_SIZE", 1))))


def start_worker(_):
    """A loader process ignores STOPS: the main one needs it until it has saved, and then ends it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout = Output(sys.stdout)


def end_workers():
    """At exit, however a script ends: Python would wait for loader processes for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where one dies
    for process in multiprocessing.active_children():
        process.kill()


def drop_broken(items):
    """A batch of the items that are there (Folder gives None for a broken file), or None."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


def batches(dataset, order, batch, workers, device):
    """The data set's items by `order`, lists of them: yields images (b,3,H,W) in [0,1] on the device,
    labels (b,) or a list of captions, and keys (b,)."""
    count = worker_count(dataset, workers)
    size = getattr(dataset, "size", None) or 0
    ranks = int(from_torchrun("LOCAL_WORLD_SIZE", 1))  # they share the machine's /dev/shm
    need = ranks * (2 * count + 1) * batch * 3 * size ** 2  # each process keeps two batches ready
    if count and os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < need:
        raise UserError(f"{ranks * count} loader processes need {need / 2 ** 20:.0f} MiB in /dev/shm, which"
                        f" has {shutil.disk_usage('/dev/shm').free / 2 ** 20:.0f}: give docker run"
                        " --shm-size=8g, or --workers 0")
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # after multiprocessing's own handler, so that it runs before
    loader = DataLoader(dataset, batch_sampler=order, num_workers=count, collate_fn=drop_broken,
                        worker_init_fn=start_worker, pin_memory=device.type == "cuda")
    for part in loader:
        if part is not None:  # all of its files may be broken
            images, labels, keys = part
            # 8 bits until here: a quarter of the bytes between processes, and to the device
            yield images.to(device, non_blocking=True).float() / 255, labels, keys


def evenly(length, most=None):
    """At most `most` positions all over a data set, however its classes are ordered."""
    # A fixed stride could always hit the same class: shift the pick a little in every part
    count = min(length, most or length)  # of parts, each of which gives one
    return [i * length // count + i % (length // count) for i in range(count)]


def in_order(dataset, batch, device, rank=0, world=1, workers=None, most=None):
    """Batches of each image once, or of `most` images; ranks take turns. Keys count the images from 0;
    those of broken files are missing."""
    items = [(index, i) for i, index in enumerate(evenly(len(dataset), most))][rank::world]
    order = [items[i:i + batch] for i in range(0, len(items), batch)]
    return batches(dataset, order, batch, workers, device)


def try_to_read(*datasets, workers=None, most=1000):
    """Read up to `most` files of each data set, and end the run if more than 1 % are broken: training
    would see others in their place. Call it on all ranks."""
    for dataset in datasets:
        if not hasattr(dataset, "samples"):
            continue  # None, or images that are drawn
        readable = torch.zeros(())
        ranks = dist.get_rank(), dist.get_world_size()
        for images, *_ in in_order(centre_crops(dataset), 64, torch.device("cpu"), *ranks, workers, most):
            readable += len(images)
        dist.all_reduce(readable)
        tried = min(most, len(dataset))
        lost = tried - int(readable)
        if lost:
            say(f"{lost} of {tried} images cannot be read")
        if lost > tried / 100:
            raise UserError(f"{lost} of {tried} images cannot be read, see above: mend or remove"
                            " them; up to 1 % is allowed")


def micro_batch(batch, micro, world):
    """(images of a rank at a time, accumulation): the fewest equal parts of at most `micro`."""
    if batch % world:
        raise UserError(f"--batch {batch} does not divide over {world} ranks: give a multiple")
    share = batch // world  # of a rank
    accum = next(k for k in range(1, share + 1) if share % k == 0 and share // k <= micro)
    return share // accum, accum


def shuffled(length, batch, accum=1, seed=0, step=0, rank=0, world=1):
    """Micro-batches [(index, key)]: the data set in permutations, one per (seed, epoch), of which
    step s takes the images from s * batch on; key = hash(seed, step, position in the batch)."""
    @lru_cache(2)  # a batch may reach into the next epoch
    def permutation(epoch):
        generator = torch.Generator().manual_seed(int(mix(seed, epoch)))
        return torch.randperm(length, generator=generator).tolist()

    # A key belongs to a position in the batch, whichever rank and micro-batch it falls to
    own = torch.arange(batch).view(accum, world, -1)[:, rank]  # (accum, images of a micro-batch)
    while True:
        for positions in own:
            keys = mix(seed, step, positions).tolist()
            yield [(permutation(at // length)[at % length], key)
                   for at, key in zip((step * batch + positions).tolist(), keys)]
        step += 1


# How alike two images are: a number for each pair of images (B,3,H,W) in [0,1]

def psnr(a, b):
    """-10 log10(mean squared error) in dB (B,), float64; 100 dB when identical."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity (B,), float64 (Wang 2004): Gaussian windows of 11 x 11, sigma 1.5.
    Errors: images below 11 pixels."""
    if min(a.shape[2:]) < 11:
        raise UserError(f"images of {tuple(a.shape[2:])} pixels, and SSIM needs at least 11 x 11")
    window = torch.signal.windows.gaussian(11, std=1.5, dtype=torch.float64, device=a.device)
    window = (window / window.sum()).view(1, 1, 11, 1)  # down, then across: separable

    def blur(x):  # (B,3,H,W) -> (3B,1,H-10,W-10)
        return F.conv2d(F.conv2d(x.flatten(0, 1)[:, None], window), window.mT)

    # Local means, variances and covariance, each (3B, 1, H-10, W-10)
    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2    # E a^2 - (E a)^2
    var_b = blur(b * b) - mean_b ** 2
    cov = blur(a * b) - mean_a * mean_b  # E ab - E a E b

    # Luminance, times contrast and structure
    c1, c2 = 0.01 ** 2, 0.03 ** 2  # against small denominators
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    score = luminance * (2 * cov + c2) / (var_a + var_b + c2)
    return score.view(len(a), -1).mean(1)  # of each image


def download(url, flag):
    """A published state dict, through torch's cache; flag: the option that takes its file."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = path.stem.rsplit("-", 1)[1]  # part of the name, and checked
            torch.hub.download_url_to_file(url, path, digest, progress=False)
        except Exception as error:  # no network, a wrong proxy: each has its own kind
            raise UserError(f"cannot download {path.name} ({error}): bring that file and name it"
                            f" with {flag}") from None
    return read_weights(path)


VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"


def load_lpips(device="cpu", vgg=None):
    """LPIPS with VGG, frozen: images (B,3,H,W), both in [-1,1] -> (B,1,1,1).

    vgg: None for torchvision's weights, which are downloaded, the path of that file, or "random".
    """
    import lpips  # wanted here alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for linear in net.lins:
        linear.forward = in_fp32(linear.forward)  # small differences, too fine for bf16
    # The package brings the five weighting layers; VGG16 beneath them is downloaded
    if vgg != "random":
        state = read_weights(vgg) if vgg else download(
            VGG, "--lpips-vgg PATH, or train without LPIPS: --lpips-weight 0")
        # Its five slices are one numbered sequence in the file
        names = {f"features.{key.split('.', 1)[1]}": key for key in net.net.state_dict()}
        own = {names[key]: value for key, value in state.items() if key in names}
        load_strict(net.net, own, "VGG16 of LPIPS")
    return net.to(device).eval().requires_grad_(False)


# Optimiser steps

def autocast_for(dtype, device):
    """(dtype, by default bf16 where hardware has it; a function that makes its contexts)."""
    if dtype is None:
        if device.type == "cuda":
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # torch 2.6 has no list of capabilities: fp32
            has = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
        dtype = "bf16" if has else "fp32"
    return dtype, partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bf16")


def compile_blocks(blocks, device):
    """torch.compile of each block, after a try that tells whether this machine can do it."""
    try:
        torch.compile(torch.relu)(torch.ones(8, device=device))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--compile does not work here, {said:.120}:"
                        " it needs a C++ compiler, on GPUs Triton") from None
    for block in blocks:
        block.compile()


def ddp_in_fixed_order(module, autocast, *inputs):
    """DistributedDataParallel around a module, whose buffers are equal on all ranks by themselves.

    DDP orders its buckets by the first backward pass that it sees, and the order decides how the
    ranks' gradients are summed up. That pass is here, on `inputs`: so a resumed run sums as one
    that never stopped. Call it on all ranks.
    """
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # DDP sent them above; not in every step
    with autocast():
        out = ddp(*inputs)
    out.sum().backward()
    ddp.zero_grad(set_to_none=True)
    return ddp


def apply_gradients(optimizer, lr, clip=0.0):
    """One optimiser step, the gradients' norm clipped to `clip` (0: no clipping). Skipped, on the
    device, without a sync, if a gradient is not finite; returns whether (a tensor, 1 or 0)."""
    group = optimizer.param_groups[0]  # there is only one
    group["lr"] = lr                   # a schedule is a function of the step
    norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
    if clip:
        nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
    # AdamW(fused=True) reads found_inf, which GradScaler would set: 1 leaves the weights as they are
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SLURM, Ctrl-C, a closed terminal


def stop_signal():
    """A flag (a CPU tensor) that STOPS raise, so that the run saves and ends. The second signal
    of a kind ends a lone process at once; torchrun, which repeats signals, kills after 30 s."""
    flag = torch.zeros(())  # a tensor, for any_rank

    def stop(number, _):
        flag.fill_(1)
        if not from_torchrun("RANK"):
            signal.signal(number, signal.SIG_DFL)

    for number in STOPS:
        signal.signal(number, stop)
    return flag


def any_rank(flag):
    """Whether the flag is up on any rank, so that all stop after the same step. Call it on all."""
    flag = flag.clone()  # on the host: no device sync
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def count_flops(build, *inputs):
    """(parameters, FLOPs of the forward pass) of the model of `build`, without computing it."""
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build()
        model(*(x.to("meta") if torch.is_tensor(x) else x for x in inputs))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def bytes_for_backward(build, *inputs):
    """What a forward pass keeps for the backward pass, in bf16 on a GPU: counted on fake CUDA
    tensors. None where torch cannot do it (2.6 asks the driver)."""
    kept = {}

    def keep(x):
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            model = build()
            fake = [torch.empty_like(x, device="cuda") if torch.is_tensor(x) else x for x in inputs]
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a GPU
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                model(*fake)
        return sum(kept.values())
    except RuntimeError:
        return None
    finally:
        torch.set_autocast_enabled("cuda", False)


def say_cost(what, build, *inputs):
    """Tell what training costs, before its first step; returns the forward FLOPs of an image."""
    images = len(inputs[0])
    size, flops = count_flops(build, *inputs)  # parameters; FLOPs of all images
    kept = dist.get_rank() == 0 and bytes_for_backward(build, *inputs)  # for one rank to tell
    memory = f"{size * 20 / 2 ** 30:.2g} GiB of weights, gradients, AdamW's moments and average"
    if kept:
        memory += f", about {kept / 2 ** 30:.2g} GiB for the backward pass of {images} images in bf16"
    say(f"{what} of {size / 1e6:.1f} M parameters, {flops / images / 1e9:.3g} GFLOPs an image; {memory}")
    return flops / images


def warn_of_average(decay, steps):
    """Samples and reconstructions use the average of the weights: a short run may hardly move it."""
    share = decay ** steps
    if share > 0.05:
        say(f"WARNING: after {steps} steps {share:.0%} of the average of the weights is still what it"
            " began with: lower --ema, or train for longer")


def remember(history, **values):
    """Append tensors to the lists of `history`, on their device."""
    for name, value in values.items():
        history[name].append(value.detach())


def mean_over_ranks(history, run, step):
    """{name: mean} of what was remembered since the last call, over steps and ranks; `skipped`: how
    many steps. The one device sync. Call it on all ranks. Errors: ten skipped steps in a row."""
    in_a_row, = history.pop("in a row", [0])
    for flag in history["skipped"]:
        in_a_row = (in_a_row + 1) * flag
    # One row for all: the means over steps, and the skipped steps in a row
    table = torch.stack([*(torch.stack(values).mean() for values in history.values()), in_a_row])
    dist.all_reduce(table)
    *means, lost = (table / dist.get_world_size()).tolist()
    means = dict(zip(history, means))
    means["skipped"] = round(means["skipped"] * len(history["skipped"]))
    # Skipping helps against one bad batch, not against weights that have gone astray
    if lost >= 10:
        raise UserError(f"step {step}: the last {lost:.0f} had non-finite gradients and were skipped"
                        f" ({means}); the checkpoint in {run} is the last good state: resume with"
                        " a lower --lr, or with --dtype fp32")
    history.clear()
    history["in a row"] = [in_a_row]
    return means


# Runs and their files

def at_least(low, kind=int, most=math.inf):
    """An argparse type: a finite number from `low` to `most`."""
    def number(text):
        value = kind(text)
        if not low <= value <= most or math.isinf(value):  # no comparison is true of nan
            bounds = f"at least {low}" + (f" and at most {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of a flag that has one; the help of other flags says what happens."""
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Output:
    """sys.stdout or sys.stderr, which drops what it cannot write and escapes what it cannot encode: no
    message may end the work. (Ctrl-C ends `| tee log` as well; a file's name may be any bytes.)"""
    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


def say(*words):
    """print, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


def speed(since, step, total, batch, flops):
    """{images_per_s, tflops, eta in s}; since: (step, time) of the last line of the log, or pause."""
    rate = (step - since[0]) / (time.time() - since[1])  # steps per second
    return dict(images_per_s=rate * batch, tflops=rate * batch * 3 * flops / 1e12,  # backward: 2 forward
                eta=(total - step) / rate)


def record(run, **values):
    """One line to RUN/log.jsonl and to the terminal, on rank 0."""
    if dist.get_rank():
        return
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None  # JSON has no nan
    with open(Path(run, "log.jsonl"), "a") as file:
        file.write(json.dumps(values) + "\n")
    if "eta" in values:
        values["eta"] = timedelta(seconds=round(values["eta"]))
    say("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                  for key, value in values.items() if value is not None))


def writable(path, picture=False):
    """The path of a file to be written, tried now and not after the long work: its folder is made.
    Errors: no file can be written there, or no picture of such a name."""
    path = Path(path)
    if picture and not is_image_file(str(path)):
        raise UserError(f"{path} is no picture's name: end it in .png or .jpg")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another place") from None
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    return path


def lock_run(run):
    """Make the run's folder, and keep other processes from training there until this one ends."""
    if dist.get_rank():
        return
    writable(Path(run, ".lock"))
    lock_run.file = open(Path(run, ".lock"), "w")  # held open: closed, it would be free
    try:
        fcntl.lockf(lock_run.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {run}: wait for it, or name another"
                        " --run") from None
    except OSError:  # a file system without locks
        say(f"WARNING: files cannot be locked in {run}: run one command there at a time")


def refuse_changes(what, then, now, advice):
    """End the run if a setting that a file recorded, `then`, differs from `now`; others are not compared."""
    changed = [f"{key} was {then[key]}, is {value}" for key, value in now.items()
               if key in then and then[key] != value]
    if changed:
        raise UserError(f"{what} ({'; '.join(changed):.400}): {advice}")


def resume(path, fixed):
    """(checkpoint, step) of an earlier start, or (None, 0); fixed: settings that must be as then.
    Call it on all ranks. Errors: ranks that see different files; other settings."""
    # A folder that machines do not share would let them train apart, or hang at an all-reduce
    saved = read_weights(path) if path.exists() else None
    step = saved.get("step", 0) if saved else 0
    steps = [None] * dist.get_world_size()  # each rank's
    dist.all_gather_object(steps, step)
    if len({*steps}) > 1:
        raise UserError(f"ranks find {path} at different steps, {min(steps)} to {max(steps)}: the"
                        " run's folder must be on a file system that all machines share")
    if saved and "fixed" not in saved:
        raise UserError(f"{path} is packed for use and cannot be resumed: name another --run")
    if saved:
        then = dict.fromkeys(fixed) | saved["fixed"]  # what an older run does not name was None
        refuse_changes(f"{path} belongs to other settings", then, fixed,
                       "give them again, or another --run")

    # Steps after the checkpoint will be run, and logged, again
    log = path.parent / "log.jsonl"
    if dist.get_rank() == 0 and log.exists():
        kept = []
        for line in log.read_text().splitlines():
            entry = json.loads(line) if line.endswith("}") else None  # the last may be cut short
            if entry and (entry["stage"] != fixed["stage"] or entry["step"] <= step):
                kept.append(f"{line}\n")
        Path(f"{log}.tmp").write_text("".join(kept))
        os.replace(f"{log}.tmp", log)
    return saved, step


def restore(parts, saved):
    """What was saved, back into {name: module or optimiser}; a name that is not there stays new."""
    for name, part in parts.items():
        if saved.get(name):
            part.load_state_dict(saved[name])
        # An optimiser may keep the file's own tensors, and so the replaced file on the disk
        for state in part.state.values() if isinstance(part, torch.optim.Optimizer) else ():
            state.update({key: value.clone() for key, value in state.items()})


def save_checkpoint(path, **state):
    """Write plain types, and the state of modules and optimisers, on rank 0: to a temporary file, which
    is renamed, so that the old one stays if this is killed. Errors: no room, no such place."""
    if dist.is_initialized() and dist.get_rank():
        return
    state = {key: value.state_dict() if hasattr(value, "state_dict") else value
             for key, value in state.items()}
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    versions = dict(torch=str(torch.__version__), timm=timm.__version__)  # for who debugs it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(dict(state, versions=versions), file)
            file.flush()             # from Python to the kernel ...
            os.fsync(file.fileno())  # ... and to the disk, before the old one goes
        os.replace(temporary, path)  # at once, or not at all
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} could not be written ({error}): make room, or name another place,"
                        " and start the same command again") from None
    finally:
        if temporary.is_file():  # only if something failed
            temporary.unlink()


def absolute_path(name):
    """An absolute path, so that the name holds in every folder; `shapes` and release:NAME stay."""
    name = str(name)
    return name if name == "shapes" or name.startswith("release:") else str(Path(name).resolve())


def save_picture(images, path, nrow):
    """Images (B,3,H,W) around [0,1] as a grid of `nrow` columns; small ones are enlarged."""
    zoom = max(1, 96 // images.shape[-1])  # whole pixels: nothing is smoothed
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_image(images.clamp(0, 1), path, nrow=nrow)


# Processes

def from_torchrun(name, default=None):
    """One of torchrun's variables. Without torchrun, variables of these names are ignored."""
    return os.environ[name] if "TORCHELASTIC_RUN_ID" in os.environ else default


def start():
    """Join torchrun's process group, or make one for itself: (device, rank, world size)."""
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    device = torch.device("cpu")
    options = {}
    if torch.cuda.is_available():  # a GPU for each process
        device = torch.device("cuda", int(from_torchrun("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        options["device_id"] = device

    # One way for one process and many: no loop asks whether it is alone
    if not dist.is_initialized():
        if not from_torchrun("RANK"):
            options |= dict(store=dist.HashStore(), rank=0, world_size=1)  # no network
        # While rank 0 saves, the others wait: longer than NCCL's ten minutes, if it must be
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1), **options)
        atexit.register(leave)
    return device, dist.get_rank(), dist.get_world_size()


def leave():
    """End the process group at exit, after everything that refers to it is gone.

    torch 2.6 can deadlock where DDP, or the group, frees gloo's threads while it holds Python's
    lock. The backend's own object frees them without the lock: so that goes last.
    """
    for name in ("last_exc", "last_value", "last_traceback"):  # an error's frames hold DDP
        vars(sys).pop(name, None)
    gc.collect()  # DDP and its hooks refer to each other
    if dist.is_initialized():
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        backends = [dist.group.WORLD._get_backend(torch.device(kind)) for kind in kinds]
        dist.destroy_process_group()
        backends.clear()


def command(script, *flags):
    """A command line to be shown, in which blanks are quoted."""
    return shlex.join(["python", script, *map(str, flags)])


def main():
    parser = argparse.ArgumentParser(description="Reconstruct images with an RAE.")
    add = parser.add_argument
    add("images", nargs="+", help="image files")
    add("--run", help="run folder, rae.pt or release:NAME (default: newest in out/, else the demo)")
    add("--out", default="reconstruction.png", help="the picture (default: %(default)s)")
    args = parser.parse_args()
    device, *_ = start()
    writable(args.out, picture=True)
    run = args.run or newest_run("rae.pt")
    rae = load_rae(run, device)

    # Photographs, cropped as ImageNet's
    side = rae.output_size
    images = []
    for path in args.images:
        try:
            image = read_image(path)
        except Exception as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if min(image.size) < side:
            print(f"WARNING: {path}: {image.width} x {image.height} pixels, enlarged to {side}")
        images.append(TF.to_tensor(center_crop(image, side)))
    images = torch.stack(images).to(device)  # (B, 3, H, W)

    # There and back
    with torch.no_grad():
        copies = rae.decode(rae.encode(images)).clamp(0, 1)  # (B, 3, H, W)
    save_picture(torch.cat([images, copies]), args.out, nrow=len(images))
    trained = f", trained for {rae.step} steps" if rae.step else ""
    data = default_data(rae)
    features = ("--features", "tiny") if data == "shapes" else ()
    print(f"wrote {args.out}: originals above reconstructions by {run}{trained}, mean PSNR"
          f" {psnr(images, copies).mean():.2f} dB over {len(images)} images."
          f" Next: {command('fid.py', '--rae', run, '--data', data, *features)}")


if __name__ == "__main__":
    main()

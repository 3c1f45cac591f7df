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
import gc
import math
import os
import pickle
import signal
import struct
import sys
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
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
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import save_image

ROOT = Path(__file__).parent


# What every script needs: errors of one sentence, numbers within bounds, fp32 where it matters

class UserError(SystemExit, ValueError):  # ends a script; who imports us may catch a ValueError
    """One sentence: what was given, what was wanted, what to do. No traceback."""


def at_least(low, kind=int, most=math.inf):
    """An argparse type: a finite number from `low` to `most`."""
    def number(text):
        value = kind(text)
        if not low <= value <= most or math.isinf(value):  # no comparison is true of nan
            bounds = f"at least {low}" + (f" and at most {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value
    return number


@contextmanager
def writing(path):
    """A write that fails ends the run in a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} could not be written ({error}): make room, or name another"
                        " place, and start the same command again") from None


def check_picture(path):
    """Refuse, before any work, what cannot be a picture's name."""
    if Path(path).is_dir() or Path(path).suffix.lower() not in IMG_EXTENSIONS:
        raise UserError(f"--out {path} names no picture: give a file that ends in .png or .jpg")


def in_fp32(function):
    """Decorator: no autocast, bf16 arguments widened to fp32: eight bits would spoil this."""
    def widened(x):
        return x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x

    @wraps(function)
    def wrapped(*args):  # the last one is a tensor
        with torch.autocast("cuda" if args[-1].is_cuda else "cpu", enabled=False):
            return function(*map(widened, args))
    return wrapped


# Randomness belongs to a sample, not to a batch: ranks, accumulation, resuming change nothing

def mix(*parts):
    """Hash ints or int64 tensors, broadcast, to int64 in [0, 2^63): chained splitmix64."""
    def shift(h, bits):  # int64's >> keeps the sign: mask it away
        return (h >> bits) & ((1 << 64 - bits) - 1)

    h = torch.zeros((), dtype=torch.int64)
    for part in parts:  # stirred in one after the other
        h = (h ^ part) - 0x61C8864680B583EB  # int64 wraps around, as it should
        h = (h ^ shift(h, 30)) * -0x40A7B892E31B1A47
        h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15
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
    sides = [round(side * size / min(image.size)) for side in image.size]
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
    """A file -> upright RGB PIL image."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)  # cameras write how they were held
        if image.mode.startswith("I;16"):       # 16-bit grey: convert() would clip it
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


BROKEN = (OSError, ValueError, SyntaxError, KeyError, IndexError, TypeError, struct.error,
          Image.DecompressionBombError)  # what PIL raises on files that are damaged


class Folder(Dataset):
    """An ImageFolder tree, class/*.jpg: (index, key) -> (uint8 (3,size,size), label, key).

    A file that cannot be decoded is named once. In training the next one takes its place: batches
    keep their size. Otherwise its item is None, which `good` leaves out.
    """
    def __init__(self, path, size, train=False, crop=False):
        # The files, class by class; each image once
        try:
            files = ImageFolder(path, allow_empty=True)  # class/name.jpg, sorted
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no such folder, or no class folder in it: images are expected"
                            f" as {path}/CLASS/*.jpg (of a flat folder, `mkdir {path}/all &&"
                            f" mv {path}/*.* {path}/all` makes one class)") from None
        if not files.samples:
            raise UserError(f"{path}: no image in any of its {len(files.classes)} class folders")
        places = {os.path.dirname(file) for file, _ in files.samples}
        if len({os.path.realpath(place) for place in places}) < len(places):
            raise UserError(f"{path}: a link leads into a folder that is there already, whose images"
                            " would be seen twice: remove the link")

        self.samples = files.samples  # [(path, label)]
        self.classes = files.classes
        self.size = size
        self.train = train
        self.crop = crop
        # Shared by workers, so that each is told once: broken files, and one that is too small
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()
        self.small = torch.zeros((), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.samples)

    def prepare(self, path, key):
        """File -> uint8 (3, size, size)."""
        image = read_image(path)  # of any size
        if min(image.size) < self.size and not self.small:
            self.small.fill_(True)
            print(f"WARNING: {path} has {image.width} x {image.height} pixels, and is enlarged"
                  f" to {self.size}, as are others like it", flush=True)
        if self.train and self.crop:
            return TF.pil_to_tensor(random_crop(image, self.size, key))
        return TF.pil_to_tensor(center_crop(image, self.size))

    def __getitem__(self, item):
        index, key = item
        for place in range(index, index + len(self)):
            place = place % len(self)  # after the last the first
            path, label = self.samples[place]
            try:
                return self.prepare(path, key), label, key
            except BROKEN as error:
                if not self.broken[place]:
                    print(f"skipped {path}: {error}", flush=True)
                self.broken[place] = True  # for all workers
            if not self.train:
                return None
        raise UserError("not one image of the folder can be decoded: give other --data")


def open_data(data, size, crop=False):
    """The training set: `shapes`, or an image folder (its train/, if any)."""
    if data == "shapes":
        from assets.shapes import Shapes
        return Shapes(size)
    inner = Path(data, "train")  # as in ImageNet
    return Folder(inner if inner.is_dir() else data, size, train=True, crop=crop)


def open_val(val, data, size):
    """The held-out set, never trained on: --val, held-out shapes, DATA/val, or None."""
    if (val or data) == "shapes":
        from assets.shapes import Shapes
        return Shapes(size, first=50_000, count=10_000)  # training has those before
    if val or Path(data, "val").is_dir():
        return Folder(val or Path(data, "val"), size)
    return None


def worker_count(dataset, workers=None):
    """Loader processes: as asked; else none for drawn images, for files a core each, up to 8."""
    if workers is not None:
        return workers
    if not hasattr(dataset, "samples"):
        return 0
    # The cores that this process may use; macOS does not say
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return min(8, max(1, len(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def quiet_worker(_):
    """Ctrl-C, torchrun, SLURM signal loader processes too: if they died, no run could save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # they end with the main process


def good(items):
    """A batch of the items that are there (Folder gives None for a broken file), or None."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


def spread(length, most=None):
    """At most `most` places all over a data set, however its classes are ordered."""
    # Of equal parts, the i-th place of part i: a bare stride might meet one class alone
    count = min(length, most or length)
    return [i * length // count + i % (length // count) for i in range(count)]


def in_order(dataset, batch, device, rank=0, world=1, workers=None, most=None):
    """Each image once, or `most` of them, spread; ranks take turns. Yields images (b,3,H,W) in
    [0,1], labels (b,) and numbers (b,) counted from 0, those of broken files missing."""
    # This rank's places, in batches
    items = [(place, i) for i, place in enumerate(spread(len(dataset), most))][rank::world]
    order = [items[i:i + batch] for i in range(0, len(items), batch)]
    loader = DataLoader(dataset, batch_sampler=order, num_workers=worker_count(dataset, workers),
                        collate_fn=good, worker_init_fn=quiet_worker)

    # 8 bits until here: a quarter of the bytes between processes, and to the device
    for part in loader:
        if part is not None:  # all of its files may be broken
            images, labels, numbers = part
            yield images.to(device).float() / 255, labels.to(device), numbers


# Frozen encoders

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # pixel mean and standard deviation
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TANH = dict(act_layer=partial(nn.GELU, approximate="tanh"))  # timm's has the exact one
TINY = dict(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)


class Encoder(NamedTuple):
    timm: str               # timm's name (sdvae: its repository); empty: pixels
    image: int              # for images of this side ...
    input: int              # ... the encoder's input has this one
    patch: int              # pixels per token in the encoder's input
    dim: int                # channels of a token
    pixels: tuple           # pixel mean and standard deviation
    antialias: bool = True  # of resampled positions, as in the reference
    options: dict = {}      # in which it differs from timm's model of that name

    @property
    def stride(self):  # image pixels per token
        return self.image * self.patch // self.input


ENCODERS = {  #            timm model                            image input patch dim  pixels
    "dinov2_s":  Encoder("vit_small_patch14_reg4_dinov2.lvd142m", 256, 224, 14,  384, IMAGENET),
    "dinov2_b":  Encoder("vit_base_patch14_reg4_dinov2.lvd142m",  256, 224, 14,  768, IMAGENET),
    "dinov2_l":  Encoder("vit_large_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 1024, IMAGENET),
    "siglip2_b": Encoder("vit_base_patch16_siglip_256.v2_webli",  256, 256, 16,  768, HALF, options=TANH),
    "mae_b":     Encoder("vit_base_patch16_224.mae",              256, 256, 16,  768, IMAGENET, False),
    "dino_s8":   Encoder("vit_small_patch8_224.dino",             224, 224,  8,  384, IMAGENET, options=TANH),
    "sdvae":     Encoder("stabilityai/sd-vae-ft-ema",             256, 256, 16,   16, HALF, options=dict(
                         block_out_channels=(128, 256, 512, 512), layers_per_block=2)),
    "pixel":     Encoder("",                                      256, 256, 16,  768, HALF),
    # for a laptop: 16 tokens of a 32 px image; `tiny` saw labels, the others none: MAE, a VAE, pixels
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
    """(B,N,3*patch*patch) -> (B,3,h*patch,w*patch): patchify backwards, of square images."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))  # (B, h, w, row, column, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class Patches(nn.Module):
    """Encoder of pixels (Table 11), by patchify; their decoder, by unpatchify."""
    def __init__(self, turn, patch):
        super().__init__()
        self.forward = partial(turn, patch=patch)  # no weights, nothing to train


class SDVAE(nn.Module):
    """Stable Diffusion's VAE: (B,3,h,w) -> the posterior's mean (B,hw/256,16)."""
    def __init__(self, **sizes):
        super().__init__()
        try:
            from diffusers import AutoencoderKL  # wanted here alone
        except ImportError:
            raise UserError("the encoder sdvae needs diffusers: pip install diffusers") from None
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, **sizes)
        self.encoder = vae.encoder  # its decoder is not wanted: ours is trained
        self.quant_conv = vae.quant_conv

    def forward(self, x):
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, 1)  # each (B, 4, h/8, w/8)
        return 0.18215 * patchify(mean, 2)                      # about variance 1


class PatchNorm(nn.Module):
    """An encoder's last layer: patch tokens, each of mean 0 and variance 1 over its channels.

    [CLS] and registers are dropped. The pretrained norm's scale and shift would be undone by
    latent statistics anyway, but the noise of stage 1 is measured against these tokens.
    """
    def __init__(self, extra, eps):
        super().__init__()
        self.extra = extra
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x[:, self.extra:], x.shape[-1:], eps=self.eps)


def build_encoder(name, image_size, weights=None, flag="--encoder-weights PATH"):
    """The frozen encoder: normalised pixels (B,3,h,w) -> layer-normed patch tokens (B,N,D).

    weights: None for the pretrained ones (the hub's; `tiny`: bundled), "random", a state dict as
    timm, diffusers, DINOv2's or MAE's authors write it, or its path. Source: section 3.
    """
    spec = ENCODERS[name]
    if not spec.timm:
        return Patches(patchify, spec.patch)
    grid = [image_size // spec.stride] * 2  # of tokens
    if name == "sdvae":
        model = SDVAE(**spec.options)
        hub = spec.timm, "diffusion_pytorch_model.safetensors"
        native = ()  # no positions to resample
    else:
        # A ViT without its classifier, and with our last layer
        options = dict(num_classes=0, global_pool="") | spec.options
        model = timm.create_model(spec.timm, **options)
        model.norm = PatchNorm(model.num_prefix_tokens, model.norm.eps)
        hub = f"timm/{spec.timm}", "model.safetensors"

        # Its positions are resampled to our grid as the reference does it
        native = model.pos_embed.shape
        extra = 0 if model.no_embed_class else model.num_prefix_tokens
        resample = partial(resample_abs_pos_embed, new_size=grid, antialias=spec.antialias,
                           num_prefix_tokens=extra)
        model.pos_embed = nn.Parameter(resample(model.pos_embed.detach()))
        model.patch_embed.set_input_size(img_size=grid[0] * spec.patch)

    # Weights: the bundled ones, the hub's, or those that were named
    if weights is None:
        bundled = ROOT / f"assets/{name}.pt"  # tiny and its kin
        weights = bundled if bundled.exists() else fetch(*hub, f"{flag} (encoder {name})")
    if str(weights) != "random":  # random: as it was initialised
        state = dict(unwrap(weights if isinstance(weights, dict) else read_weights(weights)))
        if "register_tokens" in state:  # DINOv2's own file: timm has [CLS]'s position in [CLS]
            position, state["pos_embed"] = state["pos_embed"].tensor_split([1], 1)
            state["cls_token"] = state["cls_token"] + position
            state["reg_token"] = state.pop("register_tokens")
        if getattr(state.get("pos_embed"), "shape", None) == native:  # ours are saved resampled
            state["pos_embed"] = resample(state["pos_embed"].float())
        # Attention's names in the VAE's file, before diffusers changed them
        for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
            state = {key.replace(f".{old}.", f".{new}."): value for key, value in state.items()}
        # Not needed: the norm's affine part, classifiers, MAE's and the VAE's decoder
        unused = ("norm.", "fc_norm.", "head", "attn_pool.", "decoder", "mask_token", "post_quant")
        own = model.state_dict()
        state = {k: v for k, v in state.items() if k in own or not k.startswith(unused)}
        load_strict(model, state, f"encoder {name}")
    return model.eval().requires_grad_(False)


# The decoder

def grid_angles(side, dim):
    """Angles (side*side, dim/2) of a square grid's places: by row, then by column."""
    exponents = torch.arange(dim // 4).double() / (dim // 4)  # 0 to 1
    angles = torch.arange(side)[:, None] * 10000.0 ** -exponents  # (side, dim/4)
    rows = angles.repeat_interleave(side, 0)
    columns = angles.repeat(side, 1)
    return torch.cat([rows, columns], 1)


def sincos_2d(side, dim):
    """MAE's fixed position embedding (side*side, dim): columns, then rows."""
    rows, columns = grid_angles(side, dim).chunk(2, 1)  # each (side*side, dim/4)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1).float()


attention_in_fp32 = in_fp32(F.scaled_dot_product_attention)


def attention(q, k, v):
    """scaled_dot_product_attention (B,heads,N,C); fp32 on CPUs, where bf16 is far slower."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return attention_in_fp32(q, k, v)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block, as in ViT-MAE."""
    def __init__(self, width, heads, mlp_hidden):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        layers = nn.Linear(width, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width)
        self.mlp = nn.Sequential(*layers)

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
    """MAE's ViT decoder: tokens (B,N,D) -> normalised pixels (B,3,h*patch,w*patch)."""
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
        blocks = (DecoderBlock(width, heads, mlp_hidden) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.predict = nn.Linear(width, 3 * patch * patch)

    def forward(self, x):
        x = self.embed(x) + self.pos_embed  # (B, N, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # [CLS] has no position
        for block in self.blocks:  # pre-norm, at (B, 1 + N, width)
            x = block(x)
        x = self.predict(self.norm(x[:, 1:])).float()  # (B, N, 3 patch patch)
        return unpatchify(x, self.patch)


# The autoencoder

class RAE(nn.Module):
    """Frozen encoder, latent statistics, decoder. Weights come by load_encoder and load_rae.

    encoder: a name in ENCODERS; decoder: one in DECODERS, or a dict of such sizes; image_size:
    the side of images, which are decoded at image_size * upsample.
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
        self.config = dict(encoder=encoder, decoder=dict(sizes), image_size=image_size,
                           upsample=upsample)
        self.num_tokens = (image_size // self.stride) ** 2  # N
        self.token_dim = self.spec.dim  # D
        self.output_size = image_size * upsample  # side of what is decoded
        self.data = None  # what it was trained on ...
        self.step = None  # ... and how long; set by load_rae, where they are known

        # Its decoder; the encoder comes later, or never
        self.encoder = None
        patch = self.stride * upsample  # pixels of a decoded token
        self.decoder = Patches(unpatchify, patch)
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

    def load_encoder(self, weights=None, flag="--encoder-weights PATH"):
        """Build the encoder from `weights` (see build_encoder); returns this autoencoder."""
        encoder = build_encoder(self.name, self.image_size, weights, flag)
        self.encoder = encoder.to(self.mean.device)
        return self

    @property
    def std(self):
        return (self.var + 1e-5).sqrt()  # (N, D)

    @torch.no_grad()
    def tokens(self, images):
        """images (B,3,H,W) in [0,1] -> layer-normed patch tokens (B,N,D), always fp32."""
        if self.encoder is None:
            raise UserError("this RAE was loaded to decode: load_encoder() builds its encoder")
        if images.shape[-1] == self.output_size:
            images = F.avg_pool2d(images, self.upsample)  # --upsample: down to image_size
        side = self.image_size // self.stride * self.spec.patch  # what the encoder takes
        if images.shape[-2:] != (side, side):
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


# Files: ours, and the hub's

def fetch(repo, file, flag):
    """A hub file's local path, through the hub's cache; flag: what takes it instead."""
    import huggingface_hub
    huggingface_hub.utils.logging.set_verbosity_error()  # one sentence, not every retry
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except OSError as error:
        raise UserError(f"cannot fetch {file} of {repo} from the Hugging Face hub"
                        f" ({type(error).__name__}); without a network, bring that file and name"
                        f" it with {flag}") from None


def read_weights(path):
    """What a .safetensors or torch file holds; no code in it is run. torch's are mapped, not read:
    eight ranks share one copy, and sampling reads a quarter of it, the averaged weights."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # not before torch 1.6
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"it holds a {type(state).__name__}")
        return state
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch and safetensors have many kinds
        what = "is cut short or damaged, copy or download it again"
        if isinstance(error, (pickle.UnpicklingError, KeyError, AttributeError, ValueError)):
            what = "is no checkpoint that can be read without running code from it"
        said = f"{path} {what} ({type(error).__name__}: {str(error):.80})"
        raise UserError(said.splitlines()[0]) from None


def unwrap(state):
    """The state dict in a published file: bare, or wrapped in `ema` or `model`."""
    return state.get("ema") or state.get("model") or state


def load_strict(module, state, what):
    """load_state_dict, with one sentence that names what is missing, foreign or misshapen."""
    own = {key: value.shape for key, value in module.state_dict().items()}
    shape = {key: getattr(value, "shape", None) for key, value in state.items()}
    wrong = {"missing": own.keys() - shape.keys(),
             "foreign": shape.keys() - own.keys(),
             "misshapen": {key for key in own.keys() & shape.keys() if own[key] != shape[key]}}
    said = []
    for kind, keys in wrong.items():
        if keys:
            dots = ", ..." if len(keys) > 4 else ""
            said.append(f"{len(keys)} {kind} ({', '.join(sorted(keys)[:4])}{dots})")
    if said:
        raise UserError(f"{what}: weights of another model: {'; '.join(said)}")
    module.load_state_dict(state)


def newest(name):
    """The newest out/*/name, else the bundled demo's."""
    demo = ROOT / "assets/demo" / name
    return max(Path("out").glob(f"*/{name}"), key=os.path.getmtime, default=demo)


def locate(path_or_name, file):
    """Where a run's `file` (rae.pt, dit.pt) is. A run may be named as release:NAME, converted to
    our format on first use, as its folder, or as the file itself."""
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
    decode_only: without its encoder, for sampling."""
    path = locate(path_or_name, "rae.pt")
    saved = read_weights(path)
    if not {"config", "mean", "var", "ema"} <= saved.keys():
        raise UserError(f"{path} is no rae.pt, as train_decoder.py writes it (a dit.pt? a released"
                        " file? `release:NAME` reads those)")

    # First its shape, then what it has learned
    rae = RAE(**saved["config"])
    averaged = {key: value.float() for key, value in saved["ema"].items()}
    load_strict(rae.decoder, averaged, str(path))
    rae.mean.copy_(saved["mean"])  # (N, D)
    rae.var.copy_(saved["var"])    # (N, D)
    rae.data = saved.get("data")
    rae.step = saved.get("step")
    if not decode_only:
        rae.load_encoder(saved["encoder"], "`python assets/release.py NAME --from DIR`")
    return rae.eval().requires_grad_(False).to(device)


def default_data(rae):
    """What an autoencoder was trained on, or what its recipe takes."""
    return rae.data or ("shapes" if rae.name.startswith("tiny") else "data/imagenet")


def save_checkpoint(path, **state):
    """Write plain types through a temporary file: if this is killed, the old one stays."""
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    versions = dict(torch=str(torch.__version__), timm=timm.__version__)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(dict(state, versions=versions), file)
                file.flush()             # from Python to the kernel ...
                os.fsync(file.fileno())  # ... and to the disk, before the old one goes
            os.replace(temporary, path)  # at once, or not at all
        finally:
            temporary.unlink(missing_ok=True)  # there only if something failed


# Processes

def start():
    """Join torchrun's process group, or make one for itself: (device, rank, world size)."""
    # A GPU for each process, where there are any
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    device = torch.device("cpu")
    options = {}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        options["device_id"] = device

    # One way for one process and many: no loop asks whether it is alone
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            options |= dict(store=dist.HashStore(), rank=0, world_size=1)  # no network
        # While rank 0 saves, the others wait: longer than NCCL's ten minutes, if it must be
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1), **options)
        atexit.register(leave)
    return device, dist.get_rank(), dist.get_world_size()


def leave():
    """End the process group after all that refers to it, at exit, however a script ended.

    What ends gloo's threads must not hold the interpreter's lock, for which a thread may wait: the
    finished run would hang for ever. A DDP wrapper that dies last holds it, in torch 2.6 the group
    as well. The Python object of the group's backend releases it: so that has to be the last.
    """
    for name in ("last_exc", "last_value", "last_traceback"):  # an error's frames hold DDP
        vars(sys).pop(name, None)
    gc.collect()  # DDP and its hooks refer to each other
    if dist.is_initialized():
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        backends = [dist.group.WORLD._get_backend(torch.device(kind)) for kind in kinds]
        dist.destroy_process_group()
        backends.clear()


def enlarged(images):
    """Images (B,3,h,w) of few pixels, each pixel a square that a person sees."""
    zoom = max(1, 96 // images.shape[-1])  # whole pixels: nothing is smoothed
    return images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)


def main():
    parser = argparse.ArgumentParser(description="Reconstruct images with an RAE.")
    add = parser.add_argument
    add("images", nargs="+", help="image files")
    add("--run", help="run folder, rae.pt or release:NAME (default: newest in out/, else the demo)")
    add("--out", default="reconstruction.png", help="the picture (default: %(default)s)")
    args = parser.parse_args()
    args.run = args.run or newest("rae.pt")
    check_picture(args.out)
    rae = load_rae(args.run, "cuda" if torch.cuda.is_available() else "cpu")

    # Photographs, cropped as ImageNet's
    side = rae.output_size
    images = []
    for path in args.images:
        try:
            image = read_image(path)
        except BROKEN as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if min(image.size) < side:
            print(f"WARNING: {path}: {image.width} x {image.height} pixels, enlarged to {side}")
        images.append(TF.to_tensor(center_crop(image, side)))
    images = torch.stack(images).to(rae.mean.device)  # (B, 3, H, W)

    # There and back
    with torch.no_grad():
        copies = rae.decode(rae.encode(images)).clamp(0, 1)  # (B, 3, H, W)
    psnr = -10 * (images - copies).square().mean((1, 2, 3)).log10().mean()
    with writing(args.out):
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        save_image(enlarged(torch.cat([images, copies])), args.out, nrow=len(images))
    trained = f", trained for {rae.step} steps" if rae.step else ""
    features = " --features tiny" if default_data(rae) == "shapes" else ""
    print(f"wrote {args.out}: originals above reconstructions by {args.run}{trained}, mean PSNR"
          f" {psnr:.2f} dB over {len(images)} images."
          f" Next: python fid.py --rae {args.run} --data {default_data(rae)}{features}")


if __name__ == "__main__":
    main()

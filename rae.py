"""The representation autoencoder (RAE): images in, latents out, images back.

    images (B,3,H,W) in [0,1] -> resize, normalise -> frozen ViT encoder -> patch tokens, layer-normed
        -> standardise per (position, channel) -> z (B,N,D)                                       RAE.encode
    z (B,N,D) -> undo the standardisation -> ViT decoder -> undo the normalisation -> images      RAE.decode

The encoder is pretrained and never trained here; train_decoder.py trains the decoder and writes rae.pt.

    python rae.py photo.jpg --run out/dinov2_b       # originals above reconstructions: reconstruction.png
    python rae.py photo.jpg --run release:dinov2_b   # with the paper's released decoder

B images, N tokens, D channels of a token. Source: arXiv 2510.11690 ("the paper"), section 3.
"""
import argparse
import json
import math
import os
import pickle
import re
import signal
import struct
from datetime import timedelta
from functools import lru_cache, partial
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
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

ROOT = Path(__file__).parent


class UserError(SystemExit, ValueError):
    """One sentence: what was given, what was expected, what to do. Ends a script without a traceback."""


# Randomness belongs to a sample, not to a batch: ranks, accumulation and resuming then change nothing

def mix(*parts):
    """Hash integers (ints or int64 tensors, broadcast) to uniform int64 in [0, 2^63): chained splitmix64."""
    h = torch.zeros((), dtype=torch.int64)
    for part in parts:
        h = (h ^ part) - 0x61C8864680B583EB                                 # int64 wraps around, as it should
        h = (h ^ h >> 30 & 0x3FFFFFFFF) * -0x40A7B892E31B1A47             # shifts keep the sign: mask it away
        h = (h ^ h >> 27 & 0x1FFFFFFFFF) * -0x6B2FB644ECCEEE15
        h = h ^ h >> 31 & 0x1FFFFFFFF
    return h & 0x7FFFFFFFFFFFFFFF


def normals(keys, count, device):
    """keys (B,) int64 on the CPU -> (B, count) standard normals on the device, row i from keys[i] alone."""
    rows, generator = torch.empty(len(keys), count, device=device), torch.Generator(device)
    for row, key in zip(rows, keys.tolist()):
        row.normal_(generator=generator.manual_seed(key))
    return rows


# Images

def center_crop(image, size):
    """PIL image -> its centre, size x size, as ADM prepares ImageNet: halved by boxes, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    sides = [round(side * size / min(image.size)) for side in image.size]
    left, top = (side - size >> 1 for side in sides)
    return image.resize(sides, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def random_crop(image, size, key):
    """Stage 1's augmentation: the shorter side to 1.5 x size (384 for 256), then a crop drawn from key."""
    image, rng = TF.resize(image, size * 3 // 2, TF.InterpolationMode.BICUBIC), np.random.default_rng(key)
    top, left = rng.integers(image.height - size + 1), rng.integers(image.width - size + 1)
    return image.crop((left, top, left + size, top + size))


def read_image(path):
    """A file -> upright RGB PIL image."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):                               # 16-bit grey: convert() would clip it
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


class Folder(Dataset):
    """An ImageFolder tree, class/*.jpg: items (index, key) -> (uint8 image (3,size,size), label, key).

    A file that cannot be decoded is named once; in training the next takes its place, else its label is -1.
    """
    def __init__(self, path, size, train=False, crop=False):
        try:
            files = ImageFolder(path, allow_empty=True)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no such folder, or no class folder in it: images are expected as"
                            f" {path}/CLASS/*.jpg; give another --data, or `--data shapes`") from None
        if not files.samples:
            raise UserError(f"{path}: no image in any of its {len(files.classes)} class folders")
        self.samples, self.classes = files.samples, files.classes
        self.size, self.train, self.crop = size, train, crop
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()  # seen by all workers

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        index, key = item
        for place in (i % len(self) for i in range(index, index + len(self))):
            path, label = self.samples[place]
            try:
                image = read_image(path)
                augmented = self.train and self.crop
                image = random_crop(image, self.size, key) if augmented else center_crop(image, self.size)
                return TF.pil_to_tensor(image), label, key
            except (OSError, ValueError, SyntaxError, KeyError, IndexError, TypeError, struct.error,
                    Image.DecompressionBombError) as error:                  # what PIL raises on broken files
                if not self.broken[place]:
                    print(f"skipped {path}: {error}", flush=True)
                self.broken[place] = True
            if not self.train:
                return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1, key
        raise UserError("not one image of the folder can be decoded")


class Shapes(Dataset):
    """Ten coloured shapes on a coloured ground, drawn on the fly: image i is a function of i alone.

    Colours, position, size and angle come from a hash of (index, parameter) and say nothing about the class,
    which is index % 10. Outlines mirror about their own vertical axis and angles are symmetric about 0, so a
    mirrored picture is as likely as the original. Indices from 50,000 on are never trained on.
    """

    broken = torch.zeros(1, dtype=torch.bool)                                 # none is
    classes = "circle square triangle star ring plus diamond crescent arrow heart".split()
    ranges = {"hue": (0, 1), "ground hue": (0, 1), "saturation": (0.55, 1), "ground saturation": (0.3, 0.9),
              "value": (0.75, 1), "ground value": (0.08, 0.35), "gradient x": (-0.15, 0.15),
              "gradient y": (-0.15, 0.15), "x": (-0.18, 0.18), "y": (-0.18, 0.18),     # in halves of the side
              "radius": (0.52, 0.80), "angle": (-math.pi / 12, math.pi / 12)}

    def __init__(self, size=32, first=0, count=50_000):
        self.size, self.first, self.count = size, first, count
        self.low, self.high = torch.tensor(list(self.ranges.values())).float().T
        q = 1.25 * F.affine_grid(torch.eye(2, 3)[None], (1, 1, 128, 128), align_corners=False)[0]
        self.templates = torch.cat([self.distance(name, q) for name in self.classes])   # (10 * 128, 128)

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return self.__getitems__([item])[0]

    def __getitems__(self, items):
        """What DataLoader calls for a batch: [(index, key), ...] -> [(uint8 image, label, key), ...]."""
        indices, keys = zip(*items)
        images, labels = self.render(self.first + torch.tensor(indices))
        return list(zip(images, labels.tolist(), keys))

    @staticmethod
    def distance(name, q):
        """Signed distance of the points q (..., 2), y downwards, to an outline of radius 1; inside is < 0."""
        def arc(start, stop, n=64, radius=1.0, y=0.0):                   # half turns, clockwise from the top
            a = torch.linspace(start, stop, n) * math.pi
            return torch.stack([radius * a.sin(), y - radius * a.cos()], -1)

        if name in ("circle", "ring"):
            r = q.norm(dim=-1)
            return r - 0.95 if name == "circle" else (r - 0.78).abs() - 0.22
        a = torch.linspace(0, math.pi, 33)
        right = torch.as_tensor({                                        # right half of the outline (K, 2)
            "square": [(0.82, -0.82), (0.82, 0.82)],
            "triangle": [(0.0, -0.95), (1.0, 0.75)],
            "star": arc(0, 1, 6) * torch.tensor([1.0, 0.45]).repeat(3)[:, None],
            "plus": [(0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3), (0.3, 1.0)],
            "diamond": [(0.0, -1.0), (0.6, 0.0), (0.0, 1.0)],
            "crescent": torch.cat([arc(1, 0.347, radius=0.75, y=-0.4), arc(0.232, 1)]),
            "arrow": [(0.0, -1.0), (0.9, 0.05), (0.34, 0.05), (0.34, 1.0)],
            "heart": torch.stack([16 * a.sin() ** 3, 5 * (2 * a).cos() + 2 * (3 * a).cos() + (4 * a).cos()
                                  - 13 * a.cos() - 2.5], -1) / 16,
        }[name])
        p = torch.cat([right, right.flip(0) * torch.tensor([-1.0, 1.0])])       # closed by its mirror image
        edge, to = p.roll(-1, 0) - p, p - q[..., None, :]                       # (2K, 2), (..., 2K, 2)
        along = -(to * edge).sum(-1) / edge.square().sum(-1).clamp(min=1e-9)    # foot of q on every edge
        nearest = (to + along.clamp(0, 1)[..., None] * edge).norm(dim=-1).amin(-1)
        spans = (to[..., 1] > 0) != ((to + edge)[..., 1] > 0)                   # edges at the height of q
        crossed = spans & (to[..., 0] > to[..., 1] * edge[:, 0] / edge[:, 1])   # by a ray to the right
        return torch.where(crossed.sum(-1) % 2 == 1, -nearest, nearest)

    def uniform(self, indices):
        """(B,) int64 -> (B, 12) numbers in [0, 1), each a hash of (index, parameter)."""
        return (mix(indices[:, None], torch.arange(len(self.low))) >> 39).float() / 2 ** 24

    def render(self, indices):
        """(B,) int64 -> images uint8 (B, 3, size, size), labels int64 (B,)."""
        labels, u = indices % len(self.classes), torch.lerp(self.low, self.high, self.uniform(indices))
        h, s, v = u[:, :6].view(-1, 3, 2, 1).unbind(1)                          # (B, shape and ground, 1)
        k = (torch.tensor([5, 3, 1]) + 6 * h) % 6                               # HSV to RGB
        rgb = v * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1))                 # (B, shape and ground, 3)
        shape, ground = rgb[..., None, None].unbind(1)
        gx, gy, x, y, radius, angle = u[:, 6:, None, None].unbind(1)            # (B, 1, 1)

        # Each pixel's place in the template of its class: move, divide by the radius, turn back.
        axis = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        px, py = (axis - x) / (1.25 * radius), (axis[:, None] - y) / (1.25 * radius)
        q = torch.stack([px * angle.cos() + py * angle.sin(), py * angle.cos() - px * angle.sin()], -1)
        q = q.clamp(1 / 128 - 1, 1 - 1 / 128)                                   # (B, H, W, 2), not beyond it
        q[..., 1] = (q[..., 1] + 2 * labels[:, None, None] + 1) / len(self.classes) - 1
        distance = F.grid_sample(self.templates[None, None], q.flatten(0, 1)[None], align_corners=False)
        cover = (0.5 - distance.view_as(q[..., 0]) * radius * self.size / 2).clamp(0, 1)    # anti-aliased

        ground = ground * (1 + gx * axis + gy * axis[:, None])[:, None]         # (B, 3, H, W)
        return (torch.lerp(ground, shape, cover[:, None]) * 255).round().byte(), labels


def open_data(data, size, crop=False):
    """The training set: `shapes`, or an image folder, whose train/ is entered if there is one."""
    if data == "shapes":
        return Shapes(size)
    return Folder(Path(data, "train") if Path(data, "train").is_dir() else data, size, train=True, crop=crop)


def open_val(val, data, size):
    """The held-out set, never trained on: --val, held-out shapes, or DATA/val; None where there is none."""
    if (val or data) == "shapes":
        return Shapes(size, first=50_000, count=10_000)
    return Folder(val or Path(data, "val"), size) if val or Path(data, "val").is_dir() else None


class Order(Sampler):
    """Which images make up which batch: the data set is passed in permutations, one per (seed, epoch); step s
    takes the places from s * batch on. Yields micro-batches [(index, key)], key = hash(seed, step, place)."""
    def __init__(self, length, batch, accum=1, seed=0, step=0, rank=0, world=1):
        self.length, self.batch, self.accum, self.seed = length, batch, accum, seed
        self.step, self.rank, self.world = step, rank, world

    def __iter__(self):
        @lru_cache(2)
        def permutation(epoch):
            generator = torch.Generator().manual_seed(int(mix(self.seed, epoch)))
            return torch.randperm(self.length, generator=generator).tolist()
        size, step = self.batch // (self.accum * self.world), self.step
        while True:
            for micro in range(self.accum):
                places = torch.arange(size) + (micro * self.world + self.rank) * size
                keys, positions = mix(self.seed, step, places), step * self.batch + places
                yield [(permutation(p // self.length)[p % self.length], key)
                       for p, key in zip(positions.tolist(), keys.tolist())]
            step += 1


def worker_count(dataset, workers=None):
    """Loader processes: as asked, else none for shapes; for files a rank's share of the cores, at most 8."""
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return workers if workers is not None else 0 if isinstance(dataset, Shapes) else min(8, max(1, cores))


def ignore_interrupt(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                              # Ctrl-C is for the main process


def batches(dataset, order, workers, device):
    """Endless (images (b,3,H,W) in [0,1] and labels (b,) on the device, keys (b,) on the CPU)."""
    loader = DataLoader(dataset, batch_sampler=order, num_workers=worker_count(dataset, workers),
                        worker_init_fn=ignore_interrupt, pin_memory=device.type == "cuda")
    for images, labels, keys in loader:
        yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True), keys


def spread(length, most=None):
    """At most so many places all over a data set, whether its classes follow each other or take turns."""
    count = min(length, most or length)
    return [i * length // count + i % (length // count) for i in range(count)]


def in_order(dataset, batch, device, rank=0, world=1, workers=None, most=None):
    """Each image once, or `most` of them, spread: (images, labels, their numbers from 0 on), ranks taking
    turns, without broken files."""
    items = [(place, i) for i, place in enumerate(spread(len(dataset), most))][rank::world]
    order = [items[i:i + batch] for i in range(0, len(items), batch)]
    loader = DataLoader(dataset, batch_sampler=order, num_workers=worker_count(dataset, workers))
    for images, labels, indices in loader:
        if (good := labels >= 0).any():
            yield images[good].to(device).float() / 255, labels[good].to(device), indices[good]


# Frozen encoders

IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
TANH = dict(act_layer=partial(nn.GELU, approximate="tanh"))


class Encoder(NamedTuple):
    timm: str               # timm model name
    image: int              # for images of this side ...
    input: int              # ... the encoder's input has this one
    patch: int              # pixels per token in the encoder's input
    dim: int                # channels of a token
    pixels: tuple           # pixel mean and standard deviation
    antialias: bool = True  # how the reference implementation resamples the position embedding
    options: dict = {}      # what timm's model of that name lacks

    @property
    def stride(self):       # image pixels per token
        return self.image * self.patch // self.input


ENCODERS = {  #            timm model                            image input patch dim  pixels
    "dinov2_s":  Encoder("vit_small_patch14_reg4_dinov2.lvd142m", 256, 224, 14,  384, IMAGENET),
    "dinov2_b":  Encoder("vit_base_patch14_reg4_dinov2.lvd142m",  256, 224, 14,  768, IMAGENET),
    "dinov2_l":  Encoder("vit_large_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 1024, IMAGENET),
    "siglip2_b": Encoder("vit_base_patch16_siglip_256.v2_webli",  256, 256, 16,  768, HALF, options=TANH),
    "mae_b":     Encoder("vit_base_patch16_224.mae",              256, 256, 16,  768, IMAGENET, False),
    "dino_s8":   Encoder("vit_small_patch8_224.dino",             224, 224,  8,  384, IMAGENET, True, TANH),
    "pixel":     Encoder("",                                      256, 256, 16,  768, HALF),  # patches
    "tiny":      Encoder("vit_tiny_patch16_224",                   32,  32,  8,   96, HALF, options=dict(
                         img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)),
}


def build_encoder(name, image_size, weights=None, flag="--encoder-weights PATH", folder=None):
    """The frozen encoder: normalised pixels (B,3,h,w) -> timm's ViT, its tokens layer-normed without affine.

    weights: None for the pretrained ones (timm's from the hub; `tiny`: bundled), "random", a state dict of
    timm, DINOv2's or MAE's authors, or its path. Source: section 3 and the reference implementations.
    """
    spec, side = ENCODERS[name], image_size // ENCODERS[name].stride
    if name == "pixel":
        return nn.Identity()
    model = timm.create_model(spec.timm, num_classes=0, global_pool="", **spec.options)
    model.norm = nn.LayerNorm(spec.dim, eps=model.norm.eps, elementwise_affine=False)    # mean 0, variance 1
    prefix, native = 0 if model.no_embed_class else model.num_prefix_tokens, model.pos_embed.shape
    resample = partial(resample_abs_pos_embed, new_size=[side, side], num_prefix_tokens=prefix,
                       antialias=spec.antialias)                    # as the reference implementation does it
    model.pos_embed = nn.Parameter(resample(model.pos_embed.detach()))
    model.patch_embed.set_input_size(img_size=side * spec.patch)
    if weights is None:
        weights = ROOT / "assets/tiny.pt" if name == "tiny" else fetch(
            f"timm/{spec.timm}", "model.safetensors", f"{flag} (encoder {name})",
            folder and Path(folder, "timm", spec.timm))
    if str(weights) != "random":
        state = dict(unwrap(weights if isinstance(weights, dict) else read_weights(weights)))
        if "register_tokens" in state:                  # DINOv2's own file: timm adds [CLS]'s position to it
            position, state["pos_embed"] = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
            state |= dict(reg_token=state.pop("register_tokens"), cls_token=state["cls_token"] + position)
        if getattr(state.get("pos_embed"), "shape", None) == native:        # ours are saved resampled
            state["pos_embed"] = resample(state["pos_embed"].float())
        unused = ("norm.", "fc_norm.", "head", "attn_pool.", "decoder", "mask_token")
        load_strict(model, {k: v for k, v in state.items() if not k.startswith(unused)}, f"encoder {name}")
    return model.eval().requires_grad_(False)


# The decoder

def sincos_2d(side, dim):
    """MAE's fixed position embedding (side*side, dim): columns in the first half, rows in the second."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega         # (side, dim/4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)                         # (side, dim/2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], 1).float()


def attention(q, k, v):
    """scaled_dot_product_attention (B,heads,N,head_dim); fp32 on CPUs, where bf16 is ten times slower."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)


def patchify(images, patch):
    """(B,3,h*patch,w*patch) -> (B,h*w,3*patch*patch), a token's values ordered (row, column, channel)."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))            # (B, 3, h, row, w, column)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x, patch):
    """(B,N,3*patch*patch) -> (B,3,h*patch,w*patch), the inverse of patchify for square images."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch, patch, 3)).unflatten(1, (side, side))          # (B, h, w, row, column, 3)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class DecoderBlock(nn.Module):
    def __init__(self, width, heads, mlp_hidden):
        super().__init__()
        self.heads, self.norm1 = heads, nn.LayerNorm(width, eps=1e-12)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).flatten(2))      # (B, N, width)
        return x + self.mlp(self.norm2(x))


DECODERS = {
    "tiny": dict(width=160,  depth=3,  heads=5,  mlp_hidden=640),
    "B":    dict(width=768,  depth=12, heads=12, mlp_hidden=3072),
    "L":    dict(width=1024, depth=24, heads=16, mlp_hidden=4096),
    "XL":   dict(width=1152, depth=28, heads=16, mlp_hidden=4096),
}


class Decoder(nn.Module):
    """MAE's ViT decoder: tokens (B,N,D) -> normalised pixels (B,3,h*patch,w*patch). Source: appendix."""
    def __init__(self, tokens, token_dim, width, depth, heads, mlp_hidden, patch):
        super().__init__()
        if width % heads or width % 4 or math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"no decoder of width {width}, {heads} heads on {tokens} tokens: the width must"
                            " be a multiple of the heads and of 4, and the tokens must form a square")
        self.patch, self.embed = patch, nn.Linear(token_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(math.isqrt(tokens), width), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_hidden) for _ in range(depth))
        self.norm, self.predict = nn.LayerNorm(width, eps=1e-12), nn.Linear(width, 3 * patch * patch)

    def forward(self, z):
        x = self.embed(z) + self.pos_embed                                    # (B, N, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)          # [CLS] has no position
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.predict(self.norm(x[:, 1:])).float(), self.patch)


# The autoencoder

class RAE(nn.Module):
    """Frozen encoder, latent statistics, decoder.

    encoder: a name in ENCODERS; decoder: one in DECODERS or a dict of such sizes; image_size: the images',
    decoded at image_size * upsample; encoder_weights: as build_encoder's, False: for decoding only.
    """
    def __init__(self, encoder="dinov2_b", decoder="XL", image_size=256, upsample=1, encoder_weights=None):
        super().__init__()
        for what, name, table in (("encoder", encoder, ENCODERS), ("decoder", decoder, DECODERS)):
            if isinstance(name, str) and name not in table:
                raise UserError(f"unknown {what} {name!r}; there are {', '.join(table)}")
        self.spec, sizes = ENCODERS[encoder], DECODERS[decoder] if isinstance(decoder, str) else decoder
        self.stride, self.token_dim = self.spec.stride, self.spec.dim
        if image_size % self.stride:
            raise UserError(f"image size {image_size} misfits {encoder}: use a multiple of {self.stride}")
        self.name, self.image_size, self.upsample = encoder, image_size, upsample
        self.config = dict(encoder=encoder, decoder=dict(sizes), image_size=image_size, upsample=upsample)
        self.num_tokens, self.encoder = (image_size // self.stride) ** 2, None
        if encoder_weights is not False:
            self.load_encoder(encoder_weights)
        self.decoder = Decoder(self.num_tokens, self.token_dim, patch=self.stride * upsample, **sizes)
        self.register_buffer("mean", torch.zeros(self.num_tokens, self.token_dim))
        self.register_buffer("var", torch.ones(self.num_tokens, self.token_dim))
        self.register_buffer("pixel_mean", torch.tensor(self.spec.pixels[0]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.spec.pixels[1]).view(3, 1, 1), persistent=False)

    def load_encoder(self, *args):
        self.encoder = build_encoder(self.name, self.image_size, *args)

    @property
    def std(self):
        return (self.var + 1e-5).sqrt()                                       # (N, D)

    @torch.no_grad()
    def tokens(self, images):
        """images (B,3,H,W) in [0,1] -> layer-normed patch tokens (B,N,D), fp32 (TF32) under autocast too."""
        if images.shape[-1] == self.image_size * self.upsample:
            images = F.avg_pool2d(images, self.upsample)                  # as a data set of image_size has it
        side = self.image_size // self.stride * self.spec.patch
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=False)
        x = (images - self.pixel_mean) / self.pixel_std
        if self.name == "pixel":
            return patchify(x, self.spec.patch)
        if self.encoder is None:
            raise UserError("this autoencoder was loaded for decoding only")
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            return self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens:]

    def encode(self, images):
        """images (B,3,H,W) in [0,1] -> z (B,N,D), standardised per position and channel; deterministic."""
        x = self.tokens(images)                                               # (B, N, D)
        return (x - self.mean) / self.std

    def decode(self, z, decoder=None):
        """z (B,N,D) -> images (B,3,H',W') around [0,1], unclamped; decoder: another (EMA, DDP) than ours."""
        x = (decoder or self.decoder)(z * self.std + self.mean)               # (B, 3, H', W')
        return x * self.pixel_std + self.pixel_mean

    def encoder_flops(self):
        """Forward FLOPs of the encoder for one image."""
        with torch.device("meta"):
            copy = RAE(**self.config, encoder_weights="random")
            return count_flops(copy.tokens, torch.empty(1, 3, self.image_size, self.image_size))[0]


# Files: ours, the release's, the hub's

HUB = "nyu-visionx/RAE-collections"
RELEASED = {  #    encoder, image size, decoder and statistics in HUB
    "dinov2_b":     ("dinov2_b", 256, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                     "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2_b_512": ("dinov2_b", 512, "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                     "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
    "siglip2_b":    ("siglip2_b", 256, "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
                     "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
    "mae_b":        ("mae_b", 256, "decoders/mae/base_p16/ViTXL_n08/model.pt",
                     "stats/mae/base_p16/ImageNet1k/stat.pt"),
}


def fetch(repo, file, flag, folder=None):
    """The local path of a hub file: in `folder`, under the same relative path, or through the hub's cache."""
    if folder is not None:
        if not Path(folder, file).is_file():
            raise UserError(f"--weights {folder}: {file} of {repo} is expected under this relative path")
        return Path(folder, file)
    import huggingface_hub
    huggingface_hub.utils.logging.set_verbosity_error()  # the sentence below instead of every retry
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except OSError as error:
        raise UserError(f"cannot fetch {file} of {repo} from the Hugging Face hub ({type(error).__name__});"
                        f" without a network, bring that file yourself and name it with {flag}") from None


def read_weights(path):
    """What a .safetensors or torch file holds, read without running code from it."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError,
            AttributeError) as error:
        raise UserError(f"{path} is no checkpoint that can be read without running code from it"
                        f" ({type(error).__name__}: {str(error).splitlines()[0][:80]})") from None


def load_strict(module, state, what):
    """load_state_dict, with one sentence that names the keys that are missing, foreign or misshapen."""
    own = module.state_dict()
    wrong = {"missing": own.keys() - state.keys(), "foreign": state.keys() - own.keys(),
             "misshapen": {k for k in own if k in state and own[k].shape != getattr(state[k], "shape", 0)}}
    if any(wrong.values()):
        raise UserError(f"{what}: weights of another model: " + "; ".join(
            f"{len(keys)} {kind} ({', '.join(sorted(keys)[:4])}{', ...' * (len(keys) > 4)})"
            for kind, keys in wrong.items() if keys))
    module.load_state_dict(state)


def from_release(state_dict):
    """A released decoder's state dict -> Decoder's; only the fixed decoder_pos_embed may be absent."""
    state = dict(state_dict)
    position = state.pop("decoder_pos_embed", None)
    if position is not None:
        expected = F.pad(sincos_2d(math.isqrt(position.shape[1] - 1), position.shape[2]), (0, 0, 1, 0))
        if not torch.allclose(position[0].float(), expected, atol=1e-4):
            raise UserError("decoder_pos_embed of this file is not the fixed sin-cos embedding")
    for old, new in (("trainable_cls_token", "cls_token"), ("decoder_embed", "embed"),
                     ("decoder_layers", "blocks"), ("attention.attention.query", "qkv"),
                     ("attention.output.dense", "proj"), ("intermediate.dense", "mlp.0"),
                     ("output.dense", "mlp.2"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
                     ("decoder_norm", "norm"), ("decoder_pred", "predict")):
        state = {key.replace(old, new): value for key, value in state.items()}
    for key in [key for key in state if ".qkv." in key]:            # query, key, value: one linear here
        others = [key.replace("qkv", f"attention.attention.{part}") for part in ("key", "value")]
        if all(other in state for other in others):
            state[key] = torch.cat([state[key], *map(state.pop, others)])
    return state


def unwrap(state):
    """The state dict in a released file: bare, or wrapped in `ema` or `model`."""
    return state.get("ema") or state.get("model") or state


def load_rae(path_or_name, device="cpu", encoder=None, decode_only=False, weights=None):
    """An RAE for use (EMA decoder, eval mode): from our rae.pt or its run folder, release:NAME (files of the
    hub or of the folder `weights`), or from a released decoder of `encoder`'s latents, stat.pt beside it."""
    path = Path(path_or_name, "rae.pt") if Path(path_or_name).is_dir() else Path(path_or_name)
    stat, name = path.parent / "stat.pt", str(path_or_name).removeprefix("release:")
    if str(path_or_name).startswith("release:"):
        if name not in RELEASED:
            raise UserError(f"unknown release:{name}; there are release:{', release:'.join(RELEASED)}")
        encoder, _, *files = RELEASED[name]
        path, stat = (fetch(HUB, file, "--weights DIR", weights) for file in files)
    saved = read_weights(path)
    if "mean" in saved and "config" in saved:                                 # ours
        rae, state = RAE(**saved["config"], encoder_weights=False), saved["ema"]
        mean, var, encoder_weights = saved["mean"], saved["var"], saved["encoder"]
    else:
        if encoder not in ENCODERS:
            raise UserError(f"{path} is no rae.pt; if it is a released decoder, say whose latents it"
                            f" decodes: its shapes cannot tell (encoder = {', '.join(ENCODERS)})")
        state, encoder_weights, stat = unwrap(saved), None, read_weights(stat)
        mean, var = (None if stat.get(key) is None else stat[key].flatten(1).T for key in ("mean", "var"))
        stride = ENCODERS[encoder].stride
        rae = RAE(encoder, released_sizes(state, path), math.isqrt(len(var)) * stride,
                  math.isqrt(len(state["decoder_pred.bias"]) // 3) // stride, encoder_weights=False)
        state = from_release(state)
    load_strict(rae.decoder, {key: value.float() for key, value in state.items()}, str(path))
    rae.mean.copy_(0 if mean is None else mean), rae.var.copy_(var)
    if not decode_only:
        rae.load_encoder(encoder_weights, "--weights DIR", weights)
    return rae.eval().requires_grad_(False).to(device)


def released_sizes(state, path):
    """A released decoder's sizes, read off its tensors; the presets know the heads."""
    embed, predict = "decoder_embed.weight", "decoder_pred.bias"
    mlp = "decoder_layers.0.intermediate.dense.bias"
    if not {embed, predict, mlp} <= state.keys():
        raise UserError(f"{path} is neither a rae.pt nor a released decoder: decoder_embed,"
                        " decoder_pred or layers are missing")
    width = len(state[embed])
    heads = {sizes["width"]: sizes["heads"] for sizes in DECODERS.values()}.get(width, max(1, width // 64))
    depth = len({key.split(".")[1] for key in state if key.startswith("decoder_layers.")})
    return dict(width=width, depth=depth, heads=heads, mlp_hidden=len(state[mlp]))


def save_checkpoint(path, **state):
    """Write a checkpoint of plain types through a temporary file: a killed process leaves the last good one.
    Whether it worked: a full disk is reported, and training goes on."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(dict(state, versions=dict(torch=str(torch.__version__), timm=timm.__version__)), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary.is_file():
            temporary.unlink()
        print(f"WARNING: {path} could not be written ({error}); the last good one stays,"
              " the next save tries again", flush=True)
        return False
    return True


def save_picture(images, path, nrow):
    """Images (B,3,H,W) around [0,1] as a grid of `nrow` columns; a full disk costs the picture, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(images.clamp(0, 1), path, nrow=nrow)
    except OSError as error:
        print(f"WARNING: {path} could not be written ({error})", flush=True)


def newest(name):
    """The newest out/*/name, else the bundled demo's."""
    return max(Path("out").glob(f"*/{name}"), key=os.path.getmtime, default=ROOT / "assets/demo" / name)


# What both trainers do around their loops

LOST = 10     # so many steps in a row without a finite gradient end training

def start():
    """Join torchrun's process group, or make one of a single process: (device, rank, world size)."""
    torch.set_float32_matmul_precision("high")                              # TF32 where there is such a thing
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)
    return device, dist.get_rank(), dist.get_world_size()


def at_least(low, kind=int):
    """An argparse type: a number that is not below `low`."""
    def number(text):
        if kind(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be at least {low}")
        return kind(text)
    return number


def best_dtype(device):
    """bf16 where the hardware has it, else fp32."""
    has = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" \
        else torch.cpu.get_capabilities().get("avx512_bf16")
    return "bf16" if has else "fp32"


def count_flops(module, *inputs):
    """Forward FLOPs, a multiply-add being two: (all, those of linear layers and convolutions)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    ops = counter.get_flop_counts().get("Global", {})
    return sum(ops.values()), sum(n for op, n in ops.items() if not re.search("bmm|attention", str(op)))


def describe(what, module, *inputs):
    """Print a meta module's parameters, compute and training memory; inputs: one image's."""
    size, (full, linear) = sum(p.numel() for p in module.parameters()), count_flops(module, *inputs)
    fixed = sum(value.numel() for value in module.state_dict().values()) - size
    print(f"{what}: {(size + fixed) / 1e6:.1f} M parameters, {fixed / 1e6:.1f} M of them fixed\n"
          f"{linear / 2e9:.1f} G multiply-adds per image without attention products (the paper's count),"
          f" {full / 2e9:.1f} G with them = {full / 1e9:.1f} GFLOPs\n"
          f"{size * 20 / 2**30:.1f} GiB in training: weights, gradients, two moments of AdamW and EMA,"
          f" {size * 4 / 2**30:.1f} GiB each; activations come on top")


def resume(path, fixed):
    """(checkpoint, step) of this run's earlier start, or (None, 0); `fixed`: what must be as then."""
    if not path.exists():
        return None, 0
    saved = read_weights(path)
    if "optimizer" not in saved:
        raise UserError(f"{path} is packed for use and cannot be resumed: name another --run")
    if changed := [f"{key} was {saved['fixed'].get(key)}, is {value}" for key, value in fixed.items()
                   if saved["fixed"].get(key) != value]:
        raise UserError(f"{path} belongs to other settings ({'; '.join(changed)}):"
                        " give them again, or another --run")
    lines = path.parent / "log.jsonl"
    if dist.get_rank() == 0 and lines.exists():  # later steps will be run, and logged, again
        entries = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
        lines.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries
                                 if entry["stage"] != fixed["stage"] or entry["step"] <= saved["step"]))
    return saved, saved["step"]


def stop_signal():
    """A flag (a CPU tensor) that SIGTERM and Ctrl-C raise; all-reduced, it stops all ranks."""
    flag = torch.zeros(())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: flag.fill_(1))
    return flag


def log(run, **values):
    """One line to RUN/log.jsonl, and to the terminal; on rank 0."""
    if dist.get_rank() == 0:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            Path(run).mkdir(parents=True, exist_ok=True)
            with open(Path(run, "log.jsonl"), "a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            print(f"WARNING: {run}/log.jsonl lacks the next line ({error})")
        if "eta" in values:
            values["eta"] = timedelta(seconds=round(values["eta"]))
        print("  ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}"
                        for key, v in values.items() if v is not None), flush=True)


def main():
    parser = argparse.ArgumentParser(description="Reconstruct images with an RAE.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--run", default=newest("rae.pt"),
                        help="run folder, rae.pt or release:NAME (default: %(default)s)")
    parser.add_argument("--weights", help="folder with the released files, in place of the hub")
    parser.add_argument("--out", default="reconstruction.png")
    args = parser.parse_args()
    rae = load_rae(args.run, "cuda" if torch.cuda.is_available() else "cpu", weights=args.weights)
    side = rae.image_size * rae.upsample
    try:
        images = [TF.to_tensor(center_crop(read_image(path), side)) for path in args.images]
    except OSError as error:
        raise UserError(f"cannot read an image: {error}") from None
    images = torch.stack(images).to(rae.mean.device)                          # (B, 3, H, W)
    with torch.no_grad():
        copies = rae.decode(rae.encode(images)).clamp(0, 1)
    psnr = -10 * (images - copies).square().mean((1, 2, 3)).log10().mean()
    save_image(torch.cat([images, copies]), args.out, nrow=len(images))
    print(f"wrote {args.out}: originals above reconstructions by {args.run}, mean PSNR {psnr:.2f} dB over"
          f" {len(images)} images. Next: python train_dit.py --rae {args.run}")


if __name__ == "__main__":
    main()

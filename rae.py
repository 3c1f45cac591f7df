"""The representation autoencoder (RAE): images in, latents out, images back.

    images (B,3,H,W) in [0,1] -> resize, normalise -> frozen ViT encoder -> patch tokens, layer-normed
        -> standardise per (position, channel) -> z (B,N,D)                                        RAE.encode
    z (B,N,D) -> undo the standardisation -> ViT decoder -> undo the pixel normalisation -> images  RAE.decode

Encoders are pretrained and never trained here; train_decoder.py trains the decoder and writes `rae.pt`.

    python rae.py photo.jpg --run out/dinov2_b      # originals above reconstructions, in reconstruction.png
    python rae.py photo.jpg --run release:dinov2_b  # with the paper's released decoder

B images, N tokens, D channels of a token. Source: arXiv 2510.11690 ("the paper"), section 3.
"""
import argparse
import json
import math
import os
import pickle
import signal
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent


class UserError(SystemExit, ValueError):
    """One sentence for the user: what was given, what was expected, what to do. Ends a script without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: every number belongs to a sample, not to a batch, so ranks, accumulation and resuming change nothing.

def mix(*parts):
    """Hash integers (ints or int64 tensors, broadcast) to uniform int64 in [0, 2^63): splitmix64's finaliser, chained."""
    h = torch.zeros((), dtype=torch.int64)
    for part in parts:
        h = (h ^ part) + -0x61C8864680B583EB                       # the golden ratio in 64 bits, wrapping
        h = (h ^ (h >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47    # int64 shifts keep the sign: masked to logical ones
        h = (h ^ (h >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        h = h ^ (h >> 31 & 0x1FFFFFFFF)
    return h & 0x7FFFFFFFFFFFFFFF


def normals(keys, count, device):
    """keys (B,) int64 on the CPU -> (B, count) standard normal fp32 numbers, row i a function of keys[i] alone."""
    rows, generator = torch.empty(len(keys), count, device=device), torch.Generator(device)
    for row, key in zip(rows, keys.tolist()):
        row.normal_(generator=generator.manual_seed(key))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Images

def center_crop(image, size):
    """PIL image -> its centre at size x size, as ADM prepares ImageNet: 2x box reductions, then bicubic (section 4)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = resize_shorter(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_shorter(image, size):
    scale = size / min(image.size)
    sides = tuple(max(size, round(side * scale)) for side in image.size)
    return image if sides == image.size else image.resize(sides, Image.Resampling.BICUBIC)


def random_crop(image, size, key):
    """Stage 1's augmentation: the shorter side to 1.5 x size (256 px: 384), then a random crop; no flip."""
    image = resize_shorter(image, size * 3 // 2)
    rng = np.random.default_rng(key)
    left, top = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def read_image(path):
    """A file -> RGB PIL image, upright (EXIF); OSError and its like when it cannot be decoded."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):                          # 16-bit grey: convert() would clip, not scale
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


class Folder(Dataset):
    """An ImageFolder tree (class/*.jpg) as (uint8 image (3,size,size), label, key).

    `train`: random crops of stage 1 when `crop`, and a file that cannot be decoded gives way to the next one.
    Otherwise centre crops, and such a file comes as label -1, to be dropped. Broken files are named once each.
    """
    def __init__(self, path, size, train=False, crop=False):
        if not Path(path).is_dir():
            raise UserError(f"--data {path}: no such folder; give an image folder with one subfolder per class"
                            " (class/*.jpg), or `--data shapes`")
        try:
            files = ImageFolder(path, allow_empty=True)
        except FileNotFoundError:
            raise UserError(f"--data {path}: no class folders in it; images are expected as {path}/CLASS/*.jpg") from None
        if not files.samples:
            raise UserError(f"--data {path}: no image in any of its {len(files.classes)} class folders")
        self.samples, self.classes, self.size, self.train, self.crop = files.samples, files.classes, size, train, crop
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()   # seen by all workers

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, item):
        index, key = item
        for _ in range(len(self.samples)):
            path, label = self.samples[index]
            try:
                image = read_image(path)
                image = random_crop(image, self.size, key) if self.train and self.crop else center_crop(image, self.size)
                return torch.from_numpy(np.array(image)).permute(2, 0, 1), label, key
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                if not self.broken[index]:
                    self.broken[index] = True
                    print(f"skipped {path}: {error}", flush=True)
            if not self.train:
                return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1, key
            index = (index + 1) % len(self.samples)
        raise UserError("not one image of this folder can be decoded")


class Shapes(Dataset):
    """Ten coloured shapes on a coloured ground, drawn on the fly: image i is a function of i alone.

    Colours, position, size and angle come from a hash of (index, parameter) and say nothing about the class,
    which is index % 10. Outlines mirror about their own vertical axis and angles are symmetric about 0, so a
    mirrored picture is as likely as the original. Indices from 50,000 on are never trained on.
    """

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
        """What DataLoader calls for a batch: [(index, key), ...] -> [(image uint8 (3,size,size), label, key), ...]."""
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
    split = Path(data, "train")
    return Folder(split if split.is_dir() else data, size, train=True, crop=crop)


def open_val(val, data, size):
    """The held-out set, never trained on: --val, held-out shapes, or DATA/val; None where there is none."""
    if (val or data) == "shapes":
        return Shapes(size, first=50_000, count=10_000)
    path = Path(val or Path(data, "val"))
    return Folder(path, size) if val or path.is_dir() else None


class Order(Sampler):
    """Which images make up which batch: epoch e is permutation(seed, e), step s takes positions s*batch ... of the
    endless sequence of epochs. Yields lists of (index, key), key = hash(seed, step, place in the global batch)."""
    def __init__(self, length, batch, accum=1, seed=0, step=0, rank=0, world=1):
        self.length, self.batch, self.accum, self.seed, self.step = length, batch, accum, seed, step
        self.rank, self.world, self.micro = rank, world, batch // (accum * world)

    def __iter__(self):
        permutation = lru_cache(2)(lambda epoch: torch.randperm(
            self.length, generator=torch.Generator().manual_seed(int(mix(self.seed, epoch)))))
        step = self.step
        while True:
            for micro in range(self.accum):
                first = (micro * self.world + self.rank) * self.micro
                places = torch.arange(first, first + self.micro)
                keys = mix(self.seed, step, places).tolist()
                positions = (step * self.batch + places).tolist()
                yield [(int(permutation(p // self.length)[p % self.length]), key) for p, key in zip(positions, keys)]
            step += 1


def batches(dataset, order, workers, device):
    """Endless (images (b,3,H,W) in [0,1] on the device, labels (b,) on the device, keys (b,) on the CPU)."""
    loader = DataLoader(dataset, batch_sampler=order, pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupt,
                        num_workers=worker_count(dataset, workers))
    for images, labels, keys in loader:
        yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True), keys


def worker_count(dataset, workers=None):
    """Loader processes: as asked, else none for shapes, one per core, at most 8, for files."""
    return workers if workers is not None else 0 if isinstance(dataset, Shapes) else min(8, os.cpu_count())


def ignore_interrupt(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                              # Ctrl-C is for the main process to handle


def in_order(dataset, batch, device, rank=0, world=1, workers=None, most=None):
    """Each image once (the first `most`), ranks taking turns: (images, labels, indices), undecodable files left out."""
    items = [(i, i) for i in range(rank, min(len(dataset), most or len(dataset)), world)]
    for images, labels, indices in DataLoader(dataset, num_workers=worker_count(dataset, workers), batch_sampler=[
            items[i:i + batch] for i in range(0, len(items), batch)]):
        good = labels >= 0
        if good.any():
            yield images[good].to(device).float() / 255, labels[good].to(device), indices[good]


# ---------------------------------------------------------------------------------------------------------------------
# Frozen encoders

IMAGENET, HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)


class Encoder(NamedTuple):
    timm: str               # timm model name
    input: int              # side of the encoder's input ...
    image: int              # ... for images of this side
    patch: int              # pixels per token in the encoder's input
    dim: int                # channels of a token
    pixels: tuple           # pixel mean and standard deviation
    antialias: bool = True  # how the reference implementation resamples the position embedding
    options: dict = {}      # what timm's model of that name lacks

    @property
    def stride(self):       # image pixels per token
        return self.image * self.patch // self.input


ENCODERS = {
    #                     timm model                                input image patch dim  pixels
    "dinov2_s":  Encoder("vit_small_patch14_reg4_dinov2.lvd142m",   224, 256, 14,  384, IMAGENET),
    "dinov2_b":  Encoder("vit_base_patch14_reg4_dinov2.lvd142m",    224, 256, 14,  768, IMAGENET),
    "dinov2_l":  Encoder("vit_large_patch14_reg4_dinov2.lvd142m",   224, 256, 14, 1024, IMAGENET),
    "siglip2_b": Encoder("vit_base_patch16_siglip_256.v2_webli",    256, 256, 16,  768, HALF,
                         options=dict(act_layer=partial(nn.GELU, approximate="tanh"))),
    "mae_b":     Encoder("vit_base_patch16_224.mae",                256, 256, 16,  768, IMAGENET, antialias=False),
    "dino_s8":   Encoder("vit_small_patch8_224.dino",               224, 224,  8,  384, IMAGENET,            # discriminator
                         options=dict(act_layer=partial(nn.GELU, approximate="tanh"))),
    "pixel":     Encoder("",                                        256, 256, 16,  768, HALF),
    "tiny":      Encoder("vit_tiny_patch16_224",                     32,  32,  8,   96, HALF, options=dict(
                         img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4)),
}


def build_encoder(name, image_size, weights=None, flag="--encoder-weights"):
    """The frozen encoder of ENCODERS[name]: normalised pixels (B,3,h,w) -> layer-normed patch tokens (B,N,D).

    weights: None for the pretrained ones (timm's, from the hub; `tiny`: bundled), "random", the path of a state dict
    as timm or the encoder's authors publish it, or such a state dict. Source: section 3 and the release.
    """
    spec, side = ENCODERS[name], image_size // ENCODERS[name].stride
    if name == "pixel":
        return nn.Identity()
    model = timm.create_model(spec.timm, num_classes=0, global_pool="", **spec.options)   # at its pretrained size
    eps = model.norm.eps
    model.norm = nn.LayerNorm(spec.dim, eps=eps, elementwise_affine=False)     # every token: mean 0, variance 1
    if weights is None:
        weights = ROOT / "assets/tiny.pt" if name == "tiny" else fetch(f"timm/{spec.timm}", "model.safetensors",
                                                                      f"{flag} PATH ({name})")
    if str(weights) != "random":
        if not isinstance(weights, dict):
            weights = read_weights(weights)
        state = checkpoint_filter_fn(weights, model)
        unused = ("norm.", "fc_norm.", "head", "attn_pool.", "decoder", "mask_token")     # parts that are not used here
        load_strict(model, {k: v.float() for k, v in state.items() if not k.startswith(unused)}, f"encoder {name}")
    # Position embeddings at the grid of this image size, resampled as the reference implementation does.
    extra = 0 if model.no_embed_class else model.num_prefix_tokens
    model.pos_embed = nn.Parameter(resample_abs_pos_embed(model.pos_embed.detach(), [side, side],
                                                          num_prefix_tokens=extra, antialias=spec.antialias))
    model.patch_embed.set_input_size(img_size=side * spec.patch)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

def sincos_2d(side, dim):
    """Fixed position embedding (side*side, dim), MAE's convention: columns in the first half, rows in the second."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega                        # (side, dim/4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)                                        # (side, dim/2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([columns, rows], 2).reshape(side * side, dim).float()


def attention(q, k, v):
    """scaled_dot_product_attention over (B, heads, N, head_dim); in fp32 on CPUs, whose bf16 kernel is ten times slower."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


def patchify(images, patch):
    """(B,3,h*patch,w*patch) -> (B,h*w,3*patch*patch), a token's values ordered (row, column, channel)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, -1, C * patch * patch)


def unpatchify(x, patch):
    """The inverse of patchify for square grids."""
    B, N, _ = x.shape
    side = math.isqrt(N)
    return x.reshape(B, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, side * patch, side * patch)


class DecoderBlock(nn.Module):
    def __init__(self, width, heads, mlp_hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(attention(q, k, v).transpose(1, 2).flatten(2))      # (B, N, width)
        return x + self.mlp(self.norm2(x))


DECODERS = {  #       width depth heads mlp_hidden
    "tiny": dict(width=128,  depth=4,  heads=4,  mlp_hidden=512),
    "B":    dict(width=768,  depth=12, heads=12, mlp_hidden=3072),
    "L":    dict(width=1024, depth=24, heads=16, mlp_hidden=4096),
    "XL":   dict(width=1152, depth=28, heads=16, mlp_hidden=4096),
}


class Decoder(nn.Module):
    """MAE's ViT decoder: tokens (B,N,D) -> normalised pixels (B,3,h*patch,w*patch). Source: section 3, appendix."""
    def __init__(self, tokens, token_dim, width, depth, heads, mlp_hidden, patch):
        super().__init__()
        if width % heads or width % 4 or math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"a decoder of width {width} with {heads} heads on {tokens} tokens cannot be built: heads and 4"
                            " must divide the width, and the tokens form a square")
        self.patch = patch
        self.embed = nn.Linear(token_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_2d(math.isqrt(tokens), width), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.predict = nn.Linear(width, 3 * patch * patch)

    def forward(self, z):
        x = self.embed(z) + self.pos_embed                                    # (B, N, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)          # [CLS] has no position
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.predict(self.norm(x[:, 1:])).float(), self.patch)


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder

class RAE(nn.Module):
    """Frozen encoder + latent statistics + decoder.

    encoder: a name in ENCODERS; decoder: a preset's name or a dict(width=, depth=, heads=, mlp_hidden=); image_size: side
    of the images the encoder sees, decoded at image_size * upsample; encoder_weights: see build_encoder, False: decode only.
    """
    def __init__(self, encoder="dinov2_b", decoder="XL", image_size=256, upsample=1, encoder_weights=None):
        super().__init__()
        if encoder not in ENCODERS:
            raise UserError(f"unknown encoder {encoder!r}; there are {', '.join(ENCODERS)}")
        if isinstance(decoder, str) and decoder not in DECODERS:
            raise UserError(f"unknown decoder {decoder!r}; there are {', '.join(DECODERS)}")
        self.spec = spec = ENCODERS[encoder]
        if image_size % spec.stride or image_size < spec.stride:
            raise UserError(f"image size {image_size} does not fit encoder {encoder}: take a multiple of {spec.stride}")
        sizes = DECODERS[decoder] if isinstance(decoder, str) else decoder
        self.config = dict(encoder=encoder, decoder=dict(sizes), image_size=image_size, upsample=upsample)
        self.name, self.image_size, self.upsample = encoder, image_size, upsample
        self.token_dim, self.num_tokens = spec.dim, (image_size // spec.stride) ** 2
        self.encoder = None
        if encoder_weights is not False:
            self.load_encoder(encoder_weights)
        self.decoder = Decoder(self.num_tokens, spec.dim, patch=spec.stride * upsample, **sizes)
        self.register_buffer("mean", torch.zeros(self.num_tokens, spec.dim))
        self.register_buffer("var", torch.ones(self.num_tokens, spec.dim))
        self.register_buffer("pixel_mean", torch.tensor(spec.pixels[0]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.pixels[1]).view(3, 1, 1), persistent=False)

    def load_encoder(self, weights=None):
        self.encoder = build_encoder(self.name, self.image_size, weights)

    @property
    def std(self):
        return (self.var + 1e-5).sqrt()                                       # (N, D)

    @torch.no_grad()
    def tokens(self, images):
        """images (B,3,H,W) in [0,1] -> layer-normed patch tokens (B,N,D), in fp32 whatever autocast says."""
        if self.encoder is None:
            raise UserError("this autoencoder was loaded for decoding only")
        if images.shape[-1] == self.image_size * self.upsample:
            images = F.avg_pool2d(images, self.upsample)                      # what a data set of image_size holds
        side = self.image_size // self.spec.stride * self.spec.patch
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", align_corners=False, antialias=False)
        x = (images - self.pixel_mean) / self.pixel_std
        if self.name == "pixel":
            return patchify(x, self.spec.patch)
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            return self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens:]   # no [CLS], no registers

    def encoder_flops(self):
        """Forward FLOPs of the encoder for one image."""
        with torch.device("meta"):
            copy = RAE(**self.config, encoder_weights="random")
            return count_flops(copy.tokens, torch.empty(1, 3, self.image_size, self.image_size))[0]

    def encode(self, images):
        """images (B,3,H,W) in [0,1] -> z (B,N,D), standardised per position and channel; deterministic."""
        x = self.tokens(images)                                               # (B, N, D)
        return (x - self.mean) / self.std

    def decode(self, z, decoder=None):
        """z (B,N,D) -> images (B,3,H',W'), about [0,1], unclamped. decoder: another one (EMA) in the place of ours."""
        x = (decoder or self.decoder)(z * self.std + self.mean)               # (B, 3, H', W')
        return x * self.pixel_std + self.pixel_mean


# ---------------------------------------------------------------------------------------------------------------------
# Files: ours, the release's, the hub's

HUB = "nyu-visionx/RAE-collections"
RELEASED = {  # name: encoder, image size, decoder file, statistics file, all in HUB
    "dinov2_b": ("dinov2_b", 256, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                 "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2_b_512": ("dinov2_b", 512, "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                     "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
    "siglip2_b": ("siglip2_b", 256, "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
                  "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
    "mae_b": ("mae_b", 256, "decoders/mae/base_p16/ViTXL_n08/model.pt", "stats/mae/base_p16/ImageNet1k/stat.pt"),
}


def fetch(repo, file, flag, folder=None):
    """The local path of a hub file, from `folder` (same relative path) or through the hub's cache."""
    if folder is not None:
        if not (Path(folder) / file).is_file():
            raise UserError(f"{flag.split()[0]} {folder}: {file} is not in it; the files of {repo} are expected there under"
                            " the same relative paths")
        return Path(folder) / file
    import huggingface_hub as hub
    hub.utils.logging.set_verbosity_error()                                   # one sentence below instead of its retries
    try:
        return Path(hub.hf_hub_download(repo, file))
    except OSError as error:
        raise UserError(f"cannot fetch {file} of {repo} from the Hugging Face hub ({type(error).__name__}); without a network,"
                        f" bring that file yourself and name it with {flag}") from None


def read_weights(path):
    """A state dict or checkpoint from a .safetensors or torch file, without running any code that is in it."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint that can be read without running code from it"
                        f" ({str(error).splitlines()[0][:100]})") from None


def save_checkpoint(path, **state):
    """Write a checkpoint of plain types through a temporary file, so that a killed process leaves the last good one.
    Returns whether it could be written; a full disk is reported, and training goes on."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(dict(state, versions=dict(torch=str(torch.__version__), timm=timm.__version__)), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        print(f"WARNING: {path} could not be written ({error}); the last good one stays, the next save tries again", flush=True)
        return False
    return True


def resume(path, fixed):
    """(checkpoint, its step) of an earlier start of this run, or (None, 0). `fixed`: what must not have changed since."""
    if not path.exists():
        return None, 0
    saved = read_weights(path)
    changed = [f"{key} {saved['fixed'].get(key)} there, {value} now" for key, value in fixed.items()
               if saved["fixed"].get(key) != value]
    if changed:
        raise UserError(f"{path} belongs to other settings ({'; '.join(changed)}); give them again, or another --run")
    lines = Path(path.parent, "log.jsonl")
    if dist.get_rank() == 0 and lines.exists():                               # steps after the checkpoint are run again
        kept = [line for line in lines.read_text().splitlines() if json.loads(line)["stage"] != fixed["stage"]
                or json.loads(line)["step"] <= saved["step"]]
        lines.write_text("".join(line + "\n" for line in kept))
    return saved, saved["step"]


def log(run, **values):
    """One line to RUN/log.jsonl and, readably, to the terminal; on rank 0."""
    if dist.get_rank() == 0:
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        Path(run).mkdir(parents=True, exist_ok=True)
        with open(Path(run, "log.jsonl"), "a") as file:
            file.write(json.dumps(values) + "\n")
        eta = timedelta(seconds=round(values.pop("eta", None) or 0))
        print("  ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in values.items()
                        if v is not None), f" eta {eta}", flush=True)


def load_strict(module, state, what):
    """load_state_dict, with one sentence that names the keys that are missing, foreign or misshapen."""
    own = module.state_dict()
    wrong = {"missing": own.keys() - state.keys(), "foreign": state.keys() - own.keys(),
             "misshapen": {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}}
    if any(wrong.values()):
        raise UserError(f"{what}: these weights belong to another model: " + "; ".join(
            f"{len(keys)} {kind} ({', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''})"
            for kind, keys in wrong.items() if keys))
    module.load_state_dict(state)


def newest(name):
    """The newest out/*/name, else the bundled demo's."""
    return max(Path("out").glob(f"*/{name}"), key=lambda path: path.stat().st_mtime, default=ROOT / "assets/demo" / name)


def from_release(state_dict):
    """A released decoder's state dict -> Decoder's. KeyError-free: what is missing or foreign shows in load_strict."""
    state = dict(state_dict)
    position = state.pop("decoder_pos_embed", None)                           # fixed: may be absent, must be sin-cos
    if position is not None:
        expected = sincos_2d(math.isqrt(position.shape[1] - 1), position.shape[2])
        if (position[0, 1:] - expected).abs().max() > 1e-4 or position[0, 0].abs().max() > 0:
            raise UserError("decoder_pos_embed of this file is not the fixed sin-cos embedding")
    for key in [k for k in state if k.endswith("attention.attention.query.weight")]:
        layer = key.removesuffix("query.weight")
        for kind in ("weight", "bias"):                                       # three linears -> one
            parts = [state.pop(f"{layer}{part}.{kind}", None) for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                state[f"{layer}qkv.{kind}"] = torch.cat(parts)
    names = {"trainable_cls_token": "cls_token", "decoder_embed.": "embed.", "decoder_layers.": "blocks.",
             "attention.attention.qkv.": "qkv.", "attention.output.dense.": "proj.", "intermediate.dense.": "mlp.0.",
             "output.dense.": "mlp.2.", "layernorm_before.": "norm1.", "layernorm_after.": "norm2.",
             "decoder_norm.": "norm.", "decoder_pred.": "predict."}
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def unwrap(state):
    """A released file -> the state dict in it, bare or wrapped in `ema` or `model`."""
    return state.get("ema") or state.get("model") or state


def load_rae(path_or_name, device="cpu", encoder=None, decode_only=False, weights=None):
    """An RAE for use (EMA decoder, eval mode) on the device.

    path_or_name: our rae.pt or its run folder, `release:NAME` (RELEASED; from `weights`, a folder, or the hub), or a
    released decoder file with its stat.pt beside it; `encoder` then says whose latents it decodes.
    """
    device, name = torch.device(device), str(path_or_name)
    if name.startswith("release:"):
        if name[8:] not in RELEASED:
            raise UserError(f"unknown {name}; there are {', '.join('release:' + key for key in RELEASED)}")
        encoder, _, file, stat = RELEASED[name[8:]]
        path, stat = fetch(HUB, file, "--weights DIR", weights), fetch(HUB, stat, "--weights DIR", weights)
    else:
        path = Path(name) / "rae.pt" if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; train_decoder.py writes it")
        stat = path.parent / "stat.pt"
    saved = read_weights(path)
    if "config" in saved and "encoder" in saved:                              # ours
        rae = RAE(**saved["config"], encoder_weights=False if decode_only else saved["encoder"])
        load_strict(rae.decoder, {k: v.float() for k, v in saved["ema"].items()}, str(path))
        rae.mean.copy_(saved["mean"]), rae.var.copy_(saved["var"])
    else:
        rae = load_released_decoder(unwrap(saved), read_weights(stat), encoder, decode_only, str(path))
    return rae.eval().requires_grad_(False).to(device)


def load_released_decoder(state, stat, encoder, decode_only, path):
    if encoder not in ENCODERS:
        raise UserError(f"{path} is a released decoder, and its shapes cannot tell whose latents it decodes: name the encoder"
                        f" ({', '.join(ENCODERS)})")
    try:
        (width, _), depth = state["decoder_embed.weight"].shape, 1 + max(int(k.split(".")[1]) for k in state if "layers" in k)
        hidden, patch = state["decoder_layers.0.intermediate.dense.weight"].shape[0], state["decoder_pred.bias"].numel()
    except KeyError as error:
        raise UserError(f"{path} is neither a rae.pt nor a released decoder: {error} is not in it") from None
    heads = {sizes["width"]: sizes["heads"] for sizes in DECODERS.values()}.get(width, width // 64)
    spec, var = ENCODERS[encoder], stat["var"]
    rae = RAE(encoder, dict(width=width, depth=depth, heads=heads, mlp_hidden=hidden), var.shape[-1] * spec.stride,
              math.isqrt(patch // 3) // spec.stride, encoder_weights=False if decode_only else None)
    load_strict(rae.decoder, from_release(state), path)
    rae.var.copy_(var.flatten(1).T)                                           # (D, h, w) -> (N, D), here and nowhere else
    if stat.get("mean") is not None:
        rae.mean.copy_(stat["mean"].flatten(1).T)
    return rae


def count_flops(module, *inputs):
    """Forward FLOPs (a multiply-add is two): (in all, without the attention products). On the meta device this is free."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    ops = counter.get_flop_counts()["Global"]
    return sum(ops.values()), sum(n for op, n in ops.items() if "bmm" not in str(op) and "attention" not in str(op))


def describe(what, module, *inputs):
    """Print parameters, FLOPs per image and training memory of a module on the meta device, inputs being one image's."""
    parameters, (full, linear) = sum(p.numel() for p in module.parameters()), count_flops(module, *inputs)
    frozen = sum(b.numel() for name, b in module.named_buffers() if name in module.state_dict())
    print(f"{what}: {(parameters + frozen) / 1e6:.1f} M parameters ({frozen / 1e6:.1f} M frozen)\n"
          f"  {linear / 2e9:.1f} G multiply-adds per image without attention products (Table 1b), {full / 2e9:.1f} G with them,"
          f" {full / 1e9:.1f} GFLOPs\n  training memory: {parameters * 20 / 2**30:.1f} GiB = weights, gradients, 2 x AdamW, EMA at"
          f" {parameters * 4 / 2**30:.1f} GiB each; activations come on top")


def start():
    """Join torchrun's process group, or make one of a single process: (device, rank, world size)."""
    torch.set_float32_matmul_precision("high")                                # TF32 where there is such a thing
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, **alone)
    return device, dist.get_rank(), dist.get_world_size()


def average(sums):
    """A tensor averaged over the ranks, as a list of floats: the one host-device sync of a step that logs."""
    dist.all_reduce(sums)
    return (sums / dist.get_world_size()).tolist()


def best_dtype(device):
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16")
    return "bf16" if fast else "fp32"


class StopSignal:
    """SIGTERM and Ctrl-C ask for a last save; the second one ends the process."""
    def __init__(self):
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.seen = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self):
        """Whether any rank was asked to stop; on the host, without waiting for the device."""
        seen = torch.tensor(float(self.seen))
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        self.seen = bool(seen)
        return self.seen


def at_least(low, kind=int):
    """An argparse type: a number not below `low`."""
    def parse(text):
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {low} is needed")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def main():
    parser = argparse.ArgumentParser(description="Reconstruct images with an RAE.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--run", help="run folder, rae.pt or release:NAME (default: the newest out/*/rae.pt, else the demo)")
    parser.add_argument("--weights", help="folder with the released files, in place of the hub")
    parser.add_argument("--out", default="reconstruction.png")
    args = parser.parse_args()
    run = args.run or newest("rae.pt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rae = load_rae(run, device, weights=args.weights)
    size = rae.image_size * rae.upsample
    try:
        images = torch.stack([torch.from_numpy(np.array(center_crop(read_image(path), size))) for path in args.images])
    except OSError as error:
        raise UserError(f"cannot read an image: {error}") from None
    images = images.permute(0, 3, 1, 2).to(device).float() / 255              # (B, 3, H, W)
    with torch.no_grad():
        copies = rae.decode(rae.encode(images)).clamp(0, 1)
    save_image(torch.cat([images, copies]), args.out, nrow=len(images))
    psnr = -10 * (images - copies).square().mean((1, 2, 3)).log10().mean()
    print(f"autoencoder {run} ({rae.name}): {len(images)} images, mean PSNR {psnr:.2f} dB")
    print(f"wrote {args.out}: originals above reconstructions. Next: python train_dit.py --rae {run}")


if __name__ == "__main__":
    main()

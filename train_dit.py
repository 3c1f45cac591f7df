"""Stage 2: train a diffusion transformer (DiT, or with a DDT head DiT^DH) by flow matching on RAE latents.

    x_t = (1 - t) z + t eps,  v = d x_t / dt = eps - z,  loss = || DiT(x_t, t, y) - v ||^2,  t = 1 is noise

    python train_dit.py                                                # on the newest autoencoder under out/
    torchrun --nproc_per_node=8 train_dit.py --width 1152 --head 2048  # DiT^DH-XL, the paper's best

Starting the same command again resumes. Writes dit.pt, log.jsonl and samples/*.png into the run's folder.
B images, N tokens, D channels of a token, W backbone width, H head width. Source: arXiv 2510.11690.
"""
import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rae import (ENCODERS, HUB, LOST, RAE, ROOT, Order, UserError, at_least, attention, batches, best_dtype,
                 count_flops, describe, fetch, in_order, load_rae, load_strict, log, mix, newest, normals,
                 open_data, open_val, read_weights, resume, save_checkpoint, save_picture, sincos_2d, start,
                 stop_signal, unwrap)

SIZES = {  # width: depth, heads
    192:  (4, 6),        # for the encoder `tiny`
    384:  (12, 6),       # S
    768:  (12, 12),      # B
    1024: (24, 16),      # L
    1152: (28, 16),      # XL
}


# Time: which noise levels the model trains on

def shift_alpha(tokens, token_dim, base=4096):
    """The dimension-dependent shift alpha = sqrt(m / n), m = tokens x token_dim, n = base (section 4.2)."""
    return math.sqrt(tokens * token_dim / base)


def time_shift(t, alpha):
    """t in [0,1] -> alpha t / (1 + (alpha - 1) t) in [0,1]: alpha > 1 moves time towards noise."""
    return alpha * t / (1 + (alpha - 1) * t)


# The model

def rope_angles(side, head_dim):
    """2-D rotary angles (side*side, head_dim/2): rows turn the first half of channels, columns the rest."""
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies   # (side, head_dim/4)
    return torch.cat([angles.repeat_interleave(side, 0), angles.repeat(side, 1)], 1)


def rotate(x, cos, sin):
    """Turn each channel pair of x (B,heads,N,head_dim) by its angle, in fp32; cos, sin (N, head_dim/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class TimeEmbedder(nn.Module):
    """t (B,) -> (B, width): 256 fixed random Fourier frequencies, then an MLP."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = 2 * math.pi * t.float()[:, None] * self.W                    # (B, 256)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class RMSNorm(nn.RMSNorm):
    """adaLN: normalise x (B,N,W) in fp32, then scale and shift it, in their dtype, with one vector per image
    (B,1,W) or per token (B,N,W)."""
    def forward(self, x, shift, scale):
        x = F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps).to(scale.dtype)
        return torch.addcmul(shift, x, 1 + scale)                             # x (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, C)
        x = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(x.transpose(1, 2).flatten(2))                        # (B, N, width)


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * int(4 * width))
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """LightningDiT block with adaLN-zero; the condition c is one vector per image (B,1,W) or token (B,N,W)"""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x, shift1, scale1), cos, sin)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, token_dim):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(width, eps=1e-6), nn.Linear(width, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(self.norm_final(x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on latent tokens; head > 0 adds a DDT head of that width (DiT^DH).

    Parameters carry the released checkpoints' names. Errors: a width that its heads do not divide into a
    multiple of 4 channels each (2-D RoPE), tokens that form no square. Source: sections 4.1 and 5 (DiT^DH).
    """
    def __init__(self, tokens=256, token_dim=768, width=1152, depth=28, heads=16, head=2048, head_depth=2,
                 head_heads=16, num_classes=1000):
        super().__init__()
        self.config = dict(tokens=tokens, token_dim=token_dim, width=width, depth=depth, heads=heads,
                           head=head, head_depth=head_depth, head_heads=head_heads, num_classes=num_classes)
        self.num_classes, self.depth, self.head, side = num_classes, depth, head, math.isqrt(tokens)
        for what, w, h in (("width", width, heads), ("head", head, head_heads)):
            if w % h or w // h % 4:
                raise UserError(f"{what} {w} does not divide into {h} heads of a multiple of 4 channels each"
                                f" (2-D RoPE); change --{what} or --{'head-' * (what == 'head')}heads")
        if side * side != tokens:
            raise UserError(f"{tokens} tokens do not form a square")
        self.s_embedder = nn.Linear(token_dim, width)
        self.register_buffer("pos_embed", sincos_2d(side, width)[None])       # (1, N, W)
        self.t_embedder, self.y_embedder = TimeEmbedder(width), nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        angles = {"": rope_angles(side, width // heads)}
        if head:
            self.x_embedder = nn.Linear(token_dim, head)
            self.s_projector = nn.Linear(width, head) if head != width else nn.Identity()
            self.blocks.extend(Block(head, head_heads) for _ in range(head_depth))
            angles["head_"] = rope_angles(side, head // head_heads)
        for name, a in angles.items():
            self.register_buffer(f"{name}cos", a.cos().float(), persistent=False)            # (N, head_dim/2)
            self.register_buffer(f"{name}sin", a.sin().float(), persistent=False)
        self.final_layer = FinalLayer(head or width, token_dim)
        self.initialize()

    def initialize(self):
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        embedders = [self.s_embedder] + ([self.x_embedder] if self.head else [])
        for linear in embedders if self.head else linears:            # DiT^DH keeps torch's default elsewhere
            nn.init.xavier_uniform_(linear.weight), nn.init.zeros_(linear.bias)
        for weight in (self.y_embedder.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:                    # every block starts as the identity
            nn.init.zeros_(layer.adaLN_modulation[1].weight), nn.init.zeros_(layer.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight), nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x_t, t, y):
        """x_t (B,N,D), t (B,) in [0,1], y (B,) int64, num_classes: the null class -> v (B,N,D) in fp32."""
        t_e, y_e = self.t_embedder(t)[:, None], self.y_embedder(y)[:, None]   # (B, 1, W)
        c = F.silu(t_e + y_e) if self.head else t_e + y_e                 # (B, 1, W); silu twice, as released
        x = self.s_embedder(x_t) + self.pos_embed                             # (B, N, W)
        for block in self.blocks[:self.depth]:
            x = block(x, c, self.cos, self.sin)
        if self.head:
            c = self.s_projector(F.silu(t_e + x))                     # (B, N, H): a condition for every token
            x = self.x_embedder(x_t)                                          # (B, N, H): x_t again
            for block in self.blocks[self.depth:]:
                x = block(x, c, self.head_cos, self.head_sin)
        return self.final_layer(x, c).float()                                 # (B, N, D)


def flow_matching_loss(model, z, y, alpha, keys=None, label_dropout=0.0, time="logit-normal"):
    """Mean squared error of the velocity (section 3.2); z (B,N,D) clean latents, y (B,) labels, alpha: shift.

    keys (B,) make eps, t and label dropout functions of the sample; None: torch's global generator is used.
    """
    B, N, D = z.shape
    draws = torch.randn(B, N * D + 2, device=z.device) if keys is None else normals(keys, N * D + 2, z.device)
    eps, u, coin = draws[:, :-2].view(B, N, D), draws[:, -2], torch.special.ndtr(draws[:, -1])
    t = time_shift(torch.sigmoid(u) if time == "logit-normal" else torch.special.ndtr(u), alpha)       # (B,)
    if label_dropout:
        y = torch.where(coin < label_dropout, getattr(model, "module", model).num_classes, y)
    x_t = torch.lerp(z, eps, t[:, None, None])                                # (1-t) z + t eps
    return F.mse_loss(model(x_t, t, y), eps - z)                              # v = d x_t / dt


# Files

RELEASED = {  # name: autoencoder (rae.RELEASED), model, AutoGuidance's weak model, scale; files in rae.HUB
    "imagenet256": ("dinov2_b", "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
                    "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt", 1.42),
    "imagenet512": ("dinov2_b_512", "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
                    "DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt", 1.5),
}


def config_of(state, heads=None, head_heads=None):
    """DiT's arguments read off a released state dict; head counts from its RoPE buffers unless given."""
    (_, tokens, width), blocks = state["pos_embed"].shape, sum(key.endswith(".norm1.weight") for key in state)
    head = state["x_embedder.proj.weight"].shape[0] if "s_embedder.proj.weight" in state else 0
    widths = [state[f"blocks.{i}.norm1.weight"].shape[0] for i in range(blocks)]
    head_depth = 0 if not head else 2 if head == width else widths.count(head)

    def count(rope, width, given, default):                                 # head dim = columns of the buffer
        buffer = state.get(f"{rope}.freqs_cos")
        return given or (default if buffer is None else width // buffer.shape[1])
    rope, preset = "enc_feat_rope" if head else "feat_rope", SIZES.get(width, (0, 16))[1]
    return dict(tokens=tokens, token_dim=state["final_layer.linear.weight"].shape[0], width=width,
                depth=blocks - head_depth, heads=count(rope, width, heads, preset),
                head=head, head_depth=head_depth, head_heads=count("dec_feat_rope", head, head_heads, 16),
                num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1)


def load_dit(path_or_name, device="cpu", weights=None, **overrides):
    """A DiT for use (EMA, eval mode) from our dit.pt or its run folder, a released stage2_model.pt or
    release:NAME (release:NAME/weak: its AutoGuidance model). overrides: heads, head_heads, where a
    released file lacks the RoPE buffers. Missing, foreign or misshapen keys are an error that names them."""
    name = str(path_or_name)
    if name.startswith("release:"):
        name, _, weak = name[8:].partition("/")
        if name not in RELEASED:
            raise UserError(f"unknown release:{name}; there are release:{', release:'.join(RELEASED)}")
        path = fetch(HUB, RELEASED[name][2 if weak else 1], "--weights DIR", weights)
    else:
        path = Path(name) / "dit.pt" if Path(name).is_dir() else Path(name)
    saved = read_weights(path)
    if "config" in saved:                                                     # ours
        config, state = saved["config"], {key: value.float() for key, value in saved["ema"].items()}
        if "width" not in config:
            raise UserError(f"{path} is a checkpoint of another kind, no dit.pt as train_dit.py writes")
    else:
        state = {key: value.float() for key, value in unwrap(saved).items()}
        try:
            config = config_of(state, **overrides)
        except KeyError as error:
            raise UserError(f"{path} is neither a dit.pt nor a released model: {error} is missing") from None
        if not config["head"]:                                         # the release calls it x_embedder there
            state = {key.replace("x_embedder.", "s_embedder."): value for key, value in state.items()}
        for old, new in (("embedder.proj.", "embedder."), ("y_embedder.embedding_table.", "y_embedder.")):
            state = {key.replace(old, new): value for key, value in state.items() if "feat_rope." not in key}
        for key in ("s_embedder.weight", "x_embedder.weight"):          # 1x1 convolutions there, linears here
            if key in state:
                state[key] = state[key].flatten(1)
    model = DiT(**config)
    load_strict(model, state, str(path))
    own = saved if "config" in saved else {}                                  # what sampling needs besides
    model.alpha = own.get("alpha") or shift_alpha(config["tokens"], config["token_dim"])
    model.classes = own.get("classes", list(range(config["num_classes"])))          # []: unconditional
    model.rae = own.get("rae") or str(path.parent / "rae.pt")
    if name in RELEASED:
        model.rae = f"release:{RELEASED[name][0]}"
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def evaluate(model, rae, dataset, alpha, device, rank=0, world=1, unconditional=False, batch=64, most=1024):
    """On held-out images: the loss at five times t, and FD, the Fréchet distance in the encoder's space (mean
    tokens) of latents generated for the same labels in 25 steps to the real ones; `most` images."""
    from fid import frechet_distance, moments
    from sample import euler, guided, sample_times
    n, times = min(most, len(dataset)), (0.1, 0.3, 0.5, 0.7, 0.9)
    losses, means = torch.zeros(len(times), device=device), torch.zeros(2, n, rae.token_dim, device=device)
    for images, y, indices in in_order(dataset, batch, device, rank, world, most=n):
        z, size = rae.encode(images), rae.num_tokens * rae.token_dim
        y = torch.full_like(y, model.num_classes) if unconditional else y
        eps, noise = (normals(mix(0, part, indices), size, device).view_as(z) for part in (3, 4))
        for i, t in enumerate(times):
            v = model(torch.lerp(z, eps, t), torch.full((len(z),), t, device=device), y)
            losses[i] += (v - (eps - z)).square().mean((1, 2)).sum()
        fake = euler(guided(model, y), noise, sample_times(25, alpha))
        means[:, indices] = torch.stack([(x * rae.std + rae.mean).mean(1) for x in (z, fake)])
    dist.all_reduce(losses), dist.all_reduce(means)
    real, fake = (part[part.abs().sum(1) > 0] for part in means)              # without undecodable files
    return dict(n=len(real), fd=frechet_distance(*moments(fake), *moments(real)),
                **{f"loss@{t}": loss for t, loss in zip(times, (losses / len(real)).tolist())})


# Training

RECIPES = {  # the paper's for its encoders, and one for a laptop; flags override
    "paper": dict(width=1152, head=2048, head_heads=16, batch=1024, lr=2e-4, epochs=80, warmup=0,
                  decay_start=None, decay_end=800, ema=None, shift_base=4096, log_every=50, save_every=5000),
    "tiny":  dict(width=192, head=256, head_heads=8, batch=64, lr=3e-3, epochs=2.5, warmup=0.25,
                  decay_start=0.25, decay_end=2.5, ema=0.99, shift_base=170, log_every=50, save_every=500),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--run", default=None, help="run folder (default: that of the newest out/*/rae.pt)")
    add("--rae", default=None, help="autoencoder: rae.pt, run folder or release:NAME (default: the run's)")
    add("--weights", default=None, help="folder with the released files, in place of the hub")
    add("--encoder", default=None, help="with --describe: an encoder's latent shape, without a run")
    add("--data", default=None, help="image folder or `shapes` (default: shapes for tiny, or data/imagenet)")
    add("--val", default=None, help="held-out images, not trained on (default: DATA/val or held-out shapes)")
    add("--init", default=None, help="start from these weights: dit.pt, a released file or release:NAME")
    # model
    add("--width", type=at_least(4), help="backbone width: 384 S, 768 B, 1024 L, 1152 XL, and so its depth")
    add("--depth", type=int, default=0, help="backbone blocks (default: by width)")
    add("--heads", type=int, default=0, help="backbone attention heads (default: by width)")
    add("--head", type=at_least(0), help="width of the DDT head, 0: none; it must reach the token dimension")
    add("--head-depth", type=int, default=2, help="blocks of the DDT head")
    add("--head-heads", type=int, help="attention heads of the DDT head")
    # flow matching
    add("--time", choices=("logit-normal", "uniform"), default="logit-normal", help="t before the shift")
    add("--no-shift", action="store_true", default=False, help="alpha = 1, for the paper's ablation")
    add("--shift-base", type=float, help="n in alpha = sqrt(tokens x channels / n)")
    add("--label-dropout", type=float, default=0.1, help="share of null labels; 1: an unconditional model")
    # optimisation
    add("--epochs", type=at_least(0, float), help="length of training; 1 epoch of shapes: 50,000 images")
    add("--steps", type=at_least(1), default=0, help="stop after so many optimiser steps, the schedule stays")
    add("--batch", type=at_least(1), help="images per optimiser step, over all ranks and accumulation")
    add("--accum", type=at_least(1), default=1, help="micro-batches per optimiser step")
    add("--lr", type=float, help="AdamW's learning rate")
    add("--warmup", type=float, help="epochs of linear warm-up")
    add("--decay-start", type=float, help="epoch where the learning rate begins to fall (40; no head: never) ...")
    add("--decay-end", type=float, help="... linearly, and where it has reached a tenth")
    add("--clip", type=float, default=None, help="gradient norm (default: 1 with a head, else none)")
    add("--ema", type=float, help="decay of the average (default: 0.9995 with head, or 0.9999)")
    add("--seed", type=int, default=0, help="of weights, data order, noise, times and label dropout")
    # machine
    add("--workers", type=int, default=None, help="loader processes per rank (default: cores; shapes: 0)")
    add("--dtype", choices=("fp32", "bf16"), default=None, help="autocast (default: bf16 where it is fast)")
    add("--compile", action="store_true", default=False, help="torch.compile")
    add("--save-every", type=at_least(1), help="steps between checkpoints and sample pictures")
    add("--log-every", type=at_least(1), help="steps between lines of the log")
    add("--eval-every", type=int, default=0, help="steps between evaluations on --val")
    add("--describe", action="store_true", default=False, help="print parameters, FLOPs and memory, and stop")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    device, rank, world = start()
    say = print if rank == 0 else lambda *_: None

    # The autoencoder, the settings that follow from it, the data
    if args.encoder and not args.describe:
        raise UserError("--encoder goes with --describe: stage 2 takes the encoder of its autoencoder, which"
                        " --run or --rae names")
    path = args.rae or (Path(args.run, "rae.pt") if args.run else newest("rae.pt"))
    if not args.rae and args.run and not Path(path).exists() and not args.encoder:
        raise UserError(f"{args.run} holds no rae.pt: train_decoder.py --run {args.run} makes it, --rae names"
                        " another")
    if args.describe and args.encoder:
        rae = RAE(args.encoder, "tiny", ENCODERS[args.encoder].image, encoder_weights=False)
    else:
        rae = load_rae(path, device, weights=args.weights, decode_only=args.describe)
    tiny = rae.name == "tiny"
    args = argparse.Namespace(**{**RECIPES["tiny" if tiny else "paper"], **vars(args)})
    depth, heads = SIZES.get(args.width, (args.depth, args.heads))
    if not depth or not heads:
        raise UserError(f"--width {args.width} is no preset ({', '.join(map(str, SIZES))}):"
                        " give --depth and --heads")
    config = dict(tokens=rae.num_tokens, token_dim=rae.token_dim, width=args.width, depth=args.depth or depth,
                  heads=args.heads or heads, head=args.head, head_depth=args.head_depth,
                  head_heads=args.head_heads)
    with torch.device("meta"):
        one_image = torch.empty(1, rae.num_tokens, rae.token_dim), torch.empty(1), torch.empty(1).long()
        if args.describe:
            return rank or describe(f"DiT {config}", DiT(**config), *one_image)
        image_flops = 3 * count_flops(DiT(**config), *one_image)[0] + rae.encoder_flops()  # with backward
    width, n = args.head or args.width, rae.token_dim
    alpha = 1 if args.no_shift else shift_alpha(rae.num_tokens, n, args.shift_base)
    if width < n:
        say(f"WARNING: the output has at most rank {width} of {n} token dimensions. Theorem 1: the loss"
            f" cannot fall below {1 - width / n:.3f} at any depth."
            f" Raise --{'head' if args.head else 'width'} to {n}.")
    data = args.data or ("shapes" if tiny else "data/imagenet")
    dataset, held_out = open_data(data, rae.image_size), open_val(args.val, data, rae.image_size)
    if held_out and held_out.classes != dataset.classes:
        raise UserError(f"--val has other classes ({len(held_out.classes)}) than --data: name another")
    config["num_classes"] = len(dataset.classes)
    if args.batch % (world * args.accum):
        raise UserError(f"--batch {args.batch} does not divide over {world} ranks x {args.accum} --accum")
    origin = path if str(path).startswith("release:") else Path(path).resolve()
    elsewhere = args.rae or ROOT / "assets" in Path(path).parents          # not the folder of the autoencoder
    run = Path(args.run or (f"out/{rae.name}" if elsewhere else Path(path).parent))
    epoch = len(dataset) / args.batch                                         # optimiser steps in an epoch
    total = min(math.ceil(args.epochs * epoch), args.steps or math.inf)

    # Model, optimiser, weight average, and where an earlier start of this run left them
    fixed = dict(config, stage=2, seed=args.seed, batch=args.batch, data=data, images=len(dataset),
                 alpha=alpha, time=args.time, label_dropout=args.label_dropout,
                 latents=f"{rae.name} {rae.var.double().mean():.6f}")        # tells autoencoders apart
    saved, step = resume(run / "dit.pt", fixed)
    torch.manual_seed(args.seed)
    model = DiT(**config).to(device)
    if args.init and not saved:
        load_strict(model, load_dit(args.init, weights=args.weights).state_dict(), f"--init {args.init}")
    clip = args.clip if args.clip is not None else 1.0 if args.head else 0
    if args.decay_start is None:
        args.decay_start = 40 if args.head else math.inf
    ema = ModelEmaV3(model, decay=args.ema if args.ema is not None else 0.9995 if args.head else 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    if saved:
        load_strict(model, saved["model"], "model"), load_strict(ema.module, saved["ema"], "ema")
        optimizer.load_state_dict(saved["optimizer"])
        del saved
    if step >= total:
        return say(f"{run}/dit.pt is at step {step} of {total}: finished; more --epochs or --steps extend it")
    dtype = args.dtype or best_dtype(device)
    if args.compile:
        for block in model.blocks:
            block.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    order = Order(len(dataset), args.batch, args.accum, args.seed, step, rank, world)
    loader = batches(dataset, order, args.workers, device)
    say(f"{run}: DiT of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on"
        f" {rae.num_tokens} x {n} latents of {rae.name} ({path}); {data}: {len(dataset)} images,"
        f" {len(dataset.classes)} classes; alpha {alpha:.3f}, {dtype}, {world} x {device.type},"
        f" steps {step} to {total}")

    def save():
        """Whether it worked, on rank 0."""
        if rank:
            return True
        written = save_checkpoint(
            run / "dit.pt", config=config, fixed=fixed, step=step, alpha=alpha,
            classes=dataset.classes if args.label_dropout < 1 else [],
            rae=None if Path(path) == run / "rae.pt" else str(origin),          # None: in the same folder
            model=model.state_dict(),
            ema=ema.module.state_dict(), optimizer=optimizer.state_dict())
        if step >= args.save_every:
            from sample import generate
            labels = torch.arange(50) % 10 * max(1, config["num_classes"] // 10) % config["num_classes"]
            if args.label_dropout == 1:
                labels.fill_(config["num_classes"])
            images = generate(ema.module, rae, labels, mix(0, torch.arange(50)), alpha, steps=25)
            save_picture(images, run / f"samples/{step:07d}.png", nrow=10)
        return written

    # DDP orders its buckets by the first backward: done here, so that resuming is exact
    micro = args.batch // (world * args.accum)
    zeros = [torch.zeros(micro, *x.shape[1:], dtype=x.dtype, device=device) for x in one_image]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        ddp(*zeros).sum().backward()
    optimizer.zero_grad(set_to_none=True)

    # The loop, in optimiser steps
    asked, stop, since, clock = stop_signal(), False, step, time.time()
    sums = torch.zeros(3, device=device)                          # loss, steps skipped, skipped in a row
    while step < total and not stop:
        for micro in range(args.accum):
            images, y, keys = next(loader)
            mirror = (keys & 1).bool().to(device, non_blocking=True)          # a fair coin of each sample
            images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
            z = rae.encode(images)                                            # (B, N, D)
            with ddp.no_sync() if micro < args.accum - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                    loss = flow_matching_loss(ddp, z, y, alpha, keys, args.label_dropout, args.time)
                loss = loss / args.accum
                loss.backward()
            sums[0] += loss.detach()
        at = step / epoch
        decay = min(max((at - args.decay_start) / max(args.decay_end - args.decay_start, 1e-9), 0), 1)
        lr = args.lr * min(1, (step + 1) / max(args.warmup * epoch, 1)) * (1 - 0.9 * decay)
        optimizer.param_groups[0]["lr"] = lr
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.found_inf = (~norm.isfinite()).float()                 # a fused optimiser skips such a step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        sums[1] += optimizer.found_inf
        sums[2] = (sums[2] + 1) * optimizer.found_inf
        step += 1
        stop = asked.clone()                                        # reduced on the host, not on the device
        dist.all_reduce(stop, dist.ReduceOp.MAX)

        if step % args.log_every == 0 or step == total:
            steps, seconds = step - since, time.time() - clock
            dist.all_reduce(sums)
            loss, skipped, lost = sums.div_(world).tolist()                   # the one device sync
            rate = steps * args.batch / seconds
            log(run, stage=2, step=step, total=total, loss=loss / steps, lr=lr, images_per_s=rate,
                tflops=rate * image_flops / 1e12, skipped=int(skipped),
                eta=(total - step) * seconds / steps)
            if lost >= LOST:
                raise UserError(f"step {step}: the last {lost:.0f} had non-finite gradients and were skipped"
                                f" (loss {loss / steps:.4g}); {run}/dit.pt is the last good state: resume"
                                " with a lower --lr, or with --dtype fp32")
            sums[:2].zero_()
            since, clock = step, time.time()
        before = time.time()
        if step % args.save_every == 0 or step == total or stop:
            written = save()
        if args.eval_every and step % args.eval_every == 0 and held_out:
            log(run, stage=2, step=step, **evaluate(
                ema.module, rae, held_out, alpha, device, rank, world, args.label_dropout == 1))
        clock += time.time() - before
    if not written:
        raise UserError(f"the last save failed, {run}/dit.pt is older: make room and start the same again")
    say(f"wrote {run}/dit.pt and {run}/samples. Next: python sample.py --run {run}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

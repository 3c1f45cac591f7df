"""Stage 2: train a diffusion transformer (DiT, DiT^DH) by flow matching on RAE latents.

    x_t = (1 - t) z + t eps,  v = d x_t / dt = eps - z,  loss = || DiT(x_t, t, y) - v ||^2

    python train_dit.py                                                   # on out/'s newest rae.pt
    torchrun --nproc_per_node=8 -- train_dit.py --width 1152 --head 2048  # the paper's DiT^DH-XL

The same command again resumes. Writes dit.pt, log.jsonl, samples/*.png into the run's folder.
t = 1: noise. B images, N tokens of D channels, W and H width of backbone and head.
Source: arXiv 2510.11690.
"""
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from fid import frechet_distance, moments
from rae import (ENCODERS, RAE, ROOT, UserError, at_least, attention, default_data, grid_angles,
                 in_fp32, in_order, load_rae, load_strict, locate, mix, newest, normals, open_data,
                 open_val, read_weights, save_checkpoint, sincos_2d, start)
from train_decoder import (Meter, absolute, any_rank, apply_gradients, arithmetic, batches, claim,
                           describe, distributed, flags, image_flops, length_of, log, restore,
                           resume, save_picture, shuffled, stop_signal, synced, with_recipe)

SIZES = {            # width: depth, heads
    192:  (4, 6),    # for the encoder `tiny`
    384:  (12, 6),   # S
    768:  (12, 12),  # B
    1024: (24, 16),  # L
    1152: (28, 16),  # XL
}
LEAST_T = 0.05  # v = (x_t - x) / t of a predicted x divides by no less, nor does its target


# The model, from its parts up

def rotate(x, cos, sin):
    """Turn each channel pair of x (B,heads,N,C) by its angle, in fp32: cos, sin (N,C/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class TimeEmbedder(nn.Module):
    """t (B,) -> (B, width): 256 fixed random Fourier frequencies, then an MLP."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))  # of the model: saved with it
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    @in_fp32  # near t = 1 bf16 has steps of 1/256
    def forward(self, t):
        angles = 2 * math.pi * t[:, None] * self.W  # (B, 256)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class RMSNorm(nn.RMSNorm):
    """adaLN: x (B,N,W), normalised in fp32; scale, shift (B, 1 or N, W), in their dtype."""
    def forward(self, x, shift, scale):
        x = F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)
        return torch.addcmul(shift, x.to(scale.dtype), 1 + scale)  # x (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention with rotary positions: x (B,N,width) -> the same."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # each (B, heads, N, C)
        x = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, width)


class SwiGLU(nn.Module):
    """Gated MLP of about as many parameters as a plain one of four times the width."""
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * int(4 * width))  # three matrices in place of two
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)  # each (B, N, hidden)
        return self.w3(F.silu(a) * b)    # (B, N, width)


class Block(nn.Module):
    """LightningDiT block, adaLN-zero; its condition c: (B,1,W), or of each token (B,N,W)."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = RMSNorm(width, eps=1e-6)
        self.norm2 = RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, cos, sin):
        modulation = self.adaLN_modulation(c).chunk(6, -1)  # 6 x (B, 1 or N, W)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x, shift1, scale1), cos, sin)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class FinalLayer(nn.Module):
    """(B,N,W), condition -> (B,N,D): the matrix whose rank Theorem 1 is about."""
    def __init__(self, width, token_dim):
        super().__init__()
        self.norm_final = RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)  # (B, 1 or N, W)
        return self.linear(self.norm_final(x, shift, scale))  # (B, N, D)


class DiT(nn.Module):
    """Diffusion transformer on latent tokens; head > 0 adds a DDT head of that width (DiT^DH).

    Parameters carry the released names. Errors: heads that do not divide a width into multiples
    of 4 channels (2-D RoPE), tokens that form no square. Sections 4.1 and 5.

    Beyond the paper (RAEv2, arXiv 2605.18324): predict "x": the last layer gives the clean
    latent, of which forward makes v; base_head k: a second, weaker output after block k.
    """
    def __init__(self, tokens=256, token_dim=768, width=1152, depth=28, heads=16, head=2048,
                 head_depth=2, head_heads=16, num_classes=1000, predict="v", base_head=0):
        super().__init__()
        self.config = dict(tokens=tokens, token_dim=token_dim, width=width, depth=depth, heads=heads,
                           head=head, head_depth=head_depth, head_heads=head_heads,
                           num_classes=num_classes, predict=predict, base_head=base_head)
        self.num_classes = num_classes  # the null class's index, too
        self.depth = depth              # of the backbone; the head's blocks follow
        self.head = head
        self.predict = predict
        self.base_head = base_head
        side = math.isqrt(tokens)  # of the token grid
        for flag, w, its_heads, h in (("width", width, "heads", heads),
                                      ("head", head, "head-heads", head_heads)):
            if w % h or w // h % 4:
                raise UserError(f"{flag} {w} does not divide into {h} heads of a multiple of 4"
                                f" channels each (2-D RoPE): change --{flag} or --{its_heads}")
        if side * side != tokens:  # RoPE and positions are of two dimensions
            raise UserError(f"{tokens} tokens do not form a square")
        if base_head > depth:
            raise UserError(f"--base-head {base_head} is beyond the {depth} blocks of the backbone")
        if predict not in ("v", "x"):
            raise UserError(f"predict {predict!r}: a DiT gives v or x")

        # Conditions, and the backbone
        self.s_embedder = nn.Linear(token_dim, width)  # of the noisy tokens
        self.register_buffer("pos_embed", sincos_2d(side, width)[None])  # (1, N, W)
        self.t_embedder = TimeEmbedder(width)  # of the noise level
        self.y_embedder = nn.Embedding(num_classes + 1, width)  # the last: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.add_angles("", side, width // heads)

        # The head: its blocks follow the backbone's in one list, as in the released files
        if head:
            self.x_embedder = nn.Linear(token_dim, head)  # of the noisy tokens, again
            self.s_projector = nn.Linear(width, head) if head != width else nn.Identity()
            self.blocks.extend(Block(head, head_heads) for _ in range(head_depth))
            self.add_angles("head_", side, head // head_heads)  # its head dim differs
        self.final_layer = FinalLayer(head or width, token_dim)
        if base_head:
            self.base_layer = FinalLayer(width, token_dim)
        self.initialize()

    def add_angles(self, prefix, side, head_dim):
        angles = grid_angles(side, head_dim)  # (N, head_dim/2): rows turn the first half
        self.register_buffer(f"{prefix}cos", angles.cos().float(), persistent=False)
        self.register_buffer(f"{prefix}sin", angles.sin().float(), persistent=False)

    def initialize(self):
        """Zero where a block or the model ends: a block begins as the identity."""
        xavier = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if self.head:  # DiT^DH keeps torch's default elsewhere
            xavier = [self.s_embedder, self.x_embedder]
        for linear in xavier:
            nn.init.xavier_uniform_(linear.weight)  # uniform, by fan-in and fan-out
            nn.init.zeros_(linear.bias)
        for table in (self.y_embedder, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        outputs = [self.final_layer] + ([self.base_layer] if self.base_head else [])
        zeroed = [layer.adaLN_modulation[1] for layer in (*self.blocks, *outputs)]
        for linear in (*zeroed, *(layer.linear for layer in outputs)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def velocity(self, out, x_t, t):
        """A last layer's output (B,N,D) -> v. An x needs no full rank: x_t brings the noise."""
        if self.predict == "v":
            return out.float()
        return (x_t - out.float()) / t.clamp(min=LEAST_T)[:, None, None]

    def forward(self, x_t, t, y, base=False):
        """x_t (B,N,D), t (B,) in [0,1], y (B,) int64 (num_classes: no class) -> v (B,N,D), fp32;
        base: both outputs' v (2,B,N,D), of one pass."""
        t_e = self.t_embedder(t)[:, None]      # (B, 1, W)
        c = t_e + self.y_embedder(y)[:, None]  # (B, 1, W)
        if self.head:
            c = F.silu(c)  # and again in each block, as released

        # Backbone: what the tokens mean, and, on the way, what a weaker model would say
        s = self.s_embedder(x_t) + self.pos_embed  # (B, N, W)
        for number, block in enumerate(self.blocks[:self.depth], 1):
            s = block(s, c, self.cos, self.sin)
            if base and number == self.base_head:
                u = F.silu(t_e + s)  # its own input, and condition of each token
                v_base = self.velocity(self.base_layer(u, u), x_t, t)  # (B, N, D)

        # DDT head: the backbone only conditions it, token by token, and may be narrow. It embeds
        # x_t again, since v has its noise's rank: D must go through H, not through W.
        x = s
        if self.head:
            c = self.s_projector(F.silu(t_e + s))  # (B, N, H)
            x = self.x_embedder(x_t).float()       # (B, N, H), summed up in fp32
            for block in self.blocks[self.depth:]:
                x = block(x, c, self.head_cos, self.head_sin)
        v = self.velocity(self.final_layer(x, c), x_t, t)  # (B, N, D)
        return torch.stack([v, v_base]) if base else v


# The flow: a loss to learn v = d x_t / dt at every time, and steps that follow it to data

def shift_alpha(tokens, token_dim, base=4096):
    """The dimension-dependent shift sqrt(tokens token_dim / base) (section 4.2)."""
    return math.sqrt(tokens * token_dim / base)


def time_shift(t, alpha):
    """t in [0,1] -> alpha t / (1 + (alpha - 1) t) in [0,1]: alpha > 1 moves time towards noise.

    Why: many channels tell the same thing, so that at the same t noise hides a large latent far
    less than a small one. The shift compares like with like (theory/noise_shift.py).
    """
    return alpha * t / (1 + (alpha - 1) * t)


def flow_matching_loss(model, z, y, alpha, keys=None, label_dropout=0.0, time="logit-normal"):
    """Mean squared error of the velocity (section 3.2); z (B,N,D) latents, y (B,) labels.

    keys (B,) make eps, t and label dropout functions of the sample; None: torch's generator.
    A base head's loss is added: the sum starts at twice a plain model's.
    """
    # The sample's own draws: noise, time, and a coin for its label
    net = getattr(model, "module", model)  # without DDP
    B, N, D = z.shape
    if keys is None:
        draws = torch.randn(B, N * D + 2, device=z.device)
    else:
        draws = normals(keys, N * D + 2, z.device)  # (B, N D + 2)
    eps = draws[:, :-2].view(B, N, D)               # t = 1 is this
    u = draws[:, -2]
    t = torch.sigmoid(u) if time == "logit-normal" else torch.special.ndtr(u)  # (B,)
    t = time_shift(t, alpha)  # (B,)
    if label_dropout:  # so that the model knows the null class, too
        dropped = torch.special.ndtr(draws[:, -1]) < label_dropout
        y = torch.where(dropped, net.num_classes, y)

    # The whole method: a point on the straight line from z to eps, and that line's direction
    x_t = torch.lerp(z, eps, t[:, None, None])  # (1-t) z + t eps
    v = eps - z  # d x_t / dt

    # Beyond the paper; a model that does not say predicts v, and has one output
    if getattr(net, "predict", "v") == "x":
        v = (x_t - z) / t.clamp(min=LEAST_T)[:, None, None]  # eps - z, clamped as in velocity
    if getattr(net, "base_head", 0):
        full, base = model(x_t, t, y, base=True)
        return F.mse_loss(full, v) + F.mse_loss(base, v)
    return F.mse_loss(model(x_t, t, y), v)


def sample_times(steps, alpha):
    """steps + 1 times from 1 to 0: the uniform grid, shifted as in training."""
    return time_shift(torch.linspace(1, 0, steps + 1), alpha)


def euler(velocity, z, times):
    """Integrate dz/dt = velocity(z, t) over descending times: one evaluation a step."""
    for t, t_next in zip(times[:-1], times[1:]):  # t_next < t
        z = z - (t - t_next) * velocity(z, t)
    return z


def conditional(model, y, *base):
    """velocity(z, t) of a model for labels y (B,), unguided; base: as forward takes it."""
    def velocity(z, t):
        return model(z, t.to(z.device, z.dtype).expand(len(z)), y, *base)
    return velocity


# Loading and looking

def load_dit(path_or_name, device="cpu"):
    """A DiT for use (EMA, eval mode): from a dit.pt, its run's folder or release:NAME.

    What sampling needs is on it: alpha, classes ([]: unconditional), rae (the autoencoder's
    place), guide (an AutoGuidance model's, or None), its scale, label_dropout, step.
    """
    path = locate(path_or_name, "dit.pt")  # release:NAME is converted here
    saved = read_weights(path)
    config = saved.get("config", {})
    if "width" not in config:
        raise UserError(f"{path} is no dit.pt, as train_dit.py writes it (a rae.pt? a released"
                        " file? `release:NAME` reads those)")
    model = DiT(**config)
    averaged = {key: value.float() for key, value in saved["ema"].items()}
    load_strict(model, averaged, str(path))
    model.step = saved.get("step")
    model.label_dropout = saved.get("fixed", {}).get("label_dropout", 0.1)
    model.alpha = saved["alpha"]
    model.classes = saved["classes"]
    model.rae = saved.get("rae") or str(path.parent / "rae.pt")
    model.guide = str(path.parent / saved["guide"]) if saved.get("guide") else None
    model.scale = saved.get("scale")
    return model.eval().requires_grad_(False).to(device)


@torch.no_grad()
def evaluate(model, rae, dataset, alpha, device, unconditional=False, workers=None, batch=64,
             most=1024):
    """On at most `most` held-out images: the loss at five times t; and FD, the Fréchet distance
    of their mean tokens from those of latents generated for their labels in 25 steps."""
    times = (0.1, 0.3, 0.5, 0.7, 0.9)  # as they are, not shifted
    n = min(most, len(dataset))  # images, but for broken files
    losses = torch.zeros(len(times), device=device)  # sums over images
    means = torch.zeros(2, n, rae.token_dim, device=device)  # real, fake
    seen = torch.zeros(n, device=device)
    ranks = dist.get_rank(), dist.get_world_size()
    for images, y, numbers in in_order(dataset, batch, device, *ranks, workers, n):
        if unconditional:
            y = torch.full_like(y, model.num_classes)
        z = rae.encode(images)  # (B, N, D)
        size = rae.num_tokens * rae.token_dim
        eps = normals(mix(0, 3, numbers), size, device).view_as(z)
        noise = normals(mix(0, 4, numbers), size, device).view_as(z)
        for i, t in enumerate(times):
            v = model(torch.lerp(z, eps, t), torch.full((len(z),), t, device=device), y)
            losses[i] += (v - (eps - z)).square().mean((1, 2)).sum()
        fake = euler(conditional(model, y), noise, sample_times(25, alpha))  # (B, N, D)
        means[0, numbers] = (z * rae.std + rae.mean).mean(1)                 # (B, D)
        means[1, numbers] = (fake * rae.std + rae.mean).mean(1)
        seen[numbers] = 1  # on one rank each
    for sums in (losses, means, seen):
        dist.all_reduce(sums)
    real, fake = means[:, seen > 0]  # without files that cannot be decoded
    losses = (losses / len(real)).tolist()
    return dict(n=len(real), fd=frechet_distance(*moments(fake), *moments(real)),
                **{f"loss@{t}": loss for t, loss in zip(times, losses)})


@torch.no_grad()
def picture(model, rae, alpha, unconditional):
    """Fifty samples (50,3,H,W) in 25 steps, ten classes in columns, of the same noise."""
    count = model.num_classes
    column = torch.arange(50) % 10
    y = column * max(1, count // 10) % count  # of many, ten far apart
    if unconditional:
        y.fill_(count)
    device = rae.mean.device
    size = rae.num_tokens * rae.token_dim
    noise = normals(mix(0, torch.arange(50)), size, torch.device("cpu")).to(device)
    noise = noise.view(50, rae.num_tokens, rae.token_dim)
    z = euler(conditional(model, y.to(device)), noise, sample_times(25, alpha))  # (50, N, D)
    return rae.decode(z).float()


# Training

RECIPES = {  # the paper's for its encoders, and one for a laptop; flags override
    "paper": dict(width=1152, head=2048, head_heads=16, batch=1024, lr=2e-4, epochs=80, warmup=0,
                  decay_start=None, decay_end=800, ema=None, shift_base=4096, save_every=5000),
    "tiny":  dict(width=192, head=256, head_heads=8, batch=64, lr=3e-3, epochs=2.5, warmup=0.25,
                  decay_start=0.25, decay_end=2.5, ema=0.99, shift_base=170, save_every=500),
}


def learning_rate(step, epoch, args):
    """Linear warm-up, a plateau, from decay_start to decay_end (epochs) a fall to a tenth."""
    rising = min(1, (step + 1) / max(args.warmup * epoch, 1))  # the first step counts as one
    length = max(args.decay_end - args.decay_start, 1e-9)
    fallen = min(max((step / epoch - args.decay_start) / length, 0), 1)  # 0 ... 1
    return args.lr * rising * (1 - 0.9 * fallen)


def parse_args(argv=None):
    parser, add = flags(__doc__.split("\n")[0], RECIPES)
    amount = at_least(0, float)
    add("--rae", default=None, help="autoencoder: rae.pt, run folder or release:NAME (default: the run's)")
    add("--encoder", default=None, help="with --describe: an encoder's latent shape, without a run")
    # model
    add("--width", type=at_least(4), help="backbone width: 384 S, 768 B, 1024 L, 1152 XL, and so its depth")
    add("--depth", type=at_least(1), default=None, help="backbone blocks (default: by width)")
    add("--heads", type=at_least(1), default=None, help="backbone attention heads (default: by width)")
    add("--head", type=at_least(0), help="width of the DDT head, 0: none; it must reach the token dimension")
    add("--head-depth", type=at_least(1), default=2, help="blocks of the DDT head")
    add("--head-heads", type=at_least(1), help="attention heads of the DDT head")
    add("--predict", choices=("v", "x"), default="v", help="what the last layer gives: velocity, or latent")
    add("--base-head", type=at_least(0), default=0, help="a second output after this block, for --guide self")
    # flow matching
    add("--time", choices=("logit-normal", "uniform"), default="logit-normal", help="t before the shift")
    add("--no-shift", action="store_true", default=False, help="alpha = 1, for the paper's ablation")
    add("--shift-base", type=at_least(1e-3, float), help="n in alpha = sqrt(tokens x channels / n)")
    add("--label-dropout", type=at_least(0, float, 1), default=0.1, help="null labels; 1: unconditional")
    # optimisation
    add("--decay-start", type=amount, help="epoch where the lr begins to fall (paper: 40, no head: never)")
    add("--decay-end", type=amount, help="... linearly, and where it has reached a tenth")
    add("--clip", type=amount, default=None, help="gradient norm (default: 1 with a head, else none)")
    add("--eval-every", type=at_least(0), default=0, help="steps between evaluations on --val, 0: none")
    args = parser.parse_args(argv)
    if args.encoder and not args.describe:
        raise UserError("--encoder goes with --describe: stage 2 takes its autoencoder's encoder,"
                        " which --run or --rae names")
    if args.encoder and args.encoder not in ENCODERS:
        raise UserError(f"unknown encoder {args.encoder!r}; there are {', '.join(ENCODERS)}")
    return args


def find_autoencoder(args):
    """(its place, the run's folder or None: out/ENCODER)."""
    run = Path(args.run) if args.run else None
    if args.rae:
        return args.rae, run
    if run:
        if not Path(run, "rae.pt").exists():
            raise UserError(f"{run} holds no rae.pt: train_decoder.py --run {run} makes it, or"
                            " name another by --rae")
        return run / "rae.pt", run
    place = newest("rae.pt")  # of out/, or the demo's
    return place, None if ROOT / "assets" in place.parents else place.parent


def settings(args, rae):
    """(what was given and what follows from it; DiT's arguments, but the classes)."""
    args = with_recipe(args, RECIPES, rae.name)
    depth, heads = SIZES.get(args.width, (None, None))  # S, B, L, XL
    args.depth = args.depth or depth
    args.heads = args.heads or heads
    if not args.depth or not args.heads:
        raise UserError(f"--width {args.width} is no preset ({', '.join(map(str, SIZES))}):"
                        " give --depth and --heads")
    if args.ema is None:
        args.ema = 0.9995 if args.head else 0.9999
    if args.clip is None:
        args.clip = 1.0 if args.head else 0.0
    if args.decay_start is None:
        args.decay_start = 40 if args.head else math.inf
    if args.decay_end < args.decay_start < math.inf:
        raise UserError(f"--decay-end {args.decay_end} comes before --decay-start"
                        f" {args.decay_start}")
    config = dict(tokens=rae.num_tokens, token_dim=rae.token_dim, width=args.width, depth=args.depth,
                  heads=args.heads, head=args.head, head_depth=args.head_depth,
                  head_heads=args.head_heads, predict=args.predict, base_head=args.base_head)
    return args, config


def warn_if_narrow(config):
    """Theorem 1, where it bites: each output that gives v, and the width before it."""
    if config["predict"] == "x":
        return
    n = config["token_dim"]  # what v's noise fills
    outputs = [("output", "head" if config["head"] else "width")]
    if config["base_head"]:
        outputs.append(("base head", "width"))
    for output, flag in outputs:
        width = config[flag]
        if width < n:
            floor = 1 - width / n
            print(f"WARNING: the {output} has at most rank {width} of {n} token dimensions."
                  f" Theorem 1: its loss cannot fall below {floor:.3f} at any depth. Raise --{flag}"
                  f" to {n}, or predict the latent: --predict x")


def main():
    args = parse_args()
    device, rank, world = start()
    say = print if rank == 0 else lambda *_: None

    # The autoencoder, and the settings that follow from it
    if args.encoder:
        rae = RAE(args.encoder, "tiny", ENCODERS[args.encoder].image)
    else:
        place, run = find_autoencoder(args)
        rae = load_rae(place, device, decode_only=args.describe)
    args, config = settings(args, rae)
    with torch.device("meta"):
        one_image = (torch.empty(1, rae.num_tokens, rae.token_dim), torch.empty(1),
                     torch.empty(1, dtype=torch.int64))  # x_t, t, y
    base = args.base_head > 0
    if args.describe:
        with torch.device("meta"):
            model = DiT(**config, num_classes=10 if rae.name.startswith("tiny") else 1000)
        return describe(f"DiT {model.config}", model, *one_image, base)
    unconditional = args.label_dropout == 1  # no label is ever seen
    alpha = 1 if args.no_shift else shift_alpha(rae.num_tokens, rae.token_dim, args.shift_base)

    # The data: the autoencoder's, unless another is given
    data = absolute(args.data or default_data(rae))
    if not args.data and data != "shapes" and not Path(data).is_dir():
        raise UserError(f"{data}, on which {place} was trained, is not there: name its place,"
                        " or other images, with --data")
    dataset = open_data(data, rae.image_size)
    held_out = open_val(args.val, data, rae.image_size) if args.eval_every else None
    if args.eval_every and (held_out is None or len(held_out) < 2):
        raise UserError(f"--eval-every needs held-out images, {data}/val has none: give --val")
    if held_out and held_out.classes != dataset.classes:
        raise UserError(f"--val has other classes than --data ({len(held_out.classes)} of them)")
    config["num_classes"] = len(dataset.classes)
    epoch, _, total = length_of(args, dataset, world)
    if not total:
        raise UserError(f"--epochs {args.epochs}: no step to train")
    micro = args.batch // (world * args.accum)  # images of a rank at a time

    # The run's folder, and where an earlier start left it
    run = run or Path(f"out/{rae.name}")
    claim(run)
    fixed = dict(config, stage=2, seed=args.seed, batch=args.batch, alpha=alpha, time=args.time,
                 label_dropout=args.label_dropout, data=Path(data).name, images=len(dataset),
                 latents=f"{rae.name} {rae.var.double().mean():.6f}")  # which autoencoder
    saved, step = resume(run / "dit.pt", fixed)
    if saved and step >= total:
        return say(f"{run}/dit.pt is at step {step} of {total}: finished; --epochs, --steps extend it")
    if rank == 0:
        warn_if_narrow(config)

    # Weights, their average, the optimiser
    torch.manual_seed(args.seed)  # of the weights
    model = DiT(**config).to(device)
    if args.init and not saved:
        other = load_dit(args.init)  # its average
        if other.predict != args.predict:
            way = other.predict
            raise UserError(f"--init {args.init} predicts {way}: give --predict {way}")
        weights = other.state_dict()
        if base and not other.base_head:
            say(f"--init {args.init} has no base head: that one is new")
            weights |= model.base_layer.state_dict(prefix="base_layer.")
        load_strict(model, weights, f"--init {args.init}")
    ema = ModelEmaV3(model, decay=args.ema)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    parts = dict(model=model, ema=ema.module, optimizer=optimizer)
    if saved:
        restore(parts, saved)
    beside = locate(place, "rae.pt").resolve() == (run / "rae.pt").resolve()
    origin = str(place) if str(place).startswith("release:") else str(Path(place).resolve())

    def save():
        if rank == 0:
            save_checkpoint(
                run / "dit.pt", config=config, fixed=fixed, data=data, step=step, alpha=alpha,
                classes=[] if unconditional else dataset.classes,
                rae=None if beside else origin,  # None: in the same folder
                **{name: part.state_dict() for name, part in parts.items()})

    # Arithmetic, ranks, and the order of the images
    dtype, autocast = arithmetic(args.dtype, device)
    if args.compile:
        for block in model.blocks:  # the same code for each
            block.compile()
    zeros = [torch.zeros(micro, *x.shape[1:], dtype=x.dtype, device=device) for x in one_image]
    ddp = distributed(model, autocast, *zeros, base)
    order = shuffled(len(dataset), args.batch, args.accum, args.seed, step, rank, world)
    loader = batches(dataset, order, args.workers, device)
    flops = image_flops(rae, lambda: DiT(**config), *one_image, base)
    meter = Meter(run, 2, step, total, args.batch, flops, device)
    say(f"{run}: DiT of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on"
        f" {rae.num_tokens} x {rae.token_dim} latents of {rae.name} ({place}); {data}:"
        f" {len(dataset)} images, {len(dataset.classes)} classes; alpha {alpha:.3f}, {dtype},"
        f" {world} x {device.type}, steps {step} to {total}")

    # The loop, in optimiser steps
    asked = stop_signal()  # SIGTERM, Ctrl-C
    stop = False
    while step < total and not stop:
        for i in range(args.accum):
            images, y, keys = next(loader)
            mirrored = (keys & 1).bool().to(device, non_blocking=True)  # each image's own coin
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            z = rae.encode(images)  # (B, N, D)
            with synced(ddp, i == args.accum - 1):
                with autocast():
                    loss = flow_matching_loss(ddp, z, y, alpha, keys, args.label_dropout, args.time)
                (loss / args.accum).backward()
            meter.add(1 / args.accum, loss=loss.detach())
        lr = learning_rate(step, epoch, args)
        meter.skipped(apply_gradients(optimizer, lr, args.clip))
        ema.update(model)  # after the step
        step += 1
        stop = any_rank(asked)  # on all ranks at once

        if step % args.log_every == 0 or step == total:
            meter.line(step, lr)
        if step % args.save_every == 0 or step == total or stop:
            with meter.paused():
                save()  # before all else: a stopped run has seconds
                if rank == 0 and not stop:
                    samples = picture(ema.module, rae, alpha, unconditional)
                    save_picture(samples, run / f"samples/{step:07d}.png", nrow=10)
        if held_out and step % args.eval_every == 0 and not stop:
            with meter.paused():
                found = evaluate(ema.module, rae, held_out, alpha, device, unconditional,
                                 args.workers)
                log(run, stage=2, step=step, **found)
    if stop:
        return say(f"stopped; {run}/dit.pt is at step {step}, and the same command goes on")
    say(f"wrote {run}/dit.pt and {run}/samples. Next: python sample.py --run {run}")


if __name__ == "__main__":
    main()

"""Stage 2: train a diffusion transformer (DiT, DiT^DH) by flow matching on RAE latents.

    x_t = (1 - t) z + t eps,  v = d x_t / dt = eps - z,  loss = || DiT(x_t, t, y) - v ||^2

    python train_dit.py                                                   # on out/'s newest rae.pt
    torchrun --nproc_per_node=8 -- train_dit.py --width 1152 --head 2048  # the paper's DiT^DH-XL

The same command again resumes. Writes dit.pt, log.jsonl, samples/*.png into the run's folder.
t = 1: noise. B images, N tokens of D channels, W and H width of backbone and head.
Source: arXiv 2510.11690, sections 4 and 5. Lines with "RAEv2" follow its sequel, arXiv 2605.18324.
"""
import argparse
import math
import re
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from fid import frechet_distance, moments
from rae import (ROOT, HelpFormatter, UserError, absolute_path, any_rank, apply_gradients, at_least,
                 attention, autocast_for, batches, command, compile_blocks, ddp_in_fixed_order,
                 default_data, evenly, grid_angles, in_fp32, in_order, load_rae, load_strict,
                 locate, lock_run, mean_over_ranks, micro_batch, mix, newest_run, normals,
                 open_data, open_val, read_weights, record, refuse_changes, remember, restore,
                 resume, save_checkpoint, save_picture, say, say_cost, shuffled, sincos_2d, speed,
                 start, stop_signal, try_to_read, warn_of_average)

SIZES = {            # width: depth, heads
    192:  (4, 6),    # for the encoder `tiny`
    384:  (12, 6),   # S
    768:  (12, 12),  # B
    1024: (24, 16),  # L
    1152: (28, 16),  # XL
}
LEAST_T = 0.05  # RAEv2: x_t - x is divided by no smaller t, in the prediction and in its target


# Captions -> y, as a text model encodes them (arXiv 2601.16208)

class Words:
    """Captions -> word indices (B,L), whose vectors the DiT learns; -1 behind the end of a caption.
    Each caption begins with index 0; the empty one is index 0 alone. Errors: unknown words."""
    def __init__(self, vocabulary, length):
        self.source = dict(model="words", length=length, vocabulary=vocabulary)
        self.config = dict(words=len(vocabulary) + 1, length=length)  # for DiT
        self.index = {word: i for i, word in enumerate(vocabulary, 1)}

    @staticmethod
    def split(caption):
        return re.findall(r"\w+", caption.lower())

    def __call__(self, captions):
        rows = [self.split(caption) for caption in captions]
        unknown = {word for row in rows for word in row if word not in self.index}
        if unknown:
            raise UserError(f"the model does not know {', '.join(sorted(unknown))}; it knows"
                            f" {', '.join(self.index):.500}")
        rows = [torch.tensor([0, *(self.index[word] for word in row)]) for row in rows]
        length = self.source["length"]
        if max(map(len, rows)) > length:
            warnings.warn(f"captions of more than {length} tokens are cut: see --text-length")
        rows = [row[:length] for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def text_encoder(source, device):
    """What encodes captions: `words`, or a frozen text model; source: as dit.pt keeps it."""
    if source["model"] == "words":
        return Words(source["vocabulary"], source["length"])
    from assets.frozen_text import FrozenText
    return FrozenText(source["model"], source["length"], device)


def null_of(model, y):
    """The null class or the empty caption, repeated to the shape of y."""
    if y.ndim == 1:
        return torch.full_like(y, model.num_classes)
    null = model.empty_caption  # (1, l) or (1, l, E)
    pad = y.new_full((1, y.shape[1] - null.shape[1], *y.shape[2:]), -1 if y.ndim == 2 else 0)
    return torch.cat([null, pad], 1).expand_as(y)


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


class AdaRMSNorm(nn.RMSNorm):
    """adaLN: x (B,N,W), normalised in fp32; scale, shift (B, 1 or N, W), in their dtype."""
    def forward(self, x, shift, scale):
        x = F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps)
        return torch.addcmul(shift, x.to(scale.dtype), 1 + scale)  # x (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head attention with rotary positions: x (B,N,width) -> the same; mask: of keys."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, cos, sin, mask=None):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # each (B, heads, N, C)
        if mask is not None:  # with captions: keeps attention from settling on a few words early
            q, k = [F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) for x in (q, k)]
        x = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, width)


class SwiGLU(nn.Module):
    """Gated MLP of about as many parameters as a plain one of four times the width."""
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * (4 * width))  # three matrices in place of two
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)  # each (B, N, hidden)
        return self.w3(F.silu(a) * b)    # (B, N, width)


class Block(nn.Module):
    """LightningDiT block, adaLN-zero; its condition c: (B,1,W), or of each token (B,N,W)."""
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = AdaRMSNorm(width, eps=1e-6)
        self.norm2 = AdaRMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, cos, sin, mask=None):
        modulation = self.adaLN_modulation(c).chunk(6, -1)  # 6 x (B, 1 or N, W)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x, shift1, scale1), cos, sin, mask)
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class FinalLayer(nn.Module):
    """(B,N,W), condition -> (B,N,D): the matrix whose rank Theorem 1 is about."""
    def __init__(self, width, token_dim):
        super().__init__()
        self.norm_final = AdaRMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)  # (B, 1 or N, W)
        return self.linear(self.norm_final(x, shift, scale))  # (B, N, D)


class DiT(nn.Module):
    """Diffusion transformer on latent tokens; head > 0 adds a DDT head of that width (DiT^DH).

    predict "x" (RAEv2): the last layer gives the clean latent, of which forward makes v.
    base_head k (RAEv2): a second, weaker output after block k. text: the config of a text model,
    whose captions take the place of classes. Parameters carry the released names. Errors: heads that
    do not divide a width into multiples of 4 channels (2-D RoPE), tokens that form no square.
    """
    def __init__(self, tokens=256, token_dim=768, width=1152, depth=28, heads=16, head=2048, head_depth=2,
                 head_heads=16, num_classes=1000, predict="v", base_head=0, text=None):
        super().__init__()
        self.config = dict(tokens=tokens, token_dim=token_dim, width=width, depth=depth, heads=heads,
                           head=head, head_depth=head_depth, head_heads=head_heads,
                           num_classes=num_classes, predict=predict, base_head=base_head, text=text)
        self.text = text
        self.num_classes = num_classes  # the null class's index, too
        self.depth = depth              # of the backbone; the head's blocks follow
        self.head = head
        self.predict = predict          # RAEv2
        self.base_head = base_head      # RAEv2
        side = math.isqrt(tokens)       # of the token grid
        for flag, w, its_heads, h in (("width", width, "heads", heads),
                                      ("head", head, "head-heads", head_heads)):
            if w % h or w // h % 4:
                raise UserError(f"{flag} {w} does not divide into {h} heads of a multiple of 4"
                                f" channels each (2-D RoPE): change --{flag} or --{its_heads}")
        if side * side != tokens or base_head > depth or predict not in ("v", "x"):
            raise UserError(f"no DiT of {tokens} tokens (a square), --base-head {base_head} (of {depth}"
                            f" blocks), --predict {predict} (v or x)")

        # Conditions, and the backbone
        self.s_embedder = nn.Linear(token_dim, width)            # of the noisy tokens
        self.register_buffer("pos_embed", sincos_2d(side, width)[None])  # (1, N, W)
        self.t_embedder = TimeEmbedder(width)                    # of the noise level
        if text is None:
            self.y_embedder = nn.Embedding(num_classes + 1, width)  # the last: no class
        elif "words" in text:
            self.word_embedder = nn.Embedding(text["words"], width)
            self.word_positions = nn.Parameter(torch.empty(text["length"], width))
            self.word_mlp = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(),
                                          nn.Linear(2 * width, width))
        else:
            self.text_embedder = nn.Sequential(nn.RMSNorm(text["dim"], eps=1e-6),
                                               nn.Linear(text["dim"], width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.add_angles("", side, width // heads)

        # The head: its blocks follow the backbone's in one list, as in the released files
        if head:
            self.x_embedder = nn.Linear(token_dim, head)         # of the noisy tokens, again
            self.s_projector = nn.Linear(width, head) if head != width else nn.Identity()
            self.blocks.extend(Block(head, head_heads) for _ in range(head_depth))
            self.add_angles("head_", side, head // head_heads)   # its head dim differs
        self.final_layer = FinalLayer(head or width, token_dim)
        if base_head:                                            # RAEv2
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
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        small = [self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight]
        if self.text is None:
            small.insert(0, self.y_embedder.weight)
        elif "words" in self.text:
            small.append(self.word_positions)  # and word_embedder N(0, 1), as torch has it
        for weight in small:
            nn.init.normal_(weight, std=0.02)
        outputs = [self.final_layer] + ([self.base_layer] if self.base_head else [])
        zeroed = [layer.adaLN_modulation[1] for layer in (*self.blocks, *outputs)]
        for linear in (*zeroed, *(layer.linear for layer in outputs)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def velocity(self, out, x_t, t):
        """A last layer's output (B,N,D) -> v. RAEv2: x_t already contains the noise. A predicted
        latent need not contain it, so a narrow layer is enough."""
        if self.predict == "x":
            return (x_t - out.float()) / t.clamp(min=LEAST_T)[:, None, None]
        return out.float()

    def embed_caption(self, y):
        """y (B,L) or (B,L,E) -> tokens (B,L,W), which of them are no padding (B,L)."""
        if "words" in self.text:
            x = self.word_embedder(y.clamp(min=0)) + self.word_positions[:y.shape[1]]
            before = F.pad(x[:, :-1], (0, 0, 1, 0))  # the word before: "dark blue" is a ground's blue
            return self.word_mlp(torch.cat([x, before], 2)), y >= 0
        return self.text_embedder(y), y.any(2)

    def forward(self, x_t, t, y, base=False):
        """x_t (B,N,D), t (B,) in [0,1], y (B,) int64 (num_classes: no class), or captions as its text
        model gives them -> v (B,N,D), fp32.
        RAEv2: base (of a model with a base head): both outputs' v (2,B,N,D), of one pass."""
        N = x_t.shape[1]
        t_e = self.t_embedder(t)[:, None]              # (B, 1, W)
        s = self.s_embedder(x_t) + self.pos_embed      # (B, N, W)
        c = t_e if self.text else t_e + self.y_embedder(y)[:, None]  # (B, 1, W)
        cos, sin = self.cos, self.sin
        mask = None
        if self.text:  # captions are further tokens of the sequence: no RoPE, padding masked
            caption, real = self.embed_caption(y)      # (B, L, W), (B, L)
            s = torch.cat([s, caption], 1)             # (B, N + L, W)
            cos = F.pad(cos, (0, 0, 0, y.shape[1]), value=1.0)
            sin = F.pad(sin, (0, 0, 0, y.shape[1]))
            mask = F.pad(real, (N, 0), value=True)[:, None, None]  # of keys: (B, 1, 1, N + L)
        if self.head:
            c = F.silu(c)  # and again in each block, as released

        # Backbone
        for number, block in enumerate(self.blocks[:self.depth], 1):
            s = block(s, c, cos, sin, mask)            # (B, N (+ L), W)
            if base and number == self.base_head:      # RAEv2: a weaker prediction
                u = F.silu(t_e + s[:, :N])             # its input, and each token's condition
                v_base = self.velocity(self.base_layer(u, u), x_t, t)  # (B, N, D)
        s = s[:, :N]                                   # the head sees image tokens alone

        # DDT head. v contains noise of full rank, so the layer before the output must have a width
        # H >= D. The backbone may be narrower: it is only each token's condition here.
        x = s
        if self.head:
            c = self.s_projector(F.silu(t_e + s))  # (B, N, H)
            x = self.x_embedder(x_t).float()       # (B, N, H); fp32, so that the residual sum is
            for block in self.blocks[self.depth:]:
                x = block(x, c, self.head_cos, self.head_sin)
        v = self.velocity(self.final_layer(x, c), x_t, t)  # (B, N, D)
        return torch.stack([v, v_base]) if base else v     # RAEv2


# The flow: a loss to learn v = d x_t / dt at every time, and steps that follow it to data

def shift_alpha(tokens, token_dim, base=4096):
    """The dimension-dependent shift sqrt(tokens token_dim / base) > 0 (section 4.2)."""
    return math.sqrt(tokens * token_dim / base)


def time_shift(t, alpha):
    """t in [0,1] -> alpha t / (1 + (alpha - 1) t) in [0,1]: alpha > 1 moves time towards noise.

    Why: channels are redundant. At equal t more of a large latent can be guessed through the noise.
    The shift moves its training to noisier t, where guessing is as hard (theory/noise_shift.py).
    """
    return alpha * t / (1 + (alpha - 1) * t)


def draws_of(z, keys, alpha, time):
    """Each sample's own draws: noise eps (B,N,D), shifted time t (B,), a coin (B,) in (0,1) for
    label dropout. keys (B,) seed the samples; None: torch's global generator."""
    B, N, D = z.shape
    if keys is None:
        draws = torch.randn(B, N * D + 2, device=z.device)
    else:
        draws = normals(keys, N * D + 2, z.device)
    eps = draws[:, :-2].view(B, N, D)
    g = draws[:, -2]
    t = torch.sigmoid(g) if time == "logit-normal" else torch.special.ndtr(g)
    return eps, time_shift(t, alpha), torch.special.ndtr(draws[:, -1])


def flow_matching_loss(model, z, y, alpha, keys=None, label_dropout=0.0, time="logit-normal"):
    """|| model(x_t, t, y) - v ||^2, a mean (section 3.2); z (B,N,D) latents, y (B,) labels or
    captions as a text model gives them; keys: see draws_of; label_dropout: the share of null y."""
    net = getattr(model, "module", model)          # without DDP; a plain function has no attributes
    eps, t, coin = draws_of(z, keys, alpha, time)  # (B, N, D), (B,), (B,)
    if label_dropout:                              # so that the model knows the null class
        dropped = (coin <= label_dropout).view(-1, *[1] * (y.ndim - 1))
        y = torch.where(dropped, null_of(net, y), y)

    x_t = torch.lerp(z, eps, t[:, None, None])     # (1-t) z + t eps: a point between data and noise
    v = eps - z                                    # d x_t / dt: the way from data to noise
    if getattr(net, "predict", "v") == "x":        # RAEv2: eps - z, clamped as in DiT.velocity
        v = (x_t - z) / t.clamp(min=LEAST_T)[:, None, None]
    if getattr(net, "base_head", 0):               # RAEv2
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
        times = t.to(z.device, z.dtype, non_blocking=True).expand(len(z))
        return model(z, times, y, *base)
    return velocity


# Loading and looking

def load_dit(path_or_name, device="cpu"):
    """A DiT for use (EMA, eval mode): from a dit.pt, its run's folder or release:NAME; with what
    sampling needs as its attributes. Errors: no file, or another kind of file."""
    path = locate(path_or_name, "dit.pt")  # release:NAME is converted here
    saved = read_weights(path)
    config = saved.get("config", {})
    if "width" not in config:
        raise UserError(f"{path} is no dit.pt, as train_dit.py writes it (a rae.pt? a released"
                        " file? `release:NAME` reads those)")
    model = DiT(**config)
    load_strict(model, saved["ema"], path)
    fixed = saved.get("fixed", {})
    model.step = saved.get("step")
    model.label_dropout = fixed.get("label_dropout", 0.1)
    model.latents = saved.get("latents") or fixed.get("latents")  # RAE.latents of its autoencoder
    model.alpha = saved["alpha"]
    model.classes = saved["classes"]  # []: unconditional, or of captions
    model.rae = saved.get("rae") or str(path.parent / "rae.pt")
    # AutoGuidance's model and scale, or None
    model.guide = str(path.parent / saved["guide"]) if saved.get("guide") else None
    model.scale = saved.get("scale")
    model.captions = dict(saved.get("captions") or {})  # {}, or the text model's source
    model.examples = model.captions.pop("examples", [])  # captions of the training set
    return model.eval().requires_grad_(False).to(device)


def load_text(model, device):
    """What encoded the captions of a DiT's training; sets the model's empty caption, for guidance.
    Errors: the text model is not there, or is another now."""
    text = text_encoder(model.captions, device)
    refuse_changes("the text model is not that of the training", model.captions, text.source,
                   "bring it back")
    model.empty_caption = text([""]).to(device)
    return text


@torch.no_grad()
def evaluate_dit(model, rae, dataset, alpha, device, text, unconditional, workers):
    """{n, fd, loss@0.1, ...} of at most 1,024 held-out images. n: how many. loss@0.1: at t = 0.1.
    fd: Fréchet distance between the mean tokens of real latents and of latents generated for the
    same labels in 25 steps. Call it on all ranks."""
    times = (0.1, 0.3, 0.5, 0.7, 0.9)  # as they are, not shifted
    n = min(1024, len(dataset))
    losses = torch.zeros(len(times), device=device)         # sums over images
    means = torch.zeros(2, n, rae.token_dim, device=device)  # of real and generated images
    seen = torch.zeros(n, device=device)
    ranks = dist.get_rank(), dist.get_world_size()
    for images, y, numbers in in_order(dataset, 64, device, *ranks, workers, n):
        y = (text(y) if text else y).to(device)
        if unconditional:
            y = null_of(model, y)
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
    real, fake = means[:, seen > 0]  # without broken files
    losses = (losses / len(real)).tolist()
    return dict(n=len(real), fd=frechet_distance(*moments(fake), *moments(real)),
                **{f"loss@{t}": loss for t, loss in zip(times, losses)})


@torch.no_grad()
def samples(model, rae, alpha, columns):
    """Fifty images (50,3,H,W) in 25 steps, from the same noise at every call; columns: labels or
    encoded captions, at most ten."""
    device = rae.mean.device
    y = columns[torch.arange(50) % len(columns)].to(device)
    noise = normals(mix(0, torch.arange(50)), rae.num_tokens * rae.token_dim, torch.device("cpu"))
    noise = noise.view(50, rae.num_tokens, rae.token_dim).to(device)
    z = euler(conditional(model, y), noise, sample_times(25, alpha))  # (50, N, D)
    return rae.decode(z).float()


# Recipes and flags

RECIPES = {  # of an autoencoder: the paper's (sections 4, 5), and one for a laptop
    "paper": dict(
        width=1152, head=2048, head_depth=2, head_heads=16,          # DiT^DH-XL
        shift_base=4096, time="logit-normal", label_dropout=0.1,
        batch=1024, micro=64, epochs=80, lr=2e-4, warmup=0,          # AdamW
        decay_start=None, decay_end=800, clip=None, ema=None,        # None: parse_args decides
        save_every=5000),
    "tiny": dict(
        width=192, head=256, head_depth=2, head_heads=8,
        shift_base=170, time="logit-normal", label_dropout=0.1,
        batch=64, micro=64, epochs=2.5, lr=3e-3, warmup=0.25,
        decay_start=0.25, decay_end=None, clip=None, ema=0.99,
        save_every=500),
}


def flags():
    """One line a flag. A flag without default has its recipe's."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0],
                                     epilog="defaults: the paper's; tiny encoders have others, see RECIPES",
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    count = at_least(1)
    amount = at_least(0, float)
    # the run and its data
    add("--rae", help="autoencoder: rae.pt, run folder or release:NAME; by default the run's")
    add("--run", help="run folder, by default the autoencoder's, with --rae out/ENCODER; resumes there")
    add("--data", help="image folder, or `shapes`; by default the autoencoder's")
    add("--val", help="held-out images for --eval-every; by default DATA/val, or held-out shapes")
    add("--init", help="begin with the weights of this run, dit.pt or release:NAME")
    # the model
    add("--width", type=at_least(4), help="backbone: 384 S, 768 B, 1024 L, 1152 XL; sets depth, heads")
    add("--depth", type=count, help="backbone blocks; by default by width")
    add("--heads", type=count, help="backbone attention heads; by default by width")
    add("--head", type=at_least(0), help="width of the DDT head, at least the token dimension; 0: none")
    add("--head-depth", type=count, help="blocks of the DDT head")
    add("--head-heads", type=count, help="attention heads of the DDT head")
    add("--predict", choices=("v", "x"), default="v", help="what the last layer gives: v, or the latent")
    add("--base-head", type=at_least(0), default=0, help="block with a second output, for --guide self")
    add("--text", help="captions in place of classes, by `words` or a frozen text model's name or folder")
    add("--text-length", type=count, default=77, help="tokens of a caption, at most")
    # flow matching
    add("--time", choices=("logit-normal", "uniform"), help="t before the shift")
    add("--no-shift", action="store_true", help="alpha = 1, for the paper's ablation")
    add("--shift-base", type=at_least(1e-3, float), help="the 4096 in alpha = sqrt(N D / 4096)")
    add("--label-dropout", type=at_least(0, float, 1), help="share of null labels; 1: unconditional")
    # how long, and how
    add("--epochs", type=at_least(1e-12, float), help="length of training; shapes: 50,000 images an epoch")
    add("--steps", type=count, help="stop after so many optimiser steps, with the same schedule")
    add("--batch", type=count, help="images per optimiser step, over all ranks")
    add("--micro", type=count, help="images of a rank at a time, at most; gradients add up to --batch")
    add("--lr", type=at_least(1e-12, float), help="AdamW's highest learning rate")
    add("--warmup", type=amount, help="epochs of linear warm-up")
    add("--decay-start", type=amount,
        help="epoch where the lr begins to fall; by default 40, never without a head")
    add("--decay-end", type=amount,
        help="epoch where the lr has fallen, linearly, to a tenth; tiny encoders: by default the last")
    add("--clip", type=amount,
        help="largest gradient norm, 0: no clipping; by default 1 with a head, else 0")
    add("--ema", type=at_least(0, float, 1),
        help="decay of the average of the weights; by default .9995, without a head .9999")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of weights, data order and all draws")
    # the machine
    add("--workers", type=at_least(0), help="loader processes per rank; by default as cores allow")
    add("--dtype", choices=("fp32", "bf16"), help="autocast; by default bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile of the blocks")
    add("--save-every", type=count, help="steps between checkpoints and pictures")
    add("--keep-every", type=amount, default=0, help="epochs between averages that are kept, 0: none")
    add("--eval-every", type=at_least(0), default=0, help="steps between evaluations on --val, 0: none")
    add("--log-every", type=count, default=50, help="steps between lines of the log")
    return parser


def parse_args(argv=None, encoder=None):
    """The flags. What is not given comes from the recipe of the autoencoder's encoder (None: not yet
    known, the paper's), or follows from --width, --head and --epochs."""
    parser = flags()
    parser.set_defaults(**RECIPES["tiny" if str(encoder).startswith("tiny") else "paper"])
    args = parser.parse_args(argv)
    depth, heads = SIZES.get(args.width, (None, None))  # S, B, L, XL
    follows = dict(depth=depth, heads=heads, ema=0.9995 if args.head else 0.9999,
                   clip=1.0 if args.head else 0.0, decay_start=40 if args.head else math.inf)
    for name, value in follows.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.decay_end is None:
        args.decay_end = max(args.epochs, args.decay_start)
    if not args.depth or not args.heads:
        raise UserError(f"--width {args.width} is no preset ({', '.join(map(str, SIZES))}):"
                        " give --depth and --heads")
    if args.val and not args.eval_every:
        raise UserError("--val is for --eval-every: give both")
    if encoder and args.decay_end < args.decay_start < math.inf:
        raise UserError(f"--decay-end {args.decay_end} comes before --decay-start {args.decay_start}")
    return args


def linear_lr(step, epoch, args):
    """Linear warm-up, a plateau, from decay_start to decay_end a fall to a tenth; epoch: in steps."""
    rising = min(1, (step + 1) / max(args.warmup * epoch, 1))  # the first step counts as one
    length = max(args.decay_end - args.decay_start, 1e-9)
    fallen = min(max((step / epoch - args.decay_start) / length, 0), 1)  # 0 ... 1
    return args.lr * rising * (1 - 0.9 * fallen)


# Training

def find_autoencoder(args):
    """(path of the autoencoder, run folder); folder None: main takes out/ENCODER. Errors: a run
    without autoencoder, and none named."""
    if args.rae:
        return args.rae, args.run
    path = Path(args.run, "rae.pt") if args.run else newest_run("rae.pt")  # of out/, or the demo's
    if not path.exists():
        raise UserError(f"{args.run} has no rae.pt: name an autoencoder, --rae out/ENCODER or"
                        " assets/demo")
    return path, None if ROOT / "assets" in path.parents else path.parent


def open_sets(args, rae, rae_path):
    """(path or `shapes`, training set, held-out set or None). Errors: no such data, other classes."""
    data = absolute_path(args.data or default_data(rae))
    if not args.data and data != "shapes" and not Path(data).is_dir():
        raise UserError(f"{data}, on which {rae_path} was trained, is not there: name it, or other"
                        " images, with --data")
    dataset = open_data(data, rae.output_size, captioned=bool(args.text))
    held_out = open_val(args.val, data, rae.output_size, bool(args.text)) if args.eval_every else None
    if args.eval_every and not held_out:
        raise UserError(f"--eval-every needs held-out images, and {data} has no val/: give --val")
    if held_out and not args.text and held_out.classes != dataset.classes:
        odd = sorted({*held_out.classes} ^ {*dataset.classes})
        raise UserError(f"--val has other classes than --data: {', '.join(odd[:6])}"
                        " are in one of them alone")
    return data, dataset, held_out


def open_captions(args, dataset, held_out, device):
    """(text model, ten captions for pictures); of a class model (None, []). Errors: unknown words."""
    if not args.text:
        return None, []
    examples = [dataset[index, index][1] for index in evenly(len(dataset), 10)]
    if args.text != "words":
        return text_encoder(dict(model=args.text, length=args.text_length), device), examples
    # The words of the model that --init names, else of all captions
    known = load_dit(args.init).captions.get("vocabulary") if args.init else None
    words = [{word for index in range(len(images)) for line in images.captions(index)
              for word in Words.split(line)} for images in (dataset, held_out) if images]
    text = Words(known or sorted(words[0]), args.text_length)
    text(["", *set.union(*words)])  # refuses an unknown word now, and not at a later step
    return text, examples


def warn_if_narrow(config):
    """Theorem 1: v contains noise of full rank, so each output that gives v must be as wide."""
    D = config["token_dim"]
    outputs = dict(output="head" if config["head"] else "width")
    if config["base_head"]:
        outputs["base head"] = "width"
    for output, flag in outputs.items():
        width = config[flag]
        if width < D and config["predict"] == "v":
            say(f"WARNING: the {output} has at most rank {width} of {D} token dimensions. Theorem 1:"
                f" its loss cannot fall below {1 - width / D:.3f} at any depth. Raise --{flag} to"
                f" {D}, or predict the latent: --predict x")


def initial_weights(args, model):
    """--init's average; a base head that it lacks stays new."""
    other = load_dit(args.init)
    if other.predict != args.predict:
        raise UserError(f"--init {args.init} predicts {other.predict}: give --predict {other.predict}")
    weights = other.state_dict()
    if args.base_head and not other.base_head:
        say(f"--init {args.init} has no base head: that one is new")
        weights |= model.base_layer.state_dict(prefix="base_layer.")
    return weights


def main():
    args = parse_args()  # for --rae and --run: what the recipe is, the autoencoder decides
    device, rank, world = start()

    # The autoencoder: it decides the recipe, the latents' shape and the data
    rae_path, run = find_autoencoder(args)
    rae = load_rae(rae_path, device)
    args = parse_args(encoder=rae.name)
    unconditional = args.label_dropout == 1  # no label is ever seen
    alpha = 1 if args.no_shift else shift_alpha(rae.num_tokens, rae.token_dim, args.shift_base)
    data, dataset, held_out = open_sets(args, rae, rae_path)
    text, examples = open_captions(args, dataset, held_out, device)
    epoch = len(dataset) / args.batch  # steps of an epoch, a fraction
    total = min(math.ceil(args.epochs * epoch), args.steps or math.inf)
    micro, accum = micro_batch(args.batch, args.micro, world)

    # The run's folder, and where an earlier start of this command left it
    run = Path(run or f"out/{rae.name}")
    lock_run(run)
    config = {name: getattr(args, name) for name in (
        "width", "depth", "heads", "head", "head_depth", "head_heads", "predict", "base_head")}
    config |= dict(tokens=rae.num_tokens, token_dim=rae.token_dim, num_classes=len(dataset.classes))
    config |= dict(text=text.config) if text else {}
    fixed = dict(config, stage=2, seed=args.seed, batch=args.batch, alpha=alpha, time=args.time,
                 label_dropout=args.label_dropout, data=Path(data).name, images=len(dataset),
                 latents=rae.latents, captions=text.source if text else None)
    saved, step = resume(run / "dit.pt", fixed)
    if saved and step >= total:
        return say(f"{run}/dit.pt is at step {step} of {total}: finished; --epochs, --steps extend it")
    try_to_read(dataset, held_out, workers=args.workers)
    warn_if_narrow(config)
    if not args.init:
        warn_of_average(args.ema, total)

    # The model, the average of its weights, the optimiser: new, or as an earlier start left them
    torch.manual_seed(args.seed)  # of the weights
    model = DiT(**config).to(device)
    model.empty_caption = text([""]).to(device) if text else None  # label dropout needs it
    if args.init and not saved:
        load_strict(model, initial_weights(args, model), f"--init {args.init}")
    ema = ModelEmaV3(model, decay=args.ema)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    parts = dict(model=model, ema=ema.module, optimizer=optimizer)
    if saved:
        restore(parts, saved)
        saved = None  # else the replaced file stays mapped, and so on the disk

    same_folder = locate(rae_path, "rae.pt").resolve() == (run / "rae.pt").resolve()
    save = partial(save_checkpoint, config=config, fixed=fixed, data=data, alpha=alpha,
                   captions=dict(text.source, examples=examples) if text else None,
                   classes=[] if unconditional or text else dataset.classes,
                   rae=None if same_folder else absolute_path(rae_path))

    # What the pictures' columns show: the examples, or ten classes far apart
    classes = len(dataset.classes)
    columns = text(examples) if text else torch.arange(10) * max(1, classes // 10) % classes
    columns = columns.to(device)
    columns = null_of(model, columns) if unconditional else columns

    # Arithmetic, ranks, the order of the images
    dtype, autocast = autocast_for(args.dtype, device)
    if args.compile:
        compile_blocks(model.blocks, device)
    x_t = torch.zeros(micro, rae.num_tokens, rae.token_dim, device=device)
    y = columns[:1].expand(micro, *columns.shape[1:])
    inputs = x_t, torch.zeros(micro, device=device), y, args.base_head > 0
    flops = say_cost(f"{run}: DiT", lambda: DiT(**config), *inputs)
    what = f"captions by {args.text}, images not mirrored" if text else f"{len(dataset.classes)} classes"
    say(f"{rae.num_tokens} x {rae.token_dim} latents of {rae.name} ({rae_path}); {data}: {len(dataset)}"
        f" images, {what}; alpha {alpha:.3f}; {dtype}; {world} x {device.type},"
        f" {accum} x {micro} images each; steps {step} to {total}")
    ddp = ddp_in_fixed_order(model, autocast, *inputs)
    order = shuffled(len(dataset), args.batch, accum, args.seed, step, rank, world)
    loader = batches(dataset, order, micro, args.workers, device)

    # The loop, in optimiser steps
    asked = stop_signal()  # SIGTERM, Ctrl-C, a closed terminal
    history = defaultdict(list)  # losses since the last line of the log
    since = step, time.time()    # from where on its speed is measured: without pauses
    stop = False
    while step < total and not stop:
        for i in range(accum):
            images, y, keys = next(loader)
            y = (text(y) if text else y).to(device, non_blocking=True)
            if not text:                                     # captions name sides: no mirroring
                mirrored = (keys & 1).bool().to(device, non_blocking=True)  # each image's own coin
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            z = rae.encode(images)                           # (B, N, D)
            ddp.require_backward_grad_sync = i == accum - 1  # ranks average once a step
            with autocast():
                loss = flow_matching_loss(ddp, z, y, alpha, keys, args.label_dropout, args.time)
            (loss / accum).backward()
            remember(history, loss=loss)
        lr = linear_lr(step, epoch, args)
        skipped = apply_gradients(optimizer, lr, args.clip)
        ema.update(model)  # after the step
        remember(history, skipped=skipped)
        step += 1
        stop = any_rank(asked)  # on all ranks at once

        # Log, save, look
        if step % args.log_every == 0 or step == total:
            means = mean_over_ranks(history, run, step)  # the one device sync, before the clock is read
            record(run, stage=2, step=step, total=total, **means, lr=lr,
                   **speed(since, step, total, args.batch, flops))
            since = step, time.time()
        if step % args.save_every == 0 or step == total or stop:
            save(run / "dit.pt", **parts, step=step)  # first: a stopped run has seconds
            if rank == 0 and not stop:
                pictures = samples(ema.module, rae, alpha, columns)
                save_picture(pictures, run / f"samples/{step:07d}.png", nrow=len(columns))
            since = step, time.time()
        if args.keep_every and step % max(1, round(args.keep_every * epoch)) == 0:
            save(run / f"dit_{step:07d}.pt", ema=ema.module, step=step)
            since = step, time.time()
        if held_out and step % args.eval_every == 0 and not stop:
            found = evaluate_dit(ema.module, rae, held_out, alpha, device, text, unconditional,
                                 args.workers)
            record(run, stage=2, step=step, **found)
            since = step, time.time()
    if stop:
        return say(f"stopped; {run}/dit.pt is at step {step}, and the same command goes on")
    say(f"wrote {run}/dit.pt and {run}/samples. Next: {command('sample.py', '--run', run)}")


if __name__ == "__main__":
    main()

"""Stage 1: train the ViT decoder that inverts a frozen encoder: together, an autoencoder (RAE).

    loss = L1(xh, x) + w_L LPIPS(xh, x) + w_G lambda GAN(xh),   xh = decode(encode(x) + noise)

    python train_decoder.py --encoder tiny                               # shapes, on a laptop
    torchrun --nproc_per_node=8 -- train_decoder.py --encoder dinov2_b   # the paper's

First the exact statistics of the latents, then the decoder. The same command again resumes. The
run's folder gets rae.pt, log.jsonl, samples/*.png (originals, copies, copies of noisy latents).
x images, xh reconstructions, z latents (B,N,D). Source: arXiv 2510.11690, section 3, appendix.
"""
import argparse
import fcntl
import json
import math
import signal
import time
from contextlib import contextmanager, nullcontext
from copy import copy
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image
from tqdm import tqdm

from fid import load_lpips, psnr, ssim
from rae import (DECODERS, ENCODERS, RAE, UserError, at_least, build_encoder, default_data, good,
                 in_fp32, in_order, load_rae, load_strict, mix, normals, open_data, open_val,
                 quiet_worker, read_weights, save_checkpoint, start, worker_count, writing)


# Latent statistics and noise

@torch.no_grad()
def latent_statistics(rae, dataset, batch, device, workers=None):
    """Exact mean and population variance (N,D) of tokens over every image, a centre crop, and its
    mirror image; in float64, so that order, batch size and number of ranks do not matter."""
    # This rank's share
    rank, world = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(2, rae.num_tokens, rae.token_dim, dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    with tqdm(total=len(dataset), unit="image", disable=rank > 0 or None) as bar:
        for images, *_ in in_order(dataset, batch, device, rank, world, workers):
            both = torch.cat([images, images.flip(-1)])  # stage 2 mirrors at random
            x = rae.tokens(both).double()                # (2 B, N, D)
            sums += torch.stack([x.sum(0), x.square().sum(0)])
            count += len(images)
            bar.update(len(images) * world)

    # All shares
    dist.all_reduce(sums)
    dist.all_reduce(count)
    if not count:
        raise UserError("no image of the data set can be decoded: give other --data")
    lost = len(dataset) - int(count)  # broken files
    if lost and rank == 0:
        print(f"{lost} of {len(dataset)} images cannot be decoded")
    mean, square = sums / (2 * count)  # E x, E x^2
    return mean.float(), (square - mean.square()).clamp(min=0).float()


def noise_augment(z, std, keys, tau, kind="halfnormal"):
    """z (B,N,D) + sigma * eps / std: noise sigma on the layer-normed tokens, one sigma per image,
    |N(0, tau^2)| ("halfnormal", the paper) or tau * U(0,1) ("uniform", the release).

    Why: a DiT never hits a latent exactly; a decoder that has seen clouds of noise forgives it.
    """
    draws = normals(keys, z[0].numel() + 1, z.device)  # (B, N D + 1)
    eps = draws[:, :-1].view_as(z)  # (B, N, D)
    u = draws[:, -1]  # the image's own
    sigma = tau * (u.abs() if kind == "halfnormal" else torch.special.ndtr(u))  # (B,)
    return z + sigma[:, None, None] * eps / std


# The adversary

def augment(images, keys):
    """Differentiable augmentation of images (B,3,H,W) in [-1,1]: translation up to 1/8 of a side,
    zeros outside; brightness + U(-.5,.5), saturation x U(0,2), contrast x U(.5,1.5)."""
    B, _, H, W = images.shape
    device = images.device
    u = torch.special.ndtr(normals(keys, 5, device))  # (B, 5), uniform in (0, 1)
    u = u.T[..., None, None, None]                    # 5 x (B, 1, 1, 1)
    dy, dx, brightness, saturation, contrast = u

    # Translation: a window of the padded image, cut out by each image's own rows and columns
    reach = H // 8
    top = (dy * (2 * reach + 1)).floor().long().clamp(max=2 * reach)  # 0 ... 2 reach
    left = (dx * (2 * reach + 1)).floor().long().clamp(max=2 * reach)
    image = torch.arange(B, device=device)[:, None, None]
    row = top[:, 0] + torch.arange(H, device=device)[:, None]  # (B, H, 1)
    column = left[:, 0] + torch.arange(W, device=device)       # (B, 1, W)
    padded = F.pad(images, (reach,) * 4).permute(0, 2, 3, 1)   # channels last
    x = padded[image, row, column].permute(0, 3, 1, 2)         # (B, 3, H, W)

    # Colour: saturation about a pixel's mean, contrast about the image's
    x = x + brightness - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


class DiscriminatorHead(nn.Module):
    """Features (B,N,C) -> a logit per token (B,N), by spectrally normalised convolutions."""
    def __init__(self, channels):
        super().__init__()
        def layer(kernel):
            conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2,
                             padding_mode="circular")
            norm = nn.InstanceNorm1d(channels, eps=1e-6, affine=True)  # of each image alone
            return nn.Sequential(spectral_norm(conv), norm, nn.LeakyReLU(0.2))
        self.first = layer(1)      # each token by itself
        self.residual = layer(9)   # and with its neighbours; the first follows the last
        self.last = spectral_norm(nn.Conv1d(channels, 1, 1))

    @in_fp32  # power iterations do not converge in bf16
    def forward(self, features):
        x = self.first(features.mT)                # (B, C, N)
        x = (self.residual(x) + x) / math.sqrt(2)  # of variance 1 again
        return self.last(x)[:, 0]                  # (B, N)


class Discriminator(nn.Module):
    """Trained heads on five feature maps of a frozen ViT: (B,3,H,W) in [-1,1] -> logits (B, 5 N).

    kind "dino": DINO ViT-S/8 at 224 px; "tiny": the demo's encoder. The last block counts twice.
    """
    def __init__(self, kind="dino", weights=None):
        super().__init__()
        name = {"dino": "dino_s8", "tiny": "tiny"}[kind]
        spec = ENCODERS[name]
        self.side = spec.input  # 224, or 32
        self.vit = build_encoder(name, spec.image, weights, "--disc-weights PATH")
        for block in self.vit.blocks:
            block.attn.fused_attn = torch.cuda.is_available()  # slow in bf16 on CPUs
        depth = len(self.vit.blocks)  # 12, or 4
        self.layers = [depth * i // 4 - 1 for i in range(1, 5)]  # of 12 blocks: 2, 5, 8, 11
        self.heads = nn.ModuleList(DiscriminatorHead(spec.dim) for _ in range(5))
        pixel_mean, pixel_std = torch.tensor(spec.pixels).view(2, 3, 1, 1)
        self.register_buffer("pixel_mean", pixel_mean, persistent=False)
        self.register_buffer("pixel_std", pixel_std, persistent=False)

    def forward(self, images):
        # As the ViT is used to see images
        x = F.interpolate(images, (self.side, self.side), mode="bilinear")
        x = (x / 2 + 0.5 - self.pixel_mean) / self.pixel_std

        # What it sees at five depths, and what a head makes of each
        maps = self.vit.forward_intermediates(x, self.layers, norm=False, output_fmt="NLC",
                                              intermediates_only=True)  # 4 x (B, N, C)
        maps = [maps[-1], *maps]  # 5 x (B, N, C), the last twice
        return torch.cat([head(features) for head, features in zip(self.heads, maps)], 1)


def hinge_loss(real, fake):
    """The discriminator's loss from its logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_gradient, gan_gradient):
    """lambda = |grad reconstruction| / (|grad GAN| + 1e-6) <= 1e4, of means over ranks."""
    for gradient in (reconstruction_gradient, gan_gradient):
        dist.all_reduce(gradient)  # the same lambda on every rank
        gradient /= dist.get_world_size()
    return (reconstruction_gradient.norm() / (gan_gradient.norm() + 1e-6)).clamp(0, 1e4)


def adversarial_backward(reconstruction, gan, copies, last, gan_weight):
    """Gradient of reconstruction + w_G lambda GAN, the decoder walked back once; returns lambda.

    lambda makes both pull equally hard at the decoder's last layer, whose weight is `last`. No
    constant could: the reconstruction's gradient falls during training and the GAN's does not.
    """
    def at_last(gradient):  # (B, 3, H, W) -> last's shape
        return torch.autograd.grad(copies, last, gradient, retain_graph=True)[0]

    # Each loss network is walked back once, to the image; from there on the decoder only.
    d_rec, = torch.autograd.grad(reconstruction, copies)  # (B, 3, H, W)
    d_gan, = torch.autograd.grad(gan, copies)
    weight = adaptive_weight(at_last(d_rec), at_last(d_gan))
    copies.backward(d_rec + gan_weight * weight * d_gan)
    return weight


# The two halves of a step: images -> reconstruction -> loss -> gradients of a micro-batch

def decoder_backward(rae, decoder, batch, args, autocast, perceptual=None, disc=None):
    """Adds the decoder's gradients; returns its losses. batch: images, z, keys; disc: with GAN."""
    images, z, keys = batch

    # Forward: the decoder sees latents that are somewhat off, and shall draw what they meant
    with autocast():
        noisy = noise_augment(z, rae.std, keys, args.tau, args.noise)  # (B, N, D)
        copies = rae.decode(noisy, decoder)  # (B, 3, H, W)
        l1 = F.l1_loss(copies, images)  # of images in [0, 1]
        parts = dict(l1=l1)  # for the log
        loss = l1
        if perceptual:
            parts["lpips"] = perceptual(copies * 2 - 1, images * 2 - 1).mean()
            loss = loss + args.lpips_weight * parts["lpips"]
        if disc:  # eval: no power iteration in this half
            logits = disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))
            gan = -logits.mean()  # to be taken for real; no hinge: it may always gain

    # Backward: outside autocast, which would round the gradients of what is kept in fp32
    if disc:
        last = rae.decoder.predict.weight
        weight = adversarial_backward(loss / args.accum, gan / args.accum, copies, last,
                                      args.gan_weight)
        loss = loss + args.gan_weight * weight * gan
        parts |= dict(gan=gan, gan_lambda=weight)
    else:
        (loss / args.accum).backward()
    return {name: part.detach() for name, part in dict(loss=loss, **parts).items()}


def discriminator_backward(rae, disc, batch, args, autocast):
    """Adds the discriminator's gradients, of images and new copies; returns its loss."""
    images, z, keys = batch

    # What it compares: both sides are augmented, each with a draw of its own
    with autocast(), torch.no_grad():
        if args.disc_input == "noisy":
            z = noise_augment(z, rae.std, mix(keys, 4), args.tau, args.noise)
        copies = rae.decode(z).clamp(0, 1)
        fakes = (copies * 255).round() / 255  # 8 bits, as real ones: no way to tell them apart
        real = augment(images * 2 - 1, mix(keys, 2))
        fake = augment(fakes * 2 - 1, mix(keys, 3))

    # One pass for both, so that they share the power iteration of the spectral norms
    with autocast():
        logits = disc.train()(torch.cat([real, fake]))  # (2 B, 5 N)
        loss = hinge_loss(*logits.chunk(2))
    (loss / args.accum).backward()  # into the heads: the ViT is frozen
    return dict(disc=loss.detach())


def accumulate(meter, ddp, micros, backward):
    """Adds the gradients of all micro-batches; `backward` does one, returns its losses."""
    for i, batch in enumerate(micros):
        with synced(ddp, i == len(micros) - 1):
            losses = backward(batch)
        meter.add(1 / len(micros), **losses)


# What every training loop needs: data in order, steps, a log, an end that can be resumed

def shuffled(length, batch, accum=1, seed=0, step=0, rank=0, world=1):
    """Micro-batches [(index, key)]: the data set in permutations, one per (seed, epoch), of which
    step s takes the images from s * batch on; key = hash(seed, step, place in the batch)."""
    @lru_cache(2)  # a batch may reach into the next epoch
    def permutation(epoch):
        generator = torch.Generator().manual_seed(int(mix(seed, epoch)))
        return torch.randperm(length, generator=generator).tolist()

    size = batch // (accum * world)  # of a micro-batch
    while True:
        # Other ranks or --accum cut a batch into other pieces: keys go with places in the batch
        for micro in range(accum):
            places = torch.arange(size) + (micro * world + rank) * size
            keys = mix(seed, step, places).tolist()
            positions = (step * batch + places).tolist()
            yield [(permutation(position // length)[position % length], key)
                   for position, key in zip(positions, keys)]
        step += 1


def batches(dataset, order, workers, device):
    """Endless (images (b,3,H,W) in [0,1], labels (b,)) on the device, keys (b,) on the CPU."""
    loader = DataLoader(dataset, batch_sampler=order, num_workers=worker_count(dataset, workers),
                        collate_fn=good, worker_init_fn=quiet_worker,
                        pin_memory=device.type == "cuda")
    for images, labels, keys in loader:
        images = images.to(device, non_blocking=True).float() / 255
        yield images, labels.to(device, non_blocking=True), keys


def flags(description, recipes):
    """(parser, add): what both trainers take. A flag that a recipe sets has no default of its
    own; its help tells the recipes' values."""
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS)

    def add(name, help, **options):
        key = name[2:].replace("-", "_")  # as argparse names it
        default = recipes["paper"].get(key, options.get("default"))
        said = [] if default is None or default is False else [f"default: {default}"]
        said += [f"tiny: {recipes['tiny'][key]}"] if key in recipes["tiny"] else []
        help += f" ({'; '.join(said)})" if said else ""
        parser.add_argument(name, help=help.replace("%", "%%"), **options)

    # what to train on, and where the run lives
    add("--run", default=None, help="run folder; started again, the same command resumes")
    add("--data", default=None, help="image folder, or `shapes`")
    add("--val", default=None, help="held-out images (default: DATA/val, or held-out shapes)")
    add("--init", default=None, help="begin with the weights of this run, file or release:NAME")
    # how long, and how
    add("--epochs", type=at_least(0, float), help="length of training; an epoch of shapes: 50,000 images")
    add("--steps", type=at_least(1), default=None, help="stop after so many optimiser steps, schedule kept")
    add("--batch", type=at_least(1), help="images per optimiser step, over all ranks and accumulation")
    add("--accum", type=at_least(1), default=1, help="micro-batches per optimiser step")
    add("--lr", type=at_least(1e-12, float), help="AdamW's learning rate")
    add("--warmup", type=at_least(0, float), help="epochs of linear warm-up")
    add("--ema", type=at_least(0, float, 1), help="decay of the weight average")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of weights, data order and every draw")
    # the machine
    add("--workers", type=at_least(0), default=None, help="loader processes per rank (default: by cores)")
    add("--dtype", choices=("fp32", "bf16"), default=None, help="autocast (default: bf16 where it is fast)")
    add("--compile", action="store_true", default=False, help="torch.compile of the blocks")
    add("--save-every", type=at_least(1), help="steps between checkpoints and pictures")
    add("--log-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--describe", action="store_true", default=False, help="print parameters, FLOPs, memory, and stop")
    return parser, add


def with_recipe(args, recipes, encoder):
    """What was given, and what the encoder's recipe says of the rest."""
    recipe = recipes["tiny" if encoder.startswith("tiny") else "paper"]
    return argparse.Namespace(**{**recipe, **vars(args)})


def length_of(args, dataset, world):
    """(optimiser steps in an epoch, as a fraction; steps in the schedule; steps to run)."""
    if args.batch % (world * args.accum):
        raise UserError(f"--batch {args.batch} does not divide over {world} ranks x {args.accum}"
                        f" --accum: give a multiple of {world * args.accum}")
    epoch = len(dataset) / args.batch          # optimiser steps, not whole
    schedule = math.ceil(args.epochs * epoch)  # in stage 1 where the learning rate ends

    # What is allowed, and perhaps not meant
    if dist.get_rank() == 0:
        if epoch < 1:
            print(f"WARNING: --batch {args.batch} is more than the {len(dataset)} images: a step"
                  " sees some twice")
        if args.warmup > args.epochs > 0:
            print(f"WARNING: --warmup {args.warmup} epochs is longer than --epochs {args.epochs}: the"
                  f" learning rate will not reach {args.lr}")
        if args.steps and args.steps > schedule:
            print(f"--steps {args.steps} is beyond the schedule, which ends at step {schedule}:"
                  " more --epochs make it longer")
    return epoch, schedule, min(schedule, args.steps or schedule)


def claim(run):
    """Lock the run's folder while this process lives: no work begins where nothing can be written,
    or where another process trains already. Rank 0 does it."""
    if dist.get_rank():
        return
    with writing(run):
        Path(run).mkdir(parents=True, exist_ok=True)
        file = open(Path(run, ".lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however
    except BlockingIOError:
        raise UserError(f"another process is training in {run}: wait for it, or name another"
                        " --run") from None
    except OSError:
        print(f"WARNING: files cannot be locked in {run}: run one command there at a time")
    claim.held = file  # an open file; closed, it would be free


def resume(path, fixed):
    """(checkpoint, step) of an earlier start, or (None, 0); fixed: what must be as then."""
    # A folder that machines do not share would let them train apart, or hang at an all-reduce
    saved = read_weights(path) if path.exists() else None
    step = saved.get("step", 0) if saved else 0
    steps = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len({*steps}) > 1:
        raise UserError(f"ranks find {path} at different steps, {min(steps)} to {max(steps)}: the"
                        " run's folder must be on a file system that all machines share")

    # The same run? A checkpoint packed for use has no optimiser.
    if saved and "fixed" not in saved:
        raise UserError(f"{path} is packed for use and cannot be resumed: name another --run")
    then = fixed
    if saved:
        then = dict(predict="v", base_head=0) | saved["fixed"]  # older runs do not name these
    changed = [f"{key} was {then.get(key)}, is {value}" for key, value in fixed.items()
               if then.get(key) != value]
    if changed:
        raise UserError(f"{path} belongs to other settings ({'; '.join(changed)}):"
                        " give them again, or another --run")

    # Steps after the checkpoint will be run, and logged, again
    lines = path.parent / "log.jsonl"
    if dist.get_rank() == 0 and lines.exists():
        kept = []
        for line in lines.read_text().splitlines():
            entry = json.loads(line) if line.endswith("}") else None  # the last may be cut short
            if entry and (entry["stage"] != fixed["stage"] or entry["step"] <= step):
                kept.append(f"{line}\n")
        lines.write_text("".join(kept))
    return saved, step


def restore(parts, saved):
    """What was saved, back into its parts; what is not there begins anew (a late GAN)."""
    # Modules by name and shape; optimisers as torch does it
    for name, part in parts.items():
        if isinstance(part, nn.Module) and saved.get(name) is not None:
            load_strict(part, saved[name], name)
        elif saved.get(name):
            part.load_state_dict(saved[name])


def stop_signal():
    """A flag (a CPU tensor) that SIGTERM and Ctrl-C raise."""
    flag = torch.zeros(())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: flag.fill_(1))
    return flag


def any_rank(flag):
    """Whether the flag is up on any rank, so that all stop after the same step."""
    flag = flag.clone()  # on the host: no device sync
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def apply_gradients(optimizer, lr, clip=0.0):
    """One optimiser step, the gradients' norm clipped to `clip` (0: no clipping). Skipped, on the
    device, without a sync, if a gradient is not finite; returns whether (a tensor, 1 or 0)."""
    group = optimizer.param_groups[0]  # there is only one
    group["lr"] = lr                   # a schedule is a function of the step
    norm = nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
    if clip:
        nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()  # nothing, if found_inf
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


def synced(ddp, last):
    """Ranks average gradients once for each optimiser step, in its last micro-batch."""
    return nullcontext() if last else ddp.no_sync()


def distributed(module, autocast, *inputs):
    """DDP around a module, whose buffers are the same on every rank by themselves.

    DDP orders its buckets by the first backward pass it sees: here, on `inputs`, so that a
    resumed run adds up its gradients in the same order as one that never stopped.
    """
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # DDP sent them above; not in every step
    with autocast():
        out = ddp(*inputs)
    out.sum().backward()
    ddp.zero_grad(set_to_none=True)
    return ddp


def absolute(data):
    """A data set's name that holds in every working directory."""
    return data if data == "shapes" else str(Path(data).resolve())


def log(run, **values):
    """One line to RUN/log.jsonl, and to the terminal; on rank 0."""
    if dist.get_rank():
        return
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None  # JSON has no nan
    with writing(Path(run, "log.jsonl")):
        with open(Path(run, "log.jsonl"), "a") as file:
            file.write(json.dumps(values) + "\n")

    # For people
    if "eta" in values:
        values["eta"] = timedelta(seconds=round(values["eta"]))
    words = [f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}"
             for key, v in values.items() if v is not None]
    print("  ".join(words), flush=True)


class Meter:
    """The log's lines: means of named losses since the last one, speed, time left. All is kept on
    the device, and fetched once for each line."""
    lost_for_good = 10  # so many steps in a row that were skipped

    def __init__(self, run, stage, step, total, batch, image_flops, device):
        self.run = run
        self.stage = stage
        self.total = total
        self.batch = batch
        self.image_flops = image_flops
        self.in_a_row = torch.zeros((), device=device)  # skipped steps
        self.begin(step)

    def begin(self, step):
        self.since = step
        self.clock = time.time()
        self.sums = {}
        self.counts = {}

    def add(self, share=1.0, **values):
        """share: the part of an optimiser step that these values stand for. A loss that begins
        later has its mean over fewer steps."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + share * value
            self.counts[name] = self.counts.get(name, 0) + share

    def skipped(self, flag):
        self.add(skipped=flag)
        self.in_a_row = (self.in_a_row + 1) * flag

    @contextmanager
    def paused(self):
        """Saving and looking do not count as training time."""
        before = time.time()
        yield
        self.clock += time.time() - before

    def line(self, step, lr):
        # Means over steps and ranks
        steps = step - self.since           # since the last line
        seconds = time.time() - self.clock  # without pauses
        sums = torch.stack([*self.sums.values(), self.in_a_row])
        dist.all_reduce(sums)
        *sums, in_a_row = (sums / dist.get_world_size()).tolist()  # the one device sync
        means = {name: value / self.counts[name] for name, value in zip(self.sums, sums)}
        skipped = round(means.pop("skipped") * steps)

        # Speed, and what is left
        rate = steps * self.batch / seconds  # over all ranks
        log(self.run, stage=self.stage, step=step, total=self.total, **means, lr=lr,
            images_per_s=rate, tflops=rate * self.image_flops / 1e12, skipped=skipped,
            eta=(self.total - step) * seconds / steps)

        # Skipping helps against one bad batch, not against weights that have gone astray
        if in_a_row >= self.lost_for_good:
            raise UserError(f"step {step}: the last {in_a_row:.0f} had non-finite gradients and were"
                            f" skipped ({means}); the checkpoint in {self.run} is the last good"
                            " state: resume with a lower --lr, or with --dtype fp32")
        self.begin(step)


def save_picture(images, path, nrow):
    """Images (B,3,H,W) around [0,1] as a grid of `nrow` columns."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(images.clamp(0, 1), path, nrow=nrow)


def arithmetic(dtype, device):
    """(dtype, by default bf16 where hardware has it; what makes its autocast contexts)."""
    if dtype is None:
        if device.type == "cuda":
            has = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has = torch.cpu.get_capabilities().get("avx512_bf16")
        dtype = "bf16" if has else "fp32"
    return dtype, partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bf16")


def count_flops(module, *inputs):
    """Forward FLOPs, a multiply-add being two: (all, those without attention's products)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    ops = counter.get_flop_counts().get("Global", {})
    attention = [n for op, n in ops.items() if "bmm" in str(op) or "attention" in str(op)]
    full = sum(ops.values())
    return full, full - sum(attention)  # the second is how the paper counts


def image_flops(rae, build, *inputs):
    """FLOPs of one image in training: the encoder forward; the model of `build` forward and, twice
    that, backward. On the meta device, as `inputs` are: nothing is computed, all counted."""
    with torch.device("meta"):
        encoder = RAE(**rae.config).load_encoder("random").tokens
        encoding, _ = count_flops(encoder, torch.empty(1, 3, rae.image_size, rae.image_size))
        forward, _ = count_flops(build(), *inputs)
    return encoding + 3 * forward


def describe(what, module, *inputs):
    """Print a meta module's parameters, compute, memory; inputs: one image's."""
    if dist.get_rank():
        return
    # Trained parameters, in fp32, and what is computed beforehand (positions, frequencies)
    size = sum(p.numel() for p in module.parameters())
    fixed = sum(value.numel() for value in module.state_dict().values()) - size
    full, linear = count_flops(module, *inputs)
    print(f"{what}: {(size + fixed) / 1e6:.4g} M parameters, {fixed / 1e6:.2g} M of them fixed\n"
          f"{linear / 2e9:.4g} G multiply-adds per image without attention products (the paper's"
          f" count), {full / 2e9:.4g} G with them = {full / 1e9:.4g} GFLOPs\n"
          f"{size * 20 / 2**30:.3g} GiB in training: weights, gradients, two moments of AdamW, EMA,"
          f" {size * 4 / 2**30:.3g} GiB each; activations come on top")


# Evaluation

NOISES = (0, 0.1, 0.2, 0.4)  # on z (tau is on tokens); 0: exact z

@torch.no_grad()
def evaluate(rae, decoder, dataset, perceptual, device, workers=None, batch=64, most=2048):
    """PSNR, SSIM and LPIPS (None without its network) of reconstructions from z, and from z +
    sigma noise, such as a sampler leaves ("psnr@0.2"), over at most `most` held-out images."""
    # Every rank its share of images, each with the same noise at any number of ranks
    sums = torch.zeros(len(NOISES), 3, dtype=torch.float64, device=device)  # psnr, ssim, lpips
    count = torch.zeros((), dtype=torch.float64, device=device)
    ranks = dist.get_rank(), dist.get_world_size()
    for images, _, numbers in in_order(dataset, batch, device, *ranks, workers, most):
        z = rae.encode(images)
        eps = normals(mix(0, 2, numbers), z[0].numel(), device).view_as(z)
        for row, sigma in zip(sums, NOISES):  # the same eps, further away
            copies = rae.decode(z + sigma * eps, decoder).clamp(0, 1)
            copies = (copies * 255).round() / 255  # as a file of 8 bits would hold them
            row[0] += psnr(copies, images).sum()
            row[1] += ssim(copies, images).sum()
            if perceptual:
                row[2] += perceptual(copies * 2 - 1, images * 2 - 1).sum()
        count += len(z)  # broken files are not counted
    dist.all_reduce(sums)
    dist.all_reduce(count)

    # Means over all images, by name
    found = dict(n=int(count))
    for sigma, row in zip(NOISES, (sums / count).tolist()):
        at = f"@{sigma}" if sigma else ""
        for name, value in zip(("psnr", "ssim", "lpips"), row):
            found[name + at] = value if perceptual or name != "lpips" else None
    return found


@torch.no_grad()
def picture(rae, decoder, images):
    """Rows of originals, reconstructions, and reconstructions of latents with noise 0.4."""
    z = rae.encode(images)
    eps = normals(torch.arange(len(z)), z[0].numel(), z.device).view_as(z)
    return torch.cat([images, rae.decode(z, decoder), rae.decode(z + 0.4 * eps, decoder)])


# Training

RECIPES = {  # the paper's for its encoders, and one for a laptop; flags override
    "paper": dict(image_size=256, decoder="XL", tau=0.8, lpips_weight=1.0, gan_weight=0.75,
                  disc="dino", disc_start=6, gan_start=8,
                  batch=512, lr=2e-4, epochs=16, warmup=1, ema=0.9978, save_every=2500),
    "tiny":  dict(image_size=32, decoder="tiny", tau=0.5, lpips_weight=0.0, gan_weight=0.0,
                  disc="tiny", disc_start=1, gan_start=2,
                  batch=64, lr=6e-3, epochs=2, warmup=0.1, ema=0.99, save_every=500),
}


def learning_rate(step, peak, warmup, length):
    """Linear over the first `warmup` steps, then half a cosine to a tenth at `length`."""
    rising = min(1, (step + 1) / max(warmup, 1))  # the first step counts as one
    progress = min(max((step - warmup) / max(length - warmup, 1), 0), 1)  # 0 ... 1
    return peak * rising * (0.55 + 0.45 * math.cos(math.pi * progress))


def parse_args(argv=None):
    parser, add = flags(__doc__.split("\n")[0], RECIPES)
    amount = at_least(0, float)
    # the autoencoder
    add("--encoder", default="dinov2_b", help=f"one of {', '.join(ENCODERS)}")
    add("--encoder-weights", default=None, help="its weights from a file, or `random` (mechanics only)")
    add("--image-size", type=at_least(1), help="side of the images the encoder sees")
    add("--upsample", type=at_least(1), default=1, help="decode at so many times that side, same tokens")
    add("--decoder", help=f"one of {', '.join(DECODERS)}")
    # the losses
    add("--tau", type=amount, help="strength of the noise on the latents")
    add("--noise", choices=("halfnormal", "uniform"), default="halfnormal", help="|N(0,tau^2)| or tau U(0,1)")
    add("--lpips-weight", type=amount, help="0 needs no download")
    add("--lpips-vgg", default=None, help="VGG16 weights of LPIPS from a file, or `random` (mechanics only)")
    add("--gan-weight", type=amount, help="0: no discriminator")
    add("--disc", choices=("dino", "tiny"), help="features of the discriminator")
    add("--disc-weights", default=None, help="their weights from a file, or `random`")
    add("--disc-input", choices=("clean", "noisy"), default="clean", help="latents it sees decoded")
    add("--disc-start", type=amount, help="epoch from which the discriminator is trained")
    add("--gan-start", type=amount, help="epoch from which the decoder sees it")
    args = parser.parse_args(argv)
    args = with_recipe(args, RECIPES, args.encoder)
    if args.encoder in ENCODERS and not ENCODERS[args.encoder].timm:
        args.epochs = args.lpips_weight = args.gan_weight = 0  # pixels: nothing to train
    if args.gan_weight and args.gan_start < args.disc_start:
        raise UserError(f"--gan-start {args.gan_start} comes before --disc-start {args.disc_start}:"
                        " the decoder would follow an untrained discriminator")
    if args.image_size * args.upsample < 11:
        raise UserError(f"--image-size {args.image_size}: SSIM, which judges runs, needs 11")
    return args


def main():
    args = parse_args()
    device, rank, world = start()
    say = print if rank == 0 else lambda *_: None

    # The autoencoder, as yet without weights
    torch.manual_seed(args.seed)  # of the decoder's weights
    with torch.device("meta") if args.describe else nullcontext():
        rae = RAE(args.encoder, args.decoder, args.image_size, args.upsample)
        one_latent = torch.empty(1, rae.num_tokens, rae.token_dim, device="meta")
    if args.describe:
        return describe(f"decoder {args.decoder}", rae.decoder, one_latent)
    decoder = rae.decoder

    # The data, and the length of the run
    data = absolute(args.data or default_data(rae))
    dataset = open_data(data, rae.output_size, crop=True)
    held_out = open_val(args.val, data, rae.output_size)
    still = copy(dataset)
    still.train = False  # centre crops
    epoch, schedule, total = length_of(args, dataset, world)
    disc_begin = math.ceil(args.disc_start * epoch)  # a step
    gan_begin = math.ceil(args.gan_start * epoch)
    micro = args.batch // (world * args.accum)  # images of a rank at a time

    # The run's folder, and where an earlier start left it
    run = Path(args.run or f"out/{args.encoder}")
    claim(run)
    fixed = dict(rae.config, stage=1, seed=args.seed, batch=args.batch, tau=args.tau,
                 noise=args.noise, data=Path(data).name, images=len(dataset))
    saved, step = resume(run / "rae.pt", fixed)
    if saved and step >= total:
        return say(f"{run}/rae.pt is at step {step} of {total}: finished; --epochs, --steps extend it")

    # Frozen networks, found before the long work; rae.pt keeps what no hub gives back
    weights = (saved["encoder"] if saved else None) or args.encoder_weights
    rae.load_encoder(weights).to(device)
    keep = bool(weights) or args.encoder.startswith("tiny")
    perceptual = load_lpips(device, args.lpips_vgg) if args.lpips_weight else None
    has_disc = args.gan_weight > 0 and disc_begin < total  # in this run
    disc = Discriminator(args.disc, args.disc_weights).to(device) if has_disc else None

    # Latent statistics, once
    if saved:
        mean, var = saved["mean"], saved["var"]
    else:
        say(f"{run}: latent statistics of {args.encoder} over {len(dataset)} images of {data}")
        mean, var = latent_statistics(rae, still, micro, device, args.workers)
    rae.mean.copy_(mean)
    rae.var.copy_(var)

    def save(**parts):
        if rank == 0:
            encoder = rae.encoder.state_dict() if keep else None
            save_checkpoint(run / "rae.pt", config=rae.config, fixed=fixed, data=data, step=step,
                            mean=rae.mean, var=rae.var, encoder=encoder,
                            **{name: part.state_dict() for name, part in parts.items()})

    if not rae.spec.timm:
        save(model=decoder, ema=decoder)
        return say(f"wrote {run}/rae.pt, pixels need no decoder. Next: python train_dit.py --run {run}")

    # Weights, their average, optimisers: new, from --init, or as an earlier start left them
    if args.init and not saved:
        other = load_rae(args.init, decode_only=True).decoder
        load_strict(decoder, other.state_dict(), f"--init {args.init}")
    ema = ModelEmaV3(decoder, decay=args.ema)
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer = adamw(decoder.parameters())  # its lr: at each step
    parts = dict(model=decoder, ema=ema.module, optimizer=optimizer)
    if disc:
        disc_optimizer = adamw(disc.heads.parameters())
        parts |= dict(disc=disc.heads, disc_optimizer=disc_optimizer)
    if saved:
        if disc and step > disc_begin and not saved.get("disc"):
            raise UserError(f"{run} went on without discriminator: resume with --gan-weight 0")
        restore(parts, saved)
    else:
        save(**parts)  # the statistics, which take long
    shown, *_ = next(in_order(held_out or still, 10, device, workers=0, most=10))

    # Arithmetic, ranks, and the order of the images
    dtype, autocast = arithmetic(args.dtype, device)
    if args.compile:  # not `predict`: its gradient is asked for more than once, for lambda
        for block in decoder.blocks:  # the same code for each
            block.compile()
    ddp = distributed(decoder, autocast, torch.zeros(micro, *one_latent.shape[1:], device=device))
    ddp_disc = distributed(disc.eval(), autocast, shown) if disc else None  # any images do
    order = shuffled(len(dataset), args.batch, args.accum, args.seed, step, rank, world)
    loader = batches(dataset, order, args.workers, device)
    flops = image_flops(rae, lambda: RAE(**rae.config).decoder, one_latent)
    meter = Meter(run, 1, step, total, args.batch, flops, device)
    say(f"{run}: decoder of {sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M parameters on"
        f" {rae.num_tokens} x {rae.token_dim} latents of {args.encoder}; {data}: {len(dataset)} images"
        f" of {rae.output_size} px; {dtype}, {world} x {device.type}, steps {step} to {total}")

    # The loop, in optimiser steps
    asked = stop_signal()  # SIGTERM, Ctrl-C
    stop = False
    while step < total and not stop:
        micros = []
        for _ in range(args.accum):
            images, _, keys = next(loader)
            micros.append((images, rae.encode(images), keys))  # z: (B, N, D)

        # ---- generator: noisy latents -> reconstruction -> L1, LPIPS, GAN ----
        adversary = disc if disc and step >= gan_begin else None
        accumulate(meter, ddp, micros, lambda batch: decoder_backward(
            rae, ddp, batch, args, autocast, perceptual, adversary))
        lr = learning_rate(step, args.lr, args.warmup * epoch, schedule)
        skipped = apply_gradients(optimizer, lr)
        ema.update(decoder)  # after the step

        # ---- discriminator: real images, and copies by the updated decoder -> hinge ----
        if disc and step >= disc_begin:  # by its own steps, a schedule as long as the decoder's
            accumulate(meter, ddp_disc, micros, lambda batch: discriminator_backward(
                rae, ddp_disc, batch, args, autocast))
            disc_lr = learning_rate(step - disc_begin, args.lr, args.warmup * epoch, schedule)
            skipped = torch.maximum(skipped, apply_gradients(disc_optimizer, disc_lr))
        meter.skipped(skipped)  # either
        step += 1
        stop = any_rank(asked)  # on all ranks at once

        # ---- log, save, look ----
        if step % args.log_every == 0 or step == total:
            meter.line(step, lr)
        if step % args.save_every == 0 or step == total or stop:
            with meter.paused():
                save(**parts)  # before all else: a stopped run has seconds
                if held_out and not stop:
                    found = evaluate(rae, ema.module, held_out, perceptual, device, args.workers)
                    log(run, stage=1, step=step, **found)
                if rank == 0 and not stop:
                    place = run / f"samples/decoder_{step:07d}.png"
                    save_picture(picture(rae, ema.module, shown), place, nrow=len(shown))
    if stop:
        return say(f"stopped; {run}/rae.pt is at step {step}, and the same command goes on")
    say(f"wrote {run}/rae.pt; {run}/samples shows originals, copies, and copies of noisy latents."
        f" Next: python train_dit.py --run {run}")


if __name__ == "__main__":
    main()

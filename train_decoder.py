"""Stage 1: train the ViT decoder that inverts a frozen encoder: together, an autoencoder (RAE).

    copy = decode(encode(image) + noise)
    loss = L1(copy, image) + w_L LPIPS(copy, image) + w_G lambda GAN(copy)

    python train_decoder.py --encoder tiny                               # shapes, on a laptop
    torchrun --nproc_per_node=8 -- train_decoder.py --encoder dinov2_b   # the paper's

First the exact statistics of the latents, then the decoder. The same command again resumes. The
run's folder gets rae.pt, log.jsonl, samples/*.png (originals, copies, copies of noisy latents).
Copies are reconstructions of images; z: latents (B,N,D). Source: arXiv 2510.11690, section 3, appendix.
"""
import argparse
import math
import time
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from rae import (DECODERS, ENCODERS, RAE, HelpFormatter, UserError, absolute_path, any_rank,
                 apply_gradients, at_least, autocast_for, batches, build_encoder, centre_crops,
                 command, compile_blocks, ddp_in_fixed_order, default_data, in_fp32, in_order,
                 load_lpips, load_rae, load_strict, lock_run, mean_over_ranks, micro_batch, mix,
                 normals, open_data, open_val, psnr, record, remember, restore, resume,
                 save_checkpoint, save_picture, say, say_cost, shuffled, speed, ssim, start,
                 stop_signal, try_to_read, warn_of_average)


# Latent statistics and noise

@torch.no_grad()
def latent_statistics(rae, dataset, batch, device, workers=None):
    """Exact mean and population variance (N,D) of tokens over the centre crop of every image
    and its mirror image; in float64, so that order, batch size and number of ranks do not matter."""
    # This rank's share
    rank, world = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(2, rae.num_tokens, rae.token_dim, dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    with tqdm(total=len(dataset), unit="image", disable=rank > 0 or None) as bar:
        for images, *_ in in_order(dataset, batch, device, rank, world, workers):
            both = torch.cat([images, images.flip(-1)])  # stage 2 mirrors at random
            x = rae.tokens(both).double()                # (2 B, N, D)
            sums += torch.stack([x.sum(0), x.square().sum(0)])
            count += len(images)  # files that can be read
            bar.update(len(images) * world)

    # All shares
    dist.all_reduce(sums)
    dist.all_reduce(count)
    mean, square = sums / (2 * count)  # E x, E x^2
    return mean.float(), (square - mean.square()).clamp(min=0).float()


def noise_augment(z, std, keys, tau, kind="halfnormal"):
    """z (B,N,D) + sigma * eps / std: noise sigma on the layer-normed tokens, one sigma per image,
    |N(0, tau^2)| ("halfnormal", the paper) or tau * U(0,1) ("uniform", the release).

    Why: sampled latents are slightly off. Training on noisy ones makes the decoder robust to that.
    """
    draws = normals(keys, z[0].numel() + 1, z.device)  # (B, N D + 1)
    eps = draws[:, :-1].view_as(z)  # (B, N, D)
    g = draws[:, -1]                # (B,), the image's own
    sigma = tau * (g.abs() if kind == "halfnormal" else torch.special.ndtr(g))
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
        self.side = spec.input_side  # 224, or 32
        self.vit = build_encoder(name, spec.image_side, weights)
        for block in self.vit.blocks:
            block.attn.fused_attn = torch.cuda.is_available()  # slow in bf16 on CPUs
        depth = len(self.vit.blocks)  # 12, or 4
        self.layers = [depth * i // 4 - 1 for i in range(1, 5)]  # of 12 blocks: 2, 5, 8, 11
        self.heads = nn.ModuleList(DiscriminatorHead(spec.dim) for _ in range(5))
        pixel_mean, pixel_std = torch.tensor(spec.pixels).view(2, 3, 1, 1)
        self.register_buffer("pixel_mean", pixel_mean, persistent=False)
        self.register_buffer("pixel_std", pixel_std, persistent=False)

    def forward(self, images):
        # The size and the normalisation that the ViT was trained with
        x = F.interpolate(images, (self.side, self.side), mode="bilinear")
        x = (x / 2 + 0.5 - self.pixel_mean) / self.pixel_std

        # Features at four depths, the last twice; a head for each of the five
        maps = self.vit.forward_intermediates(x, self.layers, norm=False, output_fmt="NLC",
                                              intermediates_only=True)  # 4 x (B, N, C)
        maps = [maps[-1], *maps]  # 5 x (B, N, C), the last twice
        return torch.cat([head(features) for head, features in zip(self.heads, maps)], 1)


def hinge_loss(real, fake):
    """The discriminator's loss from its logits (B, 5 N) of real and of generated images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_gradient, gan_gradient):
    """lambda = |grad reconstruction| / (|grad GAN| + 1e-6) <= 1e4. Call it on all ranks: it replaces
    both gradients by their means over ranks."""
    for gradient in (reconstruction_gradient, gan_gradient):
        dist.all_reduce(gradient)  # the same lambda on every rank
        gradient /= dist.get_world_size()
    return (reconstruction_gradient.norm() / (gan_gradient.norm() + 1e-6)).clamp(0, 1e4)


def adversarial_backward(reconstruction, gan, copies, last, gan_weight):
    """Gradient of reconstruction + w_G lambda GAN; returns lambda.

    lambda makes both gradients equally long at the decoder's last layer, whose weight is `last`.
    No constant could: the reconstruction's gradient falls during training, the GAN's does not.
    """
    def at_last(gradient):  # (B, 3, H, W) -> last's shape
        return torch.autograd.grad(copies, last, gradient, retain_graph=True)[0]

    # Backward through each loss network once, to the copies; then once through the decoder
    d_rec, = torch.autograd.grad(reconstruction, copies)  # (B, 3, H, W)
    d_gan, = torch.autograd.grad(gan, copies)
    weight = adaptive_weight(at_last(d_rec), at_last(d_gan))
    copies.backward(d_rec + gan_weight * weight * d_gan)
    return weight


def reconstruction_losses(copies, images, perceptual, lpips_weight):
    """{loss: L1 + w_L LPIPS, l1, lpips}; L1 on [0,1], LPIPS on [-1,1]. perceptual None: L1 alone."""
    l1 = F.l1_loss(copies, images)
    if not perceptual:
        return dict(loss=l1, l1=l1)
    lpips = perceptual(copies * 2 - 1, images * 2 - 1).mean()
    return dict(loss=l1 + lpips_weight * lpips, l1=l1, lpips=lpips)


@torch.no_grad()
def real_and_fake(rae, images, z, keys):
    """What the discriminator compares, (2B,3,H,W) in [-1,1]: images, and copies of their latents by
    the decoder as it is now, rounded to 8 bits as images are; each is augmented by its own draw."""
    copies = (rae.decode(z).clamp(0, 1) * 255).round() / 255
    real = augment(images * 2 - 1, mix(keys, 2))
    fake = augment(copies * 2 - 1, mix(keys, 3))
    return torch.cat([real, fake])


# Evaluation

NOISES = (0, 0.1, 0.2, 0.4)  # on z (tau is on tokens); 0: exact z

@torch.no_grad()
def evaluate_decoder(rae, decoder, dataset, perceptual, device, workers=None, batch=64, most=2048):
    """{n, psnr, ssim, lpips, psnr@0.1, ...}: means over at most `most` held-out images. n: how many.
    lpips: None without LPIPS. @0.1: from z + 0.1 noise, such as a sampler leaves. Call it on all
    ranks."""
    # Every rank its share of images, each with the same noise at any number of ranks
    sums = torch.zeros(len(NOISES), 3, dtype=torch.float64, device=device)  # psnr, ssim, lpips
    count = torch.zeros((), dtype=torch.float64, device=device)
    ranks = dist.get_rank(), dist.get_world_size()
    for images, _, numbers in in_order(dataset, batch, device, *ranks, workers, most):
        z = rae.encode(images)  # (B, N, D)
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
def reconstructions(rae, decoder, images):
    """images (B,3,H,W) -> (3B,3,H,W): originals, copies, copies of latents with noise 0.4."""
    z = rae.encode(images)
    eps = normals(torch.arange(len(z)), z[0].numel(), z.device).view_as(z)
    return torch.cat([images, rae.decode(z, decoder), rae.decode(z + 0.4 * eps, decoder)])


# Recipes and flags

RECIPES = {  # of an encoder: the paper's (section 3, appendix), and one for a laptop
    "paper": dict(
        image_size=256, decoder="XL",
        tau=0.8,                                              # noise-augmented decoding
        lpips_weight=1.0, gan_weight=0.75,                    # w_L, w_G
        disc="dino", disc_start=6, gan_start=8,               # epochs
        batch=512, micro=64, epochs=16, lr=2e-4, warmup=1,    # AdamW, a cosine to a tenth
        ema=0.9978, save_every=2500),
    "tiny": dict(
        image_size=32, decoder="tiny",
        tau=0.5,
        lpips_weight=0.0, gan_weight=0.0,
        disc="tiny", disc_start=0.5, gan_start=1,
        batch=64, micro=64, epochs=2, lr=6e-3, warmup=0.1,
        ema=0.99, save_every=500),
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
    add("--run", help="run folder, by default out/ENCODER; the same command again resumes")
    add("--data", help="image folder, or `shapes`; by default data/imagenet, tiny encoders: shapes")
    add("--val", help="held-out images; by default DATA/val, or held-out shapes")
    add("--init", help="begin with the decoder of this run, rae.pt or release:NAME")
    # the autoencoder
    add("--encoder", default="dinov2_b", help=f"one of {', '.join(ENCODERS)}")
    add("--encoder-weights", help="its weights from a file, or `random` (mechanics only)")
    add("--image-size", type=count, help="side of the images that are encoded")
    add("--upsample", type=count, default=1, help="decode at this multiple of that side, same tokens")
    add("--decoder", help=f"one of {', '.join(DECODERS)}")
    # the losses
    add("--tau", type=amount, help="strength of the noise on the latents")
    add("--noise", choices=("halfnormal", "uniform"), default="halfnormal",
        help="distribution of sigma: |N(0,tau^2)|, or tau U(0,1)")
    add("--lpips-weight", type=amount, help="0 needs no download")
    add("--lpips-vgg", help="VGG16 weights of LPIPS from a file, or `random` (mechanics only)")
    add("--gan-weight", type=amount, help="0: no discriminator")
    add("--disc", choices=("dino", "tiny"), help="features of the discriminator")
    add("--disc-weights", help="their weights from a file, or `random`")
    add("--disc-input", choices=("clean", "noisy"), default="clean",
        help="latents whose copies the discriminator sees")
    add("--disc-start", type=amount, help="epoch from which the discriminator is trained")
    add("--gan-start", type=amount, help="epoch from which the decoder sees it")
    # how long, and how
    add("--epochs", type=amount, help="length of training; an epoch of shapes has 50,000 images")
    add("--steps", type=count, help="stop after so many optimiser steps, with the same schedule")
    add("--batch", type=count, help="images per optimiser step, over all ranks")
    add("--micro", type=count, help="images of a rank at a time, at most; gradients add up to --batch")
    add("--lr", type=at_least(1e-12, float), help="AdamW's highest learning rate")
    add("--warmup", type=amount, help="epochs of linear warm-up")
    add("--ema", type=at_least(0, float, 1), help="decay of the average of the weights")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of weights, data order and all draws")
    # the machine
    add("--workers", type=at_least(0), help="loader processes per rank; by default as cores allow")
    add("--dtype", choices=("fp32", "bf16"), help="autocast; by default bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile of the blocks")
    add("--save-every", type=count, help="steps between checkpoints, evaluations and pictures")
    add("--keep-every", type=amount, default=0, help="epochs between averages that are kept, 0: none")
    add("--log-every", type=count, default=50, help="steps between lines of the log")
    return parser


def parse_args(argv=None):
    """The flags; those that are not given are the recipe's of the encoder."""
    parser = flags()
    parser.set_defaults(**RECIPES["paper"])
    if parser.parse_args(argv).encoder.startswith("tiny"):
        parser.set_defaults(**RECIPES["tiny"])
    args = parser.parse_args(argv)
    if args.encoder in ENCODERS and not ENCODERS[args.encoder].timm:
        args.epochs = args.lpips_weight = args.gan_weight = 0  # pixels: nothing to train
    if args.gan_weight and args.gan_start < args.disc_start:
        raise UserError(f"--gan-start {args.gan_start} comes before --disc-start {args.disc_start}:"
                        " the decoder would follow an untrained discriminator")
    return args


def cosine_lr(step, peak, warmup, length):
    """Linear over the first `warmup` steps, then half a cosine to a tenth at step `length`."""
    rising = min(1, (step + 1) / max(warmup, 1))  # the first step counts as one
    progress = min(max((step - warmup) / max(length - warmup, 1), 0), 1)  # 0 ... 1
    return peak * rising * (0.55 + 0.45 * math.cos(math.pi * progress))


# Training

def load_frozen(args, rae, dataset, held_out, saved, with_disc, device):
    """Load the RAE's encoder, try to read the images, and set the statistics of the latents: the
    checkpoint's, or measured now. Returns (LPIPS or None, discriminator or None, what rae.pt
    keeps of the RAE beside its decoder)."""
    weights = saved["encoder"] if saved else args.encoder_weights  # a run keeps its encoder
    rae.load_encoder(weights)
    perceptual = load_lpips(device, args.lpips_vgg) if args.lpips_weight else None
    disc = Discriminator(args.disc, args.disc_weights).to(device) if with_disc else None
    try_to_read(dataset, held_out, workers=args.workers)
    if saved:
        mean, var = saved["mean"], saved["var"]
    else:
        say(f"latent statistics of {args.encoder} over {len(dataset)} images")
        mean, var = latent_statistics(rae, dataset, 64, device, args.workers)
    rae.mean.copy_(mean)
    rae.var.copy_(var)
    no_hub_has_it = weights is not None or args.encoder.startswith("tiny")
    encoder = rae.encoder if no_hub_has_it else None
    return perceptual, disc, dict(config=rae.config, mean=rae.mean, var=rae.var, encoder=encoder)


def trained_parts(args, decoder, disc, disc_was_trained, saved):
    """{name: module or optimiser} of what is trained, and the average of the decoder's weights (ema):
    new, or as an earlier start left them."""
    if args.init and not saved:
        other = load_rae(args.init, decode_only=True).decoder
        load_strict(decoder, other.state_dict(), f"--init {args.init}")
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ema = ModelEmaV3(decoder, decay=args.ema)
    optimizer = adamw(decoder.parameters())  # the loop sets its lr
    parts = dict(model=decoder, ema=ema.module, optimizer=optimizer)
    if disc:
        parts |= dict(disc=disc.heads, disc_optimizer=adamw(disc.heads.parameters()))
    if saved and disc_was_trained and not saved.get("disc"):
        raise UserError("the run went on without discriminator: resume with --gan-weight 0")
    if saved:
        restore(parts, saved)  # a run that was to end before --disc-start saved no disc: it is new
    return parts, ema


def score_and_draw(run, rae, decoder, held_out, examples, perceptual, step, workers):
    """Evaluate on held-out images, if there are any, and draw the examples. Call it on all ranks."""
    if held_out:
        found = evaluate_decoder(rae, decoder, held_out, perceptual, examples.device, workers)
        record(run, stage=1, step=step, **found)
    if dist.get_rank() == 0:
        path = run / f"samples/decoder_{step:07d}.png"
        save_picture(reconstructions(rae, decoder, examples), path, nrow=len(examples))


def main():
    args = parse_args()
    device, rank, world = start()

    # The autoencoder, as yet without weights; the data; the length of the run in steps
    torch.manual_seed(args.seed)  # of the decoder's weights
    rae = RAE(args.encoder, args.decoder, args.image_size, args.upsample).to(device)
    decoder = rae.decoder
    data = absolute_path(args.data or default_data(rae))
    dataset = open_data(data, rae.output_size, crop=True)
    held_out = open_val(args.val, data, rae.output_size)
    epoch = len(dataset) / args.batch  # steps of an epoch, a fraction
    schedule = math.ceil(args.epochs * epoch)
    total = min(schedule, args.steps or schedule)
    disc_begin = math.ceil(args.disc_start * epoch)
    gan_begin = math.ceil(args.gan_start * epoch)
    micro, accum = micro_batch(args.batch, args.micro, world)

    # The run's folder, and where an earlier start of this command left it
    run = Path(args.run or f"out/{args.encoder}")
    lock_run(run)
    fixed = dict(rae.config, stage=1, seed=args.seed, batch=args.batch, tau=args.tau,
                 noise=args.noise, data=Path(data).name, images=len(dataset))
    saved, step = resume(run / "rae.pt", fixed)
    if saved and step >= total:
        return say(f"{run}/rae.pt is at step {step} of {total}: finished; --epochs, --steps extend it")

    # Frozen networks and latent statistics
    centred = centre_crops(dataset)
    with_disc = args.gan_weight > 0 and disc_begin < total
    perceptual, disc, frozen = load_frozen(args, rae, centred, held_out, saved, with_disc, device)
    save = partial(save_checkpoint, **frozen, fixed=fixed, data=data)
    if not rae.spec.timm:
        save(run / "rae.pt", step=0, model=decoder, ema=decoder)
        return say(f"wrote {run}/rae.pt, pixels need no decoder."
                   f" Next: {command('train_dit.py', '--run', run)}")

    if not args.init:
        warn_of_average(args.ema, total)
    parts, ema = trained_parts(args, decoder, disc, disc and step > disc_begin, saved)
    if not saved:
        save(run / "rae.pt", step=step, **parts)  # the statistics, which take long
    saved = None  # else the replaced file stays mapped, and so on the disk

    # Arithmetic, ranks, the order of the images
    dtype, autocast = autocast_for(args.dtype, device)
    if args.compile:  # not `predict`: its gradient is asked for more than once, for lambda
        compile_blocks(decoder.blocks, device)
    z = torch.zeros(micro, rae.num_tokens, rae.token_dim, device=device)
    flops = say_cost(f"{run}: decoder {args.decoder}", lambda: RAE(**rae.config).decoder, z)
    say(f"{rae.num_tokens} x {rae.token_dim} latents of {args.encoder}; {len(dataset)} images of {data},"
        f" {rae.output_size} px; {dtype}; {world} x {device.type}, {accum} x {micro} images each;"
        f" steps {step} to {total}")
    ddp = ddp_in_fixed_order(decoder, autocast, z)
    examples, *_ = next(in_order(held_out or centred, 10, device, workers=0, most=10))
    ddp_disc = ddp_in_fixed_order(disc.eval(), autocast, examples) if disc else None
    order = shuffled(len(dataset), args.batch, accum, args.seed, step, rank, world)
    loader = batches(dataset, order, micro, args.workers, device)

    # The loop, in optimiser steps
    asked = stop_signal()  # SIGTERM, Ctrl-C, a closed terminal
    history = defaultdict(list)  # losses since the last line of the log
    since = step, time.time()    # from where on its speed is measured: without pauses
    stop = False
    while step < total and not stop:
        micros = [(images, rae.encode(images), keys) for images, _, keys in islice(loader, accum)]
        use_gan = disc is not None and step >= gan_begin
        train_disc = disc is not None and step >= disc_begin

        # ---- generator: noisy latents -> copies -> L1, LPIPS, GAN -> step ----
        for i, (images, z, keys) in enumerate(micros):
            ddp.require_backward_grad_sync = i == accum - 1  # ranks average once a step
            with autocast():
                noisy = noise_augment(z, rae.std, keys, args.tau, args.noise)  # (B, N, D)
                copies = rae.decode(noisy, ddp)                                # (B, 3, H, W)
                losses = reconstruction_losses(copies, images, perceptual, args.lpips_weight)
                loss = losses["loss"]
                if use_gan:  # the decoder raises the logits; eval: no power iteration
                    gan = -disc.eval()(augment(copies * 2 - 1, mix(keys, 1))).mean()
            # Outside autocast: inside, fp32 layers would have matrix products in bf16
            if use_gan:
                lam = adversarial_backward(loss / accum, gan / accum, copies,
                                           decoder.predict.weight, args.gan_weight)
                losses |= dict(loss=loss + args.gan_weight * lam * gan, gan=gan, gan_lambda=lam)
            else:
                (loss / accum).backward()
            remember(history, **losses)
        lr = cosine_lr(step, args.lr, args.warmup * epoch, schedule)
        skipped = apply_gradients(parts["optimizer"], lr)
        ema.update(decoder)  # after the step

        # ---- discriminator: images, and copies by the updated decoder -> hinge -> step ----
        for i, (images, z, keys) in enumerate(micros if train_disc else ()):
            ddp_disc.require_backward_grad_sync = i == accum - 1
            with autocast():
                if args.disc_input == "noisy":
                    z = noise_augment(z, rae.std, mix(keys, 4), args.tau, args.noise)
                # One pass for both, so that they share the power iteration of the spectral norms
                logits = ddp_disc.train()(real_and_fake(rae, images, z, keys))  # (2 B, 5 N)
                loss = hinge_loss(*logits.chunk(2))
            (loss / accum).backward()
            remember(history, disc=loss)
        if train_disc:  # the decoder's schedule, from disc_begin on
            disc_lr = cosine_lr(step - disc_begin, args.lr, args.warmup * epoch, schedule)
            skipped = torch.maximum(skipped, apply_gradients(parts["disc_optimizer"], disc_lr))
        remember(history, skipped=skipped)
        step += 1
        stop = any_rank(asked)  # on all ranks at once

        # ---- log, save, score ----
        if step % args.log_every == 0 or step == total:
            means = mean_over_ranks(history, run, step)  # the one device sync, before the clock is read
            record(run, stage=1, step=step, total=total, **means, lr=lr,
                   **speed(since, step, total, args.batch, flops))
            since = step, time.time()
        if step % args.save_every == 0 or step == total or stop:
            save(run / "rae.pt", step=step, **parts)  # first: a stopped run has seconds
            if not stop:
                score_and_draw(run, rae, ema.module, held_out, examples, perceptual, step, args.workers)
            since = step, time.time()
        if args.keep_every and step % max(1, round(args.keep_every * epoch)) == 0:
            save(run / f"rae_{step:07d}.pt", step=step, ema=ema.module)
            since = step, time.time()
    if stop:
        return say(f"stopped; {run}/rae.pt is at step {step}, and the same command goes on")
    say(f"wrote {run}/rae.pt; {run}/samples shows originals, copies, and copies of noisy latents."
        f" Next: {command('train_dit.py', '--run', run)}")


if __name__ == "__main__":
    main()

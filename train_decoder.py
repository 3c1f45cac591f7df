"""Stage 1: train the ViT decoder that inverts a frozen encoder, and so makes it an autoencoder (RAE).

    loss = L1(xh, x) + w_L LPIPS(xh, x) + w_G lambda GAN(xh),   xh = decode(encode(x) + noise)

    python train_decoder.py --encoder tiny                            # shapes, on a laptop, in minutes
    torchrun --nproc_per_node=8 train_decoder.py --encoder dinov2_b   # the paper's, on data/imagenet

First the exact statistics of the latents, then the decoder. Starting the same command again resumes. The
run's folder gets rae.pt, log.jsonl, samples/*.png (originals, reconstructions, those of noisy latents).
x images, xh reconstructions, z latents (B,N,D). Source: arXiv 2510.11690, section 3 and appendix.
"""
import argparse
import math
import time
from contextlib import nullcontext
from copy import copy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from rae import (DECODERS, ENCODERS, LOST, RAE, Order, UserError, at_least, batches, best_dtype,
                 build_encoder, count_flops, describe, in_order, load_rae, load_strict, log, mix, normals,
                 open_data, open_val, resume, save_checkpoint, save_picture, spread, start,
                 stop_signal)


# Latent statistics and noise

@torch.no_grad()
def latent_statistics(rae, dataset, batch, device, rank=0, world=1, workers=None):
    """Exact mean and population variance (N,D) of the encoder's tokens over every image and its mirror image,
    centre crops; summed in float64, so that order, batch size and number of ranks do not matter."""
    sums = torch.zeros(2, rae.num_tokens, rae.token_dim, dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    for images, *_ in in_order(dataset, batch, device, rank, world, workers):
        x = rae.tokens(torch.cat([images, images.flip(-1)])).double()         # (2B, N, D)
        sums += torch.stack([x.sum(0), x.square().sum(0)])
        count += len(x)
    dist.all_reduce(sums), dist.all_reduce(count)
    if not count:
        raise UserError("no image of the data set can be decoded")
    mean = sums[0] / count
    return mean.float(), (sums[1] / count - mean.square()).clamp(min=0).float()


def noise_augment(z, std, keys, tau, kind="halfnormal"):
    """z (B,N,D) + sigma * eps / std, that is noise sigma on the layer-normed tokens; one sigma per image:
    |N(0, tau^2)| ("halfnormal", the paper) or tau * U(0,1) ("uniform", the release). keys (B,), std (N,D)."""
    draws = normals(keys, z[0].numel() + 1, z.device)
    u = draws[:, -1]
    sigma = tau * (u.abs() if kind == "halfnormal" else torch.special.ndtr(u))                # (B,)
    return z + sigma[:, None, None] * draws[:, :-1].view_as(z) / std


# Losses

def augment(images, keys):
    """Differentiable augmentation of images (B,3,H,W) in [-1,1], drawn per image: translation up to 1/8 of
    the side, zeros outside, brightness + U(-.5,.5), saturation x U(0,2), contrast x U(.5,1.5)."""
    B, _, H, W = images.shape
    u = torch.special.ndtr(normals(keys, 5, images.device))[:, :, None, None, None]      # (B, 5, 1, 1, 1)
    reach = H // 8
    shift = (u[:, :2] * (2 * reach + 1)).floor().long().clamp(max=2 * reach).view(B, 2, 1)    # 0 ... 2 reach
    rows, columns = (torch.arange(side, device=images.device) + shift[:, i] for i, side in enumerate((H, W)))
    padded, each = F.pad(images, (reach,) * 4).permute(0, 2, 3, 1), torch.arange(B, device=images.device)
    x = padded[each[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)   # (B, 3, H, W)
    x = x + u[:, 2] - 0.5
    x = torch.lerp(x.mean(1, keepdim=True), x, 2 * u[:, 3])
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, u[:, 4] + 0.5)


class DiscriminatorHead(nn.Module):
    """Features (B,N,C) -> one logit per token (B,N), by spectrally normalised convolutions over tokens."""
    def __init__(self, channels):
        super().__init__()
        def layer(kernel):
            return nn.Sequential(spectral_norm(nn.Conv1d(channels, channels, kernel, padding=kernel // 2,
                                                         padding_mode="circular")),
                                 nn.InstanceNorm1d(channels, eps=1e-6, affine=True), nn.LeakyReLU(0.2))
        self.first, self.residual, self.last = layer(1), layer(9), spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, features):
        x = self.first(features.mT)                                           # (B, C, N)
        x = (self.residual(x) + x) / math.sqrt(2)
        return self.last(x)[:, 0]


class Discriminator(nn.Module):
    """Trained heads on five feature maps of a frozen ViT: images (B,3,H,W) in [-1,1] -> logits (B, 5 N).

    kind "dino": DINO ViT-S/8 at 224 px; "tiny": the demo's encoder. The last block counts twice, as released.
    """
    def __init__(self, kind="dino", weights=None):
        super().__init__()
        name = {"dino": "dino_s8", "tiny": "tiny"}[kind]
        spec = ENCODERS[name]
        self.side, self.vit = spec.input, build_encoder(name, spec.image, weights, "--disc-weights PATH")
        for block in self.vit.blocks:
            block.attn.fused_attn = torch.cuda.is_available()     # slow in bf16 on CPUs
        depth = len(self.vit.blocks)
        self.layers = [depth * i // 4 - 1 for i in range(1, 5)]               # 12 blocks: 2, 5, 8, 11
        self.heads = nn.ModuleList(DiscriminatorHead(spec.dim) for _ in range(5))
        self.register_buffer("pixel_mean", torch.tensor(spec.pixels[0]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.pixels[1]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        x = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        x = (x / 2 + 0.5 - self.pixel_mean) / self.pixel_std
        maps = self.vit.forward_intermediates(x, self.layers, norm=False, output_fmt="NLC",
                                              intermediates_only=True)        # 4 x (B, N, C)
        return torch.cat([head(m) for head, m in zip(self.heads, [maps[-1], *maps])], 1).float()


def hinge_loss(real, fake):
    """The discriminator's loss from its logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake):
    return -fake.mean()


def adaptive_weight(reconstruction_gradient, gan_gradient):
    """lambda = |grad reconstruction| / (|grad GAN| + 1e-6) in [0, 1e4], of gradients averaged over ranks."""
    for gradient in (reconstruction_gradient, gan_gradient):
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return (reconstruction_gradient.norm() / (gan_gradient.norm() + 1e-6)).clamp(0, 1e4)


# Evaluation

NOISES = (0, 0.1, 0.2, 0.4)    # of the latents, on top of exact ones

@torch.no_grad()
def evaluate(rae, decoder, dataset, perceptual, device, rank=0, world=1, batch=64, most=2048):
    """PSNR, SSIM and LPIPS (None without its network) of held-out reconstructions, of z itself and of z +
    sigma noise, the errors a sampler leaves ("psnr@0.2"), over at most `most` images; noise by image."""
    from fid import psnr, ssim
    sums = torch.zeros(len(NOISES), 4, dtype=torch.float64, device=device)    # psnr, ssim, lpips, n
    for images, _, indices in in_order(dataset, batch, device, rank, world, most=most):
        z = rae.encode(images)
        eps = normals(mix(0, 2, indices), z[0].numel(), device).view_as(z)
        for row, sigma in zip(sums, NOISES):
            copies = (rae.decode(z + sigma * eps, decoder).clamp(0, 1) * 255).round() / 255
            distance = perceptual(copies * 2 - 1, images * 2 - 1).sum() if perceptual else 0
            row[:2] += torch.stack([psnr(copies, images).sum(), ssim(copies, images).sum()])
            row[2] += distance
            row[3] += len(z)
    dist.all_reduce(sums)
    values = sums[:, :3] / sums[:, 3:]
    return {f"{name}@{sigma}" if sigma else name: None if name == "lpips" and not perceptual else value
            for sigma, row in zip(NOISES, values.tolist())
            for name, value in zip(("psnr", "ssim", "lpips"), row)}


# Training

RECIPES = {  # the paper's for its encoders, and one for a laptop; flags override
    "paper": dict(image_size=256, decoder="XL", tau=0.8, lpips_weight=1.0, gan_weight=0.75, disc="dino",
                  disc_start=6, gan_start=8, batch=512, lr=2e-4, epochs=16, warmup=1, ema=0.9978,
                  save_every=2500),
    "tiny":  dict(image_size=32, decoder="tiny", tau=0.5, lpips_weight=0.0, gan_weight=0.0, disc="tiny",
                  disc_start=1, gan_start=2, batch=64, lr=6e-3, epochs=2, warmup=0.1, ema=0.99,
                  save_every=500),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--encoder", default="dinov2_b", help=f"one of {', '.join(ENCODERS)}")
    add("--encoder-weights", default=None, help="its weights from a file, or `random` (mechanics only)")
    add("--run", default=None, help="run folder (default: out/ENCODER)")
    add("--data", default=None, help="image folder or `shapes` (default: shapes for tiny, or data/imagenet)")
    add("--val", default=None, help="held-out images, not trained on (default: DATA/val or held-out shapes)")
    add("--init", default=None, help="start from this decoder: rae.pt, a released file or release:NAME")
    add("--weights", default=None, help="folder with the released files, in place of the hub")
    # autoencoder
    add("--image-size", type=at_least(1), help="side of the images the encoder sees")
    add("--upsample", type=at_least(1), default=1, help="decode at so many times that side, same tokens")
    add("--decoder", help=f"one of {', '.join(DECODERS)}")
    # losses
    add("--tau", type=at_least(0, float), help="strength of the noise on the latents")
    add("--noise", choices=("halfnormal", "uniform"), default="halfnormal", help="|N(0,tau^2)| or tau U(0,1)")
    add("--lpips-weight", type=at_least(0, float), help="0 needs no download")
    add("--lpips-vgg", default=None, help="VGG16 weights of LPIPS from a file, or `random` (mechanics only)")
    add("--gan-weight", type=at_least(0, float), help="0: no discriminator")
    add("--disc", choices=("dino", "tiny"), help="features of the discriminator")
    add("--disc-weights", default=None, help="their weights from a file, or `random`")
    add("--disc-input", choices=("clean", "noisy"), default="clean", help="latents it sees decoded")
    add("--disc-start", type=at_least(0, float), help="epoch from which the discriminator is trained")
    add("--gan-start", type=at_least(0, float), help="epoch from which the decoder sees it")
    # optimisation
    add("--epochs", type=at_least(0, float), help="length of the schedule; 1 epoch of shapes: 50,000 images")
    add("--steps", type=at_least(1), default=None, help="stop after so many optimiser steps, schedule kept")
    add("--batch", type=at_least(1), help="images per optimiser step, over all ranks and accumulation")
    add("--accum", type=at_least(1), default=1, help="micro-batches per optimiser step")
    add("--lr", type=float, help="AdamW's learning rate, falling to a tenth along a cosine")
    add("--warmup", type=at_least(0, float), help="epochs of linear warm-up")
    add("--ema", type=float, help="decay of the weight average")
    add("--seed", type=int, default=0, help="of weights, data order, crops and noise")
    # machine
    add("--workers", type=at_least(0), default=None, help="loader processes per rank (default: by cores)")
    add("--dtype", choices=("fp32", "bf16"), default=None, help="autocast (default: bf16 where it is fast)")
    add("--compile", action="store_true", default=False, help="torch.compile")
    add("--save-every", type=at_least(1), help="steps between checkpoints, evaluations and pictures")
    add("--log-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--describe", action="store_true", default=False, help="print parameters, FLOPs and memory, and stop")
    args = parser.parse_args()
    return argparse.Namespace(**{**RECIPES["tiny" if args.encoder == "tiny" else "paper"], **vars(args)})


def main():
    args = parse_args()
    device, rank, world = start()
    say = print if rank == 0 else lambda *_: None
    if args.describe:
        with torch.device("meta"):
            rae = RAE(args.encoder, args.decoder, args.image_size, args.upsample, False)
            z = torch.empty(1, rae.num_tokens, rae.token_dim)
            return rank or describe(f"decoder {args.decoder}", rae.decoder, z)

    # What can be wrong or must be downloaded comes first: sizes, data, an earlier start, loss networks
    torch.manual_seed(args.seed)
    rae = RAE(args.encoder, args.decoder, args.image_size, args.upsample, encoder_weights=False)
    data = args.data or ("shapes" if args.encoder == "tiny" else "data/imagenet")
    size = args.image_size * args.upsample
    dataset, held_out = open_data(data, size, crop=True), open_val(args.val, data, size)
    if args.batch % (world * args.accum):
        raise UserError(f"--batch {args.batch} does not divide over {world} ranks x {args.accum} --accum")
    run, epoch = Path(args.run or f"out/{args.encoder}"), len(dataset) / args.batch      # optimiser steps
    schedule = math.ceil(args.epochs * epoch)
    total = min(schedule, args.steps or schedule)
    fixed = dict(rae.config, stage=1, seed=args.seed, batch=args.batch, data=data, images=len(dataset),
                 tau=args.tau, noise=args.noise)
    saved, step = resume(run / "rae.pt", fixed)
    if saved and step >= total:
        return say(f"{run}/rae.pt is at step {step} of {total}: finished; more --epochs or --steps extend it")
    kept = bool(saved and saved["encoder"])
    weights = saved["encoder"] if kept else args.encoder_weights
    rae.load_encoder(weights, "--encoder-weights PATH", args.weights)
    rae.to(device)
    if args.encoder_weights == "random":
        say("WARNING: random encoder weights: good for tests and timings, useless for anything else")
    gan = args.gan_weight > 0 and args.disc_start * epoch < total
    if args.lpips_weight:
        from fid import load_lpips
    perceptual = load_lpips(device, args.lpips_vgg) if args.lpips_weight else None
    disc = Discriminator(args.disc, args.disc_weights).to(device) if gan else None

    # Decoder, weight average, optimisers
    decoder, last = rae.decoder, rae.decoder.predict.weight
    if args.init and not saved:
        other = load_rae(args.init, encoder=args.encoder, decode_only=True, weights=args.weights)
        load_strict(decoder, other.decoder.state_dict(), f"--init {args.init}")
    ema = ModelEmaV3(decoder, decay=args.ema)
    adamw = partial(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer, disc_optimizer = adamw(decoder.parameters()), adamw(disc.heads.parameters()) if gan else None
    if saved:
        load_strict(decoder, saved["model"], "model"), load_strict(ema.module, saved["ema"], "ema")
        rae.mean.copy_(saved["mean"]), rae.var.copy_(saved["var"])
        optimizer.load_state_dict(saved["optimizer"])
        if gan and saved["disc"]:
            load_strict(disc.heads, saved["disc"], "discriminator")
            disc_optimizer.load_state_dict(saved["disc_optimizer"])
    wrap = partial(DistributedDataParallel, gradient_as_bucket_view=True)
    if args.compile:                  # not `predict`: its gradient is asked for more than once, for lambda
        for block in decoder.blocks:
            block.compile()
    ddp, ddp_disc = wrap(decoder), wrap(disc) if gan else None

    def save():
        """Whether it worked, on rank 0."""
        keep = args.encoder == "tiny" or args.encoder_weights or kept         # the hub gives back the others
        return rank or save_checkpoint(
            run / "rae.pt", config=rae.config, fixed=fixed, step=step, mean=rae.mean, var=rae.var,
            model=decoder.state_dict(), ema=ema.module.state_dict(), optimizer=optimizer.state_dict(),
            encoder=rae.encoder.state_dict() if keep else None, disc=disc.heads.state_dict() if gan else None,
            disc_optimizer=disc_optimizer.state_dict() if gan else None)

    # Latent statistics, once
    still = copy(dataset)
    still.train = False                                                       # centre crops
    if not saved:
        begun = time.time()
        say(f"{run}: latent statistics of {args.encoder} over {len(dataset)} images of {data}, mirrored too")
        micro = args.batch // (world * args.accum)
        mean, var = latent_statistics(rae, still, micro, device, rank, world, args.workers)
        rae.mean.copy_(mean), rae.var.copy_(var)
        broken = dataset.broken.int()
        dist.all_reduce(broken)
        dataset.broken |= broken.bool()                                       # named once, on whatever rank
        say(f"statistics took {time.time() - begun:.0f} s" + (
            f"; {int(broken.sum())} of {len(dataset)} images cannot be decoded" if broken.any() else ""))
        save()
    del saved
    shown = held_out or still
    pictures = torch.stack([shown[i, i][0] for i in spread(len(shown), 10)])
    pictures = pictures.to(device).float() / 255                              # (10, 3, H, W)

    dtype = args.dtype or best_dtype(device)
    order = Order(len(dataset), args.batch, args.accum, args.seed, step, rank, world)
    loader = batches(dataset, order, args.workers, device)
    with torch.device("meta"):
        copy_of_decoder = RAE(**rae.config, encoder_weights=False).decoder
        flops, _ = count_flops(copy_of_decoder, torch.empty(1, rae.num_tokens, rae.token_dim))
        image_flops = rae.encoder_flops() + 3 * flops                         # one forward, two backward
    say(f"{run}: decoder of {sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M parameters on"
        f" {rae.num_tokens} x {rae.token_dim} latents of {args.encoder}; {data}: {len(dataset)} images of"
        f" {size} px; {dtype}, {world} x {device.type}, steps {step} to {total}")

    def learning_rate(at, length):                                           # warm-up, then cosine to a tenth
        warmup = args.warmup * epoch
        progress = min(max((at - warmup) / max(length - warmup, 1), 0), 1)
        return args.lr * min(1, (at + 1) / max(warmup, 1)) * (0.55 + 0.45 * math.cos(math.pi * progress))

    # DDP orders its buckets by the first backward: done here, so that resuming is exact
    micro = args.batch // (world * args.accum)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        ddp(torch.zeros(micro, rae.num_tokens, rae.token_dim, device=device)).sum().backward()
        if gan:
            ddp_disc.eval()(torch.zeros(2 * micro, 3, size, size, device=device)).sum().backward()
            disc_optimizer.zero_grad(set_to_none=True)
    optimizer.zero_grad(set_to_none=True)

    asked, stop, written, since, clock = stop_signal(), False, True, step, time.time()
    sums = torch.zeros(8, device=device)      # loss, l1, lpips, gan, lambda, disc, skipped, skipped in a row
    while step < total and not stop:
        disc_on, gan_on = (gan and step >= start * epoch for start in (args.disc_start, args.gan_start))
        loaded = (next(loader) for _ in range(args.accum))
        micros = [(images, rae.encode(images), keys) for images, _, keys in loaded]          # z: (B, N, D)

        # ---- generator -------------------------------------------------------------------------------------
        for i, (images, z, keys) in enumerate(micros):
            with ddp.no_sync() if i < args.accum - 1 else nullcontext():
                noisy = noise_augment(z, rae.std, keys, args.tau, args.noise)
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                    copies = rae.decode(noisy, ddp)                           # (B, 3, H, W)
                    l1 = F.l1_loss(copies, images)
                    distance = perceptual(copies * 2 - 1, images * 2 - 1).mean() if perceptual else 0 * l1
                    loss = (l1 + args.lpips_weight * distance) / args.accum
                    if gan_on:
                        logits = disc.eval()(augment(copies * 2 - 1, mix(keys, 1)))
                        adversarial = generator_loss(logits) / args.accum
                if gan_on:                                             # each loss network is walked back once
                    pull, = torch.autograd.grad(loss, copies)
                    push, = torch.autograd.grad(adversarial, copies)
                    weight = adaptive_weight(*(torch.autograd.grad(copies, last, g, retain_graph=True)[0]
                                               for g in (pull, push)))
                    copies.backward(pull + args.gan_weight * weight * push)
                    adversarial, logits = adversarial.detach(), None   # frees what was kept for the heads
                    loss = loss.detach() + args.gan_weight * weight * adversarial
                    sums[3:5] += torch.stack([adversarial, weight / args.accum])
                else:
                    loss.backward()
            sums[:3] += torch.stack([loss.detach(), l1.detach() / args.accum, distance.detach() / args.accum])
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, schedule)
        norm = nn.utils.clip_grad_norm_(decoder.parameters(), math.inf)
        optimizer.found_inf = (~norm.isfinite()).float()                 # a fused optimiser skips such a step
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(decoder)
        sums[6] += optimizer.found_inf
        sums[7] = (sums[7] + 1) * optimizer.found_inf

        # ---- discriminator ---------------------------------------------------------------------------------
        if disc_on:
            disc.train()
            for i, (images, z, keys) in enumerate(micros):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                    with torch.no_grad():
                        if args.disc_input == "noisy":
                            z = noise_augment(z, rae.std, mix(keys, 4), args.tau, args.noise)
                        fakes = (rae.decode(z).clamp(0, 1) * 255).round() / 255   # as the 8-bit file would be
                        both = [augment(x * 2 - 1, mix(keys, i)) for i, x in ((2, images), (3, fakes))]
                    with ddp_disc.no_sync() if i < args.accum - 1 else nullcontext():
                        disc_loss = hinge_loss(*ddp_disc(torch.cat(both)).chunk(2)) / args.accum
                        disc_loss.backward()
                sums[5] += disc_loss.detach()
            begin = args.disc_start * epoch
            disc_optimizer.param_groups[0]["lr"] = learning_rate(step - begin, schedule - begin)
            norm = nn.utils.clip_grad_norm_(disc.heads.parameters(), math.inf)
            disc_optimizer.found_inf = (~norm.isfinite()).float()
            disc_optimizer.step()
            disc_optimizer.zero_grad(set_to_none=True)
        step += 1
        stop = asked.clone()                                        # reduced on the host, not on the device
        dist.all_reduce(stop, dist.ReduceOp.MAX)

        if step % args.log_every == 0 or step == total:
            steps, seconds = step - since, time.time() - clock
            dist.all_reduce(sums)
            *means, skipped, lost = sums.div_(world).tolist()                  # the one device sync
            loss, l1, distance, adversarial, weight, disc_loss = (value / steps for value in means)
            parts = dict(l1=l1) | (dict(lpips=distance) if perceptual else {}) | (
                dict(gan=adversarial, gan_lambda=weight, disc=disc_loss) if disc_on else {})
            rate = steps * args.batch / seconds
            log(run, stage=1, step=step, total=total, loss=loss, **parts, lr=lr, images_per_s=rate,
                tflops=rate * image_flops / 1e12, skipped=int(skipped),
                eta=(total - step) * seconds / steps)
            if lost >= LOST:
                raise UserError(f"step {step}: the last {lost:.0f} had non-finite gradients and were skipped"
                                f" ({parts}); {run}/rae.pt is the last good state: resume with a lower --lr,"
                                " or with --dtype fp32")
            sums[:7].zero_()
            since, clock = step, time.time()
        if step % args.save_every == 0 or step == total or stop:
            before, written = time.time(), save()
            if held_out and not stop:
                log(run, stage=1, step=step, n=min(2048, len(held_out)),
                    **evaluate(rae, ema.module, held_out, perceptual, device, rank, world))
            if rank == 0:
                with torch.no_grad():
                    z = rae.encode(pictures)
                    noisy = z + 0.4 * normals(torch.arange(len(z)), z[0].numel(), device).view_as(z)
                    copies = [rae.decode(x, ema.module) for x in (z, noisy)]
                    rows = torch.cat([pictures, *copies])
                save_picture(rows, run / f"samples/decoder_{step:07d}.png", nrow=len(pictures))
            clock += time.time() - before
    if not written:
        raise UserError(f"the last save failed, {run}/rae.pt is older: make room and start the same again")
    say(f"wrote {run}/rae.pt; {run}/samples shows originals, reconstructions and, below, those of latents"
        f" with noise 0.4. Next: python train_dit.py --run {run}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

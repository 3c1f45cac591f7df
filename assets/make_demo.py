"""Makes the bundled demo from nothing, and judges it: `tiny`, its decoder, a DiT^DH and a weak one.

    python assets/make_demo.py                      # everything, 65 minutes of one core
    python assets/make_demo.py --check              # the bundled demo's figures, some minutes
    python assets/make_demo.py --check out/tiny     # those of any run on shapes

Writes assets/tiny.pt and assets/demo/{rae,dit,weak}.pt: averaged weights only, in half precision. `tiny` is
to `shapes` what DINOv2 is to photographs: its tokens say what is in the picture and keep what it looks like.
"""
import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fid import frechet_distance, linear_probe, moments, psnr, squared_distances                 # noqa: E402
from rae import (Shapes, best_dtype, build_encoder, load_rae, mix, patchify, read_weights,       # noqa: E402
                 save_checkpoint)
from sample import generate                                                                      # noqa: E402
from train_dit import load_dit                                                                   # noqa: E402

COMMANDS = ["train_decoder.py --encoder tiny --run out/demo --lr 3e-3 --epochs 5",
            "train_dit.py --rae out/demo/rae.pt --run out/weak --width 96 --depth 3 --heads 3 --head 96"
            " --head-heads 3 --batch 128 --epochs 3 --decay-end 3 --ema 0.995",
            "train_dit.py --run out/demo --batch 128 --epochs 14 --decay-end 14 --ema 0.998"]


def optimize(parameters, steps, lr):
    """AdamW with warm-up and half a cosine, as a generator: yields, then steps on the gradients it finds."""
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        yield step
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pretrain(steps=2000, batch=128, noise=0.2):
    """Trains `tiny` and writes assets/tiny.pt. Each part of the loss keeps something that the latents need:

    semantics: the class and the drawing's parameters, linearly, from every token;
    detail: a patch's pixels from its own token, noisy, so that noise does not drown them;
    correlation: somewhat less between channels, else the latents fill few of their 96 dimensions; without
    any they are white, good for the decoder, but so hard for the DiT that it makes blobs.
    """
    data, begun, encoder = Shapes(), time.time(), build_encoder("tiny", 32, "random").train().requires_grad_()
    for block in encoder.blocks:
        block.attn.fused_attn = False                                    # ten times slower in bf16 on CPUs
    classify, regress = nn.Linear(96, 10), nn.Linear(96, 14)
    draw = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 192))
    parameters = [p for module in (encoder, classify, regress, draw) for p in module.parameters()]
    for step in optimize(parameters, steps, lr=4e-3):
        images, labels = data.render(indices := torch.randint(len(data), (batch,)))
        x, u = images / 127.5 - 1, data.uniform(indices)                 # (B, 3, 32, 32), (B, 12)
        hues, sigma = 2 * math.pi * u[:, :2], noise * torch.rand(batch, 1, 1)              # hues are angles
        drawing = torch.cat([hues.sin(), hues.cos(), 2 * u[:, 2:] - 1], 1)                 # (B, 14)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder.forward_features(x)[:, 1:].float()               # (B, 16, 96), without [CLS]
            logits, guess, patches = classify(z), regress(z), draw(z + sigma * torch.randn_like(z))
        semantics = 0.3 * F.cross_entropy(logits.float().mT, labels[:, None].expand(-1, 16)) \
            + 2 * F.mse_loss(guess.float(), drawing[:, None].expand_as(guess))
        detail, covariance = F.l1_loss(patches.float(), patchify(x, 8)), torch.cov(z.flatten(0, 1).T)
        correlation = (covariance - covariance.diagonal().diag()).square().sum() / 96
        (semantics + 8 * detail + 0.02 * correlation).backward()
        if step % 250 == 249:
            print(f"encoder, step {step + 1} of {steps}: {semantics=:.3f} {detail=:.4f} {correlation=:.3f}"
                  f" {time.time() - begun:.0f} s", flush=True)
    torch.save({key: value.half() for key, value in encoder.state_dict().items()}, ROOT / "assets/tiny.pt")


def pack(source, name, *keys, **extra):
    """A run's checkpoint -> assets/demo: what sampling needs, with averaged weights in fp16."""
    saved = read_weights(ROOT / source)
    extra |= {key: saved[key] for key in keys} | {"ema": {key: x.half() for key, x in saved["ema"].items()}}
    save_checkpoint(ROOT / "assets/demo" / name, **extra)


def train_judge(data, steps=500):
    """A small convolutional classifier of shapes: images (B,3,32,32) in [0,1] -> logits (B,10)."""
    layers = []
    for a, b in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))
    for _ in optimize(list(judge.parameters()), steps, lr=2e-3):
        images, labels = data.render(torch.randint(len(data), (128,)))
        F.cross_entropy(judge(images / 255 + 0.03 * torch.randn(images.shape)), labels).backward()
    return judge.eval()


def looks(images):
    """(B,3,H,W) -> (B,6): mean colour, and the centre and size of what differs from the border's colour."""
    border = torch.cat([images[:, :, [0, -1]].flatten(2), images[..., [0, -1]].flatten(2)], 2)
    mask = (images - border.median(2).values[..., None, None]).norm(dim=1)                 # (B, H, W)
    mask = (mask / mask.amax((1, 2), keepdim=True) * 2 - 0.5).clamp(0, 1)
    axis, area = torch.linspace(-1, 1, images.shape[-1]), mask.sum((1, 2))
    x, y = mask.sum(1) @ axis / area, mask.sum(2) @ axis / area
    return torch.cat([images.mean((2, 3)), torch.stack([x, y, area.sqrt() / len(axis)], 1)], 1)


def parts(f, *tensors):
    """f of 500 rows of each tensor at a time, its results in one tensor."""
    return torch.cat([f(*part) for part in zip(*(x.split(500) for x in tensors))])


def pooled(rae):
    """images (B,3,H,W) -> the encoder's tokens, averaged (B,D): what FD is measured in."""
    return lambda images: parts(lambda x: rae.tokens(x).mean(1), images)


def check(run, num):
    """Prints the figures of a run: how good the judge is, the autoencoder's, those of `num` samples."""
    data, model, index, y = Shapes(), load_dit(ROOT / run), torch.arange(num), torch.arange(num) % 10
    rae, judge = load_rae(ROOT / model.rae), train_judge(data)
    right = lambda images, labels: (parts(judge, images).argmax(1) == labels).float()
    (train, train_y), (real, real_y) = (data.render(torch.arange(i, i + 10_000)) for i in (0, 50_000))
    train, real = train / 255, real / 255
    for name, f in (("mean token", pooled(rae)), ("raw pixels", lambda x: x.flatten(1))):
        print(f"linear probe, {name}: {linear_probe(f(train), train_y, f(real), real_y):.2%}")
    torch.set_grad_enabled(False)
    copies = parts(lambda images: rae.decode(rae.encode(images)).clamp(0, 1), real)
    print(f"{len(real)} held-out images: judge {right(real, real_y).mean():.2%}; their reconstructions:"
          f" judge {right(copies, real_y).mean():.2%}, PSNR {psnr(real, copies).mean():.2f} dB", flush=True)
    dtype = best_dtype(index.device)
    draw = lambda labels, i: generate(model, rae, labels, mix(0, 0, i), model.alpha, dtype=dtype)
    fake = parts(draw, y, index)
    hits, reference = right(fake, y), moments(pooled(rae)(real))
    fd, fd_real = (frechet_distance(*moments(pooled(rae)(x)), *reference) for x in (fake, train))
    print(f"{hits.mean():.2%} of {num} samples recognised, FD {fd:.3f} (real images {fd_real:.3f});",
          ", ".join(f"{name} {hits[y == c].mean():.1%}" for c, name in enumerate(data.classes)))
    stds = [looks(fake[y == c]).std(0) / looks(real[real_y == c]).std(0) for c in range(10)]
    colour, place, size = (part.amin() for part in torch.stack(stds).split((3, 2, 1), 1))
    print(f"spread over real images', least of the classes: {colour=:.2f} {place=:.2f} {size=:.2f}")
    for name, x in (("samples", fake.flatten(1)), ("held-out images", real[:num].flatten(1))):
        near = parts(lambda i: squared_distances(data.render(i)[0].flatten(1) / 255, x).amin(0)[None],
                     torch.arange(len(data))).amin(0).div(x.shape[1]).sqrt()
        print(f"RMS distance of {name} to the nearest of {len(data)} training images: median"
              f" {near.median():.4f}, first percentile {near.quantile(0.01):.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", nargs="?", const="assets/demo", metavar="RUN", help="judge a run's folder")
    parser.add_argument("--num", type=int, default=2000, help="samples to judge")
    torch.manual_seed(0)
    if (args := parser.parse_args()).check:
        sys.exit(check(args.check, args.num))
    pretrain()
    for command in COMMANDS:
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    pack("out/demo/rae.pt", "rae.pt", "config", "mean", "var", encoder=None)
    pack("out/demo/dit.pt", "dit.pt", "config", "alpha", "classes")
    pack("out/weak/dit.pt", "weak.pt", "config", "alpha", "classes")

"""Makes the bundled demo from nothing, and judges it: `tiny`, its decoder, a DiT^DH, a weak one and one for text;
and two encoders that see no label, `tiny_ssl` and the baseline `tiny_vae`.

    python assets/make_demo.py                      # everything, 110 minutes of one core
    python assets/make_demo.py --only tiny_ssl      # one encoder
    python assets/make_demo.py --check              # the bundled demo's figures, some minutes
    python assets/make_demo.py --check assets/demo/text.pt    # the bundled text model's
    python assets/make_demo.py --check out/tiny     # those of any run on shapes

Writes assets/{tiny,tiny_ssl,tiny_vae}.pt and assets/demo/{rae,dit,weak,text}.pt: averaged weights only, in half
precision. `tiny` learns from labels: its tokens say what is in the picture and keep what it looks like.
`tiny_ssl` is to `shapes` what the paper's MAE is to photographs, `tiny_vae` what Stable Diffusion's VAE is.
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
from assets.shapes import Shapes                                                      # noqa: E402
from assets.probe import best_of, linear_probe                                        # noqa: E402
from fid import frechet_distance, moments                                             # noqa: E402
from rae import (RAE, Decoder, at_least, autocast_for, build_encoder, load_rae, mix, patchify, psnr,  # noqa: E402
                 read_weights, save_checkpoint)
from sample import generate                                                           # noqa: E402
from train_dit import load_dit, load_text                                             # noqa: E402

COMMANDS = [
    "train_decoder.py --encoder tiny --run out/demo --lr 3e-3 --epochs 5",
    "train_dit.py --rae out/demo/rae.pt --run out/weak --width 96 --depth 3 --heads 3 --head 96"
    " --head-heads 3 --batch 128 --epochs 3 --ema 0.995",
    "train_dit.py --run out/demo --batch 128 --epochs 14 --ema 0.998",
    "train_dit.py --rae out/demo/rae.pt --run out/text --text words --time uniform --epochs 5 --seed 1",
]
SHAPES = Shapes()
README_NUM = 2000       # samples that the README's figures are of


# The encoders

def optimize(parameters, steps, lr):
    """AdamW with warm-up and half a cosine, as a generator: yields, then steps on the gradients it finds."""
    optimizer = torch.optim.AdamW(parameters, lr, (0.9, 0.98), weight_decay=0.02)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min(step / 100, cosine)
        optimizer.zero_grad()
        yield step
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def drawing_of(uniform):
    """The 12 numbers (B,12) in [0,1) that a picture is drawn from -> what is regressed on (B,14).

    The two hues are angles, so that red is next to red; the others go from -1 to 1.
    """
    hues = 2 * math.pi * uniform[:, :2]
    return torch.cat([hues.sin(), hues.cos(), 2 * uniform[:, 2:] - 1], 1)


def trainable(name):
    """An encoder of random weights, and how it is trained fast."""
    encoder = build_encoder(name, 32, "random").train().requires_grad_()
    for block in encoder.blocks:
        block.attn.fused_attn = False                       # ten times slower in bf16 on CPUs
    return encoder


def bundle(encoder, name):
    """The encoder's weights, in half precision, to assets/NAME.pt."""
    halves = {key: value.half() for key, value in encoder.state_dict().items()}
    torch.save(halves, ROOT / f"assets/{name}.pt")


def pretrain(steps=2000, batch=128, noise=0.2):
    """`tiny`; returns the encoder. Each part of the loss keeps something that the latents need:

    semantics: the class and the drawing's parameters, linearly, from every token;
    detail: a patch's pixels from its own token, noisy, so that noise does not drown them;
    correlation: somewhat less between channels, else the latents fill few of their 96 dimensions; without
    any they are white, good for the decoder, but so hard for the DiT that it makes blobs.
    """
    begun = time.time()
    encoder = trainable("tiny")

    # Three readers of a token: its class, its drawing, its pixels
    classify = nn.Linear(96, 10)
    regress = nn.Linear(96, 14)
    draw = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 192))
    parameters = [p for module in (encoder, classify, regress, draw) for p in module.parameters()]

    for step in optimize(parameters, steps, lr=4e-3):
        indices = torch.randint(len(SHAPES), (batch,))
        images, labels = SHAPES.render(indices)
        x = images / 127.5 - 1                              # (B, 3, 32, 32)
        drawing = drawing_of(SHAPES.uniform(indices))       # (B, 14)
        sigma = noise * torch.rand(batch, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder(x).float()                          # (B, 16, 96)
            logits = classify(z)
            guess = regress(z)
            patches = draw(z + sigma * torch.randn_like(z))

        # What tokens should say, what they should keep, and what makes them learnable
        recognised = F.cross_entropy(logits.float().mT, labels[:, None].expand(-1, 16))
        semantics = 0.3 * recognised + 2 * F.mse_loss(guess.float(), drawing[:, None].expand_as(guess))
        detail = F.l1_loss(patches.float(), patchify(x, 8))
        covariance = torch.cov(z.flatten(0, 1).T)           # (96, 96)
        correlation = (covariance - covariance.diagonal().diag()).square().sum() / 96
        (semantics + 8 * detail + 0.02 * correlation).backward()
        if step % 250 == 249:
            print(f"encoder, step {step + 1} of {steps}: {semantics=:.3f} {detail=:.4f} {correlation=:.3f}"
                  f" {time.time() - begun:.0f} s", flush=True)
    return encoder


def labelled(count):
    """Pictures of `shapes` to train on, taken by chance: uint8 (count,3,32,32), their labels (count,)."""
    return SHAPES.render(torch.randint(len(SHAPES), (count,)))


def pictures_alone(count):
    """The same without their labels."""
    images, _ = labelled(count)
    return images


def pretrain_ssl(pictures=pictures_alone, steps=2000, batch=128, masks=2, visible=4):
    """A masked autoencoder (MAE, the paper's third encoder) of `tiny`'s size; returns the encoder.

    It sees a quarter of a picture's 16 patches. A small decoder predicts the other three quarters, each
    patch's pixels normalised by that patch's own mean and deviation, as MAE does: what counts is the outline
    in a patch and not its colour. pictures(count): uint8 (count,3,32,32), all that is ever seen.
    masks: each picture is hidden in so many ways at a time.
    """
    begun = time.time()
    encoder = trainable("tiny_ssl")
    decoder = Decoder(16, 96, width=96, depth=2, heads=4, mlp_hidden=192, patch=8)
    hidden = nn.Parameter(torch.zeros(1, 1, 96))            # stands for each token that is not visible
    parameters = [*encoder.parameters(), *decoder.parameters(), hidden]

    for step in optimize(parameters, steps, lr=4e-3):
        x = pictures(batch) / 127.5 - 1                     # (B, 3, 32, 32)
        pixels = patchify(x, 8).repeat(masks, 1, 1)         # (masks B, 16, 192)
        places = torch.rand(len(pixels), 16).argsort(1)[:, :visible]            # (masks B, 4)
        chosen = places[..., None].expand(-1, -1, 96)
        with torch.autocast("cpu", torch.bfloat16):
            # [CLS] and the visible patches, each with its position
            cls_position, positions = encoder.pos_embed.split([1, 16], 1)
            patches = (encoder.patch_embed(x) + positions).repeat(masks, 1, 1)
            cls = (encoder.cls_token + cls_position).expand(len(patches), -1, -1)
            tokens = encoder.blocks(torch.cat([cls, patches.gather(1, chosen)], 1))
            z = encoder.norm(tokens.float())                # (masks B, 4, 96), as RAE takes them
            # All 16 places, and from them a picture
            filled = hidden.expand(len(z), 16, -1).scatter(1, chosen, z)
            guess = patchify(decoder(filled), 8)            # (masks B, 16, 192)

        # The error where nothing was visible
        std = (pixels.var(-1, keepdim=True) + 0.01).sqrt()  # of 255 levels over [-1, 1] .1 is 13
        target = (pixels - pixels.mean(-1, keepdim=True)) / std
        error = (guess - target).square().mean(-1)          # (masks B, 16)
        loss = error.scatter(1, places, 0).sum() / (len(error) * (16 - visible))
        loss.backward()
        if step % 250 == 249:
            print(f"MAE, step {step + 1} of {steps}: {loss=:.4f} {time.time() - begun:.0f} s", flush=True)
    return encoder


def pretrain_vae(pictures=pictures_alone, steps=2000, batch=128, kl=1e-3):
    """A VAE, which is to keep pixels and nothing else: the ViT of `tiny` and a bottleneck of 16 channels, by
    L1 + kl x KL, both means over what they are of; returns the encoder. pictures: as of `pretrain_ssl`.

    kl: the posterior's noise stays far below its mean's variation (.05 to 1), as it does in Stable
    Diffusion's VAE, so that the mean, the latent, is nearly all that the decoder of this training has seen.
    """
    begun = time.time()
    encoder = trainable("tiny_vae")
    uncertain = nn.Linear(96, 16)                           # the log variance, wanted in training alone
    decoder = RAE("tiny_vae", "tiny", 32).decoder           # so is this one: train_decoder.py trains another
    parameters = [p for module in (encoder, uncertain, decoder) for p in module.parameters()]

    for step in optimize(parameters, steps, lr=4e-3):
        x = pictures(batch) / 127.5 - 1                     # (B, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder.forward_features(x)          # (B, 16, 96)
            mean = encoder.forward_head(features).float()   # (B, 16, 16)
            logvar = uncertain(features).float().clamp(-20, 10)
            sigma = (logvar / 2).exp()
            copies = decoder(mean + sigma * torch.randn_like(mean))

        # Pixels, and the divergence of N(mean, sigma^2) from N(0, 1)
        detail = F.l1_loss(copies, x)
        divergence = (mean.square() + sigma.square() - 1 - logvar).mean() / 2
        (detail + kl * divergence).backward()
        if step % 250 == 249:
            decibels = psnr(copies.detach() / 2 + 0.5, x / 2 + 0.5).mean()
            print(f"VAE, step {step + 1} of {steps}: {detail=:.4f} {divergence=:.2f} sigma={sigma.mean():.3f}"
                  f" {decibels=:.2f} {time.time() - begun:.0f} s", flush=True)
    return encoder


PRETRAINED = {"tiny": pretrain, "tiny_ssl": pretrain_ssl, "tiny_vae": pretrain_vae}


def pack(source, name, *keys, **extra):
    """A run's checkpoint -> assets/demo: what sampling needs, with averaged weights in fp16."""
    saved = read_weights(ROOT / source)
    halves = {key: value.half() for key, value in saved["ema"].items()}
    kept = {key: saved[key] for key in keys}
    if "latents" in saved["fixed"]:  # of a DiT: which autoencoder's it makes
        kept["latents"] = saved["fixed"]["latents"]
    save_checkpoint(ROOT / "assets/demo" / name, ema=halves, **kept, **extra)


# The judge

def classifier(widths=(16, 32, 64)):
    """A small convolutional network: images (B,3,32,32) in [0,1] -> logits (B,10)."""
    layers = []
    for a, b in zip((3, *widths), widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(16 * widths[-1], 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def train_judge(judge, batch=labelled, steps=500):
    """Trains a classifier; batch(count): uint8 images (count,3,32,32) to learn from, labels (count,)."""
    for _ in optimize(list(judge.parameters()), steps, lr=2e-3):
        images, labels = batch(128)
        noisy = images / 255 + 0.03 * torch.randn(images.shape)
        F.cross_entropy(judge(noisy), labels).backward()
    return judge.eval()


def looks(images):
    """(B,3,H,W) -> (B,6): mean colour, and the centre and size of what differs from the border's colour."""
    # The ground's colour is the border's; what differs from it is the shape
    rows = images[:, :, [0, -1]].flatten(2)
    columns = images[..., [0, -1]].flatten(2)
    ground = torch.cat([rows, columns], 2).median(2).values[..., None, None]
    mask = (images - ground).norm(dim=1)                                    # (B, H, W)
    mask = (mask / mask.amax((1, 2), keepdim=True) * 2 - 0.5).clamp(0, 1)

    # Its centre of gravity, and its size
    axis = torch.linspace(-1, 1, images.shape[-1])
    area = mask.sum((1, 2))
    x = mask.sum(1) @ axis / area
    y = mask.sum(2) @ axis / area
    size = area.sqrt() / len(axis)
    return torch.cat([images.mean((2, 3)), torch.stack([x, y, size], 1)], 1)


def parts(f, *tensors):
    """f of 500 rows of each tensor at a time, its results in one tensor."""
    return torch.cat([f(*part) for part in zip(*(x.split(500) for x in tensors))])


def pooled(rae):
    """images (B,3,H,W) -> the encoder's tokens, averaged (B,D): what FD is measured in."""
    return lambda images: parts(lambda x: rae.tokens(x).mean(1), images)


def draw(model, rae, labels, indices, steps=50, n=1, probe=None, **options):
    """Samples (B,3,H,W) of these labels, as fast as this machine can: bf16 where it has it; each the best of n."""
    device = rae.mean.device
    keys = mix(0, 0, indices)
    _, autocast = autocast_for(None, device)
    with autocast():
        if n > 1:
            return best_of(n, model, rae, probe, labels, keys, model.alpha, steps, **options)
        return generate(model, rae, labels, keys, model.alpha, steps, **options)


def nearest(data, images):
    """RMS distance (B,) of images (B,3,H,W) in [0,1] to the nearest image of the data set."""
    images = images.flatten(1)
    least = torch.full((len(images),), math.inf)
    for indices in torch.arange(len(data)).split(500):
        others = data.render(indices)[0].flatten(1) / 255
        least = torch.minimum(least, torch.cdist(others, images).amin(0))
    return least / images.shape[1] ** 0.5


def check(run, num):
    """Prints the figures of a run: how good the judge is, the autoencoder's, those of `num` samples."""
    data = Shapes()
    model = load_dit(ROOT / run)
    rae = load_rae(ROOT / model.rae)
    judge = train_judge(classifier())

    def right(images, labels):
        return (parts(judge, images).argmax(1) == labels).float()

    # How much of the class a linear reading of the encoder finds
    train, train_y = data.render(torch.arange(10_000))
    real, real_y = data.render(torch.arange(50_000, 60_000))
    train = train / 255
    real = real / 255
    for name, f in (("mean token", pooled(rae)), ("raw pixels", lambda x: x.flatten(1))):
        print(f"linear probe, {name}: {linear_probe(f(train), train_y, f(real), real_y):.2%}")

    # The autoencoder
    torch.set_grad_enabled(False)
    copies = parts(lambda images: rae.decode(rae.encode(images)).clamp(0, 1), real)
    print(f"{len(real)} held-out images: judge {right(real, real_y).mean():.2%}; their reconstructions:"
          f" judge {right(copies, real_y).mean():.2%}, PSNR {psnr(real, copies).mean():.2f} dB", flush=True)

    # The samples: what they show, how they are distributed, and whether they vary as real images do
    indices = torch.arange(num)
    y = indices % 10
    fake = parts(lambda labels, i: draw(model, rae, labels, i), y, indices)
    hits = right(fake, y)
    reference = moments(pooled(rae)(real))
    fd, fd_real = (frechet_distance(*moments(pooled(rae)(x)), *reference) for x in (fake, train))
    by_class = [f"{name} {hits[y == c].mean():.1%}" for c, name in enumerate(data.classes)]
    print(f"{hits.mean():.2%} of {num} samples recognised, FD {fd:.3f} (real images {fd_real:.3f});",
          ", ".join(by_class))
    stds = [looks(fake[y == c]).std(0) / looks(real[real_y == c]).std(0) for c in range(10)]
    colour, place, size = (part.amin() for part in torch.stack(stds).split((3, 2, 1), 1))
    print(f"spread over real images', least of the classes: {colour=:.2f} {place=:.2f} {size=:.2f}")

    # Whether they are copies of training images
    for name, images in (("samples", fake), ("held-out images", real[:num])):
        near = nearest(data, images)
        print(f"RMS distance of {name} to the nearest of {len(data)} training images: median"
              f" {near.median():.4f}, first percentile {near.quantile(0.01):.4f}", flush=True)


# Captions: does a picture show what was said?

PROPERTIES = ("class", "colour", "ground", "size", "top or bottom", "left or right")
PAIRS = (("small", "large"), ("top", "bottom"), ("left", "right"))


def said_by(captions):
    """What captions of `shapes` say: (B,6), the value of each of PROPERTIES, -1 where nothing is said."""
    colours = Shapes.colours_by_name
    rows = []
    for caption in captions:
        words = caption.split()
        place = next(i for i, word in enumerate(words) if word in Shapes.classes)
        said = [Shapes.classes.index(words[place])]
        for word in (words[place - 1], words[-1] if "dark" in words else None):
            said.append(colours.index(word) if word in colours else -1)
        for pair in PAIRS:
            said.append(next((i for i, word in enumerate(pair) if word in words), -1))
        rows.append(said)
    return torch.tensor(rows)


def full_captions(num, held_out):
    """`num` captions of 11 words, which say every property, of drawings that were never trained on; held_out:
    whether their pairs of class and colour were not trained on either."""
    data = Shapes(first=50_000, captioned=True)
    captions = []
    for indices in torch.arange(50_000, 50_000 + 200 * num).split(5000):
        chosen = indices[data.held_out(data.uniform(indices), indices) == held_out]
        captions += [c for c in data.caption(chosen, chosen, chance=2) if len(c.split()) == 11]
        if len(captions) >= num:
            return captions[:num]
    raise ValueError(f"too few captions for {num}")


class Reader:
    """Reads PROPERTIES off pictures of shapes: a ridge regression from all of `tiny`'s tokens to the class and
    the drawing, of 20,000 training images."""
    def __init__(self, rae, count=20_000, decay=10.0):
        self.rae = rae
        data = Shapes()
        indices = torch.arange(count)
        x = self.tokens(data.render(indices)[0] / 255).double()                 # (count, 16 x 96)
        y = [F.one_hot(indices % 10, 10), drawing_of(data.uniform(indices))]
        y = torch.cat(y, 1).double()                                            # (count, 10 + 14)
        self.mean, self.bias = x.mean(0), y.mean(0)
        x -= self.mean
        penalty = decay * torch.eye(x.shape[1], dtype=torch.float64)
        self.weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - self.bias))

    def tokens(self, images):
        return parts(lambda x: self.rae.tokens(x).flatten(1), images)

    def __call__(self, images):
        """(B,3,H,W) in [0,1] -> (B,6), the value of each property."""
        y = (self.tokens(images).double() - self.mean) @ self.weight + self.bias
        label, sines, cosines, rest = y.split([10, 2, 2, 10], 1)
        hues = torch.atan2(sines, cosines) / (2 * math.pi)                      # (B, 2) of shape and ground
        column = {name: rest[:, i] > 0 for i, name in enumerate(list(Shapes.ranges)[2:])}
        sides = torch.stack([column["radius"], column["y"], column["x"]], 1)    # (B, 3)
        return torch.cat([label.argmax(1, keepdim=True), (8 * hues).round().long() % 8, sides], 1)


def text_model(path):
    """(DiT, autoencoder, what encodes captions) of a text model."""
    model = load_dit(path)
    return model, load_rae(ROOT / model.rae), load_text(model, torch.device("cpu"))


def obedience(model, rae, text, reader, captions, scale, steps=25):
    """(share of pictures that show each property (6,), of those that say it; share that show all that is said;
    what the pictures show (B,6))."""
    y = text(captions)
    said = said_by(captions)
    fake = parts(lambda part, keys: draw(model, rae, part, keys, steps, scale=scale), y, torch.arange(len(y)))
    shown = reader(fake)
    right = (shown == said) | (said < 0)
    return right.sum(0).sub((said < 0).sum(0)) / (said >= 0).sum(0), right.all(1).float().mean(), shown


def row_of(shares, together):
    return ", ".join(f"{name} {share:.1%}" for name, share in zip(PROPERTIES, shares)) + f"; all {together:.1%}"


def check_text(run, num, scale=3.0):
    """Prints how well a run's pictures show what captions say."""
    torch.set_grad_enabled(False)
    model, rae, text = text_model(ROOT / run)

    # The reader itself, on drawings that it has not seen
    reader = Reader(rae)
    data = Shapes(first=50_000, captioned=True)
    indices = torch.arange(50_000, 60_000)
    said = said_by(data.caption(indices, indices, chance=2))
    shown = reader(data.render(indices)[0] / 255)
    right = (shown == said) | (said < 0)
    print(f"captions: the reader is right on {right.all(1).float().mean():.2%} of {len(indices)} drawings", flush=True)

    # Captions that say all, and captions as in training, of which parts are left out
    for name, held_out in (("seen", False), ("never seen", True)):
        *found, _ = obedience(model, rae, text, reader, full_captions(num, held_out), scale)
        print(f"{num} captions of 11 words, pairs of class and colour {name}, scale {scale:g}:", row_of(*found),
              flush=True)
    indices = torch.arange(50_000, 50_000 + num)
    captions = data.caption(indices, indices)
    *found, shown = obedience(model, rae, text, reader, captions, scale)
    print(f"{num} captions with parts left out:", row_of(*found))

    # What is not said should be as various as in drawings: half the sum of differences between shares
    said = said_by(captions)
    real = reader(data.render(indices)[0] / 255)
    far = []
    for i in range(1, 6):
        free = said[:, i] < 0
        one, other = (torch.bincount(x[free, i], minlength=8) / free.sum() for x in (shown, real))
        far.append(f"{PROPERTIES[i]} {(one - other).abs().sum() / 2:.2f}")
    print("what they do not say, distance of its distribution from that of drawings (0 to 1):", ", ".join(far))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PRETRAINED, help="make this encoder alone")
    parser.add_argument("--check", nargs="?", const="assets/demo", metavar="RUN", help="judge a run's folder")
    parser.add_argument("--num", type=at_least(20), default=README_NUM, help="samples to judge (%(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.check:
        if args.num < README_NUM / 2:
            print(f"WARNING: the README's figures are of n = {README_NUM:,} samples; of {args.num} FD is"
                  " larger, the distances vary more, and none can be held against them")
        judge = check_text if load_dit(ROOT / args.check).text else check
        return judge(args.check, args.num)

    # The encoders; a decoder of `tiny`, and three DiTs on its latents, by the commands that a user has
    for name in [args.only] if args.only else PRETRAINED:
        torch.manual_seed(0)
        bundle(PRETRAINED[name](), name)
    if args.only:
        return
    for command in COMMANDS:
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    pack("out/demo/rae.pt", "rae.pt", "config", "mean", "var", encoder=None)
    pack("out/demo/dit.pt", "dit.pt", "config", "alpha", "classes")
    pack("out/weak/dit.pt", "weak.pt", "config", "alpha", "classes")
    pack("out/text/dit.pt", "text.pt", "config", "alpha", "classes", "captions")


if __name__ == "__main__":
    main()

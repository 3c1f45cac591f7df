"""What a linear classifier reads in latents: the paper's Table 1d, and the best of N latents.

    python assets/probe.py --encoder mae_b --data data/imagenet    # top-1 on the encoder's tokens
    python assets/probe.py --run out/tiny --best-of 4              # samples, each the best of 4

A probe is a logistic regression on mean tokens, without [CLS], fitted by L-BFGS: the published 84.5
of DINOv2-B has [CLS] too, and its own training. Best of N: latents *are* representations, so the
candidate that the probe finds likeliest of its label is decoded (arXiv 2601.16208, section 5).
N images, D channels of a token, C classes.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

if not __package__:  # started as a script: the root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rae import (ENCODERS, RAE, UserError, at_least, centre_crops, default_data, in_fp32, in_order,  # noqa: E402
                 load_rae, mix, newest_run, open_data, open_val, save_picture, say, start)
from sample import latents                                                            # noqa: E402
from train_dit import load_dit                                                        # noqa: E402


def fit_probe(features, labels, num_classes, decay=1e-4):
    """features (N,D), labels (N,) -> a function (M,D) -> logits (M,C): logistic regression. It takes
    200 passes over all features at most."""
    mean = features.mean(0)
    std = features.std(0) + 1e-6  # L-BFGS wants one scale; a constant feature stays 0
    x = (features - mean) / std

    # The loss is convex: zero is as good a start as any
    head = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        total = F.cross_entropy(head(x), labels) + decay / 2 * head.weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    head.requires_grad_(False)
    return lambda features: head((features - mean) / std)


def linear_probe(train_features, train_labels, test_features, test_labels):
    """(N,D), (N,) and (M,D), (M,) -> top-1 of a linear classifier (Table 1d)."""
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    guess = fit_probe(train_features, train_labels, num_classes)(test_features).argmax(1)  # (M,)
    return (guess == test_labels).double().mean().item()


@torch.no_grad()
def mean_tokens(rae, dataset, num=None):
    """(mean tokens (N,D), labels (N,)) of `num` images; broken files are left out."""
    found = [(rae.tokens(images).mean(1), labels.to(images.device))
             for images, labels, _ in in_order(centre_crops(dataset), 64, rae.mean.device, most=num)]
    features, labels = map(torch.cat, zip(*found))
    return features, labels


def fit_latent_probe(rae, data, num_classes):
    """The probe of the best of N, on 50 images per class and at least 10,000: (M,D) -> (M,C)."""
    dataset = open_data(data, rae.image_size)
    if len(dataset.classes) != num_classes:
        raise UserError(f"a probe needs images of the model's {num_classes} classes as --data: {data}"
                        f" has {len(dataset.classes)}")
    return fit_probe(*mean_tokens(rae, dataset, max(10_000, 50 * num_classes)), num_classes)


@torch.no_grad()
def best_of(n, model, rae, probe, labels, keys, alpha, *options, **more):
    """labels (B,), keys (B,) -> images (B,3,H,W) in [0,1]: the best of n latents each, decoded.
    The first candidate of a key is what `generate` draws; options: those of sample.latents."""
    keys = torch.stack([keys] + [mix(keys, j) for j in range(1, n)], 1).flatten()
    z = latents(model, rae, labels.repeat_interleave(n), keys, alpha, *options, **more)

    # The probe was fitted to mean tokens of real images; generated latents are tokens already
    means = (z * rae.std + rae.mean).mean(1)              # (B n, D)
    fits = in_fp32(probe)(means).double().log_softmax(1)  # in bf16 all would tie
    labels = labels.to(fits.device).repeat_interleave(n)
    fits = fits.gather(1, labels[:, None]).view(-1, n)    # (B, n)
    z = z.unflatten(0, (-1, n))                           # (B, n, N, D)
    z = z[torch.arange(len(z), device=z.device), fits.argmax(1)]
    return rae.decode(z).float().clamp(0, 1)


def top1(args, device):
    """Table 1d of an encoder: a line of JSON."""
    rae = RAE(args.encoder, "tiny", ENCODERS[args.encoder].image_side)
    rae.load_encoder(args.encoder_weights).eval().to(device)
    data = args.data or default_data(rae)
    train = open_data(data, rae.image_size)
    test = open_val(None, data, rae.image_size)
    if test is None or train.classes != test.classes:
        raise UserError(f"--data {data}: a probe needs train/ and val/, of the same classes")
    x, y = mean_tokens(rae, train, args.num)
    u, v = mean_tokens(rae, test, args.num)
    say(json.dumps(dict(probe_top1=linear_probe(x, y, u, v), n=len(v), n_train=len(y),
                        classes=len(test.classes), encoder=args.encoder)))


def draw(args, device):
    """A picture of the best of N, a column per class."""
    model = load_dit(args.run or newest_run("dit.pt"), device)
    if not model.classes:
        raise UserError("the best of N needs a model with classes: a probe judges by the label")
    rae = load_rae(model.rae, device)
    probe = fit_latent_probe(rae, args.data or default_data(rae), model.num_classes)
    count = min(10, model.num_classes)
    labels = torch.arange(count).repeat(8) * (model.num_classes // count)
    keys = mix(args.seed, 0, torch.arange(len(labels)))  # those of sample.py
    images = best_of(args.best_of, model, rae, probe, labels, keys, model.alpha)
    save_picture(images, args.out, nrow=count)
    say(f"wrote {args.out}: the best of {args.best_of} latents each")


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--encoder", default="tiny", choices=[*ENCODERS], help="whose tokens (default: tiny)")
    add("--encoder-weights", metavar="PATH", help="its weights, or `random` (default: pretrained)")
    add("--data", help="labelled images (default: the autoencoder's)")
    add("--num", type=at_least(2), help="so many images of each part (default: all)")
    add("--best-of", type=at_least(2), help="draw samples, each the best of so many latents")
    add("--run", help="of --best-of: run folder, dit.pt or release:NAME (default: the newest)")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of --best-of: of the noise")
    add("--out", default="best.png", help="of --best-of: the picture (default: %(default)s)")
    args = parser.parse_args()
    device, *_ = start()
    (draw if args.best_of else top1)(args, device)


if __name__ == "__main__":
    main()

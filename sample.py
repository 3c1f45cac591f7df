"""Sampling: integrate a DiT's velocity from noise (t = 1) to latents (t = 0), and decode them.

    z <- z - (t - t') v(z, t),   v = v_other + scale (v - v_other) under guidance

    python sample.py                                     # out/'s newest run, or the bundled demo
    python sample.py --classes star heart --scale 1.5    # two classes, classifier-free guidance
    python sample.py --best-of 4                         # decodes the best of 4 latents
    torchrun --nproc_per_node=8 -- sample.py --run release:imagenet256 --npz samples.npz

An image is a function of (seed, its index, the model), whatever the batch or the number of ranks.
B images, N tokens, D channels of a token, y labels. Source: arXiv 2510.11690, section 5.
"""
import argparse
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import save_image
from tqdm import tqdm

from fid import fit_probe, per_image
from rae import (UserError, at_least, check_picture, default_data, enlarged, in_fp32, load_rae,
                 locate, mix, newest, normals, open_data, start, writing)
from train_dit import DiT, conditional, euler, load_dit, sample_times


# Guidance

def guided(model, y, scale=1.0, weak=None, interval=(0, 1)):
    """velocity(z, t) for the labels y (B,): plain (scale 1), or guided.

    v_other + scale (v - v_other), v_other from the null label (classifier-free), from `weak`, or,
    weak "self", from the model's own base head, in the same pass; outside `interval`: v. What the
    other is worse at, the sum overdoes in the better direction (AutoGuidance, Karras 2024).
    """
    plain = conditional(model, y)

    # v and the other's: of the base head, of a weaker model, or of the model without a label
    if weak == "self":
        check_base_head(model)
        pair = conditional(model, y, True)  # one pass
    elif weak is not None:
        other = conditional(weak, y)
        def pair(z, t):
            return plain(z, t), other(z, t)
    else:
        null = torch.full_like(y, model.num_classes)
        both = conditional(model, torch.cat([y, null]))
        def pair(z, t):
            return both(z.repeat(2, 1, 1), t).chunk(2)  # one pass, a batch of 2B

    def velocity(z, t):
        # The other is not asked where it would change nothing
        if scale == 1 or not interval[0] <= float(t) <= interval[1]:
            return plain(z, t)
        v, v_other = pair(z, t)
        return torch.lerp(v_other, v, scale)
    return velocity


def check_base_head(model):
    """Refuse what cannot guide itself."""
    if not getattr(model, "base_head", 0):
        raise UserError("this model has no base head that could guide it: train one with"
                        " train_dit.py --base-head, or name another --guide")


@torch.no_grad()
def generate(model, rae, labels, keys, alpha, steps=50, scale=1.0, weak=None, interval=(0, 1),
             probe=None, best_of=1):
    """labels (B,), keys (B,) -> images (B,3,H,W) in [0,1].

    best_of: so many latents for each image, of which the one is decoded that `probe`, mean tokens
    (M,D) -> logits (M,C), finds likeliest of its label: latents represent (arXiv 2601.16208).
    """
    # Noise belongs to an image: drawn from its key, on the CPU for every device
    device = rae.mean.device
    if best_of > 1:  # each image's first: what best_of = 1 draws
        keys = torch.stack([keys] + [mix(keys, j) for j in range(1, best_of)], 1).flatten()
        labels = labels.repeat_interleave(best_of)  # (B best_of,)
    labels = labels.to(device)                      # (B best_of,)
    noise = normals(keys, rae.num_tokens * rae.token_dim, torch.device("cpu"))
    noise = noise.view(-1, rae.num_tokens, rae.token_dim).to(device)
    z = euler(guided(model, labels, scale, weak, interval), noise, sample_times(steps, alpha))

    # The probe was fitted to mean tokens of real images; generated latents are tokens already
    if best_of > 1:
        means = (z * rae.std + rae.mean).mean(1)  # (B best_of, D)
        fits = in_fp32(probe)(means).double().log_softmax(1)  # in bf16 all would tie
        fits = fits.gather(1, labels[:, None]).view(-1, best_of)  # (B, best_of)
        z = z.unflatten(0, (-1, best_of))  # (B, best_of, N, D)
        z = z[torch.arange(len(z), device=device), fits.argmax(1)]
    return rae.decode(z).float().clamp(0, 1)  # (B, 3, H, W)


# Which classes

def balanced_label(seed, index, num_classes):
    """Labels (B,) of image indices (B,): each block of num_classes indices is a shuffle of all
    classes, drawn from (seed, block); so the set is balanced and shuffled, also if cut."""
    def shuffle(block):
        generator = torch.Generator().manual_seed(int(mix(seed, 1, block)))
        return torch.randperm(num_classes, generator=generator)

    blocks = {block: shuffle(block) for block in (index // num_classes).unique().tolist()}
    return torch.stack([blocks[i // num_classes][i % num_classes] for i in index.tolist()])


def pick_classes(names, classes):
    """Class names or indices -> indices; `none`: the null class; None: ten of all."""
    if names == ["none"]:
        return [len(classes)]

    # What a user may call a class
    known = {str(i): i for i in range(len(classes))}           # by index ...
    known |= {str(name): i for i, name in enumerate(classes)}  # ... or by name, which wins
    if names is None:
        count = min(10, len(classes))
        return [i * len(classes) // count for i in range(count)]
    unknown = [name for name in names if name not in known]
    if unknown:
        dots = ", ..." if len(classes) > 10 else ""
        raise UserError(f"unknown class {', '.join(unknown)}: the model knows"
                        f" {', '.join(map(str, classes[:10]))}{dots}, or an index below {len(classes)}")
    return [known[name] for name in names]


def fit_latent_probe(rae, data, columns, num_classes):
    """The probe of --best-of: a linear classifier, of 50 images per class and at least 10,000."""
    # Labels must mean what they mean to the model
    dataset = open_data(data, rae.image_size)
    if max(columns) >= num_classes or len(dataset.classes) != num_classes:
        raise UserError("--best-of needs a class, and an image folder of the model's classes as"
                        f" --data: {data} has {len(dataset.classes)}")

    # On real images; what it is shown later are generated latents
    def pooled(images):  # uint8 (b,3,H,W) -> (b,D)
        return rae.tokens(images.float() / 255).mean(1)
    count = max(10_000, 50 * num_classes)  # images to fit the probe to
    return fit_probe(*per_image(dataset, pooled, 64, rae.mean.device, count), num_classes)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", help="run folder, dit.pt or release:NAME (default: newest in out/, else the bundled demo)")
    add("--classes", nargs="+", help="names or indices; `none`: unconditional (default: all, of many ten)")
    add("--num", type=at_least(1), help="images in all (default: 8 per class; with --npz 50000)")
    add("--out", help="the grid's file, a column per class (default: samples.png)")
    add("--npz", help="instead of a grid, this .npz for fid.py: class-balanced, shuffled, uint8 (N,H,W,3)")
    add("--steps", type=at_least(1), default=50, help="Euler steps = evaluations of the model (default: 50)")
    add("--scale", type=at_least(0, float), help="guidance (default: 1, none; with --guide 1.42, self 1.78)")
    add("--guide", help="AutoGuidance by this model: run folder, dit.pt, release:NAME; `self`: by the model's"
        " base head (else classifier-free)")
    add("--interval", type=at_least(0, float, 1), nargs=2, metavar=("LO", "HI"),
        help="guide at these times alone, of 1 (noise) to 0 (default: 0 1)")
    add("--best-of", type=at_least(1), default=1, help="latents for each image; a linear probe picks one")
    add("--data", help="labelled images for that probe (default: the autoencoder's)")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of noise and labels (default: 0)")
    add("--batch", type=at_least(1), default=80, help="images at a time on each rank; changes no picture")
    args = parser.parse_args(argv)

    # What does not go together
    if args.interval and args.interval[0] > args.interval[1]:
        low, high = args.interval
        parser.error(f"--interval {low} {high}: LO comes first, and is not above HI")
    if args.data and args.best_of == 1:
        parser.error("--data is what the probe of --best-of is fitted to: give --best-of as well")
    if args.npz and args.out:
        parser.error("--out and --npz exclude each other: a grid, or an archive")
    if args.npz and (Path(args.npz).is_dir() or Path(args.npz).suffix != ".npz"):
        parser.error(f"--npz {args.npz}: give a file that ends in .npz")
    args.out = args.out or "samples.png"
    if not args.npz:
        check_picture(args.out)
    return args


def load(args, device):
    """(model, autoencoder, guide: None, a model or "self"; scale); refuses what does not fit."""
    # The model, and what guides it: as given, or as the checkpoint brings along
    run = str(args.run or newest("dit.pt"))
    model = load_dit(run, device)
    guide = args.guide
    scale = args.scale
    if guide is None and scale is None:
        guide = model.guide
        scale = model.scale
    if scale is None:
        scale = {None: 1.0, "self": 1.78}.get(guide, 1.42)  # RAEv2's, the paper's
    if guide == "self":
        check_base_head(model)
    weak = guide  # None or "self"
    if guide and guide != "self":
        weak = load_dit(guide, device)
    if not locate(model.rae, "rae.pt").exists():
        raise UserError(f"{run} was trained on {model.rae}, which is not there any more: bring it"
                        " back")
    rae = load_rae(model.rae, device, decode_only=args.best_of == 1)

    # Do they belong together? An RAE's latents are what its DiT makes
    made = model.config["tokens"], model.config["token_dim"]
    if made != (rae.num_tokens, rae.token_dim):
        raise UserError(f"{run} makes {made[0]} x {made[1]} latents, but {model.rae} decodes"
                        f" {rae.num_tokens} x {rae.token_dim}")
    same = ("tokens", "token_dim", "num_classes")
    if isinstance(weak, DiT) and any(weak.config[key] != model.config[key] for key in same):
        raise UserError(f"--guide {guide} and {run} differ in tokens, channels or classes")

    # Which guidance this model can have
    unconditional = not model.classes or args.classes == ["none"]
    if unconditional and scale != 1 and not weak:
        raise UserError("classifier-free guidance needs classes: without any, give --scale 1 or"
                        " --guide")
    if not model.classes and args.classes and args.classes != ["none"]:
        raise UserError(f"{run} was trained without labels, and has no classes: leave --classes out")
    if scale != 1 and not weak and not model.label_dropout:
        raise UserError(f"{run} was trained with --label-dropout 0 and has no null class: guide it"
                        " by another model, --guide")
    if scale == 1 and args.interval:
        raise UserError("--interval is about guidance: give --scale or --guide as well")
    if dist.get_rank() == 0:
        way = f"guidance {scale:g} by {guide or 'the null class'} in {list(args.interval or (0, 1))}"
        trained = f" after {model.step} steps" if model.step else ""
        print(f"{run}{trained}, with {model.rae}: {args.steps} evaluations,"
              f" {way if scale != 1 else 'no guidance'}, best of {args.best_of}")
    return model, rae, weak, scale


def main():
    args = parse_args()
    device, rank, world = start()

    # What draws, and which classes
    model, rae, weak, scale = load(args, device)
    columns = pick_classes(args.classes, model.classes) if model.classes else [model.num_classes]
    num = args.num or (50_000 if args.npz else 8 * len(columns))  # as FID is published
    probe = None  # of nothing to choose from
    if args.best_of > 1:
        data = args.data or default_data(rae)
        probe = fit_latent_probe(rae, data, columns, model.num_classes)

    # A label and a key for every index, whoever makes it
    indices = torch.arange(num)
    if args.npz and model.classes and not args.classes:
        labels = balanced_label(args.seed, indices, len(model.classes))  # 50 of each, if 50,000
    else:
        labels = torch.tensor(columns)[indices % len(columns)]
    keys = mix(args.seed, 0, indices)  # 0: for noise; balanced_label has 1

    # Every rank makes its share of the indices and writes it into one array on disk
    out = Path(args.npz or args.out)
    side = rae.output_size  # of a picture
    begun = time.time()
    pid = torch.tensor(os.getpid())  # rank 0's: two commands may share --out
    dist.broadcast(pid, 0)
    pixels = Path(f"{out}.{int(pid)}.part.npy")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that `finally` tidies up
    try:
        if rank == 0:
            with writing(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(pixels, "w+", np.uint8, (num, side, side, 3))
                if hasattr(os, "posix_fallocate"):  # a full disk is found now, not in a mapped page
                    with open(pixels, "r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, pixels.stat().st_size)
        dist.barrier()  # the file is there

        # Noise -> latents -> pixels, rounded to 8 bits
        array = np.lib.format.open_memmap(pixels, "r+")
        mine = indices.tensor_split(world)[rank]  # a stretch, perhaps empty
        parts = mine.split(max(1, args.batch // args.best_of)) if len(mine) else ()
        for index in tqdm(parts, disable=rank > 0, unit="batch"):
            images = generate(model, rae, labels[index], keys[index], model.alpha, args.steps, scale,
                              weak, args.interval or (0, 1), probe, args.best_of)
            images = (images * 255).round().byte()  # (b, 3, H, W)
            array[index.numpy()] = images.permute(0, 2, 3, 1).cpu().numpy()
        array.flush()  # for rank 0 to read
        dist.barrier()  # all are there
        if rank == 0:
            with writing(out):
                write(out, array, pixels, labels, len(columns), bool(args.npz))
    finally:
        if rank == 0:
            pixels.unlink(missing_ok=True)  # also after an error
    if rank == 0:
        names = [str(model.classes[i]) if i < len(model.classes) else "no class" for i in columns]
        what = f"{num} images" if args.npz else f"{num} images, columns {', '.join(names)}"
        print(f"wrote {out}: {what}, in {time.time() - begun:.1f} s. Next: {next_command(args, rae)}")


def write(out, array, pixels, labels, columns, archive):
    """Images (N,H,W,3) on disk -> an .npz, into which their file goes as it is; or a grid."""
    if archive:
        with zipfile.ZipFile(out, "w") as file:
            file.write(pixels, "arr_0.npy")  # not compressed: fid.py maps it
            with file.open("labels.npy", "w") as entry:
                np.lib.format.write_array(entry, labels.numpy())  # for checks of their balance
    else:
        images = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float() / 255
        save_image(enlarged(images), out, nrow=columns)


def next_command(args, rae):
    """What a person would do now."""
    if args.npz and default_data(rae) == "shapes":
        return f"python fid.py {args.npz} shapes/val --features tiny"
    if args.npz:
        return f"python fid.py {args.npz} REFERENCE"
    if args.run or list(Path("out").glob("*/dit.pt")):
        run = f" --run {args.run}" if args.run else ""
        return f"python sample.py{run} --npz samples.npz --num 1000"
    return "python train_decoder.py --encoder tiny"


if __name__ == "__main__":
    main()

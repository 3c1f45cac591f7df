"""Sampling: integrate a DiT's velocity from noise (t = 1) to latents (t = 0), and decode them.

    z <- z - (t - t') v(z, t),   v = v_weaker + scale (v - v_weaker) under guidance

    python sample.py                                     # out/'s newest run, or the bundled demo
    python sample.py --classes star heart --scale 1.5    # two classes, classifier-free guidance
    python sample.py --prompt "a red star on dark green" "a small ring"    # two captions
    torchrun --nproc_per_node=8 -- sample.py --run release:imagenet256 --npz samples.npz

An image is a function of (seed, its index, the model), whatever the batch or the number of ranks.
B images, N tokens, D channels of a token, y labels or captions. Sources: arXiv 2510.11690, section
5; captions: arXiv 2601.16208.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from rae import (UserError, at_least, command, default_data, load_rae, locate, mix, newest_run,
                 normals, refuse_changes, save_picture, say, start, writable)
from train_dit import conditional, euler, load_dit, load_text, null_of, sample_times


# Guidance

def guided(model, y, scale=1.0, weak=None, interval=(0, 1)):
    """velocity(z, t) for labels or captions y: v_weaker + scale (v - v_weaker) at times t in
    `interval`, ends included; v elsewhere, and where scale is 1.

    v_weaker has no label or caption (weak None: classifier-free guidance), or comes from another model
    (weak: a smaller or earlier one, on z's device; Karras 2024), or from the base head ("self"; RAEv2).
    """
    if weak == "self" and not getattr(model, "base_head", 0):
        raise UserError("this model has no base head that could guide it: train one with"
                        " train_dit.py --base-head, or name another --guide")

    def velocity(z, t):
        if scale == 1 or not interval[0] <= float(t) <= interval[1]:
            return conditional(model, y)(z, t)  # the weaker one would change nothing
        if weak is None:  # one pass, a batch of 2B
            both = torch.cat([y, null_of(model, y)])            # (2B, ...)
            v = conditional(model, both)(z.repeat(2, 1, 1), t)  # (2B, N, D)
            v, v_weaker = v.chunk(2)
        elif weak == "self":  # both outputs, of one pass
            v, v_weaker = conditional(model, y, True)(z, t)
        else:
            v = conditional(model, y)(z, t)
            v_weaker = conditional(weak, y)(z, t)
        return torch.lerp(v_weaker, v, scale)  # beyond v, where scale > 1
    return velocity


@torch.no_grad()
def latents(model, rae, y, keys, alpha, steps=50, scale=1.0, weak=None, interval=(0, 1)):
    """Labels or captions y (B,...), keys (B,) -> z (B,N,D). The noise of an image is drawn from its
    key, on the CPU, so that it is the same for every device."""
    noise = normals(keys, rae.num_tokens * rae.token_dim, torch.device("cpu"))
    noise = noise.view(-1, rae.num_tokens, rae.token_dim).to(rae.mean.device)  # (B, N, D)
    velocity = guided(model, y.to(rae.mean.device), scale, weak, interval)
    return euler(velocity, noise, sample_times(steps, alpha))


@torch.no_grad()
def generate(model, rae, y, keys, *options, **more):
    """Labels or captions y (B,...), keys (B,) -> images (B,3,H,W) in [0,1]; options: as of latents."""
    z = latents(model, rae, y, keys, *options, **more)  # (B, N, D)
    return rae.decode(z).float().clamp(0, 1)


# Labels and captions

def balanced_labels(seed, index, num_classes):
    """Labels (B,) of image indices (B,): each block of num_classes indices is a shuffle of all
    classes, drawn from (seed, block): the first part of a set is shuffled and balanced as well."""
    blocks = {}
    for block in (index // num_classes).unique().tolist():
        generator = torch.Generator().manual_seed(int(mix(seed, 1, block)))
        blocks[block] = torch.randperm(num_classes, generator=generator)
    return torch.stack([blocks[i // num_classes][i % num_classes] for i in index.tolist()])


def pick_classes(names, classes):
    """Class names or indices -> indices; `none`: the null class; None: ten of all."""
    if names is None:
        count = min(10, len(classes))
        return [i * len(classes) // count for i in range(count)]
    if names == ["none"]:
        return [len(classes)]
    known = {str(i): i for i in range(len(classes))}           # by index ...
    known |= {str(name): i for i, name in enumerate(classes)}  # ... or by name, which wins
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown class {', '.join(unknown)}: the model knows"
                        f" {', '.join(map(str, classes)):.120}, or an index below {len(classes)}")
    return [known[name] for name in names]


def lines_of(prompt):
    """A prompt, or the captions of FILE.txt, one a line; an empty file is the empty caption."""
    if not prompt.endswith(".txt"):
        return [prompt]
    if not Path(prompt).is_file():
        raise UserError(f"--prompt {prompt}: no such file")
    return Path(prompt).read_text("utf-8-sig", "replace").splitlines() or [""]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--run", help="run folder, dit.pt or release:NAME (default: newest in out/, else the bundled demo)")
    add("--classes", nargs="+",
        help="names or indices; `none`: unconditional (default: all, at most ten)")
    add("--prompt", nargs="+",
        help="captions, or FILE.txt, one a line (default: ten of the training set)")
    add("--num", type=at_least(1),
        help="images in all (default: 8 per class or caption; with --npz 50000)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--out", help="the grid's file, a column per class or caption (default: samples.png)")
    either("--npz", help="instead of a grid, this .npz for fid.py: class-balanced, shuffled, uint8 (N,H,W,3)")
    add("--steps", type=at_least(1), default=50, help="Euler steps = evaluations of the model (default: 50)")
    add("--scale", type=at_least(0, float),
        help="guidance (default: 1, none; captions 3; with --guide 1.42, self 1.78)")
    add("--guide", help="AutoGuidance by this run, dit.pt or release:NAME; `self`: by the model's base head;"
        " `none`: classifier-free (default: the model that comes with the run, else classifier-free)")
    add("--interval", type=at_least(0, float, 1), nargs=2, metavar=("LO", "HI"),
        help="guide at these times alone, of 1 (noise) to 0 (default: 0 1)")
    add("--seed", type=at_least(0, int, 2 ** 62), default=0, help="of noise and labels (default: 0)")
    add("--batch", type=at_least(1), default=80, help="images at a time on each rank; changes no picture")
    args = parser.parse_args(argv)
    if args.interval and args.interval[0] > args.interval[1]:
        parser.error("--interval {} {}: LO comes first, and is not above HI".format(*args.interval))
    if args.npz:
        args.npz = args.npz.removesuffix(".npz") + ".npz"  # as numpy would name it
    return args


def recorded(model):
    """What a dit.pt says of the latents that it makes, and of its classes."""
    said = dict(tokens=model.config["tokens"], token_dim=model.config["token_dim"],
                latents=model.latents, classes=model.classes, captions=model.captions)
    return {key: value for key, value in said.items() if value is not None}


def load(args, device):
    """(model, autoencoder, weak: None, a model or "self"; scale); refuses what does not fit."""
    # The model and its autoencoder, whose latents it makes
    run = str(args.run or newest_run("dit.pt", captioned=bool(args.prompt)))
    model = load_dit(run, device)
    if args.prompt and not model.text or args.classes and model.text:
        flag = "--prompt" if model.text else "--classes"
        raise UserError(f"{run} was trained on {'captions' if model.text else 'classes'}: give {flag},"
                        " or another --run")
    if not locate(model.rae, "rae.pt").exists():
        raise UserError(f"{run} was trained on {model.rae}, which is not there any more: bring it"
                        " back")
    rae = load_rae(model.rae, device, decode_only=True)
    decoded = dict(tokens=rae.num_tokens, token_dim=rae.token_dim, latents=rae.latents)
    refuse_changes(f"{run} makes other latents than {model.rae} decodes", recorded(model), decoded,
                   "bring back the rae.pt that it was trained on")

    # What guides it, and how far: as given, else as the checkpoint brings along
    guide = args.guide or model.guide
    scale = args.scale
    if scale is None and not args.guide:
        scale = model.scale  # the checkpoint's, or None
    if scale is None:
        conditional_text = model.text and model.label_dropout < 1
        plain = 3.0 if conditional_text else 1.0  # as measured: assets/README.md, "Text to image"
        scale = {None: plain, "none": plain, "self": 1.78}.get(guide, 1.42)  # RAEv2's, the paper's
    if guide == "none" or scale == 1:
        guide = None
    weak = guide  # None or "self"
    if guide and guide != "self":
        weak = load_dit(guide, device)
        refuse_changes(f"{run} cannot be guided by {guide}", recorded(model), recorded(weak),
                       "give a --guide that was trained on the same latents and classes")

    # Which guidance this model can have
    if not model.classes and args.classes and args.classes != ["none"]:
        raise UserError(f"{run} was trained without labels, and has no classes: leave --classes out")
    labelled = (model.classes or model.text) and args.classes != ["none"]
    labelled = labelled and 0 < model.label_dropout < 1
    if scale != 1 and not weak and not labelled:
        raise UserError("classifier-free guidance needs labels or captions, and a model trained with a"
                        " --label-dropout above 0: give --scale 1, or another model, --guide")
    if scale == 1 and args.interval:
        raise UserError("--interval is about guidance: give --scale or --guide as well")
    null = "the empty caption" if model.text else "the null class"
    way = f"guidance {scale:g} by {guide or null} in {list(args.interval or (0, 1))}"
    trained = f" after {model.step} steps" if model.step else ""
    say(f"{run}{trained}, with {model.rae}: {args.steps} evaluations,"
        f" {way if scale != 1 else 'no guidance'}")
    return model, rae, weak, scale


def columns_of(args, model, device):
    """(names, y) of P columns: y labels (P,) or captions (P,L...). Sets model.empty_caption."""
    if model.text:
        names = sum(map(lines_of, args.prompt or []), []) or model.examples
        return names, load_text(model, device)(names)  # (P, L), or (P, L, E)
    y = pick_classes(args.classes, model.classes) if model.classes else [model.num_classes]
    names = [str(model.classes[i]) if i < len(model.classes) else "no class" for i in y]
    return names, torch.tensor(y)


def main():
    args = parse_args()
    device, rank, world = start()
    out = writable(args.npz or args.out or "samples.png", picture=not args.npz)
    model, rae, weak, scale = load(args, device)

    # A column and a key for every index, whichever rank draws it
    names, y = columns_of(args, model, device)
    num = args.num or (50_000 if args.npz else 8 * len(names))  # as FID is published
    indices = torch.arange(num)
    columns = indices % len(names)  # (num,), which of y an image has
    if args.npz and model.classes and not args.classes:
        y = torch.arange(len(model.classes))
        columns = balanced_labels(args.seed, indices, len(y))  # of ImageNet 50 of each class
    keys = mix(args.seed, 0, indices)  # 0: for noise; balanced_labels has 1

    # Noise -> latents -> pixels, rounded to 8 bits; every rank draws a stretch of the indices
    begun = time.time()
    side = rae.output_size
    pixels = [torch.zeros(0, side, side, 3, dtype=torch.uint8)]  # a stretch may be empty
    stretch = indices.tensor_split(world)[rank]
    for index in tqdm(stretch.split(args.batch), disable=rank > 0, unit="batch"):
        images = generate(model, rae, y[columns[index]], keys[index], model.alpha, args.steps, scale, weak,
                          args.interval or (0, 1))              # (b, 3, H, W)
        images = (images * 255).round().byte().permute(0, 2, 3, 1)  # (b, H, W, 3)
        pixels.append(images.cpu())

    # Stretches meet on the disk, where rank 0 joins them
    pid = torch.tensor(os.getpid())  # rank 0's: two commands may draw into one file
    dist.broadcast(pid, 0)
    parts = [Path(f"{out}.{int(pid)}.{r}.part.npy") for r in range(world)]
    whole = Path(f"{out}.{int(pid)}.part.npz")
    try:
        np.save(parts[rank], torch.cat(pixels).numpy())
        dist.barrier()
        if rank == 0:
            array = np.concatenate([np.load(part) for part in parts])  # (num, H, W, 3)
            if args.npz:
                classes = model.classes and not model.text
                labels = y[columns] if classes else columns  # indices into the names
                np.savez(whole, arr_0=array, labels=labels.numpy(),
                         names=names if model.text else [*model.classes, "no class"])
                os.replace(whole, out)  # at once, or not at all
            else:
                images = torch.from_numpy(array).permute(0, 3, 1, 2) / 255
                save_picture(images, out, nrow=len(names))
        dist.barrier()
    finally:
        for path in (parts[rank], whole):
            path.unlink(missing_ok=True)
    what = f"{num} images" if args.npz else f"{num} images, columns {', '.join(names)}"
    say(f"wrote {out}: {what}, in {time.time() - begun:.1f} s. Next: {next_step(args, rae)}")


def next_step(args, rae):
    """The command that usually follows."""
    if args.npz and default_data(rae) == "shapes":
        return command("fid.py", args.npz, "shapes/val", "--features", "tiny")
    if args.npz:
        return command("fid.py", args.npz, "REFERENCE")
    if args.run or list(Path("out").glob("*/dit.pt")):
        run = ("--run", args.run) if args.run else ()
        run += ("--prompt", *args.prompt) if args.prompt else ()
        return command("sample.py", *run, "--npz", "samples.npz", "--num", "1000")
    if args.prompt:
        return command("train_dit.py", "--rae", "assets/demo", "--run", "out/text", "--text", "words",
                       "--time", "uniform", "--epochs", "5")
    return command("train_decoder.py", "--encoder", "tiny")


if __name__ == "__main__":
    main()

"""Sampling: integrate a DiT's velocity from noise (t = 1) to latents (t = 0) by Euler steps, and decode them.

    python sample.py                                     # the newest run or the bundled demo -> samples.png
    python sample.py --classes star heart --scale 1.5    # two classes, classifier-free guidance
    python sample.py --best-of 4                         # decodes the best of 4 latents by a linear probe
    torchrun --nproc_per_node=8 -- sample.py --run release:imagenet256 --npz samples.npz --num 50000

An image is a function of (seed, its index, the model), whatever the batch size or the number of ranks.
B images, N tokens, D channels of a token, y labels, v velocity. Source: arXiv 2510.11690, section 5.
"""
import argparse
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from rae import UserError, at_least, best_dtype, load_rae, mix, newest, normals, open_data, start
from train_dit import RELEASED, load_dit, time_shift


def sample_times(steps, alpha):
    """steps + 1 times from 1 to 0: the uniform grid, shifted as in training."""
    return time_shift(torch.linspace(1, 0, steps + 1), alpha)


def euler(velocity, z, times):
    """Integrate dz/dt = velocity(z, t) over descending times (a CPU tensor): one evaluation per step."""
    for t, t_next in zip(times[:-1], times[1:]):
        z = z - (t - t_next) * velocity(z, t)
    return z


def guided(model, y, scale=1.0, weak=None, interval=(0, 1)):
    """velocity(z, t) for the labels y (B,): plain (scale 1), classifier-free, or guided by a weaker model.

    v_other + scale (v - v_other), v_other from the null label or from `weak`; outside `interval`: v.
    """
    def velocity(z, t):
        time = t.to(z.device, z.dtype).expand(len(z))                         # (B,)
        if scale == 1 or not interval[0] <= float(t) <= interval[1]:
            return model(z, time, y)
        if weak is not None:
            return torch.lerp(weak(z, time, y), model(z, time, y), scale)
        null = torch.full_like(y, model.num_classes)
        v, v_null = model(z.repeat(2, 1, 1), time.repeat(2), torch.cat([y, null])).chunk(2)   # a batch of 2B
        return torch.lerp(v_null, v, scale)
    return velocity


@torch.no_grad()
def generate(model, rae, labels, keys, alpha, steps=50, scale=1.0, weak=None, interval=(0, 1), dtype="fp32",
             probe=None, best_of=1):
    """labels (B,), keys (B,) -> images (B,3,H,W) in [0,1]; noise is drawn on the CPU for every device.

    best_of: so many latents for each image, of which the one is decoded that `probe`, tokens' means (M,D) ->
    logits (M,C), finds the likeliest of its label: latents are representations (arXiv 2601.16208).
    """
    device, size = rae.mean.device, (rae.num_tokens, rae.token_dim)
    keys = torch.stack([mix(keys, j) if j else keys for j in range(best_of)], 1).flatten()    # (B * best_of,)
    labels = labels.to(device).repeat_interleave(best_of)
    noise = normals(keys, size[0] * size[1], torch.device("cpu")).view(-1, *size).to(device)
    velocity = guided(model, labels, scale, weak, interval)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bf16")
    with autocast():
        z = euler(velocity, noise, sample_times(steps, alpha))                # (B * best_of, N, D), fp32
    if best_of > 1:
        fits = probe((z * rae.std + rae.mean).mean(1)).double().log_softmax(1)    # (B * best_of, C)
        best = fits.gather(1, labels[:, None]).view(-1, best_of).argmax(1)
        z = z.unflatten(0, (-1, best_of))[torch.arange(len(best), device=device), best]
    with autocast():
        return rae.decode(z).float().clamp(0, 1)


def balanced_label(seed, index, num_classes):
    """Labels (B,) of image indices (B,): every block of num_classes indices is a shuffle of all classes,
    drawn from (seed, block); so the set is balanced and shuffled, and stays so if cut or made longer."""
    def shuffle(block):
        return torch.randperm(num_classes, generator=torch.Generator().manual_seed(int(mix(seed, 1, block))))
    blocks = {block: shuffle(block) for block in (index // num_classes).unique().tolist()}
    return torch.stack([blocks[i // num_classes][i % num_classes] for i in index.tolist()])


def pick_classes(names, classes):
    """Class names or indices given by the user -> indices; `none` -> the null class."""
    if names == ["none"]:
        return [len(classes)]
    known = {str(i): i for i in range(len(classes))} | {str(name): i for i, name in enumerate(classes)}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"unknown class {', '.join(unknown)}: the model knows"
                        f" {', '.join(map(str, classes[:10]))}{', ...' if len(classes) > 10 else ''},"
                        f" or an index below {len(classes)}")
    return [known[name] for name in names]


def fit_to(rae, data, columns, device):
    """The probe of --best-of: a linear classifier of 50 images per class of `data`, and at least 10,000."""
    from fid import fit_probe, per_image
    dataset = open_data(data, rae.image_size)
    if max(columns) >= len(dataset.classes):
        raise UserError(f"--best-of needs a class, and an image folder of the model's classes as --data:"
                        f" {data} has {len(dataset.classes)}")
    pooled = lambda images: rae.tokens(images.float() / 255).mean(1)
    return fit_probe(*per_image(dataset, pooled, 64, device, max(10_000, 50 * len(dataset.classes))))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", help="run folder, dit.pt or release:NAME (default: newest in out/, else the bundled demo)")
    add("--rae", help="autoencoder that decodes: run folder, rae.pt or release:NAME (default: the model's)")
    add("--weights", help="folder with the released files, in place of the hub")
    add("--classes", nargs="+", help="names or indices; `none`: unconditional (default: all, of many ten)")
    add("--num", type=at_least(1), help="images in all (default: 8 per class; with --npz 50000)")
    add("--npz", help="write this .npz for fid.py: class-balanced, shuffled, uint8 arr_0 (N,H,W,3)")
    add("--out", default="samples.png", help="the grid's file: a column per class")
    add("--steps", type=at_least(1), default=50, help="Euler steps = evaluations of the model")
    add("--scale", type=float, help="guidance (default: 1, none; with --guide 1.42; a release's own)")
    add("--guide", help="AutoGuidance by this model: run folder, dit.pt, release:NAME (else classifier-free)")
    add("--interval", type=float, nargs=2, default=(0, 1), metavar=("LO", "HI"), help="guide at these times")
    add("--best-of", type=at_least(1), default=1, help="latents for each image; a linear probe picks one")
    add("--data", help="labelled images for that probe (default: shapes for tiny, or data/imagenet)")
    add("--seed", type=int, default=0)
    add("--batch", type=at_least(1), default=80, help="images at a time on each rank; changes no picture")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on GPUs that have it, else fp32")
    return parser.parse_args()


def main():
    args = parse_args()
    device, rank, world = start()
    run = str(args.run or newest("dit.pt"))
    model = load_dit(run, device, weights=args.weights)
    model.rae = args.rae or model.rae
    rae = load_rae(model.rae, device, decode_only=args.best_of == 1, weights=args.weights)
    guide, scale = args.guide, 1.42 if args.guide else 1.0
    if run.removeprefix("release:") in RELEASED and args.scale is None and not guide:          # the paper's
        guide, scale = f"{run}/weak", RELEASED[run[8:]][3]
    scale = scale if args.scale is None else args.scale
    weak = load_dit(guide, device, weights=args.weights) if guide else None
    dtype = args.dtype or ("fp32" if device.type == "cpu" else best_dtype(device))
    classes, latents = model.classes, (rae.num_tokens, rae.token_dim)
    if (model.config["tokens"], model.config["token_dim"]) != latents:
        raise UserError(f"{run} makes {model.config['tokens']} x {model.config['token_dim']} latents, but"
                        f" {model.rae} decodes {latents[0]} x {latents[1]}")
    if weak and any(weak.config[key] != model.config[key] for key in ("tokens", "token_dim", "num_classes")):
        raise UserError(f"--guide {guide} and {run} differ in tokens, channels or classes")
    spread = [str(i) for i in range(0, len(classes), max(1, len(classes) // 10))]
    columns = pick_classes(args.classes or spread, classes) if classes else [model.num_classes]
    if columns == [model.num_classes] and scale != 1 and not weak:
        raise UserError("classifier-free guidance needs classes: --classes none takes --scale 1 or --guide")
    num, probe = args.num or (50_000 if args.npz else 8 * len(columns)), None
    if args.best_of > 1:
        data = args.data or ("shapes" if rae.name == "tiny" else "data/imagenet")
        probe = fit_to(rae, data, columns, device)

    # Every rank makes its share of the indices and writes it into one array on disk
    out = Path(args.npz or args.out)
    pixels = Path(f"{out}.part.npy")
    side = rae.image_size * rae.upsample
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(pixels, "w+", np.uint8, (num, side, side, 3))
        way = f"guidance {scale:g} by {guide or 'the null class'} in {list(args.interval)}"
        way = way if scale != 1 else "no guidance"
        print(f"{run} with {model.rae}: {num} images, {args.steps} steps, {way}, best of {args.best_of}")
    dist.barrier()
    array, begun = np.lib.format.open_memmap(pixels, "r+"), time.time()
    indices = torch.arange(num)
    if args.npz and classes and not args.classes:
        labels = balanced_label(args.seed, indices, len(classes))
    else:
        labels = torch.tensor(columns)[indices % len(columns)]
    mine = indices.tensor_split(world)[rank]
    parts = mine.split(max(1, args.batch // args.best_of)) if len(mine) else ()
    for index in tqdm(parts, disable=rank > 0, unit="batch"):
        images = generate(model, rae, labels[index], mix(args.seed, 0, index), model.alpha, args.steps, scale,
                          weak, args.interval, dtype, probe, args.best_of)
        array[index.numpy()] = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    array.flush()
    dist.barrier()

    if rank == 0:
        if args.npz:                                                          # the array is archived as it is
            with zipfile.ZipFile(out, "w") as archive:
                archive.write(pixels, "arr_0.npy")
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, labels.numpy())
        else:
            images = torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).float() / 255
            zoom = max(1, 96 // side)                                         # small pictures are enlarged
            images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
            save_image(make_grid(images, nrow=len(columns)), out)
        pixels.unlink()
        after = f"python fid.py {out} REFERENCE" if args.npz else "python train_decoder.py --encoder tiny"
        print(f"wrote {out}: {num} images in {time.time() - begun:.1f} s. Next: {after}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

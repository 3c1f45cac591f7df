"""Figure 3 and Table 3 on real latents: which widths learn an image, and what narrower ones learn instead.

    python theory/overfit.py                              # the bundled `tiny`, minutes on two CPU cores
    python theory/overfit.py --rae release:dinov2_b --data photos --depth 12 --lr 2e-4     # wants a GPU

Encodes pictures with the frozen encoder, gives each a label of its own (label given, the data is one point
and the least loss 0), and trains DiTs without DDT head of widths around the token dimension n, a narrow one
of twice the depth, and the narrow ones with x-prediction. The floor is Theorem 1's for Cov(z) pooled over
pictures and positions: (n - d) / n as long as pictures x tokens <= d, more beyond; with x-prediction E[w] =
39 times the n - d smallest eigenvalues of Cov(z), so 0 as long. The picture shows what samples of each model
decode to. Losses: t ~ U[0,1], per dimension, `in` and `out` of B's span. Source: arXiv 2510.11690, 4.1.
"""
import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "theory")]
from rae import load_rae, open_data, open_val  # noqa: E402
from sample import euler, guided, sample_times  # noqa: E402
from train_dit import DiT, shift_alpha  # noqa: E402
from width_bound import START, VERDICTS, WEIGHT, holds, measure, spectrum, theorem, train  # noqa: E402

ALLOW = 0.1      # what may be left above the floor for one picture; memorising more of them takes longer


def run(job):
    """One width on the latents z (K, N, n): trained, measured, sampled; a function of `job` alone."""
    z, began = job.pop("z"), time.process_time()
    torch.manual_seed(job["seed"])
    (K, N, n), width = z.shape, job["width"]
    predict = job.get("predict", "v")
    model = DiT(N, n, width, job["depth"], width // 32, head=0, num_classes=K, predict=predict).to(z.device)

    def draw(B):
        y = torch.randint(K, (B,), device=z.device)
        return z[y], y
    train(model, draw, job["steps"], job["lr"], batch=32)
    found = measure(model.eval().requires_grad_(False), draw, 1 << 12, parts=32, claim=predict)
    y, noise = torch.arange(K, device=z.device), torch.randn(z.shape, device=z.device)
    sample = euler(guided(model, y), noise, sample_times(50, shift_alpha(N, n)))
    return job | found | {"naive": max(n - width, 0) / n,
                          "floor": theorem(spectrum(z.cpu()), width, predict) / n,
                          "error": (sample - z).square().mean().item(), "sample": sample,
                          "cpu_seconds": round(time.process_time() - began)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rae", default=str(ROOT / "assets/demo/rae.pt"), help="rae.pt, run folder or release:NAME")
    add("--data", default="shapes", help="image folder, or `shapes`")
    add("--images", type=int, nargs="+", default=[1, 12], help="pictures to learn: a series of models each")
    add("--widths", type=int, nargs="+", help="multiples of 32 (default: 1/3, 2/3, 1, 4/3 and 2 n)")
    add("--depth", type=int, default=3, help="blocks; one narrow model has twice as many")
    add("--steps", type=int, default=600, help="optimiser steps, of 32 latents each")
    add("--lr", type=float, default=4e-3, help="learning rate")
    add("--seed", type=int, default=0, help="of weights and noise")
    add("--out", type=Path, default=Path("out/theory"), help="folder for the JSON and the picture")
    args, began = parser.parse_args(argv), time.time()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rae = load_rae(args.rae, device)
    side, n = rae.output_size, rae.token_dim
    data = open_val(None, args.data, side) or open_data(args.data, side)
    found = (data[i, 0] for i in range(len(data)))                     # None: a file that is broken
    pictures = islice((item[0] for item in found if item), max(args.images))
    images = torch.stack(list(pictures)).to(device) / 255
    z = rae.encode(images)                                             # (K, N, n)
    widths = args.widths or [32 * round(n * share / 32) for share in (1 / 3, 2 / 3, 1, 4 / 3, 2)]
    narrow = [w for w in widths if w < n]
    sizes = [(w, args.depth, "v") for w in widths] + [(w, 2 * args.depth, "v") for w in narrow[-1:]]
    sizes += [(w, args.depth, "x") for w in narrow]
    jobs = [dict(images=k, width=w, depth=depth, predict=predict, z=z[:k], seed=args.seed, steps=args.steps,
                 lr=args.lr) for k in args.images for w, depth, predict in sorted(sizes, reverse=True)]
    with mp.get_context(START).Pool(min(2, os.cpu_count()), torch.set_num_threads, (1,)) as pool:
        found = pool.imap_unordered(run, jobs) if device == "cpu" else map(run, jobs)
        runs = list(tqdm(found, "models", len(jobs), disable=None))
    runs.sort(key=lambda r: (args.images.index(r["images"]), r["predict"], r["width"], r["depth"]))
    print(f"{rae.name}: {z.shape[1]} tokens of n = {n} channels\n"
          "pictures width depth gives  (n-d)/n   floor    loss      SE      in     out  sample's error")
    for r in runs:
        allow = ALLOW * (1 if r["predict"] == "v" else WEIGHT)
        high = r["floor"] + (allow if r["images"] == 1 else float("inf"))
        r["passed"] = holds(r["loss"], r["floor"], high, r["se"]) and not r["violated"]
        numbers = "".join(f"{r[key]:8.4f}" for key in ("naive", "floor", "loss", "se", "in", "out", "error"))
        which = "{images:8d} {width:5d} {depth:5d} {predict:>5s}".format(**r)
        print(which, numbers, VERDICTS[r["passed"], False])
    args.out.mkdir(parents=True, exist_ok=True)
    shown = [x for k in args.images                                    # a row per series
             for x in [z[:1]] + [r.pop("sample")[:1] for r in runs if r["images"] == k]]
    picture = F.interpolate(rae.decode(torch.cat(shown)).clamp(0, 1), scale_factor=max(1, 96 // side))
    save_image(picture, args.out / "theory_overfit.png", nrow=len(sizes) + 1)
    (args.out / "theory_overfit.json").write_text(json.dumps({"encoder": rae.name, "runs": runs}))
    print(f"{time.time() - began:.0f} s; {args.out}/theory_overfit.png: a latent, then samples as listed")
    return not all(r["passed"] for r in runs)


if __name__ == "__main__":
    sys.exit(main())

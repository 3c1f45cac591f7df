"""The README's tables and pictures: the quickstart, the paper's ablations in small, guidance; all on shapes.

    python assets/figures.py quickstart    # pictures and curves of the README's quickstart, after running it
    python assets/figures.py cifar10       # pictures of the README's CIFAR-10 run, after it
    python assets/figures.py stage1        # noise, GAN, learning rate, LPIPS: trains 8 decoders
    python assets/figures.py stage2        # width, head, shift: trains 9 DiTs; then tau, after stage1
    python assets/figures.py guidance      # the bundled demo under guidance, and best of N

An ablation's rows are one command with one flag changed; its runs stay under out/ablations, so that a second
start goes on. Pictures go to assets/ (curves need matplotlib).
"""
import json
import subprocess
import sys
from pathlib import Path

import torch
from make_demo import ROOT, parts, pooled, train_judge
from torchvision.io import read_image
from torchvision.utils import save_image

from fid import frechet_distance, moments, precision_recall
from rae import Shapes, best_dtype, load_rae, mix, start
from sample import fit_to, generate
from train_dit import load_dit

OUT = ROOT / "out/ablations"
STAGE1 = {  # name: flags; 1 epoch each, at half the recipe's learning rate
    "tau 0.5": "", "tau 0": "--tau 0", "tau 0.3": "--tau 0.3", "tau 0.8": "--tau 0.8",
    "GAN on": "--gan-weight 0.75 --disc-start 0.25 --gan-start 0.5",
    "learning rate / 3": "--lr 1e-3", "learning rate x 2": "--lr 6e-3",
    "LPIPS, random VGG (mechanics only), 0.05 epochs": "--epochs 0.05 --lpips-weight 1 --lpips-vgg random"}
STAGE2 = {  # name: flags; 3 epochs each
    "192 x 4 + head 256 x 2 (recipe)": "", "recipe, seed 1": "--seed 1",
    "192 x 8, no head, about the same size": "--depth 8 --head 0",
    "64 x 4, no head: below the 96 channels of a token": "--width 64 --depth 4 --heads 4 --head 0",
    "96 x 4, no head: at it": "--width 96 --depth 4 --heads 6 --head 0",
    "64 x 4 + head 256 x 2": "--width 64 --depth 4 --heads 4",
    "recipe, no shift (alpha 1)": "--no-shift",
    "recipe, the paper's base (alpha 0.61)": "--shift-base 4096",
    "recipe, t uniform before the shift": "--time uniform"}


def folder_of(name):
    return OUT / "".join(c if c.isalnum() else "_" for c in name)


def run(name, *command):
    """Train under out/ablations/NAME, unless that has been done; the folder."""
    subprocess.run([sys.executable, *command, "--run", folder_of(name)], cwd=ROOT, check=True)
    return folder_of(name)


def curves():
    """matplotlib's pyplot, or the end."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("curves need matplotlib: pip install matplotlib")
    return plt


def stack(folder, *names):
    """Pictures that training left in a run's folder, one above the other: (3, H, W) in [0, 1]."""
    rows = [read_image(str(folder / f"samples/{name}.png")).float() / 255 for name in names]
    gap = torch.ones(3, 6, rows[0].shape[2])
    return torch.cat([x for row in rows for x in (row, gap)][:-1], 1)


def quickstart(folder=ROOT / "out/tiny"):
    """What one sees on the way: reconstructions, then samples, and the losses of both stages."""
    save_image(stack(folder, "decoder_0000500", "decoder_0001563", "0000500", "0001000", "0001954"),
               ROOT / "assets/quickstart.png")
    figure, axes = curves().subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    for stage, title, axis in zip((1, 2), ("stage 1, L1", "stage 2, flow matching"), axes):
        axis.plot(*zip(*((x["step"], x["loss"]) for x in lines if x["stage"] == stage and "loss" in x)))
        axis.set(xlabel="step", title=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(ROOT / "assets/quickstart_loss.png", dpi=90)


def cifar10(folder=ROOT / "out/cifar10"):
    *_, decoder = sorted(path.stem for path in folder.glob("samples/decoder_*"))
    *_, last = sorted(path.stem for path in folder.glob("samples/0*"))
    save_image(stack(folder, decoder, last), ROOT / "assets/cifar10.png")


def stage1():
    base = "train_decoder.py --encoder tiny --epochs 1 --lr 3e-3"
    runs = {name: run(name, *base.split(), *flags.split()) for name, flags in STAGE1.items()}
    print("| decoder | PSNR | SSIM | PSNR, noise 0.1 | 0.2 | 0.4 | n |\n|---|---|---|---|---|---|---|")
    for name, folder in runs.items():
        last = [json.loads(line) for line in open(folder / "log.jsonl") if '"psnr"' in line][-1]
        noisy = " | ".join(f"{last[f'psnr@{sigma}']:.2f}" for sigma in (0.1, 0.2, 0.4))
        print(f"| {name} | {last['psnr']:.2f} | {last['ssim']:.3f} | {noisy} | {last['n']} |")


class Score:
    """Of samples: the share that a classifier recognises; FD, precision, recall in `tiny`'s mean tokens."""
    columns = "recognised | FD | precision | recall | evaluations per image |"

    def __init__(self, num):
        self.data, self.y = Shapes(), torch.arange(num) % 10
        self.judge, self.rae = train_judge(self.data), load_rae(ROOT / "assets/demo")
        torch.set_grad_enabled(False)
        features = pooled(self.rae)
        self.real, other = (features(self.data.render(torch.arange(first, first + 10_000))[0] / 255)
                            for first in (50_000, 0))
        print(f"real images, n = 10,000: FD {frechet_distance(*moments(other), *moments(self.real)):.3f}")

    def __call__(self, model, rae=None, **options):
        seen, rae = {"model": 0, "weak": 0}, rae or self.rae
        for name, module in (("model", model), ("weak", options.get("weak"))):
            if module:                                                        # counts what a model evaluates
                def count(_, inputs, name=name):
                    seen[name] += len(inputs[0])
                module._forward_pre_hooks.clear()
                module.register_forward_pre_hook(count)
        dtype = best_dtype(self.y.device)
        draw = lambda y, i: generate(model, rae, y, mix(0, 0, i), model.alpha, 25, dtype=dtype, **options)
        fake = parts(draw, self.y, torch.arange(len(self.y)))
        features = pooled(self.rae)(fake)
        hits = (parts(self.judge, fake).argmax(1) == self.y).double().mean().item()
        fd = frechet_distance(*moments(features), *moments(self.real))
        precision, recall = precision_recall(self.real[:len(self.y)], features)
        calls = " + ".join(f"{count / len(self.y):g}" for count in seen.values() if count)
        return fd, f"{hits:.1%} | {fd:.3f} | {precision:.2f} | {recall:.2f} | {calls} |", fake


def stage2(num=1000):
    base = "train_dit.py --rae assets/demo/rae.pt --epochs 3 --decay-end 3 --ema 0.9975"
    runs = {name: run(name, *base.split(), *flags.split()) for name, flags in STAGE2.items()}
    score, pictures = Score(num), []
    print(f"| model | parameters | {Score.columns}\n|---|---|---|---|---|---|---|")
    for name, folder in runs.items():
        _, row, fake = score(model := load_dit(folder))
        pictures.append(fake[:20])
        print(f"| {name} | {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M | {row}", flush=True)
    for what, dit in ("recipe", runs[list(STAGE2)[0]]), ("weak", ROOT / "assets/demo/weak.pt"):
        for name in list(STAGE1)[:4]:                                      # tau: the same DiT, other decoders
            _, row, _ = score(load_dit(dit), load_rae(folder_of(name)))
            print(f"| {what}, decoder of stage 1, {name} | | {row}", flush=True)
    save_image(torch.cat(pictures), ROOT / "assets/ablations.png", nrow=20)


def guidance(num=2000):
    plt = curves()
    model, weak, score = load_dit(ROOT / "assets/demo"), load_dit(ROOT / "assets/demo/weak.pt"), Score(num)
    probe = fit_to(score.rae, "shapes", [0], torch.device("cpu"))
    ways = {"none": ([1], {}), "classifier-free": ([1.5, 2, 3], {}),
            "classifier-free in [0.1, 0.8]": ([1.5, 2, 3], dict(interval=(0.1, 0.8))),
            "AutoGuidance": ([1.5, 2, 3], dict(weak=weak))}
    print(f"| guidance | scale | {Score.columns}\n|---|---|---|---|---|---|---|")
    found = {}
    for name, (scales, options) in ways.items():
        for scale in scales:
            fd, row, _ = score(model, scale=scale, **options)
            found.setdefault(name, []).append((scale, fd))
            print(f"| {name} | {scale} | {row}", flush=True)
    best = dict(probe=probe, best_of=4)
    for name, net, options in (("none, best of 4", model, best), ("the weak model alone", weak, {}),
                               ("the weak model, best of 4", weak, best)):
        print(f"| {name} | 1 | {score(net, **options)[1]}", flush=True)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, points in found.items():
        if name != "none":                                                    # all start from scale 1
            axes.plot(*zip(*found["none"], *points), "o-", label=name)
    axes.set(xlabel="guidance scale", ylabel="FD, mean tokens of tiny", title=f"demo, n = {num}, 25 steps")
    axes.legend()
    figure.savefig(ROOT / "assets/guidance.png", dpi=110)


if __name__ == "__main__":
    known = dict(quickstart=quickstart, cifar10=cifar10, stage1=stage1, stage2=stage2, guidance=guidance)
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        sys.exit(__doc__)
    start(), torch.manual_seed(0)
    known[sys.argv[1]]()

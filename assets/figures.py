"""The README's tables and pictures: the quickstart, the paper's ablations in small, guidance; on shapes, and
one comparison on photographs.

    python assets/figures.py quickstart    # pictures and curves of the README's quickstart, after running it
    python assets/figures.py cifar10       # pictures of the README's CIFAR-10 run, after it
    python assets/figures.py stage1        # noise, GAN, learning rate, LPIPS: trains 8 decoders
    python assets/figures.py stage2        # width, head, shift: trains 9 DiTs; then tau, after stage1
    python assets/figures.py latents       # RAE, VAE and pixels: one DiT^DH on each, by steps: trains 28 DiTs
    python assets/figures.py photographs [cifar10]   # the same three on CIFAR-10, in that folder
    python assets/figures.py guidance      # the bundled demo under guidance, and best of N
    python assets/figures.py beyond        # x-prediction and base heads: trains 44 DiTs

An ablation's rows are one command with one thing changed; its runs stay under out/ablations, so that a second
start goes on. Pictures go to assets/ (curves need matplotlib). Where there is a C++ compiler, `--compile` after the
name makes training faster.
"""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from make_demo import (ROOT, classifier, draw, parts, pooled, pretrain_ssl, pretrain_vae, train_judge)
from torchvision.io import read_image
from torchvision.utils import make_grid, save_image

from assets.shapes import Shapes
from assets.probe import fit_latent_probe, linear_probe
from fid import frechet_distance, moments, precision_recall
from rae import Folder, load_rae, psnr, start
from train_dit import load_dit, shift_alpha

OUT = ROOT / "out/ablations"

# The paper's ablations, each row a change of one thing in the first one's command
STAGE1 = {  # name: flags; 1 epoch each, at half the recipe's learning rate
    "tau 0.5": "",
    "tau 0": "--tau 0",
    "tau 0.3": "--tau 0.3",
    "tau 0.8": "--tau 0.8",
    "GAN on": "--gan-weight 0.75 --disc-start 0.25 --gan-start 0.5",
    "learning rate / 3": "--lr 1e-3",
    "learning rate x 2": "--lr 6e-3",
    "LPIPS, random VGG (mechanics only), 0.05 epochs": "--epochs 0.05 --lpips-weight 1 --lpips-vgg random",
}
STAGE2 = {  # name: flags; 3 epochs each
    "192 x 4 + head 256 x 2 (recipe)": "",
    "recipe, seed 1": "--seed 1",
    "192 x 8, no head, about the same size": "--depth 8 --head 0",
    "64 x 4, no head: below the 96 channels of a token": "--width 64 --depth 4 --heads 4 --head 0",
    "96 x 4, no head: at it": "--width 96 --depth 4 --heads 6 --head 0",
    "64 x 4 + head 256 x 2": "--width 64 --depth 4 --heads 4",
    "recipe, no shift (alpha 1)": "--no-shift",
    "recipe, the paper's base (alpha 0.61)": "--shift-base 4096",
    "recipe, t uniform before the shift": "--time uniform",
}
BEYOND = {  # name: flags; the quickstart's 1,954 steps each, with v-prediction and with x-prediction
    "64 x 4, no head": "--width 64 --depth 4 --heads 4 --head 0",
    "64 x 4 + head 256 x 2": "--width 64 --depth 4 --heads 4",
    "96 x 4, no head": "--width 96 --depth 4 --heads 6 --head 0",
    "96 x 4 + head 256 x 2": "--width 96 --depth 4 --heads 6",
    "192 x 8, no head": "--depth 8 --head 0",
    "192 x 4 + head 256 x 2 (recipe)": "",
    "recipe, base head 2": "--base-head 2",
}
BEYOND = {name + ending: flags + more for name, flags in BEYOND.items()
          for ending, more in (("", ""), (", x", " --predict x"))}
DEPTHS = {f"recipe, base head {k}": f"--base-head {k}" for k in (1, 3)}  # one seed each


# Runs and pictures

def folder_of(name):
    return OUT / "".join(c if c.isalnum() else "_" for c in name)


def run(name, *command):
    """Train under out/ablations/NAME, unless that has been done; the folder."""
    compiled = [word for word in sys.argv if word == "--compile"]
    subprocess.run([sys.executable, *command, *compiled, "--run", folder_of(name)], cwd=ROOT, check=True)
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


def columns_of(lines, stage):
    """(steps, losses) of a stage's training lines."""
    kept = [line for line in lines if line["stage"] == stage and "loss" in line]
    return [line["step"] for line in kept], [line["loss"] for line in kept]


def quickstart(folder=ROOT / "out/tiny"):
    """What one sees on the way: reconstructions, then samples, and the losses of both stages."""
    pictures = stack(folder, "decoder_0000500", "decoder_0001563", "0000500", "0001000", "0001954")
    save_image(pictures, ROOT / "assets/quickstart.png")

    figure, axes = curves().subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    for stage, title, axis in zip((1, 2), ("stage 1, L1", "stage 2, flow matching"), axes):
        axis.plot(*columns_of(lines, stage))
        axis.set(xlabel="step", title=title, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(ROOT / "assets/quickstart_loss.png", dpi=90)


def cifar10(folder=ROOT / "out/cifar10"):
    """The last reconstructions, and the last samples below them."""
    *_, decoder = sorted(path.stem for path in folder.glob("samples/decoder_*"))
    *_, last = sorted(path.stem for path in folder.glob("samples/0*"))
    save_image(stack(folder, decoder, last), ROOT / "assets/cifar10.png")


# Tables

def stage1():
    """The decoders, each by what its own training logged last."""
    base = "train_decoder.py --encoder tiny --epochs 1 --lr 3e-3"
    runs = {name: run(name, *base.split(), *flags.split()) for name, flags in STAGE1.items()}
    print("| decoder | PSNR | SSIM | PSNR, noise 0.1 | 0.2 | 0.4 | n |\n|---|---|---|---|---|---|---|")
    for name, folder in runs.items():
        # The log's last evaluation is that of the finished decoder
        last = [json.loads(line) for line in open(folder / "log.jsonl") if '"psnr"' in line][-1]
        noisy = " | ".join(f"{last[f'psnr@{sigma}']:.2f}" for sigma in (0.1, 0.2, 0.4))
        print(f"| {name} | {last['psnr']:.2f} | {last['ssim']:.3f} | {noisy} | {last['n']} |")


def with_range(values, form):
    """The mean, with the least and the largest where there are several."""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


class Score:
    """Of samples: the share that a classifier recognises; FD, precision, recall in `tiny`'s mean tokens."""
    columns = "recognised | FD | precision | recall | evaluations per image |"

    def __init__(self, num):
        self.data = Shapes()
        self.y = torch.arange(num) % 10
        self.judge = train_judge(classifier())
        self.rae = load_rae(ROOT / "assets/demo")
        torch.set_grad_enabled(False)
        self.real = self.features(50_000)                   # held-out images, then ones trained on
        fd = frechet_distance(*moments(self.features(0)), *moments(self.real))
        print(f"real images, n = 10,000: FD {fd:.3f}")

    def features(self, first, count=10_000):
        """Mean tokens (count, D) of the data set's images from `first` on."""
        images, _ = self.data.render(torch.arange(first, first + count))
        return pooled(self.rae)(images / 255)

    def __call__(self, model, rae=None, **options):
        """{recognised, fd, precision, recall, calls, images: the first 20} of a model under guidance."""
        # What each model evaluates is counted where it happens
        seen = {"model": 0, "weak": 0}
        for name, module in (("model", model), ("weak", options.get("weak"))):
            if isinstance(module, torch.nn.Module):  # not "self", which is the same pass
                def count(_, inputs, name=name):
                    seen[name] += len(inputs[0])
                module._forward_pre_hooks.clear()
                module.register_forward_pre_hook(count)

        def sample(labels, indices):
            return draw(model, rae or self.rae, labels, indices, 25, **options)

        # Compared with held-out images, in the encoder's own features
        fake = parts(sample, self.y, torch.arange(len(self.y)))
        features = pooled(self.rae)(fake)
        hits = (parts(self.judge, fake).argmax(1) == self.y).double().mean().item()
        fd = frechet_distance(*moments(features), *moments(self.real))
        precision, recall = precision_recall(self.real[:len(self.y)], features)
        calls = " + ".join(f"{count / len(self.y):g}" for count in seen.values() if count)
        return dict(recognised=hits, fd=fd, precision=precision, recall=recall, calls=calls, images=fake[:20])

    @staticmethod
    def row(*found):
        """The cells of a table, of one score or of those of several seeds."""
        forms = dict(recognised="{:.1%}", fd="{:.3f}", precision="{:.2f}", recall="{:.2f}")
        cells = [with_range([score[key] for score in found], form) for key, form in forms.items()]
        return " | ".join((*cells, found[0]["calls"])) + " |"


def stage2(num=1000):
    """The DiTs; then tau: the same DiT with other decoders."""
    base = "train_dit.py --rae assets/demo/rae.pt --epochs 3 --ema 0.9975"
    runs = {name: run(name, *base.split(), *flags.split()) for name, flags in STAGE2.items()}
    score = Score(num)
    pictures = []
    print(f"| model | parameters | {Score.columns}\n|---|---|---|---|---|---|---|")
    for name, folder in runs.items():
        model = load_dit(folder)
        found = score(model)
        pictures.append(found["images"])
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"| {name} | {size:.1f} M | {score.row(found)}", flush=True)

    # Does a decoder that was trained with noise make better pictures of a DiT's latents?
    recipe = runs[list(STAGE2)[0]]
    for what, dit in (("recipe", recipe), ("weak", ROOT / "assets/demo/weak.pt")):
        for name in list(STAGE1)[:4]:
            found = score(load_dit(dit), load_rae(folder_of(name)))
            print(f"| {what}, decoder of stage 1, {name} | | {score.row(found)}", flush=True)
    save_image(torch.cat(pictures), ROOT / "assets/ablations.png", nrow=20)


def guidance(num=2000):
    """The demo under guidance, by scale; and best of 4 latents, without."""
    plt = curves()
    model = load_dit(ROOT / "assets/demo")
    weak = load_dit(ROOT / "assets/demo/weak.pt")
    score = Score(num)
    probe = fit_latent_probe(score.rae, "shapes", 10)
    ways = {
        "none":                          ([1],         {}),
        "classifier-free":               ([1.5, 2, 3], {}),
        "classifier-free in [0.1, 0.8]": ([1.5, 2, 3], dict(interval=(0.1, 0.8))),
        "AutoGuidance":                  ([1.5, 2, 3], dict(weak=weak)),
    }
    print(f"| guidance | scale | {Score.columns}\n|---|---|---|---|---|---|---|")
    found = {name: [] for name in ways}
    for name, (scales, options) in ways.items():
        for scale in scales:
            scores = score(model, scale=scale, **options)
            found[name].append((scale, scores["fd"]))
            print(f"| {name} | {scale} | {score.row(scores)}", flush=True)
    # Latents are representations: a probe picks the best of 4 before any is decoded
    best = dict(probe=probe, n=4)
    for name, net, options in (("none, best of 4", model, best), ("the weak model alone", weak, {}),
                               ("the weak model, best of 4", weak, best)):
        print(f"| {name} | 1 | {score.row(score(net, **options))}", flush=True)

    # The curves all start from scale 1
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, points in found.items():
        if name != "none":
            axes.plot(*zip(*found["none"], *points), "o-", label=name)
    axes.set(xlabel="guidance scale", ylabel="FD, mean tokens of tiny", title=f"demo, n = {num}, 25 steps")
    axes.legend()
    figure.savefig(ROOT / "assets/guidance.png", dpi=110)


# The paper's headline: the same DiT^DH on an encoder's latents, on a VAE's, on pixels
LATENTS = {"RAE": "tiny_ssl", "tiny (saw labels)": "tiny", "VAE": "tiny_vae", "pixels": "tiny_pixel"}
MARKS = (250, 500, 1000, 1954)      # steps after which a run is judged
BASES = (680, 170, 42.5)            # of the shift: alpha is half, once and twice that of the recipe
NARROW = {  # a backbone narrower than a token of 96 channels, wider than one of 16; steps take as long
    "DiT": "--width 64 --depth 12 --heads 4 --head 0",
    "DiT^DH": "--width 64 --depth 4 --heads 4",
}


class Judge(Score):
    """Of samples: the share recognised, and FD in two spaces: what the classifier sees before its last layer,
    which is a space of none of the latents, and `tiny`'s mean tokens."""
    def __init__(self, num):
        super().__init__(num)
        self.spaces = {"fd": lambda x: parts(self.judge[:-1], x), "fd_tiny": pooled(self.rae)}
        self.held_out, self.labels = self.images(50_000)
        self.moments = {name: moments(f(self.held_out)) for name, f in self.spaces.items()}

    def images(self, first, count=10_000):
        images, labels = self.data.render(torch.arange(first, first + count))
        return images / 255, labels

    def __call__(self, model, rae):
        """{recognised, fd, fd_tiny, images: the first 20} of a model's samples, noise i for label i % 10."""
        def sample(labels, indices):
            return draw(model, rae, labels, indices, 25).clamp(0, 1)

        fake = parts(sample, self.y, torch.arange(len(self.y)))
        hits = parts(self.judge, fake).argmax(1) == self.y
        found = dict(recognised=hits.double().mean().item(), images=fake[:20].half())
        for name, f in self.spaces.items():
            found[name] = frechet_distance(*moments(f(fake)), *self.moments[name])
        return found

    def latents(self, rae):
        """PSNR of held-out reconstructions; top-1 of a linear probe, on the mean token and on all tokens."""
        copies = parts(lambda x: rae.decode(rae.encode(x)).clamp(0, 1), self.held_out)
        images, labels = self.images(0)
        found = [psnr(self.held_out, copies).mean().item()]
        for f in (pooled(rae), lambda x: parts(lambda y: rae.tokens(y).flatten(1), x)):
            found.append(linear_probe(f(images), labels, f(self.held_out), self.labels))
        return found


def judged(judge, autoencoder, what, marks, *command, script=("train_dit.py",)):
    """{step: scores} of a DiT; kept in its run's folder, so that a second start goes on."""
    scores = {}
    for step in marks:
        place = folder_of(what) / f"score_{step}.pt"
        if not place.exists():
            # So many steps of the recipe's schedule: stopped, judged, and then resumed
            run(what, *script, "--rae", autoencoder, "--steps", str(step), "--save-every", "5000", *command)
            torch.save(judge(load_dit(folder_of(what)), load_rae(autoencoder)), place)
        scores[step] = torch.load(place)
    return scores


def judged_on_shapes(judge, encoder, base, seed=0, marks=MARKS, flags=""):
    """The same of one of LATENTS, with this base of the shift."""
    what = f"latents, {encoder}, base {base}, seed {seed}" + (f", {flags}" if flags else "")
    autoencoder = folder_of(f"latents, {encoder}")
    command = f"--shift-base {base} --seed {seed} {flags}"
    return judged(judge, autoencoder, what, marks, *command.split())


def steps_to(value, values):
    """The step at which a run, {step: value, the higher the better}, reached this value, between two marks by a
    straight line in log steps; infinity if it never did."""
    if value > max(values.values()):
        return math.inf
    best = np.maximum.accumulate([*values.values()])  # so far
    return math.exp(np.interp(value, best, [math.log(step) for step in values]))


def latents(num=1000, seeds=3):
    """RAE, VAE and pixels: the decoders, then their DiT^DHs by steps, a curve, and samples."""
    curves()  # here, not after an hour
    for encoder in LATENTS.values():
        run(f"latents, {encoder}", "train_decoder.py", "--encoder", encoder, "--save-every", "5000")
    judge = Judge(num)

    # Each latent's own shift, by what is recognised after 500 steps; before them nothing is, and FD rewards
    # colours without a shape
    best = {}
    print("| latents | tokens x channels | PSNR | probe, mean token | probe, all tokens |"
          f" recognised after {MARKS[1]} steps, by alpha |\n|---|---|---|---|---|---|")
    for name, encoder in LATENTS.items():
        rae = load_rae(folder_of(f"latents, {encoder}"))
        found = {}
        for base in BASES:
            scores = judged_on_shapes(judge, encoder, base, marks=MARKS[:2])
            found[base] = scores[MARKS[1]]["recognised"]
        best[name] = max(found, key=found.get)
        tried = ", ".join(f"{shift_alpha(rae.num_tokens, rae.token_dim, base):.2f}: {share:.1%}"
                          for base, share in found.items())
        quality, mean_token, all_tokens = judge.latents(rae)
        print(f"| {name} | {rae.num_tokens} x {rae.token_dim} | {quality:.2f} dB | {mean_token:.1%} |"
              f" {all_tokens:.1%} | {tried} |", flush=True)

    runs = {name: [judged_on_shapes(judge, encoder, best[name], seed) for seed in range(seeds)]
            for name, encoder in LATENTS.items()}
    compare(runs)

    # The paper's Table 10: a head pays where a token has more channels than the backbone is wide
    print("| latents | model | recognised | FD, classifier | FD, tiny |\n|---|---|---|---|---|")
    mark = MARKS[2]
    for name, its_seeds in (("RAE", seeds), ("VAE", 1)):
        for what, flags in NARROW.items():
            found = [judged_on_shapes(judge, LATENTS[name], best[name], seed, (mark,), flags)
                     for seed in range(its_seeds)]
            print(f"| {name} | {what}, {flags} | {row_of(found, mark)} |", flush=True)

    # The shift was chosen by what comes first; a smaller one is slower, and may end better
    print(f"| latents, base {BASES[0]} | steps | recognised | FD, classifier | FD, tiny |\n|---|---|---|---|---|")
    for name in ("RAE", "VAE", "pixels"):
        found = [judged_on_shapes(judge, LATENTS[name], BASES[0])]
        for step in MARKS:
            print(f"| {name} | {step:,} | {row_of(found, step)} |", flush=True)


def row_of(found, step):
    """The cells of a table: the scores of all seeds after so many steps."""
    return " | ".join(with_range([scores[step][key] for scores in found], form)
                      for key, form in (("recognised", "{:.1%}"), ("fd", "{:.0f}"), ("fd_tiny", "{:.2f}")))


def sooner(reached, last):
    """How many times before `last` something was reached, of each seed's step or infinity, in words."""
    ratios = [last / step for step in reached if step < math.inf]
    if not ratios:
        return f"no seed of {len(reached)} reaches sooner"
    return f"{len(ratios)} of {len(reached)} seeds reach {with_range(ratios, '{:.2f}')} times sooner"


def compare(runs):
    """Table, speed-up, curve and samples of {latents: [scores of each seed]}."""
    print("| latents | steps | recognised | FD, classifier | FD, tiny |\n|---|---|---|---|---|")
    for name, found in runs.items():
        for step in MARKS:
            print(f"| {name} | {step:,} | {row_of(found, step)} |")

    def better(scores):
        """FDs on a logarithmic scale, the higher the better."""
        return {step: -math.log(score["fd"]) for step, score in scores.items()}

    last = MARKS[-1]
    for fast in ("RAE", "tiny (saw labels)"):
        for slow in ("VAE", "pixels"):
            reached = [steps_to(better(other)[last], better(one)) for one, other in zip(runs[fast], runs[slow])]
            print(f"{fast}: {sooner(reached, last)} than {slow} the FD that it has after {last:,} steps")

    # Quality against steps, a line for each latent, its seeds as a band
    figure, axes = curves().subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for key, axis in zip(("recognised", "fd"), axes):
        for name, found in runs.items():
            values = torch.tensor([[scores[step][key] for step in MARKS] for scores in found])
            axis.plot(MARKS, values.mean(0), "o--" if "labels" in name else "o-", label=name)
            axis.fill_between(MARKS, values.amin(0), values.amax(0), alpha=0.25)
        axis.set(xscale="log", xticks=MARKS, xticklabels=MARKS, xlabel="steps of 64")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_title("samples recognised")
    axes[0].yaxis.set_major_formatter("{x:.0%}")
    ticks = (200, 500, 1000, 2000)
    axes[1].set(title="FD, features of the classifier", yscale="log", yticks=ticks, yticklabels=ticks)
    axes[1].minorticks_off()
    axes[0].legend()
    figure.savefig(ROOT / "assets/latents.png", dpi=110)

    strip([found[0] for found in runs.values()], "latents_samples.png")


def strip(runs, name):
    """assets/NAME: a block for each run's {step: scores}, a row for each step, of the same noise."""
    grids = [make_grid(torch.cat([score["images"].float() for score in scores.values()]), nrow=20)
             for scores in runs]
    save_image(grids, ROOT / "assets" / name, nrow=1, padding=6, pad_value=1)


# The same on photographs

PHOTOGRAPHS = {  # latents: (encoder, how it is pretrained, steps of 128: as many as take as long)
    "RAE": ("tiny_ssl", pretrain_ssl, 4000),
    "VAE": ("tiny_vae", pretrain_vae, 3200),
    "pixels": ("tiny_pixel", None, 0),
}
PHOTO_MARKS = (500, 1000, 2000, 4000)
PHOTO_DIT = "--epochs 5.23 --ema 0.998"  # 4,000 steps of 64
PHOTO_NARROW = {  # backbones below the 192 channels of a patch, and below the 96 of a token of RAE
    "pixels": {"DiT": "--width 128 --depth 12 --heads 4 --head 0",
               "DiT^DH": "--width 128 --depth 4 --heads 4"},
    "RAE": NARROW,
}


class Photographs(Judge):
    """CIFAR-10, in memory, and a judge that has its labels. FD is taken in what this classifier sees before
    its last layer, against 10,000 pictures that it has not learned from."""
    def __init__(self, folder, num):
        train = Folder(folder / "train", 32)
        held_out = Folder(folder / "val", 32)
        if train.classes != held_out.classes or len(train.classes) != 10:
            sys.exit(f"{folder}/train and {folder}/val must have the ten classes of CIFAR-10")
        self.pictures, self.all_labels = self.load(train)
        held_out, self.labels = self.load(held_out)
        self.held_out = held_out / 255
        self.y = torch.arange(num) % 10
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        self.reference, self.learned = order.split([10_000, len(train) - 10_000])

    @staticmethod
    def load(dataset):
        """All images of a folder, uint8 (n,3,32,32), and their labels (n,)."""
        images, labels, _ = zip(*(dataset[i, 0] for i in range(len(dataset))))
        return torch.stack(images), torch.tensor(labels)

    def some(self, count):
        """What an encoder is pretrained on: `count` pictures, half of them mirrored, without labels."""
        images = self.pictures[torch.randint(len(self.pictures), (count,))]
        mirrored = torch.rand(count, 1, 1, 1) < 0.5
        return torch.where(mirrored, images.flip(3), images)

    def labelled(self, count):
        """What the classifier learns from, each batch moved by up to 4 pixels."""
        chosen = self.learned[torch.randint(len(self.learned), (count,))]
        top, left = torch.randint(9, (2,)).tolist()
        images = torch.nn.functional.pad(self.pictures[chosen].float(), (4, 4, 4, 4), "reflect")
        images = images[:, :, top:top + 32, left:left + 32]
        mirrored = torch.rand(count, 1, 1, 1) < 0.5
        return torch.where(mirrored, images.flip(3), images), self.all_labels[chosen]

    def images(self, first, count=10_000):
        """For linear probes: pictures (count,3,32,32) in [0, 1], and labels."""
        chosen = self.learned[first:first + count]
        return self.pictures[chosen] / 255, self.all_labels[chosen]

    def prepare(self):
        """The classifier, which is kept under out/, and the statistics that FD compares with."""
        place = OUT / "photographs, classifier.pt"
        self.judge = classifier((32, 64, 128))
        if not place.exists():
            torch.manual_seed(0)
            # Without a cache: it would keep the weights of the first step until the context ends
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                train_judge(self.judge, self.labelled, 3000)
            torch.save(self.judge.state_dict(), place)
        self.judge.load_state_dict(torch.load(place))
        self.judge.eval()
        torch.set_grad_enabled(False)
        self.spaces = {"fd": lambda x: parts(self.judge[:-1], x)}
        self.moments = {"fd": moments(self.spaces["fd"](self.pictures[self.reference] / 255))}
        right = (parts(self.judge, self.held_out).argmax(1) == self.labels).double().mean().item()
        if right < 0.5:
            sys.exit(f"the classifier is right on {right:.1%} of the held-out pictures: no figure could be trusted")
        return right

    def fd(self, images):
        """FD of images (B,3,32,32) in [0, 1]."""
        return frechet_distance(*moments(self.spaces["fd"](images)), *self.moments["fd"])


def photograph_autoencoders(judge, folder):
    """{latents: run folder}: encoders that see the pictures and no label; decoders, all by one command."""
    command = "--lr 3e-3 --epochs 3 --save-every 5000"
    runs = {}
    for name, (encoder, pretrain, steps) in PHOTOGRAPHS.items():
        given = []
        if pretrain:
            weights = OUT / f"photographs, {encoder}.pt"
            if not weights.exists():
                torch.manual_seed(0)
                OUT.mkdir(parents=True, exist_ok=True)
                torch.save(pretrain(judge.some, steps).state_dict(), weights)
            given = ["--encoder-weights", weights]
        runs[name] = run(f"photographs, {encoder}", "train_decoder.py", "--encoder", encoder, *given,
                         "--data", folder, *command.split())
    return runs


def photograph_quality(judge, autoencoders):
    """The table of what remains of held-out pictures in each of the latents; {latents: FD of copies}."""
    print("| latents | tokens x channels | PSNR | FD of reconstructions | probe, mean token |"
          " probe, all tokens |\n|---|---|---|---|---|---|")
    floors = {}
    for name, autoencoder in autoencoders.items():
        rae = load_rae(autoencoder)
        copies = parts(lambda x: rae.decode(rae.encode(x)).clamp(0, 1), judge.held_out)
        floors[name] = judge.fd(copies)
        quality, mean_token, all_tokens = judge.latents(rae)
        print(f"| {name} | {rae.num_tokens} x {rae.token_dim} | {quality:.2f} dB | {floors[name]:.1f} |"
              f" {mean_token:.1%} | {all_tokens:.1%} |", flush=True)
    return floors


def photographs(folder="cifar10", num=1000):
    """Encoders and decoders on CIFAR-10; the judge; then their DiT^DHs by steps, a curve, and samples."""
    curves()  # here, not after an hour
    folder = Path(folder).resolve()
    if not (folder / "val").is_dir():
        sys.exit(f"{folder}/val is not there: assets/README.md says how to make CIFAR-10's folders")
    judge = Photographs(folder, num)
    autoencoders = photograph_autoencoders(judge, folder)
    print(f"classifier: {judge.prepare():.1%} of {len(judge.held_out):,} held-out pictures right;"
          f" FD of these pictures {judge.fd(judge.held_out):.1f}")
    floors = photograph_quality(judge, autoencoders)

    def trained(name, base, marks, flags=""):
        what = f"photographs, {name}, base {base}" + (f", {flags}" if flags else "")
        command = f"{PHOTO_DIT} --shift-base {base} {flags}"
        return judged(judge, autoencoders[name], what, marks, *command.split())

    # Each latent's own shift, by FD after the first mark; one seed
    best = {}
    for name in PHOTOGRAPHS:
        found = {base: trained(name, base, PHOTO_MARKS[:1])[PHOTO_MARKS[0]]["fd"] for base in BASES}
        best[name] = min(found, key=found.get)
        tried = ", ".join(f"base {base}: {fd:.1f}" for base, fd in found.items())
        print(f"{name}, FD after {PHOTO_MARKS[0]:,} steps by shift: {tried}", flush=True)

    runs = {}
    print("| latents | steps | FD, classifier | taken for their label |\n|---|---|---|---|")
    for name in PHOTOGRAPHS:
        runs[name] = trained(name, best[name], PHOTO_MARKS)
        for step, score in runs[name].items():
            print(f"| {name} | {step:,} | {score['fd']:.1f} | {score['recognised']:.1%} |", flush=True)
    photograph_curves(runs, floors)
    strip(runs.values(), "photographs_samples.png")

    # Table 10's point again
    mark = PHOTO_MARKS[1]
    print("| latents | model | FD, classifier | taken for their label |\n|---|---|---|---|")
    for name, models in PHOTO_NARROW.items():
        for what, flags in models.items():
            found = trained(name, best[name], (mark,), flags)[mark]
            print(f"| {name} | {what}, {flags} | {found['fd']:.1f} | {found['recognised']:.1%} |", flush=True)


def photograph_curves(runs, floors):
    """FD against steps; dotted, that of the autoencoder's reconstructions of held-out pictures."""
    figure, axes = curves().subplots(figsize=(4.6, 2.9), layout="constrained")
    for number, (name, scores) in enumerate(runs.items()):
        fds = [score["fd"] for score in scores.values()]
        axes.plot(list(scores), fds, "o-", color=f"C{number}", label=name)
        axes.axhline(floors[name], color=f"C{number}", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", xticks=PHOTO_MARKS, xticklabels=PHOTO_MARKS, xlabel="steps of 64",
             title="CIFAR-10, FD in a classifier's features")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "assets/photographs.png", dpi=110)


# Beyond the paper: x-prediction, and a model that guides itself

def ways_of(model, weak):
    """(guidance, scale, options): all that a model of BEYOND is sampled with."""
    yield "none", 1, {}
    if model.base_head:
        for scale in (1.25, 1.5, 1.78, 2.2, 3):
            yield "itself", scale, dict(weak="self")
    if model.base_head == 2:
        for interval in ((0.3, 1), (0.1, 0.8)):  # of 25 steps none is at t < 0.1
            yield f"itself in {list(interval)}", 1.78, dict(weak="self", interval=interval)
        for scale in (1.5, 2.2):
            yield "AutoGuidance", scale, dict(weak=weak)
        yield "classifier-free in [0.1, 0.8]", 1.5, dict(interval=(0.1, 0.8))


def beyond(num=1000, seeds=3):
    """x-prediction, and guidance by a base head; against the other guidances, on the same models."""
    plt = curves()
    base = "train_dit.py --rae assets/demo/rae.pt"
    runs = {}
    for name, flags in (BEYOND | DEPTHS).items():
        count = seeds if name in BEYOND else 1
        runs[name] = [run(f"beyond: {name}, seed {seed}", *f"{base} {flags} --seed {seed}".split())
                      for seed in range(count)]
    weak = load_dit(ROOT / "assets/demo/weak.pt")
    score = Score(num)
    print(f"| model | guidance | scale | {Score.columns}\n|---|---|---|---|---|---|---|---|")
    found = {}  # (model, guidance): [(scale, mean FD)]
    for name, folders in runs.items():
        models = [load_dit(folder) for folder in folders]
        for way, scale, options in ways_of(models[0], weak):
            # Kept in each run's folder, so that a second start goes on
            scores = []
            for folder, model in zip(folders, models):
                place = folder / f"score {way} {scale}.pt"
                if not place.exists():
                    torch.save(score(model, scale=scale, **options), place)
                scores.append(torch.load(place))
            fd = sum(one["fd"] for one in scores) / len(scores)
            found.setdefault((name, way), []).append((scale, fd))
            print(f"| {name} | {way} | {scale} | {score.row(*scores)}", flush=True)
    beyond_curves(plt, found, num)


def beyond_curves(plt, found, num):
    """FD against scale: a colour for each model, a line for its base head, dashes for AutoGuidance."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    guided = [name for name, way in found if way == "itself"]
    for number, name in enumerate(guided):
        colour = f"C{number}"
        start_at = found[name, "none"]
        axes.plot(*zip(*start_at, *found[name, "itself"]), "o-", color=colour, label=f"{name}: itself")
        if (name, "AutoGuidance") in found:
            points = start_at + found[name, "AutoGuidance"]
            axes.plot(*zip(*points), "s--", color=colour, lw=1, ms=4, label=f"{name}: AutoGuidance")
    for (name, way), points in found.items():
        if "(recipe)" in name:
            axes.axhline(points[0][1], color="0.6", lw=1, ls="-." if name.endswith("x") else ":",
                         label=f"{name}, unguided")
    axes.set(xlabel="guidance scale", ylabel="FD, mean tokens of tiny", title=f"n = {num}, 25 steps")
    axes.legend(fontsize=7)
    figure.savefig(ROOT / "assets/beyond.png", dpi=110)


def main():
    what, *rest = [word for word in sys.argv[1:] if word != "--compile"] or [None]
    known = dict(quickstart=quickstart, cifar10=cifar10, stage1=stage1, stage2=stage2, guidance=guidance,
                 latents=latents, photographs=photographs, beyond=beyond)
    if what not in known or len(rest) > (what == "photographs"):
        sys.exit(__doc__)
    start()
    torch.manual_seed(0)
    known[what](*rest)


if __name__ == "__main__":
    main()

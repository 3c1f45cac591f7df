"""The tables and pictures of text to image, on shapes: how well pictures show what captions say.

    python assets/captions.py prompts       # the bundled text model: obedience by scale, and the README's picture
    python assets/captions.py text          # tokens or mean, RAE or VAE, shift, head, noise, little data
    python assets/captions.py frozen MODEL  # a frozen text model, and prompts in words that no caption has

Each row of `text` is one command with one thing changed; its runs stay under out/ablations, so that a second
start goes on; `--compile` at the end makes training faster. After Scale-RAE, arXiv 2601.16208.
"""
import json
import math
import sys

import torch
from figures import MARKS, OUT, STAGE1, columns_of, curves, folder_of, judged, run, sooner, steps_to, with_range
from make_demo import (PROPERTIES, ROOT, Reader, draw, full_captions, obedience, parts, pooled, said_by,
                       text_model)
from torchvision.utils import save_image

import train_dit
from assets.shapes import Shapes
from fid import frechet_distance, moments
from rae import load_rae, start
from train_dit import DiT, load_dit, load_text

SCALES = (1, 2, 3, 4.5)
CHANGED = (  # one property after the other, from the same noise; a green star was never trained
    "a small red star at the top left on dark blue", "a small red heart at the top left on dark blue",
    "a small green star at the top left on dark blue", "a large red star at the top left on dark blue",
    "a small red star at the bottom right on dark blue", "a small red star at the top left on dark orange")
NEVER_TRAINED = (
    "a large red circle at the bottom left on dark green", "a small orange square at the top right on dark purple",
    "a large lime triangle at the bottom on dark red", "a small cyan ring at the top on dark pink",
    "a large blue plus at the left on dark lime", "a small pink crescent at the right on dark cyan")


def prompts(num=200):
    """A text model of shapes: obedience by scale, and prompts from the same noise, a row each."""
    torch.set_grad_enabled(False)
    model, rae, encode = text_model(ROOT / "assets/demo/text.pt")
    judge = Obedience(num)
    print(OBEDIENCE)
    for scale in SCALES:
        judge.table(f"scale {scale}", [judge(model, rae, scale)])

    y = encode((*CHANGED, *NEVER_TRAINED)).repeat(5, 1)
    count = len(y) // 5
    images = draw(model, rae, y, torch.arange(5).repeat_interleave(count), 50, scale=3.0)
    save_image(images, ROOT / "assets/text.png", nrow=count)


OBEDIENCE = (f"| model | pairs of class and colour | {' | '.join(PROPERTIES)} | all |\n"
             f"|{'---|' * (len(PROPERTIES) + 3)}")


class Obedience:
    """How well pictures show what captions of 11 words say: a table's rows, of pairs seen and never seen."""
    def __init__(self, num):
        torch.set_grad_enabled(False)
        self.reader = Reader(load_rae(ROOT / "assets/demo"))
        self.captions = {"seen": full_captions(num, False), "never seen": full_captions(num, True)}

    def __call__(self, model, rae, scale=3.0):
        """{pairs: shares (7,) that show each property, and all of them}."""
        encode = load_text(model, torch.device("cpu"))
        found = {}
        for pairs, captions in self.captions.items():
            shares, together, _ = obedience(model, rae, encode, self.reader, captions, scale)
            found[pairs] = torch.cat([shares, together[None]])
        return found

    def table(self, name, scores):
        """Print the rows of a model: of one score, or of those of several seeds."""
        for pairs in self.captions:
            columns = torch.stack([score[pairs] for score in scores]).T.tolist()
            cells = " | ".join(with_range(values, "{:.1%}") for values in columns)
            print(f"| {name} | {pairs} | {cells} |", flush=True)


class Both(DiT):
    """A DiT that has a caption twice: its tokens in the sequence, and the sum of them, over the root of their
    number, beside the time, in adaLN."""
    def forward(self, x_t, t, y, base=False):
        tokens, real = DiT.embed_caption(self, y)
        summed = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True).sqrt()
        hook = self.t_embedder.register_forward_hook(lambda module, inputs, output: output + summed)
        try:
            return super().forward(x_t, t, y, base)
        finally:
            hook.remove()


class Mean(Both):
    """The sum alone: the tokens are masked as if they were padding."""
    def embed_caption(self, y):
        tokens, real = super().embed_caption(y)
        return tokens, torch.zeros_like(real)


WAYS = {"tokens": DiT, "both": Both, "mean": Mean}  # how a caption enters
TEXT_RECIPE = "--text words --time uniform --shift-base 42.5"   # the shift that both latents like best
TEXT_FLAGS = {  # one seed each: the follow-up's ablations
    "no shift": "--no-shift",
    "half the shift": "--shift-base 170",
    "192 x 8, no head": "--depth 8 --head 0",
    "64 x 4 + head": "--width 64 --depth 4 --heads 4",
    "64 x 12, no head": "--width 64 --depth 12 --heads 4 --head 0",
}
EPOCHS_OF_LITTLE = (4, 16, 64, 128, 256)


def train_way(way, *command):
    """train_dit.py with another DiT: what `captions.py way` does in a process of its own."""
    train_dit.DiT = WAYS[way]
    sys.argv = ["train_dit.py", *command]
    train_dit.main()


def text_runs(judge, name, autoencoder, seed, marks, way="tokens", flags=(), decoders={}):
    """{step: score} of a text model, which is trained if it is not there; kept in its folder. decoders: others,
    by name, whose pictures are judged as well."""
    what = f"text, {name}, seed {seed}"

    def score(model, rae):
        model.__class__ = WAYS[way]
        return judge(model, rae) | {name: judge(model, load_rae(path)) for name, path in decoders.items()}

    command = *f"{TEXT_RECIPE} --seed {seed}".split(), *flags
    return judged(score, autoencoder, what, marks, *command, script=("assets/captions.py", "way", way))


def text(num=200, seeds=3):
    """Captions compared: each row is one thing changed in a text model of the quickstart's 1,954 steps."""
    curves()  # here, not after hours
    demo = ROOT / "assets/demo"
    vae = run("latents, tiny_vae", "train_decoder.py", "--encoder", "tiny_vae", "--save-every", "5000")
    judge = Obedience(num)
    last = MARKS[-1]

    # RAE and VAE by steps; the first RAE also by decoders that were trained with noise, and without
    base = "train_decoder.py --encoder tiny --epochs 1 --lr 3e-3"
    decoders = {name: run(name, *base.split(), *STAGE1[name].split()) for name in ("tau 0", "tau 0.5")}
    found = {"RAE": [], "VAE": []}
    for seed in range(seeds):
        found["RAE"].append(text_runs(judge, "RAE", demo, seed, MARKS, decoders={} if seed else decoders))
        found["VAE"].append(text_runs(judge, "VAE", vae, seed, MARKS))
    print(OBEDIENCE)
    for name, runs in found.items():
        for step in MARKS:
            judge.table(f"{name}, {step:,} steps", [scores[step] for scores in runs])
    for pairs in judge.captions:
        shares = [[{step: score[pairs][-1].item() for step, score in scores.items()} for scores in runs]
                  for runs in found.values()]
        reached = [steps_to(vae[last], rae) for rae, vae in zip(*shares)]
        print(f"RAE: {sooner(reached, last)} than the VAE the share of captions obeyed in all, {pairs}, that it has"
              f" after {last:,} steps")
    for decoder in decoders:
        for step in MARKS:
            judge.table(f"RAE, decoder with {decoder}, {step:,} steps", [found["RAE"][0][step][decoder]])
    text_curves(found)

    # How a caption enters, and how far it is guided
    for way in WAYS:
        name = "RAE" if way == "tokens" else f"RAE, {way}"
        for seed in range(seeds):
            text_runs(judge, name, demo, seed, (last,), way)
        for scale in SCALES:
            judge.table(f"{way}, scale {scale}", [scaled(judge, name, way, seed, scale) for seed in range(seeds)])

    little(judge, {"RAE": demo, "VAE": vae})

    # Shift and head
    for name, flags in TEXT_FLAGS.items():
        scores = text_runs(judge, f"RAE, {name}", demo, 0, (last,), flags=flags.split())
        judge.table(name, [scores[last]])


def scaled(judge, name, way, seed, scale):
    """The score of a finished text model under this guidance; kept in its folder."""
    folder = folder_of(f"text, {name}, seed {seed}")
    place = folder / f"scale_{scale}.pt"
    if not place.exists():
        model = load_dit(folder)
        model.__class__ = WAYS[way]
        torch.save(judge(model, load_rae(model.rae), scale), place)
    return torch.load(place)


def text_curves(found):
    """All six properties right against steps, of {latents: [scores of each seed]}."""
    figure, axes = curves().subplots(figsize=(4.6, 2.9), layout="constrained")
    for name, seeds in found.items():
        values = torch.tensor([[scores[step]["never seen"][-1] for step in MARKS] for scores in seeds])
        axes.plot(MARKS, values.mean(0), "o-", label=name)
        axes.fill_between(MARKS, values.amin(0), values.amax(0), alpha=0.25)
    axes.set(xscale="log", xticks=MARKS, xticklabels=MARKS, xlabel="steps of 64",
             title="captions obeyed in all, pairs never seen")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "assets/text_steps.png", dpi=110)


def few_drawings(count=200):
    """A folder of so many captioned drawings, none of which was trained on."""
    folder = OUT / "few captioned drawings"
    folder.mkdir(parents=True, exist_ok=True)
    data = Shapes(first=60_000, captioned=True)
    indices = torch.arange(60_000, 60_000 + 2 * count)
    held_out = data.held_out(data.uniform(indices), indices)      # pairs that stay unseen
    chosen = (indices[~held_out][:count] - data.first).tolist()
    for i, (image, caption, _) in enumerate(data.__getitems__([(index, index) for index in chosen])):
        save_image(image / 255, folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    return folder, len(chosen)


def little(judge, autoencoders):
    """A text model fine-tuned on 200 drawings, for up to 256 epochs: its loss on them, obedience to captions
    that it has not seen, FD of their pictures. The follow-up: the VAE's collapses after 64, RAE's does not."""
    folder, count = few_drawings()
    data = Shapes(first=50_000, captioned=True)
    indices = torch.arange(50_000, 51_000)
    captions = data.caption(indices, indices)
    demo = judge.reader.rae
    features = pooled(demo)
    real = moments(features(data.render(torch.arange(50_000, 60_000))[0] / 255))

    def score(model, rae):
        y = load_text(model, torch.device("cpu"))(captions)
        fake = parts(lambda y, keys: draw(model, rae, y, keys, 25, scale=3.0), y, torch.arange(len(y)))
        return judge(model, rae) | dict(fd=frechet_distance(*moments(features(fake)), *real))

    print("| latents | epochs | loss on them | all right, seen pairs | never seen | FD |\n|---|---|---|---|---|---|")
    for name, autoencoder in autoencoders.items():
        before = folder_of(f"text, {name}, seed 0")
        marks = [math.ceil(epochs * count / 64) for epochs in EPOCHS_OF_LITTLE]
        what = f"text, {name}, fine-tuned"
        command = f"{TEXT_RECIPE} --lr 1e-3 --warmup 1 --decay-start 256 --epochs 256 --log-every 10"
        more = "--init", before, "--data", folder
        scores = judged(score, autoencoder, what, marks, *more, *command.split())
        steps, losses = columns_of([json.loads(line) for line in open(folder_of(what) / "log.jsonl")], 2)
        rows = [(0, math.nan, score(load_dit(before), load_rae(autoencoder)))]
        for epochs, step in zip(EPOCHS_OF_LITTLE, marks):
            near = [loss for at, loss in zip(steps, losses) if step - 40 < at <= step]
            rows.append((epochs, sum(near) / len(near), scores[step]))
        for epochs, loss, found in rows:
            print(f"| {name} | {epochs} | {loss:.3f} | {found['seen'][-1]:.1%} | {found['never seen'][-1]:.1%} |"
                  f" {found['fd']:.2f} |", flush=True)


OTHER_WORDS = {  # what is asked for: the same in the words of the training
    "a tiny crimson star at the upper left on dark navy": "a small red star at the top left on dark blue",
    "a big emerald donut": "a large green ring",
    "a huge azure disc at the lower right": "a large blue circle at the bottom right",
    "a little violet cross on the left": "a small purple plus at the left",
    "a magenta love symbol": "a pink heart",
    "a turquoise box at the upper right": "a cyan square at the top right",
    "a giant tangerine half moon": "a large orange crescent",
    "a scarlet rhombus": "a red diamond",
}


def frozen(model_name, num=200):
    """A frozen text model of `transformers` beside `words`, of the same seed and steps."""
    demo = ROOT / "assets/demo"
    judge = Obedience(num)
    flags = "--text", model_name, "--text-length", "32"  # the last --text counts
    what = f"RAE, {model_name}"
    others = text_runs(judge, what, demo, 1, MARKS, flags=flags)
    words = text_runs(judge, "RAE", demo, 1, MARKS)
    print(OBEDIENCE)
    for name, scores in (("words", words), ("frozen", others)):
        for step in MARKS:
            judge.table(f"{name}, {step:,} steps", [scores[step]])

    # Words that no caption has: 50 pictures of each, read as what was meant
    model, rae, encode = text_model(folder_of(f"text, {what}, seed 1"))
    y = encode([asked for asked in OTHER_WORDS for _ in range(50)])
    meant = said_by([caption for caption in OTHER_WORDS.values() for _ in range(50)])
    images = parts(lambda part, keys: draw(model, rae, part, keys, 25, scale=3.0), y, torch.arange(len(y)))
    right = (judge.reader(images) == meant).view(-1, 50, 6).double().mean(1)
    print(f"| asked for | {' | '.join(PROPERTIES)} |\n|{'---|' * (len(PROPERTIES) + 1)}")
    for asked, said, shares in zip(OTHER_WORDS, meant.view(-1, 50, 6)[:, 0], right.tolist()):
        cells = " | ".join(f"{share:.0%}" if value >= 0 else "" for value, share in zip(said, shares))
        print(f"| {asked} | {cells} |")
    save_image(images.view(-1, 50, 3, 32, 32)[:, :5].transpose(0, 1).flatten(0, 1), ROOT / "assets/frozen.png",
               nrow=len(OTHER_WORDS))


def main():
    if sys.argv[1:2] == ["way"]:
        return train_way(*sys.argv[2:])
    what, *rest = [word for word in sys.argv[1:] if word != "--compile"] or [None]
    known = dict(prompts=prompts, text=text, frozen=frozen)
    if what not in known or len(rest) != (what == "frozen"):
        sys.exit(__doc__)
    start()
    torch.manual_seed(0)
    known[what](*rest)


if __name__ == "__main__":
    main()

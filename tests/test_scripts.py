"""The scripts as processes: ranks, accumulation, resuming and bad input."""
import importlib
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import DECODER, DIT, launch, losses


def load(path):
    return torch.load(path, weights_only=True)


def close(a, b, rtol=1e-4, atol=2e-4):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=atol, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("ranks, accum", [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_accumulation_change_nothing_in_stage_1(trained, tmp_path, photos, ranks, accum):
    launch("train_decoder.py", *DECODER, "--data", photos, "--steps", 4, "--accum", accum, cwd=tmp_path, ranks=ranks)
    one, many = load(trained / "out/tiny/rae.pt"), load(tmp_path / "out/tiny/rae.pt")
    torch.testing.assert_close(losses(tmp_path / "out/tiny", 1), losses(trained / "out/tiny", 1), rtol=1e-4, atol=1e-5)
    close(one["model"], many["model"]), close(one["ema"], many["ema"])
    torch.testing.assert_close(one["mean"], many["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["var"], many["var"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks, accum", [(2, 1), (1, 3)])
def test_ranks_and_accumulation_change_nothing_in_stage_2(trained, tmp_path, photos, ranks, accum):
    launch("train_dit.py", *DIT, "--data", photos, "--steps", 6, "--accum", accum, "--rae", trained / "out/tiny/rae.pt",
           "--run", tmp_path, cwd=tmp_path, ranks=ranks)
    torch.testing.assert_close(losses(tmp_path, 2), losses(trained / "out/tiny", 2), rtol=1e-4, atol=1e-5)
    one, many = load(trained / "out/tiny/dit.pt"), load(tmp_path / "dit.pt")
    close(one["model"], many["model"]), close(one["ema"], many["ema"])


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained, tmp_path, photos):
    for steps in (1, 4, 4):                                                   # 40 / 12: stopped in the middle of an epoch
        launch("train_decoder.py", *DECODER, "--data", photos, "--steps", steps, cwd=tmp_path)
    for steps in (4, 6):
        text = launch("train_dit.py", *DIT, "--data", photos, "--steps", steps, cwd=tmp_path)
    assert "steps 4 to 6" in text
    for name, stage in (("rae.pt", 1), ("dit.pt", 2)):
        one, two = load(trained / "out/tiny" / name), load(tmp_path / "out/tiny" / name)
        for part in ("model", "ema"):
            for key, value in one[part].items():
                assert torch.equal(value, two[part][key]), f"{name} {part} {key}"
        assert losses(trained / "out/tiny", stage) == losses(tmp_path / "out/tiny", stage)
    assert "finished" in launch("train_dit.py", *DIT, "--data", photos, "--steps", 6, cwd=tmp_path)


def test_samples_do_not_depend_on_ranks_or_batch(trained, tmp_path):
    arrays = []
    for ranks, batch in ((1, 20), (1, 3), (2, 4)):
        launch("sample.py", "--run", trained / "out/tiny", "--npz", tmp_path / "s.npz", "--num", 20, "--steps", 4, "--batch",
               batch, cwd=tmp_path, ranks=ranks)
        arrays.append(np.load(tmp_path / "s.npz", allow_pickle=False))
    for other in arrays[1:]:
        assert np.abs(arrays[0]["arr_0"].astype(int) - other["arr_0"]).max() <= 1
        assert (arrays[0]["labels"] == other["labels"]).all()
    assert arrays[0]["arr_0"].shape == (20, 32, 32, 3) and np.bincount(arrays[0]["labels"]).tolist() == [5] * 4
    assert (np.diff(arrays[0]["labels"]) < 0).any()                           # shuffled
    launch("sample.py", "--run", trained / "out/tiny", "--npz", tmp_path / "s.npz", "--num", 2, "--steps", 4, cwd=tmp_path, ranks=3)
    few = np.load(tmp_path / "s.npz", allow_pickle=False)                     # one rank has no image to make
    assert np.abs(arrays[0]["arr_0"][:2].astype(int) - few["arr_0"]).max() <= 1
    assert not list(tmp_path.glob("*.part*"))


NAMES = ("an unknown encoder", "a missing folder", "an empty folder", "no classes", "no network", "no checkpoint",
         "a run without one", "sampling without one", "other settings", "heads that do not divide", "a batch that does not",
         "no steps", "an unknown class", "an unknown release", "released files that are not there", "no network for the release")


def bad(trained, tmp_path, photos):
    (tmp_path / "empty/class").mkdir(parents=True)
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    other = tmp_path / "other"
    shutil.copytree(trained / "out/tiny", other)
    (tmp_path / "nothing").mkdir()
    dit, decoder = ("train_dit.py", "--run", other), ("train_decoder.py", "--encoder", "tiny")
    return {
        "an unknown encoder": (("train_decoder.py", "--encoder", "clip"), "unknown encoder 'clip'"),
        "a missing folder": ((*decoder, "--data", "nowhere"), "nowhere"),
        "an empty folder": ((*decoder, "--data", tmp_path / "empty"), "no image"),
        "no classes": ((*decoder, "--data", tmp_path / "nothing"), "nothing"),
        "no network": (("train_decoder.py", "--encoder", "mae_b", "--data", photos, "--lpips-weight", 0, "--gan-weight", 0),
                       "model.safetensors of timm/vit_base_patch16_224.mae .*--encoder-weights"),
        "no checkpoint": ((*dit, "--rae", tmp_path / "notes.pt"), "notes.pt is no checkpoint"),
        "a run without one": (("train_dit.py", "--run", tmp_path / "nothing"), "nothing holds no rae.pt.*--rae"),
        "sampling without one": (("sample.py", "--run", tmp_path / "nothing"), "dit.pt: no such file"),
        "other settings": ((*dit, *DIT, "--data", photos, "--head", 0), "head was 96, is 0"),
        "heads that do not divide": ((*dit, "--width", 100, "--depth", 1, "--heads", 3, "--data", photos), "100 .*3 heads"),
        "a batch that does not": ((*dit, "--batch", 9, "--accum", 2, "--data", photos), "--batch 9"),
        "no steps": (("sample.py", "--steps", 0), "--steps.*at least 1"),
        "an unknown class": (("sample.py", "--run", other, "--classes", "dodo"), "unknown class dodo.*class0"),
        "an unknown release": (("sample.py", "--run", "release:imagenet1024"), "unknown release:imagenet1024"),
        "released files that are not there": (("sample.py", "--run", "release:imagenet256", "--weights", tmp_path),
                                              "DiTDH-XL/stage2_model.pt"),
        "no network for the release": (("sample.py", "--run", "release:imagenet256"),
                                       "DiTDH-XL/stage2_model.pt of nyu-visionx/RAE-collections.*--weights"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_gets_one_sentence_before_any_work(name, trained, tmp_path, photos, monkeypatch, capsys):
    (script, *arguments), sentence = bad(trained, tmp_path, photos)[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script.removesuffix(".py")).main()
    text = str(stopped.value) if stopped.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, text) and "\n" not in text.strip(), text


def test_bad_input_ends_a_script_without_a_traceback(tmp_path):
    text = launch("train_decoder.py", "--encoder", "clip", cwd=tmp_path, expect=1)
    assert text.startswith("unknown encoder 'clip'") and "Traceback" not in text


def test_a_truncated_file_is_skipped_named_and_counted(tmp_path, photos):
    shutil.copytree(photos, tmp_path / "data")
    victim = tmp_path / "data/class1/1.png"
    victim.write_bytes(victim.read_bytes()[:200])
    text = launch("train_decoder.py", *DECODER, "--data", "data", "--steps", 4, cwd=tmp_path)
    assert text.count("class1/1.png") == 1 and "1 of 40 images cannot be decoded" in text
    assert len(losses(tmp_path / "out/tiny", 1)) == 4

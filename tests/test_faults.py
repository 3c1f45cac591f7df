"""Runs that are stopped, killed, starved of disk or fed with nonsense: the real scripts as processes."""
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import (DECODER, DIT, ENVIRONMENT, ROOT, children, command_line, inside, launch, load, losses,
                      signal_all, state)
from PIL import Image

import fid
import rae
import sample
import train_decoder
import train_dit
from rae import Folder, UserError, save_checkpoint

EVERY = 3                                                                     # steps between checkpoints
LONG = ("train_decoder.py", *DECODER, "--steps", 5000, "--epochs", 5000, "--save-every", EVERY)


@contextmanager
def running(*command, cwd, ranks=1, until="step 3 ", **options):
    """A script as a process of its own session, once its output has `until` or that is true; killed with all
    its children at the end."""
    with open(cwd / "output.txt", "w+") as output:
        process = subprocess.Popen(command_line(*command, ranks=ranks), cwd=cwd, stdout=output, stderr=output,
                                   start_new_session=True, env=os.environ | ENVIRONMENT, **options)
        process.text = lambda: (cwd / "output.txt").read_text()
        begun = until if callable(until) else lambda: until in process.text()
        deadline = time.time() + 120
        try:
            while not begun():
                assert process.poll() is None and time.time() < deadline, process.text()
                time.sleep(0.05)
            yield process
        finally:
            signal_all(process.pid, signal.SIGKILL)
            process.wait()


def saved_step(path):
    """A checkpoint's step, or -1 where there is none yet."""
    return load(path)["step"] if path.exists() else -1


def logged_steps(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def many(photos, folder, count):
    """So many pictures of one class: hard links to the first of `photos`."""
    first = next(photos.glob("*/*.png"))
    (folder / "all").mkdir(parents=True)
    for i in range(count):
        os.link(first, folder / f"all/{i}.png")
    return folder


# Stopped by a signal

@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_stop_signal_saves_and_ends_cleanly(number, ranks, tmp_path, photos):
    """Ctrl-C, torchrun and SLURM signal all processes of a run, loaders as well."""
    flags = ("--data", photos, "--save-every", 5000, "--workers", 2)
    with running(*LONG, *flags, cwd=tmp_path, ranks=ranks) as process:
        assert len(children(process.pid)) >= (3 * ranks if ranks > 1 else 2)  # the loaders are there
        signal_all(process.pid, number)
        process.wait(timeout=60)
        text = process.text()
    assert process.returncode == (0 if ranks == 1 else 1), text               # torchrun itself says 1
    assert "stopped; out/tiny/rae.pt is at step" in text and "exited unexpectedly" not in text
    assert ranks == 2 or "Traceback" not in text
    steps = logged_steps(tmp_path / "out/tiny")
    assert saved_step(tmp_path / "out/tiny/rae.pt") == steps[-1] >= 3         # the last that was logged
    text = inside(*LONG, "--data", photos, "--steps", steps[-1] + 2, cwd=tmp_path)
    assert f"steps {steps[-1]} to {steps[-1] + 2}" in text
    assert logged_steps(tmp_path / "out/tiny") == list(range(1, steps[-1] + 3))


def test_a_stop_during_the_statistics_just_ends_the_run(tmp_path, photos):
    data = many(photos, tmp_path / "data", 20_000)
    with running(*LONG, "--data", data, "--workers", 2, cwd=tmp_path, until="latent statistics") as process:
        deadline = time.time() + 60
        while len(children(process.pid)) < 2:                                 # until the loaders are there
            assert time.time() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        reached = signal_all(process.pid, signal.SIGTERM)
        assert process.wait(timeout=15) == -signal.SIGTERM
        assert "exited unexpectedly" not in process.text()
        while any(os.path.exists(f"/proc/{pid}") for pid in reached[:2]):     # they see it within 5 seconds
            assert time.time() < deadline
            time.sleep(0.1)
    assert not (tmp_path / "out/tiny/rae.pt").exists()


def test_a_stop_during_an_evaluation_saves_the_next_step(tmp_path, photos):
    shutil.copytree(photos, tmp_path / "data/train")
    for label in range(4):
        many(photos, tmp_path / f"data/val/class{label}", 250)
    run = tmp_path / "out/tiny"
    with running(*LONG, "--data", "data", "--workers", 2, cwd=tmp_path,
                 until=lambda: saved_step(run / "rae.pt") == EVERY) as process:
        time.sleep(0.1)  # the save came first: now it evaluates
        signal_all(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0, process.text()
        text = process.text()
    assert "exited unexpectedly" not in text and "Traceback" not in text
    assert saved_step(run / "rae.pt") == logged_steps(run)[-1] == EVERY + 1 and "psnr" in text
    assert not list(run.glob("samples/*4.png"))                               # and drew nothing at the stop


# Killed

def test_one_dead_rank_ends_the_others_with_a_message_and_the_run_goes_on(tmp_path, photos):
    with running(*LONG, "--data", photos, cwd=tmp_path, ranks=2) as process:
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=100) != 0
        assert "FAILED" in process.text() and "SIGKILL" in process.text()
    saved = saved_step(tmp_path / "out/tiny/rae.pt")
    assert saved >= len(losses(tmp_path / "out/tiny", 1)) - EVERY
    text = inside(*LONG, "--data", photos, "--steps", saved + 1, cwd=tmp_path)
    assert f"steps {saved} to {saved + 1}" in text


def test_a_run_killed_before_its_first_checkpoint_logs_no_step_twice(trained, tmp_path, photos):
    (tmp_path / "run").mkdir()
    entries = [dict(stage=1, step=9, loss=0.5), *(dict(stage=2, step=step, loss=0.5) for step in (1, 2, 3))]
    (tmp_path / "run/log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries) + '{"sta')
    inside("train_dit.py", *DIT, "--data", photos, "--rae", trained / "out/tiny/rae.pt", "--run", "run",
           "--steps", 2, cwd=tmp_path)
    kept = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert [(entry["stage"], entry["step"]) for entry in kept] == [(1, 9), (2, 1), (2, 2)]


def test_a_second_trainer_of_the_same_run_is_refused(tmp_path, photos):
    with running(*LONG, "--data", photos, cwd=tmp_path):
        for script, flags in (("train_decoder.py", LONG[1:]), ("train_dit.py", DIT)):
            with pytest.raises(UserError, match="another process is training in out/tiny: .*--run"):
                inside(script, *flags, "--run", "out/tiny", "--data", photos, cwd=tmp_path)
    steps = logged_steps(tmp_path / "out/tiny")
    assert steps == list(range(1, len(steps) + 1))                            # no line of another's
    inside(*LONG, "--data", photos, "--steps", steps[-1] + 1, cwd=tmp_path)   # a killed one leaves no lock


# No room

def test_a_full_disk_ends_the_run_at_its_last_checkpoint_from_which_it_goes_on(trained, tmp_path, photos):
    """The largest file allowed is 100 kB: the checkpoint does not fit, the log does."""
    for name in ("full", "roomy"):
        shutil.copytree(trained / "out/tiny", tmp_path / name)
    steps = ("train_decoder.py", *DECODER, "--data", photos, "--steps", 8, "--save-every", 2)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    text = launch(*steps, "--run", tmp_path / "full", cwd=tmp_path, expect=1, preexec_fn=limit)
    assert "full/rae.pt could not be written" in text and "make room" in text and "Traceback" not in text
    assert "step 7 " not in text  # the first save that fails is the end
    assert load(tmp_path / "full/rae.pt")["step"] == 4 and not list((tmp_path / "full").glob("*.tmp"))
    for name in ("full", "roomy"):  # room again: the same command goes on
        inside(*steps, "--run", tmp_path / name, cwd=tmp_path)
    one, other = load(tmp_path / "roomy/rae.pt"), load(tmp_path / "full/rae.pt")
    assert one["step"] == other["step"] == 8
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    assert losses(tmp_path / "full", 1) == losses(tmp_path / "roomy", 1)
    assert len(losses(tmp_path / "full", 1)) == 8


def test_samples_that_do_not_fit_on_the_disk_leave_nothing_there(trained, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    text = launch("sample.py", "--run", trained / "out/tiny", "--npz", "s.npz", "--num", 99, cwd=tmp_path,
                  expect=1, preexec_fn=limit)
    assert "OSError" in text.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "run"  # root may write anywhere but below a file
    with pytest.raises(UserError, match=f"{nowhere}.* could not be written .*make room"):
        save_checkpoint(nowhere / "x.pt", step=1)
    text = launch("train_decoder.py", *DECODER, "--run", nowhere, cwd=tmp_path, expect=1)
    assert f"{nowhere}/.lock cannot be written (Not a directory): name another place" in text.splitlines()[-1]


@pytest.mark.parametrize("command, said", [
    ("sample.py --out file/x.png", "file/x.png cannot be written"),
    ("sample.py --npz file/x", "file/x.npz cannot be written"),
    ("sample.py --npz folder", "folder.npz is a folder: name a file in it"),
    ("sample.py --out x.foo", "x.foo is no picture's name: end it in .png or .jpg"),
    ("rae.py image.png --out x", "x is no picture's name"),
    ("rae.py image.png --out file/x.png", "file/x.png cannot be written"),
    ("fid.py shapes/val --features tiny --save-stats file/x", "file/x.npz cannot be written"),
])
def test_a_place_that_cannot_be_written_is_refused_before_the_long_work(tmp_path, monkeypatch, command, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for module, work in ((sample, "load_dit"), (rae, "load_rae"), (fid, "feature_function")):
        monkeypatch.setattr(module, work, lambda *args: pytest.fail("the work began"))
    with pytest.raises(UserError, match=re.escape(said)):
        inside(*command.split(), cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz"]


# Nonsense

def test_a_step_without_a_finite_gradient_is_skipped_and_counted_and_a_run_of_them_ends_training(
        trained, tmp_path, photos, monkeypatch, capsys):
    real = train_dit.flow_matching_loss

    def poison(*calls):
        """From now on, the loss of these calls is not a number."""
        count = iter(range(1, 1000))

        def poisoned(*args, **options):
            return real(*args, **options) * (float("nan") if next(count) in calls else 1)
        monkeypatch.setattr(train_dit, "flow_matching_loss", poisoned)
    common = ("train_dit.py", *DIT, "--data", photos, "--rae", trained / "out/tiny/rae.pt",
              "--save-every", 3, "--epochs", 20)
    poison(3, 4)
    text = inside(*common, "--run", tmp_path / "a", "--steps", 6, cwd=tmp_path)
    assert text.count("skipped 1") == 2 and text.count("skipped 0") == 4
    saved = load(tmp_path / "a/dit.pt")
    assert all(x.isfinite().all() for part in ("model", "ema") for x in saved[part].values())
    assert saved["step"] == 6
    assert saved["optimizer"]["state"][0]["step"] == 4                        # of 6
    poison(*range(5, 99))
    sentence = "step 14: the last 10 had non-finite gradients .* in .*/b is the last good state"
    with pytest.raises(UserError, match=sentence):
        inside(*common, "--run", tmp_path / "b", "--steps", 50, cwd=tmp_path)
    assert all(x.isfinite().all() for x in load(tmp_path / "b/dit.pt")["model"].values())


def test_a_skipped_step_of_the_discriminator_counts_too(tmp_path, photos, monkeypatch):
    calls = iter(range(1, 100))
    poison = lambda *logits, real=train_decoder.hinge_loss: real(*logits) * (float("nan") if next(calls) == 2 else 1)
    monkeypatch.setattr(train_decoder, "hinge_loss", poison)
    text = inside("train_decoder.py", *DECODER, "--data", photos, "--steps", 4, "--gan-weight", 0.75, "--disc-start", 0.3,
                  "--gan-start", 0.6, cwd=tmp_path)
    assert ["skipped 1" in line for line in text.splitlines() if "  loss " in line] == [False, False, True, False]
    saved = load(tmp_path / "out/tiny/rae.pt")
    assert saved["optimizer"]["state"][0]["step"] == 4 and saved["disc_optimizer"]["state"][0]["step"] == 2    # of 3


def test_a_file_deleted_during_training_is_named_once_and_another_takes_its_place(tmp_path, photos, capfd):
    shutil.copytree(photos, tmp_path / "all")
    odd = tmp_path / "all/class0/ä ö%20 \U0001f600.png"                       # names that need care
    os.rename(tmp_path / "all/class0/0.png", odd)
    data = Folder(tmp_path / "all", 32, train=True, crop=True)
    at = next(i for i, (path, _) in enumerate(data.samples) if path == str(odd))
    assert data[at, 0][1] == 0
    odd.unlink()
    first, again = data[at, 0], data[at, 0]
    assert torch.equal(first[0], again[0]) and capfd.readouterr().out.count("skipped") == 1


# Loader processes

RAISES = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/assets"]
import rae, {module} as script
def read(self, index, key, sound=rae.Folder.read):
    path, _ = self.samples[index]
    if path.endswith("{victim}"):
        raise RuntimeError(f"a fault in the program, at {{path}}")
    return sound(self, index, key)
rae.Folder.read = read
script.main()
"""
ENDS = {  # name: (module, flags, ranks); every image is read before the first step, or in it
    "stage 1": ("train_decoder", (*DECODER, "--data", "data", "--workers", 2), 2),
    "stage 2": ("train_dit", (*DIT, "--rae", ROOT / "assets/demo", "--run", "run", "--data", "data", "--workers", 1), 1),
    "metrics": ("fid", ("data", "--features", "tiny"), 1),
    "a probe": ("probe", ("--data", "data", "--run", ROOT / "assets/demo", "--best-of", 2), 1),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_error_in_a_loader_process_ends_the_run_and_is_told(name, tmp_path, photos):
    """It ignores SIGTERM, and Python waits for it: who does not end it hangs."""
    module, flags, ranks = ENDS[name]
    for label in range(10):
        os.makedirs(tmp_path / f"data/{label}")
        for i in range(3):
            shutil.copy(photos / "class0/0.png", tmp_path / f"data/{label}/{i}.png")
    script = RAISES.format(root=str(ROOT), module=module, victim="4/1.png")
    (tmp_path / "raises.py").write_text(script)
    begun = time.time()
    with running(tmp_path / "raises.py", *flags, cwd=tmp_path, ranks=ranks, until=lambda: True) as process:
        started = set()
        while process.poll() is None and time.time() < begun + 60:
            started |= {*children(process.pid)}
            time.sleep(0.1)
        assert process.poll() == 1, process.text()
        assert "data/4/1.png" in process.text() and "killed by signal" not in process.text()
    assert len(started) >= 1 and not [pid for pid in started if state(pid)[:1] not in ("", "Z")]


def test_too_little_shared_memory_is_told_before_training(photos, monkeypatch):
    """Docker gives 64 MiB; a batch of 64 at 256 pixels has 12."""
    data = Folder(photos, 256)
    usage = shutil.disk_usage("/")
    free = {"/dev/shm": usage._replace(free=64 * 2 ** 20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free.get(path, usage))
    with pytest.raises(UserError, match="4 loader processes need 108 MiB in /dev/shm, which has 64: .*--shm-size.*--workers 0"):
        list(rae.batches(data, [], 64, 4, torch.device("cpu")))
    list(rae.batches(data, [], 64, 0, torch.device("cpu")))
    list(rae.batches(data, [], 64, 2, torch.device("cpu")))
    for name, value in dict(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)                                       # two ranks share it
    with pytest.raises(UserError, match="4 loader processes need 120 MiB"):
        list(rae.batches(data, [], 64, 2, torch.device("cpu")))


def test_one_rank_writes_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(rae.dist, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(rae.dist, "get_rank", lambda: rank)
        rae.save_checkpoint(tmp_path / "x.pt", model=torch.nn.Linear(1, 1), step=3)
        assert (tmp_path / "x.pt").exists() == (rank == 0)
    saved = rae.read_weights(tmp_path / "x.pt")
    assert saved["step"] == 3 and saved["model"].keys() == {"weight", "bias"}


# Whom nobody hears

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_whose_reader_is_gone_saves_all_its_steps(number, tmp_path, photos):
    """Ctrl-C through `| tee log` ends tee as well; a closed terminal reads nothing more."""
    reader, writer = os.pipe()
    command = command_line(*LONG, "--data", photos, "--save-every", 5000, "--workers", 1)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=writer, stderr=writer, env=os.environ | ENVIRONMENT)
    os.close(writer)
    text = b""
    while b"step 3 " not in text:
        text += os.read(reader, 10_000)
        assert text and process.poll() is None, text
    os.close(reader)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    steps = logged_steps(tmp_path / "out/tiny")
    assert saved_step(tmp_path / "out/tiny/rae.pt") == steps[-1] >= 3
    assert steps == list(range(1, steps[-1] + 1))


def test_the_second_signal_of_a_kind_ends_a_lone_process(tmp_path):
    (tmp_path / "stuck.py").write_text(f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
                                       "import rae\n"
                                       "flag = rae.stop_signal()\n"
                                       "print('ready', flush=True)\n"
                                       "while True: time.sleep(0.1)\n")
    with running(tmp_path / "stuck.py", cwd=tmp_path, until="ready") as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT


def test_any_bytes_can_be_a_name(tmp_path, photos):
    """Of a file that is broken, of a class, in a terminal that knows ASCII only."""
    odd = tmp_path / "data" / os.fsdecode(b"caf\xe9")
    odd.mkdir(parents=True)
    for i in range(110):
        os.link(next(photos.glob("*/*.png")), odd / f"{i}.png")
    (odd / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONIOENCODING", "ascii")
        text = launch("train_decoder.py", *DECODER, "--data", "data", "--steps", 1, "--workers", 1, cwd=tmp_path)
        text += launch("train_dit.py", *DIT, "--steps", 1, cwd=tmp_path)
        text += launch("sample.py", "--num", 2, "--steps", 2, cwd=tmp_path)
    assert "skipped" in text and "wrote samples.png" in text and "Traceback" not in text


def test_variables_of_a_launcher_that_is_not_there_count_for_nothing(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, "3")
        text = launch("sample.py", "--num", 2, "--steps", 2, cwd=tmp_path)
    assert "wrote samples.png: 2 images" in text


@pytest.mark.parametrize("name", ["train_decoder", "train_dit", "sample", "fid"])
def test_a_script_runs_without_its_docstrings(name, monkeypatch, capsys):
    """As under python -OO."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        script.parse_args(["--help"])
    assert ended.value.code == 0 and "usage" in capsys.readouterr().out


def test_a_machine_that_cannot_compile_says_so_in_a_sentence(tmp_path, photos):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
        text = launch("train_decoder.py", *DECODER, "--data", photos, "--steps", 1, "--compile", cwd=tmp_path, expect=1)
    assert "--compile does not work here" in text.splitlines()[-1] and "Traceback" not in text


# Files of other formats, and damage

def damaged(folder, count=500, seed=0):
    """Sound files of ten formats, with bytes flipped, cut or made up."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    kinds = [("a.jpg", image, dict(exif=exif)), ("b.png", image, {}), ("c.webp", image, {}), ("d.bmp", image, {}),
             ("e.tif", image, dict(compression="tiff_lzw")), ("f.ppm", image, {}), ("g.pgm", image.convert("L"), {}),
             ("h.png", image.convert("P"), {}), ("i.tiff", image.convert("I;16"), {}), ("j.jpeg", image.convert("CMYK"), {})]
    folder.mkdir(parents=True)
    for i in range(count):
        name, picture, options = kinds[i % len(kinds)]
        picture.save(folder / f"{i:03}{name}", **options)
        content = bytearray((folder / f"{i:03}{name}").read_bytes())
        for at in rng.integers(len(content), size=1 + i % 7):
            content[at] = rng.integers(256)
        if i % 3 == 0:
            content = content[:rng.integers(len(content))]
        (folder / f"{i:03}{name}").write_bytes(content)


def test_no_damaged_file_ends_or_hangs_what_reads_it(tmp_path, photos):
    """500 in one class: named, and the run refused; 500 sound ones beside each: named, and the run goes on."""
    damaged(tmp_path / "bad/all")
    for workers in (0, 2):
        text = launch("train_decoder.py", *DECODER, "--data", "bad", "--workers", workers, cwd=tmp_path, expect=1, limit=60)
        assert "of 500 images cannot be read" in text and "Traceback" not in text
    text = launch("fid.py", "bad", "--features", "tiny", cwd=tmp_path, expect=1, limit=60)
    assert "images cannot be read" in text and "Traceback" not in text
    data = Folder(tmp_path / "bad", 32, train=True, crop=True)
    assert all(data[i, i][0].shape == (3, 32, 32) for i in range(500))        # each place is taken
    assert 100 < data.broken.sum() < 450

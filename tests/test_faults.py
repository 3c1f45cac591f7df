"""Runs that are stopped, killed, starved of disk or fed with nonsense: the real scripts as processes."""
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import DECODER, DIT, ROOT, launch, losses

from rae import Folder, log, save_checkpoint, save_picture

EVERY = 3                                                                     # steps between checkpoints
LONG = ("train_decoder.py", *DECODER, "--steps", 5000, "--epochs", 5000, "--save-every", EVERY)


@contextmanager
def running(*command, cwd, ranks=1, **options):
    """A script as a process of its own session, from its third logged step on; killed with all its children at the end."""
    script, *args = map(str, command)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else []
    with open(cwd / "output.txt", "w+") as output:
        process = subprocess.Popen([sys.executable, "-u", *torchrun, str(ROOT / script), *args], cwd=cwd, stdout=output, stderr=output,
                                   start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
        process.text = lambda: (cwd / "output.txt").read_text()
        deadline = time.time() + 120
        while "step 3 " not in process.text():
            assert process.poll() is None and time.time() < deadline, process.text()
            time.sleep(0.1)
        try:
            yield process
        finally:
            for pid in [process.pid, *children(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()


def children(pid):
    """The process's descendants."""
    table = [line.split() for line in subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]]
    own = [int(child) for child, parent in table if int(parent) == pid]
    return own + [grandchild for child in own for grandchild in children(child)]


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_stop_signal_saves_and_ends_cleanly(number, ranks, tmp_path, photos):
    with running(*LONG, "--data", photos, "--save-every", 5000, cwd=tmp_path, ranks=ranks) as process:
        process.send_signal(number) if ranks == 1 else os.killpg(process.pid, number)         # Ctrl-C reaches the whole group
        process.wait(timeout=60)
    assert ranks == 2 or process.returncode == 0                              # torchrun itself says 1
    done = len(losses(tmp_path / "out/tiny", 1))
    assert load(tmp_path / "out/tiny/rae.pt")["step"] == done >= 3 and "wrote out/tiny/rae.pt" in process.text()
    text = launch(*LONG[:1], *LONG[1:], "--data", photos, "--steps", done + 2, cwd=tmp_path)
    assert f"steps {done} to {done + 2}" in text and len(losses(tmp_path / "out/tiny", 1)) == done + 2


def test_one_dead_rank_ends_the_others_with_a_message_and_the_run_goes_on(tmp_path, photos):
    with running(*LONG, "--data", photos, cwd=tmp_path, ranks=2) as process:
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=100) != 0
        assert "FAILED" in process.text() and "SIGKILL" in process.text()
    saved = load(tmp_path / "out/tiny/rae.pt")["step"]
    assert saved >= len(losses(tmp_path / "out/tiny", 1)) - EVERY
    assert f"steps {saved} to {saved + 1}" in launch(*LONG, "--data", photos, "--steps", saved + 1, cwd=tmp_path)


def test_a_full_disk_costs_the_save_and_not_the_run(trained, tmp_path, photos):
    """The largest file allowed is 100 kB: the checkpoint does not fit, the log does."""
    (tmp_path / "rae.pt").write_bytes((trained / "out/tiny/rae.pt").read_bytes())
    steps = ["--data", photos, "--steps", 8, "--save-every", 2, "--run", tmp_path]
    done = subprocess.run([sys.executable, str(ROOT / "train_decoder.py"), *map(str, [*DECODER, *steps])], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.stdout.count("could not be written") == 2 and "step 8 " in done.stdout                # tried again, went on
    assert done.returncode == 1 and "the last save failed" in done.stderr
    assert load(tmp_path / "rae.pt")["step"] == 4 and not list(tmp_path.glob("*.tmp"))
    launch("train_decoder.py", *DECODER, *steps, cwd=tmp_path)                # room again: the same command goes on
    assert load(tmp_path / "rae.pt")["step"] == 8 and len(losses(tmp_path, 1)) == 4


def test_a_place_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    nowhere = tmp_path / "file" / "run"                                       # root may write anywhere but below a file
    assert save_checkpoint(nowhere / "x.pt", step=1) is False
    log(nowhere, step=1)
    save_picture(torch.rand(4, 3, 8, 8), nowhere / "x.png", nrow=2)
    assert capsys.readouterr().out.count("WARNING") == 3


POISONED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_dit
real, calls, bad = train_dit.flow_matching_loss, [0], eval(sys.argv.pop(1))

def poisoned(*args, **kwargs):
    calls[0] += 1
    return real(*args, **kwargs) * (float("nan") if calls[0] in bad else 1)

train_dit.flow_matching_loss = poisoned
train_dit.main()
"""


def test_a_step_without_a_finite_gradient_is_skipped_and_counted_and_a_run_of_them_ends_training(trained, tmp_path, photos):
    (tmp_path / "poisoned.py").write_text(POISONED)
    common = (*DIT, "--data", photos, "--rae", trained / "out/tiny/rae.pt", "--save-every", 3, "--epochs", 20)
    text = launch(tmp_path / "poisoned.py", "[3, 4]", *common, "--run", tmp_path / "a", "--steps", 6, cwd=tmp_path)
    assert text.count("skipped 1") == 2 and text.count("skipped 0") == 4
    saved = load(tmp_path / "a/dit.pt")
    assert all(x.isfinite().all() for part in ("model", "ema") for x in saved[part].values()) and saved["step"] == 6
    assert saved["optimizer"]["state"][0]["step"] == 4                        # of 6
    text = launch(tmp_path / "poisoned.py", "range(5, 99)", *common, "--run", tmp_path / "b", "--steps", 50, cwd=tmp_path, expect=1)
    assert "step 14: the last 10 had non-finite gradients" in text and "b/dit.pt is the last good state" in text
    assert all(x.isfinite().all() for x in load(tmp_path / "b/dit.pt")["model"].values())


def test_a_file_deleted_during_training_is_named_once_and_another_takes_its_place(tmp_path, photos, capfd):
    import shutil
    shutil.copytree(photos, tmp_path / "all")
    odd = tmp_path / "all/class0/ä ö%20 \U0001f600.png"                       # names that need care
    os.rename(tmp_path / "all/class0/0.png", odd)
    data = Folder(tmp_path / "all", 32, train=True, crop=True)
    at = next(i for i, (path, _) in enumerate(data.samples) if path == str(odd))
    assert data[at, 0][1] == 0
    odd.unlink()
    for _ in range(2):
        assert torch.equal(data[at, 0][0], data[(at + 1) % len(data), 0][0])
    assert capfd.readouterr().out.count("skipped") == 1

"""What the tests share: a process group, a folder of pictures, a trained run, and ways to run a script."""
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parent.parent
THREADS = os.environ.get("OMP_NUM_THREADS", "1")                              # of this process, and of all that it starts
torch.set_num_threads(int(THREADS))

# No network; a process that gets SIGABRT prints where its threads are
ENVIRONMENT = {"OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture(scope="session", autouse=True)
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 40 PNGs in 4 classes, of odd sizes."""
    from assets.shapes import Shapes
    path = tmp_path_factory.mktemp("photos")
    images, labels = Shapes(48).render(torch.arange(100))
    for i in range(40):
        (path / f"class{i % 4}").mkdir(exist_ok=True)
        to_pil_image(images[i][:, :40 + i % 9]).save(path / f"class{i % 4}/{i}.png")
    return path


# Processes

def command_line(script, *args, ranks=1):
    """What a user types, alone or under torchrun, which finds a free port by itself."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    return [sys.executable, "-u", *(torchrun if ranks > 1 else []), str(ROOT / script), *map(str, args)]


def children(pid):
    """The process's descendants."""
    table = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    pairs = [line.split() for line in table.splitlines()[1:]]
    own = [int(child) for child, parent in pairs if int(parent) == pid]
    return own + [grandchild for child in own for grandchild in children(child)]


def signal_all(pid, number):
    """A signal to a process and everything that it started; they, in no order. Whom it reached."""
    reached = [*children(pid), pid]
    for each in reached:
        try:
            os.kill(each, number)
        except ProcessLookupError:
            pass
    return reached


def state(pid):
    """A process's state as `ps` has it ("S", "R", "Z", ...), empty when there is none."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()


def abort_all(pid):
    """Abort a process and everything that it started, one after the other, so that each prints its stacks
    undisturbed. Which they were."""
    stopped = signal_all(pid, signal.SIGSTOP)
    for each in stopped:
        os.kill(each, signal.SIGABRT)
        os.kill(each, signal.SIGCONT)
        deadline = time.monotonic() + 5
        while state(each)[:1] not in ("", "Z") and time.monotonic() < deadline:
            time.sleep(0.05)
    return stopped


def launch(script, *args, cwd, ranks=1, expect=0, limit=240, **options):
    """Run a script as its user does, alone or under torchrun; its output. One that takes longer than
    `limit` seconds fails the test with the stacks of all its processes."""
    process = subprocess.Popen(command_line(script, *args, ranks=ranks), cwd=cwd, text=True,
                               env=os.environ | ENVIRONMENT, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        started = abort_all(process.pid)
        try:
            text, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            text = "and it cannot be aborted"
        pytest.fail(f"{script} took longer than {limit} s\n{text}")
    finally:
        for pid in [*locals().get("started", ()), *children(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    assert process.returncode == expect, text
    return text


@contextmanager
def as_it_was():
    """Put back what a script changes in its process: signal handlers, torch's generator and precision."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    precision = torch.get_float32_matmul_precision()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def inside(script, *args, cwd):
    """A script's main in this process, where it need not be started; what it printed."""
    main = importlib.import_module(script.removesuffix(".py")).main
    with as_it_was(), pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as text:
        patch.setattr("sys.argv", [script, *map(str, args)])
        patch.chdir(cwd)
        main()
    return text.getvalue()


# Runs

def losses(run, stage):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


def load(path):
    return torch.load(path, weights_only=True)


DECODER = ("--encoder", "tiny", "--batch", 12, "--dtype", "fp32", "--log-every", 1, "--save-every", 100,
           "--lr", "1e-3", "--epochs", 4, "--workers", 0)
DIT = ("--width", 96, "--depth", 1, "--heads", 4, "--head", 96, "--head-heads", 4, "--batch", 12,
       "--dtype", "fp32", "--log-every", 1, "--save-every", 100, "--workers", 0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos):
    """A working folder with out/tiny: a decoder after 4 steps and a DiT^DH after 6, in one process."""
    cwd = tmp_path_factory.mktemp("trained")
    inside("train_decoder.py", *DECODER, "--data", photos, "--steps", 4, cwd=cwd)
    inside("train_dit.py", *DIT, "--data", photos, "--steps", 6, cwd=cwd)
    return cwd

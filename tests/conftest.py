import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 40 PNGs in 4 classes, of odd sizes."""
    from rae import Shapes
    path = tmp_path_factory.mktemp("photos")
    images, labels = Shapes(48).render(torch.arange(100))
    for i in range(40):
        (path / f"class{i % 4}").mkdir(exist_ok=True)
        to_pil_image(images[i][:, :40 + i % 9]).save(path / f"class{i % 4}/{i}.png")
    return path


def launch(script, *args, cwd, ranks=1, expect=0):
    """Run a script as its user does, alone or under torchrun; its output."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command[:1] = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}", "--"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run, stage):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


DECODER = ("--encoder", "tiny", "--batch", 12, "--dtype", "fp32", "--log-every", 1, "--save-every", 100, "--lr", "1e-3",
           "--epochs", 4, "--workers", 0)
DIT = ("--width", 96, "--depth", 1, "--heads", 4, "--head", 96, "--head-heads", 4, "--batch", 12, "--dtype", "fp32",
       "--log-every", 1, "--save-every", 100, "--workers", 0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos):
    """A working folder with out/tiny: a decoder after 4 steps and a DiT^DH after 6, in one process."""
    cwd = tmp_path_factory.mktemp("trained")
    launch("train_decoder.py", *DECODER, "--data", photos, "--steps", 4, cwd=cwd)
    launch("train_dit.py", *DIT, "--data", photos, "--steps", 6, cwd=cwd)
    return cwd

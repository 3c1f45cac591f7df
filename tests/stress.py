"""The long tests: equal runs on three ranks, thirty kills, two nodes, two hundred ends. Not run by pytest.

    python tests/stress.py                       # all of it, about a quarter of an hour on two cores
    python tests/stress.py --kills 6             # fewer kills
    python tests/stress.py --only kills ends     # these parts

Runs the real scripts on small data in a temporary folder, on CPU, and ends with a line of figures and exit
status 0 if everything held.
"""
import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _pytest.outcomes import Failed
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from assets.shapes import Shapes                                                        # noqa: E402
from conftest import DECODER, DIT, ENVIRONMENT, children, launch, load, losses, signal_all      # noqa: E402
from test_train_decoder import train                                                    # noqa: E402

EVERY = 5                                                                     # steps between checkpoints


def check(true, what):
    if not true:
        raise AssertionError(what)


def furthest(one, two):
    """The largest difference of two state dicts' entries."""
    check(one.keys() == two.keys(), "other keys")
    return max((one[key] - two[key]).abs().max().item() for key in one if one[key].is_floating_point())


def end(process):
    """SIGKILL to a process and everything it started."""
    signal_all(process.pid, signal.SIGKILL)
    process.wait()


def begin(name, command, cwd):
    """Start a script; what it prints goes to NAME.txt."""
    with open(cwd / f"{name}.txt", "w") as output:
        return subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=cwd, stdout=output,
                                stderr=output, start_new_session=True, env=os.environ | ENVIRONMENT)


def wait_until(true, process, what, seconds=180):
    deadline = time.time() + seconds
    while not true():
        check(process.poll() is None and time.time() < deadline, f"{what} did not happen")
        time.sleep(0.02)


# One, two and three ranks: the same losses and weights in both stages, with the adversary

def equivalence(photos, folder):
    runs = {}
    worst = {1: 0, 2: 0}
    for ranks in (1, 2, 3):
        cwd = folder / f"ranks{ranks}"
        cwd.mkdir()
        train(cwd, photos, "--steps", 6, ranks=ranks)
        launch("train_dit.py", *DIT, "--data", photos, "--steps", 6, "--run", cwd,
               "--rae", folder / "ranks1/out/tiny/rae.pt", cwd=cwd, ranks=ranks)
        runs[ranks] = {1: (load(cwd / "out/tiny/rae.pt")["model"], losses(cwd / "out/tiny", 1)),
                       2: (load(cwd / "dit.pt")["model"], losses(cwd, 2))}
        trained = [load(cwd / f"rank{rank}.pt")["trained"] for rank in range(ranks)]   # decoder, discriminator
        check(all(furthest(one, other) == 0 for both in trained for one, other in zip(trained[0], both)),
              "weights differ between ranks")
        for stage in (1, 2):
            model, seen = runs[ranks][stage]
            first_model, first_seen = runs[1][stage]
            weights = furthest(first_model, model)
            loss = max(abs(a - b) for a, b in zip(first_seen, seen))
            check(weights < 1e-3 and loss < 1e-3,
                  f"{ranks} ranks, stage {stage}: weights off by {weights}, losses by {loss}")
            worst[stage] = max(worst[stage], loss)
        yield (f"1 to 3 ranks: losses of 6 steps within {worst[1]:.0e} (adversarial stage 1),"
               f" {worst[2]:.0e} (stage 2)")


# SIGKILL to one of three ranks or to everything, a third of the times in the middle of a save

def kills(photos, folder, number):
    dice = random.Random(0)
    run = folder / "killed"
    total = 0                                                                 # the last checkpoint's step
    in_save = 0                                                               # kills during a save
    lost = 0                                                                  # steps, the worst time
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--"]
    script = [*DECODER, "--data", photos, "--epochs", 5000, "--save-every", EVERY]
    command = [*torchrun, ROOT / "train_decoder.py", *script, "--run", run]
    text = lambda: (folder / "killed.txt").read_text()

    for kill in range(number):
        process = begin("killed", command, folder)
        wait_until(lambda: "stage 1  step" in text(), process, "a first step")
        if kill % 3 == 0:
            wait_until(lambda: (run / "rae.pt.tmp").exists(), process, "a save")
        else:
            time.sleep(dice.uniform(0, 3))
        in_save += (run / "rae.pt.tmp").exists()
        if kill % 2:                                                          # one rank
            ranks = [pid for pid in children(process.pid)
                     if "train_decoder" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(dice.choice(ranks), signal.SIGKILL)
            process.wait(timeout=120)                                         # the others end by themselves
            check(process.returncode != 0 and "SIGKILL" in text(), "no message about the dead rank")
        end(process)

        saved = load(run / "rae.pt")
        logged = [json.loads(line)["step"] for line in open(run / "log.jsonl") if line.endswith("}\n")]
        check(all(x.isfinite().all() for x in saved["model"].values()), "weights that are not finite")
        check(saved["step"] >= total, "an older checkpoint than before")
        total = saved["step"]
        lost = max(lost, logged[-1] - total)
        check(lost <= EVERY, f"{lost} steps lost")
        check(len(list(run.glob("*.tmp"))) <= 1, "temporary files pile up")
        yield f"{kill + 1} kills ({in_save} during a save): at most {lost} steps of {EVERY} lost"

    # To the end; and once without any kill
    steps = total + EVERY
    for name in ("killed", "spared"):
        launch("train_decoder.py", *script, "--run", folder / name, "--steps", steps, cwd=folder, ranks=3)
    check(not list(run.glob("*.tmp")), "a temporary file is left")
    logged = [json.loads(line)["step"] for line in open(run / "log.jsonl")]
    evaluations = len(logged) - steps
    check(logged == list(range(1, steps + 1)) + [steps] * evaluations,
          "a step is missing in the log, or twice")
    apart = furthest(load(run / "rae.pt")["model"], load(folder / "spared/rae.pt")["model"])
    check(apart == 0, f"weights differ by {apart} from those of a run without kills")
    yield f"after {steps} steps the weights are bitwise those of a run without kills"


# The README's two machines, as two agents that meet on loopback; one is killed, both are started again

def two_nodes(photos, folder):
    cwd = folder / "nodes"
    cwd.mkdir()

    def agents(*command):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
        meet = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d",
                endpoint, "--"]
        return [begin(f"node{i}", [*meet, *command], cwd) for i in (0, 1)]

    common = ["--data", photos, "--save-every", EVERY, "--run", cwd / "run", "--epochs", 5000]
    for stage, name, command in ((1, "rae.pt", [ROOT / "train_decoder.py", *DECODER, *common]),
                                 (2, "dit.pt", [ROOT / "train_dit.py", *DIT, *common])):
        path = cwd / "run" / name
        nodes = agents(*command)
        wait_until(lambda: path.exists() and load(path)["step"] >= EVERY, nodes[0], "a checkpoint")
        end(nodes[1])
        begun = time.time()
        check(nodes[0].wait(timeout=150) != 0, "the other node ended as if nothing had happened")
        at = load(path)["step"]
        yield f"two nodes, stage {stage}: one killed, the other ended after {time.time() - begun:.0f} s"
        nodes = agents(*command, "--steps", at + 12)
        for node in nodes:
            check(node.wait(timeout=300) == 0, (cwd / "node0.txt").read_text()[-2000:])
        check(load(path)["step"] == at + 12, "not all steps were done")
        yield f"two nodes, stage {stage}: started again at step {at}, finished"


# Two hundred ends of a run of two ranks. A thread of gloo may still hold the last all-reduce when the process
# group ends, and wait for the interpreter to free its tensor: who waits for the thread with the interpreter
# locked waits for ever. Without the backends in rae.leave, torch 2.6 hangs here within some tens of ends.

ENDS = f"""
import atexit, gc, os, sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
import rae
from rae import any_rank

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
join = dist.init_process_group
store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), world, False, timedelta(minutes=5))

def run(number):
    meeting = dist.PrefixStore("run " + str(number), store)                   # a new group every time
    rae.dist.init_process_group = lambda backend, **options: join(
        backend, store=meeting, rank=rank, world_size=world, **options)
    rae.start()
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(2):
        ddp(torch.randn(4, 16)).sum().backward()
        any_rank(torch.zeros(()))
    sums = torch.zeros(3)
    dist.all_reduce(sums)

for number in range(int(sys.argv[1])):
    run(number)
    rae.leave()
    print(f"end {{number + 1}}\\n", end="", flush=True)                           # in one piece
    if number == 1:
        gc.freeze()                                                           # what stays, so that collecting is quick
atexit.unregister(rae.leave)                                                  # it was registered every time
time.sleep(1)                                                                 # the store is rank 0's
"""


def ends(folder, number):
    """Two ranks begin a group, train, and end it, so many times, beside two busy processes."""
    (folder / "ends.py").write_text(ENDS)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        text = launch(folder / "ends.py", number, cwd=folder, ranks=2, limit=120 + 3 * number)
    finally:
        for process in busy:
            end(process)
    check(text.count(f"end {number}\n") == 2, text)
    yield f"{number} ends of two ranks"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--ends", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=("equivalence", "kills", "nodes", "ends"), help="parts")
    args = parser.parse_args()

    begun = time.time()
    said = {}                                                                 # the last sentence of each kind
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos = folder / "photos"
        images, _ = Shapes(48).render(torch.arange(40))
        for i, image in enumerate(images):
            (photos / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(photos / f"class{i % 4}/{i}.png")
        parts = {                                                             # (sentences, what says them)
            "equivalence": (3, equivalence(photos, folder)),
            "kills": (args.kills + 1, kills(photos, folder, args.kills)),
            "nodes": (4, two_nodes(photos, folder)),
            "ends": (1, ends(folder, args.ends))}
        chosen = {name: part for name, part in parts.items() if not args.only or name in args.only}
        with tqdm(total=sum(count for count, _ in chosen.values())) as bar:
            for name, (_, part) in chosen.items():
                try:
                    for sentence in part:
                        kind = [words for words in (" kills (", " ranks:") if words in sentence]
                        said[kind[0] if kind else sentence] = sentence
                        bar.set_postfix_str(sentence)
                        bar.update()
                except (Exception, Failed) as error:
                    failed += 1
                    tqdm.write(f"FAILED, {name}: {error}")
    print("; ".join(said.values()))
    print(f"{failed} of {len(chosen)} parts failed, {(time.time() - begun) / 60:.1f} minutes")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

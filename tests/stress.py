"""The long tests: equivalence on three ranks, thirty kills, two nodes. Not run by pytest.

    python tests/stress.py               # all of it, about 13 minutes on two busy cores
    python tests/stress.py --kills 6     # fewer kills

Runs the real scripts on small data in a temporary folder, on CPU, and ends with one line of figures and exit
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
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import DECODER, DIT, launch, losses     # noqa: E402
from rae import Shapes                                # noqa: E402
from test_faults import children                      # noqa: E402
from test_train_decoder import train                  # noqa: E402

EVERY = 5                                             # steps between checkpoints


def check(true, what):
    if not true:
        raise AssertionError(what)


def load(path):
    return torch.load(path, weights_only=True)


def furthest(one, two):
    """The largest difference of two state dicts' entries."""
    check(one.keys() == two.keys(), "other keys")
    return max((one[key] - two[key]).abs().max().item() for key in one if one[key].is_floating_point())


def end(process):
    """SIGKILL to a process and everything it started."""
    for pid in [*children(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def begin(name, command, cwd):
    with open(cwd / f"{name}.txt", "w") as output:
        return subprocess.Popen([sys.executable, "-u", *map(str, command)], cwd=cwd, stdout=output, stderr=output,
                                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_until(true, process, what, seconds=180):
    deadline = time.time() + seconds
    while not true():
        check(process.poll() is None and time.time() < deadline, f"{what} did not happen")
        time.sleep(0.02)


def equivalence(photos, folder):
    """One, two and three ranks: the same losses and weights, in both stages, adversarial part included."""
    runs, worst = {}, {}
    for ranks in (1, 2, 3):
        cwd = folder / f"ranks{ranks}"
        cwd.mkdir()
        train(cwd, photos, "--steps", 6, ranks=ranks)
        launch("train_dit.py", *DIT, "--data", photos, "--steps", 6, "--rae", folder / "ranks1/out/tiny/rae.pt", "--run", cwd, cwd=cwd,
               ranks=ranks)
        runs[ranks] = load(cwd / "out/tiny/rae.pt"), load(cwd / "dit.pt"), losses(cwd / "out/tiny", 1), losses(cwd, 2)
        heads = [load(cwd / f"rank{rank}.pt")["disc"] for rank in range(ranks)]
        check(all(furthest(heads[0], other) == 0 for other in heads), "discriminators differ between ranks")
        for stage in (0, 1):
            weights = furthest(runs[1][stage]["model"], runs[ranks][stage]["model"])
            loss = max(abs(a - b) for a, b in zip(runs[1][2 + stage], runs[ranks][2 + stage]))
            check(weights < 1e-3 and loss < 1e-3, f"{ranks} ranks, stage {stage + 1}: weights off by {weights}, losses by {loss}")
            worst[stage] = max(worst.get(stage, 0), loss)
        yield f"1 to 3 ranks: losses of 6 steps within {worst[0]:.0e} (adversarial stage 1), {worst.get(1, 0):.0e} (stage 2)"


def kills(photos, folder, number):
    """`number` SIGKILLs of one of three ranks or of everything, a third of them in the middle of a save."""
    dice, run, total, in_save, lost = random.Random(0), folder / "killed", 0, 0, 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--"]
    command = [*torchrun, ROOT / "train_decoder.py", *DECODER, "--data", photos, "--epochs", 5000, "--save-every", EVERY]
    for kill in range(number):
        process = begin("killed", [*command, "--run", run], folder)
        text = lambda: (folder / "killed.txt").read_text()
        wait_until(lambda: "stage 1  step" in text(), process, "a first step")
        if kill % 3 == 0:
            wait_until(lambda: (run / "rae.pt.tmp").exists(), process, "a save")
        else:
            time.sleep(dice.uniform(0, 3))
        saving = (run / "rae.pt.tmp").exists()
        if kill % 2:
            ranks = [pid for pid in children(process.pid) if "train_decoder" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(dice.choice(ranks), signal.SIGKILL)
            process.wait(timeout=120)                                         # the others end by themselves
            check(process.returncode != 0 and "SIGKILL" in text(), "no message about the dead rank")
        end(process)
        in_save += saving
        saved, logged = load(run / "rae.pt"), [json.loads(line)["step"] for line in open(run / "log.jsonl") if line.endswith("}\n")]
        check(all(x.isfinite().all() for x in saved["model"].values()), "weights that are not finite")
        check(saved["step"] >= total, "an older checkpoint than before")
        lost, total = max(lost, logged[-1] - saved["step"]), saved["step"]
        check(lost <= EVERY, f"{lost} steps lost")
        check(len(list(run.glob("*.tmp"))) <= 1, "temporary files pile up")
        yield f"{kill + 1} kills ({in_save} during a save): at most {lost} steps of {EVERY} lost"
    steps = total + EVERY
    for name in ("killed", "spared"):                                         # to the end; and once without any kill
        launch("train_decoder.py", *command[6:], "--run", folder / name, "--steps", steps, cwd=folder, ranks=3)
    check(not list(run.glob("*.tmp")), "a temporary file is left")
    logged = [json.loads(line)["step"] for line in open(run / "log.jsonl")]
    check([step for step in logged] == list(range(1, steps + 1)) + [steps] * (len(logged) - steps), "a step is missing in the log, or twice")
    apart = furthest(load(run / "rae.pt")["model"], load(folder / "spared/rae.pt")["model"])
    check(apart == 0, f"weights differ by {apart} from those of a run without kills")
    yield f"after {steps} steps the weights are bitwise those of a run without kills"


def two_nodes(photos, folder):
    """The README's two machines, as two agents that meet on loopback; one is killed, both are started again."""
    cwd = folder / "nodes"
    cwd.mkdir()

    def agents(*command):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
        meet = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", endpoint, "--"]
        return [begin(f"node{i}", [*meet, *command], cwd) for i in (0, 1)]

    stage1 = [ROOT / "train_decoder.py", *DECODER, "--data", photos, "--save-every", EVERY, "--run", cwd / "run"]
    stage2 = [ROOT / "train_dit.py", *DIT, "--data", photos, "--save-every", EVERY, "--run", cwd / "run"]
    for number, (name, steps, command) in enumerate([("rae.pt", 12, stage1), ("dit.pt", 12, stage2)], 1):
        nodes = agents(*command, "--epochs", 5000)
        wait_until(lambda: len(list((cwd / "run").glob(name))) and load(cwd / "run" / name)["step"] >= EVERY, nodes[0], "a checkpoint")
        end(nodes[1])
        begun = time.time()
        check(nodes[0].wait(timeout=150) != 0, "the other node ended as if nothing had happened")
        seconds, at = time.time() - begun, load(cwd / "run" / name)["step"]
        yield f"two nodes, stage {number}: one killed, the other ended after {seconds:.0f} s"
        nodes = agents(*command, "--epochs", 5000, "--steps", at + steps)
        for node in nodes:
            check(node.wait(timeout=300) == 0, (cwd / "node0.txt").read_text()[-2000:])
        check(load(cwd / "run" / name)["step"] == at + steps, "not all steps were done")
        yield f"two nodes, stage {number}: started again at step {at}, finished"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    args, begun, said = parser.parse_args(), time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images, _ = Shapes(48).render(torch.arange(40))
        for i, image in enumerate(images):
            (folder / f"photos/class{i % 4}").mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"photos/class{i % 4}/{i}.png")
        photos, failed = folder / "photos", 0
        parts = dict(equivalence=equivalence(photos, folder), kills=kills(photos, folder, args.kills), nodes=two_nodes(photos, folder))
        with tqdm(total=3 + args.kills + 1 + 4) as bar:
            for name, part in parts.items():
                try:
                    for sentence in part:
                        said[next((key for key in (" kills (", " ranks:") if key in sentence), sentence)] = sentence
                        bar.set_postfix_str(sentence)
                        bar.update()
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    failed += 1
                    tqdm.write(f"FAILED, {name}: {error}")
    print("; ".join(said.values()))
    print(f"{failed} of {len(parts)} parts failed, {(time.time() - begun) / 60:.1f} minutes")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

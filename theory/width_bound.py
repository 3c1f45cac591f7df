"""Theorem 1, checked so that a wrong theorem would be caught: a DiT must be as wide as its tokens.

    python theory/width_bound.py            # minutes on two CPU cores, no data; --fast: 20 seconds

A network that ends in g = c + B h, B (n, d), and learns v = W = eps - x has for every single sample
||g - W||^2 >= ||(I - P)(W - c)||^2, P the projector on col(B): its loss is at least the sum of the n - d
smallest eigenvalues of Cov(W) = I + S, S = Cov(x); per dimension (n - d) / n for one data point. Tested are
a plain function of the theorem's class G_d and the project's DiT. Each row says that a number lies in an
interval; negative controls pass through the same function and must lie outside. A DiT that predicts x is
one: its own bound has S in place of I + S (rows "x: ..."). Losses are raw, per dimension, under t ~ U[0,1];
`in` and `out` split them by P. Writes JSON and, with matplotlib, a figure; exit status 1 if a row is not as
it must be. Source: arXiv 2510.11690, Theorem 1; refinements: README.md.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from scipy.integrate import quad
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_dit import LEAST_T, DiT, flow_matching_loss                # noqa: E402

START = "fork" if sys.platform == "linux" else "spawn"                # of processes; fork saves their imports
N = 32                                                                # n, the token dimension
MIXED = [0.6] * 16 + [1e-4] * 16                                      # variances: PCA is wrong
WEIGHT = 2 / LEAST_T - 1                                              # E[w] = 39, w = 1 / max(t, .05)^2
CONTROLS = ("skip network d=16", "untrained DiT d=16", "Gaussian d=16, PCA by hand",         # must fail
            "x: Gaussian d=16, v's choice by hand", "x: Gaussian s=1, full rank by hand")


# Closed forms; s (n,) are the eigenvalues of S, results are sums over the n directions

def theorem(s, d, predict="v"):
    """The bound: the n - d smallest lambda = 1 + s (Ky Fan); if x is predicted, s times E[w]."""
    size = 1 + s if predict == "v" else WEIGHT * s
    return float(np.sort(size)[:max(len(s) - d, 0)].sum())


def residual(s):
    """What nothing predicts of a Gaussian direction: int Var(W | x_t) dt, Var = s / ((1-t)^2 s + t^2)."""
    return math.pi / 2 * np.sqrt(s)


def gain(s):
    """What keeping a Gaussian direction saves; least at s = pi^2 / 16, the middle of the spectrum."""
    return 1 + s - residual(s)


@np.vectorize
def residual_x(s):
    """The same if x is predicted: int w Var(x | x_t) dt, Var = s t^2 / ((1-t)^2 s + t^2)."""
    def at(t):
        return s * (t / max(t, LEAST_T)) ** 2 / ((1 - t) ** 2 * s + t ** 2)
    return quad(at, 0, 1, points=[LEAST_T])[0]


def exact(s, d, pca=False, predict="v"):
    """The minimum for Gaussian x, bias allowed: the n - d smallest gains (pca: variances) are lost. If x is
    predicted, the gain E[w] s - residual_x(s) grows with s: PCA is right."""
    left, saved = (residual(s), gain(s)) if predict == "v" else (residual_x(s), WEIGHT * s - residual_x(s))
    kept_last = np.argsort(s if pca else saved)
    return float(left.sum() + saved[kept_last][:max(len(s) - d, 0)].sum())


def norm_floor(d, n=N):
    """Var(chi_d): what RMSNorm costs on one data point if states fill a round sphere; 0 for d > n."""
    return d - 2 * math.exp(2 * (math.lgamma((d + 1) / 2) - math.lgamma(d / 2))) if d <= n else 0.0


def spectrum(z):
    """Eigenvalues of S, the covariance of tokens z (K, N, n) over data and positions: all share one B."""
    centred = z.flatten(0, 1).double() - z.double().mean((0, 1))      # (K N, n)
    return torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0).numpy()


def searched(s, d, predict="v"):
    """The least loss that L-BFGS finds over A (d, n) for Gaussian x; it knows no closed form.

    The best f is E[W | A x_t], linear: L = tr(I + S) - tr(P M), M = int C A' (A K A')^-1 A C dt with
    C = Cov(W, x_t), K = Cov(x_t); the best P holds the top d eigenvectors of M. predict "x": x in place of W,
    and the weight w in the integrals.
    """
    t, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(100))
    s, t, w = torch.from_numpy(s), (t[:, None] + 1) / 2, w[:, None, None] / 2
    C, all_of_it = t - (1 - t) * s, (1 + s).sum()                     # (T, n) diagonals; a number
    if predict == "x":                                                # on each side of the kink of w
        t = torch.cat([t * LEAST_T, LEAST_T + t * (1 - LEAST_T)])
        w = torch.cat([w * LEAST_T, w * (1 - LEAST_T)]) / t[..., None].clamp(min=LEAST_T) ** 2
        C, all_of_it = (1 - t) * s, WEIGHT * s.sum()
    K = (1 - t) ** 2 * s + t ** 2
    A = torch.randn(d, len(s), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([A], max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        AC = A * C[:, None]                                           # (T, d, n)
        M = (w * AC.mT @ torch.linalg.solve(A * K[:, None] @ A.T, AC)).sum(0)   # (n, n)
        L = all_of_it - torch.linalg.eigvalsh(M)[-d:].sum()
        L.backward()
        return L
    search.step(loss)
    return loss().item()


# Networks

class MLP(nn.Module):
    """g = B f(A x_t, t) in G_d; A = B', since an untied pair can stick where one direction is missing.
    skip=True adds s(t) x_t, a full-rank path outside the theorem: a negative control. predict "x": g is x."""
    velocity = DiT.velocity
    c = 0.0

    def __init__(self, d, skip=False, hidden=128, predict="v"):
        super().__init__()
        self.predict = predict
        self.d, self.skip, self.B = d, skip, nn.Parameter(nn.init.orthogonal_(torch.empty(N, d)))
        self.f = nn.Sequential(nn.Linear(d + 2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                               nn.Linear(hidden, 2 * d + 2))
        nn.init.zeros_(self.f[-1].weight), nn.init.zeros_(self.f[-1].bias)

    def forward(self, x_t, time, y):                                  # x_t (B, 1, n)
        t, z = time.view(-1, 1, 1), x_t @ self.B                      # z (B, 1, d)
        h = self.f(torch.cat([z / (t + 0.3), t, (t + 0.01).log()], 2))
        shift, scale, skip = h.split([self.d, self.d, 2], 2)
        help_f = 1 / (t + 0.02) if self.predict == "v" else 1.0       # with W = (x_t - x) / t
        v = self.velocity((shift + scale * z * help_f) @ self.B.T, x_t, time)
        return v + (skip[..., :1] + skip[..., 1:] / (t + 0.02)) * x_t if self.skip else v


class ByHand(nn.Module):
    """g = c + B B' (best(x_t, t, y) - c), B (n, d) orthonormal: a network whose loss is known."""
    velocity = DiT.velocity

    def __init__(self, B, best, predict="v", c=0.0):
        super().__init__()
        self.B, self.best, self.predict, self.c = B, best, predict, c

    def forward(self, x_t, t, y):
        best = self.best(x_t, t.view(-1, 1, 1), y) - self.c
        return self.velocity(self.c + best @ self.B @ self.B.T, x_t, t)


# Training and measuring

def train(model, draw, steps, lr, batch):
    """AdamW, warm-up, cosine, clipping, weight average; t uniform, the theorem's measure."""
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps)))
    ema = [w.detach().clone() for w in weights]
    for _ in range(steps):
        flow_matching_loss(model, *draw(batch), alpha=1.0, time="uniform").backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        torch._foreach_lerp_(ema, weights, 0.01)
    with torch.no_grad():
        torch._foreach_copy_(weights, ema)


@torch.no_grad()
def measure(model, draw, samples, bins=20, parts=8, claim="v"):
    """draw(B) -> x (B,N,n), y (B,). Returns the raw loss under uniform t, its standard error, its parts in
    and out of the span of B, and the share of samples that violate ||g - W||^2 >= ||(I - P)(W - c)||^2.

    claim "x": g and W are the model's x_hat and x. For the weight w the density of t is w / E[w] and all is
    multiplied by E[w], which has a far smaller standard error."""
    B, c = model.final_layer.linear.parameters() if isinstance(model, DiT) else (model.B, model.c)
    U, size, _ = torch.linalg.svd(B.double(), full_matrices=False)
    U, found = U[:, size > 1e-6 * max(size[0].item(), 1e-6)].float(), []        # columns span col(B)
    weight = WEIGHT if claim == "x" else 1
    for _ in range(parts):
        x, y = draw(samples // parts)
        t, eps = torch.rand(len(x), device=x.device), torch.randn_like(x)
        if claim == "x":                                              # the inverse of int_0^t w / E[w]
            early = t * WEIGHT * LEAST_T ** 2
            t = torch.where(early < LEAST_T, early, 1 / (WEIGHT + 1 - WEIGHT * t))
        W = eps - x                                                   # (B, N, n)
        x_t = torch.lerp(x, eps, t.view(-1, 1, 1))
        g = model(x_t, t, y)
        if claim == "x":
            W, g = x, x_t - t.clamp(min=LEAST_T).view(-1, 1, 1) * g
        error, rest = g - W, W - c
        pieces = error, error @ U @ U.T, rest - rest @ U @ U.T        # g - W, P(g - W), (I - P)(W - c)
        found.append(torch.stack([t, *(weight * e.square().flatten(1).mean(1) for e in pieces)]))
    t, loss, inside, outside = torch.cat(found, 1).double()
    mean = {"loss": loss, "in": inside, "out": outside, "violated": (loss < outside * 0.999 - 1e-5).double()}
    return {key: value.mean().item() for key, value in mean.items()} | {
        "se": loss.std().item() / len(loss) ** 0.5,
        "by_t": [loss[(t * bins).long() == i].mean().item() for i in range(bins)]}


def build(job, x, S):
    """The network of a job, for the points x (K, tokens, n) or Gaussian variances S (n,)."""
    net, d, head = job["net"], job["d"], job.get("head", 0)
    predict = job.get("predict", "v")
    if net == "DiT":                                                  # head dim 4, RoPE's least
        return DiT(4, N, d, job.get("depth", 2), d // 4, head, 1, max(head // 4, 1), num_classes=len(x),
                   predict=predict)
    if net in ("MLP", "skip"):
        return MLP(d, skip=net == "skip", predict=predict)
    if net == "attaining" and predict == "x":                         # PCA of the pooled tokens
        c = x.mean((0, 1))                                            # (n,)
        B = torch.linalg.eigh(torch.cov(x.flatten(0, 1).T))[1][:, -d:]
        return ByHand(B, lambda x_t, t, y: x[y], "x", c)
    if net == "attaining":                                            # x in col(B), f = (A x_t - A x) / t
        B = torch.linalg.qr(torch.randn(N, d))[0]
        x = x.copy_(x @ B @ B.T)
        return ByHand(B, lambda x_t, t, y: (x_t - x) / t)

    # Gaussian: E[W | x_t] or E[x | x_t] in the directions kept
    variances = S.double().numpy()
    kept = np.argsort(-(variances if net == "PCA" else gain(variances)), kind="stable")
    kept = kept[:N if net == "full rank" else d].tolist()

    def best(x_t, t, y):
        covariance = (1 - t) * S if predict == "x" else t - (1 - t) * S
        return covariance / ((1 - t) ** 2 * S + t ** 2) * x_t
    return ByHand(torch.eye(N)[:, kept], best, predict)


def run(job):
    """One network: built, trained, measured. A function of `job`, which holds the seed, and nothing else."""
    began = time.process_time()
    torch.set_num_threads(1), torch.manual_seed(job["seed"])
    net, width, K = job["net"], job.get("head") or job["d"], job.get("points", 1)
    s = np.array(job.get("s", []))                                    # variances if x is Gaussian, else
    x = torch.randn(1, 4 if net == "DiT" else 1, N)                   # one data point (1, tokens, n)
    if K > 1:                                                         # or one per label, then S = I / 2
        k, j = torch.arange(K)[:, None] + 0.5, torch.arange(N) + 1
        x = 0.3 * x + torch.cos(math.pi / K * k * j)[:, None]
    S = torch.tensor(s).float()
    model = build(job, x, S)

    def draw(B):
        y = torch.randint(K, (B,))
        return torch.randn(B, 1, N) * S.sqrt() if len(s) else x[y], y
    if job["steps"]:
        train(model, draw, job["steps"], job.get("lr", 1e-2 if net == "DiT" else 5e-3),
              128 if net == "DiT" else 256)
    predict, samples = job.get("predict", "v"), 1 << (14 if net == "DiT" and "predict" not in job else 16)
    low = (exact(s, width, predict=predict) if len(s) else theorem(spectrum(x), width, predict)) / N
    found = measure(model.eval(), draw, samples, claim=predict)
    if predict == "x":                                                # the theorem does not bound this
        found["as_v"] = measure(model, draw, samples)
    return job | found | {"low": low, "cpu_seconds": round(time.process_time() - began, 1)}


def plan(seed, fast):
    """The runs by name; `allow` is how far above its least possible loss a run may end."""
    norm = {d: norm_floor(d) / N for d in range(1, 64)}
    near = 0.01 * WEIGHT                                              # for losses with the weight w
    x, x40, xs = {"predict": "x"}, {"predict": "x", "points": 40}, {"predict": "x", "s": MIXED}
    table = [  # name, network, d, allow, steps, more; --fast: from "DiT d=16" on
        *((f"DiT d={d}", "DiT", d, norm[d] + (0.035 if d <= 28 else 0.08 if d < 36 else 0.01), 1500, {})
          for d in (40, 36, 32, 28, 24)),
        ("DiT d=8",                    "DiT",  8, norm[8] + 0.035,   1500, {"lr": 5e-3}),
        ("DiT d=16, depth 4",          "DiT",  16, norm[16] + 0.035, 1500, {"depth": 4}),
        ("DiT d=16 + head 40",         "DiT",  16, 0.015,            1500, {"head": 40}),
        ("DiT d=40 + head 16",         "DiT",  40, 0.015,            1500, {"head": 16}),
        ("DiT d=16, 40 points",        "DiT",  16, norm[16] + 0.08,  1500, {"points": 40}),
        *((f"x: DiT d={d}, 40 points", "DiT",  d, near,              1500, x40) for d in (24, 16, 8)),
        *((f"MLP d={d}", "MLP", d, 0.012, 1200, {}) for d in (4, 8, 24, 28, 40)),
        *((f"Gaussian d={d}", "MLP", d, 0.02, 1000, {"s": MIXED}) for d in (8, 16, 24)),
        ("Gaussian s=1, d=32",         "MLP",  32, 0.02,             1000, {"s": [1.0] * N}),
        ("x: Gaussian d=16",           "MLP",  16, 0.1,              1000, xs),
        ("DiT d=16",                   "DiT",  16, norm[16] + 0.035, 1500, {}),
        ("x: DiT d=16",                "DiT",  16, near,             400,  x),
        *((f"MLP d={d}", "MLP", d, 0.012, 1200, {}) for d in (16, 32)),
        ("skip network d=16",          "skip", 16, 0.012,            1200, {}),
        ("untrained DiT d=16",         "DiT",  16, norm[16] + 0.035, 0,    {}),
        ("Gaussian d=16, best by hand", "best", 16, 0.005,           0,    {"s": MIXED}),
        ("Gaussian d=16, PCA by hand", "PCA",  16, 0.02,             0,    {"s": MIXED}),
        ("x: Gaussian d=16, PCA by hand", "PCA", 16, 0.05,           0,    xs),
        ("x: Gaussian s=1, full rank by hand", "full rank", 16, 0.5, 0,    x | {"s": [1.0] * N}),
        ("x: Gaussian d=16, v's choice by hand", "best", 16, 0.05,   0,    xs),
        *((f"attaining g, d={d}", "attaining", d, 0.0, 0, {}) for d in (8, 16, 28)),
        *((f"x: attaining g, d={d}", "attaining", d, 0.0, 0, x40) for d in (8, 16, 28)),
    ]
    names = [row[0] for row in table]
    return {name: dict(name=name, net=net, d=d, allow=allow, steps=steps, seed=seed, **more)
            for name, net, d, allow, steps, more in table[names.index("DiT d=16") if fast else 0:]}


# Checks

VERDICTS = {(True, False): "holds", (False, False): "FAILS",          # (in the interval, control)
            (False, True): "rejected, as it must be", (True, True): "NOT REJECTED"}


def holds(value, low, high, se=0.0):
    """The one check: a loss may be four standard errors below its bound, never more than `allow` above it."""
    return bool(low - 4 * se <= value <= high)


def closed_forms(seed):
    """Rows (what, value, low, high, control) that need no network."""
    torch.manual_seed(seed)
    error = max(abs(quad(lambda t: s / ((1 - t) ** 2 * s + t ** 2), 0, 1, points=[s ** 0.5])[0] - residual(s))
                for s in (1e-4, 0.01, 0.1, 0.617))
    yield "(pi/2) sqrt(s) and quadrature: largest error", error, 0, 1e-8, False
    best = [(min(searched(s, d) for _ in range(3)), s, d) for d in (1, 2, 3, 4)
            for s in (np.array([2.0, 1.2, 0.7, 0.4, 0.1]), np.array([4.0, 0.6, 0.6, 0.3, 0.05]))]
    for pca in (False, True):
        over = min(loss - exact(s, d, pca) for loss, s, d in best)
        yield f"best A found minus {('the exact', 'the PCA')[pca]} minimum, least", over, -1e-6, 1e-3, pca
    over = min(searched(s, d, "x") - exact(s, d, predict="x") for _, s, d in best)
    yield "x: best A found minus the exact minimum", over, -1e-6, 1e-3, False
    x = torch.randn(1 << 16, N)
    flat = math.sqrt(2 / math.pi) * (1 - x[:, 1:].square().sum(1) / (100 * N)).sqrt()
    error = (x[:, 0].abs() - flat).square().mean().item()
    yield "squared error of a flattened sphere, d = 32", error, 0, norm_floor(N), False


def checks(runs, seed):
    """Rows (what, value, low, high, control, run) for all claims whose runs are present."""
    for row in closed_forms(seed):
        yield *row, {}
    for name, r in runs.items():
        if r["net"] == "attaining":                                   # two-sided, in standard errors
            yield f"{name}: deviation in SE", (r["loss"] - r["low"]) / r["se"], -3, 3, False, {}
        else:
            yield name, r["loss"], r["low"], r["low"] + r["allow"], name in CONTROLS, r
    worst = max(r["violated"] for name, r in runs.items() if name not in CONTROLS)
    yield "share of samples below their own bound", worst, 0, 0, False, {}
    yield "  skip network", runs["skip network d=16"]["violated"], 0, 0, True, {}
    yield from checks_x(runs)
    narrow = sorted((r["d"], r["loss"]) for name, r in runs.items() if name.startswith("MLP") and r["d"] < N)
    for d, loss in narrow:
        for change in (1, -1):
            low = (N - d + change) / N
            r = runs[f"MLP d={d}"]
            yield f"MLP d={d}, were it (n - d {'- +'[change + 1]} 1) / n", loss, low, low + 0.012, True, r
    if "DiT d=8" not in runs:                                         # --fast
        return
    slope = N * np.polyfit(*np.array(narrow).T, 1)[0]
    yield "MLP: slope of n loss against d < n", slope, -1.03, -0.97, False, {}
    for other, control in (("DiT d=16, depth 4", False), ("DiT d=24", True)):
        change = runs[other]["loss"] - runs["DiT d=16"]["loss"]
        yield f"{other} minus DiT d=16", change, -0.01, 0.01, control, {}
    for name in ("DiT d=16 + head 40", "DiT d=40 + head 16"):
        low = max(N - runs[name]["d"], 0) / N
        yield f"{name}, by d", runs[name]["loss"], low, low + 0.015, True, runs[name]
    for name, low in (("DiT d=16, 40 points", 0.5), ("Gaussian s=1, d=32", 0.0)):
        yield f"{name}, by (n - d) / n", runs[name]["loss"], low, low + runs[name]["allow"], True, runs[name]


def checks_x(runs):
    """Rows of the networks that predict x: what Theorem 1 says of v must fail, and so must other bounds."""
    honest = runs["DiT d=16"]
    low, as_v = honest["low"], runs["x: DiT d=16"]["as_v"]
    yield "x: DiT d=16, as if it gave v", as_v["loss"], low, low + honest["allow"], True, as_v
    yield "  share of its samples below v's bound", as_v["violated"], 0, 0, True, {}
    for name, r in runs.items():
        if r.get("points") == 40 and r.get("predict") == "x":         # S = I / 2: a channel more or less
            within = 3 * r["se"] if "attaining" in name else r["allow"]
            for change in (1, -1):
                low = r["low"] + change * WEIGHT * 0.5 / N
                yield f"{name}, were d {r['d'] - change}", r["loss"], low - within, low + within, True, r
            low = r["low"] + theorem(np.zeros(N), r["d"]) * WEIGHT / N
            yield f"{name}, with I + S for S", r["loss"], low, low + within, True, r


def pyplot():
    try:
        import matplotlib
    except ImportError:
        return print("no figure: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def figure(runs, path):
    """Loss against width, against time, split by P; the Gaussian."""
    if not (plt := pyplot()):
        return
    fig, ((a, b), (c, e)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    a.plot([0, N, 40], [1, 0, 0], "k-", lw=1, label="Theorem 1: (n - d) / n")
    for net, mark in (("MLP", "o"), ("DiT", "s")):
        sweep = sorted((r for r in runs.values() if r["name"] == f"{net} d={r['d']}"), key=lambda r: r["d"])
        a.plot([r["d"] for r in sweep], [r["loss"] for r in sweep], mark, ms=5, label=net)
        for r in (r for r in sweep if r["d"] in (16, 32)):
            b.plot((np.arange(20) + 0.5) / 20, r["by_t"], ".-", lw=1, label=r["name"])
    others = {"DiT d=16 + head 40", "DiT d=40 + head 16", "skip network d=16", "x: DiT d=16"}
    for name, r in ((name, runs[name]) for name in sorted(others & runs.keys())):
        a.plot(r.get("head", 16), r.get("as_v", r)["loss"], "x", label=name)
    names, inside, outside = zip(*((str(r["d"]), r["in"], r["out"]) for r in sweep))
    c.bar(names, outside, color="0.75", label="out of the span of B")
    c.bar(names, inside, bottom=outside, color="C1", label="in it")
    for label, style, form in (("theorem", "k-", theorem), ("exact minimum", "C0-", exact),
                               ("PCA", "r--", lambda s, d: exact(s, d, pca=True))):
        e.plot([form(np.array(MIXED), d) / N for d in range(N + 1)], style, lw=1, label=label)
    trained = [r for name, r in runs.items() if name in [f"Gaussian d={d}" for d in (8, 16, 24)]]
    e.plot([r["d"] for r in trained], [r["loss"] for r in trained], "o", label="trained")
    b.set_ylim(0, 0.7)
    for axis, title, x in ((a, "one data point, n = 32", "width d, or the head's"), (b, "at each t", "t"),
                           (c, "the DiT's loss", "width d"), (e, "Gaussian s = .6, .0001", "width d")):
        axis.set(title=title, xlabel=x, ylabel="loss per dimension"), axis.legend(fontsize=8, frameon=False)
    fig.savefig(path, dpi=80)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="only some of the runs")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    parser.add_argument("--out", type=Path, default=Path("out/theory"), help="folder for JSON and figure")
    args, began = parser.parse_args(argv), time.time()
    torch.set_num_threads(1)
    jobs, rows = plan(args.seed, args.fast), []
    with mp.get_context(START).Pool(min(2, os.cpu_count())) as pool:  # one thread each: the same numbers
        done = list(tqdm(pool.imap_unordered(run, jobs.values()), "runs", len(jobs), disable=None))
    runs = {r["name"]: r for r in sorted(done, key=lambda r: (r["net"], r["d"], r["name"]))}
    print(f"{'':44s} {'value':>8s}     SE     in    out  claimed interval   verdict")
    for what, value, low, high, control, r in checks(runs, args.seed):
        ok = holds(value, low, high, r.get("se", 0.0))
        numbers = "".join(f" {r[key]:6.4f}" if r else " " * 7 for key in ("se", "in", "out"))
        print(f"{what:44s} {value:8.4f}{numbers}  [{low:7.4f}, {high:7.4f}] {VERDICTS[ok, control]}")
        rows.append({"what": what, "value": float(value), "low": float(low), "high": float(high),
                     "control": control, "passed": ok != control})
    failed, seconds = sum(not row["passed"] for row in rows), round(time.time() - began)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "theory_width_bound.json"
    path.write_text(json.dumps({"seed": args.seed, "seconds": seconds, "rows": rows, "runs": runs}))
    figure(runs, path.with_suffix(".png"))
    print(f"{len(rows) - failed} of {len(rows)} rows ({sum(row['control'] for row in rows)} are controls)"
          f" are as they must be; {seconds} s; {path}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

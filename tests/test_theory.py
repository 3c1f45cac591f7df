"""theory/: the closed forms, the negative controls and short runs; the full tables are the scripts' own."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import noise_shift
import width_bound
from train_dit import DiT, flow_matching_loss
from width_bound import MIXED, exact, gain, holds, measure, norm_floor, run, spectrum, theorem

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_theorem_sums_the_smallest_eigenvalues_and_is_n_minus_d_for_one_point():
    assert theorem(np.array([3.0, 0.0, 1.0, 2.0]), 2) == 1 + 2                 # 1 + s of the two smallest s
    assert [theorem(np.zeros(8), d) for d in (0, 3, 8, 9)] == [8, 5, 0, 0]


def test_gaussian_minimum_is_the_figure_worked_out_by_hand():
    s = np.array(MIXED)
    assert theorem(s, 16) / 32 == pytest.approx(0.50005)
    assert exact(s, 16) / 32 == pytest.approx(0.8079, abs=1e-4)
    assert exact(s, 16, pca=True) / 32 == pytest.approx(1.1084, abs=1e-4)
    assert exact(np.ones(4), 4) / 4 == pytest.approx(math.pi / 2)              # wide enough, and yet not 0


def test_the_direction_least_worth_keeping_has_variance_pi_squared_over_16():
    s = np.linspace(0, 4, 400_001)
    assert s[gain(s).argmin()] == pytest.approx(math.pi ** 2 / 16, abs=1e-4)
    assert gain(s).min() == pytest.approx(1 - math.pi ** 2 / 16, abs=1e-9)


def test_closed_forms_agree_with_quadrature_and_with_a_search_that_does_not_know_them():
    rows = list(width_bound.closed_forms(seed=1))
    assert len(rows) == 5
    for what, value, low, high, control in rows:
        assert holds(value, low, high) != control, (what, value)


def test_the_fixed_norm_costs_the_variance_of_a_chi_variable():
    length = torch.randn(1 << 18, 12, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    assert norm_floor(12) == pytest.approx(length.var().item(), abs=0.01)
    assert norm_floor(1) == pytest.approx(1 - 2 / math.pi) and norm_floor(33, n=32) == 0


def test_spectrum_pools_data_and_token_positions():
    u, p = torch.randn(50, 1, 6), torch.randn(1, 9, 6)
    S = np.cov((u + p).reshape(-1, 6).double().T, ddof=0)
    np.testing.assert_allclose(spectrum(u + p), np.linalg.eigvalsh(S), atol=1e-9)
    assert spectrum(p).sum() > 0                                      # one data point, and still not 0


@pytest.mark.parametrize("d", [4, 20])
def test_the_network_written_by_hand_attains_the_bound(d):
    r = run(dict(net="attaining", d=d, seed=3, steps=0))
    assert abs(r["loss"] - (32 - d) / 32) < 4 * r["se"] and r["violated"] == 0
    assert r["in"] < 1e-3


def test_keeping_the_middle_of_the_spectrum_is_worse_than_the_closed_form_says():
    best, by_variance = (run(dict(net=net, d=16, seed=0, steps=0, s=MIXED)) for net in ("best", "PCA"))
    assert abs(best["loss"] - exact(np.array(MIXED), 16) / 32) < 4 * best["se"]
    assert abs(by_variance["loss"] - exact(np.array(MIXED), 16, pca=True) / 32) < 4 * by_variance["se"]


def test_a_trained_mlp_meets_the_bound_and_a_skip_breaks_it():
    """At the same width, with the same training: 0.5 is out of reach without the skip, and nothing to it."""
    honest, skip = (run(dict(net=net, d=16, seed=2, steps=600)) for net in ("MLP", "skip"))
    assert holds(honest["loss"], 0.5, 0.53, honest["se"]) and honest["violated"] == 0
    assert honest["in"] + honest["out"] == pytest.approx(honest["loss"], abs=1e-4)
    assert not holds(skip["loss"], 0.5, 0.53, skip["se"]) and skip["violated"] > 0.9
    for wrong in (17 / 32, 15 / 32):
        assert not holds(honest["loss"], wrong, wrong + 0.012, honest["se"])


def test_no_dit_is_below_its_bound_whatever_its_weights():
    """Random weights everywhere: the per-sample inequality concerns the output layer's span and no other."""
    torch.manual_seed(0)
    model = DiT(4, 32, 8, 1, 2, head=12, head_depth=1, head_heads=3, num_classes=1).requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(0.3 * torch.randn_like(weight))
    r = measure(model, lambda B: (torch.ones(B, 4, 32), torch.zeros(B, dtype=torch.long)), 1 << 12)
    assert r["violated"] == 0 and r["loss"] > r["out"] > 20 / 32 - 4 * r["se"]
    model.final_layer.forward = lambda x, c: 20 * torch.ones(len(x), 4, 32)     # a foreign output is noticed
    r = measure(model, lambda B: (torch.zeros(B, 4, 32), torch.zeros(B, dtype=torch.long)), 1 << 12)
    assert r["in"] + r["out"] != pytest.approx(r["loss"], rel=0.1)


def test_a_run_is_a_function_of_its_seed():
    a, b, c = (run(dict(net="MLP", d=8, seed=seed, steps=5))["loss"] for seed in (0, 0, 1))
    assert a == b != c


def test_noise_shift_checks_hold_and_their_controls_are_rejected():
    rows = list(noise_shift.checks())
    assert sum(control for *_, control in rows) == 4
    for what, value, low, high, control in rows:
        assert holds(value, low, high) != control, (what, value)


def test_overfit_runs_on_latents_and_reports_the_pooled_floor():
    import overfit
    z = torch.randn(3, 16, 32)
    r = overfit.run(dict(images=3, width=32, depth=1, seed=0, steps=2, lr=1e-3, batch=4, z=z))
    assert r["sample"].shape == z.shape and r["naive"] == 0 and r["floor"] == 0
    assert r["loss"] > 0.5 and not r["violated"]


# x-prediction

def test_the_weight_of_x_prediction_has_mean_39():
    def weight(t):
        return 1 / max(t, 0.05) ** 2
    mean, _ = width_bound.quad(weight, 0, 1, points=[0.05])
    assert mean == pytest.approx(39) and mean == pytest.approx(width_bound.WEIGHT)
    assert theorem(np.array([3.0, 0.5, 1.0, 2.0]), 2, "x") == pytest.approx(39 * (0.5 + 1.0))
    assert theorem(np.array([2.0, 0.0, 0.0]), 1, "x") == 0                     # the rank of x is enough


def test_a_gaussian_x_is_predicted_best_by_pca_where_v_drops_the_middle():
    s = np.array(MIXED)
    a = 0.05                                                                  # beyond it sqrt(s) atan(t / ((1-t) sqrt(s)))
    late = math.sqrt(0.6) * (math.pi / 2 - math.atan(a / (1 - a) / math.sqrt(0.6)))
    early, _ = width_bound.quad(lambda t: 400 * 0.6 * t ** 2 / ((1 - t) ** 2 * 0.6 + t ** 2), 0, a)
    assert float(width_bound.residual_x(0.6)) == pytest.approx(early + late, rel=1e-6)
    for d in (4, 16, 24):
        assert exact(s, d, predict="x") == pytest.approx(exact(s, d, pca=True, predict="x"))
        assert exact(s, d, predict="x") > theorem(s, d, "x")                  # x_t does not tell all
    assert exact(s, 16) < exact(s, 16, pca=True)

    pca, middle = (run(dict(net=net, d=16, seed=0, steps=0, s=MIXED, predict="x")) for net in ("PCA", "best"))
    assert abs(pca["loss"] - exact(s, 16, predict="x") / 32) < 4 * pca["se"]
    assert middle["loss"] > 10 * pca["loss"]


@pytest.mark.parametrize("d", [8, 28])
def test_one_picture_per_label_attains_the_bound_of_x_prediction(d):
    r = run(dict(net="attaining", d=d, seed=3, steps=0, predict="x", points=40))
    assert r["low"] == pytest.approx(39 * (32 - d) / 64, abs=1e-3)          # S = I / 2
    assert abs(r["loss"] - r["low"]) < 4 * r["se"] < 39 / 64                  # less than a channel
    assert r["violated"] == 0 and r["in"] < 1e-3


def test_the_weighted_loss_is_the_projects_own():
    """`measure` draws t by the weight; training draws it uniformly and weighs."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, 32)
    model = width_bound.ByHand(torch.eye(32)[:, :20], lambda x_t, t, y: 0.9 * x, "x")

    def draw(B):
        return x.expand(B, 1, 32), torch.zeros(B, dtype=torch.long)
    own = flow_matching_loss(model, *draw(1 << 17), alpha=1.0, time="uniform").item()
    assert measure(model, draw, 1 << 10, claim="x")["loss"] == pytest.approx(own, rel=0.03)


def test_no_dit_that_predicts_x_is_below_its_own_bound_and_many_samples_are_below_the_other():
    torch.manual_seed(0)
    model = DiT(4, 32, 8, 1, 2, head=12, head_depth=1, head_heads=3, num_classes=1, predict="x")
    for weight in model.requires_grad_(False).parameters():
        weight.copy_(0.1 * torch.randn_like(weight))
    points = torch.randn(500, 4, 32)

    def draw(B):
        return points[torch.randint(500, (B,))], torch.zeros(B, dtype=torch.long)
    r = measure(model, draw, 1 << 12, claim="x")
    assert r["violated"] == 0
    assert r["loss"] > r["out"] > theorem(spectrum(points), 12, "x") / 32 - 4 * r["se"]
    assert measure(model, draw, 1 << 12)["violated"] > 0.05


def test_a_narrow_dit_learns_a_picture_if_it_predicts_x():
    """Width 16 of 32, the same training: the check that v passes rejects x."""
    v, x = (run(dict(net="DiT", d=16, seed=0, steps=400, predict=predict)) for predict in "vx")
    assert holds(v["loss"], 0.5, 1.0, v["se"]) and v["violated"] == 0
    as_v = x["as_v"]
    assert not holds(as_v["loss"], 0.5, 1.0, as_v["se"]) and as_v["violated"] > 0.9
    assert x["low"] < 1e-12 and holds(x["loss"], x["low"], 0.01 * 39, x["se"])   # 4 tokens: rank 3


@pytest.mark.parametrize("script", ["width_bound.py", "overfit.py", "noise_shift.py"])
def test_scripts_start_from_the_root(script, tmp_path):
    options = ("--out", str(tmp_path)) if script == "noise_shift.py" else ("--help",)
    command = [sys.executable, f"theory/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rejected, as it must be" in done.stdout or "--out" in done.stdout

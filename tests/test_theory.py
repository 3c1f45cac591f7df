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
from train_dit import DiT
from width_bound import MIXED, exact, gain, holds, measure, norm_floor, residual, run, spectrum, theorem

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
    assert len(rows) == 4
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


@pytest.mark.parametrize("script", ["width_bound.py", "overfit.py", "noise_shift.py"])
def test_scripts_start_from_the_root(script, tmp_path):
    options = ("--out", str(tmp_path)) if script == "noise_shift.py" else ("--help",)
    command = [sys.executable, f"theory/{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rejected, as it must be" in done.stdout or "--out" in done.stdout

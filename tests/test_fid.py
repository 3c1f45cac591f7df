"""fid.py against closed forms, brute force, and golden figures of an independent Inception."""
import hashlib
import io
import json
import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torchvision.models import Inception3

import fid
from assets import probe
from assets.shapes import Shapes
from conftest import ENVIRONMENT, ROOT, as_it_was, inside, launch
from rae import (RAE, UserError, center_crop, download, evenly, load_lpips, open_val, psnr, read_image, save_checkpoint,
                 ssim)

HERE = Path(__file__).parent


# Frechet distance

def gaussian(n, dim=64, seed=0, scale=1.0):
    """Features whose covariance has eigenvalues over 12 orders of magnitude, and rank n - 1 when n <= dim."""
    rng = np.random.RandomState(seed)
    mix = rng.standard_normal((dim, dim)) * np.logspace(0, -6, dim)
    return scale * rng.standard_normal((n, dim)) @ mix + rng.standard_normal(dim)


@pytest.mark.parametrize("n", [1000, 30])
def test_frechet_distance_is_scipys_whether_or_not_there_are_fewer_samples_than_dimensions(n):
    a, b = fid.moments(gaussian(n, seed=1)), fid.moments(gaussian(n, seed=2, scale=1.3))
    root = np.trace(scipy.linalg.sqrtm(a[1] @ b[1])).real
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * root
    assert fid.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-3)
    assert fid.frechet_distance(*b, *a) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [1000, 30, 2])
def test_frechet_distance_of_identical_moments_is_zero(n):
    a = fid.moments(gaussian(n))
    assert 0 <= fid.frechet_distance(*a, *a) <= 1e-6 * np.trace(a[1])


def test_frechet_distance_at_equal_covariances_is_the_squared_distance_of_the_means():
    mu, sigma = fid.moments(gaussian(500))
    shift = np.linspace(-1, 1, len(mu))
    assert fid.frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx((shift ** 2).sum(), rel=1e-6)


def test_frechet_distance_of_commuting_covariances_is_that_of_their_standard_deviations():
    q = np.linalg.qr(np.random.RandomState(0).standard_normal((20, 20)))[0]
    s1, s2 = np.linspace(0, 2, 20), np.linspace(3, 0, 20)                     # singular, both
    zero = np.zeros(20)
    found = fid.frechet_distance(zero, q * s1 ** 2 @ q.T, zero, q * s2 ** 2 @ q.T)
    assert found == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-6)


def test_frechet_distance_of_a_point_and_a_gaussian_is_finite_and_the_trace():
    mu, sigma = fid.moments(gaussian(500))
    assert fid.frechet_distance(mu, np.zeros_like(sigma), mu, sigma) == pytest.approx(np.trace(sigma))


def test_frechet_distance_refuses_nan_and_other_dimensions():
    mu, sigma = np.zeros(3), np.eye(3)
    for bad in ((mu + np.nan, sigma), (mu, np.full((3, 3), np.inf)), (np.zeros(4), np.eye(4))):
        with pytest.raises(UserError, match="finite and of one dimension"):
            fid.frechet_distance(mu, sigma, *bad)


@pytest.mark.parametrize("sigma", [-np.eye(2), np.diag([1, -1e-3]), np.array([[1.0, 2], [2, 1]])])
def test_a_matrix_that_is_no_covariance_is_no_perfect_score(sigma):
    zero = np.zeros(2)
    for pair in ((zero, sigma, zero, np.eye(2)), (zero, np.eye(2), zero, sigma)):
        with pytest.raises(UserError, match="eigenvalues from .* none may be negative"):
            fid.frechet_distance(*pair)


@pytest.mark.parametrize("n", [1000, 30])
def test_a_covariance_that_was_rounded_to_float32_is_still_one(n):
    a, b = fid.moments(gaussian(n, seed=1)), fid.moments(gaussian(n, seed=2, scale=1.3))
    rounded = [x.astype(np.float32) for x in (*a, *b)]
    turned = np.linalg.qr(np.random.RandomState(0).standard_normal((64, 64)))[0]
    turned = (turned * np.logspace(0, -12, 64) @ turned.T).astype(np.float32)
    assert np.linalg.eigvalsh(turned.astype(np.float64))[0] < -1e-9       # what rounding does to zeros
    assert fid.frechet_distance(*rounded) == pytest.approx(fid.frechet_distance(*a, *b), rel=1e-5)
    zero = np.zeros(64)
    assert fid.frechet_distance(zero, turned, zero, 4 * turned) == pytest.approx(np.trace(turned), rel=1e-4)


def test_moments_are_numpys_in_float64_even_for_float32_features_far_from_zero():
    x = (np.random.RandomState(0).standard_normal((9000, 5)) + 1000).astype(np.float32)
    mu, sigma = fid.moments(torch.from_numpy(x))
    np.testing.assert_allclose(mu, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)


# The network

def test_tf1_resize_of_a_ramp_starts_at_its_start_and_stops_at_its_end():
    for h, w in [(32, 64), (299, 299), (512, 300)]:
        rows, columns = torch.arange(h).float(), torch.arange(w).float()
        image = (rows[:, None] + 2 * columns)[None, None]
        y = torch.minimum(torch.arange(299) * h / 299, torch.tensor(h - 1.0))      # no half-pixel offset
        x = torch.minimum(torch.arange(299) * w / 299, torch.tensor(w - 1.0))
        torch.testing.assert_close(fid.resize_tf1(image)[0, 0], y[:, None] + 2 * x, rtol=1e-5, atol=1e-4)


def random_weights(net):
    """Weights every numpy makes alike, of a scale that keeps all layers alive."""
    rng, state = np.random.RandomState(0), {}
    for key, value in sorted(net.state_dict().items()):
        if value.ndim:
            x = rng.standard_normal(tuple(value.shape)).astype(np.float32)
            if x.ndim == 4:
                x *= (2 / np.prod(x.shape[1:])) ** 0.5
            elif x.ndim == 2:
                x *= 0.03
            else:
                x = 1 + 0.2 * np.tanh(x) if key.endswith(("running_var", "weight")) else x * 0.1
            state[key] = torch.from_numpy(np.asarray(x, np.float32))
    return state


def test_inception_features_and_bias_free_logits_are_those_of_an_independent_implementation():
    # The golden figures are torch-fidelity 0.4.0's on these weights and images; pytorch-fid 0.3.0 agrees.
    golden = np.load(HERE / "golden" / "fid_inception.npz")
    rng = np.random.RandomState(1)
    net = fid.Inception(random_weights(Inception3(num_classes=1008, aux_logits=False, init_weights=False)))
    for h, w in [(32, 32), (64, 48), (256, 256), (299, 299), (512, 512)]:
        y, x = np.mgrid[:h, :w] / max(h, w)
        waves = np.sin(7 * x[..., None] + rng.rand(3) * 6), np.cos(5 * y[..., None] * rng.rand(3) * 3)
        image = 127 + 60 * waves[0] + 60 * waves[1] + 30 * rng.standard_normal((h, w, 3))
        image = np.clip(image, 0, 255).round().astype(np.uint8)
        assert image.astype(np.int64).sum() == golden[f"checksum_{h}x{w}"]
        found = net(torch.from_numpy(image).permute(2, 0, 1)[None])
        for value, name in zip(found, ("features", "logits")):
            expected = golden[f"{name}_{h}x{w}"]
            assert np.linalg.norm(value[0].numpy() - expected) < 1e-4 * np.linalg.norm(expected), (name, h, w)


def test_inception_refuses_foreign_weights_and_float_images():
    with pytest.raises(UserError, match="Unexpected key.*conv1"):
        fid.Inception({"conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="uint8"):
        fid.Inception("random")(torch.zeros(1, 3, 32, 32))


def test_without_the_inception_weights_one_sentence_names_the_file_and_the_flag(monkeypatch, tmp_path):
    no_network(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="pt_inception-2015-12-05-6726825d.pth.*--inception-weights") as error:
        fid.Inception()
    assert "\n" not in str(error.value)


# Other metrics on features

def test_inception_score_is_one_for_equal_predictions_and_the_number_of_certain_classes():
    assert fid.inception_score(torch.randn(1, 1008).expand(100, -1)) == pytest.approx(1)
    assert fid.inception_score(100 * torch.eye(7).repeat(30, 1), splits=3) == pytest.approx(7)


def test_inception_score_is_the_mean_over_consecutive_splits():
    certain = 100 * torch.eye(4).repeat_interleave(10, 0)                     # sorted by class
    assert fid.inception_score(certain, splits=4) == pytest.approx(1)
    assert fid.inception_score(certain, splits=2) == pytest.approx(2)
    assert fid.inception_score(certain, splits=1) == pytest.approx(4)
    certain = 100 * torch.eye(20).repeat_interleave(5, 0)
    assert fid.inception_score(certain) == pytest.approx(2)                   # ADM's ten splits


@pytest.mark.parametrize("block", [1, 500, 2 ** 25])
def test_precision_and_recall_are_those_of_brute_force_for_any_block(block):
    torch.manual_seed(0)
    real, fake = torch.randn(150, 8) + 100, 0.9 * torch.randn(90, 8) + 100.5

    def radius(x, i):
        return sorted((x[i] - x[j]).double().norm().item() for j in range(len(x)) if j != i)[2]

    distance = torch.tensor([[(a - b).double().norm().item() for b in fake] for a in real])       # (150, 90)
    within_real = distance <= torch.tensor([radius(real, i) for i in range(len(real))])[:, None]
    within_fake = distance <= torch.tensor([radius(fake, i) for i in range(len(fake))])
    expected = within_real.any(0).double().mean().item(), within_fake.any(1).double().mean().item()
    assert 0.2 < expected[0] < 0.98 and 0.2 < expected[1] < 0.98 and expected[0] != expected[1]
    assert fid.precision_recall(real, fake, block=block) == pytest.approx(expected)


def test_precision_and_recall_do_not_depend_on_where_the_features_are():
    torch.manual_seed(0)
    real, fake = torch.randn(150, 8), 0.9 * torch.randn(90, 8) + 0.5
    there = fid.precision_recall(real + 5000, fake + 5000)                    # squares of 10^8 would cancel
    assert there == pytest.approx(fid.precision_recall(real, fake), abs=0.02)


def test_samples_of_one_mode_are_precise_and_recall_that_mode():
    torch.manual_seed(0)
    real = torch.cat([torch.randn(200, 4), torch.randn(200, 4) + 100])
    precision, recall = fid.precision_recall(real, torch.randn(200, 4))
    assert precision > 0.9 and 0.4 < recall <= 0.5


def test_linear_probe_reaches_the_best_possible_accuracy_of_two_gaussians():
    torch.manual_seed(0)
    labels = torch.arange(20_000) % 2
    x = torch.randn(20_000, 6)
    x[:, 0] += 2 * labels                                                     # 2 standard deviations apart
    x = x * torch.tensor([1e-4, 1, 1, 1, 1, 1e3]) + 5                         # scales must not matter
    top1 = probe.linear_probe(x[:10_000], labels[:10_000], x[10_000:], labels[10_000:])
    assert top1 == pytest.approx(torch.special.ndtr(torch.tensor(1.0)).item(), abs=0.01)


# Pairs of images

def test_psnr_is_that_of_a_constant_error_per_image():
    a = torch.rand(3, 3, 16, 16) / 2
    b = a + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40, 100]).double(), rtol=1e-4, atol=0)


def test_ssim_of_constant_images_is_the_luminance_term_and_of_identical_ones_1():
    a, b = torch.full((1, 3, 16, 20), 0.2), torch.full((1, 3, 16, 20), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2 ** 2 + 0.6 ** 2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(ssim(noise := torch.rand(2, 3, 32, 32), noise), torch.ones(2).double())


def test_ssim_of_one_window_is_the_formula_with_gaussian_weights():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 11, 11), torch.rand(2, 3, 11, 11)
    g = np.exp(-(np.arange(11) - 5) ** 2 / 4.5)
    w = np.outer(g, g) / g.sum() ** 2
    for found, image, other in zip(ssim(a, b), a.double().numpy(), b.double().numpy()):
        expected = []
        for p, q in zip(image, other):
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + 1e-4) / (mp ** 2 + mq ** 2 + 1e-4)
            expected.append(luminance * (2 * c + 9e-4) / (vp + vq + 9e-4))
        assert found.item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_lpips_is_its_formula_on_normalised_features_of_both_images():
    torch.manual_seed(0)
    network, (a, b) = load_lpips(vgg="random"), torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188])                            # ImageNet's, for [-1, 1]
    scale = torch.tensor([0.458, 0.448, 0.450])
    maps = [network.net((x - shift.view(3, 1, 1)) / scale.view(3, 1, 1)) for x in (a, b)]
    expected = 0
    for p, q, linear in zip(*maps, network.lins):
        unit = lambda x: x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        expected = expected + F.conv2d((unit(p) - unit(q)).square(), linear.model[1].weight).mean((2, 3))
    torch.testing.assert_close(network(a, b).flatten(), expected[:, 0], rtol=1e-4, atol=1e-7)
    assert network(a, a).abs().max() == 0 and not any(p.requires_grad for p in network.parameters())


def test_lpips_weighs_its_small_differences_in_fp32_under_autocast():
    torch.manual_seed(0)
    network, (a, b) = load_lpips(vgg="random"), torch.rand(2, 1, 3, 32, 32) * 2 - 1
    seen = []

    def look(layer, inputs, output):
        seen.append((inputs[0].dtype, output.dtype, torch.is_autocast_enabled("cpu")))

    for linear in network.lins:
        linear.model[-1].register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(a, b).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")                               # elsewhere it stays on
    assert seen == [(torch.float32, torch.float32, False)] * 5


def test_lpips_takes_the_published_vgg_file_and_refuses_others(tmp_path):
    from torchvision.models import vgg16
    torch.manual_seed(0)
    state = vgg16(weights=None).state_dict()
    state = {key: value for key, value in state.items() if key.startswith("features.")}
    torch.save(state | {"classifier.0.bias": torch.zeros(2)}, tmp_path / "vgg.pth")
    network = load_lpips(vgg=tmp_path / "vgg.pth")
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(network.net(x)[4], vgg16_features(state, x))
    torch.save({key: value for key, value in state.items() if key != "features.7.bias"}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="Missing key.*slice2.7.bias"):
        load_lpips(vgg=tmp_path / "vgg.pth")


def vgg16_features(state, x):
    """The last map of LPIPS: VGG16's thirteen convolutions, a pooling before the 3rd, 5th, 8th, 11th."""
    for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        x = F.max_pool2d(x, 2) if i in (5, 10, 17, 24) else x
        x = F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1).relu()
    return x


def test_without_vgg_one_sentence_names_the_file_and_the_flag(monkeypatch, tmp_path):
    no_network(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="vgg16-397923af.pth.*--lpips-vgg"):
        load_lpips()


# The program

def pictures(n, seed=0, side=32):
    """Random coarse patterns, distinct."""
    coarse = np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, 1).repeat(side // 4, 2)


TINY = ["--features", "tiny", "--encoder-weights", "random"]                  # nothing to download


def no_network(monkeypatch, folder):
    """Nothing is downloaded, and nothing was before."""
    def refuse(*args, **options):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "cache"))


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """fid.py with these arguments -> its JSON; no process is started, and no weights are downloaded."""
    no_network(monkeypatch, tmp_path)
    return lambda *arguments: json.loads(inside("fid.py", *arguments, cwd=tmp_path).splitlines()[-1])


@pytest.fixture
def no_work(monkeypatch):
    """The long work must not begin."""
    monkeypatch.setattr(fid, "per_image", lambda *args: pytest.fail("the work began"))


def said(result):
    return " ".join(result["warnings"])


def figures(result):
    return [result[key] for key in ("fd", "precision", "recall")]


@pytest.fixture
def pair(tmp_path):
    """Generated images in an .npz, a reference in a folder of PNGs."""
    np.savez(tmp_path / "generated.npz", arr_0=pictures(203))
    (tmp_path / "reference").mkdir()
    for i, image in enumerate(pictures(150, seed=1) // 8 * 8):
        Image.fromarray(image).save(tmp_path / "reference" / f"{i:03}.png")
    return tmp_path / "generated.npz", tmp_path / "reference"


def test_the_same_images_from_an_npz_and_from_a_folder_are_at_distance_zero(judge, tmp_path):
    np.savez_compressed(tmp_path / "images.npz", arr_0=pictures(120))
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pictures(120)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03}.png")
    result = judge(tmp_path / "images.npz", tmp_path / "folder", *TINY)
    assert 0 <= result["fd"] < 1e-6 and result["precision"] == result["recall"] == 1
    assert result["n"] == result["reference_n"] == 120


def test_no_figure_depends_on_the_batch_size(judge, pair):
    results = [judge(*pair, *TINY, "--batch", batch) for batch in (7, 64, 1000)]
    assert results[0]["fd"] > 0.1 and 0 < results[0]["precision"] < 1
    for other in results[1:]:
        assert figures(other) == pytest.approx(figures(results[0]), rel=1e-4)


def test_no_figure_depends_on_the_number_of_ranks_even_if_one_gets_no_batch(judge, pair):
    alone = judge(*pair, *TINY, "--batch", 160)                               # two batches, and one
    lines = launch("fid.py", *pair, *TINY, "--batch", 160, cwd=pair[1], ranks=2).splitlines()
    together, = (json.loads(line) for line in lines if line.startswith("{"))  # one rank speaks
    assert figures(together) == pytest.approx(figures(alone), rel=1e-5)
    assert {**together, "fd": 0} == {**alone, "fd": 0}


def tokens(images, rae=None):
    """float images (B,3,H,W) in [0,1] -> mean-pooled tokens of the bundled encoder."""
    rae = rae or RAE("tiny", "tiny", 32).load_encoder().eval()
    return rae.tokens(images).mean(1)


def as_batch(images):
    """uint8 images (N,H,W,3) -> float (N,3,H,W) in [0,1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_the_judges_figures_of_samples_are_those_of_direct_calls(judge, tmp_path):
    fake, real = pictures(70), pictures(110, seed=1) // 8 * 8
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    np.savez(tmp_path / "real.npz", arr_0=real)
    result = judge("fake.npz", "real.npz", "--features", "tiny")
    fake, real = tokens(as_batch(fake)), tokens(as_batch(real))
    expected = fid.frechet_distance(*fid.moments(fake), *fid.moments(real))
    assert result["fd"] == pytest.approx(expected, rel=1e-4)
    precision, recall = fid.precision_recall(real, fake)
    assert precision != recall
    assert (result["precision"], result["recall"]) == pytest.approx((precision, recall), abs=0.02)
    assert (result["n"], result["reference_n"], result["features"]) == (70, 110, "tiny")
    assert result["reference"] == "real.npz"


def test_the_judge_takes_features_and_logits_of_inception(judge, tmp_path):
    state = random_weights(Inception3(num_classes=1008, aux_logits=False, init_weights=False))
    state["fc.weight"] *= 50                                                  # sure of their classes
    torch.save(state, tmp_path / "weights.pth")
    sides = pictures(12), pictures(5, seed=1)
    np.savez(tmp_path / "fake.npz", arr_0=sides[0])
    np.savez(tmp_path / "real.npz", arr_0=sides[1])
    result = judge("fake.npz", "real.npz", "--inception-weights", "weights.pth")
    network = fid.Inception(state)
    (fake, logits), (real, _) = (network(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in sides)
    expected = fid.frechet_distance(*fid.moments(fake), *fid.moments(real))
    assert expected > 1 and result["fid"] == pytest.approx(expected, rel=1e-3)
    expected = fid.inception_score(logits)
    assert expected > 1.01 and result["inception_score"] == pytest.approx(expected, rel=1e-3)
    assert "fd" not in result and "2048 dimensions" in said(result)


def test_the_inception_score_needs_no_reference(judge, tmp_path, monkeypatch):
    torch.manual_seed(0)
    features, logits = torch.randn(30, 2048), 5 * torch.randn(30, 1008)
    monkeypatch.setattr(fid, "per_image", lambda *args: torch.cat([features, logits], 1))
    monkeypatch.setattr(fid, "Inception", nn.Identity)
    np.savez(tmp_path / "fake.npz", arr_0=pictures(30))
    alone = judge("fake.npz")
    assert alone["inception_score"] == fid.inception_score(logits) and "fid" not in alone
    assert alone["reference"] is alone["reference_n"] is alone["reference_sha256"] is None


def test_precision_and_recall_take_as_many_real_images_as_adms_file_has(judge, tmp_path, monkeypatch):
    np.savez(tmp_path / "fake.npz", arr_0=pictures(5))
    np.savez(tmp_path / "real.npz", arr_0=pictures(6))
    torch.manual_seed(0)
    sides = [torch.randn(500, 96), torch.randn(10_500, 96)]                   # of GENERATED, of REFERENCE
    calls = iter(sides)
    monkeypatch.setattr(fid, "per_image", lambda *args: next(calls))
    seen = []
    monkeypatch.setattr(fid, "precision_recall", lambda *args: seen.append(args) or (0, 0))
    judge("fake.npz", "real.npz", *TINY)
    (real, fake), = seen
    some = np.random.RandomState(0).permutation(10_500)[:10_000]
    assert torch.equal(real, sides[1][some]) and torch.equal(fake, sides[0])


def test_a_judge_computes_in_fp32(judge, tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", arr_0=pictures(5))
    seen = []

    def look(*args):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return torch.zeros(5, 96)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(fid, "per_image", look)
    judge("images.npz", *TINY)
    assert seen == [("highest", False)]


def test_class_folders_are_centre_cropped_to_the_size_of_the_images(judge, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data/train")                          # of 48 x 40 to 48 x 48 pixels
    shutil.copytree(photos, tmp_path / "data/val")
    source = fid.open_source(str(tmp_path / "data"), [32, 32])
    assert len(source.images) == 40 and "train" in source.images.samples[0][0]
    for i in (0, 39):
        image, label, key = source.images[i, 7]
        path, expected = source.images.samples[i]
        assert torch.equal(image, TF.pil_to_tensor(center_crop(read_image(path), 32)))
        assert (label, key) == (expected, 7)
    assert fid.open_source("shapes", [48, 64]).size == [48, 48] and fid.open_source("shapes").size == [32, 32]
    assert len(fid.open_source("shapes").images) == 50_000
    assert torch.equal(fid.open_source("shapes/val").images[3, 0][0], Shapes(32, first=50_000)[3, 0][0])


def numbered(folder, count=9):
    """A folder of `count` pictures, whose first pixel's red is 20 x their number."""
    folder.mkdir(parents=True)
    for i in range(count):
        image = pictures(1)[0]
        image[0, 0] = 20 * i
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def breaks(file):
    """A sound header, no pixels."""
    file.write_bytes(file.read_bytes()[:100])


CPU = torch.device("cpu")


def first_pixel(images):
    return images[:, :1, 0, 0]


def test_rows_keep_the_order_of_the_data_set_whatever_part_of_it_is_taken(tmp_path):
    data = fid.open_source(str(numbered(tmp_path / "folder"))).images
    assert fid.per_image(data, first_pixel, 2, CPU)[:, 0].tolist() == [20 * i for i in range(9)]
    assert fid.per_image(data, first_pixel, 2, CPU, 4)[:, 0].tolist() == [20 * i for i in evenly(9, 4)]


def test_rows_keep_the_order_of_the_data_set_on_two_ranks(tmp_path):
    numbered(tmp_path / "folder")
    (tmp_path / "rows.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                      "import fid, rae\n"
                                      "device, *_ = rae.start()\n"
                                      "data = fid.open_source('folder').images\n"
                                      "rows = fid.per_image(data, lambda images: images[:, 0, :1, 0], 2, device)\n"
                                      "print(f'rows {rows[:, 0].int().tolist()}\\n', end='')\n")      # in one piece
    text = launch(tmp_path / "rows.py", cwd=tmp_path, ranks=2)
    assert text.count(f"rows {[20 * i for i in range(9)]}") == 2, text


@pytest.mark.parametrize("broken, says", [([4], "^1 of 9 .*4.png"), ([0, 1, 7], "^3 of 9 .*0.png"),
                                          (range(8), "^8 of 9 .*0.png")])
def test_files_that_cannot_be_decoded_are_named_and_end_a_metric(tmp_path, capfd, broken, says):
    folder = numbered(tmp_path / "folder")
    for i in broken:
        breaks(folder / f"{i}.png")
    data = fid.open_source(str(folder)).images
    with pytest.raises(UserError, match=says) as error:
        fid.per_image(data, first_pixel, 2, CPU)
    assert "\n" not in str(error.value)
    printed = capfd.readouterr().out
    assert all(printed.count(f"{i}.png") == (i in broken) for i in range(9))  # each of them, once


def test_a_file_that_one_rank_cannot_decode_ends_all_ranks(tmp_path):
    folder = numbered(tmp_path / "folder")
    breaks(folder / "4.png")
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    text = launch("fid.py", "fake.npz", folder, *TINY, "--batch", 3, cwd=tmp_path, ranks=2, expect=1)
    assert "1 of 9 images cannot be read" in text and "4.png" in text
    assert f'File "{fid.__file__}"' not in text                               # no traceback


def test_a_download_is_checked_by_the_digest_that_ends_its_name(monkeypatch, tmp_path):
    """As `...-2015-12-05-6726825d.pth` has it; of a file of this machine, by its URL."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(dict(w=torch.ones(2)), tmp_path / "made.pth")
    content = (tmp_path / "made.pth").read_bytes()
    right = tmp_path / f"net-2015-12-05-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    wrong = tmp_path / "net-2015-12-05-00000000.pth"
    for path in (right, wrong):
        path.write_bytes(content)
    assert download(right.as_uri(), "--flag")["w"].tolist() == [1, 1]
    right.unlink()
    assert download(right.as_uri(), "--flag")["w"].tolist() == [1, 1]         # from the cache
    with pytest.raises(UserError, match=f"cannot download {wrong.name} .*name it with --flag"):
        download(wrong.as_uri(), "--flag")


def test_a_download_that_was_cut_short_is_named_in_a_sentence(monkeypatch, tmp_path):
    """In the cache, as a machine that lost its network leaves it: for metrics, and for LPIPS."""
    no_network(monkeypatch, tmp_path)
    (tmp_path / "cache/checkpoints").mkdir(parents=True)
    for name, load in ((fid.WEIGHTS, fid.Inception), ("vgg16-397923af.pth", load_lpips)):
        torch.save({"weight": torch.zeros(100)}, tmp_path / "cache/checkpoints" / name)
        whole = (tmp_path / "cache/checkpoints" / name).read_bytes()
        (tmp_path / "cache/checkpoints" / name).write_bytes(whole[:300])
        with pytest.raises(UserError, match=f"cache/checkpoints/{name} is cut short or damaged.*: remove it") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("address, command", [
    ("socks5://127.0.0.1:1", "fid.py fake.npz"), ("http://127.0.0.1:1", "fid.py fake.npz"),
    ("socks5://127.0.0.1:1", "rae.py photo.png --run release:mae_b"),
    ("nonsense://x", "rae.py photo.png --run release:mae_b")])                # the hub tries an http address for half a minute
def test_a_proxy_that_is_set_wrongly_is_no_traceback(address, command, tmp_path):
    np.savez(tmp_path / "fake.npz", arr_0=pictures(5))
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ALL_PROXY", "HTTPS_PROXY", "https_proxy", "all_proxy"):
            patch.setenv(name, address)
        patch.setitem(ENVIRONMENT, "HF_HUB_OFFLINE", "0")
        patch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        text = launch(*command.split(), cwd=tmp_path, expect=1)
    assert "Traceback" not in text and ("cannot download" in text or "cannot fetch" in text)


def test_broken_files_end_the_judge_of_reconstructions_too(judge, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data/val")
    breaks(tmp_path / "data/val/class2/2.png")
    with pytest.raises(UserError, match="^1 of 40 .*val/class2/2.png"):
        judge("--rae", run(tmp_path), "--data", "data/val", *TINY)


def test_a_link_that_leads_nowhere_is_a_broken_file(judge, photos, tmp_path):
    numbered(tmp_path / "flat")
    shutil.copytree(photos, tmp_path / "data/val")
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    run(tmp_path)
    commands = [(["fake.npz", "flat"], "flat"), (["fake.npz", "data/val"], "data/val/class0"),
                (["--rae", ".", "--data", "data/val"], "data/val/class0")]
    for arguments, place in commands:
        os.symlink("gone.png", tmp_path / place / "link.png")
        with pytest.raises(UserError, match=f"{place}/link.png") as error:
            judge(*arguments, *TINY)
        assert "\n" not in str(error.value)
        (tmp_path / place / "link.png").unlink()


def test_pictures_turned_by_their_cameras_are_measured_as_they_are_seen(judge, tmp_path):
    """Two of 96 x 72, one of which EXIF turns, are two sizes; two that are both seen as 72 x 96 are one."""
    (tmp_path / "flat").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(pictures(1, side=96)[0][:72])
    lying.save(tmp_path / "flat/a.jpg", exif=exif)
    lying.save(tmp_path / "flat/b.jpg")
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    with pytest.raises(UserError, match="1 of 2 images cannot be read .*b.jpg"):
        judge("flat", *TINY)
    lying.rotate(-90, expand=True).save(tmp_path / "flat/b.jpg")
    assert fid.open_source(str(tmp_path / "flat")).size == [96, 72]


def test_files_that_lost_pixels_are_said(judge, tmp_path):
    for kind, lossy in (("png", False), ("jpg", True)):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(pictures(5)):
            Image.fromarray(image).save(tmp_path / kind / f"{i}.{kind}")
        assert ("compressed with loss" in said(judge(tmp_path / kind, *TINY))) == lossy


def test_a_number_of_images_cuts_the_generated_ones_alone(judge, pair):
    result = judge(*pair, "--features", "tiny", "--num", 120)
    assert (result["n"], result["reference_n"]) == (120, 150)
    sides = pictures(203)[evenly(203, 120)], pictures(150, seed=1) // 8 * 8
    expected = fid.frechet_distance(*(x for side in sides for x in fid.moments(tokens(as_batch(side)))))
    assert result["fd"] == pytest.approx(expected, rel=1e-3)


def test_two_or_three_images_have_a_distance_if_no_recall(judge, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pictures(20, seed=1))
    for count in (2, 3, 4):
        np.savez(tmp_path / "fake.npz", arr_0=pictures(count))
        result = judge("fake.npz", "real.npz", *TINY)
        assert result["fd"] > 0 and result["n"] == count and ("recall" in result) == (count > 3)
        assert ("need 4 images" in said(result)) == (count < 4)


def test_saved_statistics_stand_in_for_the_images_they_were_made_of(judge, pair, tmp_path):
    images = judge(*pair, *TINY, "--save-stats", tmp_path / "reference.npz")
    from_file = judge(pair[0], tmp_path / "reference.npz", *TINY)
    judge(pair[0], *TINY, "--save-stats", tmp_path / "generated_stats.npz")
    from_two_files = judge(tmp_path / "generated_stats.npz", tmp_path / "reference.npz", *TINY)
    assert from_file["fd"] == pytest.approx(images["fd"]) == from_two_files["fd"]
    assert from_file["reference_n"] == 150 and from_two_files["n"] == 203 and "recall" not in from_file
    assert len({result["reference_sha256"] for result in (images, from_file)}) == 2
    digest = hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    assert from_file["reference_sha256"] == digest[:16]
    assert images["reference_sha256"] is None                                 # names are no contents


def test_saved_statistics_say_what_they_were_made_of(judge, pair, tmp_path):
    judge(*pair, "--features", "tiny", "--save-stats", tmp_path / "new/folder/reference")
    saved = np.load(tmp_path / "new/folder/reference.npz")
    features = tokens(as_batch(pictures(150, seed=1) // 8 * 8)).double().numpy()
    np.testing.assert_allclose(saved["mu"], features.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(saved["sigma"], np.cov(features, rowvar=False), rtol=1e-3, atol=1e-5)
    assert saved["n"] == 150 and saved["features"] == "tiny" and saved["size"].tolist() == [32, 32]
    assert saved["source"] == str(pair[1])
    assert fid.open_source(str(tmp_path / "new/folder/reference.npz")).size == [32, 32]
    np.savez(tmp_path / "adm.npz", mu=saved["mu"], sigma=saved["sigma"])
    assert fid.open_source(str(tmp_path / "adm.npz")).size is None            # ADM's statistics do not say


@pytest.mark.parametrize("output", ["fake.npz", "real.npz", "real", "link.npz", "sub/../real.npz"])
def test_an_output_that_is_an_input_is_refused(judge, no_work, tmp_path, output):
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    np.savez(tmp_path / "real.npz", arr_0=pictures(20, seed=1))
    os.symlink("real.npz", tmp_path / "link.npz")
    (tmp_path / "sub").mkdir()
    before = (tmp_path / "real.npz").read_bytes(), (tmp_path / "fake.npz").read_bytes()
    with pytest.raises(SystemExit):
        judge("fake.npz", "real.npz", *TINY, "--save-stats", output)
    assert before == ((tmp_path / "real.npz").read_bytes(), (tmp_path / "fake.npz").read_bytes())


@pytest.mark.parametrize("flag", ["--num", "--batch"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0", "1.5", "many"])
def test_numbers_out_of_range_are_refused(judge, no_work, tmp_path, capsys, flag, value):
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    with pytest.raises(SystemExit):
        judge("fake.npz", *TINY, f"{flag}={value}")
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_arguments_that_would_be_ignored_are_refused(judge, no_work, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", arr_0=pictures(20))
    rae = "--rae", "x", "--data", "shapes"
    for arguments in ([], ["--data", "shapes"], ["--rae", "x"], ["a.npz", "a.npz", *rae],
                      ["a.npz", "--data", "shapes"]):
        with pytest.raises(SystemExit):
            judge(*arguments)
        assert "fid.py: error:" in capsys.readouterr().err.splitlines()[-1], arguments


# Images in an archive

@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_archive_with_one_bad_byte_is_refused(tmp_path, write):
    rng = np.random.RandomState(0)
    write(tmp_path / "bad.npz", arr_0=rng.randint(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    content = bytearray((tmp_path / "bad.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match="bad.npz cannot be read"):
        fid.open_source(str(tmp_path / "bad.npz"))


# What is said

def test_adms_reference_file_gives_its_statistics_to_fid_and_its_images_to_recall(judge, pair, tmp_path):
    mu, sigma = np.linspace(-1, 1, 96), np.eye(96)
    images = pictures(150, seed=1) // 8 * 8
    np.savez(tmp_path / "virtual.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    result, images = judge(pair[0], tmp_path / "virtual.npz", *TINY), judge(*pair, *TINY)
    assert result["fd"] == judge(pair[0], tmp_path / "plain.npz", *TINY)["fd"] != images["fd"]
    assert figures(result)[1:] == figures(images)[1:]


def test_everything_that_makes_a_figure_incomparable_is_said(judge, tmp_path):
    def warnings(images, reference=pictures(120), **labels):
        np.savez(tmp_path / "a.npz", arr_0=images, **labels)
        np.savez(tmp_path / "b.npz", arr_0=reference)
        return " ".join(judge(tmp_path / "a.npz", tmp_path / "b.npz", *TINY)["warnings"])
    sound = warnings(pictures(120), labels=np.arange(120) % 3)
    for word in ("rank", "pixels", "class"):
        assert word not in sound
    assert "50,000" in sound and "random weights" in sound
    assert "rank" in warnings(pictures(90))
    assert "rank" in warnings(pictures(120), pictures(90))
    assert "64" in warnings(pictures(120), pictures(120, side=64))
    assert "equally frequent" in warnings(pictures(120), labels=np.arange(120) % 7)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(96), sigma=np.eye(96))
    assert "pixels" not in " ".join(judge(tmp_path / "stats.npz", tmp_path / "b.npz", *TINY)["warnings"])
    assert "sorted by class" in warnings(pictures(120), labels=np.arange(120) // 40)


def test_a_comparison_with_itself_is_said(judge, pair, tmp_path):
    os.symlink(pair[0], tmp_path / "link.npz")
    assert "compared with itself" in said(judge(pair[0], pair[0], *TINY))
    assert "compared with itself" in said(judge(pair[0], tmp_path / "link.npz", *TINY))
    assert "compared with itself" in said(judge(pair[1], f"{pair[1]}/", *TINY))
    assert "itself" not in said(judge(*pair, *TINY)) + said(judge(pair[0], *TINY))


def test_other_sizes_are_said_however_they_are_known(judge, photos, pair, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=pictures(120, side=64))
    judge(tmp_path / "large.npz", *TINY, "--save-stats", tmp_path / "large_stats.npz")
    judge(pair[0], *TINY, "--save-stats", tmp_path / "small_stats.npz")
    both = "[32, 32]", "[64, 64]"
    for sides in (("large.npz", pair[0]), (pair[1], "large.npz"), ("large_stats.npz", pair[0]),
                  ("large.npz", "small_stats.npz"), ("large_stats.npz", "small_stats.npz")):
        text = said(judge(*sides, *TINY))
        assert all(size in text for size in both), sides
    assert "pixels" not in said(judge(pair[0], "small_stats.npz", *TINY))
    assert "were enlarged" in said(judge("large.npz", photos, *TINY))         # 48 pixels and fewer, to 64
    assert "enlarged" not in said(judge(pair[0], photos, *TINY))


def test_more_images_asked_for_than_there_are_is_said(judge, pair):
    assert "--num 300 is more than the 203" in said(judge(pair[0], *TINY, "--num", 300))
    result = judge(pair[0], *TINY, "--num", 203)
    assert result["n"] == 203 and "--num" not in said(result)
    np.savez(pair[0], arr_0=pictures(20), mu=np.zeros(96), sigma=np.eye(96))  # of unknown n
    assert "--num 300 is more than the 20" in said(judge(pair[0], *TINY, "--num", 300))
    np.savez(pair[0], arr_0=pictures(203))
    assert judge(pair[0], *TINY, "--num", 50)["n"] == 50


def test_statistics_that_are_no_covariance_are_refused_by_name_before_the_work(judge, no_work, tmp_path):
    np.savez(tmp_path / "fake.npz", arr_0=pictures(20))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(96), sigma=-np.eye(96))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(96), sigma=np.full((96, 96), np.nan))
    for bad in ("negative.npz", "nan.npz"):
        for sides in (("fake.npz", bad), (bad, "fake.npz")):
            with pytest.raises(UserError, match=bad):
                judge(*sides, *TINY)


def run(folder):
    """rae.pt of an autoencoder whose statistics are not 0 and 1."""
    torch.manual_seed(3)
    rae = RAE("tiny", "tiny", 32).load_encoder("random").eval()
    mean, var = torch.randn(16, 96), torch.rand(16, 96) + 0.1
    save_checkpoint(folder / "rae.pt", config=rae.config, encoder=rae.encoder.state_dict(),
                    ema=rae.decoder.state_dict(), mean=mean, var=var)
    return folder


def reconstructions(folder, images):
    """images (B,3,32,32) in [0,1] -> the copies of run(folder)'s autoencoder, 8 bits, by its formula."""
    saved = torch.load(folder / "rae.pt", weights_only=True)
    rae = RAE("tiny", "tiny", 32).load_encoder("random").eval()
    rae.encoder.load_state_dict(saved["encoder"])
    rae.decoder.load_state_dict(saved["ema"])
    std = (saved["var"] + 1e-5).sqrt()
    z = (rae.encoder((images - 0.5) / 0.5) - saved["mean"]) / std             # (B, 16, 96)
    with torch.no_grad():
        copies = 0.5 * rae.decoder(z * std + saved["mean"]) + 0.5
    return (copies.clamp(0, 1) * 255).round() / 255


def test_reconstructions_are_judged_against_their_originals(judge, tmp_path):
    arguments = "--rae", run(tmp_path), "--data", "shapes", "--num", 40, *TINY
    result = judge(*arguments)
    chosen = torch.tensor(evenly(10_000, 40))
    shapes = open_val("shapes", None, 32)
    images = torch.stack([shapes[i, 0][0] for i in chosen.tolist()]).float() / 255
    copies = reconstructions(tmp_path, images)
    psnr = -10 * (images - copies).square().mean((1, 2, 3)).log10()
    assert result["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-3)
    assert result["ssim"] == pytest.approx(ssim(images, copies).mean().item(), abs=1e-3)
    assert result["n"] == result["reference_n"] == 40 and result["rfd"] > 0
    assert result["lpips"] is None and "vgg16" in " ".join(result["warnings"])


def test_reconstructions_are_judged_by_inception_as_well(judge, tmp_path):
    result = judge("--rae", run(tmp_path), "--data", "shapes", "--num", 3, "--inception-weights", "random")
    assert result["rfid"] > 0 and result["n"] == 3 and result["features"] == "inception"


def test_images_that_are_no_squares_are_squashed_and_keep_to_their_range():
    """Of edges between black and white, beyond which bicubic interpolation overshoots."""
    images = torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    images[:, :, 10:20, 10:30] = 255
    measure = fid.feature_function(fid.parse_args(["a.npz", "--features", "tiny"]), torch.device("cpu"))
    squares = torch.nn.functional.interpolate(images / 255, (32, 32), mode="bicubic")
    assert squares.max() > 1.05
    expected = RAE("tiny", "tiny", 32).load_encoder().tokens(squares.clamp(0, 1)).mean(1)
    torch.testing.assert_close(measure(images), expected, rtol=1e-4, atol=1e-5)


def test_reconstructions_are_judged_as_images_of_8_bits(judge, photos, tmp_path, monkeypatch):
    seen = []

    def perceptual(a, b):
        seen.append((a, b))
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(fid, "load_lpips", lambda *args: perceptual)
    result = judge("--rae", run(tmp_path), "--data", photos, "--features", "tiny", "--batch", 15)
    files = sorted(photos.glob("*/*.png"), key=lambda file: (file.parent.name, file.name))
    images = torch.stack([TF.to_tensor(center_crop(read_image(file), 32)) for file in files])
    copies = reconstructions(tmp_path, images)
    a, b = (torch.cat(side) for side in zip(*seen))
    torch.testing.assert_close(a, 2 * images - 1)                             # the originals, in [-1, 1]
    levels = (b + 1) / 2 * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)     # 8 bits
    other = (b - (2 * copies - 1)).abs()
    assert (other > 1e-4).double().mean() < 1e-3 and other.max() < 2.1 / 255  # but for ties
    assert result["lpips"] == pytest.approx((a - b).abs().mean().item(), rel=1e-5)
    assert result["psnr"] == pytest.approx(psnr(images, copies).mean().item(), rel=1e-4)
    expected = fid.frechet_distance(*fid.moments(tokens(copies)), *fid.moments(tokens(images)))
    assert result["rfd"] == pytest.approx(expected, rel=1e-2) and result["reference"] == str(photos)
    assert result["n"] == result["reference_n"] == 40 and result["reference_sha256"] is None


def test_reconstructions_of_a_data_set_are_those_of_its_held_out_images(judge, photos, tmp_path):
    for part, count in (("train", 40), ("val", 3)):
        for file in sorted(photos.glob("class1/*.png"))[:count]:
            (tmp_path / "data" / part / "class1").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "data" / part / "class1")
    result = judge("--rae", run(tmp_path), "--data", tmp_path / "data", "--features", "tiny")
    again = judge("--rae", tmp_path, "--data", tmp_path / "data/val", "--features", "tiny")
    assert result["n"] == 3 and result["rfd"] == again["rfd"]


def test_weights_of_lpips_that_were_named_have_to_be_right(judge, no_work, tmp_path):
    with pytest.raises(UserError, match="vgg.pth: no such file"):
        judge("--rae", run(tmp_path), "--data", "shapes", *TINY, "--lpips-vgg", tmp_path / "vgg.pth")

@pytest.fixture
def top1(monkeypatch, tmp_path):
    def run(*flags):
        with as_it_was():
            monkeypatch.setattr("sys.argv", ["probe.py", *map(str, flags)])
            with redirect_stdout(io.StringIO()) as text:
                probe.main()
        return json.loads(text.getvalue().splitlines()[-1])
    return run


def test_the_probe_of_tokens_beats_chance_on_shapes(top1):
    result = top1("--num", 400)
    assert result["probe_top1"] > 0.15 and result["n"] == result["n_train"] == 400 and result["classes"] == 10


def test_the_probe_learns_from_training_images_and_is_tested_on_others(top1, monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "linear_probe", lambda *args: seen.append(args) or 0.5)
    result = top1("--encoder", "tiny", "--data", "shapes", "--num", 30)
    for (x, y), first, count in ((seen[0][:2], 0, 50_000), (seen[0][2:], 50_000, 10_000)):
        images, labels = Shapes(32).render(first + torch.tensor(evenly(count, 30)))
        torch.testing.assert_close(x, tokens(images.float() / 255), rtol=1e-3, atol=1e-3)
        assert y.tolist() == labels.tolist()
    assert result["probe_top1"] == 0.5 and result["encoder"] == "tiny"


def test_a_probe_needs_both_parts_of_a_data_set(top1, photos):
    with pytest.raises(UserError, match="needs train/ and val/, of the same classes"):
        top1("--data", photos)


@pytest.mark.parametrize("problem, says", [
    ("missing.npz", "cannot be read"), ("text.npz", "cannot be read"), ("pickle.npz", "cannot be read"),
    ("array.npy", "cannot be read"), ("truncated.npz", "cannot be read"), ("keys.npz", "holds other"),
    ("half.npz", "holds mu"),
    ("float.npz", "float32"), ("grey.npz", r"\(20, 32, 32\)"), ("one.npz", "1 image"),
    ("none.npz", "0 image"), ("text", "not one image can be read"),
    ("wide.npz", "96"), ("foreign.npz", "dinov2_s"), ("mixed", "64.png"), ("empty", "no image that is read")])
def test_wrong_input_gets_one_sentence_before_long_work(judge, tmp_path, problem, says):
    np.savez(tmp_path / "good.npz", arr_0=pictures(20))
    np.savez(tmp_path / "keys.npz", other=np.zeros(3))
    np.savez(tmp_path / "half.npz", arr_0=pictures(20), mu=np.zeros(96))
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}, 1], object))
    np.savez(tmp_path / "float.npz", arr_0=pictures(20).astype(np.float32) / 255)
    np.savez(tmp_path / "grey.npz", arr_0=pictures(20)[..., 0])
    np.savez(tmp_path / "one.npz", arr_0=pictures(1))
    np.savez(tmp_path / "none.npz", arr_0=pictures(0))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(96), sigma=np.eye(96), features="dinov2_s")
    np.save(tmp_path / "array.npy", pictures(20))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "truncated.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "image.png").write_text("no image")
    for side in (32, 64):
        Image.fromarray(pictures(1, side=side)[0]).save(tmp_path / "mixed" / f"{side}.png")
    for arguments in ([problem, "good.npz"], ["good.npz", problem]):
        with pytest.raises(UserError, match=says) as error:
            judge(*(tmp_path / name for name in arguments), *TINY)
        assert "\n" not in str(error.value) and problem in str(error.value)

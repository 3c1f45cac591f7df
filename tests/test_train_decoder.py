"""Stage 1's losses, noise and discriminator, each against its formula, and the adversarial step on two ranks."""
import json
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER, ROOT, inside, launch, losses
from torch.utils.flop_counter import FlopCounterMode

import train_decoder
from assets.shapes import Shapes
from rae import (DECODERS, RAE, Decoder, bytes_for_backward, count_flops, evenly, mean_over_ranks, mix, normals,
                 remember, ssim)
from train_decoder import (Discriminator, DiscriminatorHead, adaptive_weight, augment, evaluate_decoder, hinge_loss,
                           noise_augment, reconstructions)
from train_dit import DiT


@pytest.mark.parametrize("kind, mean, square", [("halfnormal", math.sqrt(2 / math.pi), 1), ("uniform", 1 / 2, 1 / 3)])
def test_noise_has_one_strength_per_image_of_the_stated_distribution(kind, mean, square):
    std = torch.rand(16, 24) + 0.5
    noise = noise_augment(torch.zeros(4000, 16, 24), std, torch.arange(4000), 0.8, kind) * std        # of the tokens themselves
    sigma = noise.square().mean((1, 2)).sqrt()                                # to 1 / sqrt(2 * 384) = 4 %
    assert sigma.mean() == pytest.approx(0.8 * mean, rel=0.03) and sigma.square().mean() == pytest.approx(0.64 * square, rel=0.05)
    assert (noise / sigma[:, None, None]).pow(4).mean() == pytest.approx(3, rel=0.03)         # Gaussian, given its strength
    assert kind != "uniform" or 0.72 < sigma.max() < 0.8 * 1.15
    assert torch.equal(noise_augment(torch.ones(1, 16, 24), std, torch.tensor([5]), 0.0, kind), torch.ones(1, 16, 24))
    torch.testing.assert_close(noise_augment(torch.zeros(1, 16, 24), std, torch.tensor([5]), 0.8, kind)[0] * std, noise[5])


def test_hinge_losses_are_their_formulas_and_stop_pushing_beyond_the_margin():
    real, fake = torch.tensor([[2.0, 0.5, -1.0]], requires_grad=True), torch.tensor([[-3.0, 0.0, 1.5]], requires_grad=True)
    loss = hinge_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2.5) / 3))
    loss.backward()
    torch.testing.assert_close(real.grad, torch.tensor([[0, -1, -1]]) / 6)
    torch.testing.assert_close(fake.grad, torch.tensor([[0, 1, 1]]) / 6)


def test_the_adaptive_weight_is_a_ratio_of_norms_within_its_bounds():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.5]])
    assert adaptive_weight(a.clone(), b.clone()).item() == pytest.approx(10, rel=1e-5)
    assert adaptive_weight(a.clone(), torch.zeros(1, 2)).item() == 1e4 and adaptive_weight(torch.zeros(1, 2), b.clone()) == 0


def test_the_adaptive_weight_balances_the_two_gradients_at_the_last_layer():
    torch.manual_seed(0)
    x, last = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    losses = [lambda w: (x @ w).abs().mean(), lambda w: -(x @ w).square().mean()]
    found = adaptive_weight(*(torch.autograd.grad(loss(last), last)[0] for loss in losses))

    def norm(loss, h=1e-6):                                                   # of the gradient, by central differences
        steps = torch.eye(21, dtype=torch.float64).view(21, 7, 3) * h
        return torch.stack([(loss(last + s) - loss(last - s)) / (2 * h) for s in steps]).norm().item()
    assert found.item() == pytest.approx(norm(losses[0]) / norm(losses[1]), rel=1e-5)


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return Discriminator("tiny")


def test_spectral_norms_are_one_after_the_power_iteration_has_converged(discriminator):
    features = torch.randn(2, 16, 96)
    for head in discriminator.heads:
        for conv in (head.first[0], head.residual[0], head.last):
            conv.parametrizations.weight.original.data.mul_(3)                # far from norm 1
        with torch.no_grad():
            for _ in range(400):
                head.train()(features)
        for conv in (head.first[0], head.residual[0], head.last):
            values = torch.linalg.svdvals(conv.weight.flatten(1))
            assert 0.99 < values[0] < 1.001, conv


def test_a_heads_normalisation_is_each_images_own(discriminator):
    torch.manual_seed(0)
    head, features = DiscriminatorHead(8), torch.randn(3, 16, 8)
    for parameter in head.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    head.eval()
    torch.testing.assert_close(head(features)[:1], head(features[:1]))
    conv, norm, _ = head.first                                                # and its formula, biased variance
    x = features @ conv.weight[..., 0].T + conv.bias
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(head.first(features.mT), F.leaky_relu(x, 0.2).mT, rtol=1e-4, atol=1e-5)


def test_a_heads_power_iterations_and_norms_compute_in_fp32_under_autocast():
    torch.manual_seed(0)
    head = DiscriminatorHead(8).eval()
    features = torch.randn(3, 16, 8).bfloat16()
    expected = head(features.float())
    seen = []
    head.first[1].register_forward_hook(
        lambda module, inputs, output: seen.append((output.dtype, torch.is_autocast_enabled("cpu"))))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert seen == [(torch.float32, False)] and torch.equal(logits, expected)


def test_the_residual_kernel_of_nine_tokens_goes_around_the_ends():
    head = DiscriminatorHead(2).eval()
    x = torch.zeros(1, 2, 12)
    x[0, :, 0] = 1                                                            # an impulse at the first token
    assert (head.residual[0](x) - head.residual[0](0 * x)).abs().sum(1)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_the_discriminator_sees_five_maps_the_last_twice_and_images_do_not_see_each_other(discriminator):
    images = Shapes().render(torch.arange(3))[0] / 127.5 - 1
    discriminator.eval()
    logits = discriminator(images)
    assert logits.shape == (3, 5 * 16) and logits.dtype == torch.float32
    torch.testing.assert_close(discriminator(images[:1]), logits[:1], rtol=1e-4, atol=1e-5)
    assert [name for name, p in discriminator.named_parameters() if p.requires_grad and "heads" not in name] == []
    one = discriminator.heads[0]
    assert discriminator.layers == [0, 1, 2, 3]
    discriminator.heads[0] = discriminator.heads[4]                           # then both last maps give the same
    first, *_, fifth = discriminator(images).chunk(5, 1)
    discriminator.heads[0] = one
    torch.testing.assert_close(first, fifth)


def test_the_discriminators_logits_are_its_formula(discriminator):
    """From images in [-1,1] to logits, by the frozen network's own blocks and plain convolutions."""
    torch.manual_seed(0)
    for parameter in discriminator.heads.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    vit, features = discriminator.vit, []
    with torch.no_grad():
        x = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False)
        x = vit.pos_embed + torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(x)], 1)         # mean, std 0.5
        for block in vit.blocks:
            x = block(x)
            features.append(x[:, 1:].mT)                                      # (2, 96, 16)

        def layer(conv, norm, x):
            x = F.pad(x, (conv.kernel_size[0] // 2,) * 2, mode="circular")
            x = F.conv1d(x, conv.weight, conv.bias)
            x = (x - x.mean(2, keepdim=True)) / (x.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
            return F.leaky_relu(x * norm.weight[:, None] + norm.bias[:, None], 0.2)
        expected = []
        for head, x in zip(discriminator.eval().heads, [features[-1], *features]):
            x = layer(*head.first[:2], x)
            x = (layer(*head.residual[:2], x) + x) / 2 ** 0.5
            expected.append((head.last.weight[:, :, 0] @ x + head.last.bias)[:, 0])
        torch.testing.assert_close(discriminator(images), torch.cat(expected, 1), rtol=1e-4, atol=1e-5)


def test_the_dino_discriminator_has_the_released_sizes():
    disc = Discriminator("dino", "random").eval()
    assert disc.layers == [2, 5, 8, 11] and disc(torch.rand(1, 3, 256, 256)).shape == (1, 3920)
    head = 384 * 384 + 384 + 2 * 384 + 9 * 384 * 384 + 384 + 2 * 384 + 384 + 1
    assert sum(p.numel() for p in disc.parameters() if p.requires_grad) == 5 * head


def test_augmentation_stays_within_its_ranges_and_is_drawn_per_image():
    keys, n = mix(7, torch.arange(2000)), 2000
    out = augment(torch.zeros(n, 3, 16, 16), keys)                            # brightness alone
    flat = out[:, 0, 8, 8]
    torch.testing.assert_close(out, flat[:, None, None, None].expand_as(out))
    assert -0.5 <= flat.min() < -0.49 and 0.49 < flat.max() <= 0.5 and flat.std() == pytest.approx(12 ** -0.5, rel=0.05)
    grey = torch.zeros(n, 3, 16, 16)
    grey[:, :, 7, 6] = 1                                                      # one bright pixel: translation and contrast
    out = augment(grey, keys)
    place = out[:, 0].flatten(1).argmax(1)
    for moved in (place // 16 - 7, place % 16 - 6):
        assert moved.unique().tolist() == [-2, -1, 0, 1, 2]                   # 12.5 % of 16, all as likely
        assert (moved[:, None] == torch.arange(-2, 3)).float().mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.04)
    assert len(place.unique()) == 25                # rows and columns on their own
    contrast = out[:, 0].amax((1, 2)) - out[:, 0].amin((1, 2))
    assert 0.5 <= contrast.min() < 0.51 and 1.49 < contrast.max() < 1.5 + 1e-5
    colour = torch.tensor([1.0, 0, -1]).view(3, 1, 1).expand(n, 3, 16, 16)    # saturation times contrast
    out_colour = augment(colour, keys)[:, :, 8, 8]
    saturation = (out_colour[:, 0] - out_colour[:, 2]) / contrast             # the difference was 2
    assert 0 <= saturation.min() < 0.01 and 3.98 < saturation.max() < 4 + 1e-4
    torch.testing.assert_close(augment(grey[:1], keys[5:6]), out[5:6])        # of its key alone
    assert (augment(grey[:1], keys[5:6] + 1) != out[5:6]).any()


def test_augmentation_passes_exact_gradients_on():
    torch.manual_seed(0)
    x, step, out_weight = torch.rand(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss = lambda x: (augment(x, torch.tensor([1, 2])) * out_weight).sum()    # affine in x: any step is a differential
    gradient, = torch.autograd.grad(loss(x), x)
    assert (gradient * step).sum().item() == pytest.approx((loss(x + step) - loss(x)).item(), rel=1e-4)
    assert (gradient.abs().sum(1) > 0).float().mean() > 0.7                   # all pixels that are not moved out


def test_pictures_show_originals_copies_and_copies_of_noisy_latents():
    rae = RAE("tiny", "tiny", 32).load_encoder().eval().requires_grad_(False)
    images = torch.rand(4, 3, 32, 32)
    shown = reconstructions(rae, lambda x: rae.decoder(x) / 2, images).chunk(3)  # by the given decoder
    z = rae.encode(images)
    eps = normals(torch.arange(4), 16 * 96, z.device).view_as(z)
    assert torch.equal(shown[0], images)
    for found, latents in zip(shown[1:], (z, z + 0.4 * eps)):
        expected = rae.decoder(latents * rae.std + rae.mean) / 2 * 0.5 + 0.5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_adds_the_stated_noise_and_depends_on_no_batch():
    torch.manual_seed(0)
    rae = RAE("tiny", "tiny", 32).load_encoder().eval().requires_grad_(False)
    rae.mean.normal_(std=0.1)
    rae.var.uniform_(0.5, 2)
    data = Shapes(first=50_000, count=30)
    perceptual = lambda a, b: (a.sin() - b.sin()).abs().mean((1, 2, 3), keepdim=True)
    cpu = torch.device("cpu")
    seen = [evaluate_decoder(rae, rae.decoder, data, perceptual, cpu, batch=batch, most=20) for batch in (20, 7)]
    for key in seen[0]:
        assert seen[0][key] == pytest.approx(seen[1][key], rel=1e-6), key
    ats = ("", "@0.1", "@0.2", "@0.4")
    names = [f"{name}{at}" for at in ats for name in ("psnr", "ssim", "lpips")]
    assert list(seen[0]) == ["n", *names] and seen[0]["n"] == 20

    images = torch.stack([data[i, i][0] for i in evenly(30, 20)]).float() / 255
    std = (rae.var + 1e-5).sqrt()
    z = (rae.tokens(images) - rae.mean) / std
    eps = normals(mix(0, 2, torch.arange(20)), 16 * 96, cpu).view_as(z)       # of each image's own number
    for sigma, at in zip((0, 0.1, 0.2, 0.4), ats):
        copies = rae.decoder((z + sigma * eps) * std + rae.mean) * 0.5 + 0.5  # pixel mean and std of `tiny`
        copies = (copies.clamp(0, 1) * 255).round() / 255
        error = (copies - images).square().mean((1, 2, 3))
        expected = dict(psnr=-10 * error.log10(), ssim=ssim(copies, images),
                        lpips=perceptual(copies * 2 - 1, images * 2 - 1))
        for name, values in expected.items():
            assert seen[0][f"{name}{at}"] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-5), name
    assert evaluate_decoder(rae, rae.decoder, data, None, cpu, most=4)["lpips@0.2"] is None


# The adversarial training as a process

RECORDED = f"""
import os, shutil, sys, weakref
sys.path.insert(0, {str(ROOT)!r})
import torch, train_decoder
weights, gradients, trained, alive, most = [], [], [], weakref.WeakSet(), [0, 0]

class Saved:                                       # a tensor that autograd keeps for a backward pass
    def __init__(self, tensor): self.tensor = tensor; alive.add(self)

class Recorded(train_decoder.Discriminator):
    def __init__(self, *args): super().__init__(*args); trained.append(self)
    def forward(self, images):
        own = (len(images) // (1 + self.training),)  # images of this rank: activations have as many rows
        most[self.training] = max(most[self.training], sum(x.tensor.shape[:1] == own for x in alive))
        return super().forward(images)

def recorded(*both, weight=train_decoder.adaptive_weight):
    weights.append(weight(*both))
    gradients.append(both)                         # averaged over ranks, in place
    return weights[-1]

def average(model, make=train_decoder.ModelEmaV3, **options):
    trained.append(model)
    return make(model, **options)

def save_checkpoint(path, save=train_decoder.save_checkpoint, **state):
    save(path, **state)
    if os.environ.get("RANK", "0") == "0":         # which writes it
        shutil.copy(path, f"step{{state['step']}}.pt")

train_decoder.Discriminator, train_decoder.adaptive_weight = Recorded, recorded
train_decoder.ModelEmaV3, train_decoder.save_checkpoint = average, save_checkpoint
in_place = torch.nn.Module.compile                 # inductor needs a C++ compiler and a minute
torch.nn.Module.compile = lambda self: in_place(self, backend="aot_eager")
torch.Tensor.round = lambda self: self             # to 8 bits: it makes 1e-7 to 1/255, and Adam that to a full step
with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
    train_decoder.main()
torch.save(dict(weights=weights, gradients=gradients, most=most,
                trained=[model.state_dict() for model in trained]), f"rank{{os.environ.get('RANK', 0)}}.pt")
"""


def train(cwd, photos, *flags, ranks=1):
    """Up to 6 steps of 12, the second and all after it with the discriminator; the run's folder. Checkpoints
    are kept beside it."""
    (cwd / "recorded.py").write_text(RECORDED)
    launch(cwd / "recorded.py", *DECODER, "--gan-weight", 0.75, "--lpips-weight", 1, "--lpips-vgg", "random", "--disc-start", 0.3,
           "--gan-start", 0.3, "--lr", "1e-4", "--save-every", 2, "--data", photos, *flags, cwd=cwd, ranks=ranks)
    return cwd / "out/tiny"


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory, photos):
    cwd = tmp_path_factory.mktemp("adversarial")
    train(cwd, photos, "--steps", 6)
    return cwd


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, photos):
    cwd = tmp_path_factory.mktemp("ranks")
    train(cwd, photos, "--steps", 6, ranks=2)
    return cwd


def load(run):
    return torch.load(run / "rae.pt", weights_only=True)


def off_by(tensors, others):
    """The norm of the difference, relative to that of the tensors, all taken together."""
    difference = torch.stack([(a - b).norm() for a, b in zip(tensors, others, strict=True)]).norm()
    return difference / torch.stack([tensor.norm() for tensor in tensors]).norm()


def test_two_ranks_agree_to_the_last_bit_and_free_the_decoders_graph(two_ranks):
    first, second = (torch.load(two_ranks / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["weights"]) == 5 and first["weights"] == second["weights"] and min(first["weights"]) > 0
    assert len(first["trained"]) == 2                                         # decoder, discriminator
    for one, two in zip(first["trained"], second["trained"]):
        for key, value in one.items():
            assert torch.equal(value, two[key]), key
    in_the_decoders_step, in_its_own = first["most"]
    assert in_the_decoders_step > 0 and in_its_own == 0                       # nothing of the decoder's graph


def test_two_ranks_that_accumulate_agree_to_the_last_bit(tmp_path, photos):
    train(tmp_path, photos, "--steps", 3, "--micro", 3, ranks=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["weights"]) == 2 * 2 and first["weights"] == second["weights"]           # two steps, two micro-batches
    for one, two in zip(first["trained"], second["trained"]):
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_two_ranks_take_the_first_adversarial_step_of_one(adversarial, two_ranks):
    """With a discriminator that has not been trained: AdamW's change of a weight may hang on a rounding."""
    alone, together = (losses(run / "out/tiny", 1)[:2] for run in (adversarial, two_ranks))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    one, two = (torch.load(run / "rank0.pt", weights_only=True) for run in (adversarial, two_ranks))
    assert two["weights"][0].item() == pytest.approx(one["weights"][0].item(), rel=1e-3)
    for a, b in zip(one["gradients"][0], two["gradients"][0]):                # reconstruction's, GAN's
        assert off_by([a], [b]) < 3e-3
    one, two = (torch.load(run / "step2.pt", weights_only=True) for run in (adversarial, two_ranks))
    for part in ("optimizer", "disc_optimizer"):
        a, b = ([state["exp_avg"] for state in saved[part]["state"].values()] for saved in (one, two))
        assert off_by(a, b) < 1e-2, part                                      # AdamW's first step is a sign


def test_an_adversarial_run_resumes_bitwise(adversarial, tmp_path, photos):
    for steps in (1, 6):                                                      # stopped before the discriminator begins
        run = train(tmp_path, photos, "--steps", steps)
    one, two = load(adversarial / "out/tiny"), load(run)
    for part in ("model", "ema", "disc"):
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), f"{part} {key}"
    assert losses(run, 1) == losses(adversarial / "out/tiny", 1)


def needs_fake_attention():
    """torch 2.6 asks a GPU's driver which attention it has."""
    x = torch.zeros(1, 1, 4, 8)
    if bytes_for_backward(lambda: lambda x: F.scaled_dot_product_attention(x, x, x), x) is None:
        pytest.skip(f"torch {torch.__version__} has no fake attention without a GPU")


def test_a_models_cost_is_counted_without_computing_it():
    layer = lambda: torch.nn.Sequential(torch.nn.Linear(96, 1000), torch.nn.GELU(), torch.nn.Linear(1000, 10))
    x = torch.zeros(5, 16, 96)
    assert count_flops(layer, x) == (97 * 1000 + 1001 * 10, 2 * 5 * 16 * (96 * 1000 + 1000 * 10))
    needs_fake_attention()
    inputs = 5 * 16 * (96 + 1000 + 1000)                                      # of the three layers
    assert bytes_for_backward(layer, x) == 2 * (inputs + 10 * 1000)           # in bf16, as are the last layer's weights


def test_a_large_models_memory_is_what_was_found_for_it():
    """GiB of DiT^DH-XL at 64 images: 41.6 kept for the backward pass, 15.6 in weights, gradients, moments, average."""
    inputs = torch.zeros(64, 256, 768), torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    size, flops = count_flops(DiT, *inputs)
    assert size * 20 / 2 ** 30 == pytest.approx(15.6, rel=0.01) and flops / 64e9 == pytest.approx(323, rel=0.01)
    needs_fake_attention()
    assert bytes_for_backward(DiT, *inputs) / 2 ** 30 == pytest.approx(41.6, rel=0.02)


def test_the_log_tells_speed_and_time_left_without_the_pauses(tmp_path, photos, monkeypatch):
    """A clock that goes on by 1 s in each step, by 50 s in each save."""
    clock = [100.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    for name, seconds in (("cosine_lr", 1), ("save_checkpoint", 50)):
        def later(*args, name=name, seconds=seconds, call=getattr(train_decoder, name), **more):
            clock[0] += seconds
            return call(*args, **more)
        monkeypatch.setattr(train_decoder, name, later)
    inside("train_decoder.py", *DECODER, "--data", photos, "--steps", 5, "--save-every", 2, "--log-every", 3, cwd=tmp_path)
    lines = [json.loads(line) for line in open(tmp_path / "out/tiny/log.jsonl")]
    first, last = (line for line in lines if "loss" in line)
    assert first["images_per_s"] == last["images_per_s"] == pytest.approx(12) and first["eta"] == pytest.approx(2)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Decoder(16, 96, patch=8, **DECODERS["tiny"])(torch.empty(1, 16, 96))
    assert first["tflops"] == pytest.approx(12 * 3 * counter.get_total_flops() / 1e12, rel=1e-3)


def test_skipped_steps_in_a_row_are_counted_from_the_last_good_one():
    history = defaultdict(list)
    for flags, skipped in (([1.0, 0.0], 1), ([1.0] * 5, 5), ([1.0] * 4, 4), ([0.0, 1.0], 1), ([1.0] * 8, 8)):
        for flag in flags:
            remember(history, loss=torch.tensor(flag + 2), skipped=torch.tensor(flag))
        means = mean_over_ranks(history, "run", 7)
        assert means == dict(loss=pytest.approx(2 + sum(flags) / len(flags)), skipped=skipped)
    remember(history, loss=torch.tensor(1.0), skipped=torch.tensor(1.0))
    with pytest.raises(ValueError, match="step 8: the last 10 had non-finite .*--lr"):
        mean_over_ranks(history, "run", 8)


def test_a_stop_asked_of_one_rank_stops_all(tmp_path):
    (tmp_path / "stop.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                      "import torch, rae\n"
                                      "_, rank, _ = rae.start()\n"
                                      "stop = rae.any_rank(torch.tensor(float(rank)))\n"
                                      "print(f'stop: {stop}\\n', end='')\n")     # in one piece
    assert launch(tmp_path / "stop.py", cwd=tmp_path, ranks=2).count("stop: True") == 2


def test_a_compiled_decoder_trains_adversarially_to_the_same_losses(adversarial, tmp_path, photos):
    run = train(tmp_path, photos, "--steps", 3, "--compile")
    torch.testing.assert_close(losses(run, 1), losses(adversarial / "out/tiny", 1)[:3], rtol=1e-4, atol=1e-5)


def test_no_epochs_measure_the_statistics_only(tmp_path, photos):
    text = launch("train_decoder.py", *DECODER, "--data", photos, "--epochs", 0, cwd=tmp_path)
    saved = load(tmp_path / "out/tiny")
    assert "wrote out/tiny/rae.pt" in text and saved["step"] == 0 and saved["var"].min() > 0 and saved["var"].std() > 0

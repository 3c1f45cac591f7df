"""What the two training loops compute: steps of the real scripts against the paper's formulas.

Weights, images and keys are small and fixed. A few lines of plain torch compute a step's losses, gradients,
learning rate and average from the state that the script saved before it; the state saved after it must
agree. AdamW divides a gradient by its own size, so that the change of a weight can hang on a rounding:
gradients are compared as `exp_avg` holds them, weights with the change that the moments make.
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_it_was
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import fid
import train_decoder
import train_dit
from rae import (DECODERS, RAE, Decoder, center_crop, load_rae, mix, normals, open_data, open_val,
                 random_crop, read_image, shuffled, ssim)
from train_decoder import Discriminator
from train_dit import DiT, load_dit

TRAIN, HELD = 12, 8                                                           # images
BATCH = 6
EPOCH = 2                                                                     # in steps
SCHEDULE = 8                                                                  # steps of 4 epochs
TOKENS, DIM = 16, 96                                                          # of the encoder `tiny`
CPU = torch.device("cpu")
COMMON = ("--batch", BATCH, "--epochs", 4, "--warmup", 1,
          "--dtype", "fp32", "--workers", 0, "--log-every", 1, "--save-every", 1)


# The scripts, in this process

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of smooth pictures in three classes, of odd sizes: train/ and val/."""
    path = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", TRAIN), ("val", HELD)):
        for i in range(count):
            coarse = torch.rand(1, 3, 6, 6, generator=generator)
            smooth = F.interpolate(coarse, (52 + i, 41 + 2 * i), mode="bicubic").clamp(0, 1)
            folder = path / part / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(smooth[0]).save(folder / f"{i}.png")
    return path


def perceptual(a, b):
    """In place of LPIPS: a distance that is another one for images in [0,1] than for those in [-1,1]."""
    return (a.sin() - b.sin()).square().mean((1, 2, 3), keepdim=True)


def run(script, *flags, cwd):
    """The script's own main, and what can be seen from outside: its checkpoints, {step: state}; what it
    augmented, {key: image}; the images of its last picture."""
    seen = SimpleNamespace(states={}, augmented={}, shown=None)
    real_augment = train_decoder.augment
    real_save = script.save_checkpoint

    def save_checkpoint(path, **state):
        real_save(path, **state)
        seen.states[state["step"]] = torch.load(path, weights_only=True)

    def augment(images, keys):
        seen.augmented.update(zip(keys.tolist(), images.detach()))
        return real_augment(images, keys)

    def save_picture(images, *_, **__):
        seen.shown = images

    with as_it_was(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_decoder, "augment", augment)
        patch.setattr(train_decoder, "load_lpips", lambda *_: perceptual)
        patch.setattr(script, "save_checkpoint", save_checkpoint)
        patch.setattr(script, "save_picture", save_picture)
        patch.setattr("sys.argv", [script.__name__, *map(str, flags)])
        patch.chdir(cwd)
        script.main()
    return seen


def add_log(seen, folder):
    """The run's lines of training, and those of evaluation, each {step: line}."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seen.training = {line["step"]: line for line in lines if "loss" in line}
    seen.evaluations = {line["step"]: line for line in lines if "loss" not in line}


def held_out(pictures):
    """(images (B,3,32,32) in [0,1], labels) of the held-out pictures."""
    dataset = open_val(None, str(pictures), 32)
    images, labels, _ = zip(*(dataset[i, i] for i in range(HELD)))
    return torch.stack(images).float() / 255, torch.tensor(labels)


def micros_of(run, step):
    """The micro-batches of a step, each (images (b,3,32,32) in [0,1], labels, keys)."""
    order = iter(shuffled(TRAIN, BATCH, run.accum, 0, step))
    for _ in range(run.accum):
        images, labels, keys = zip(*(run.data[index, key] for index, key in next(order)))
        yield torch.stack(images).float() / 255, torch.tensor(labels), torch.tensor(keys)


def accumulation(flags):
    return BATCH // flags[flags.index("--micro") + 1] if "--micro" in flags else 1


def mean_of(rows):
    """The means over rows of equally many tensors: accumulated losses and gradients."""
    return [torch.stack(column).mean(0) for column in zip(*rows)]


def uniform(x):
    """Standard normal numbers as uniform ones: their distribution function."""
    return (1 + torch.erf(x / 2 ** 0.5)) / 2


# What the optimisers did

def moments_of(optimizer, model):
    """{parameter: (steps, exp_avg, exp_avg_sq)} of a saved optimiser; zeros before its first step."""
    group, = optimizer["param_groups"]
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0 and group["eps"] == 1e-8
    assert not group["amsgrad"]
    found = {}
    for index, (name, parameter) in enumerate(trained_in(model)):
        zero = torch.zeros_like(parameter)
        state = optimizer["state"].get(index, dict(step=0, exp_avg=zero, exp_avg_sq=zero))
        found[name] = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
    return found


def trained_in(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_adamw(model, before, after, gradients, lr, which=("model", "optimizer")):
    """before, after: the states around a step; `model` holds the former's weights; gradients: by hand."""
    weights, optimizer = which
    old = moments_of(before[optimizer], model)
    new = moments_of(after[optimizer], model)
    assert after[optimizer]["param_groups"][0]["lr"] == pytest.approx(lr, rel=1e-6)
    whole = norm_of(gradients.values())
    for name, gradient in gradients.items():
        steps, m0, v0 = old[name]
        steps_now, m, v = new[name]
        assert steps_now == steps + 1
        seen = (m - 0.9 * m0) / 0.1                                           # m = 0.9 m0 + 0.1 gradient
        error = (seen - gradient).norm()
        assert error < 2e-3 * gradient.norm() + 1e-5 * whole, f"{name}: {error} of {gradient.norm()}"
        expected = 0.95 * v0 + 0.05 * seen.square()
        torch.testing.assert_close(v, expected, rtol=1e-2, atol=1e-5 * v.max().item())

        mean = m / (1 - 0.9 ** steps_now)
        root = (v / (1 - 0.95 ** steps_now)).sqrt()
        expected = before[weights][name] - lr * mean / (root + 1e-8)
        torch.testing.assert_close(after[weights][name], expected, rtol=1e-5, atol=1e-4 * lr)


def norm_of(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def check_average(before, after, decay):
    """ema <- d ema + (1 - d) model, of the weights after the step."""
    for name, weight in after["model"].items():
        expected = decay * before["ema"][name] + (1 - decay) * weight
        torch.testing.assert_close(after["ema"][name], expected, rtol=1e-5, atol=1e-7)


# Stage 1

RATE_1, DECAY_1, TAU, LPIPS_WEIGHT, GAN_WEIGHT = 2e-3, 0.8, 0.6, 0.7, 0.5
DISC_BEGINS, GAN_BEGINS = 1, 2                                                # steps: 0.6, 1.6 rounded up
STAGE_1 = ("--encoder", "tiny", *COMMON, "--lr", RATE_1, "--ema", DECAY_1, "--tau", TAU,
           "--lpips-weight", LPIPS_WEIGHT, "--gan-weight", GAN_WEIGHT, "--disc", "tiny",
           "--disc-start", 0.3, "--gan-start", 0.8)


def decoder_to_start_from(folder):
    """A rae.pt whose images leave [0,1] here and there, and whose raw weights are not their average."""
    torch.manual_seed(1)
    rae = RAE("tiny", "tiny", 32)
    torch.nn.init.normal_(rae.decoder.cls_token, std=0.1)                     # at 0 its gradient is 1e3
    rae.decoder.predict.weight.data.mul_(4)
    ema = rae.decoder.state_dict()
    folder.mkdir()
    torch.save(dict(config=rae.config, mean=rae.mean, var=rae.var, encoder=None, ema=ema,
                    model={name: weight + 1 for name, weight in ema.items()}), folder / "rae.pt")
    return ema


def run_stage_1(cwd, pictures, *flags):
    init = decoder_to_start_from(cwd / "init")
    seen = run(train_decoder, *STAGE_1, "--data", pictures, "--init", cwd / "init", *flags, cwd=cwd)
    seen.accum = accumulation(flags)
    seen.folder = cwd / "out/tiny"
    seen.init = init
    seen.data = open_data(str(pictures), 32, crop=True)
    seen.held = held_out(pictures)
    add_log(seen, seen.folder)
    return seen


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory, pictures):
    return run_stage_1(tmp_path_factory.mktemp("stage1"), pictures)


class Autoencoder:
    """That of a saved state, by hand: the two networks alone are the project's."""

    def __init__(self, state, weights="model"):
        self.tokens = RAE("tiny", "tiny", 32).load_encoder().tokens
        self.decoder = Decoder(TOKENS, DIM, patch=8, **DECODERS["tiny"])
        self.decoder.load_state_dict(state[weights])
        self.mean, self.std = state["mean"], (state["var"] + 1e-5).sqrt()

    def encode(self, images):
        return (self.tokens(images) - self.mean) / self.std

    def decode(self, z):
        return self.decoder(z * self.std + self.mean) * 0.5 + 0.5             # pixel mean and std

    def with_noise(self, z, keys, kind="halfnormal"):
        """sigma eps on the layer-normed tokens, one sigma per image: |N(0, tau^2)| or tau U(0, 1)."""
        draws = normals(keys, TOKENS * DIM + 1, CPU)
        eps, u = draws[:, :-1].view_as(z), draws[:, -1]
        sigma = TAU * (u.abs() if kind == "halfnormal" else uniform(u))
        return z + sigma[:, None, None] * eps / self.std


def discriminator(state):
    disc = Discriminator("tiny")
    disc.heads.load_state_dict(state["disc"])
    return disc


def cosine(at):
    """Stage 1's learning rate after `at` steps: an epoch of linear warm-up, then a cosine to a tenth."""
    progress = max(at - EPOCH, 0) / (SCHEDULE - EPOCH)
    return RATE_1 * min(1, (at + 1) / EPOCH) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def decoder_step(run, step, kind="halfnormal", lpips_weight=LPIPS_WEIGHT):
    """By hand: the autoencoder before the step, what it must log, and the gradients."""
    rae = Autoencoder(run.states[step])
    weights = dict(rae.decoder.named_parameters())
    last = list(weights).index("predict.weight")
    losses = []
    gradients = []
    for images, _, keys in micros_of(run, step):
        copies = rae.decode(rae.with_noise(rae.encode(images), keys, kind))
        l1 = (copies - images).abs().mean()
        lpips = perceptual(2 * copies - 1, 2 * images - 1).mean()
        loss = l1 + lpips_weight * lpips
        pulls = torch.autograd.grad(loss, weights.values(), retain_graph=True)
        if step < GAN_BEGINS:
            losses.append((loss, l1, lpips))
            gradients.append(pulls)
            continue
        disc = discriminator(run.states[step]).eval()                         # no power iteration
        gan = -disc(train_decoder.augment(2 * copies - 1, mix(keys, 1))).mean()
        pushes = torch.autograd.grad(gan, weights.values())
        ratio = pulls[last].norm() / (pushes[last].norm() + 1e-6)             # lambda
        assert 0.1 < ratio < 1e3
        losses.append((loss + GAN_WEIGHT * ratio * gan, l1, lpips, gan, ratio))
        gradients.append([pull + GAN_WEIGHT * ratio * push for pull, push in zip(pulls, pushes)])
    logged = dict(zip(("loss", "l1", "lpips", "gan", "gan_lambda"), mean_of(losses)))
    return rae, logged, dict(zip(weights, mean_of(gradients)))


def test_stage_1_measures_centre_crops_and_starts_from_the_given_average(stage_1):
    state = stage_1.states[0]
    crops = [np.array(center_crop(read_image(path), 32)) for path, _ in stage_1.data.samples]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    tokens = Autoencoder(state).tokens(torch.cat([images, images.flip(-1)])).double()
    torch.testing.assert_close(state["mean"].double(), tokens.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["var"].double(), tokens.var(0, correction=0), rtol=1e-3, atol=1e-4)
    for part in ("model", "ema"):
        assert all(torch.equal(state[part][name], weight) for name, weight in stage_1.init.items())


def check_decoder_step(run, step):
    before, after, logged = run.states[step], run.states[step + 1], run.training[step + 1]
    rae, expected, gradients = decoder_step(run, step)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-3), name
    check_adamw(rae.decoder, before, after, gradients, cosine(step))
    check_average(before, after, DECAY_1)


def check_discriminator_step(run, step):
    before, after, logged = run.states[step], run.states[step + 1], run.training[step + 1]
    disc = discriminator(before).train()                                      # with power iterations
    weights = dict(trained_in(disc.heads))
    losses = []
    gradients = []
    for images, _, keys in micros_of(run, step):
        real = augmented_as(run, mix(keys, 2))
        fake = augmented_as(run, mix(keys, 3))
        torch.testing.assert_close(real, 2 * images - 1)
        check_fakes(fake, Autoencoder(after), images)
        real = train_decoder.augment(real, mix(keys, 2))
        fake = train_decoder.augment(fake, mix(keys, 3))
        of_real, of_fake = disc(torch.cat([real, fake])).chunk(2)
        loss = (F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean()) / 2
        losses.append([loss])
        gradients.append(torch.autograd.grad(loss, weights.values()))
    assert logged["disc"] == pytest.approx(mean_of(losses)[0].item(), rel=1e-3)
    gradients = dict(zip(weights, mean_of(gradients)))
    rate = cosine(step - DISC_BEGINS)
    check_adamw(disc.heads, before, after, gradients, rate, ("disc", "disc_optimizer"))
    for name, vector in disc.heads.named_buffers():                           # singular vectors
        torch.testing.assert_close(after["disc"][name], vector, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_of_the_decoder_is_the_papers(stage_1, step):
    """Step 0: L1, LPIPS. Step 1: the discriminator learns, unseen by the decoder. Step 2: its loss counts."""
    check_decoder_step(stage_1, step)


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_of_the_discriminator_is_the_papers(stage_1, step):
    check_discriminator_step(stage_1, step)


def test_accumulated_adversarial_steps_are_means_over_micro_batches_each_with_its_own_lambda(
        pictures, tmp_path):
    accumulated = run_stage_1(tmp_path, pictures, "--micro", 2, "--steps", 5)             # of 8
    check_decoder_step(accumulated, 0)
    check_decoder_step(accumulated, 4)
    check_discriminator_step(accumulated, 4)


def augmented_as(run, keys):
    """The images (B,3,H,W) that were augmented with these keys."""
    return torch.stack([run.augmented[key] for key in keys.tolist()])


def check_fakes(fake, rae, images, noise=lambda z: z):
    """fake (B,3,H,W) in [-1,1]: what `rae`, the updated one, makes of latents, as an 8-bit file has it."""
    with torch.no_grad():
        copies = rae.decode(noise(rae.encode(images)))
    assert copies.min() < 0 and copies.max() > 1                              # something must be clamped
    levels = (fake + 1) / 2 * 255
    assert -0.01 < levels.min() and levels.max() < 255.01
    assert (levels - levels.round()).abs().max() < 0.01
    assert (levels - 255 * copies.clamp(0, 1)).abs().max() < 0.55


def test_the_discriminator_waits_for_its_epoch_and_the_decoder_for_the_discriminator(stage_1):
    assert stage_1.states[1]["disc_optimizer"]["state"] == {} and "disc" not in stage_1.training[1]
    seen = []
    for step in range(3):
        (_, _, keys), = micros_of(stage_1, step)
        seen.append([key in stage_1.augmented for key in mix(keys, 1).tolist()])              # the decoder's
    assert seen == [[False] * BATCH, [False] * BATCH, [True] * BATCH]


def test_stage_1_falls_along_a_cosine_to_a_tenth_and_the_discriminator_by_its_own_updates(stage_1):
    rates = [stage_1.training[step + 1]["lr"] for step in range(SCHEDULE)]
    assert rates == pytest.approx([cosine(step) for step in range(SCHEDULE)], rel=1e-6)
    assert rates[0] == RATE_1 / 2 and rates[1] == RATE_1 and 0.1 * RATE_1 < rates[-1] < 0.2 * RATE_1
    last, = stage_1.states[SCHEDULE]["disc_optimizer"]["param_groups"]
    assert last["lr"] == pytest.approx(cosine(SCHEDULE - 1 - DISC_BEGINS), rel=1e-6)


@pytest.fixture(scope="module")
def other_noise(tmp_path_factory, pictures):
    """Uniform noise strengths, a discriminator of noisy latents, no LPIPS."""
    cwd = tmp_path_factory.mktemp("noise")
    return run_stage_1(cwd, pictures, "--noise", "uniform", "--disc-input", "noisy", "--lpips-weight", 0,
                       "--steps", 2)


def test_uniform_noise_and_a_discriminator_of_noisy_latents_are_as_stated(other_noise):
    for step in (0, 1):
        _, expected, _ = decoder_step(other_noise, step, "uniform", lpips_weight=0)
        logged = other_noise.training[step + 1]
        assert logged["loss"] == pytest.approx(expected["l1"].item(), rel=1e-3) and "lpips" not in logged
    (images, _, keys), = micros_of(other_noise, 1)
    fake = augmented_as(other_noise, mix(keys, 3))
    rae = Autoencoder(other_noise.states[2])
    check_fakes(fake, rae, images, lambda z: rae.with_noise(z, mix(keys, 4), "uniform"))


def test_stage_1_evaluates_the_average_on_held_out_images_and_noisy_latents(stage_1):
    line = stage_1.evaluations[SCHEDULE]
    images, _ = stage_1.held
    rae = Autoencoder(stage_1.states[SCHEDULE], "ema")
    z = rae.encode(images)
    eps = normals(mix(0, 2, torch.arange(HELD)), TOKENS * DIM, CPU).view_as(z)
    assert line["n"] == HELD
    for sigma, at in ((0, ""), (0.1, "@0.1"), (0.2, "@0.2"), (0.4, "@0.4")):
        with torch.no_grad():
            copies = (rae.decode(z + sigma * eps).clamp(0, 1) * 255).round() / 255
        psnr = -10 * (copies - images).square().mean((1, 2, 3)).log10()
        assert line[f"psnr{at}"] == pytest.approx(psnr.mean().item(), rel=1e-5)
        lpips = perceptual(2 * copies - 1, 2 * images - 1)
        assert line[f"lpips{at}"] == pytest.approx(lpips.mean().item(), rel=1e-4)
        similarity = ssim(copies, images).mean().item()
        assert line[f"ssim{at}"] == pytest.approx(similarity, rel=1e-3, abs=1e-5)


def test_stage_1_shows_originals_their_copies_and_those_of_noisy_latents_by_the_average(stage_1):
    images, _ = stage_1.held
    rae = Autoencoder(stage_1.states[SCHEDULE], "ema")
    z = rae.encode(images)
    eps = normals(torch.arange(HELD), TOKENS * DIM, CPU).view_as(z)
    with torch.no_grad():
        expected = torch.cat([images, rae.decode(z), rae.decode(z + 0.4 * eps)])
    torch.testing.assert_close(stage_1.shown.clamp(0, 1), expected.clamp(0, 1), rtol=0, atol=2e-3)


# Stage 2

RATE_2, DECAY_2, DROPOUT, BASE = 2e-3, 0.7, 0.4, 170
ALPHA = (TOKENS * DIM / BASE) ** 0.5
SIZES = dict(width=64, depth=1, heads=4, head_depth=1, head_heads=4)
STAGE_2 = (*COMMON, "--lr", RATE_2, "--ema", DECAY_2, "--label-dropout", DROPOUT, "--shift-base", BASE,
           "--decay-start", 1.5, "--decay-end", 3.5, "--width", 64, "--depth", 1, "--heads", 4,
           "--head-depth", 1, "--head-heads", 4)


def dit_to_start_from(folder, head=96, **more):
    """A dit.pt of large weights, whose raw weights are not their average."""
    torch.manual_seed(2)
    model = DiT(tokens=TOKENS, token_dim=DIM, num_classes=3, head=head, **SIZES, **more)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ema = model.state_dict()
    folder.mkdir(exist_ok=True)
    torch.save(dict(config=model.config, classes=["a", "b", "c"], alpha=1.0, rae=None, ema=ema,
                    model={name: weight + 1 for name, weight in ema.items()}), folder / "dit.pt")
    return ema


def run_stage_2(cwd, pictures, autoencoder, *flags, head=96, **more):
    """A run of stage 2 on the autoencoder in a folder; more: of the model that it starts from."""
    init = dit_to_start_from(cwd / "init", head=head, **more)
    seen = run(train_dit, *STAGE_2, "--data", pictures, "--rae", autoencoder, "--run", cwd / "run",
               "--init", cwd / "init", "--head", head, *flags, cwd=cwd)
    seen.accum = accumulation(flags)
    seen.states[0] = dict(model=init, ema=init, optimizer=dict(seen.states[1]["optimizer"], state={}))
    seen.data = open_data(str(pictures), 32)
    seen.held = held_out(pictures)
    add_log(seen, cwd / "run")
    return seen


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory, pictures, stage_1):
    cwd = tmp_path_factory.mktemp("stage2")
    return run_stage_2(cwd, pictures, stage_1.folder, "--eval-every", SCHEDULE)


def diffusion_step(run, model, autoencoder, step, alpha=ALPHA, time="logit-normal", clip=1.0, base=False):
    """By hand, of the model before the step: its loss and the clipped gradients."""
    parameters = dict(trained_in(model))
    losses = []
    gradients = []
    for micro in micros_of(run, step):
        loss = diffusion_loss(model, autoencoder, micro, alpha, time, base)
        losses.append([loss])
        gradients.append(torch.autograd.grad(loss, parameters.values()))
    gradients = mean_of(gradients)
    norm = norm_of(gradients)
    assert norm > 1.5                                                         # something must be clipped
    scale = clip / norm if clip else 1
    clipped = {name: scale * gradient for name, gradient in zip(parameters, gradients)}
    return mean_of(losses)[0], clipped


def diffusion_loss(model, autoencoder, micro, alpha, time, base):
    """By hand, of a micro-batch: mirrored by a coin, encoded, mixed with noise, labels dropped."""
    images, labels, keys = micro
    mirror = keys % 2 == 1
    images[mirror] = images[mirror].flip(-1)
    z = autoencoder.encode(images)

    draws = normals(keys, TOKENS * DIM + 2, CPU)
    eps = draws[:, :-2].view_as(z)
    u, coin = draws[:, -2], uniform(draws[:, -1])
    t = 1 / (1 + (-u).exp()) if time == "logit-normal" else uniform(u)
    t = alpha * t / (1 + (alpha - 1) * t)
    dropped = coin < DROPOUT
    assert 0 < mirror.sum() + dropped.sum() < 2 * len(keys)
    labels[dropped] = 3                                                       # the null class

    at = t[:, None, None]
    x_t = (1 - at) * z + at * eps
    if not base:
        return (model(x_t, t, labels) - (eps - z)).square().mean()
    v = (x_t - z) / at.clamp(min=0.05)                                        # RAEv2: of two outputs, x
    return sum((out - v).square().mean() for out in model(x_t, t, labels, base=True))


def linear(at):
    """Stage 2's learning rate after `at` steps: an epoch of warm-up, from epoch 1.5 to 3.5 to a tenth."""
    fallen = min(max((at / EPOCH - 1.5) / 2, 0), 1)
    return RATE_2 * min(1, (at + 1) / EPOCH) * (1 - 0.9 * fallen)


def dit_of(state, config, weights):
    model = DiT(**config)
    model.load_state_dict(state[weights])
    return model


def check_diffusion_step(run, autoencoder, step, **settings):
    before, after, logged = run.states[step], run.states[step + 1], run.training[step + 1]
    model = dit_of(before, after["config"], "model")
    loss, gradients = diffusion_step(run, model, autoencoder, step, **settings)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-3)
    check_adamw(model, before, after, gradients, linear(step))
    check_average(before, after, DECAY_2)


@pytest.fixture(scope="module")
def autoencoder(stage_1):
    """That of the finished run, whose average is what stage 2 takes."""
    return Autoencoder(stage_1.states[SCHEDULE], "ema")


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_of_the_dit_is_the_papers(stage_2, autoencoder, step):
    check_diffusion_step(stage_2, autoencoder, step)


def test_a_step_without_head_shift_and_clipping_at_uniform_times_is_the_papers(
        stage_1, autoencoder, pictures, tmp_path):
    plain = run_stage_2(tmp_path, pictures, stage_1.folder, "--no-shift", "--time", "uniform",
                        "--steps", 1, head=0)
    check_diffusion_step(plain, autoencoder, 0, alpha=1, time="uniform", clip=None)


def test_an_accumulated_step_is_clipped_once_to_the_norm_given(stage_1, autoencoder, pictures, tmp_path):
    clipped = run_stage_2(tmp_path, pictures, stage_1.folder, "--clip", 0.5, "--micro", 3, "--steps", 1)
    check_diffusion_step(clipped, autoencoder, 0, clip=0.5)


def test_an_accumulated_step_has_the_mean_of_its_micro_batches_gradients(stage_1, autoencoder, pictures, tmp_path):
    whole = run_stage_2(tmp_path, pictures, stage_1.folder, "--clip", 0, "--micro", 3, "--steps", 1)
    check_diffusion_step(whole, autoencoder, 0, clip=None)                    # clipping would hide their sum


def test_a_step_of_x_prediction_with_a_base_head_is_that_of_raev2(stage_1, autoencoder, pictures, tmp_path):
    own = run_stage_2(tmp_path, pictures, stage_1.folder, "--predict", "x", "--base-head", 1, "--no-shift",
                      "--time", "uniform", "--steps", 1, predict="x", base_head=1)
    check_diffusion_step(own, autoencoder, 0, alpha=1, time="uniform", base=True)


def test_stage_2_warms_up_and_falls_linearly_to_a_tenth(stage_2):
    rates = [stage_2.training[step + 1]["lr"] for step in range(SCHEDULE)]
    assert rates == pytest.approx([linear(step) for step in range(SCHEDULE)], rel=1e-6)
    assert rates[0] == RATE_2 / 2 and rates[1] == rates[3] == RATE_2
    assert rates[-1] == pytest.approx(RATE_2 / 10)


@torch.no_grad()
def integrated(model, labels, noise, steps=25):
    """By hand: Euler from t = 1 to t = 0 on the shifted uniform grid."""
    grid = [(steps - i) / steps for i in range(steps + 1)]
    times = [ALPHA * t / (1 + (ALPHA - 1) * t) for t in grid]
    z = noise
    for now, then in zip(times, times[1:]):
        z = z - (now - then) * model(z, torch.full((len(z),), now), labels)
    return z


def check_judged(run, autoencoder, step, label):
    """The evaluation's line is that of the average; label: what becomes of the classes."""
    model = dit_of(run.states[step], run.states[step]["config"], "ema")
    images, labels = run.held
    labels = label(labels)
    z = autoencoder.encode(images)
    indices = torch.arange(HELD)
    eps = normals(mix(0, 3, indices), TOKENS * DIM, CPU).view_as(z)
    noise = normals(mix(0, 4, indices), TOKENS * DIM, CPU).view_as(z)
    line = run.evaluations[step]
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        with torch.no_grad():
            v = model((1 - t) * z + t * eps, torch.full((HELD,), t), labels)
        assert line[f"loss@{t}"] == pytest.approx((v - (eps - z)).square().mean().item(), rel=1e-3), t
    generated = integrated(model, labels, noise)
    fake, real = (fid.moments((x * autoencoder.std + autoencoder.mean).mean(1)) for x in (generated, z))
    assert line["n"] == HELD
    assert line["fd"] == pytest.approx(fid.frechet_distance(*fake, *real), rel=1e-3)


def check_shown(run, autoencoder, step, label):
    """The picture, five rows of ten columns of classes, is the average's."""
    model = dit_of(run.states[step], run.states[step]["config"], "ema")
    numbers = torch.arange(50)
    noise = normals(mix(0, numbers), TOKENS * DIM, CPU).view(50, TOKENS, DIM)
    with torch.no_grad():
        expected = autoencoder.decode(integrated(model, label(numbers % 10 % 3), noise))
    torch.testing.assert_close(run.shown.clamp(0, 1), expected.clamp(0, 1), rtol=0, atol=2e-3)


def test_stage_2_judges_and_shows_the_average(stage_2, autoencoder):
    check_judged(stage_2, autoencoder, SCHEDULE, lambda labels: labels)
    check_shown(stage_2, autoencoder, SCHEDULE, lambda labels: labels)
    state = stage_2.states[SCHEDULE]
    assert state["classes"] == ["class0", "class1", "class2"] and state["alpha"] == pytest.approx(ALPHA)


def test_an_unconditional_model_is_judged_and_shown_without_labels(
        stage_1, autoencoder, pictures, tmp_path):
    free = run_stage_2(tmp_path, pictures, stage_1.folder, "--label-dropout", 1, "--eval-every", 1,
                       "--steps", 1)
    null = lambda labels: torch.full_like(labels, 3)
    check_judged(free, autoencoder, 1, null)
    check_shown(free, autoencoder, 1, null)
    assert free.states[1]["classes"] == []


# What the loops stand on

def test_files_are_loaded_for_use_with_their_average(tmp_path):
    ema = decoder_to_start_from(tmp_path / "rae")
    decoder = load_rae(tmp_path / "rae").decoder
    assert all(torch.equal(value, ema[name]) for name, value in decoder.state_dict().items())
    ema = dit_to_start_from(tmp_path / "dit")
    dit = load_dit(tmp_path / "dit")
    assert all(torch.equal(value, ema[name]) for name, value in dit.state_dict().items())


def test_the_decoder_is_given_the_encoders_tokens_and_its_pixels_are_put_back():
    torch.manual_seed(0)
    rae = RAE("tiny", "tiny", 32).load_encoder()
    rae.mean.normal_()
    rae.var.uniform_(0.5, 2)
    images = torch.rand(2, 3, 32, 32)
    seen = []

    def spy(x):
        seen.append(x)
        return torch.full((2, 3, 32, 32), 0.25)
    decoded = rae.decode(rae.encode(images), spy)
    torch.testing.assert_close(seen[0], rae.tokens(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded, torch.full_like(decoded, 0.25 * 0.5 + 0.5))


def test_no_two_steps_or_places_share_a_key():
    keys = []
    for rank in (0, 1):
        for step in range(5):
            micros = iter(shuffled(12, 4, 2, 0, step, rank, 2))
            keys += [key for _ in range(2) for _, key in next(micros)]
    assert len(keys) == 2 * 5 * 2 and len(set(keys)) == len(keys)
    other_seed = next(iter(shuffled(12, 4, 1, 1)))
    assert not set(keys) & {key for _, key in other_seed}
    of_seed_3_in_step_5 = next(iter(shuffled(12, 4, 1, 3, 5)))
    assert [key for _, key in of_seed_3_in_step_5] == mix(3, 5, torch.arange(4)).tolist()


def test_a_random_crop_is_two_thirds_of_the_shorter_side_anywhere():
    """Of a picture whose red tells the column and whose green tells the row."""
    ramp = np.linspace(0, 255, 240).round().astype(np.uint8)
    columns, rows = np.meshgrid(ramp, np.pad(ramp, (0, 60), "edge"))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1))          # 240 wide, 300 high
    corners = []
    for key in range(300):
        crop = np.array(random_crop(image, 32, key)).astype(int)
        assert crop.shape == (32, 32, 3)
        span = crop[:, -1, 0] - crop[:, 0, 0]
        assert np.abs(span - 255 * 31 / 48).max() < 6                         # 32 of 48 pixels
        corners.append(crop[0, 0, :2] / 255 * 48 - 0.5)
    columns, rows = np.array(corners).round().astype(int).T
    assert set(columns) == set(range(17)) and set(rows) == set(range(29))     # of 48 x 60 pixels
    assert np.array_equal(random_crop(image, 32, 7), random_crop(image, 32, 7))

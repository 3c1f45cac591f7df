"""The diffusion transformer and its loss."""
import math

import pytest
import torch

from rae import attention, grid_angles
from train_dit import (RECIPES, AdaRMSNorm, DiT, flow_matching_loss, linear_lr, parse_args, rotate, shift_alpha,
                       time_shift)

SMALL = dict(tokens=9, token_dim=24, width=32, depth=2, heads=2, head=48, head_depth=2, head_heads=4, num_classes=5)


def random_dit(**changes):
    torch.manual_seed(0)
    model = DiT(**(SMALL | changes))
    for parameter in model.parameters():                                      # a fresh one gives 0
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_shift_of_the_paper():
    assert shift_alpha(256, 768) == pytest.approx(6.928, abs=1e-3) and shift_alpha(1024, 768) == pytest.approx(13.856, abs=1e-3)
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(time_shift(t, 1), t)
    assert time_shift(torch.tensor(0.5), 4.0) == pytest.approx(0.8)
    s = time_shift(t, 6.9)
    torch.testing.assert_close(time_shift(s, 1 / 6.9), t)                     # the inverse shift
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()


def test_rotary_attention_depends_on_differences_of_position_only():
    cos, sin = (f(grid_angles(4, 16)).float() for f in (torch.cos, torch.sin))                # 16 places, head dim 16
    q, k = torch.randn(2, 16).unbind()
    score = lambda i, j: rotate(q[None, None, None], cos[i:i + 1], sin[i:i + 1]).flatten() @ rotate(
        k[None, None, None], cos[j:j + 1], sin[j:j + 1]).flatten()
    at = lambda row, column: 4 * row + column
    torch.testing.assert_close(score(at(0, 1), at(2, 0)), score(at(1, 3), at(3, 2)))          # moved by (1, 2)
    assert abs(score(at(0, 1), at(2, 0)) - score(at(0, 1), at(0, 2))) > 1e-3
    pair = rotate(torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4), *(f(torch.tensor([[0.3, 0.0]])) for f in (torch.cos, torch.sin)))
    torch.testing.assert_close(pair.flatten(), torch.tensor([math.cos(0.3), math.sin(0.3), 0, 0]))       # (a,b) -> (-b,a)


def test_attention_in_bf16_is_the_softmax():
    q, k, v = torch.randn(3, 2, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    torch.testing.assert_close(out, (q @ k.mT / math.sqrt(8)).softmax(-1) @ v)


def test_times_and_the_residual_streams_stay_in_fp32_under_autocast():
    model = random_dit()
    t = torch.tensor([0.997, 0.998])                                          # one and the same in bf16
    expected = model.t_embedder(t)
    seen = []
    for block in (model.blocks[0], model.blocks[2]):                          # the first of the backbone, of the head
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.t_embedder(t), expected) and (expected[0] != expected[1]).any()
        model(torch.randn(2, 9, 24), t, torch.tensor([1, 5]))
    assert seen == [torch.float32, torch.float32]


def test_adaptive_rms_norm_is_its_formula():
    x, norm, (shift, scale) = 3 * torch.randn(4, 5, 7), AdaRMSNorm(7, eps=1e-6), torch.randn(2, 4, 1, 7)
    norm.weight.data.uniform_()
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x, shift, scale), expected * (1 + scale) + shift)


@pytest.mark.parametrize("head", [0, 48, 32])
def test_a_fresh_model_gives_zero_and_a_trained_one_listens_to_everything(head):
    x, t, y = torch.randn(2, 9, 24), torch.tensor([0.3, 0.8]), torch.tensor([1, 5])
    assert DiT(**(SMALL | dict(head=head)))(x, t, y).abs().max() == 0
    model = random_dit(head=head)
    v = model(x, t, y)
    assert v.shape == x.shape and v.dtype == torch.float32
    for changed in ((x + 1, t, y), (x, t + 0.1, y), (x, t, y - 1)):
        assert not torch.allclose(model(*changed), v)
    torch.testing.assert_close(model(x[:1], t[:1], y[:1]), v[:1])             # images do not see each other
    moved = x.clone()
    moved[0, 3] += 1
    assert (model(moved, t, y) != v)[0].any(1).all()                          # but tokens do


def test_zero_heads_blocks_start_as_the_identity():
    model = DiT(**SMALL)
    x, c = torch.randn(2, 9, 32), torch.randn(2, 1, 32)
    assert torch.equal(model.blocks[0](x, c, model.cos, model.sin), x)


@pytest.mark.parametrize("changes, sentence", [
    (dict(width=30), "width 30 .*--heads"), (dict(head=50), "head 50 .*--head-heads"), (dict(tokens=10), "10 tokens"),
    (dict(width=36), "multiple of 4")])
def test_impossible_sizes_are_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiT(**(SMALL | changes))


def test_the_loss_of_the_true_velocity_is_zero_and_that_of_no_velocity_is_known():
    torch.manual_seed(0)
    z, y = torch.randn(64, 9, 24), torch.zeros(64, dtype=torch.long)
    truth = lambda x_t, t, y: (x_t - z) / t[:, None, None]                    # eps - z, from x_t = (1-t) z + t eps
    assert flow_matching_loss(truth, z, y, alpha=2.0) < 1e-6
    zero = lambda x_t, t, y: torch.zeros_like(x_t)
    assert flow_matching_loss(zero, z, y, alpha=2.0) == pytest.approx(2.0, abs=0.05)          # E|eps|^2 + E|z|^2


@pytest.mark.parametrize("time, median", [("logit-normal", 0.5), ("uniform", 0.5)])
def test_times_are_shifted_and_of_the_stated_kind(time, median):
    seen = []
    def spy(x_t, t, y):
        seen.append(t)
        return x_t
    for alpha in (1.0, 4.0):
        torch.manual_seed(0)
        flow_matching_loss(spy, torch.zeros(4000, 1, 4), torch.zeros(4000), alpha, time=time)
    plain, shifted = seen
    torch.testing.assert_close(time_shift(plain, 4.0), shifted)
    assert plain.median() == pytest.approx(median, abs=0.02)
    spread = plain.std() if time == "uniform" else plain.logit().std()
    assert spread == pytest.approx(12 ** -0.5 if time == "uniform" else 1, abs=0.03)


def test_labels_are_dropped_at_the_stated_rate_and_noise_follows_the_key():
    class Spy(torch.nn.Module):
        num_classes = 5
        def forward(self, x_t, t, y):
            self.seen = x_t, t, y
            return x_t
    spy, keys = Spy(), torch.arange(4000)
    z, y = torch.randn(4000, 1, 4), torch.randint(5, (4000,))
    flow_matching_loss(spy, z, y, 1.0, keys, label_dropout=0.1)
    x_t, t, dropped = spy.seen
    assert (dropped == 5).float().mean() == pytest.approx(0.1, abs=0.015) and (dropped == y)[dropped != 5].all()
    flow_matching_loss(spy, z[7:9], y[7:9], 1.0, keys[7:9], label_dropout=0.1)
    assert all(torch.equal(a, b[7:9]) for a, b in zip(spy.seen, (x_t, t, dropped)))
    flow_matching_loss(spy, z, y, 1.0, keys, label_dropout=1.0)
    assert (spy.seen[2] == 5).all()


def test_compile_changes_nothing():
    model = random_dit(depth=1, head_depth=1)
    x, t, y = torch.randn(2, 9, 24), torch.tensor([0.3, 0.8]), torch.tensor([1, 5])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)      # one graph; inductor takes a minute
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ["dinov2_b", "tiny_vae"])
def test_a_recipe_is_overridden_by_given_flags_only(encoder):
    assert RECIPES["tiny"].keys() == RECIPES["paper"].keys()
    plain, given = (vars(parse_args(flags, encoder)) for flags in ([], ["--ema", "0.5", "--batch", "8"]))
    assert given == plain | dict(ema=0.5, batch=8) and plain["batch"] != 8


@pytest.mark.parametrize("head", [0, 2048])
def test_the_papers_settings_follow_from_the_head(head):
    args = parse_args(["--head", str(head)])
    assert (args.width, args.depth, args.heads, args.head) == (1152, 28, 16, head)            # XL
    assert (args.batch, args.lr, args.epochs, args.warmup) == (1024, 2e-4, 80, 0)
    assert (args.clip, args.ema) == ((1.0, 0.9995) if head else (0.0, 0.9999))
    rates = [linear_lr(1250 * epoch, 1250, args) / 2e-4 for epoch in (0, 40, 420, 800, 900)]
    assert rates == pytest.approx([1, 1, 0.55, 0.1, 0.1] if head else [1] * 5)


def test_small_times_are_clamped_alike_in_x_predictions_and_their_target():
    """A model that gives the clean latent itself has no loss; one that is off by 1 has that of 1 / max(t, .05)."""
    torch.manual_seed(0)
    z, times = torch.randn(4000, 1, 4), []

    class Known(torch.nn.Module):
        num_classes, predict, base_head, off = 5, "x", 0, 0.0

        def forward(self, x_t, t, y):
            times.append(t)
            return DiT.velocity(self, z + self.off, x_t, t)
    model, y, keys = Known(), torch.zeros(4000, dtype=torch.long), torch.arange(4000)
    assert flow_matching_loss(model, z, y, 1.0, keys, time="uniform") < 1e-9
    model.off = 1.0
    found = flow_matching_loss(model, z, y, 1.0, keys, time="uniform")
    assert (times[0] < 0.05).sum() > 100
    torch.testing.assert_close(found, times[0].clamp(min=0.05).square().reciprocal().mean(), rtol=1e-4, atol=1e-4)

"""Beyond the paper: predicting the latent x in place of v, and guidance by a base head inside the model."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DIT, ROOT, inside, launch, load, losses

import sample
from rae import UserError, count_flops
from sample import guided
from train_dit import DiT, flow_matching_loss, load_dit, warn_if_narrow

CPU = torch.device("cpu")
RAE = ROOT / "assets/demo/rae.pt"
SMALL = dict(tokens=9, token_dim=24, width=32, depth=2, heads=2, head=48, head_depth=2, head_heads=4,
             num_classes=5)
KINDS = [dict(predict=predict, base_head=base) for predict in "vx" for base in (0, 1, 2)]
BOTH = ("--predict", "x", "--base-head", 1)


def random_dit(**changes):
    torch.manual_seed(0)
    model = DiT(**(SMALL | changes))
    for parameter in model.parameters():                                      # a fresh one gives 0
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(count=2, tokens=9, dim=24):
    """x_t, t (one below the clamp), y."""
    torch.manual_seed(1)
    times = torch.tensor([0.03, 0.4, 0.8]).repeat(count)[:count]
    return torch.randn(count, tokens, dim), times, torch.arange(count) % 5


# x-prediction

def test_the_velocity_is_x_t_minus_x_over_a_clamped_time():
    x_t, t, y = inputs(3)
    given = random_dit()(x_t, t, y)                                           # the same weights, read as v
    by_hand = (x_t - given) / torch.tensor([0.05, 0.4, 0.8])[:, None, None]
    torch.testing.assert_close(random_dit(predict="x")(x_t, t, y), by_hand)


@pytest.mark.parametrize("time, alpha, weight", [
    ("uniform", 1.0, 2 / 0.05 - 1),                                           # int 1 / max(t, .05)^2 dt
    ("logit-normal", 4.0, 1 + 2 * math.exp(0.5) / 4 + math.exp(2) / 16)])     # E (1 + e^-u / 4)^2
@pytest.mark.parametrize("base_head", [0, 1])
def test_a_network_that_says_x_is_zero_has_the_closed_form_loss(time, alpha, weight, base_head):
    """|x|^2 E[w], once for each output: a fresh model says 0."""
    torch.manual_seed(0)
    model = DiT(1, 4, 8, 1, 1, 0, num_classes=1, predict="x", base_head=base_head)
    z = 1.5 * torch.ones(40_000, 1, 4)
    with torch.no_grad():
        loss = flow_matching_loss(model, z, torch.zeros(len(z), dtype=torch.long), alpha, time=time)
    assert loss == pytest.approx((1 + base_head) * 1.5 ** 2 * weight, rel=0.05)


class Knows(torch.nn.Module):
    """A model that knows the latents z, and gives them as a DiT with --predict x does."""
    predict = "x"
    velocity = DiT.velocity

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, x_t, t, y):
        self.t = t
        return self.velocity(self.z, x_t, t)


def test_the_target_is_clamped_like_the_prediction():
    """A network that is right about x has no loss, at whatever time."""
    torch.manual_seed(0)
    model = Knows(torch.randn(500, 9, 24))
    loss = flow_matching_loss(model, model.z, torch.zeros(500), alpha=0.2, time="uniform")
    assert (model.t < 0.05).float().mean() > 0.1 and loss < 1e-10


# The base head

@pytest.mark.parametrize("head", [0, 48])
@pytest.mark.parametrize("k", [1, 2])
def test_the_base_head_is_a_final_layer_on_the_tokens_after_block_k(k, head):
    """u = silu(t + s) is its input and, token by token, its condition."""
    model = random_dit(base_head=k, head=head)
    x_t, t, y = inputs(3)
    seen = []
    model.blocks[k - 1].register_forward_hook(lambda *args: seen.append(args[-1]))
    full, base = model(x_t, t, y, base=True)

    u = F.silu(model.t_embedder(t)[:, None] + seen[0])
    layer = model.base_layer
    shift, scale = layer.adaLN_modulation[1](F.silu(u)).chunk(2, -1)
    normed = layer.norm_final.weight * u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(base, layer.linear(normed * (1 + scale) + shift))
    assert torch.equal(full, model(x_t, t, y)) and not torch.allclose(full, base)


@pytest.mark.parametrize("predict", ["v", "x"])
def test_both_outputs_predict_the_same_thing(predict):
    """A base head at the last block, with the last layer's weights, on a fresh head-less model: x = 0 or v = 0."""
    x_t, t, y = inputs(3)
    full, base = DiT(**(SMALL | dict(predict=predict, base_head=2)))(x_t, t, y, base=True)
    assert torch.equal(full, base)
    assert full.any() == (predict == "x")


def test_the_loss_is_the_sum_of_both_outputs_losses():
    model = random_dit(base_head=1, predict="x")
    torch.manual_seed(2)
    z = torch.randn(8, 9, 24)
    keys = torch.arange(8)
    y = torch.arange(8) % 5
    both = flow_matching_loss(model, z, y, 3.0, keys)

    def one(number):
        class One(torch.nn.Module):
            predict = "x"
            num_classes = 5

            def forward(self, x_t, t, y):
                return model(x_t, t, y, base=True)[number]
        return flow_matching_loss(One(), z, y, 3.0, keys)
    torch.testing.assert_close(both, one(0) + one(1))
    assert not torch.allclose(one(0), one(1))


@pytest.mark.parametrize("head", [0, 48, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_in_every_step(kind, head):
    """Zeros at the start do not hide one: DDP would wait for it."""
    torch.manual_seed(0)
    model = DiT(**(SMALL | kind | dict(head=head)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        z = torch.randn(16, 9, 24)
        flow_matching_loss(model, z, torch.arange(16) % 5, 1.0, label_dropout=0.5).backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not still


def test_the_base_heads_loss_reaches_the_blocks_before_it_and_no_others():
    model = random_dit(base_head=1)
    x_t, t, y = inputs(3)
    model(x_t, t, y, base=True)[1].square().sum().backward()
    assert model.blocks[0].mlp.w3.weight.grad.any() and model.base_layer.linear.weight.grad.any()
    for part in (model.blocks[1], model.blocks[2], model.final_layer):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())


# What has neither

def test_the_defaults_are_the_papers_model():
    """No parameter, no draw of the generator, no other number."""
    rest = []
    for more in ({}, dict(predict="v", base_head=0)):
        torch.manual_seed(0)
        model = DiT(**(SMALL | more))
        rest.append((model.state_dict(), torch.rand(1)))
    (old, a), (new, b) = rest
    assert old.keys() == new.keys() and not any("base" in key for key in old) and a == b
    assert all(torch.equal(old[key], new[key]) for key in old)
    given = {name: default.default for name, default in inspect.signature(DiT).parameters.items()}
    assert given["predict"] == "v" and given["base_head"] == 0


def test_a_base_head_leaves_the_models_own_output_as_it_is():
    x_t, t, y = inputs(3)
    plain = random_dit()
    model = random_dit(base_head=1)
    missing, foreign = model.load_state_dict(plain.state_dict(), strict=False)
    assert not foreign and all(key.startswith("base_layer.") for key in missing)
    assert torch.equal(model(x_t, t, y, base=True)[0], plain(x_t, t, y))


class Plain(torch.nn.Module):
    """A model that says nothing of predict and base_head."""
    num_classes = 5

    def forward(self, x_t, t, y):
        return 0.3 * x_t


def test_a_model_without_the_attributes_is_a_plain_v_model():
    torch.manual_seed(0)
    z = torch.randn(64, 9, 24)
    y = torch.zeros(64, dtype=torch.long)
    keys = torch.arange(64)
    model = Plain()
    plain = flow_matching_loss(model, z, y, 1.0, keys)
    model.predict = "v"
    model.base_head = 0
    assert plain == flow_matching_loss(model, z, y, 1.0, keys)
    with pytest.raises(UserError, match="no base head"):
        guided(Plain(), y, 1.5, "self")


# Guidance by the model itself

def counted(model):
    """The sizes of the batches that the model is asked for, as they come."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("predict", ["v", "x"])
def test_guidance_by_itself_is_base_plus_s_times_full_minus_base_in_one_pass(predict):
    model = random_dit(base_head=1, predict=predict)
    z, _, y = inputs(3)
    t = torch.tensor(0.4)
    full, base = model(z, t.expand(3), y, base=True)
    seen = counted(model)
    torch.testing.assert_close(guided(model, y, 1.78, "self")(z, t), base + 1.78 * (full - base))
    torch.testing.assert_close(guided(model, y, 0.0, "self")(z, t), base)
    assert seen == [3, 3]                                                     # one pass each, of B images

    # To guide x is to guide v
    x_full, x_base = z - 0.4 * full, z - 0.4 * base
    by_x = (z - (x_base + 1.78 * (x_full - x_base))) / 0.4
    torch.testing.assert_close(guided(model, y, 1.78, "self")(z, t), by_x)


def test_scale_one_and_times_outside_the_interval_are_the_unguided_model():
    model = random_dit(base_head=2)
    z, _, y = inputs(3)
    velocity = guided(model, y, 1.78, "self", interval=(0.25, 0.75))
    for time, inside_it in ((0.25, True), (0.75, True), (0.2499, False), (0.7501, False)):
        t = torch.tensor(time)
        plain = model(z, t.expand(3), y)
        assert torch.equal(velocity(z, t), plain) != inside_it
        assert torch.equal(guided(model, y, 1.0, "self")(z, t), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_change_nothing(kind):
    model = random_dit(depth=2, head_depth=1, **kind)
    base = model.base_head > 0
    x_t, t, y = inputs(3)
    before = model(x_t, t, y, base)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(x_t, t, y, base), before, rtol=1e-4, atol=1e-4)


# The scripts

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four steps each on shapes: `plain`, and `both` with x-prediction and a base head."""
    folder = tmp_path_factory.mktemp("beyond")
    for name, flags in (("plain", ()), ("both", BOTH)):
        inside("train_dit.py", *DIT, *flags, "--rae", RAE, "--run", folder / name, "--steps", 4, cwd=folder)
    return folder


def test_what_was_trained_is_in_the_checkpoint_and_is_loaded(runs):
    config = load(runs / "both/dit.pt")["config"]
    assert config["predict"] == "x" and config["base_head"] == 1
    model = load_dit(runs / "both")
    assert model.predict == "x" and model.base_head == 1 and model.base_layer.linear.weight.any()


def test_a_checkpoint_that_names_neither_is_a_plain_model(runs, tmp_path):
    saved = load(runs / "plain/dit.pt")
    for part in ("config", "fixed"):
        del saved[part]["predict"], saved[part]["base_head"]
    torch.save(saved, tmp_path / "dit.pt")
    model = load_dit(tmp_path)
    assert model.predict == "v" and model.base_head == 0

    # It does not say as what it could go on
    with pytest.raises(UserError, match="predict was None, is x"):
        inside("train_dit.py", *DIT, "--rae", RAE, "--run", tmp_path, "--steps", 5, "--predict", "x", cwd=tmp_path)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(runs, tmp_path):
    for steps in (1, 4):
        inside("train_dit.py", *DIT, *BOTH, "--rae", RAE, "--run", tmp_path, "--steps", steps, cwd=tmp_path)
    one, two = load(runs / "both/dit.pt"), load(tmp_path / "dit.pt")
    for part in ("model", "ema"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())
    assert losses(runs / "both", 2) == losses(tmp_path, 2)


def test_two_ranks_train_a_base_head_as_one(runs, tmp_path):
    launch("train_dit.py", *DIT, *BOTH, "--rae", RAE, "--run", tmp_path, "--steps", 4, cwd=tmp_path, ranks=2)
    torch.testing.assert_close(losses(tmp_path, 2), losses(runs / "both", 2), rtol=1e-4, atol=1e-4)


def test_the_cost_that_is_told_is_that_of_both_outputs(tmp_path):
    text = inside("train_dit.py", *DIT, *BOTH, "--rae", RAE, "--run", "run", "--steps", 1, cwd=tmp_path)
    config = load(tmp_path / "run/dit.pt")["config"]
    _, flops = count_flops(lambda: DiT(**config), *inputs(12, 16, 96), True)
    assert f" {flops / 12e9:.3g} GFLOPs an image" in text


def test_a_model_without_a_base_head_starts_one_with_one(runs, tmp_path):
    flags = (*DIT, "--rae", RAE, "--run", tmp_path, "--steps", 1, "--init", runs / "plain", "--lr", 1e-12)
    text = inside("train_dit.py", *flags, "--base-head", 1, cwd=tmp_path)
    assert "has no base head: that one is new" in text and "is still what it began with" not in text
    before, after = load_dit(runs / "plain"), load_dit(tmp_path)
    x_t, t, y = inputs(3, 16, 96)
    torch.testing.assert_close(after(x_t, t, y), before(x_t, t, y), rtol=1e-4, atol=1e-4)
    assert after.base_layer.linear.weight.abs().max() < 1e-9                  # new: as zero as it starts


def test_init_with_another_prediction_is_refused(runs, tmp_path):
    flags = (*DIT, "--rae", RAE, "--run", tmp_path, "--steps", 1)
    with pytest.raises(UserError, match="predicts v: give --predict v"):
        inside("train_dit.py", *flags, "--init", runs / "plain", "--predict", "x", cwd=tmp_path)


def test_guide_self_takes_one_pass_a_step_and_its_own_scale(runs, tmp_path, monkeypatch):
    calls = []
    forward = DiT.forward

    def spy(self, x_t, t, y, base=False):
        calls.append((len(x_t), base))
        return forward(self, x_t, t, y, base)
    monkeypatch.setattr(DiT, "forward", spy)
    flags = ("--run", runs / "both", "--guide", "self", "--steps", 5, "--num", 4, "--out", tmp_path / "s.png")
    text = inside("sample.py", *flags, cwd=tmp_path)
    assert "guidance 1.78 by self" in text
    assert calls == [(4, True)] * 5
    calls.clear()
    inside("sample.py", *flags, "--interval", 0.1, 0.5, cwd=tmp_path)         # outside: the full output alone
    assert [base for _, base in calls].count(True) in range(1, 5) and len(calls) == 5
    for more, scale in ((("--scale", "1.5"), 1.5), ((), 1.78)):
        args = sample.parse_args(["--run", str(runs / "both"), "--guide", "self", *more])
        assert sample.load(args, CPU)[2:] == ("self", scale)


def test_a_model_without_a_base_head_is_refused_in_a_sentence(runs, tmp_path):
    args = ("--run", runs / "plain", "--guide", "self", "--out", tmp_path / "s.png")
    with pytest.raises(UserError, match="no base head.*--base-head"):
        inside("sample.py", *args, cwd=tmp_path)
    assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize("changes, sentence", [
    (dict(base_head=3), "--base-head 3 .of 2 blocks"), (dict(predict="eps"), "--predict eps .v or x")])
def test_impossible_wishes_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        DiT(**(SMALL | changes))


def test_a_narrow_model_is_warned_and_told_both_ways_out(capsys):
    """Theorem 1 for every output that gives v, by the width before it; x-prediction has no such wall."""
    def said(**changes):
        warn_if_narrow(SMALL | dict(predict="v", base_head=0) | changes)
        return capsys.readouterr().out.splitlines()
    assert said() == []                                                       # head 48 of 24 channels
    narrow, = said(head=0, width=16)
    assert "rank 16 of 24" in narrow and "0.333" in narrow
    assert "--width to 24" in narrow and "--predict x" in narrow
    assert "--head to 24" in said(head=12)[0] and "0.500" in said(head=12)[0]
    base, = said(width=16, base_head=1)                                       # the head does not help it
    assert "base head" in base and "--width to 24" in base
    assert len(said(width=16, head=12, base_head=1)) == 2
    assert said(width=16, head=12, base_head=1, predict="x") == []

"""Times, Euler steps, guidance, labels."""
import pytest
import torch

from rae import RAE, mix, normals
from sample import balanced_label, euler, generate, guided, pick_classes, sample_times
from train_dit import DiT, time_shift


def test_times_go_from_one_to_zero_and_are_shifted():
    times = sample_times(50, 6.93)
    assert len(times) == 51 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    torch.testing.assert_close(times, time_shift(torch.linspace(1, 0, 51), 6.93))


def test_euler_is_exact_for_a_point_mass():
    z0, eps = torch.randn(2, 2, 5, 4)
    velocity = lambda x, t: (x - z0) / t
    torch.testing.assert_close(euler(velocity, eps, sample_times(7, alpha=6.93)), z0)


def test_fifty_steps_are_fifty_evaluations():
    calls = []
    euler(lambda z, t: calls.append(float(t)) or z, torch.zeros(1), sample_times(50, 2.0))
    assert len(calls) == 50 and calls[0] == 1 and calls[-1] > 0


class Counted(torch.nn.Module):
    """v = number + label, in every channel; counts the images it is asked for."""
    num_classes = 10

    def __init__(self, number):
        super().__init__()
        self.number, self.seen = number, []

    def forward(self, x, t, y):
        assert x.shape[0] == t.shape[0] == y.shape[0]
        self.seen.append(len(x))
        return torch.zeros_like(x) + self.number + y[:, None, None]


def test_guidance_is_its_formula_on_all_channels_and_evaluates_nothing_twice():
    z, y = torch.randn(3, 4, 6), torch.tensor([1, 2, 3])
    model, weak = Counted(5.0), Counted(-2.0)
    v = y[:, None, None].expand_as(z) + 5.0
    t = torch.tensor(0.5)
    torch.testing.assert_close(guided(model, y)(z, t), v)
    assert model.seen == [3]                                                  # scale 1: the plain model, once
    torch.testing.assert_close(guided(model, y, 1.5)(z, t), 15.0 + 1.5 * (v - 15.0))
    assert model.seen == [3, 6]                                               # both branches in one batch
    torch.testing.assert_close(guided(model, y, 1.5, weak)(z, t), v - 7.0 + 1.5 * 7.0)
    assert model.seen == [3, 6, 3] and weak.seen == [3]
    velocity = guided(model, y, 1.5, interval=(0.25, 0.75))
    for t, size in ((0.25, 6), (0.75, 6), (0.2499, 3), (0.7501, 3)):          # both ends belong to it
        velocity(z, torch.tensor(t))
        assert model.seen[-1] == size


def test_an_image_is_a_function_of_its_key_and_label():
    torch.manual_seed(0)
    model = DiT(16, 96, 48, 1, 4, 0, num_classes=10)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    rae, keys, labels = RAE("tiny", "tiny", 32, encoder_weights=False), torch.arange(5), torch.arange(5)
    images = generate(model, rae, labels, keys, 2.0, 4)
    assert images.shape == (5, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    alone = generate(model, rae, labels[3:4], keys[3:4], 2.0, 4)
    assert ((alone - images[3:4]).abs() * 255).max() < 1
    assert ((generate(model, rae, labels, keys, 2.0, 4, dtype="bf16") - images).abs() * 255).mean() < 1


def test_the_best_of_n_is_the_likeliest_latent_and_n_nests():
    torch.manual_seed(0)
    model, seen = DiT(16, 96, 48, 1, 4, 0, num_classes=10), []
    rae, keys, labels = RAE("tiny", "tiny", 32, encoder_weights=False), torch.arange(4), torch.tensor([3, 1, 0, 3])
    rae.mean.normal_(), rae.var.uniform_(0.5, 2)

    def probe(means):                                                         # the model is new, z is the noise itself
        seen.append(means)
        return means[:, :10]
    best = generate(model, rae, labels, keys, 2.0, 2, probe=probe, best_of=3)
    noise = normals(torch.stack([keys, mix(keys, 1), mix(keys, 2)], 1).flatten(), 16 * 96, torch.device("cpu")).view(12, 16, 96)
    torch.testing.assert_close(seen[0], (noise * rae.std + rae.mean).mean(1))
    fits = seen[0][:, :10].log_softmax(1).view(4, 3, 10)[torch.arange(4), :, labels]
    assert len(fits.argmax(1).unique()) > 1                                   # not always the first
    chosen = noise.view(4, 3, 16, 96)[torch.arange(4), fits.argmax(1)]
    torch.testing.assert_close(best, rae.decode(chosen).clamp(0, 1))
    sure = torch.nn.Linear(96, 10)                                            # of its answer, like a probe on a good encoder
    sure.weight.data.normal_(std=0.02), sure.bias.data.copy_(torch.eye(10)[3] * 20)
    threes, picked = torch.full_like(labels, 3), sure(seen[0]).double().log_softmax(1)[:, 3].view(4, 3).argmax(1)
    assert (picked > 0).any()
    for dtype in ("fp32", "bf16"):                                            # bf16 would tie them all
        best = generate(model, rae, threes, keys, 2.0, 2, probe=sure, best_of=3, dtype=dtype)
        chosen = rae.decode(noise.view(4, 3, 16, 96)[torch.arange(4), picked]).clamp(0, 1)
        assert (best - chosen).abs().mean() < 0.01, dtype
    one = generate(model, rae, labels, keys, 2.0, 2)                          # of one: no probe, the plain samples
    torch.testing.assert_close(one, rae.decode(noise.view(4, 3, 16, 96)[:, 0]).clamp(0, 1))


def test_npz_labels_are_balanced_shuffled_and_independent_of_their_number():
    labels = balanced_label(0, torch.arange(100), 10)
    assert labels.bincount().tolist() == [10] * 10 and labels[:10].sort().values.tolist() == list(range(10))
    assert torch.equal(balanced_label(0, torch.tensor([37, 5]), 10), labels[[37, 5]])
    assert not torch.equal(balanced_label(1, torch.arange(100), 10), labels)
    assert not torch.equal(labels[:10], labels[10:20])


def test_classes_are_picked_by_name_or_index():
    assert pick_classes(["b", "0"], ["a", "b"]) == [1, 0] and pick_classes(["none"], ["a", "b"]) == [2]
    with pytest.raises(ValueError, match="unknown class dodo: the model knows a, b"):
        pick_classes(["dodo"], ["a", "b"])

"""Times, Euler steps, guidance, labels, and what the script writes."""
import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import sample
from rae import RAE, load_rae, mix, normals
from assets.probe import best_of, fit_latent_probe, fit_probe
from sample import balanced_labels, generate, guided, pick_classes
from train_dit import DiT, euler, load_dit, sample_times

CPU = torch.device("cpu")


def test_times_go_from_one_to_zero_and_are_shifted():
    times = sample_times(50, 6.93)
    assert len(times) == 51 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    by_hand = torch.tensor([1, 12 / 13, 4 / 5, 4 / 7, 0])                     # 4 t / (1 + 3 t)
    torch.testing.assert_close(sample_times(4, 4.0), by_hand)
    torch.testing.assert_close(sample_times(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


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
    rae, keys, labels = RAE("tiny", "tiny", 32), torch.arange(5), torch.arange(5)
    images = generate(model, rae, labels, keys, 2.0, 4)
    assert images.shape == (5, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    alone = generate(model, rae, labels[3:4], keys[3:4], 2.0, 4)
    assert ((alone - images[3:4]).abs() * 255).max() < 1
    with torch.autocast("cpu", torch.bfloat16):
        assert ((generate(model, rae, labels, keys, 2.0, 4) - images).abs() * 255).mean() < 1


def test_the_best_of_n_is_the_likeliest_latent_and_n_nests():
    torch.manual_seed(0)
    model, seen = DiT(16, 96, 48, 1, 4, 0, num_classes=10), []
    rae, keys, labels = RAE("tiny", "tiny", 32), torch.arange(4), torch.tensor([3, 1, 0, 3])
    rae.mean.normal_(), rae.var.uniform_(0.5, 2)
    std = (rae.var + 1e-5).sqrt()

    @torch.no_grad()
    def decoded(z):                                                           # by hand; pixel mean and std are 0.5
        return (rae.decoder(z * std + rae.mean) * 0.5 + 0.5).clamp(0, 1)

    def probe(means):                                                         # the model is new, z is the noise itself
        seen.append(means)
        return means[:, :10]
    best = best_of(3, model, rae, probe, labels, keys, 2.0, 2)
    noise = normals(torch.stack([keys, mix(keys, 1), mix(keys, 2)], 1).flatten(), 16 * 96, CPU).view(12, 16, 96)
    torch.testing.assert_close(seen[0], (noise * std + rae.mean).mean(1))
    fits = seen[0][:, :10].log_softmax(1).view(4, 3, 10)[torch.arange(4), :, labels]
    assert len(fits.argmax(1).unique()) > 1                                   # not always the first
    chosen = noise.view(4, 3, 16, 96)[torch.arange(4), fits.argmax(1)]
    torch.testing.assert_close(best, decoded(chosen))
    sure = torch.nn.Linear(96, 10)                                            # of its answer, like a probe on a good encoder
    sure.weight.data.normal_(std=0.02), sure.bias.data.copy_(torch.eye(10)[3] * 20)
    threes, picked = torch.full_like(labels, 3), sure(seen[0]).double().log_softmax(1)[:, 3].view(4, 3).argmax(1)
    assert (picked > 0).any()
    for bf16 in (False, True):                                                # in which they would all tie
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            best = best_of(3, model, rae, sure, threes, keys, 2.0, 2)
        chosen = decoded(noise.view(4, 3, 16, 96)[torch.arange(4), picked])
        assert (best - chosen).abs().mean() < 0.01, bf16
    one = generate(model, rae, labels, keys, 2.0, 2)                          # of one: no probe, the plain samples
    torch.testing.assert_close(one, decoded(noise.view(4, 3, 16, 96)[:, 0]))


def test_npz_labels_are_balanced_shuffled_and_independent_of_their_number():
    labels = balanced_labels(0, torch.arange(100), 10)
    assert labels.bincount().tolist() == [10] * 10 and labels[:10].sort().values.tolist() == list(range(10))
    assert torch.equal(balanced_labels(0, torch.tensor([37, 5]), 10), labels[[37, 5]])
    assert not torch.equal(balanced_labels(1, torch.arange(100), 10), labels)
    assert not torch.equal(labels[:10], labels[10:20])


def test_classes_are_picked_by_name_or_index():
    assert pick_classes(["b", "0"], ["a", "b"]) == [1, 0] and pick_classes(["none"], ["a", "b"]) == [2]
    with pytest.raises(ValueError, match="unknown class dodo: the model knows a, b"):
        pick_classes(["dodo"], ["a", "b"])


@pytest.mark.parametrize("count, expected", [(3, [0, 1, 2]), (10, [*range(10)]), (11, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
                                             (1000, [100 * i for i in range(10)]), (95, [0, 9, 19, 28, 38, 47, 57, 66, 76, 85])])
def test_of_many_classes_ten_far_apart_are_shown(count, expected):
    assert pick_classes(None, [*range(count)]) == expected


def test_a_probe_is_fitted_to_the_end_on_data_that_no_line_separates():
    """At the optimum of a convex loss the gradient is zero: 20 iterations do not get there."""
    torch.manual_seed(0)
    x = torch.randn(2000, 60) @ torch.diag(torch.logspace(0, -2, 60)) @ torch.randn(60, 60)
    y = ((x @ torch.randn(60, 5)) + 3 * torch.randn(2000, 5)).argmax(1)
    logits = fit_probe(x, y, 5)
    scaled = ((x - x.mean(0)) / (x.std(0) + 1e-6)).double()
    error = (logits(x).double().softmax(1) - torch.eye(5)[y]) / 2000
    weight = torch.linalg.lstsq(scaled, (logits(x) - logits(x.mean(0, keepdim=True))).double()).solution
    assert (scaled.T @ error + 1e-4 * weight).norm() < 2e-3


def test_the_best_of_n_has_a_probe_of_50_images_a_class_and_at_least_10_000(monkeypatch):
    asked = []
    monkeypatch.setattr("assets.probe.mean_tokens", lambda rae, dataset, num: asked.append(num) or (torch.randn(20, 4), torch.arange(20) % 2))
    for count in (2, 300):
        data = type("", (), dict(classes=[*range(count)]))
        monkeypatch.setattr("assets.probe.open_data", lambda *_: data)
        fit_latent_probe(type("", (), dict(image_size=32)), "data", count)
    assert asked == [10_000, 15_000]


def test_the_probe_of_best_of_tells_classes_by_their_mean_token(tmp_path):
    torch.manual_seed(0)
    for i in range(60):
        image = torch.rand(3, 40, 40) * 0.2
        image[i % 3] += 0.7                                                   # red, green, blue
        (tmp_path / "ABC"[i % 3]).mkdir(exist_ok=True)
        to_pil_image(image).save(tmp_path / "ABC"[i % 3] / f"{i}.png")
    rae = RAE("tiny", "tiny", 32).load_encoder().requires_grad_(False)
    probe = fit_latent_probe(rae, str(tmp_path), 3)
    for label in range(3):
        images = torch.rand(4, 3, 32, 32) * 0.2
        images[:, label] += 0.7
        assert (probe(rae.tokens(images).mean(1)).argmax(1) == label).all()
    for num_classes in (2, 4):                                                # another model's
        with pytest.raises(ValueError, match="has 3"):
            fit_latent_probe(rae, str(tmp_path), num_classes)


# The script, against Euler steps by hand

NAMES = ["apple", "bee", "cat"]
ALPHA, STEPS = 3.0, 5


def random_dit(seed):
    torch.manual_seed(seed)
    model = DiT(16, 96, 48, 1, 4, 0, num_classes=3, base_head=1).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a run and a weak model, both models, the decoder by hand). Raw weights are no averages."""
    path = tmp_path_factory.mktemp("made")
    rae = RAE("tiny", "tiny", 32).requires_grad_(False)
    rae.mean.normal_(std=0.3)
    rae.var.uniform_(0.5, 2)
    rae.decoder.predict.weight.mul_(2)
    model, weak = random_dit(1), random_dit(2)
    other = lambda module: {key: value + 1 for key, value in module.state_dict().items()}
    torch.save(dict(config=rae.config, mean=rae.mean, var=rae.var, encoder=None, ema=rae.decoder.state_dict(),
                    model=other(rae.decoder)), path / "rae.pt")
    for name, module in (("dit.pt", model), ("weak.pt", weak)):
        torch.save(dict(config=module.config, alpha=ALPHA, classes=NAMES, rae=None, ema=module.state_dict(),
                        model=other(module)), path / name)

    def decoded(z):
        return (rae.decoder(z * (rae.var + 1e-5).sqrt() + rae.mean) * 0.5 + 0.5).clamp(0, 1)
    return path, model, weak, decoded


def integrated(velocity, keys):
    """The latents of these keys in so many steps, by hand; velocity(z, t), t a float."""
    z = normals(keys, 16 * 96, CPU).view(-1, 16, 96)
    grid = [(STEPS - i) / STEPS for i in range(STEPS + 1)]
    times = [ALPHA * t / (1 + (ALPHA - 1) * t) for t in grid]
    for now, then in zip(times, times[1:]):
        z = z - (now - then) * velocity(z, now)
    return z


def at(model, y):
    return lambda z, t: model(z, torch.full((len(z),), t), y)


def run(monkeypatch, folder, *flags):
    flags = ("--run", folder, "--steps", STEPS, *flags)
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, flags)])
    with torch.random.fork_rng(devices=[]):
        sample.main()


def check_pixels(pixels, images):
    """pixels uint8 (N,H,W,3) are the images (N,3,H,W), rounded."""
    error = torch.from_numpy(pixels).permute(0, 3, 1, 2) - 255 * images
    assert error.abs().max() < 0.55 and 0.2 < images.std()


def test_an_archive_holds_the_rounded_samples_of_balanced_labels(made, tmp_path, monkeypatch):
    folder, model, _, decoded = made
    run(monkeypatch, folder, "--npz", tmp_path / "s.npz", "--num", 11, "--batch", 4, "--seed", 5)
    labels = balanced_labels(5, torch.arange(11), 3)
    with np.load(tmp_path / "s.npz") as archive:
        pixels, found = archive["arr_0"], archive["labels"]
    assert found.tolist() == labels.tolist() and pixels.shape == (11, 32, 32, 3) and pixels.dtype == np.uint8
    images = decoded(integrated(at(model, labels), mix(5, 0, torch.arange(11))))
    assert (images == 0).any() and (images == 1).any()                        # clamped
    check_pixels(pixels, images)


def test_labels_are_indices_into_the_names(made, tmp_path, monkeypatch):
    folder, *_ = made
    first = load_dit(folder).classes[0]
    run(monkeypatch, folder, "--npz", tmp_path / "s.npz", "--num", 4, "--steps", 1, "--classes", "cat", 0)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["names"][archive["labels"]].tolist() == ["cat", first] * 2
    state = torch.load(folder / "dit.pt", weights_only=True)
    torch.save(dict(state, classes=[], rae=str(folder / "rae.pt")), tmp_path / "dit.pt")
    run(monkeypatch, tmp_path, "--npz", tmp_path / "s.npz", "--num", 2, "--steps", 1)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["names"][archive["labels"]].tolist() == ["no class"] * 2


@pytest.mark.parametrize("guide", ["the null class", "a weak model", "its base head"])
def test_a_guided_archive_is_its_formula_in_its_interval(made, tmp_path, monkeypatch, guide):
    folder, model, weak, decoded = made
    flags, scale = {"the null class": (("--scale", 1.7), 1.7),
                    "a weak model": (("--guide", folder / "weak.pt"), 1.42),
                    "its base head": (("--guide", "self"), 1.78)}[guide]
    run(monkeypatch, folder, "--npz", tmp_path / "s.npz", "--num", 6, "--classes", "cat", 0, *flags,
        "--interval", 0.6, 0.95)
    labels = torch.tensor([2, 0, 2, 0, 2, 0])                                 # as asked for, in turn
    other = {"the null class": at(model, torch.full((6,), 3)), "a weak model": at(weak, labels),
             "its base head": lambda z, t: model(z, torch.full((6,), t), labels, base=True)[1]}[guide]

    def velocity(z, t):                                                       # t: 1, .92, .82, .67, .43
        v = at(model, labels)(z, t)
        return other(z, t) + scale * (v - other(z, t)) if 0.6 <= t <= 0.95 else v
    with np.load(tmp_path / "s.npz") as archive:
        assert archive["labels"].tolist() == labels.tolist()
        check_pixels(archive["arr_0"], decoded(integrated(velocity, mix(0, 0, torch.arange(6)))))


def test_a_grid_has_a_column_for_each_class(made, tmp_path, monkeypatch):
    folder, model, _, decoded = made
    run(monkeypatch, folder, "--out", tmp_path / "s.png", "--num", 6)
    images = decoded(integrated(at(model, torch.tensor([0, 1, 2, 0, 1, 2])), mix(0, 0, torch.arange(6))))
    grid = np.array(Image.open(tmp_path / "s.png"))
    side = grid.shape[1] // 3
    zoom = side // 32
    assert grid.shape[0] // side == 2
    corners = [(row * side + 2, column * side + 2) for row in range(2) for column in range(3)]
    tiles = [grid[top:, left:][:32 * zoom:zoom, :32 * zoom:zoom] for top, left in corners]
    check_pixels(np.stack(tiles), images)


def test_a_model_without_classes_and_a_demand_for_none_sample_the_null_class(made, tmp_path, monkeypatch):
    folder, model, _, decoded = made
    state = torch.load(folder / "dit.pt", weights_only=True)
    torch.save(dict(state, classes=[], rae=str(folder / "rae.pt")), tmp_path / "dit.pt")
    images = decoded(integrated(at(model, torch.full((3,), 3)), mix(0, 0, torch.arange(3))))
    for place, flags in ((tmp_path, ()), (folder, ("--classes", "none"))):
        run(monkeypatch, place, "--npz", tmp_path / "s.npz", "--num", 3, *flags)
        with np.load(tmp_path / "s.npz") as archive:
            check_pixels(archive["arr_0"], images)


def test_a_checkpoint_brings_its_guide_and_scale_along_unless_one_is_given(made, tmp_path, monkeypatch):
    folder, model, weak, decoded = made
    state = torch.load(folder / "dit.pt", weights_only=True)
    torch.save(dict(state, guide="weak.pt", scale=1.3), folder / "guided.pt")
    labels, keys = balanced_labels(0, torch.arange(4), 3), mix(0, 0, torch.arange(4))
    for flags, scale in (((), 1.3), (("--scale", 1), 1)):
        run(monkeypatch, folder / "guided.pt", "--npz", tmp_path / "s.npz", "--num", 4, *flags)
        strong = at(model, labels)
        velocity = lambda z, t: torch.lerp(at(weak, labels)(z, t), strong(z, t), scale)
        with np.load(tmp_path / "s.npz") as archive:
            check_pixels(archive["arr_0"], decoded(integrated(velocity, keys)))


def test_a_scale_alone_changes_no_kind_of_guidance(made, tmp_path, monkeypatch):
    """The model that came along guides at any scale; without it, the null class, if --guide none asks for that."""
    folder, model, weak, decoded = made
    state = torch.load(folder / "dit.pt", weights_only=True)
    torch.save(dict(state, guide="weak.pt", scale=1.3), folder / "guided.pt")
    labels, keys = balanced_labels(0, torch.arange(4), 3), mix(0, 0, torch.arange(4))
    strong, null = at(model, labels), at(model, torch.full((4,), 3))
    for flags, other, scale in ((("--scale", 1.6), at(weak, labels), 1.6), (("--guide", "none", "--scale", 1.6), null, 1.6),
                                (("--guide", "none"), strong, 1)):
        run(monkeypatch, folder / "guided.pt", "--npz", tmp_path / "s.npz", "--num", 4, *flags)
        velocity = lambda z, t: torch.lerp(other(z, t), strong(z, t), float(scale))
        with np.load(tmp_path / "s.npz") as archive:
            check_pixels(archive["arr_0"], decoded(integrated(velocity, keys)))


@pytest.mark.parametrize("change, sentence", [
    (dict(latents="tiny 0.123456"), "makes other latents than .*rae.pt decodes .latents was tiny 0.123456, is tiny"),
    (dict(fixed=dict(latents="tiny 0.123456", label_dropout=0.1)), "latents was tiny 0.123456, is tiny")])
def test_an_autoencoder_with_other_latents_is_refused(made, tmp_path, monkeypatch, change, sentence):
    state = torch.load(made[0] / "dit.pt", weights_only=True)
    torch.save(dict(state, rae=str(made[0] / "rae.pt"), **change), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=sentence):
        run(monkeypatch, tmp_path, "--out", tmp_path / "s.png")
    state["latents"] = load_rae(made[0], decode_only=True).latents            # and its own is not
    torch.save(dict(state, rae=str(made[0] / "rae.pt")), tmp_path / "dit.pt")
    run(monkeypatch, tmp_path, "--out", tmp_path / "s.png", "--num", 2)


@pytest.mark.parametrize("change, sentence", [
    (dict(latents="mae_b 0.5"), "latents was tiny .*, is mae_b 0.5"), (dict(classes=["apple", "bee", "dog"]), "classes was .*dog"),
    (dict(classes=[]), "classes was")])
def test_a_guide_of_other_latents_or_classes_is_refused(made, tmp_path, monkeypatch, change, sentence):
    own = dict(rae=str(made[0] / "rae.pt"), latents=load_rae(made[0], decode_only=True).latents)
    for name, more in (("dit.pt", {}), ("weak.pt", change)):
        state = torch.load(made[0] / name, weights_only=True)
        torch.save(state | own | more, tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot be guided by .*weak.pt .{sentence}"):
        run(monkeypatch, tmp_path, "--guide", tmp_path / "weak.pt", "--out", tmp_path / "s.png")
    run(monkeypatch, tmp_path, "--guide", tmp_path / "weak.pt", "--scale", 1, "--out", tmp_path / "s.png", "--num", 2)


def test_samples_of_the_bundled_demo_are_compared_with_shapes_next():
    demo = load_rae(Path(sample.__file__).parent / "assets/demo", decode_only=True)
    said = sample.next_step(argparse.Namespace(npz="my s.npz", run=None), demo)
    assert said == "python fid.py 'my s.npz' shapes/val --features tiny"


def test_a_model_whose_autoencoder_was_moved_away_says_where_it_was(made, tmp_path, monkeypatch):
    state = torch.load(made[0] / "dit.pt", weights_only=True)
    torch.save(dict(state, rae=str(tmp_path / "gone/rae.pt")), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="trained on .*gone/rae.pt, which is not there any more: bring it back"):
        run(monkeypatch, tmp_path, "--npz", tmp_path / "s.npz")

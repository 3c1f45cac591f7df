"""Released checkpoints are converted and give the released outputs.

golden/ holds tiny random-weight models in the release's format, with inputs and the outputs that the release
computes for them. Three of them fit together: a decoder, a DiT^DH and its Euler trajectory, of 9 tokens with
24 channels; with an encoder's sizes set to theirs, they stand for any model of the release.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from conftest import ROOT, launch
from safetensors.torch import save_file

import rae
from assets.release import AUTOENCODERS, HUB, MODELS, convert_decoder, convert_dit, main, release
from rae import DECODERS, ENCODERS, RAE, Decoder, load_rae, load_strict, read_weights
from sample import generate, guided
from train_dit import SIZES, DiT, euler, load_dit

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return torch.load(GOLDEN / f"official_{name}.pt", weights_only=True)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def tokens(x):                                                          # (B, D, h, w) -> (B, N, D)
    return x.flatten(2).mT


def converted(state, **given):
    """A model of ours with the weights of a released state dict."""
    config, state = convert_dit(state, **given)
    model = DiT(**config)
    load_strict(model, state, "golden")
    return model.eval().requires_grad_(False)


# Models: what the release computes is what ours compute

@pytest.mark.parametrize("name", ["dit", "ditdh"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"ema": s}, lambda s: {"model": s}])
def test_released_dits_give_the_released_velocities(name, wrap):
    g = golden(name)
    model = converted(wrap(g["state_dict"]))
    assert g["config"].items() <= model.config.items()
    assert relative(model(tokens(g["x"]), g["t"], g["y"]), tokens(g["v"])) < 1e-5


def test_head_counts_can_be_given_where_the_rope_buffers_are_missing():
    g = golden("ditdh")
    state = {key: value for key, value in g["state_dict"].items() if "rope" not in key}
    model = converted(state, heads=2, head_heads=4)
    assert relative(model(tokens(g["x"]), g["t"], g["y"]), tokens(g["v"])) < 1e-5


@pytest.mark.parametrize("given, sentence", [
    ({}, "no enc_feat_rope.freqs_cos.*needs heads"),
    (dict(heads=2), "no dec_feat_rope.freqs_cos.*needs head_heads"),
    (dict(head_heads=4), "no enc_feat_rope.freqs_cos.*needs heads")])
def test_a_number_of_heads_is_never_guessed(given, sentence):
    state = {key: value for key, value in golden("ditdh")["state_dict"].items() if "rope" not in key}
    with pytest.raises(ValueError, match=sentence):
        convert_dit(state, **given)


@pytest.mark.parametrize("break_it, sentence", [
    (lambda s: s.pop("blocks.1.attn.qkv.bias"), "Missing key.*blocks.1.attn.qkv.bias"),
    (lambda s: s.update(foreign=torch.zeros(1)), "Unexpected key.*foreign"),
    (lambda s: s.update({"t_embedder.W": torch.zeros(3)}), "size mismatch for t_embedder.W"),
    (lambda s: s.pop("pos_embed"), "no released DiT: 'pos_embed' is missing")])
def test_wrong_keys_are_named(break_it, sentence):
    state = golden("dit")["state_dict"]
    break_it(state)
    with pytest.raises(ValueError, match=sentence):
        converted(state)


def test_the_released_decoder_gives_the_released_image():
    g = golden("decoder")
    config = dict(g["config"])
    mean = torch.tensor(config.pop("mean")).view(3, 1, 1)
    std = torch.tensor(config.pop("std")).view(3, 1, 1)
    decoder = Decoder(**config)
    full = g["state_dict"]
    bare = {key: value for key, value in full.items() if key != "decoder_pos_embed"}
    for state in (full, bare, {"ema": full}):                           # the fixed embedding may be missing
        load_strict(decoder, convert_decoder(state), "golden")
        assert relative(decoder(g["z"]) * std + mean, g["image"]) < 1e-5


def test_a_foreign_decoder_is_refused():
    g = golden("decoder")
    config = {key: value for key, value in g["config"].items() if key not in ("mean", "std")}
    decoder = Decoder(**config)
    for absent, sentence in (("cls", "Missing key.*cls_token"), ("0.attention.attention.key", "Missing key.*qkv")):
        state = {key: value for key, value in g["state_dict"].items() if absent not in key}
        with pytest.raises(ValueError, match=sentence):
            load_strict(decoder, convert_decoder(state), "golden")
    position = g["state_dict"]["decoder_pos_embed"]
    for other in (position + 0.1, position[:, 1:]):
        with pytest.raises(ValueError, match="not the fixed"):
            convert_decoder(g["state_dict"] | {"decoder_pos_embed": other})


def test_the_released_euler_trajectory_is_met_on_its_own_times():
    g = golden("euler")
    model = converted(golden("ditdh")["state_dict"])
    with torch.no_grad():
        z = euler(guided(model, g["y"]), tokens(g["noise"]), g["t"])
    assert relative(z, tokens(g["z"])) < 1e-5


# Whole releases, of the golden files' sizes

def shrink():
    """Every encoder, and the decoder XL, get the sizes of the golden files; what they were."""
    before = dict(ENCODERS), dict(DECODERS)
    for name in {encoder for encoder, *_ in AUTOENCODERS.values()}:
        ENCODERS[name] = ENCODERS[name]._replace(image_side=12, input_side=12, patch=4, dim=24)
    sizes = golden("decoder")["config"]
    DECODERS["XL"] = {key: sizes[key] for key in ("width", "depth", "heads", "mlp_hidden")}
    return before


@pytest.fixture
def small():
    encoders, decoders = shrink()
    yield
    ENCODERS.update(encoders)
    DECODERS.update(decoders)


def statistics(centred=True):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(24, 3, 3, generator=generator)
    var = 0.5 + torch.rand(24, 3, 3, generator=generator)
    return dict(mean=mean if centred else None, var=var)


def publish(folder, name, centred=True):
    """Write the files of a release under the hub's relative paths: the golden ones, and random statistics."""
    autoencoder, *dits = MODELS.get(name, (name, None, None, 1.0))[:3]
    _, decoder, stat = AUTOENCODERS[autoencoder]
    files = {decoder: {"model": golden("decoder")["state_dict"]}, stat: statistics(centred)}
    model, weak = dits
    if model:
        files[f"DiTs/Dinov2/wReg_base/{model}/stage2_model.pt"] = {"ema": golden("ditdh")["state_dict"]}
    if weak:                                                            # the same, with other weights
        state = {key: value * (0.9 if "linear" in key else 1)
                 for key, value in golden("ditdh")["state_dict"].items()}
        files[f"DiTs/Dinov2/wReg_base/{weak}/stage2_model.pt"] = state
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / file)
    return files


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("centred", [True, False])
def test_a_released_autoencoder_decodes_to_the_released_image(name, centred, small, tmp_path):
    publish(tmp_path, name, centred)
    folder = release(name, tmp_path, tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["rae.pt"] and folder == tmp_path / "out" / name
    loaded = load_rae(folder, decode_only=True)
    assert loaded.name == AUTOENCODERS[name][0] and loaded.image_size == 12

    # The golden image, through the statistics: z is what the tokens g["z"] are when standardised
    g = golden("decoder")
    stat = statistics()
    mean = stat["mean"].flatten(1).T if centred else 0
    z = (g["z"] - mean) / (stat["var"].flatten(1).T + 1e-5).sqrt()
    pixel_mean, pixel_std = torch.tensor(ENCODERS[loaded.name].pixels).view(2, 3, 1, 1)
    theirs = (g["image"] - torch.tensor(g["config"]["mean"]).view(3, 1, 1)) \
        / torch.tensor(g["config"]["std"]).view(3, 1, 1)                # as the decoder gives it
    assert relative(loaded.decode(z), theirs * pixel_std + pixel_mean) < 1e-5


def test_the_real_statistics_are_read_row_by_row(small, tmp_path):
    """A slice of DINOv2-B's file: its mean is absent, its variance (D, row, column)."""
    stat = golden("stat_slice")
    ENCODERS["dinov2_b"] = ENCODERS["dinov2_b"]._replace(image_side=8, input_side=8, dim=768)
    _, decoder, file = AUTOENCODERS["dinov2_b"]
    publish(tmp_path, "dinov2_b")
    state = golden("decoder")["state_dict"] | {"decoder_embed.weight": torch.zeros(32, 768)}
    del state["decoder_pos_embed"]
    torch.save(state, tmp_path / decoder)
    torch.save(stat, tmp_path / file)
    loaded = load_rae(release("dinov2_b", tmp_path, tmp_path / "out"), decode_only=True)
    assert loaded.mean.eq(0).all() and loaded.num_tokens == 4
    assert loaded.var[3, 5] == stat["var"][5, 1, 1] and loaded.var[1, 7] == stat["var"][7, 0, 1]
    assert loaded.var[2, 7] == stat["var"][7, 1, 0]
    x = torch.randn(2, 4, 768)
    torch.testing.assert_close(x / loaded.std * (stat["var"].flatten(1).T + 1e-5).sqrt(), x)


@pytest.mark.parametrize("name, scale", [
    ("imagenet256", 1.42), ("imagenet512", 1.5), ("imagenet256_ep20", 1), ("imagenet256_ep80", 1)])
def test_a_released_model_comes_with_all_that_sampling_needs(name, scale, small, tmp_path):
    publish(tmp_path, name)
    folder = release(name, tmp_path, tmp_path / "out")
    model = load_dit(folder)
    guided_by = "guide.pt" if scale > 1 else None
    assert (model.scale, model.classes) == (scale, [0, 1, 2, 3, 4])
    assert model.alpha == pytest.approx(math.sqrt(9 * 24 / 4096))
    files = {"rae.pt", "dit.pt"} | ({"guide.pt"} if scale > 1 else set())
    assert {path.name for path in folder.iterdir()} == files
    saved = read_weights(folder / "dit.pt")
    assert saved.get("guide") == guided_by and saved["rae"] is None

    # The model is the released one, and so is its guide
    g = golden("ditdh")
    assert relative(model(tokens(g["x"]), g["t"], g["y"]), tokens(g["v"])) < 1e-5
    if guided_by:
        weak = load_dit(folder / guided_by)(tokens(g["x"]), g["t"], g["y"])
        assert relative(weak, 0.9 * tokens(g["v"])) < 1e-5
    autoencoder = load_rae(model.rae, decode_only=True)
    assert (autoencoder.num_tokens, autoencoder.token_dim) == (9, 24)


def test_what_is_converted_is_converted_once(small, tmp_path, capsys):
    publish(tmp_path, "imagenet256")
    folder = release("imagenet256", tmp_path, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "converting release:imagenet256" in capsys.readouterr().out
    assert release("imagenet256", tmp_path / "nowhere", tmp_path / "out") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert capsys.readouterr().out == ""

    # A conversion that was cut off goes on where it was; asked to, it begins anew
    (folder / "dit.pt").unlink()
    release("imagenet256", tmp_path, tmp_path / "out")
    again = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in times if times[path] == again[path]} == {"rae.pt", "guide.pt"}
    release("imagenet256", tmp_path, tmp_path / "out", again=True)
    assert all(path.stat().st_mtime_ns > again[path] for path in folder.iterdir())


def test_an_encoder_beside_the_released_files_is_taken_along(small, tmp_path):
    publish(tmp_path, "mae_b")
    folder = release("mae_b", tmp_path, tmp_path / "without")
    assert read_weights(folder / "rae.pt")["encoder"] is None           # the hub has it
    weights = {"cls_token": torch.randn(1, 1, 24)}
    place = tmp_path / "timm" / ENCODERS["mae_b"].timm
    place.mkdir(parents=True)
    save_file(weights, place / "model.safetensors")
    folder = release("mae_b", tmp_path, tmp_path / "with")
    assert torch.equal(read_weights(folder / "rae.pt")["encoder"]["cls_token"], weights["cls_token"])


@pytest.mark.parametrize("break_it, sentence", [
    (lambda files: files["decoder"].pop("trainable_cls_token"), "model.pt: weights of another.*cls_token"),
    (lambda files: files["decoder"].update(foreign=torch.ones(1)), "model.pt: weights of another.*foreign"),
    (lambda files: files["stat"].update(var=torch.ones(23, 3, 3)), r"shape \(23, 3, 3\), and not dinov2_b's"),
    (lambda files: files["stat"].pop("var"), "shape None, and not dinov2_b's"),
    (lambda files: files["model"].pop("pos_embed"), "stage2_model.pt: this is no released DiT")])
def test_foreign_files_are_refused_and_leave_nothing(break_it, sentence, small, tmp_path):
    _, decoder, stat = AUTOENCODERS["dinov2_b"]
    contents = publish(tmp_path, "imagenet256_ep80")
    files = dict(decoder=contents[decoder]["model"], stat=contents[stat],
                 model=contents[list(contents)[-1]]["ema"])
    break_it(files)
    for file, content in contents.items():
        torch.save(content, tmp_path / file)
    with pytest.raises(ValueError, match=sentence):
        release("imagenet256_ep80", tmp_path, tmp_path / "out")
    whole = {"rae.pt"} if "stage2" in sentence else set()
    written = tmp_path / "out/imagenet256_ep80"
    assert {path.name for path in written.glob("*")} == whole


def test_an_unknown_name_or_file_is_one_sentence(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no release:imagenet128: .* imagenet256_ep80 .* dinov2_b_512"):
        release("imagenet128")
    with pytest.raises(ValueError, match="--from .*: decoders/mae/.*/model.pt of .* expected under this"):
        release("mae_b", tmp_path, tmp_path / "out")
    publish(tmp_path, "mae_b")
    monkeypatch.chdir(tmp_path)
    release("mae_b", tmp_path)
    assert rae.locate("release:mae_b", "rae.pt") == Path("out/release/mae_b/rae.pt")
    with pytest.raises(ValueError, match="release:mae_b has no dit.pt"):
        rae.locate("release:mae_b", "dit.pt")


# As a user starts it, in processes of its own

DRIVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_release import shrink
shrink()
import assets.release, rae, sample
{do}
"""


def drive(do, cwd, **options):
    """Run `do` with the golden files' sizes; its output."""
    script = cwd / "driver.py"
    script.write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), do=do))
    return launch(script, cwd=cwd, **options)


def cache(folder, files):
    """Turn published files into what the hub's cache has after a download."""
    place = folder / f"models--{HUB.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("abc")
    for file in files:
        target = place / "snapshots/abc" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / file).rename(target)


def test_one_command_samples_from_a_release(small, tmp_path, monkeypatch):
    """Offline, from the hub's cache: converted on first use, with its guide at its scale, without encoder."""
    cache(tmp_path, publish(tmp_path, "imagenet256"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    do = "sys.argv = 'sample.py --run release:imagenet256 --num 6 --steps 3 --npz {}'.split()\nsample.main()"
    first = drive(do.format("a.npz"), tmp_path)
    second = drive(do.format("b.npz"), tmp_path)
    assert "converting release:imagenet256" in first and "converting" not in second

    # What came out is what the converted files give, guided at the scale that they name
    folder = tmp_path / "out/release/imagenet256"
    model = load_dit(folder)
    weak = load_dit(folder / "guide.pt")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        drawn = a["arr_0"]
        labels = torch.from_numpy(a["labels"])
        assert np.array_equal(drawn, b["arr_0"])
    keys = rae.mix(0, 0, torch.arange(6))
    images = generate(model, load_rae(folder, decode_only=True), labels, keys, model.alpha, 3, 1.42, weak)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn.astype(int) - pixels).max() <= 1
    assert pixels.std() > 1


def test_two_ranks_convert_once_and_agree(tmp_path):
    publish(tmp_path, "imagenet256")
    do = ("_, rank, world = rae.start()\n"
          "folder = assets.release.release('imagenet256', '.')\n"
          "saved = rae.read_weights(folder / 'dit.pt')\n"
          "print(f'rank {rank} of {world} reads {len(saved[\"ema\"])} tensors\\n', end='', flush=True)")
    said = drive(do, tmp_path, ranks=2)
    assert said.count("converting") == 1
    assert "rank 0 of 2 reads" in said and "rank 1 of 2 reads" in said


def test_a_failure_of_rank_0_ends_all_ranks(tmp_path):
    do = ("_, rank, world = rae.start()\n"
          "try:\n"
          "    assets.release.release('imagenet256', '.')\n"
          "except rae.UserError as error:\n"
          "    print(f'rank {rank} ends: {error}\\n', end='', flush=True)")
    said = drive(do, tmp_path, ranks=2)
    assert "rank 0 ends: --from .: " in said
    assert "rank 1 ends: rank 0 could not convert release:imagenet256" in said


def test_the_script_names_the_next_command(small, tmp_path, monkeypatch, capsys):
    publish(tmp_path, "dinov2_s")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["release.py", "dinov2_s", "--from", "."])
    main()
    said = capsys.readouterr().out
    assert "wrote out/release/dinov2_s. Next: python rae.py photo.jpg --run release:dinov2_s" in said
    assert Path("out/release/dinov2_s/rae.pt").is_file()

    # Started by its path, it finds the rest of the project
    usage = launch("assets/release.py", "imagenet128", cwd=tmp_path, expect=1)
    assert "there is no release:imagenet128" in usage and "Traceback" not in usage


# Ours and theirs

def released_dit(model):
    """Our names -> the release's."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("s_embedder", "x_embedder")):
            name = key if model.head else key.replace("s_embedder", "x_embedder")
            key = name.replace("embedder.", "embedder.proj.")
            value = value[..., None, None] if key.endswith("weight") else value
        state[key.replace("y_embedder.", "y_embedder.embedding_table.")] = value
    ropes = {"enc_feat_rope": "cos", "dec_feat_rope": "head_cos"} if model.head else {"feat_rope": "cos"}
    for rope, name in ropes.items():
        for part in ("cos", "sin"):
            value = getattr(model, name.replace("cos", part)).repeat_interleave(2, 1)
            assert len(value) == model.config["tokens"]
            state[f"{rope}.freqs_{part}"] = value
    return state


@pytest.mark.parametrize("head, given", [(0, {}), (48, dict(head_depth=2)), (64, {})])
def test_our_checkpoint_and_one_in_the_released_format_give_the_same_samples(head, given, tmp_path):
    torch.manual_seed(0)
    model = DiT(16, 96, 48, 2, 4, head, 2, 4, 10)
    for parameter in model.parameters():                                # the fresh output layer is zero
        parameter.data.normal_(std=0.05)
    torch.save(dict(config=model.config, ema=model.state_dict(), alpha=2.0, classes=list("abcdefghij"),
                    rae=None), tmp_path / "dit.pt")
    decoder = RAE("tiny", "tiny", 32).eval()
    pair = load_dit(tmp_path / "dit.pt"), converted(released_dit(model), **given)
    ours, theirs = (generate(net, decoder, torch.arange(3), torch.arange(3), 2.0, 5) for net in pair)
    assert torch.equal(ours, theirs) and ours.std() > 0.01


def test_a_head_as_wide_as_the_backbone_does_not_say_where_it_begins():
    state = released_dit(DiT(16, 96, 48, 2, 4, 48, 2, 4, 10))
    with pytest.raises(ValueError, match="both 48 wide.*needs head_depth"):
        convert_dit(state)


# The paper's figures

@pytest.mark.parametrize("config, millions", [
    (dict(width=1152, head=0, token_dim=384), 676.4), (dict(width=1152, head=0), 677.2),
    (dict(width=1152), 838.7), (dict(width=384), 196.5), (dict(width=768), 294.3), (dict(width=1024), 621.7)])
def test_parameter_counts_are_the_paper_s(config, millions):
    depth, heads = SIZES[config["width"]]
    with torch.device("meta"):
        model = DiT(**config, depth=depth, heads=heads)
    count = sum(value.numel() for value in model.state_dict().values())
    assert round(count / 1e6, 1) == pytest.approx(millions)


@pytest.mark.parametrize("preset, giga", [("B", 22.2), ("L", 78.1), ("XL", 106.7)])
def test_decoder_multiply_adds_are_the_paper_s(preset, giga):
    with torch.device("meta"):
        decoder = Decoder(256, 768, patch=16, **DECODERS[preset])
        with FlopCounterMode(display=False) as counter:
            decoder(torch.empty(1, 256, 768))
    ops = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in ops.items() if "bmm" not in str(op) and "attention" not in str(op))
    assert linear / 2e9 == pytest.approx(giga, rel=0.01) and sum(ops.values()) > linear

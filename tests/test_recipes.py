"""The paper's numbers a second time, as literals: recipes, defaults, presets, names of files, initial values."""
import math

import pytest
import torch
from conftest import ROOT, inside

import fid
import sample
import train_decoder
import train_dit
from assets import release
from rae import DECODERS, ENCODERS, RAE, STOPS, UserError, default_data, warn_of_average
from train_decoder import Discriminator, cosine_lr
from train_dit import SIZES, DiT, linear_lr

RUN = dict(run=None, data=None, val=None, init=None, steps=None, seed=0, workers=None, dtype=None, compile=False,
           keep_every=0, log_every=50, micro=64)
STAGE_1 = RUN | dict(
    encoder="dinov2_b", encoder_weights=None, upsample=1, noise="halfnormal", lpips_vgg=None, disc_weights=None,
    disc_input="clean")
PAPER_1 = STAGE_1 | dict(
    image_size=256, decoder="XL", tau=0.8, lpips_weight=1.0, gan_weight=0.75, disc="dino", disc_start=6, gan_start=8,
    batch=512, epochs=16, lr=2e-4, warmup=1, ema=0.9978, save_every=2500)
TINY_1 = STAGE_1 | dict(
    encoder="tiny", image_size=32, decoder="tiny", tau=0.5, lpips_weight=0.0, gan_weight=0.0, disc="tiny", disc_start=0.5,
    gan_start=1, batch=64, epochs=2, lr=6e-3, warmup=0.1, ema=0.99, save_every=500)
STAGE_2 = RUN | dict(
    rae=None, predict="v", base_head=0, text=None, text_length=77, time="logit-normal", no_shift=False, label_dropout=0.1,
    head_depth=2, eval_every=0)
PAPER_2 = STAGE_2 | dict(
    width=1152, depth=28, heads=16, head=2048, head_heads=16, shift_base=4096, batch=1024, epochs=80, lr=2e-4, warmup=0,
    decay_start=40, decay_end=800, clip=1.0, ema=0.9995, save_every=5000)
PLAIN_2 = PAPER_2 | dict(head=0, decay_start=math.inf, clip=0.0, ema=0.9999)
TINY_2 = STAGE_2 | dict(
    width=192, depth=4, heads=6, head=256, head_heads=8, shift_base=170, batch=64, epochs=2.5, lr=3e-3, warmup=0.25,
    decay_start=0.25, decay_end=2.5, clip=1.0, ema=0.99, save_every=500)
SAMPLING = dict(run=None, classes=None, prompt=None, num=None, out=None, npz=None, steps=50, scale=None, guide=None,
                interval=None, seed=0, batch=80)
JUDGING = dict(generated="a.npz", reference="b.npz", rae=None, data=None, features="inception", inception_weights=None,
               encoder_weights=None, lpips_vgg=None, num=None, save_stats=None, batch=64, dim=2048, figure="fid")


@pytest.mark.parametrize("found, expected", [
    (lambda: train_decoder.parse_args([]), PAPER_1), (lambda: train_decoder.parse_args(["--encoder", "tiny"]), TINY_1),
    (lambda: train_dit.parse_args([]), PAPER_2), (lambda: train_dit.parse_args(["--head", "0"]), PLAIN_2),
    (lambda: train_dit.parse_args([], "tiny_vae"), TINY_2), (lambda: sample.parse_args([]), SAMPLING),
    (lambda: fid.parse_args(["a.npz", "b.npz"]), JUDGING)])
def test_the_defaults_are_the_recipes(found, expected):
    assert vars(found()) == expected


def test_the_encoders_are_the_papers():
    imagenet, half = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3,) * 2
    expected = {  # timm's model, image, input, patch, channels, pixels, antialias of positions, tanh GELU
        "dinov2_s": ("vit_small_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 384, imagenet, True, False),
        "dinov2_b": ("vit_base_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 768, imagenet, True, False),
        "dinov2_l": ("vit_large_patch14_reg4_dinov2.lvd142m", 256, 224, 14, 1024, imagenet, True, False),
        "siglip2_b": ("vit_base_patch16_siglip_256.v2_webli", 256, 256, 16, 768, half, True, True),
        "mae_b": ("vit_base_patch16_224.mae", 256, 256, 16, 768, imagenet, False, False),
        "dino_s8": ("vit_small_patch8_224.dino", 224, 224, 8, 384, imagenet, True, True),
        "pixel": ("", 256, 256, 16, 768, half, True, False)}
    for name, values in expected.items():
        spec = ENCODERS[name]
        assert (*spec[:7], "act_layer" in spec.options) == values, name
        assert spec.stride == (8 if name == "dino_s8" else 16)
    assert ENCODERS["sdvae"][:6] == ("stabilityai/sd-vae-ft-ema", 256, 256, 16, 16, half)
    assert default_data(RAE("mae_b", "tiny")) == "data/imagenet"


def test_the_presets_are_the_papers():
    width_depth_heads_hidden = {"B": (768, 12, 12, 3072), "L": (1024, 24, 16, 4096), "XL": (1152, 28, 16, 4096),
                                "tiny": (160, 3, 5, 640)}
    assert {name: tuple(sizes.values()) for name, sizes in DECODERS.items()} == width_depth_heads_hidden
    assert list(DECODERS["XL"]) == ["width", "depth", "heads", "mlp_hidden"]
    assert SIZES == {192: (4, 6), 384: (12, 6), 768: (12, 12), 1024: (24, 16), 1152: (28, 16)}
    model = DiT.__init__.__defaults__
    assert model == (256, 768, 1152, 28, 16, 2048, 2, 16, 1000, "v", 0, None)


def test_the_released_files_have_the_hubs_names():
    assert release.HUB == "nyu-visionx/RAE-collections"
    assert release.AUTOENCODERS == {
        "dinov2_s": ("dinov2_s", "decoders/dinov2/wReg_small/ViTXL_n08/model.pt", "stats/dinov2/wReg_small/imagenet1k/stat.pt"),
        "dinov2_b": ("dinov2_b", "decoders/dinov2/wReg_base/ViTXL_n08/model.pt", "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
        "dinov2_l": ("dinov2_l", "decoders/dinov2/wReg_large/ViTXL_n08/model.pt", "stats/dinov2/wReg_large/imagenet1k/stat.pt"),
        "dinov2_b_512": ("dinov2_b", "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                         "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
        "siglip2_b": ("siglip2_b", "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
                      "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
        "mae_b": ("mae_b", "decoders/mae/base_p16/ViTXL_n08/model.pt", "stats/mae/base_p16/ImageNet1k/stat.pt")}
    assert release.MODELS == {
        "imagenet256": ("dinov2_b", "ImageNet256/DiTDH-XL", "ImageNet256/DiTDH-S_ep14", 1.42),
        "imagenet512": ("dinov2_b_512", "ImageNet512/DiTDH-XL_ep400", "ImageNet512/DiTDH-S_ep20", 1.5),
        "imagenet256_ep20": ("dinov2_b", "ImageNet256/DiTDH-XL_ep20", None, 1.0),
        "imagenet256_ep80": ("dinov2_b", "ImageNet256/DiTDH-XL_ep80", None, 1.0)}
    assert fid.WEIGHTS == "pt_inception-2015-12-05-6726825d.pth" and fid.URL.endswith(f"fid_weights/{fid.WEIGHTS}")
    assert train_decoder.NOISES == (0, 0.1, 0.2, 0.4) and train_dit.LEAST_T == 0.05


def test_a_short_run_is_warned_that_its_average_has_hardly_moved(capsys):
    for decay, steps in ((0.99, 1954), (0.9995, 5992), (0.9978, 1361)):       # .05 after 5,990 and 1,360
        warn_of_average(decay, steps)
    assert not capsys.readouterr().out
    warn_of_average(0.9995, 1563)                                             # 80 epochs of 5,000 photographs
    assert "after 1563 steps 46% of the average of the weights is still what it began with: lower --ema" in capsys.readouterr().out
    warn_of_average(0.9978, 1350)
    assert " 5% of the average" in capsys.readouterr().out


def test_the_schedules_are_the_papers():
    epoch = 1251.2                                                            # steps: of a fraction
    of_stage_1 = [cosine_lr(step, 2e-4, epoch, 16 * epoch) / 2e-4 for step in (0, 624, 1251, 8.5 * epoch, 16 * epoch)]
    assert of_stage_1 == pytest.approx([1 / epoch, 625 / epoch, 1, 0.55, 0.1], rel=1e-4)
    assert cosine_lr(0, 2e-4, 0, 16) == 2e-4                                  # no warm-up
    with_head, without = train_dit.parse_args([]), train_dit.parse_args(["--head", "0"])
    epochs = (0, 39.9, 40, 420, 800, 1000)
    assert [linear_lr(e * epoch, epoch, with_head) / 2e-4 for e in epochs] == pytest.approx([1, 1, 1, 0.55, 0.1, 0.1])
    assert [linear_lr(e * epoch, epoch, without) / 2e-4 for e in epochs] == [1] * 6


# Initial values: the paper's "Init"

def stds(module):
    return {name: parameter.std().item() if parameter.numel() > 1 else abs(parameter.item())
            for name, parameter in module.named_parameters()}


def xavier(linear):
    return math.sqrt(2 / (linear.in_features + linear.out_features))


def torchs(fan_in):
    """Of torch's default, weight and bias: uniform within 1 / sqrt(fan_in)."""
    return 1 / math.sqrt(3 * fan_in)


@pytest.mark.parametrize("head", [0, 128])
@pytest.mark.parametrize("text", [None, dict(words=50, length=20), dict(dim=64)])
def test_a_fresh_dit_has_the_papers_initial_values(head, text):
    torch.manual_seed(0)
    model = DiT(16, 64, 96, 2, 4, head, 1, 4, num_classes=300, base_head=1, text=text)
    found = stds(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight, bias = found.pop(f"{name}.weight"), found.pop(f"{name}.bias")
            if "adaLN" in name or name in ("final_layer.linear", "base_layer.linear"):
                expected = 0, 0
            elif name.startswith("t_embedder"):
                expected = 0.02, 0 if head == 0 else torchs(module.in_features)
            elif head == 0 or name in ("s_embedder", "x_embedder"):
                expected = xavier(module), 0
            else:
                expected = torchs(module.in_features), torchs(module.in_features)
            assert (weight, bias) == (pytest.approx(expected[0], rel=0.05), pytest.approx(expected[1], rel=0.25)), name
    for name in [name for name in found if name.endswith("norm1.weight") or "norm" in name or name == "text_embedder.0.weight"]:
        assert found.pop(name) == 0 and (model.get_parameter(name) == 1).all()
    if text and "words" in text:
        assert found.pop("word_embedder.weight") == pytest.approx(1, rel=0.05)
    tables = {None: ["y_embedder.weight"], 50: ["word_positions"], 64: []}
    for name in tables[text and text.get("words", text.get("dim"))]:
        assert found.pop(name) == pytest.approx(0.02, rel=0.05), name
    assert not found
    assert model.t_embedder.W.std() == pytest.approx(1, abs=0.1) and model.t_embedder.W.shape == (256,)


def test_a_fresh_decoder_and_a_fresh_discriminator_have_torchs_initial_values():
    torch.manual_seed(0)
    decoder = RAE("tiny", "tiny", 32).decoder
    found = stds(decoder)
    assert found.pop("cls_token") == 0
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight, bias = found.pop(f"{name}.weight"), found.pop(f"{name}.bias")
            assert weight == pytest.approx(torchs(module.in_features), rel=0.05), name
            assert bias == pytest.approx(torchs(module.in_features), rel=0.25), name
        elif isinstance(module, torch.nn.LayerNorm):
            assert found.pop(f"{name}.weight") == found.pop(f"{name}.bias") == 0 and module.eps == 1e-12
    assert not found
    heads = Discriminator("tiny", "random").heads
    for name, parameter in heads.named_parameters():
        fan_in = {"first": 96, "residual": 9 * 96, "last": 96}[name.split(".")[1]]
        if "original" in name or name.endswith("0.bias") or name.endswith("last.bias"):
            assert parameter.numel() < 9 or parameter.detach().std() == pytest.approx(torchs(fan_in), rel=0.25), name
        else:
            assert parameter.detach().std() == 0                                       # norms: 1 and 0


def test_what_stops_a_run():
    assert [number.name for number in STOPS] == ["SIGTERM", "SIGINT", "SIGHUP"]


def test_a_laptops_learning_rate_falls_until_its_last_epoch():
    ends = lambda *flags, encoder="tiny": train_dit.parse_args(flags, encoder).decay_end
    assert ends("--epochs", "5") == 5
    assert ends("--epochs", "0.1") == 0.25                                    # where it would begin to fall
    assert ends("--epochs", "5", "--decay-end", "2") == 2
    assert ends("--epochs", "20", encoder="dinov2_b") == 800                  # a snapshot of the long schedule


def test_a_short_decay_is_a_laptops_and_one_that_runs_backwards_is_refused(tmp_path):
    """`--decay-end` is compared with the recipe's own start, .25 epochs of `tiny`."""
    flags = ("--rae", ROOT / "assets/demo", "--epochs", 2, "--steps", 1, "--micro", 4, "--batch", 4, "--workers", 0)
    assert "wrote" in inside("train_dit.py", *flags, "--decay-end", 2, "--run", "run", cwd=tmp_path)
    with pytest.raises(UserError, match="--decay-end 0.2 comes before --decay-start 0.25"):
        inside("train_dit.py", *flags, "--decay-end", 0.2, "--run", "other", cwd=tmp_path)

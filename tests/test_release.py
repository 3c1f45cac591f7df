"""Released checkpoints load and give the released outputs; golden/ holds tiny random-weight models in that format."""
from pathlib import Path

import pytest
import torch

from rae import DECODERS, Decoder, RAE, count_flops, from_release, load_rae, load_strict
from sample import euler, generate, guided
from train_dit import SIZES, DiT, load_dit

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return torch.load(GOLDEN / f"official_{name}.pt", weights_only=True)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def tokens(x):                                                                # (B, D, h, w) -> (B, N, D)
    return x.flatten(2).mT


@pytest.mark.parametrize("name", ["dit", "ditdh"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"ema": state}, lambda state: {"model": state}])
def test_released_dits_give_the_released_velocities(name, wrap, tmp_path):
    g = golden(name)
    torch.save(wrap(g["state_dict"]), tmp_path / "stage2_model.pt")
    model = load_dit(tmp_path / "stage2_model.pt")
    assert g["config"].items() <= model.config.items()
    assert relative(model(tokens(g["x"]), g["t"], g["y"]), tokens(g["v"])) < 1e-5


def test_head_counts_can_be_given_where_the_rope_buffers_are_missing(tmp_path):
    g = golden("ditdh")
    torch.save({k: v for k, v in g["state_dict"].items() if "rope" not in k}, tmp_path / "x.pt")
    model = load_dit(tmp_path / "x.pt", heads=2, head_heads=4)
    assert relative(model(tokens(g["x"]), g["t"], g["y"]), tokens(g["v"])) < 1e-5


@pytest.mark.parametrize("break_it, sentence", [
    (lambda s: s.pop("blocks.1.attn.qkv.bias"), "1 missing .blocks.1.attn.qkv.bias"),
    (lambda s: s.update(foreign=torch.zeros(1)), "1 foreign .foreign"),
    (lambda s: s.update({"t_embedder.W": torch.zeros(3)}), "1 misshapen .t_embedder.W"),
    (lambda s: s.pop("pos_embed"), "neither a dit.pt nor a released model: 'pos_embed'")])
def test_wrong_keys_are_named(break_it, sentence, tmp_path):
    state = golden("dit")["state_dict"]
    break_it(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=sentence):
        load_dit(tmp_path / "x.pt")


def test_the_released_decoder_gives_the_released_image():
    g = golden("decoder")
    config = dict(g["config"])
    mean, std = (torch.tensor(config.pop(key)).view(3, 1, 1) for key in ("mean", "std"))
    decoder = Decoder(**config)
    for absent in (False, True):                                              # the fixed embedding may be missing
        state = {k: v for k, v in g["state_dict"].items() if not absent or k != "decoder_pos_embed"}
        load_strict(decoder, from_release(state), "golden")
        assert relative(decoder(g["z"]) * std + mean, g["image"]) < 1e-5
    with pytest.raises(ValueError, match="missing .cls_token"):
        load_strict(decoder, from_release({k: v for k, v in state.items() if "cls" not in k}), "golden")
    with pytest.raises(ValueError, match="not the fixed"):
        from_release(g["state_dict"] | {"decoder_pos_embed": g["state_dict"]["decoder_pos_embed"] + 0.1})


def test_the_released_euler_trajectory_is_met_on_its_own_times(tmp_path):
    g, dit = golden("euler"), golden("ditdh")
    torch.save(dit["state_dict"], tmp_path / "x.pt")
    with torch.no_grad():
        z = euler(guided(load_dit(tmp_path / "x.pt"), g["y"]), tokens(g["noise"]), g["t"])
    assert relative(z, tokens(g["z"])) < 1e-5


def released_decoder(rae):
    """rae's decoder under the released names (the inverse of from_release), for a round trip."""
    state = {}
    for key, value in rae.decoder.state_dict().items():
        if ".qkv." in key:
            for part, v in zip(("query", "key", "value"), value.chunk(3)):
                state["decoder_layers." + key.removeprefix("blocks.").replace("qkv", f"attention.attention.{part}")] = v.clone()
            continue
        for new, old in (("blocks.", "decoder_layers."), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                         ("mlp.0", "intermediate.dense"), ("mlp.2", "output.dense"), ("proj", "attention.output.dense")):
            key = key.replace(new, old)
        for new, old in (("cls_token", "trainable_cls_token"), ("embed.", "decoder_embed."), ("norm.", "decoder_norm."),
                         ("predict.", "decoder_pred.")):
            key = old + key.removeprefix(new) if key.startswith(new) else key
        state[key] = value
    return state


def test_load_rae_reads_a_released_decoder_and_its_statistics(tmp_path):
    stat = golden("stat_slice")                                               # of the real DINOv2-B file: mean absent
    rae = RAE("dinov2_b", dict(width=64, depth=2, heads=1, mlp_hidden=96), image_size=32, encoder_weights=False)
    torch.save({"model": released_decoder(rae)}, tmp_path / "model.pt")
    torch.save(stat, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match="whose latents"):
        load_rae(tmp_path / "model.pt")
    loaded = load_rae(tmp_path / "model.pt", encoder="dinov2_b", decode_only=True)
    z = torch.randn(2, 4, 768)
    assert loaded.mean.eq(0).all() and loaded.var[3, 5] == stat["var"][5, 1, 1] and loaded.var[1, 7] == stat["var"][7, 0, 1]
    rae.var.copy_(loaded.var)
    torch.testing.assert_close(loaded.decode(z), rae.decode(z))
    x = torch.randn(2, 4, 768)
    torch.testing.assert_close(x / loaded.std * (stat["var"].flatten(1).T + 1e-5).sqrt(), x)


def test_the_release_folder_is_read_offline(tmp_path):
    """release:imagenet256 from a folder with the hub's relative paths: tiny weights in the released format."""
    from rae import RELEASED as AUTOENCODERS
    from train_dit import RELEASED
    files = dict(zip(("model", "weak"), RELEASED["imagenet256"][1:3])) | dict(zip(("decoder", "stat"), AUTOENCODERS["dinov2_b"][2:]))
    for file in files.values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    rae = RAE("dinov2_b", dict(width=64, depth=1, heads=1, mlp_hidden=96), image_size=32, encoder_weights=False)
    torch.save(released_decoder(rae), tmp_path / files["decoder"])
    torch.save(golden("stat_slice"), tmp_path / files["stat"])
    for which, width in (("model", 48), ("weak", 32)):
        torch.save({"ema": released_dit(DiT(4, 768, width, 2, 4, 64, 2, 16, 10))}, tmp_path / files[which])
    model, weak = (load_dit(f"release:imagenet256{part}", weights=tmp_path) for part in ("", "/weak"))
    rae = load_rae(model.rae, decode_only=True, weights=tmp_path)             # sampling needs no encoder
    with pytest.raises(ValueError, match="model.safetensors of timm/vit_base_patch14_reg4_dinov2.lvd142m is expected"):
        load_rae(model.rae, weights=tmp_path)
    images = generate(model, rae, torch.tensor([3, 4]), torch.tensor([1, 2]), model.alpha, 3, 1.42, weak)
    assert images.shape == (2, 3, 32, 32) and model.config["width"] == 48 and weak.config["width"] == 32


def released_dit(model):
    """Our names -> the release's."""
    side, state = int(model.config["tokens"] ** 0.5), {}
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
            assert len(value) == side ** 2
            state[f"{rope}.freqs_{part}"] = value
    return state


@pytest.mark.parametrize("head", [0, 48, 64])
def test_our_checkpoint_and_one_in_the_released_format_give_the_same_samples(head, tmp_path):
    torch.manual_seed(0)
    model = DiT(16, 96, 48, 2, 4, head, 2, 4, 10)
    for parameter in model.parameters():                                      # the fresh output layer is zero
        parameter.data.normal_(std=0.05)
    torch.save(dict(config=model.config, ema=model.state_dict(), alpha=2.0, classes=list("abcdefghij"), rae=None),
               tmp_path / "dit.pt")
    torch.save(released_dit(model), tmp_path / "stage2_model.pt")
    rae = RAE("tiny", "tiny", 32, encoder_weights=False).eval()
    ours, theirs = (generate(load_dit(tmp_path / name), rae, torch.arange(3), torch.arange(3), 2.0, 5)
                    for name in ("dit.pt", "stage2_model.pt"))
    assert torch.equal(ours, theirs) and ours.std() > 0.01


@pytest.mark.parametrize("config, millions", [
    (dict(width=1152, head=0, token_dim=384), 676.4), (dict(width=1152, head=0), 677.2), (dict(width=1152), 838.7),
    (dict(width=384), 196.5), (dict(width=768), 294.3), (dict(width=1024), 621.7)])
def test_parameter_counts_are_the_paper_s(config, millions):
    depth, heads = SIZES[config["width"]]
    with torch.device("meta"):
        model = DiT(**config, depth=depth, heads=heads)
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 1) == pytest.approx(millions)


@pytest.mark.parametrize("preset, giga", [("B", 22.2), ("L", 78.1), ("XL", 106.7)])
def test_decoder_multiply_adds_are_the_paper_s(preset, giga):
    with torch.device("meta"):
        full, linear = count_flops(Decoder(256, 768, patch=16, **DECODERS[preset]), torch.empty(1, 256, 768))
    assert linear / 2e9 == pytest.approx(giga, rel=0.01) and full > linear

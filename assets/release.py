"""The paper's released weights, turned once into files of this project: out/release/NAME/{rae,dit,guide}.pt.

    python assets/release.py imagenet256               # from the Hugging Face hub, about 6 GB
    python assets/release.py imagenet256 --from DIR    # from DIR, which has the hub's relative paths

`release:NAME`, wherever a run or an autoencoder is named, does the same on first use, so that
`python sample.py --run release:imagenet256` is one command. No encoder is needed for it; if DIR has the
encoder's file too, timm/MODEL/model.safetensors, its weights go into rae.pt.

N tokens, D channels of a token, W backbone width. Nothing about a file is guessed: sizes are read where
tensors state them, stand in a table, or are asked for. Sources: the release's files; arXiv 2510.11690.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

if not __package__:                                         # started as a script: the root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rae import (DECODERS, ENCODERS, Decoder, UserError, fetch, load_rae, load_strict,  # noqa: E402
                 read_weights, save_checkpoint, sincos_2d, unwrap)

HUB = "nyu-visionx/RAE-collections"
OUT = Path("out/release")

AUTOENCODERS = {  # name: encoder, decoder's file, statistics' file; all decoders are of size XL, at tau 0.8
    "dinov2_s":     ("dinov2_s",  "decoders/dinov2/wReg_small/ViTXL_n08/model.pt",
                                  "stats/dinov2/wReg_small/imagenet1k/stat.pt"),
    "dinov2_b":     ("dinov2_b",  "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                                  "stats/dinov2/wReg_base/imagenet1k/stat.pt"),
    "dinov2_l":     ("dinov2_l",  "decoders/dinov2/wReg_large/ViTXL_n08/model.pt",
                                  "stats/dinov2/wReg_large/imagenet1k/stat.pt"),
    "dinov2_b_512": ("dinov2_b",  "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
                                  "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
    "siglip2_b":    ("siglip2_b", "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
                                  "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
    "mae_b":        ("mae_b",     "decoders/mae/base_p16/ViTXL_n08/model.pt",
                                  "stats/mae/base_p16/ImageNet1k/stat.pt"),
}

MODELS = {  # name: autoencoder, DiT^DH-XL's folder, AutoGuidance's weak model's, the paper's scale for it;
    # _ep20 and _ep80 are snapshots of imagenet256's training, which come without a guide
    "imagenet256":      ("dinov2_b",     "ImageNet256/DiTDH-XL",       "ImageNet256/DiTDH-S_ep14", 1.42),
    "imagenet512":      ("dinov2_b_512", "ImageNet512/DiTDH-XL_ep400", "ImageNet512/DiTDH-S_ep20", 1.5),
    "imagenet256_ep20": ("dinov2_b",     "ImageNet256/DiTDH-XL_ep20",  None,                       1.0),
    "imagenet256_ep80": ("dinov2_b",     "ImageNet256/DiTDH-XL_ep80",  None,                       1.0),
}


# The release's names and shapes, and ours

DECODER_NAMES = (  # theirs, ours; in this order, as some contain others
    ("trainable_cls_token", "cls_token"),
    ("decoder_embed", "embed"),
    ("decoder_layers", "blocks"),
    ("decoder_norm", "norm"),
    ("decoder_pred", "predict"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.output.dense", "proj"),
    ("intermediate.dense", "mlp.0"),
    ("output.dense", "mlp.2"),
)


def convert_decoder(state_dict):
    """A released decoder's state dict, bare or wrapped -> Decoder's.

    Only the fixed `decoder_pos_embed` may be there or not, as the release loads it; load_strict refuses what
    else is too much or too little. Errors: a position embedding that is not the fixed one.
    """
    state = dict(unwrap(state_dict))
    position = state.pop("decoder_pos_embed", None)                     # (1, 1 + N, width)
    if position is not None:
        grid = sincos_2d(math.isqrt(position.shape[1] - 1), position.shape[2])
        expected = F.pad(grid, (0, 0, 1, 0))                            # [CLS] comes first, and has zeros
        alike = position[0].shape == expected.shape
        if not alike or not torch.allclose(position[0].float(), expected, atol=1e-4):
            raise UserError("decoder_pos_embed of this file is not the fixed sin-cos embedding")
    # Names of whole layers first, then of their parts
    for theirs, ours in DECODER_NAMES:
        state = {key.replace(theirs, ours): value for key, value in state.items()}

    # Query, key and value: three linears there, one here
    for key in list(state):
        if "attention.attention.query" in key:
            parts = [key.replace("query", part) for part in ("query", "key", "value")]
            if all(part in state for part in parts):
                qkv = key.replace("attention.attention.query", "qkv")
                state[qkv] = torch.cat([state.pop(part) for part in parts])
    return state


def rope_heads(state, rope, width, given, argument):
    """How many heads share `width` channels: as given, else by the RoPE buffer."""
    if given:
        return given
    buffer = state.get(f"{rope}.freqs_cos")                 # (N, channels of a head)
    if buffer is None:
        raise UserError(f"this file has no {rope}.freqs_cos, and its other tensors do not say how many heads"
                        f" share {width} channels: convert_dit needs {argument}")
    return width // buffer.shape[1]


def dit_config(state, heads, head_heads, head_depth):
    """The arguments of DiT that a released state dict is the state of."""
    # Sizes that tensors state; with a DDT head there are two input embeddings
    _, tokens, width = state["pos_embed"].shape             # (1, N, W)
    blocks = [value for key, value in state.items() if key.endswith(".norm1.weight")]
    head = 0
    if "s_embedder.proj.weight" in state:
        head = len(state["x_embedder.proj.weight"])         # (H, D, 1, 1)

    # The head's blocks follow the backbone's, and only their width tells them apart
    if head == 0:
        head_depth = 0
    elif head != width:
        head_depth = sum(len(weight) == head for weight in blocks)
    elif head_depth is None:
        raise UserError(f"backbone and head of this file are both {width} wide, and its tensors do not say"
                        " where the head begins: convert_dit needs head_depth")

    config = dict(tokens=tokens, token_dim=len(state["final_layer.linear.weight"]), width=width,
                  depth=len(blocks) - head_depth, head=head, head_depth=head_depth,
                  num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)      # and the null class
    # A width is any multiple of its heads, so that only RoPE's buffers tell them
    if head:
        config["heads"] = rope_heads(state, "enc_feat_rope", width, heads, "heads")
        config["head_heads"] = rope_heads(state, "dec_feat_rope", head, head_heads, "head_heads")
    else:
        config["heads"] = rope_heads(state, "feat_rope", width, heads, "heads")
    return config


def convert_dit(state_dict, heads=None, head_heads=None, head_depth=None):
    """A released DiT's or DiT^DH's state dict, bare or wrapped -> (DiT's arguments, DiT's state dict).

    heads, head_heads: where the file lacks the RoPE buffers; head_depth: where the head is as wide as the
    backbone. Errors: a tensor that states a size is missing; one of these three is needed and not given.
    """
    state = unwrap(state_dict)
    try:
        config = dit_config(state, heads, head_heads, head_depth)
    except KeyError as error:
        raise UserError(f"this is no released DiT: {error} is missing") from None

    converted = {}
    for key, value in state.items():
        if "feat_rope." in key:                             # made anew from the sizes
            continue
        name = key.replace("embedder.proj.", "embedder.").replace("embedder.embedding_table.", "embedder.")
        if not config["head"]:                              # its only input embedding has the other's name
            name = name.replace("x_embedder.", "s_embedder.")
        if name in ("s_embedder.weight", "x_embedder.weight"):
            value = value.flatten(1)                        # (W, D, 1, 1): a convolution there, a linear here
        converted[name] = value
    return config, converted


def statistics(stat, encoder):
    """A stat.pt, {"mean": None or (D, h, w), "var": (D, h, w)} -> mean, var (N, D)."""
    var = stat.get("var")
    dim = ENCODERS[encoder].dim
    if var is None or var.ndim != 3 or len(var) != dim or var.shape[1] != var.shape[2]:
        shape = None if var is None else tuple(var.shape)
        raise UserError(f"the variance of this stat.pt has the shape {shape}, and not {encoder}'s"
                        f" ({dim}, side, side)")
    mean = stat.get("mean")
    if mean is None:                                        # the released latents are not centred
        mean = torch.zeros_like(var)
    # Channel, row, column there; token, channel here, tokens row by row
    return mean.flatten(1).T.contiguous(), var.flatten(1).T.contiguous()


# Files

def find(file, folder):
    """Where a file of the hub is on this machine: in `folder`, or else in the hub's cache."""
    if folder is None:
        return fetch(HUB, file)
    path = Path(folder, file)
    if not path.is_file():
        raise UserError(f"--from {folder}: {file} of {HUB} is expected under this relative path")
    return path


def encoder_weights(encoder, folder):
    """The encoder's state dict if `folder` has it; None, and it is fetched when it is needed."""
    path = Path(folder or "", "timm", ENCODERS[encoder].timm, "model.safetensors")
    if folder is None or not path.is_file():
        return None
    return read_weights(path)


def write_rae(path, encoder, decoder_path, stat_path, weights):
    """Released decoder and statistics -> rae.pt; weights: the encoder's, or None."""
    try:
        mean, var = statistics(read_weights(stat_path), encoder)
        state = convert_decoder(read_weights(decoder_path))
    except UserError as error:
        raise UserError(f"{decoder_path} or {stat_path}: {error}") from None

    side = math.isqrt(len(var))                             # the image's, in tokens
    sizes = dict(DECODERS["XL"])
    config = dict(encoder=encoder, decoder=sizes, image_size=side * ENCODERS[encoder].stride, upsample=1)

    # A foreign file is refused here, before it becomes one of ours; shapes are enough for that
    with torch.device("meta"):
        decoder = Decoder(len(var), ENCODERS[encoder].dim, patch=ENCODERS[encoder].stride, **sizes)
    shapes = {key: value.to("meta") for key, value in state.items() if torch.is_tensor(value)}
    load_strict(decoder, shapes, str(decoder_path))
    # `ema`: what is published are averages, and use takes those
    save_checkpoint(path, config=config, mean=mean, var=var, ema=state, encoder=weights)


def write_dit(path, model_path, **extra):
    """A released DiT -> dit.pt; extra: what else it says, as `guide`, `scale`, `latents`."""
    try:
        config, state = convert_dit(read_weights(model_path))
    except UserError as error:
        raise UserError(f"{model_path}: {error}") from None
    # The paper's time shift for as many channels (section 4.2); ImageNet's classes go by their numbers
    alpha = math.sqrt(config["tokens"] * config["token_dim"] / 4096)
    classes = list(range(config["num_classes"]))
    save_checkpoint(path, config=config, ema=state, alpha=alpha, classes=classes, rae=None, **extra)


def convert(name, folder, target, again):
    """Write the files of `name` that `target` lacks, or all of them; each is there only when complete."""
    autoencoder, model, weak, scale = MODELS.get(name, (name, None, None, 1.0))
    encoder, decoder_file, stat_file = AUTOENCODERS[autoencoder]
    # What each of our files is made of; dit.pt, which refers to the others, comes last
    sources = {"rae.pt": [decoder_file, stat_file]}
    if weak:
        sources["guide.pt"] = [f"DiTs/Dinov2/wReg_base/{weak}/stage2_model.pt"]
    if model:
        sources["dit.pt"] = [f"DiTs/Dinov2/wReg_base/{model}/stage2_model.pt"]
    missing = [file for file in sources if again or not (target / file).is_file()]
    if not missing:
        return

    # All sources are there before the first of them is read
    print(f"converting release:{name} into {target}, once", flush=True)
    found = {file: [find(source, folder) for source in sources[file]] for file in missing}
    if "rae.pt" in missing:
        write_rae(target / "rae.pt", encoder, *found["rae.pt"], encoder_weights(encoder, folder))
    latents = load_rae(target / "rae.pt", decode_only=True).latents
    if "guide.pt" in missing:
        write_dit(target / "guide.pt", *found["guide.pt"], scale=1.0, latents=latents)
    if "dit.pt" in missing:
        guide = dict(guide="guide.pt") if weak else {}
        write_dit(target / "dit.pt", *found["dit.pt"], scale=scale, latents=latents, **guide)


def release(name, folder=None, out=OUT, again=False):
    """The folder OUT/NAME with the files of a released model or autoencoder, converted if they are not there.

    folder: has the hub's files, in place of the hub; again: convert what is there, too. Under torchrun rank 0
    converts and the others wait. Errors: an unknown name; a file that cannot be had, or is not what it
    should be.
    """
    if name not in AUTOENCODERS | MODELS:
        raise UserError(f"there is no release:{name}: there are the models {', '.join(MODELS)} and the"
                        f" autoencoders {', '.join(AUTOENCODERS)}")
    # Whether the files are there is for rank 0 to say, as others may look when it has begun to write
    target = Path(out, name)
    together = dist.is_available() and dist.is_initialized()
    done = torch.zeros(())
    try:
        if not together or dist.get_rank() == 0:
            convert(name, folder, target, again)
            done.fill_(1)
    finally:                                                # also when it failed: the others are waiting
        if together:
            dist.broadcast(done, 0)
    if not done:
        raise UserError(f"rank 0 could not convert release:{name}; its own message says why")
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", default="", help=f"one of {', '.join(MODELS | AUTOENCODERS)}")
    parser.add_argument("--from", dest="folder", metavar="DIR",
                        help="a folder with the released files under the hub's relative paths")
    args = parser.parse_args()
    target = release(args.name, args.folder, again=True)
    after = "sample.py" if args.name in MODELS else "rae.py photo.jpg"
    print(f"wrote {target}. Next: python {after} --run release:{args.name}")


if __name__ == "__main__":
    main()

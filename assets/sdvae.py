"""Stable Diffusion's VAE as an encoder, for the paper's Table 10: `--encoder sdvae`.

It needs `pip install diffusers`. Latents of 4 channels are grouped two by two: 256 tokens of 16
channels for an image of 256 pixels. Its pretrained weights were never loaded here.
"""
from torch import nn

from rae import UserError, fetch, load_strict, patchify, read_weights, unwrap

HUB = "stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors"
SIZES = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
RENAMED = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")  # in older files


class SDVAE(nn.Module):
    """Normalised pixels (B,3,h,w) -> the posterior's mean (B,hw/256,16), scaled to about variance 1."""
    def __init__(self, **sizes):
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError:
            raise UserError("the encoder sdvae needs diffusers: pip install diffusers") from None
        vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, **SIZES | sizes)
        self.encoder = vae.encoder  # its decoder is not wanted: ours is trained
        self.quant_conv = vae.quant_conv

    def forward(self, x):
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, 1)  # each (B, 4, h/8, w/8)
        return 0.18215 * patchify(mean, 2)


def build(weights=None, **sizes):
    """The frozen encoder; weights: None (the hub's), "random", a state dict, or the path of one."""
    vae = SDVAE(**sizes)
    if weights is None:
        weights = fetch(*HUB)
    if str(weights) != "random":
        state = unwrap(weights if isinstance(weights, dict) else read_weights(weights))
        for old, new in RENAMED.items():
            state = {key.replace(f".{old}.", f".{new}."): value for key, value in state.items()}
        kept = {key: value for key, value in state.items()
                if not key.startswith(("decoder", "post_quant"))}
        load_strict(vae, kept, "encoder sdvae")
    return vae.eval().requires_grad_(False)

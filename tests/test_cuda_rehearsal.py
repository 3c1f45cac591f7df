"""The GPU's path without a GPU: shapes, devices and dtypes on a fake `cuda:0`, where nothing is computed.

All tensors are fake ones there, and an operation on tensors of two devices is an error, as it would be. Forward
passes alone: a backward pass cannot run on fake tensors of a machine without CUDA.
"""
import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fid
import rae
import sample
import train_decoder
import train_dit
from rae import RAE, load_lpips, psnr, ssim
from train_decoder import (Discriminator, augment, hinge_loss, noise_augment, real_and_fake, reconstruction_losses,
                           reconstructions)
from train_dit import DiT, conditional, euler, flow_matching_loss

GPU = torch.device("cuda", 0)
B = 4
x = torch.zeros(1, 1, 4, 8)
if rae.bytes_for_backward(lambda: lambda x: F.scaled_dot_product_attention(x, x, x), x) is None:
    pytest.skip(f"torch {torch.__version__} asks a GPU's driver which attention it has", allow_module_level=True)


@contextmanager
def on_a_gpu(monkeypatch, dtype=torch.bfloat16):
    """Every new tensor is a fake one on the GPU; autocast to `dtype`, or off for float32."""
    def normals(keys, count, device):                                         # torch.Generator asks for a real GPU
        return torch.empty(len(keys), count, device=device)
    for module in (rae, train_decoder, train_dit, sample):
        monkeypatch.setattr(module, "normals", normals)
        monkeypatch.setattr(module, "mix", lambda *parts: parts[-1] if torch.is_tensor(parts[-1]) else parts[0])
    with FakeTensorMode(allow_non_fake_inputs=True), GPU, torch.no_grad():
        torch.set_autocast_dtype("cuda", torch.bfloat16)                      # torch.autocast turns itself off here
        torch.set_autocast_enabled("cuda", dtype == torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def moved(module):
    """The module with its weights on the fake GPU, inside of on_a_gpu."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(value, device=GPU), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_like(value, device=GPU)
    return module


def check(x, *shape, dtype=torch.float32):
    assert x.device == GPU and x.dtype == dtype and tuple(x.shape) == shape


@pytest.fixture(scope="module")
def made_once():
    return RAE("dinov2_s", "B", 256).load_encoder("random").eval()


@pytest.fixture
def autoencoder(made_once):
    return copy.deepcopy(made_once)


def made(**changes):
    sizes = dict(tokens=256, token_dim=384, width=384, depth=2, heads=6, head=384, head_depth=1, head_heads=6)
    return DiT(**sizes | changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_autoencoder_encodes_and_decodes(autoencoder, dtype, monkeypatch):
    with on_a_gpu(monkeypatch, dtype):
        there = moved(autoencoder)
        z = there.encode(torch.empty(B, 3, 256, 256))
        check(z, B, 256, 384)
        check(there.decode(z), B, 3, 256, 256)
        check(there.decode(noise_augment(z, there.std, torch.empty(B, device="cpu"), 0.8, "uniform")), B, 3, 256, 256)
        check(reconstructions(there, there.decoder, torch.empty(B, 3, 256, 256)), 3 * B, 3, 256, 256)


def test_stage_1s_losses(autoencoder, monkeypatch):
    disc, lpips = Discriminator("dino", "random"), load_lpips(vgg="random")
    with on_a_gpu(monkeypatch):
        there, disc, lpips = moved(autoencoder), moved(disc), moved(lpips)
        images, keys = torch.empty(B, 3, 256, 256), torch.empty(B, dtype=torch.int64, device="cpu")
        z = there.encode(images)
        copies = there.decode(noise_augment(z, there.std, keys, 0.8))
        losses = reconstruction_losses(copies, images, lpips, 1.0)
        for name in ("loss", "l1", "lpips"):
            check(losses[name])
        check(augment(copies * 2 - 1, keys), B, 3, 256, 256)
        check(disc.eval()(augment(copies * 2 - 1, keys)), B, 5 * 784)
        both = real_and_fake(there, images, z, keys)
        check(both, 2 * B, 3, 256, 256)
        check(hinge_loss(*disc(both).chunk(2)))


@pytest.mark.parametrize("changes", [{}, dict(head=0), dict(predict="x"), dict(base_head=1), dict(predict="x", base_head=2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_diffusion_transformers_loss(changes, dtype, monkeypatch):
    model = made(**changes)
    streams = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with on_a_gpu(monkeypatch, dtype):
        there = moved(model)
        z, y, keys = torch.empty(B, 256, 384), torch.empty(B, dtype=torch.int64), torch.empty(B, device="cpu")
        check(there(z, torch.empty(B), y), B, 256, 384)
        for time in ("logit-normal", "uniform"):
            check(flow_matching_loss(there, z, y, 6.9, keys, 0.1, time))
    assert {*streams} == {torch.float32}                                      # what is summed up stays in fp32


@pytest.mark.parametrize("weak", [None, "a model", "self"])
def test_guidance_of_every_kind(weak, monkeypatch):
    model, other = made(base_head=1), made(width=192, heads=3)
    monkeypatch.setattr(sample, "float", lambda t: 0.5, raising=False)        # a fake time has no value
    with on_a_gpu(monkeypatch, torch.float32):
        there = moved(model)
        weak = moved(other) if weak == "a model" else weak
        z, y = torch.empty(B, 256, 384), torch.empty(B, dtype=torch.int64)
        for scale in (1.0, 1.5):
            velocity = sample.guided(there, y, scale, weak, (0.1, 0.9))
            check(velocity(z, torch.empty((), device="cpu")), B, 256, 384)
        times = [torch.empty((), device="cpu") for _ in range(3)]
        check(euler(conditional(there, y), z, times), B, 256, 384)


def test_samples_and_pictures(autoencoder, monkeypatch):
    model = made()
    with on_a_gpu(monkeypatch, torch.float32):
        rae_there, there = moved(autoencoder), moved(model)
        check(train_dit.samples(there, rae_there, 6.9, torch.arange(10)), 50, 3, 256, 256)
        keys = torch.empty(B, dtype=torch.int64, device="cpu")
        check(sample.generate(there, rae_there, keys, keys, 6.9, 2), B, 3, 256, 256)


def test_metrics_and_the_inception_network(monkeypatch):
    network = fid.Inception("random")
    with on_a_gpu(monkeypatch, torch.float32):
        a, b = torch.empty(B, 3, 64, 64), torch.empty(B, 3, 64, 64)
        check(psnr(a, b), B, dtype=torch.float64)
        check(ssim(a, b), B, dtype=torch.float64)
        features, logits = moved(network)(torch.empty(B, 3, 64, 64, dtype=torch.uint8))
        check(features, B, 2048)
        check(logits, B, 1008)

"""Data, randomness, statistics and the autoencoder."""
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rae import (ENCODERS, RAE, Decoder, Folder, Order, Shapes, batches, center_crop, in_order, load_rae, mix, normals,
                 open_data, open_val, patchify, read_weights, save_checkpoint, sincos_2d, spread, unpatchify)
from train_decoder import latent_statistics

CPU = torch.device("cpu")


def test_mix_is_uniform_and_every_argument_matters():
    h = mix(3, torch.arange(200_000), 5)
    assert len(h.unique()) == len(h) and h.min() >= 0
    for bit in range(63):                                                     # mean of 200,000 fair coins: sd 0.0011
        assert abs((h >> bit & 1).double().mean() - 0.5) < 0.006, bit
    pairs = (mix(torch.arange(1000)[:, None], torch.arange(50))).flatten()
    assert len(pairs.unique()) == 50_000 and mix(1, 2) != mix(2, 1)


def test_normals_belong_to_their_key():
    keys = torch.tensor([5, 6, 7])
    x = normals(keys, 4096, CPU)
    assert torch.equal(normals(keys[[2, 0]], 4096, CPU), x[[2, 0]])
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05 and not torch.equal(x[0], x[1])


def test_shapes_are_a_function_of_the_index():
    data, held_out = Shapes(), Shapes(first=50_000, count=10)
    images, labels = data.render(torch.arange(50))
    again = data.__getitems__([(7, 1), (3, 2)])
    assert torch.equal(again[0][0], images[7]) and again[1][1] == 3 and again[1][2] == 2
    assert not torch.equal(held_out[0, 0][0], images[0]) and torch.equal(held_out[0, 0][0], data.render(torch.tensor([50_000]))[0][0])
    assert labels.bincount().tolist() == [5] * 10 and images.dtype == torch.uint8


def test_shapes_say_nothing_about_the_class_by_colour_or_place():
    u = Shapes().uniform(torch.arange(20_000)).view(2000, 10, -1)             # parameters by class
    assert (u.mean(0) - 0.5).abs().max() < 0.04 and (u.std(0) - 12 ** -0.5).abs().max() < 0.02


def test_a_circle_covers_the_area_of_a_circle():
    data = Shapes(64)
    data.low = data.high = torch.tensor([0, 0, 1, 0, 1, 0, 0, 0, 0.1, -0.1, 0.5, 0.2])        # red on black, radius 0.95 x 0.5
    image, _ = data.render(torch.tensor([0]))
    area = image[0, 0].float().sum() / 255
    assert area == pytest.approx(math.pi * (0.95 * 0.5 * 32) ** 2, rel=0.01) and image[0, 1:].max() == 0
    rows, columns = (image[0, 0].float().sum(i) for i in (1, 0))
    axis = (torch.arange(64) + 0.5) / 32 - 1
    assert (columns * axis).sum() / columns.sum() == pytest.approx(0.1, abs=0.01)
    assert (rows * axis).sum() / rows.sum() == pytest.approx(-0.1, abs=0.01)


def test_center_crop_is_boxes_then_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 260, 3), dtype=np.uint8))
    half = image.resize((130, 75), Image.Resampling.BOX)
    expected = half.resize((111, 64), Image.Resampling.BICUBIC)
    crop = center_crop(image, 64)
    assert crop.size == (64, 64) and np.array_equal(np.array(crop), np.array(expected.crop((23, 0, 87, 64))))
    assert np.array_equal(np.array(center_crop(crop, 64)), np.array(crop))


def test_every_kind_of_file_becomes_upright_rgb(tmp_path):
    for part in ("a", "b é ü"):
        (tmp_path / part).mkdir()
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a/sixteen bit.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a/cmyk.jpg")
    Image.new("P", (64, 64), 3).save(tmp_path / "a/palette.png")
    turned = Image.new("RGB", (64, 64))
    turned.paste((255, 0, 0), (0, 0, 64, 32))                                 # red above; EXIF 6: turn by 90 degrees
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b é ü/turned.jpg", exif=exif, quality=95)
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG")
    (tmp_path / "b é ü/broken.jpg").write_bytes(buffer.getvalue()[:300])
    (tmp_path / "b é ü/zero.jpg").write_bytes(b"")
    data = Folder(tmp_path, 32)
    items = {data.samples[i][0].rsplit("/", 1)[1]: data[i, i] for i in range(len(data))}
    assert items["sixteen bit.png"][0].float().mean() == pytest.approx(127, abs=2)
    red = items["cmyk.jpg"][0].float().mean((1, 2))
    assert red[0] > 200 and red[1:].max() < 60
    right = items["turned.jpg"][0].float()[0]
    assert right[:, 20:].mean() > 240 and right[:, :12].mean() < 15
    assert [items[name][1] for name in ("turned.jpg", "broken.jpg", "zero.jpg")] == [1, -1, -1] and data.broken.sum() == 2
    assert sum(len(images) for images, *_ in in_order(data, 2, CPU, workers=0)) == 4
    training = Folder(tmp_path, 32, train=True, crop=True)
    assert all(training[i, 5][1] >= 0 for i in range(len(training)))          # the next good file instead


@pytest.mark.parametrize("length, most", [(10_000, 2048), (50_000, 10), (1000, 1000), (19, 10), (3, 10), (7, None)])
def test_a_part_of_a_data_set_has_all_classes_sorted_or_taking_turns(length, most):
    places = torch.tensor(spread(length, most))
    assert len(places) == min(length, most or length) == len(places.unique()) and 0 <= places.min() <= places.max() < length
    if length >= 1000:
        for classes in (places * 10 // length, places % 10):
            counts = classes.bincount(minlength=10)
            assert counts.max() - counts.min() <= 0.15 * len(places) / 10 + 1, counts
    data = Shapes(first=50_000, count=length)
    seen = [torch.cat([i for *_, i in in_order(data, 7, CPU, rank, 2, most=most)]) for rank in range(2) if length > rank]
    assert torch.cat(seen).sort().values.tolist() == list(range(len(places)))
    _, labels, _ = next(in_order(data, 7, CPU, most=most))
    assert labels.tolist() == [p % 10 for p in spread(length, most)[:7]]


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_order_is_a_function_of_seed_and_step(world, accum):
    def step_items(step, **kw):
        return [sum([next(it) for _ in range(kw.get("accum", 1))], []) for it in (iter(Order(50, 12, step=step, **kw)),)][0]
    reference = step_items(9)
    parts = [step_items(9, accum=accum, rank=rank, world=world) for rank in range(world)]
    assert sorted(sum(parts, [])) == sorted(reference) and len({key for _, key in reference}) == 12
    it, seen = iter(Order(50, 12)), []
    for _ in range(25):                                                       # 300 places = 6 epochs
        seen += [index for index, _ in next(it)]
    assert all(sorted(seen[e * 50:(e + 1) * 50]) == list(range(50)) for e in range(6)) and seen[:50] != seen[50:100]
    assert step_items(9, seed=1) != reference


def test_batches_with_workers_are_those_without(photos):
    data = open_data(photos, 32, crop=True)
    one, two = (next(batches(data, Order(len(data), 8), workers, CPU)) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and 0 <= one[0].min() and one[0].max() <= 1


def test_train_and_val_folders_are_found(photos, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(photos)
    assert len(open_data(tmp_path, 32)) == 40 and not open_val(None, tmp_path, 32).train
    assert open_val(None, photos, 32) is None and len(open_val(None, "shapes", 32)) == 10_000
    assert open_val(None, "shapes", 32).first == 50_000


def test_patchify_and_unpatchify_are_inverse_and_ordered_row_column_channel():
    images = torch.randn(2, 3, 8, 8)
    x = patchify(images, 4)
    assert torch.equal(unpatchify(x, 4), images)
    assert x[1, 3, (2 * 4 + 1) * 3 + 2] == images[1, 2, 4 + 2, 4 + 1]         # token (1,1), row 2, column 1, channel 2


def test_sincos_position_embedding_has_columns_first():
    e = sincos_2d(3, 8)                                                       # omega = 1, 0.01
    row, column = 2, 1
    expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
                math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    torch.testing.assert_close(e[row * 3 + column], torch.tensor(expected))


@pytest.mark.parametrize("encoder", ["tiny", "pixel"])
def test_encode_standardises_and_decode_mirrors_it(encoder):
    size = ENCODERS[encoder].image
    rae = RAE(encoder, "tiny", size, encoder_weights="random")
    images = torch.rand(3, 3, size, size)
    rae.mean.normal_(), rae.var.uniform_(0.5, 2)
    z = rae.encode(images)
    assert z.shape == (3, rae.num_tokens, rae.token_dim) and torch.equal(z, rae.encode(images))
    torch.testing.assert_close(z * rae.std + rae.mean, rae.tokens(images))
    perfect = lambda tokens: (images - rae.pixel_mean) / rae.pixel_std
    torch.testing.assert_close(rae.decode(z, perfect), images)
    assert rae.decode(z).shape == images.shape


def test_upsampling_decodes_larger_from_the_same_tokens():
    small = RAE("tiny", "tiny", 32, encoder_weights="random")
    large = RAE("tiny", "tiny", 32, upsample=2, encoder_weights=small.encoder.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(large.tokens(images), small.tokens(F.avg_pool2d(images, 2)))
    assert large.decode(large.encode(images)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("batch", [3, 7, 40])
def test_latent_statistics_are_the_two_pass_ones(photos, batch):
    data, rae = Folder(photos, 32), RAE("tiny", "tiny", 32, encoder_weights="random")
    mean, var = latent_statistics(rae, data, batch, CPU, workers=0)
    images = torch.stack([data[i, i][0] for i in range(40)]).float() / 255
    x = rae.tokens(torch.cat([images, images.flip(-1)])).double()
    torch.testing.assert_close(mean, x.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, x.var(0, correction=0).float(), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_runs_no_code_and_is_replaced_whole(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))
    torch.save({"config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is no checkpoint that can be read without running code"):
        load_rae(tmp_path / "evil.pt")
    assert save_checkpoint(tmp_path / "x/a.pt", step=1) and read_weights(tmp_path / "x/a.pt")["step"] == 1
    (tmp_path / "file").write_text("")
    assert not save_checkpoint(tmp_path / "file/a.pt", step=1)                # reported, not raised
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.pt"]


@pytest.mark.parametrize("arguments, sentence", [
    (dict(encoder="dino"), "unknown encoder 'dino'"), (dict(decoder="XXL"), "unknown decoder 'XXL'"),
    (dict(image_size=250), "image size 250 .*multiple of 16"),
    (dict(decoder=dict(width=100, depth=1, heads=3, mlp_hidden=8)), "width 100, 3 heads")])
def test_impossible_autoencoders_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        RAE(**dict(dict(decoder="B", encoder_weights=False), **arguments))


def test_decoder_runs_on_the_meta_device():
    with torch.device("meta"):
        assert Decoder(256, 768, 1152, 28, 16, 4096, 32)(torch.empty(1, 256, 768)).shape == (1, 3, 512, 512)


def test_a_saved_encoder_comes_back_at_its_grid():
    sizes = dict(width=64, depth=1, heads=1, mlp_hidden=64)
    rae = RAE("dinov2_s", sizes, 48, encoder_weights="random")                # 3x3 of the table's 37x37 positions
    again, images = RAE("dinov2_s", sizes, 48, encoder_weights=rae.encoder.state_dict()), torch.rand(1, 3, 48, 48)
    assert torch.equal(again.tokens(images), rae.tokens(images))

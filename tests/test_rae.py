"""Data, randomness, files and the autoencoder."""
import argparse
import io
import math
import os
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import rae as module
from assets.shapes import Shapes
from rae import (ENCODERS, RAE, Decoder, Folder, at_least, batches, center_crop, default_data, drop_broken,
                 evenly, fetch, grid_angles, in_fp32, in_order, load_rae, locate, mix, newest_run, normals,
                 open_data, open_val, patchify, random_crop, read_weights, save_checkpoint, shuffled, sincos_2d,
                 start_worker, unpatchify, unwrap, worker_count)
from train_decoder import latent_statistics

CPU = torch.device("cpu")
BROKEN = ("broken.jpg", "zero.jpg")
SMALL = dict(width=64, depth=1, heads=1, mlp_hidden=64)


# Arguments and precision

@pytest.mark.parametrize("kind, low, most, fine, wrong", [
    (int,   1,   math.inf, ["1", "7", str(10 ** 23)], ["0", "-3", "x", "1.5"]),
    (float, 0,   math.inf, ["0", "1e-9", "3"],        ["-1e-9", "nan", "inf", "-inf", ""]),
    (float, 0,   1,        ["0", "0.5", "1"],         ["1.0001", "-0.1", "nan", "inf"]),
    (int,   -5,  5,        ["-5", "5"],               ["6", "-6"])])
def test_numbers_out_of_range_are_refused(kind, low, most, fine, wrong):
    number = at_least(low, kind, most)
    assert [number(text) for text in fine] == [kind(text) for text in fine]
    for text in wrong:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            number(text)
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be at least {low}"):
        number(str(low - 1))


def test_in_fp32_computes_as_if_there_were_no_autocast():
    x, w = torch.randn(8, 64), torch.randn(64, 64)
    product = in_fp32(lambda a, b: a @ b)
    with torch.autocast("cpu", torch.bfloat16):
        inside = product(x, w)
        assert not torch.equal(inside, (x @ w).float())                 # autocast would round
        again = torch.randn(2, 2) @ torch.randn(2, 2)
    assert torch.equal(inside, x @ w) and again.dtype == torch.bfloat16          # and it is on again
    assert torch.equal(product(x.bfloat16(), w), x.bfloat16().float() @ w)


# Randomness

def splitmix(*parts):
    """The published splitmix64 finaliser, chained over the parts, in Python's integers."""
    mask = (1 << 64) - 1
    h = 0
    for part in parts:
        h = ((h ^ part) + 0x9E3779B97F4A7C15) & mask
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
        h = h ^ h >> 31
    return h & (mask >> 1)


def test_mix_is_splitmix64():
    for parts in ((0,), (1,), (3, 7, 5), (2 ** 62, 123456789), (50_000, 11)):
        assert int(mix(*parts)) == splitmix(*parts)
    columns = mix(torch.arange(4)[:, None], torch.arange(3))
    assert columns.tolist() == [[splitmix(i, j) for j in range(3)] for i in range(4)]


def test_mix_is_uniform_and_every_argument_matters():
    h = mix(3, torch.arange(200_000), 5)
    assert len(h.unique()) == len(h) and h.min() >= 0
    for bit in range(63):                                               # 200,000 fair coins: sd 0.0011
        assert abs((h >> bit & 1).double().mean() - 0.5) < 0.006, bit
    pairs = (mix(torch.arange(1000)[:, None], torch.arange(50))).flatten()
    assert len(pairs.unique()) == 50_000 and mix(1, 2) != mix(2, 1)


def test_normals_belong_to_their_key():
    keys = torch.tensor([5, 6, 7])
    x = normals(keys, 4096, CPU)
    assert torch.equal(normals(keys[[2, 0]], 4096, CPU), x[[2, 0]])
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05 and not torch.equal(x[0], x[1])


# The drawn data set

def test_shapes_are_a_function_of_the_index():
    data = Shapes()
    held_out = Shapes(first=50_000, count=10)
    images, labels = data.render(torch.arange(50))
    again = data.__getitems__([(7, 1), (3, 2)])
    assert torch.equal(again[0][0], images[7]) and again[1][1] == 3 and again[1][2] == 2
    first = held_out[0, 0][0]
    assert not torch.equal(first, images[0])
    assert torch.equal(first, data.render(torch.tensor([50_000]))[0][0])
    assert labels.bincount().tolist() == [5] * 10 and images.dtype == torch.uint8


def test_shapes_say_nothing_about_the_class_by_colour_or_place():
    u = Shapes().uniform(torch.arange(20_000)).view(2000, 10, -1)       # parameters by class
    assert (u.mean(0) - 0.5).abs().max() < 0.04 and (u.std(0) - 12 ** -0.5).abs().max() < 0.02


def drawn(name, size, x=0.0, y=0.0, radius=0.5, angle=0.0):
    """One red shape on black, and how much red there is at each pixel (H, W)."""
    data = Shapes(size)
    data.low = data.high = torch.tensor([0, 0, 1, 0, 1, 0, 0, 0, x, y, radius, angle])
    image, _ = data.render(torch.tensor([Shapes.classes.index(name)]))
    assert image[0, 1:].max() == 0
    return image[0, 0].float() / 255


def test_a_circle_covers_the_area_of_a_circle():
    cover = drawn("circle", 64, x=0.1, y=-0.1, angle=0.2)
    assert cover.sum() == pytest.approx(math.pi * (0.95 * 0.5 * 32) ** 2, rel=0.01)
    rows, columns = (cover.sum(i) for i in (1, 0))
    axis = (torch.arange(64) + 0.5) / 32 - 1
    assert (columns * axis).sum() / columns.sum() == pytest.approx(0.1, abs=0.01)
    assert (rows * axis).sum() / rows.sum() == pytest.approx(-0.1, abs=0.01)


@pytest.mark.parametrize("radius", [0.3, 0.5, 0.75])
def test_the_edge_of_a_shape_is_one_pixel_wide_whatever_its_size(radius):
    cover = drawn("circle", 64, radius=radius)
    axis = torch.arange(64) - 31.5
    distance = (axis ** 2 + axis[:, None] ** 2).sqrt() - 0.95 * radius * 32   # in pixels, from the outline
    assert (cover - (0.5 - distance).clamp(0, 1)).abs().max() < 0.04


@pytest.mark.parametrize("name, area", [                                # of outlines of radius 1, by hand
    ("square", 1.64 ** 2), ("triangle", 1.7), ("diamond", 1.2), ("plus", 2 * 2 * 0.6 - 0.6 ** 2),
    ("ring", math.pi * (1 - 0.56 ** 2)), ("star", 5 * 0.45 * math.sin(math.pi / 5))])
def test_shapes_cover_the_areas_of_their_outlines(name, area):
    side = 192
    assert drawn(name, side).sum() == pytest.approx(area * (0.5 * side / 2) ** 2, rel=0.02)


@pytest.mark.parametrize("name", Shapes.classes)
def test_a_mirrored_shape_is_the_shape_turned_the_other_way(name):
    left = drawn(name, 64, x=0.1, angle=0.2)
    right = drawn(name, 64, x=-0.1, angle=-0.2)
    torch.testing.assert_close(left.flip(1), right, atol=2 / 255, rtol=0)
    if name not in ("circle", "ring"):
        assert (drawn(name, 64, angle=0.2) - drawn(name, 64, angle=-0.2)).abs().max() > 0.2


def test_the_ten_shapes_are_ten_shapes():
    covers = torch.stack([drawn(name, 32) for name in Shapes.classes])
    apart = (covers[:, None] - covers).abs().sum((2, 3)) / covers.sum((1, 2))
    assert apart.add(torch.eye(10)).min() > 0.1


# Pictures and folders of them

def test_center_crop_is_boxes_then_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 260, 3), dtype=np.uint8))
    half = image.resize((130, 75), Image.Resampling.BOX)
    expected = half.resize((111, 64), Image.Resampling.BICUBIC).crop((23, 0, 87, 64))
    crop = center_crop(image, 64)
    assert crop.size == (64, 64) and np.array_equal(np.array(crop), np.array(expected))
    assert np.array_equal(np.array(center_crop(crop, 64)), np.array(crop))


def test_random_crops_are_of_the_shorter_side_at_half_as_much_again():
    """Of a ramp, 100 high: at 1.5 x 32 = 48 pixels, neighbours differ by 100 / 48 grey levels."""
    ramp = np.zeros((100, 240, 3), np.uint8)
    ramp[..., 0] = np.arange(240)
    ramp[..., 1] = np.arange(100)[:, None]
    places = set()
    for key in range(300):
        crop = np.asarray(random_crop(Image.fromarray(ramp), 32, key)).astype(float)
        assert crop.shape == (32, 32, 3)
        inner = crop[2:-2, 2:-2]                                        # a bicubic ramp bends at its ends
        slope = 100 / 48
        assert np.diff(inner[..., 0], axis=1).mean() == pytest.approx(slope, abs=0.05)
        assert np.diff(inner[..., 1], axis=0).mean() == pytest.approx(slope, abs=0.05)
        left = (crop[16, 16, 0] + 0.5) / slope - 16.5
        top = (crop[16, 16, 1] + 0.5) / slope - 16.5
        places.add((round(top), round(left)))
    tops, lefts = zip(*places)
    assert (min(tops), max(tops)) == (0, 48 - 32) and min(lefts) <= 1 and 82 <= max(lefts) <= 115 - 32
    again = [np.asarray(random_crop(Image.fromarray(ramp), 32, 5)) for _ in range(2)]
    assert np.array_equal(*again)


@pytest.fixture
def odd_files(tmp_path):
    """Two classes of files of all kinds, two of which are broken."""
    for part in ("a", "b é ü"):
        (tmp_path / part).mkdir()
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a/sixteen bit.png")
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a/cmyk.jpg")
    Image.new("P", (64, 64), 3).save(tmp_path / "a/palette.png")
    turned = Image.new("RGB", (64, 64))
    turned.paste((255, 0, 0), (0, 0, 64, 32))                           # red above; EXIF 6: turn it right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b é ü/turned.jpg", exif=exif, quality=95)
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG")
    (tmp_path / "b é ü/broken.jpg").write_bytes(buffer.getvalue()[:300])
    (tmp_path / "b é ü/zero.jpg").write_bytes(b"")
    return tmp_path


def test_every_kind_of_file_becomes_upright_rgb(odd_files):
    data = Folder(odd_files, 32)
    items = {Path(data.samples[i][0]).name: data[i, i] for i in range(len(data))}
    assert items["sixteen bit.png"][0].float().mean() == pytest.approx(127, abs=2)
    red = items["cmyk.jpg"][0].float().mean((1, 2))
    assert red[0] > 200 and red[1:].max() < 60
    right = items["turned.jpg"][0].float()[0]
    assert right[:, 20:].mean() > 240 and right[:, :12].mean() < 15
    assert items["turned.jpg"][1] == 1 and items["palette.png"][1] == 0


def test_broken_files_are_named_once_and_left_out(odd_files, capsys):
    data = Folder(odd_files, 32)
    names = [Path(path).name for path, _ in data.samples]
    for _ in range(2):
        for index, name in enumerate(names):
            assert (data[index, index] is None) == (name in BROKEN)
    said = capsys.readouterr().out
    assert said.count("skipped") == said.count("/broken.jpg: ") + said.count("/zero.jpg: ") == 2
    assert data.broken.sum() == 2

    # What goes through the data in order yields the others, under their own numbers
    parts = list(in_order(data, 2, CPU, workers=0))
    numbers = torch.cat([numbers for *_, numbers in parts]).tolist()
    assert numbers == [i for i, name in enumerate(names) if name not in BROKEN]
    assert sum(len(images) for images, *_ in parts) == 4
    assert drop_broken([None, None]) is None


def test_what_takes_a_broken_files_place_is_drawn_from_the_items_key_and_no_neighbour(tmp_path, monkeypatch):
    """120 broken files that lie together, as an interrupted copy leaves them, beside 120 sound ones."""
    for name, sound in (("a", True), ("b", False)):
        (tmp_path / name).mkdir()
        for i in range(120):
            path = tmp_path / name / f"{i:03}.png"
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path) if sound else path.write_bytes(b"")
    data = Folder(tmp_path, 8, train=True, crop=True)
    opened = []
    monkeypatch.setattr(module, "read_image", lambda path, read=module.read_image: opened.append(path) or read(path))
    drawn = [data[index, key] for index in range(120, 240) for key in (index, index + 1000)]
    reds = torch.tensor([int(image[0, 0, 0]) for image, _, _ in drawn])
    assert all(label == 0 for _, label, _ in drawn) and [key for *_, key in drawn[:2]] == [120, 1120]
    assert reds.bincount().max() <= 10 and len(reds.unique()) > 80            # of 240 draws of 120
    assert len([path for path in opened if "/b/" in path]) == 120             # each broken one is opened once
    again = Folder(tmp_path, 8, train=True, crop=True)
    assert all(torch.equal(again[120 + i // 2, key][0], image) for i, (image, _, key) in enumerate(drawn[:9]))


def test_a_folder_without_one_good_file_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/zero.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="not one image of the folder can be read"):
        Folder(tmp_path, 32, train=True)[0, 0]


def test_whatever_a_decoder_raises_makes_a_file_broken(tmp_path, monkeypatch, capsys):
    class Odd(Exception):
        pass
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a/{i}.png")
    for error in (Odd("odd"), AttributeError("no such tag"), ZeroDivisionError(), MemoryError(), AssertionError()):
        def decode(path, read=module.read_image, error=error):
            if path.endswith("1.png"):
                raise error
            return read(path)
        monkeypatch.setattr(module, "read_image", decode)
        items = [Folder(tmp_path, 8)[i, i] for i in range(3)]
        assert [item is None for item in items] == [False, True, False]
        assert f"skipped {tmp_path}/a/1.png: {error}" in capsys.readouterr().out


def typed(number):
    """EXIF bytes whose Orientation is 6 and whose maker's name is typed as `number`."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x010F, number, 1, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


def test_damaged_exif_leaves_a_picture_as_it_lies(tmp_path):
    sound = Image.new("RGB", (40, 30), (200, 0, 0))
    for number in (1, 2, 5, 7, 99):                                           # 5: a fraction, of nothing
        sound.save(tmp_path / "x.jpg", exif=typed(number))
        image = module.read_image(tmp_path / "x.jpg")
        assert sorted(image.size) == [30, 40] and np.asarray(image)[..., 0].mean() > 190
    sound.save(tmp_path / "x.jpg", exif=b"Exif\0\0" + b"no tags at all")
    assert module.read_image(tmp_path / "x.jpg").size == (40, 30)


def test_values_beyond_8_bits_are_scaled_by_a_known_range_or_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    sixteen = ramp.astype(np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "x.png")
    Image.fromarray(sixteen).save(tmp_path / "x.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 64 64 65535\n" + sixteen.astype(">u2").tobytes())
    (tmp_path / "ten.pgm").write_bytes(b"P5 64 64 1023\n" + (ramp / 65535 * 1023).astype(">u2").tobytes())
    for name in ("x.png", "x.tif", "x.pgm", "ten.pgm"):
        found = np.asarray(module.read_image(tmp_path / name))[..., 0]
        assert np.abs(found - ramp / 257).max() < 1.5, name
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "x.tif")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "y.tif")
    for name, mode in (("x.tif", "I"), ("y.tif", "F")):
        with pytest.raises(ValueError, match=f"mode {mode}, whose range"):
            module.read_image(tmp_path / name)


def test_a_line_of_pixels_is_no_picture(tmp_path):
    for size in ((5000, 1), (1, 5000), (2100, 100)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match="longer than 20:1"):
            module.read_image(tmp_path / "x.png")
    Image.new("RGB", (2000, 100)).save(tmp_path / "x.png")
    assert module.read_image(tmp_path / "x.png").size == (2000, 100)


def paint(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)


def test_what_systems_leave_in_folders_is_no_data(tmp_path, capsys):
    paint(*(tmp_path / f"{name}/{i}.jpg" for name in ("cat", "dog") for i in (7, 1, 4, 0, 9, 2, 5, 8, 3, 6)))
    paint(tmp_path / ".ipynb_checkpoints/0-checkpoint.jpg", tmp_path / "@eaDir/0.jpg", tmp_path / "__MACOSX/cat/0.jpg",
          tmp_path / "cat/.ipynb_checkpoints/0-checkpoint.jpg", tmp_path / "cat/@eaDir/0.jpg")
    (tmp_path / "cat/._0.jpg").write_bytes(b"of a Mac")
    (tmp_path / "dog/.DS_Store").write_bytes(b"")
    data = Folder(tmp_path, 8)
    assert data.classes == ["cat", "dog"] and len(data) == 20 and capsys.readouterr().out == ""
    assert len(Folder(tmp_path, None)) == 20                                  # for metrics as well
    assert [Path(path).name for path, _ in data.samples] == [f"{i}.jpg" for i in range(10)] * 2


def test_files_that_are_not_read_are_counted_by_kind(tmp_path, capsys):
    paint(tmp_path / "a/x.PNG", tmp_path / "b/deep/er/y.webp", tmp_path / "loose.jpg")
    for i in range(60):
        (tmp_path / f"a/{i}.gif").write_bytes(b"")
    (tmp_path / "b/z.heic").write_bytes(b"")
    assert len(Folder(tmp_path, 8)) == 2
    said, = capsys.readouterr().out.splitlines()
    assert said == (f"files that are not read: 60 .gif (such as {tmp_path}/a/0.gif), 1 beside class folders"
                    f" (such as {tmp_path}/loose.jpg), 1 .heic (such as {tmp_path}/b/z.heic)")


def test_folders_that_hold_no_data_set_are_refused(tmp_path, photos):
    with pytest.raises(ValueError, match="no such folder, or no class folder"):
        Folder(tmp_path / "nowhere", 32)
    paint(tmp_path / "some/full/a.jpg")
    (tmp_path / "some/hollow").mkdir()
    (tmp_path / "some/hollow/a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match="no image that is read in hollow: remove it, or add"):
        Folder(tmp_path / "some", 32)
    flat = tmp_path / "flat"
    paint(flat / "a.png")
    with pytest.raises(ValueError, match="mkdir .*/flat/all && mv .*makes one class"):
        Folder(flat, 32)


@pytest.mark.parametrize("names, train, val", [
    ("train/a train/b val/a val/b", "train", "val"), ("train/a val/a test", "train", "val"), ("train/a", "train", None),
    ("train/a val/a annotations=json", "train", "val"),                       # no images there: no class
    ("bus car train truck", "", None), ("bus train/electric train/steam truck", "", None),
    ("Train/a Val/a", "refused", None), ("training validation", "refused", None), ("train/a validation/a", "refused", None),
    ("train val", "refused", None), ("train", "refused", None), ("train/a val/a extra/a", "refused", None)])
def test_the_whole_layout_decides_what_is_a_split(names, train, val, tmp_path):
    for name in names.split():
        folder, _, kind = name.partition("=")
        paint(tmp_path / folder / "x.jpg")
        if kind:
            (tmp_path / folder / "x.jpg").rename(tmp_path / folder / f"x.{kind}")
    if train == "refused":
        with pytest.raises(ValueError, match="parts of a data set are named"):
            open_data(tmp_path, 8)
        return
    assert {Path(path).parent for path, _ in open_data(tmp_path, 8).samples} == {
        tmp_path / name for name in names.split() if not train or name.startswith(f"{train}/")}
    held_out = open_val(None, tmp_path, 8)
    assert (held_out is None) == (val is None)
    assert held_out is None or all(path.startswith(f"{tmp_path / val}/") for path, _ in held_out.samples)


def test_each_image_is_seen_once_however_folders_are_linked(tmp_path):
    paint(tmp_path / "a/x.png", tmp_path / "b/y.png")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    assert len(Folder(tmp_path, 8)) == 2


def test_a_class_may_be_a_link(tmp_path):
    paint(tmp_path / "elsewhere/x.png", tmp_path / "data/b/y.png")
    (tmp_path / "data/a").symlink_to(tmp_path / "elsewhere")
    data = Folder(tmp_path / "data", 8)
    assert data.classes == ["a", "b"] and [label for _, label in data.samples] == [0, 1]


def test_small_images_are_enlarged_with_a_warning_of_one_line(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for name, side in (("x", 40), ("y", 40), ("z", 64)):
        Image.new("RGB", (side, 64)).save(tmp_path / f"a/{name}.png")
    for train in (False, True):
        data = Folder(tmp_path, 64, train=train, crop=True)
        assert all(data[i, i][0].shape == (3, 64, 64) for i in (0, 1, 2, 0))
        said = capsys.readouterr().out
        assert said.count("WARNING") == 1 and "x.png has 40 x 64 pixels, and is enlarged to 64" in said
    data = Folder(tmp_path, 40)
    assert data[0, 0][0].shape == (3, 40, 40) and capsys.readouterr().out == ""


@pytest.mark.parametrize("length, most", [
    (10_000, 2048), (50_000, 10), (1000, 1000), (19, 10), (3, 10), (7, None)])
def test_a_part_of_a_data_set_has_all_classes_sorted_or_taking_turns(length, most):
    places = torch.tensor(evenly(length, most))
    assert len(places) == min(length, most or length) == len(places.unique())
    assert 0 <= places.min() <= places.max() < length
    if length >= 1000:
        for classes in (places * 10 // length, places % 10):
            counts = classes.bincount(minlength=10)
            assert counts.max() - counts.min() <= 0.15 * len(places) / 10 + 1, counts
    data = Shapes(first=50_000, count=length)
    seen = []
    for rank in range(min(2, length)):
        seen += [numbers for *_, numbers in in_order(data, 7, CPU, rank, 2, most=most)]
    assert torch.cat(seen).sort().values.tolist() == list(range(len(places)))
    _, labels, _ = next(in_order(data, 7, CPU, most=most))
    assert labels.tolist() == [place % 10 for place in evenly(length, most)[:7]]


def test_stage_2_sees_centre_crops_and_stage_1_random_ones(photos):
    centre = open_data(photos, 32)
    random = open_data(photos, 32, crop=True)
    still = Folder(photos, 32)
    assert all(torch.equal(centre[i, 5][0], still[i, 5][0]) for i in range(8))
    assert any(not torch.equal(random[i, 5][0], still[i, 5][0]) for i in range(8))


def test_train_and_val_folders_are_found(photos, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(photos)
    assert len(open_data(tmp_path, 32)) == 40 and open_data(tmp_path, 32).train
    assert not open_val(None, tmp_path, 32).train
    assert open_val(None, photos, 32) is None and len(open_val(None, "shapes", 32)) == 10_000
    assert len(open_val(photos, "shapes", 32)) == 40 and len(open_val("shapes", photos, 32)) == 10_000
    assert open_val(None, "shapes", 32).first == 50_000 and open_data("shapes", 32).first == 0


# Loading

def test_loaders_take_this_ranks_share_of_the_cores_it_may_use(photos, monkeypatch):
    data = Folder(photos, 32)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for cores, ranks, expected in ((64, 1, 8), (6, 1, 6), (6, 2, 3), (6, 4, 1), (1, 8, 1), (32, 8, 4), (64, 64, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert worker_count(data) == expected
        assert worker_count(data, 0) == 0 and worker_count(data, 5) == 5
        assert worker_count(Shapes()) == 0 and worker_count(Shapes(), 2) == 2
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")                           # a stray variable counts for nothing
    assert worker_count(data) == 8


@pytest.fixture
def signals():
    """Puts the handlers of STOPS back."""
    before = {number: signal.getsignal(number) for number in module.STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_loader_processes_leave_signals_to_the_main_one_and_print_any_name(signals, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    start_worker(0)
    assert {signal.getsignal(number) for number in module.STOPS} == {signal.SIG_IGN}
    print("caf\udce9", flush=True)
    assert printed.getvalue() == b"caf\\udce9\n"


@pytest.mark.parametrize("launcher", [False, True])
def test_the_second_signal_ends_a_lone_process_and_no_rank(launcher, signals, monkeypatch):
    for name in ("RANK", "TORCHELASTIC_RUN_ID") if launcher else ():
        monkeypatch.setenv(name, "1")
    flag = module.stop_signal()
    handlers = {number: signal.getsignal(number) for number in module.STOPS}
    for number in handlers:
        flag.zero_()
        os.kill(os.getpid(), number)
        assert flag == 1
        assert signal.getsignal(number) == (handlers[number] if launcher else signal.SIG_DFL)


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_order_is_a_function_of_seed_and_step(world, accum):
    def step_items(step, accum=1, **options):
        order = iter(shuffled(50, 12, step=step, accum=accum, **options))
        return sum([next(order) for _ in range(accum)], [])

    reference = step_items(9)
    parts = [step_items(9, accum=accum, rank=rank, world=world) for rank in range(world)]
    assert sorted(sum(parts, [])) == sorted(reference) and len({key for _, key in reference}) == 12
    assert step_items(9, seed=1) != reference
    assert not {key for _, key in reference} & {key for _, key in step_items(10)}    # no noise comes twice

    order = iter(shuffled(50, 12))
    seen = []
    for _ in range(25):                                                 # 300 places = 6 epochs
        seen += [index for index, _ in next(order)]
    assert all(sorted(seen[e * 50:(e + 1) * 50]) == list(range(50)) for e in range(6))
    assert seen[:50] != seen[50:100]


def test_batches_with_workers_are_those_without(photos):
    data = open_data(photos, 32, crop=True)
    one, two = (next(batches(data, shuffled(len(data), 8), 8, workers, CPU)) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and 0 <= one[0].min() and one[0].max() <= 1


@pytest.mark.parametrize("batch", [3, 7, 40])
def test_latent_statistics_are_the_two_pass_ones(photos, batch):
    data = Folder(photos, 32)
    rae = RAE("tiny", "tiny", 32).load_encoder("random")
    mean, var = latent_statistics(rae, data, batch, CPU, workers=0)
    images = torch.stack([data[i, i][0] for i in range(40)]).float() / 255
    x = rae.tokens(torch.cat([images, images.flip(-1)])).double()
    torch.testing.assert_close(mean, x.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, x.var(0, correction=0).float(), rtol=1e-5, atol=1e-7)


# The decoder and the autoencoder

def test_patchify_and_unpatchify_are_inverse_and_ordered_row_column_channel():
    images = torch.randn(2, 3, 8, 8)
    x = patchify(images, 4)
    assert torch.equal(unpatchify(x, 4), images)
    # token (1, 1), row 2, column 1, channel 2
    assert x[1, 3, (2 * 4 + 1) * 3 + 2] == images[1, 2, 4 + 2, 4 + 1]


def test_sincos_position_embedding_has_columns_first():
    e = sincos_2d(3, 8)                                                 # omega = 1, 0.01
    row, column = 2, 1
    expected = [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
                math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    torch.testing.assert_close(e[row * 3 + column], torch.tensor(expected))


def test_angles_are_computed_in_float64():
    """A far position's angle in float32 would be off by 1e-6."""
    angles = grid_angles(32, 64)                                              # 16 frequencies
    row, column = 31, 17
    for k in range(16):
        turned = angles[row * 32 + column, [k, 16 + k]].tolist()
        assert turned == pytest.approx([row * 10_000 ** (-k / 16), column * 10_000 ** (-k / 16)], rel=1e-12)


@pytest.mark.parametrize("encoder", ["tiny", "pixel"])
def test_encode_standardises_and_decode_mirrors_it(encoder):
    size = ENCODERS[encoder].image_side
    rae = RAE(encoder, "tiny", size).load_encoder("random")
    images = torch.rand(3, 3, size, size)
    rae.mean.normal_()
    rae.var.uniform_(0.5, 2)
    z = rae.encode(images)
    x = rae.tokens(images)
    assert z.shape == (3, rae.num_tokens, rae.token_dim) and torch.equal(z, rae.encode(images))
    torch.testing.assert_close(z, (x - rae.mean) / (rae.var + 1e-5).sqrt())

    def perfect(tokens):
        """Of exactly these tokens it knows the picture, as the encoder was shown it; off them, it is off."""
        error = (tokens - x).mean((1, 2))[:, None, None, None]
        seen.append(tokens)
        return (images - rae.pixel_mean) / rae.pixel_std + error

    seen = []
    torch.testing.assert_close(rae.decode(z, perfect), images)
    torch.testing.assert_close(seen[0], x)                              # a decoder is given the raw tokens
    shift, scale = torch.tensor(rae.spec.pixels).view(2, 3, 1, 1)
    torch.testing.assert_close(rae.decode(z), rae.decoder(x) * scale + shift)
    assert rae.decode(z).shape == images.shape


@pytest.mark.parametrize("images", [
    torch.rand(1, 3, 30, 200), torch.rand(3, 32, 32), torch.rand(1, 1, 32, 32), torch.rand(1, 3, 32, 32) * 255,
    torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.full((1, 3, 32, 32), math.nan)])
def test_what_are_no_images_in_0_to_1_is_refused(images):
    """Without a word they would be encoded as something else."""
    rae = RAE("tiny", "tiny", 32).load_encoder("random")
    with pytest.raises(ValueError, match="give square ones, floats .* from 0 to 1"):
        rae.encode(images)
    for size in (32, 48):                                               # copies leave [0, 1] here and there
        assert rae.encode(torch.rand(1, 3, size, size) * 1.2 - 0.1).shape == (1, 16, 96)


def test_upsampling_decodes_larger_from_the_same_tokens():
    small = RAE("tiny", "tiny", 32).load_encoder("random")
    large = RAE("tiny", "tiny", 32, upsample=2).load_encoder(small.encoder.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(large.tokens(images), small.tokens(F.avg_pool2d(images, 2)))
    assert large.decode(large.encode(images)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(encoder="dino"), "unknown encoder 'dino'"), (dict(decoder="XXL"), "unknown decoder 'XXL'"),
    (dict(image_size=250), "image size 250 .*multiple of 16"),
    (dict(decoder=dict(width=100, depth=1, heads=3, mlp_hidden=8)), "width 100, 3 heads")])
def test_impossible_autoencoders_are_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        RAE(**dict(dict(decoder="B"), **arguments))


def test_decoder_runs_on_the_meta_device():
    with torch.device("meta"):
        assert Decoder(256, 768, 1152, 28, 16, 4096, 32)(torch.empty(1, 256, 768)).shape == (1, 3, 512, 512)


def test_a_saved_encoder_comes_back_at_its_grid():
    rae = RAE("dinov2_s", SMALL, 48).load_encoder("random")             # 3x3 of the table's 37x37 positions
    again = RAE("dinov2_s", SMALL, 48).load_encoder(rae.encoder.state_dict())
    images = torch.rand(1, 3, 48, 48)
    assert torch.equal(again.tokens(images), rae.tokens(images))


# Files

def save(path, data="shapes", encoder=None, **more):
    """A rae.pt whose trained weights are not its averaged ones; the autoencoder that it must give."""
    rae = RAE("tiny", SMALL, 32)
    rae.mean.normal_()
    rae.var.uniform_(0.5, 2)
    averaged = {key: value.clone() for key, value in rae.decoder.state_dict().items()}
    trained = {key: value + 1 for key, value in averaged.items()}
    save_checkpoint(path, config=rae.config, mean=rae.mean, var=rae.var, model=trained, ema=averaged,
                    encoder=encoder, data=data, step=7, **more)
    return rae


def test_loading_takes_the_averaged_weights(tmp_path):
    expected = save(tmp_path / "rae.pt")
    z = torch.randn(2, 16, 96)
    for name in (tmp_path, tmp_path / "rae.pt", str(tmp_path)):
        loaded = load_rae(name, decode_only=True)
        assert torch.equal(loaded.decode(z), expected.decode(z)) and loaded.data == "shapes"
        assert loaded.encoder is None and not loaded.training
        assert not any(weight.requires_grad for weight in loaded.parameters())
    images = torch.rand(2, 3, 32, 32)
    expected.load_encoder()
    assert torch.equal(load_rae(tmp_path).encode(images), expected.encode(images))


def test_the_encoders_weights_come_from_the_file_that_has_them(tmp_path):
    encoder = RAE("tiny", SMALL, 32).load_encoder("random").encoder
    save(tmp_path / "rae.pt", encoder=encoder.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_rae(tmp_path).encoder(x), encoder(x))


def test_the_data_of_an_autoencoder_is_that_of_its_training(tmp_path):
    save(tmp_path / "rae.pt", data="out/photos")
    assert default_data(load_rae(tmp_path, decode_only=True)) == "out/photos"
    assert default_data(RAE("tiny", SMALL, 32)) == "shapes"
    assert default_data(RAE("dinov2_s", SMALL, 48)) == "data/imagenet"


def test_other_checkpoints_are_no_autoencoder(tmp_path):
    torch.save(dict(config=dict(width=1), ema={}, alpha=1.0), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="dit.pt is no rae.pt"):
        load_rae(tmp_path / "dit.pt")
    save(tmp_path / "rae.pt")
    saved = read_weights(tmp_path / "rae.pt")
    del saved["ema"]["norm.bias"]
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: weights of another model: Missing key.*norm.bias"):
        load_rae(tmp_path / "other.pt")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))
    torch.save({"config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is cut short or damaged, or holds more than tensors and plain types"):
        load_rae(tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt is cut short or damaged, or holds more than"):
        read_weights(tmp_path / "list.pt")


def test_a_checkpoint_is_replaced_whole(tmp_path):
    save_checkpoint(tmp_path / "x/a.pt", step=1)
    save_checkpoint(tmp_path / "x/a.pt", step=2)
    saved = read_weights(tmp_path / "x/a.pt")
    assert saved["step"] == 2 and saved["versions"]["torch"] == str(torch.__version__)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.pt"]


def test_a_checkpoint_is_whole_and_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replace"))
    monkeypatch.setattr(Path, "unlink", lambda path: done.append(path.stat().st_size))
    save_checkpoint(tmp_path / "a.pt", weight=torch.zeros(1001))
    assert done[1] == "replace" and done[0] == done[2] > 4004


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", step=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/a.pt could not be written .*make room, or name another"):
        save_checkpoint(tmp_path / "file/a.pt", step=1)

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="a.pt could not be written .*No space left"):
        save_checkpoint(tmp_path / "a.pt", step=2)
    assert read_weights(tmp_path / "a.pt")["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "file"]


def test_checkpoints_are_mapped_and_old_ones_still_read(tmp_path, monkeypatch):
    """Mapped: the ranks of a machine share the pages, and sampling never reads the optimiser."""
    asked = []
    load = torch.load

    def spy(*args, **options):
        asked.append(options)
        return load(*args, **options)
    monkeypatch.setattr(torch, "load", spy)
    state = {"weight": torch.randn(3, 4)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "x.safetensors")
    for name in ("new.pt", "old.pt", "x.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["weight"], state["weight"])
    assert [options["mmap"] for options in asked] == [True, False]
    assert all(options["weights_only"] for options in asked)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_was_cut_short_is_told_as_that(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    state = {"weight": torch.randn(100, 100)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 30, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"x{suffix} is cut short or damaged.*again"):
            read_weights(path)
    with pytest.raises(ValueError, match="nothing.pt: no such file"):
        read_weights(tmp_path / "nothing.pt")


def test_published_files_are_unwrapped():
    state = {"a": 1}
    assert unwrap(state) == unwrap({"model": state}) == unwrap({"ema": state, "model": {"a": 2}}) == state


def test_a_file_of_the_hub_is_named_when_there_is_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(repo, file):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="cannot fetch a/b.pt of some/repo .*--encoder-weights.*--from"):
        fetch("some/repo", "a/b.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"/cache/{repo}/{file}")
    assert fetch("some/repo", "a/b.pt") == Path("/cache/some/repo/a/b.pt")


def test_the_newest_run_is_found_else_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_run("rae.pt") == module.ROOT / "assets/demo/rae.pt"
    for age, name in enumerate(("b", "c", "a")):
        path = tmp_path / "out" / name / "rae.pt"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "out/release/mae_b").mkdir(parents=True)
    (tmp_path / "out/release/mae_b/rae.pt").write_text("")              # a release is no run
    assert newest_run("rae.pt") == Path("out/b/rae.pt")
    assert locate("out/b", "rae.pt") == Path("out/b/rae.pt") == locate("out/b/rae.pt", "rae.pt")


def test_the_script_draws_originals_above_reconstructions(tmp_path, monkeypatch, capsys):
    save(tmp_path / "rae.pt")
    images, _ = Shapes(32).render(torch.arange(2))
    images[1] = 255                                                     # much farther from its copy
    for name, image in zip("ab", images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    out = tmp_path / "new/picture.png"
    monkeypatch.setattr(sys, "argv", ["rae.py", f"{tmp_path}/a.png", f"{tmp_path}/b.png",
                                      "--run", str(tmp_path), "--out", str(out)])
    module.main()
    said = capsys.readouterr().out

    # The figure that is printed, and what stands where in the picture: rows of 2, 2 pixels apart
    rae = load_rae(tmp_path)
    x = images.float() / 255
    copies = rae.decode(rae.encode(x)).clamp(0, 1)
    psnr = (-10 * (x - copies).square().mean((1, 2, 3)).log10()).mean()
    assert f"mean PSNR {psnr:.2f} dB over 2 images" in said
    grid = np.asarray(Image.open(out)).astype(float)
    zoom = 96 // 32
    for row, pair in enumerate((x, copies)):
        for column, image in enumerate(pair):
            top, left = (2 + place * (96 + 2) for place in (row, column))
            shown = grid[top:top + 96:zoom, left:left + 96:zoom]
            assert np.abs(shown - image.permute(1, 2, 0).numpy() * 255).max() <= 1

    # What is no picture
    monkeypatch.setattr(sys, "argv", ["rae.py", f"{tmp_path}/rae.pt", "--run", str(tmp_path)])
    with pytest.raises(ValueError, match="cannot read .*rae.pt"):
        module.main()


def test_without_a_list_of_capabilities_arithmetic_is_fp32(monkeypatch):
    """torch 2.6 has none."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert module.autocast_for(None, CPU)[0] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=True), raising=False)
    assert module.autocast_for(None, CPU)[0] == "bf16"

"""Sources against real files and other libraries; order, split, flips and loader against their
definitions.
"""

import io
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_image

from ddpm import data
from ddpm.common import pixels as common_pixels
from ddpm.common import rng
from ddpm.data import augment, decode, loader, order, torchvision_sets
from ddpm.data import folder as data_folder

RED = (255, 0, 0)
GREEN = (0, 255, 0)


def noise(*shape, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8)


def open_folder(path, image_size=8, channels=3, matte=decode.WHITE):
    return data.open_source(f"folder(path={str(path)!r})", image_size, channels, matte)


def flat(pixels):
    """The one colour of an image, as a tuple; fails if it has several."""
    colours = pixels.flatten(1).unique(dim=1)
    assert colours.shape[1] == 1, colours
    return tuple(colours[:, 0].tolist())


def decode_saved(image, path, image_size=8, channels=3, matte=decode.WHITE, **options):
    image.save(path, **options)
    return decode.decode_file(path, image_size, channels, matte)


@pytest.mark.parametrize("image_size", [8, 16, 32])
def test_digits_are_sklearns_enlarged_bilinearly(image_size):
    source = data.open_source("digits", image_size, 1)
    assert len(source) == 1797 and source.image_shape == (1, image_size, image_size)
    assert source.labels == load_digits().target.tolist() and source.classes == list("0123456789")
    grey = torch.tensor(load_digits().images[:100], dtype=torch.float64).unsqueeze(1)
    expected = (
        torch.nn.functional.interpolate(grey, (image_size, image_size), mode="bilinear") * 255 / 16
    )
    found = torch.stack([source[i] for i in range(100)])
    assert found.dtype == torch.uint8
    # Half a level is the rounding to whole pixels; the sums themselves are exact (quarters and
    # eighths of whole numbers).
    assert (found - expected).abs().max() <= 0.5 and found.max() == 255 and found.min() == 0


def test_digits_in_colour_and_with_alpha_repeat_the_grey():
    grey = data.open_source("digits", 16, 1)[5]
    opaque = torch.full_like(grey, 255)
    for channels, expected in {
        2: [grey, opaque],
        3: [grey] * 3,
        4: [grey, grey, grey, opaque],
    }.items():
        assert torch.equal(data.open_source("digits", 16, channels)[5], torch.cat(expected))


@pytest.mark.parametrize(
    "text, image_size, channels, matte, message",
    [
        ("digits", 24, 1, RED, "digits are 8x8 and come as 8, 16 or 32 pixels, not 24"),
        ("digit", 16, 1, RED, "did you mean 'digits'"),
        ("digits(size=3)", 16, 1, RED, "it takes none"),
        ("digits", 16, 5, RED, "unknown number of channels 5"),
        ("digits", 16, 3, (0, 0, 300), "is not a colour"),
        ("digits", 0, 3, RED, "image_size 0"),
        ("folder", 16, 3, RED, "needs path"),
        ("folder(path='/no/such/place')", 16, 3, RED, "'/no/such/place' does not exist"),
        (f"folder(path={__file__!r})", 16, 3, RED, "is a file"),
        ("torchvision(name='CIFAR')", 16, 3, RED, "did you mean 'CIFAR10'"),
        ("torchvision(name='MNIST', split='val')", 16, 3, RED, "choose one of train, test"),
        ("torchvision(name='EuroSAT', split='val')", 16, 3, RED, "has no splits"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(text, image_size, channels, matte, message):
    with pytest.raises(ValueError, match=message) as error:
        data.open_source(text, image_size, channels, matte)
    assert "\n" not in str(error.value)


@pytest.fixture
def zoo(tmp_path):
    """A folder with a file of every kind: 12 good ones, 4 that cannot be used, and strangers."""
    root = tmp_path / "zoo"
    (root / "b" / "deep").mkdir(parents=True)
    colour = Image.fromarray(noise(12, 16, 3))
    for name in (
        "a.JPG",
        "b/c.Jpeg",
        "d.png",
        "e.webp",
        "f.bmp",
        "g.TIF",
        "h.tiff",
        "b/deep/i.GIF",
    ):
        colour.save(root / name)
    colour.convert("L").save(root / "grey.png")
    colour.convert("CMYK").save(root / "print.jpg")
    Image.fromarray(noise(12, 16).astype(np.uint16) * 257).save(root / "sixteen.png")
    Image.fromarray(noise(12, 16, 2)).save(root / "shadow.png")

    Image.fromarray(noise(7, 50, 3)).save(root / "small.png")
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(whole, "JPEG")
    (root / "torn.jpg").write_bytes(whole.getvalue()[:-400])
    (root / "words.png").write_text("not an image")
    Image.fromarray(noise(9, 9).astype(np.float32)).save(root / "science.tif")

    (root / "notes.txt").write_text("")
    (root / "phone.HEIC").write_text("")
    (root / "README").write_text("")
    for hidden in (".cache", "__MACOSX"):
        (root / hidden).mkdir()
        colour.save(root / hidden / "shadow.jpg")
    colour.save(root / "._a.jpg", "JPEG")
    return root


def test_folder_reads_every_kind_and_names_what_it_leaves_out(zoo):
    source = open_folder(zoo)
    assert (
        len(source) == 12
        and source.image_shape == (3, 8, 8)
        and source.labels is source.classes is None
    )
    assert source.notes == (
        f"folder {zoo}: 12 of 16 images kept",
        "left out 1 not an image: words.png",
        "left out 1 too small: small.png",
        "left out 1 truncated: torn.jpg",
        "left out 1 unknown value range: science.tif",
        "not fit: 12 images are too few: below 300 a network draws copies of its training images; "
        "find more, or start from a run on similar images with "
        "--config.train.init_from=runs/OTHER",
        "not fit: 2 of 16 files cannot be read as images (1 not an image, 1 truncated): copy the "
        "folder here again",
        "not read: 1 .txt file, 1 file without a suffix",
        "1 image is in a format that is not read (1 HEIC): convert to JPEG or PNG",
        f"kept, but check with python -m ddpm.doctor {zoo}: 10 in 2 groups of near-duplicates",
    )
    for index, pixels in enumerate(source):
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8) and pixels.is_contiguous()
        assert torch.equal(pixels, source[index])
    names = [
        "a.JPG",
        "b/c.Jpeg",
        "b/deep/i.GIF",
        "d.png",
        "e.webp",
        "f.bmp",
        "g.TIF",
        "grey.png",
        "h.tiff",
        "print.jpg",
    ]
    for index, name in enumerate([*names, "shadow.png", "sixteen.png"]):
        assert torch.equal(source[index], decode.decode_file(zoo / name, 8, 3))
    with pytest.raises(IndexError):
        source[12]


def test_a_folder_with_nothing_to_use_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"found nothing\); give a folder with \.jpg, \.jpeg"):
        open_folder(tmp_path)
    (tmp_path / "film.mp4").write_text("")
    with pytest.raises(ValueError, match=r"found 1 \.mp4 file\)"):
        open_folder(tmp_path)
    for k in range(1001):
        (tmp_path / f"{k}.mp4").write_text("")
    with pytest.raises(ValueError, match=r"found 1,002 \.mp4 files\)"):
        open_folder(tmp_path)
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "one.png")
    with pytest.raises(
        ValueError,
        match=r"no image in .* can be used: left out 1 too small: one.png; use an image_size below",
    ):
        open_folder(tmp_path, image_size=32)
    (tmp_path / "one.png").write_text("")
    with pytest.raises(ValueError, match="1 empty: one.png; use other files"):
        open_folder(tmp_path)


def test_many_faults_are_counted_and_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    for k in range(9):
        (tmp_path / f"bad{k}.png").write_text("")
    note = open_folder(tmp_path).notes[1]
    assert note == "left out 9 empty: " + ", ".join(f"bad{k}.png" for k in range(9))


def test_a_decompression_bomb_is_left_out(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_folder(tmp_path).notes[1] == "left out 1 too large: bomb.png"


def test_sub_folders_are_classes_if_no_image_lies_beside_them(tmp_path):
    for name in ("tabby/1.png", "tabby/young/2.png", "black/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = open_folder(tmp_path)
    assert source.classes == ["black", "tabby"] and source.labels == [0, 1, 1]
    assert source.notes[-2] == "2 classes: black (1), tabby (2)"
    assert source.notes[-1].endswith("3 in 1 group of near-duplicates, 3 of one colour")
    Image.new("RGB", (9, 9)).save(tmp_path / "stray.png")
    assert open_folder(tmp_path).labels is None


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    elsewhere = tmp_path / "disk"
    root = tmp_path / "root"
    elsewhere.mkdir(), root.mkdir()
    Image.new("RGB", (9, 9)).save(elsewhere / "a.png")
    (root / "one").symlink_to(elsewhere)
    (root / "two").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert len(open_folder(root)) == 1
    (tmp_path / "way").symlink_to(root)
    assert len(open_folder(tmp_path / "way")) == 1


def test_fingerprint_is_of_content_size_and_preprocessing(zoo, tmp_path):
    first = open_folder(zoo).fingerprint
    copy = shutil.copytree(zoo, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "a.JPG", (0, 0))
    assert open_folder(copy).fingerprint == first and len(first) == 64
    others = {
        open_folder(copy, 7).fingerprint,
        open_folder(copy, 8, 1).fingerprint,
        open_folder(copy, 8, 3, RED).fingerprint,
    }
    (copy / "notes.txt").write_text("what is not read does not count")
    assert open_folder(copy).fingerprint == first
    whole = bytearray((copy / "f.bmp").read_bytes())
    whole[-1] ^= 1
    (copy / "f.bmp").write_bytes(whole)
    others.add(open_folder(copy).fingerprint)
    (copy / "f.bmp").unlink()
    others.add(open_folder(copy).fingerprint)
    assert len(others - {first}) == 5
    assert (
        data.open_source("digits", 16, 1).fingerprint
        == data.open_source("digits", 16, 1).fingerprint
    )
    assert (
        len({data.open_source("digits", size, c).fingerprint for size in (8, 16) for c in (1, 3)})
        == 4
    )


def test_exif_rotation_by_hand(tmp_path):
    upright = noise(8, 8, 3)
    exif = Image.Exif()
    # the camera was turned: the viewer has to turn the picture 90 degrees clockwise
    exif[decode.ORIENTATION] = 6
    stored = Image.fromarray(np.rot90(upright, 1).copy())
    found = decode_saved(stored, tmp_path / "a.png", exif=exif)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_what_pil_makes_of_it(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    Image.fromarray(noise(8, 8, 3)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode.decode_file(path, 8, 3).permute(1, 2, 0).numpy(), expected)


def test_a_broken_exif_block_is_passed_over(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(8, 8, 3)).save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    with Image.open(path) as image:
        expected = np.asarray(image)
    assert np.array_equal(decode.decode_file(path, 8, 3).permute(1, 2, 0).numpy(), expected)


def test_transparency_lies_over_the_matte_or_stays(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert flat(decode_saved(palette, tmp_path / "opaque.png", matte=GREEN)) == (10, 20, 30)
    assert flat(decode_saved(palette, tmp_path / "clear.png", matte=GREEN, transparency=1)) == GREEN
    assert flat(decode_saved(palette, tmp_path / "clear.gif", matte=GREEN, transparency=1)) == GREEN
    # a fifth
    half = decode_saved(palette, tmp_path / "half.png", matte=GREEN, transparency=bytes([0, 51]))
    assert flat(half) == (2, 208, 6)  # 0.2 of (10, 20, 30) + 0.8 of green
    assert flat(decode.decode_file(tmp_path / "half.png", 8, 4)) == (10, 20, 30, 51)
    assert flat(
        decode_saved(Image.new("LA", (8, 8), (100, 51)), tmp_path / "la.png", matte=RED)
    ) == (224, 20, 20)
    # Rec. 601 luma of that: 0.299 r + 0.587 g + ...
    assert flat(decode.decode_file(tmp_path / "la.png", 8, 1, RED)) == (81,)
    assert flat(decode.decode_file(tmp_path / "la.png", 8, 2, RED)) == (100, 51)
    assert (
        flat(
            decode_saved(
                Image.new("RGB", (8, 8), RED), tmp_path / "key.png", matte=GREEN, transparency=RED
            )
        )
        == GREEN
    )
    assert (
        flat(
            decode_saved(
                Image.new("L", (8, 8), 7), tmp_path / "grey.png", matte=GREEN, transparency=7
            )
        )
        == GREEN
    )
    assert (
        flat(
            decode_saved(
                Image.new("RGBA", (8, 8), (1, 2, 3, 0)),
                tmp_path / "a.webp",
                matte=RED,
                lossless=True,
            )
        )
        == RED
    )
    assert flat(
        decode_saved(Image.new("RGB", (8, 8), (1, 2, 3)), tmp_path / "b.bmp", channels=4)
    ) == (1, 2, 3, 255)


def test_resizing_does_not_bleed_hidden_colours(tmp_path):
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    # all red, but only the left half can be seen; the right half hides red at alpha 0
    pixels[..., 0] = 255
    pixels[:, :8, 3] = 255
    pixels[:, 8:, 0] = 0
    small = decode_saved(Image.fromarray(pixels), tmp_path / "a.png", channels=4)
    seen = small[3] > 0
    assert (small[0][seen] == 255).all()  # black, though half of the source, is nowhere to be seen


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array(
        [[0, 128, 129, 257 * 100, 257 * 100 + 128, 257 * 100 + 129, 65535, 65535]] * 8,
        dtype=np.uint16,
    )
    found = decode_saved(Image.fromarray(values), tmp_path / f"a.{suffix}", channels=1)
    assert (
        found[0, 0].tolist()
        == np.round(values[0] / 257).tolist()
        == [0, 0, 1, 100, 100, 101, 255, 255]
    )
    assert (
        decode_saved(Image.fromarray(values.astype(np.int32)), tmp_path / "i.tiff", channels=3)[
            2, 0
        ].tolist()[5]
        == 101
    )


def test_pixels_without_an_agreed_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="floating-point"):
        decode_saved(Image.fromarray(np.ones((8, 8), dtype=np.float32)), tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="32-bit"):
        decode_saved(Image.fromarray(np.full((8, 8), 70000, dtype=np.int32)), tmp_path / "i.tiff")


def test_cmyk_and_black_and_white(tmp_path):
    # magenta and yellow make red
    ink = decode_saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "ink.tiff")
    assert flat(ink) == RED
    assert flat(decode_saved(Image.new("1", (8, 8), 1), tmp_path / "bit.png")) == (255, 255, 255)
    # JPEG at default quality: a flat area is off by a few levels in each of the four inks.
    jpeg = decode_saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "ink.jpg")
    assert (jpeg.int() - torch.tensor(RED).view(3, 1, 1)).abs().max() <= 6


def test_only_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for suffix in ("gif", "webp", "tiff", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        found = decode_saved(
            frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options
        )
        assert flat(found) == RED


@pytest.mark.parametrize("height, width", [(64, 64), (64, 96), (128, 64)])
def test_resize_and_crop_are_torchvisions(tmp_path, height, width):
    pixels = noise(height, width, 3, low=64, high=192)
    found = decode_saved(Image.fromarray(pixels), tmp_path / "a.png", 16)
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    shapes = torchvision.transforms.functional
    whole = shapes.resize(
        torch.tensor(pixels).permute(2, 0, 1).float(), 16, bicubic, antialias=True
    )
    expected = shapes.center_crop(whole, [16, 16])
    # PIL rounds between its two passes (by 0.5, spread by weights whose absolute sum is at most
    # 1.25) and after (0.5).
    assert (found - expected).abs().max() <= 1.2


@pytest.mark.parametrize(
    "height, width, top, left", [(16, 21, 0, 2), (20, 16, 2, 0), (16, 16, 0, 0)]
)
def test_a_crop_alone_copies_pixels(tmp_path, height, width, top, left):
    pixels = noise(height, width, 3)
    found = decode_saved(Image.fromarray(pixels), tmp_path / "a.png", 16)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("image_size, edge", [(64, 427), (48, 399), (32, 425)])
def test_reduced_jpeg_decoding_hardly_changes_a_photo(name, image_size, edge):
    photo = Image.fromarray(load_sample_image(name)[:edge])
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=95)
    reduced = decode.decode_file(file, image_size, 3)
    with Image.open(file) as image:
        whole = decode.to_pixels(image, image_size, 3, decode.WHITE, image.size)
    error = (reduced.double() - whole.double()).square().mean()
    # Measured 44.6 to 52.2 dB. These odd heights end within a reduced pixel: taken for whole, the
    # shift leaves at most 40.6.
    assert 10 * torch.log10(255**2 / error) > 43


def write_mnist(root, count=6):
    """MNIST's four files as they lie on disk after unpacking."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = {"train": noise(count, 28, 28), "t10k": 255 - noise(count, 28, 28)}
    for part, values in pixels.items():
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + values.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + bytes(range(count))
        )
    return pixels


def test_torchvision_mnist_from_its_own_files(tmp_path):
    pixels = write_mnist(tmp_path)
    spec = f"torchvision(name='MNIST', root={str(tmp_path)!r}"
    train, test = (data.open_source(f"{spec}{more})", 28, 1) for more in ("", ", split='test'"))
    assert (
        train.labels == list(range(6))
        and train.classes[3] == "3 - three"
        and train.image_shape == (1, 28, 28)
    )
    for source, part in ((train, "train"), (test, "t10k")):
        assert np.array_equal(torch.cat([source[i] for i in range(6)]).numpy(), pixels[part])
    assert train.fingerprint != test.fingerprint
    assert train.notes == (
        "torchvision MNIST: 6 of 6 images kept",
        *data_folder.verdict(*data_folder.fitness(6)),
    )
    enlarged = data.open_source(f"{spec})", 32, 3)
    assert (
        enlarged[0].shape == (3, 32, 32) and "below 32 pixels and are enlarged" in enlarged.notes[1]
    )
    one = data.open_source(f"{spec}, only='2 - Two')", 28, 1)
    assert (
        len(one) == 1
        and one.labels == [0]
        and one.classes == ["2 - two"]
        and torch.equal(one[0], train[2])
    )


def test_torchvision_cifar10_from_its_own_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    values = noise(10, 3072)
    words = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    made = torchvision.datasets.CIFAR10
    for name, _ in made.train_list + made.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": values, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": words}))

    def signed(name):
        return [name, torchvision.datasets.utils.calculate_md5(folder / name)]

    monkeypatch.setattr(made, "train_list", [signed(name) for name, _ in made.train_list])
    monkeypatch.setattr(made, "test_list", [signed(name) for name, _ in made.test_list])
    monkeypatch.setattr(made, "meta", made.meta | {"md5": signed("batches.meta")[1]})
    source = data.open_source(f"torchvision(name='CIFAR10', root={str(tmp_path)!r})", 32, 3)
    assert len(source) == 50 and source.classes == words and source.labels == list(range(10)) * 5
    assert np.array_equal(source[7].numpy(), values[7].reshape(3, 32, 32))
    cats = data.open_source(
        f"torchvision(name='CIFAR10', root={str(tmp_path)!r}, only='cats')", 32, 3
    )
    assert (
        len(cats) == 5
        and cats.classes == ["cat"]
        and cats.labels == [0] * 5
        and torch.equal(cats[0], source[3])
    )
    with pytest.raises(ValueError, match="unknown class of CIFAR10 'lion'.*choose one of airplane"):
        data.open_source(
            f"torchvision(name='CIFAR10', root={str(tmp_path)!r}, only='lions')", 32, 3
        )


def test_torchvision_pets_restricted_to_cats(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    rows = [
        ("Bengal_1", 1, 1),
        ("beagle_1", 2, 2),
        ("Sphynx_1", 3, 1),
        ("Bengal_2", 1, 1),
        ("Sphynx_2", 3, 1),
    ]
    (base / "annotations" / "trainval.txt").write_text(
        "".join(f"{name} {breed} {kind} 1\n" for name, breed, kind in rows)
    )
    for k, (name, *_) in enumerate(rows):
        Image.new("RGB", (40, 20 if k == 4 else 40), (40 * k,) * 3).save(
            base / "images" / f"{name}.jpg"
        )
    spec = f"torchvision(name='OxfordIIITPet', root={str(tmp_path)!r}"
    everything = data.open_source(f"{spec})", 32, 3)
    assert everything.classes == ["Bengal", "Beagle", "Sphynx"] and everything.labels == [
        0,
        1,
        2,
        0,
    ]
    assert everything.notes[1] == "left out 1 too small: image 4"
    cats = data.open_source(f"{spec}, only='cats')", 32, 3)
    assert cats.classes == ["Bengal", "Sphynx"] and cats.labels == [0, 1, 0]
    assert [flat(pixels) for pixels in cats] == [(0,) * 3, (80,) * 3, (120,) * 3]
    (base / "images" / "Sphynx_1.jpg").unlink()
    sphynx = data.open_source(f"{spec}, only='sphynx')", 16, 3)
    # label unknown of what cannot be read
    assert sphynx.notes[1:] == tuple(data_folder.verdict(*data_folder.fitness(1)))


def test_every_torchvision_name_is_a_set_with_a_root_and_a_download():
    for name in torchvision_sets.FOLDERS:
        assert issubclass(getattr(torchvision.datasets, name), torchvision.datasets.VisionDataset)


@pytest.mark.parametrize(
    "name, place, host",
    [
        ("CIFAR10", "cifar-10-batches-py", "https://www.cs.toronto.edu/"),
        ("MNIST", "MNIST/raw", "https://ossci-datasets.s3"),
        ("DTD", "dtd", "https://www.robots.ox.ac.uk/"),
        ("CelebA", "celeba", "what https://docs.pytorch.org/vision/stable/generated/"),
    ],
)
def test_without_a_network_one_line_says_where_the_files_belong(
    tmp_path, monkeypatch, name, place, host
):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        ValueError,
        match=f"'{tmp_path}/{place}' and cannot be downloaded .*; download {host}.* there",
    ) as error:
        data.open_source(f"torchvision(name={name!r}, root={str(tmp_path)!r})", 32, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "n, fraction, held",
    [(100, 0.1, 10), (10, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2), (7, 0.0, 0), (1, 0.5, 0)],
)
def test_split_is_a_partition_with_both_sides_filled(n, fraction, held):
    train, validation = order.split(n, fraction, seed=3)
    assert len(validation) == held and train.dtype == validation.dtype == np.int64
    assert sorted([*train, *validation]) == list(range(n))
    again = order.split(n, fraction, seed=3)
    assert np.array_equal(train, again[0]) and np.array_equal(validation, again[1])


def test_split_depends_on_the_seed_and_refuses_nonsense():
    assert not np.array_equal(order.split(100, 0.1, 0)[1], order.split(100, 0.1, 1)[1])
    for fraction in (1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
            order.split(10, fraction, 0)


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_batches_walk_through_fresh_permutations(n, batch_size):
    epochs = 12 * batch_size // n + 1
    naive = np.concatenate([rng.permutation(5, "order", epoch, n) for epoch in range(epochs)])
    walked = np.concatenate([order.batch_indices(5, n, step, batch_size) for step in range(12)])
    assert walked.dtype == np.int64 and np.array_equal(walked, naive[: 12 * batch_size])
    for epoch in range(12 * batch_size // n):
        assert sorted(walked[epoch * n : (epoch + 1) * n]) == list(range(n))
    # any order of asking gives the same
    assert np.array_equal(
        order.batch_indices(5, n, 3, batch_size), naive[3 * batch_size : 4 * batch_size]
    )
    assert [order.order(5, n, position) for position in range(2 * n)] == naive[: 2 * n].tolist()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(order.batch_indices(seed, 50, epoch, 50)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


def test_flips_are_addresses():
    batch = torch.from_numpy(noise(64, 3, 4, 4))

    def flip(images, seed, step, places):
        return augment.flip(images, rng.uniform(seed, "flip", step, places) < 0.5)

    flipped = flip(batch, 1, 7, range(64))
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(flipped, batch, strict=True)])
    assert (
        torch.equal(flipped[mirrored], torch.flip(batch[mirrored], [3]))
        and flipped.dtype == torch.uint8
    )
    assert 16 <= mirrored.sum() <= 48  # 64 fair coins fall outside with probability 4e-5
    # micro-batches and ranks
    assert torch.equal(flip(batch[40:], 1, 7, range(40, 64)), flipped[40:])
    assert torch.equal(
        flip(common_pixels.encode(batch), 1, 7, range(64)), common_pixels.encode(flipped)
    )
    assert not torch.equal(flip(batch, 1, 8, range(64)), flipped)
    assert not torch.equal(flip(batch, 2, 7, range(64)), flipped)


def test_loader_gives_the_same_for_any_number_of_workers(zoo):
    source = open_folder(zoo)
    before = torch.get_rng_state()
    runs = []
    for workers in (0, 1, 2):
        batches = (order.batch_indices(0, len(source), step, 5) for step in itertools.count())
        running = loader.loader(source, batches, workers)
        runs.append([next(running) for _ in range(6)])
        running.close()
        assert not multiprocessing.active_children()
    for one, *others in zip(*runs, strict=True):
        assert (
            one[0].shape == (5, 3, 8, 8)
            and one[0].dtype == torch.uint8
            and one[1].tolist() == [-1] * 5
        )
        assert all(torch.equal(one[0], other[0]) for other in others)
    for step, (pixels, _) in enumerate(runs[0]):
        expected = [source[index] for index in order.batch_indices(0, len(source), step, 5)]
        assert torch.equal(pixels, torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_brings_labels_and_ends_with_its_batches():
    source = data.open_source("digits", 8, 1)
    ((first, labels), (second, _)) = loader.loader(source, [[5, 7, 5], np.array([3])])
    assert labels.dtype == torch.int64 and labels.tolist() == [source.labels[i] for i in (5, 7, 5)]
    assert torch.equal(first, torch.stack([source[5], source[7], source[5]])) and len(second) == 1


def test_workers_outlive_signals_to_the_whole_group():
    source = data.open_source("digits", 8, 1)
    expected = list(loader.loader(source, [[k, k + 1] for k in range(12)]))
    running = loader.loader(source, [[k, k + 1] for k in range(12)], 2)
    found = [next(running), next(running)]  # by now both workers have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    found += running
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))
    assert not multiprocessing.active_children()


def test_a_process_that_leaves_a_loader_standing_ends():
    code = (
        "from ddpm import data\nfrom ddpm.data import loader\nsource = "
        "data.open_source('digits', 8, 1)\n"
    )
    code += "running = loader.loader(source, ([k] for k in range(999)), 2)\nnext(running)\nraise SystemExit(9)\n"
    # It takes seconds, nearly all of them imports; workers without a stop request would hold it
    # for ever.
    ended = subprocess.run(
        [sys.executable, "-c", code], timeout=60, stderr=subprocess.PIPE, text=True
    )
    assert ended.returncode == 9 and ended.stderr == ""


def test_image_dataset_as_people_expect_one(zoo):
    dataset = data.ImageDataset(zoo, 8)
    assert (
        len(dataset) == 12 and dataset[0].shape == (3, 8, 8) and dataset[0].dtype == torch.float32
    )
    assert torch.equal(common_pixels.decode(dataset[3]), decode.decode_file(zoo / "d.png", 8, 3))
    torch.manual_seed(0)
    mirrored = data.ImageDataset(str(zoo), 8, augment=True)
    # one kind only: probability 2e-6
    seen = {tuple(mirrored[3].flatten().tolist()) for _ in range(20)}
    assert seen == {
        tuple(dataset[3].flatten().tolist()),
        tuple(dataset[3].flip(-1).flatten().tolist()),
    }
    assert data.ImageDataset("digits", 16)[0].shape == (3, 16, 16)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert batch.shape == (4, 3, 8, 8) and batch.min() >= -1 and batch.max() <= 1

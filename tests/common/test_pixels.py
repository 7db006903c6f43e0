"""The pixel codec and the file formats, read back with PIL, numpy and zipfile."""

import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageSequence

from ddpm.common import pixels as common_pixels
from ddpm.sampling import formats


def noise(count, channels, height=8, width=8):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != common_pixels.RECORD)


def batches(pixels, size=3):
    """As `draw` yields them: a lazy iterator of (seeds, uint8 [b, c, h, w]) with an odd last
    batch.
    """
    for start in range(0, len(pixels), size):
        yield list(range(start, min(start + size, len(pixels)))), pixels[start : start + size]


def test_every_pixel_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    encoded = common_pixels.encode(pixels)
    assert encoded.dtype == torch.float32 and encoded.min() == -1 and encoded.max() == 1
    assert torch.equal(common_pixels.decode(encoded), pixels)
    unit = common_pixels.denormalize(encoded.double())
    assert (
        unit.dtype == torch.float32
        and torch.allclose(unit, pixels / 255, rtol=0, atol=1e-7)
        and unit.max() == 1
    )


def test_decode_rounds_to_the_nearest_pixel_and_clamps():
    centres = np.arange(256) / 127.5 - 1
    for offset in (-0.49, 0.49):  # of a pixel's width: still the same pixel
        assert torch.equal(
            common_pixels.decode(torch.tensor(centres + offset / 127.5)),
            torch.arange(256, dtype=torch.uint8),
        )
    beyond = torch.tensor([-1e30, -2.0, 2.0, 1e30, float("-inf"), float("inf"), float("nan")])
    assert common_pixels.decode(beyond).tolist() == [0, 0, 255, 255, 0, 255, 0]


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (-3.5, 20)])
def test_floats_of_a_range_are_the_pixels_that_torchvision_saves(tmp_path, low, high):
    """Also in half precision, and where rounding has left the range by less than half a pixel's
    step.
    """
    given = torch.from_numpy(np.random.default_rng(1).uniform(low, high, (1, 3, 9, 7)))
    given[0, :, 0, 0] = low - 1e-4
    given[0, :, 0, 1] = high + 1e-4
    common_pixels.save_image_grid(given, tmp_path / "ours.png", value_range=(low, high))
    torchvision.utils.save_image(
        given, tmp_path / "theirs.png", padding=0, normalize=True, value_range=(low, high)
    )
    ours, theirs = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("ours", "theirs"))
    assert np.array_equal(ours[2:-2, 2:-2], theirs) and theirs.min() == 0 and theirs.max() == 255
    common_pixels.save_image_grid(
        common_pixels.denormalize(common_pixels.encode(noise(2, 3)).half()), tmp_path / "half.png"
    )


def test_floats_as_torchvision_takes_them_are_not_washed_out(tmp_path):
    given = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    common_pixels.save_image_grid(given, tmp_path / "grid.png", nrow=3)
    assert np.array_equal(
        np.array(Image.open(tmp_path / "grid.png"))[2:-2, 2:10], (given[0, 0] * 255).round().numpy()
    )


@pytest.mark.parametrize(
    "given, said",
    [
        (
            torch.linspace(-1, 1, 64),
            r"reach from -1 to 1 and cannot be in value_range=\(0, 1\); give their own, such as "
            r".*\(-1, 1",
        ),
        (torch.linspace(0, 255, 64), "reach from 0 to 255"),
        (torch.linspace(0, 1.3, 64), "denormalize"),
        (torch.full((64,), torch.nan), "reach from nan to nan"),
        (torch.arange(64), "images are torch.int64 .*give uint8 pixels"),
        (torch.zeros(64, dtype=torch.bool), "images are torch.bool"),
    ],
)
def test_what_cannot_be_of_the_range_is_one_line(tmp_path, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        common_pixels.save_image_grid(given.reshape(1, 1, 8, 8), tmp_path / "grid.png")
    assert "\n" not in str(caught.value) and not names(tmp_path)
    with pytest.raises(ValueError, match="give uint8 pixels, or floats and their range"):
        common_pixels.save_image_grid(
            torch.zeros(1, 1, 8, 8), tmp_path / "grid.png", value_range=(1, 1)
        )
    with pytest.raises(ValueError, match="images are torch.uint8; denormalize takes the floats"):
        common_pixels.denormalize(noise(1, 3))


def test_encode_refuses_what_are_no_pixels():
    with pytest.raises(AssertionError, match="uint8"):
        common_pixels.encode(torch.rand(3))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "count, nrow, columns, rows", [(1, None, 1, 1), (7, None, 3, 3), (7, 4, 4, 2), (3, 9, 3, 1)]
)
def test_grid_holds_every_image_at_its_place(channels, count, nrow, columns, rows):
    pixels = noise(count, channels, 5, 6)
    padding = 2
    grid = common_pixels.make_grid(pixels, nrow=nrow, padding=padding)
    assert grid.dtype == np.uint8 and grid.shape == (rows * 7 + 2, columns * 8 + 2, channels)
    covered = np.zeros(grid.shape[:2], dtype=bool)
    for k in range(count):
        top = padding + k // columns * 7
        left = padding + k % columns * 8
        place = (slice(top, top + 5), slice(left, left + 6))
        assert np.array_equal(grid[place], pixels[k].permute(1, 2, 0).numpy())
        covered[place] = True
    assert (grid[~covered] == common_pixels.WHITE).all()


def test_grid_without_images_is_refused():
    with pytest.raises(ValueError, match="a grid of 0 images"):
        common_pixels.make_grid(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="nrow=0"):
        common_pixels.make_grid(noise(2, 3), nrow=0)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_saved_grid_is_the_grid(tmp_path, channels, mode):
    pixels = noise(5, channels)
    path = tmp_path / "new" / "folder" / "grid.PNG"
    common_pixels.save_image_grid(pixels, path, nrow=2)
    common_pixels.save_image_grid(
        common_pixels.encode(pixels).requires_grad_(),
        tmp_path / "float.png",
        nrow=2,
        value_range=(-1, 1),
    )
    assert names(path.parent) == ["grid.PNG"]
    for saved in (path, tmp_path / "float.png"):
        with Image.open(saved) as image:
            assert image.format == "PNG" and image.mode == mode
            assert np.array_equal(
                np.array(image), common_pixels.make_grid(pixels, nrow=2).squeeze()
            )


@pytest.mark.parametrize(
    "suffix, kind", [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP"), (".png", "PNG")]
)
def test_suffix_picks_the_format(tmp_path, suffix, kind):
    common_pixels.save_image_grid(noise(4, 3), str(tmp_path / f"grid{suffix}"))
    with Image.open(tmp_path / f"grid{suffix}") as image:
        assert image.format == kind


def test_unknown_suffix_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"cannot save a picture as '.*grid.tiff'; use one of .*\.png, \.jpg"
    ) as error:
        common_pixels.save_image_grid(noise(4, 3), tmp_path / "grid.tiff")
    assert "\n" not in str(error.value) and not names(tmp_path)


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    for write in formats.FORMATS.values():
        with pytest.raises(ValueError, match="a file is in the way"):
            write(tmp_path / "taken", batches(noise(4, 3)))


@pytest.mark.parametrize("name", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lossless_files_hold_the_very_pixels(tmp_path, name, channels):
    pixels = noise(7, channels)
    paths = formats.FORMATS[name](tmp_path / "out", batches(pixels))
    assert (
        [path.name for path in paths]
        == names(tmp_path / "out")
        == [f"{k:06d}.{name}" for k in range(7)]
    )
    for path, expected in zip(paths, pixels, strict=True):
        with Image.open(path) as image:
            assert image.mode == {("png", 1): "L", ("png", 4): "RGBA", ("webp", 4): "RGBA"}.get(
                (name, channels), "RGB"
            )
            found = np.array(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(
                8, 8, channels
            )
        assert np.array_equal(found, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB")])
def test_jpg_is_near_and_lies_on_white(tmp_path, channels, mode):
    pixels = torch.full((2, channels, 16, 16), 90, dtype=torch.uint8)
    alpha = 255
    if channels in (2, 4):
        alpha = pixels[:, -1] = 51  # a fifth
    paths = formats.FORMATS["jpg"](tmp_path, batches(pixels))
    assert names(tmp_path) == ["000000.jpg", "000001.jpg"]
    expected = 90 * alpha / 255 + 255 * (1 - alpha / 255)
    with Image.open(paths[1]) as image:
        assert image.format == "JPEG" and image.mode == mode
        # A flat area has one DCT coefficient; at quality 95 it is kept to a level, colour
        # conversion rounds by another.
        assert np.abs(np.array(image).astype(float) - expected).max() <= 2


def test_files_are_named_by_seed_and_replace_older_ones(tmp_path):
    (tmp_path / "000040.png").write_text("old")
    (tmp_path / "000040.png.part").write_text("what a killed run left")
    first, second = formats.FORMATS["png"](tmp_path, [([1234567, 40], noise(2, 1))])
    assert names(tmp_path) == ["000040.png", "1234567.png"] and second.name == "000040.png"
    with Image.open(second) as image:
        assert np.array_equal(np.array(image), noise(2, 1)[1, 0].numpy())


def test_grid_format_is_one_picture_of_all(tmp_path):
    pixels = noise(7, 3)
    assert formats.FORMATS["grid"](tmp_path, batches(pixels)) == [tmp_path / "grid.png"]
    with Image.open(tmp_path / "grid.png") as image:
        assert np.array_equal(np.array(image), common_pixels.make_grid(pixels))


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_guided_diffusion_reads(tmp_path, channels):
    pixels = noise(7, channels, 4, 6)
    assert formats.FORMATS["npz"](tmp_path, batches(pixels)) == [tmp_path / "images.npz"]
    assert names(tmp_path) == ["images.npz"]
    with np.load(tmp_path / "images.npz") as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels.permute(0, 2, 3, 1).numpy())


def test_zip_holds_readable_pngs_and_is_the_same_twice(tmp_path):
    pixels = noise(7, 3)
    (path,) = formats.FORMATS["zip"](tmp_path / "a", batches(pixels))
    (again,) = formats.FORMATS["zip"](tmp_path / "b", batches(pixels, size=2))
    assert path == tmp_path / "a" / "images.zip" and path.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.namelist() == [
            f"{k:06d}.png" for k in range(7)
        ]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert all(info.external_attr >> 16 == 0o644 for info in archive.infolist())
        with archive.open("000006.png") as file, Image.open(file) as image:
            assert np.array_equal(np.array(image), pixels[6].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gif_has_a_frame_per_batch_and_holds_the_last(tmp_path, channels):
    steps = [torch.full((4, channels, 8, 8), 40 * k, dtype=torch.uint8) for k in range(6)]
    if channels == 4:
        for step in steps:
            step[:, 3] = 255
    (path,) = formats.FORMATS["gif"](tmp_path, ((list(range(4)), step) for step in steps))
    with Image.open(path) as image:
        assert image.n_frames == 6 and image.info["loop"] == 0
        frames = [
            (frame.convert("RGB"), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
    assert names(tmp_path) == ["trajectory.gif"]
    durations = [duration for _, duration in frames]
    assert durations[-1] == 2000 and set(durations[:-1]) == {200}
    for (frame, _), step in zip(frames, steps, strict=True):
        expected = np.repeat(
            common_pixels.make_grid(step)[..., :3], 3 if channels == 1 else 1, axis=2
        )
        # two colours a frame fit its palette exactly
        assert np.array_equal(np.array(frame), expected)


def test_many_frames_do_not_make_a_long_film(tmp_path):
    steps = [noise(1, 1) // 2 + k for k in range(100)]
    (path,) = formats.FORMATS["gif"](tmp_path, (([0], step) for step in steps))
    with Image.open(path) as image:
        assert image.n_frames == 100 and image.info["duration"] == 40  # ms: 4 s in all


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_an_interrupted_drawing_leaves_no_half_file(tmp_path, name):
    def interrupted():
        yield [0, 1], noise(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formats.FORMATS[name](tmp_path, interrupted())
    complete = ["000000", "000001"] if name in ("png", "jpg", "webp") else []
    assert names(tmp_path) == [f"{stem}.{name}" for stem in complete]


def test_a_full_disk_in_the_middle_of_a_file_leaves_nothing(tmp_path, monkeypatch):
    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    for name in ("png", "grid"):
        with pytest.raises(OSError, match="no space"):
            formats.FORMATS[name](tmp_path, batches(noise(2, 3)))
    assert names(tmp_path) == []

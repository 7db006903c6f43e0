"""The doctor on real files: each kind that it reports, its exit codes, and the same finding in a
training's log.
"""

import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from ddpm import data, doctor
from ddpm.data import decode, duplicates
from ddpm.data import source as data_source
from ddpm.data.contact_sheet import CELL, MARGIN, Cell, draw_sheet
from support.commands import outcome_of
from support.runs import run, tiny

ROOT = Path(__file__).parents[2]


def photo(number, size=(96, 72)):
    """A part of one of scikit-learn's two photographs, another for each number up to 59."""
    whole = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
    row, column = divmod(number // 2, 6)
    return whole.crop((column * 106, row * 85, column * 106 + 106, row * 85 + 80)).resize(size)


@pytest.fixture
def folder(tmp_path):
    """Sixteen photographs that are all different."""
    root = tmp_path / "cats"
    root.mkdir()
    for number in range(16):
        photo(number).save(root / f"{number:02}.png")
    return root


def report_on(root, size=32, fraction=0.1):
    return doctor.diagnose(root, size, fraction)


def test_every_kind_is_named(folder):
    one = photo(20)
    whole = (folder / "00.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.jpg").touch()
    (folder / "page.png").write_text("<html>404</html>")
    (folder / "header.png").write_bytes(whole[:12] + b"\xff" * 60 + whole[72:])
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.png"))
    (folder / "lost.gif").symlink_to(folder / "nowhere")
    (folder / "circle.bmp").symlink_to("circle.bmp")
    one.resize((40, 20)).save(folder / "tiny.webp")
    Image.fromarray(np.ones((50, 50), np.float32)).save(folder / "science.tif")
    Image.new("RGB", (50, 60), "navy").save(folder / "navy.jpg")
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    photo(21).save(folder / "turned.jpg", exif=exif)
    cut = photo(22).convert("RGBA")
    cut.putalpha(Image.linear_gradient("L").resize(cut.size))
    cut.save(folder / "cut.webp")
    opaque = photo(23).convert("RGBA")
    opaque.save(folder / "opaque.png")
    photo(24).convert("CMYK").save(folder / "print.jpg")
    photo(25).save(folder / "film.gif", save_all=True, append_images=[photo(26)])
    photo(27).save(folder / "really.jpg", "PNG")
    photo(28).save(folder / "depth.jpg", "MPO", save_all=True, append_images=[photo(29)])
    photo(30).save(folder / "unnamed", "JPEG")
    photo(31, (400, 50)).save(folder / "wide.tiff")
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    (folder / "new\nline \udcff\U0001f408.jpg").write_bytes(b"GIF89a")

    report = report_on(folder)
    assert report["left_out"] == {
        "too small": ["tiny.webp"],
        "empty": ["zero.jpg"],
        "not an image": ["page.png"],
        "truncated": ["torn.png"],
        "broken": ["header.png", "new\nline \udcff\U0001f408.jpg"],
        "unknown value range": ["science.tif"],
        "broken link": ["circle.bmp", "lost.gif"],
        "not a file": ["pipe.jpg", "socket.png"],
    }
    assert report["files"] == 36 and report["kept"] == 25
    expected = {
        "one_colour": ["navy.jpg"],
        "turned": ["turned.jpg"],
        "transparent": ["cut.webp"],
        "cmyk": ["print.jpg"],
        "animated": ["film.gif"],
        "misnamed": {"really.jpg": "PNG"},
        "without_suffix": {"unnamed": "JPEG"},
        "near_duplicates": [],
    }
    assert {key: report[key] for key in expected} == expected
    assert report["formats"] == {"PNG": 18, "JPEG": 4, "WEBP": 2, "GIF": 1, "TIFF": 1}
    assert next(iter(report["cropped_away"].items())) == ("wide.tiff", 1 - 50 / 400)
    assert report["shorter_side"] == {"least": 20, "median": 72, "most": 72}
    source = data.open_source(f"folder(path={str(folder)!r})", 32, 3)
    assert len(source) == report["kept"] and set(source.notes[1:9]) == {
        f"left out {len(names)} {fault}: {data_source.shorten(names, 9)}"
        for fault, names in report["left_out"].items()
    }
    assert all(
        "\n" not in line and line.isprintable()
        for line in doctor.report_lines(report)
        if line.strip("\n") == line
    )


def test_a_picture_is_in_the_one_row_that_says_what_to_do(folder):
    heif = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"
    for name in ("phone.heic", "renamed.jpg"):
        (folder / name).write_bytes(heif)
    photo(40).save(folder / "raw.dng", "TIFF")  # as cameras write them
    photo(41).save(folder / "unnamed", "JPEG")
    photo(42, (16, 12)).save(folder / "small.jpg", "PNG")
    (folder / "notes.txt").write_text("not an image")
    report = report_on(folder)
    rows = [
        line
        for line in doctor.report_lines(report)
        if not line.startswith(("look at: ", "not fit: "))
    ]
    names = {
        "phone.heic": "left out: HEIC",
        "renamed.jpg": "left out: HEIC",
        "raw.dng": "left out: camera raw",
        "unnamed": "no image suffix",
        "small.jpg": "left out: too small",
    }
    for name, row in names.items():
        (line,) = (line for line in rows if name in line)
        assert line.startswith(row), line
    assert "2: renamed.jpg, phone.heic (convert to JPEG or PNG)" in "\n".join(rows)
    assert [line.split("  ")[-1].strip() for line in rows if line.startswith("not read")] == [
        "1 .txt file"
    ]
    assert report["not_read"] == "1 .dng file, 1 .heic file, 1 .txt file, 1 file without a suffix"
    notes = data.open_source(f"folder(path={str(folder)!r})", 32, 3).notes
    # which a training does not open
    assert "not read: 1 .txt file, 1 file without a suffix" in notes
    (remark,) = (note for note in notes if note.startswith("3 images are in a format"))
    assert "2 HEIC, 1 camera raw" in remark


COPIES = {
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((3, 3, image.width - 3, image.height - 2)),
    "darker": lambda image: image.point(lambda value: int(value * 0.8 + 5)),
    "mirrored and cropped": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop(
        (2, 1, 94, 70)
    ),
}


def test_copies_are_found_and_other_images_are_not(folder):
    """Of sixteen photographs five copies each and one of the same bytes: all but a few, and no
    group of two photographs.
    """
    for number in range(28, 44):
        image = photo(number)
        image.save(folder / f"{number:02}.png")
        for name, change in COPIES.items():
            change(image).save(folder / f"{number:02} {name}.jpg", quality=50)
        shutil.copy(folder / f"{number:02}.png", folder / f"{number:02} again.png")
    groups = report_on(folder)["near_duplicates"]
    assert [group for group in groups if len({name[:2] for name in group}) > 1] == []
    # 98 % and more of each kind were found in 408 photographs
    assert sum(map(len, groups)) >= 0.97 * 16 * 7


def test_near_duplicates_of_many_are_found_without_comparing_all():
    """Twenty thousand directions, of which 500 have a copy at a cosine of 0.93: sorted into
    groups, hardly one is lost.
    """
    draw = np.random.default_rng(0)
    count = 20000
    units = draw.standard_normal((count, 2, 64))
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    other = draw.standard_normal((500, 64))
    other -= (other * units[:500, 0]).sum(1, keepdims=True) * units[:500, 0]
    units[500:1000, 0] = 0.93 * units[:500, 0] + (1 - 0.93**2) ** 0.5 * other / np.linalg.norm(
        other, axis=1, keepdims=True
    )
    found = {
        tuple(group) for group in duplicates.group_similar(np.round(127 * units).astype(np.int8))
    }
    assert len(found & {(k, k + 500) for k in range(500)}) >= 495 and len(found) <= 500
    assert duplicates.group_similar(np.zeros((0, 2, 64), np.int8)) == []


def test_a_training_says_what_the_doctor_says(folder, tmp_path):
    held_out = report_on(folder)["held_out"][0]
    # the last of all: the others keep their places
    shutil.copy(folder / held_out, folder / "zz.png")
    fraction = next(
        f for f in np.arange(0.05, 0.9, 0.02) if report_on(folder, fraction=f)["across"]
    )
    options = dict(
        data__source=f"folder(path={str(folder)!r})",
        data__channels=3,
        data__image_size=16,
        data__cache="none",
        data__validation_fraction=float(fraction),
        train__batch_size=4,
        train__length="1 steps",
    )
    assert run(tiny(evaluate__extractor="none", **options), tmp_path / "run")
    log = (tmp_path / "run" / "training.log").read_text()
    assert f"check with python -m ddpm.doctor {folder}: 2 in 1 group of near-duplicates" in log
    assert "1 held-out image has a near-duplicate that is learned from" in log


def test_the_command_and_its_exit_codes(folder, tmp_path):
    code, out, err = outcome_of("doctor", folder, "--image_size=64", "--out=out", cwd=tmp_path)
    assert code == 1 and not err and "16 of 16 images can be used at 64x64" in out
    assert "not fit: 16 images are too few" in out
    assert len(out.splitlines()) < 40 and max(map(len, out.splitlines())) < 200
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == 16 and report["formats"] == {"PNG": 16}
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 1000 and len(sheet.convert("RGB").getcolors(2**20)) > 1000
    config = f"--config={ROOT}/configs/cats128.py"
    (tmp_path / "README.md").touch()
    for words, message in (
        ([], "nothing given; write a folder of images"),
        (
            [folder, "--image_size=1000000"],
            "--image_size is '1000000'; it takes a whole number from 1 to 4096",
        ),
        ([folder, "--image_size=abc"], "--image_size is 'abc'; it takes a whole number from 1 to"),
        ([f"--config={ROOT}/configs/digits.py"], "the doctor looks at folders of files"),
        ([folder, "--out=README.md"], "cannot write to README.md: a file is in the way"),
        ([folder, "--out=README.md/out"], "cannot write to README.md/out: a file is in the way"),
        (
            ["none", "--out=made"],
            "none' does not exist; put images there, or give the path of a folder",
        ),
    ):
        code, out, err = outcome_of("doctor", *words, cwd=tmp_path)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "made").exists()
    shutil.copytree(folder, tmp_path / "data" / "cats")
    code, out, err = outcome_of("doctor", config, cwd=tmp_path)
    assert code == 1 and "left out: too small  16" in out


def test_a_white_picture_is_seen_on_a_sheet():
    white, (left, upper) = Image.new("RGB", (40, 20), "white"), (MARGIN, MARGIN + 30 + 44)
    page = draw_sheet("cats", [("of one colour", [Cell(white)])])
    cell = np.asarray(
        page.crop((left - 1, upper - 1, left + CELL + 1, upper + CELL + 1)).convert("L")
    )
    rows, columns = np.nonzero(cell < 255)
    # a line around twice as wide as it is high
    assert (np.ptp(rows), np.ptp(columns)) == (CELL // 2 + 1, CELL + 1)


def test_a_verdict_needs_what_it_says():
    fit = {
        "kept": 5000,
        "files": 5000,
        "left_out": {},
        "across": 0,
        "held_out": [],
        "near_duplicates": [],
        "one_colour": [],
        "without_suffix": {},
        "classes": {},
        "remarks": [],
    }
    assert doctor.verdict(fit) == {"not_fit": [], "warnings": []}
    assert (
        doctor.verdict(fit | {"kept": 299})["not_fit"]
        and doctor.verdict(fit | {"kept": 2999})["warnings"]
    )
    assert doctor.verdict(fit | {"left_out": {"truncated": ["x"] * 501}})["not_fit"]
    assert not doctor.verdict(fit | {"left_out": {"too small": ["x"] * 900}})["not_fit"]
    for doubt in (
        {"left_out": {"broken": ["x"]}},
        {"across": 1},
        {"near_duplicates": [["x", "y"]]},
        {"one_colour": ["x"]},
        {"without_suffix": {"x": "PNG"}},
        {"classes": {"cat": 11, "dog": 1}},
    ):
        assert (
            len(doctor.verdict(fit | doubt)["warnings"]) == 1
            and not doctor.verdict(fit | doubt)["not_fit"]
        )


def test_files_that_are_no_images_are_counted_by_what_they_are(tmp_path):
    """One of each kind, with one name in the doctor and the log; nothing is called damaged."""
    for number in range(31):
        photo(number).save(tmp_path / f"{number:02}.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere")
    line = (
        "look at: 3 files cannot be read as images (1 broken link, 1 empty, 1 not an image) and "
        "are left out"
    )
    assert line in doctor.report_lines(report_on(tmp_path))
    assert line in data.open_source(f"folder(path={str(tmp_path)!r})", 32, 3).notes
    Image.new("RGB", (50, 50), "navy").save(tmp_path / "navy.png")
    for text in (
        "1 image is of one colour and will lead to samples like it: remove it",
        "2 images are of one colour and will lead to samples like them: remove them",
    ):
        assert text in report_on(tmp_path)["warnings"]
        Image.new("RGB", (50, 50), "red").save(tmp_path / "red.png")


@pytest.mark.parametrize(
    "content", [{}, {"a.png": b"words", "b.jpg": b""}, {"notes.txt": b"words"}]
)
def test_a_folder_without_an_image_is_not_fit_and_has_a_sheet(content, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    report = report_on(tmp_path)
    said = "0 images are too few" if report["files"] else f"no image in {str(tmp_path)!r} (found "
    assert report["kept"] == 0 and said in report["not_fit"][0]
    assert len(lines := list(doctor.report_lines(report))) == 1 or report["files"], lines
    assert doctor.contact_sheet(report, decode.WHITE).width > 1000

"""Shards that MosaicML Streaming itself wrote, against the folder they were made of."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm import data
from ddpm.data import decode, loader, order
from ddpm.experiment import build, trainer
from ddpm.runtime import device
from ddpm.tracking.tracker import Tracker
from support.runs import rows, run, tiny

ROOT = Path(__file__).parents[2]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "ddpm.data.shards", raising=False)
    with pytest.raises(
        ValueError, match=re.escape("streaming is missing; pip install -e '.[streaming]'")
    ):
        data.open_source("streaming(path='shards')", 16)


WHY = (
    "mosaicml-streaming is an extra that holds numpy below 2.2 and huggingface_hub below 1: pip "
    "install -e '.[streaming]'"
)


@pytest.fixture
def streaming():
    return pytest.importorskip("streaming", reason=WHY)


@pytest.fixture
def photos(tmp_path):
    """Fifty photos in two folders: JPEG, one of them to be turned, and PNG."""
    rng = np.random.default_rng(0)
    for number in range(50):
        folder = tmp_path / "photos" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (160, 120), Image.NEAREST
        )
        exif = image.getexif()
        exif[0x0112] = 6 if number == 7 else 1
        image.save(folder / f"{number:02}.{'png' if number % 5 == 0 else 'jpg'}", exif=exif)
    return tmp_path / "photos"


def write(streaming, photos, out, **options):
    """What docs/data.md says, with small shards."""
    files = sorted(path for path in photos.rglob("*.*"))
    with streaming.MDSWriter(
        out=str(out), columns={"image": "bytes", "label": "str"}, size_limit=20_000, **options
    ) as writer:
        for file in files:
            writer.write({"image": file.read_bytes(), "label": file.parent.name})
    return out


def opened(options, size=16, channels=3):
    return data.open_source(f"streaming({options})", size, channels)


def folder_of(photos, size=16, channels=3):
    return data.open_source(f"folder(path={str(photos)!r})", size, channels)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_hold_the_images_of_the_folder_in_any_order(
    streaming, photos, tmp_path, compression
):
    out = write(streaming, photos, tmp_path / "shards", compression=compression, hashes=["sha1"])
    for size, channels in ((16, 3), (40, 1)):
        found = opened(f"path={str(out)!r}, label='label'", size, channels)
        expected = folder_of(photos, size, channels)
        assert len(found) == 50 and found.image_shape == expected.image_shape
        assert (found.labels, found.classes) == (expected.labels, expected.classes)
        for index in np.random.default_rng(1).permutation(50):
            assert torch.equal(found[index], expected[index])
    assert (
        "50 images in" in found.notes[0]
        and int(re.search(r"in (\d+) shards", found.notes[0])[1]) > 4
    )
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.batch([49, 0]), expected.batch([49, 0]))
    batches = [[3, 1], [49, 20], [7, 7]]
    for workers in (0, 2):
        for (pixels, labels), batch in zip(
            loader.loader(found, batches, workers), batches, strict=True
        ):
            assert torch.equal(pixels, expected.batch(batch)) and labels.tolist() == [
                expected.labels[k] for k in batch
            ]


def test_the_document_writes_shards_that_can_be_read(streaming, photos, tmp_path, monkeypatch):
    document = (ROOT / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*MDSWriter[^`]*)```", document)
    (tmp_path / "data").mkdir()
    photos.rename(tmp_path / "data" / "cats")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    jpegs = sorted(Path("data/cats").rglob("*.jpg"))
    found = opened("path='shards', label='label'")
    assert len(found) == len(jpegs) == 40 and found.classes == ["cat", "dog"]
    assert torch.equal(found[39], decode.decode_file(jpegs[39], 16, 3))


def test_fingerprints_are_of_content_and_treatment(streaming, photos, tmp_path):
    one = opened(f"path={str(write(streaming, photos, tmp_path / 'one', hashes=['sha1']))!r}")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert (
        opened(f"path={str(tmp_path / 'two')!r}").fingerprint == one.fingerprint
        and one.labels is None
    )
    assert opened(f"path={str(tmp_path / 'two')!r}", 8).fingerprint != one.fingerprint
    first = next(photos.rglob("*.png"))
    pixels = 255 - np.asarray(Image.open(first))
    Image.fromarray(pixels).save(first)
    three = write(streaming, photos, tmp_path / "three", hashes=["sha1"])
    assert opened(f"path={str(three)!r}").fingerprint != one.fingerprint


def test_columns_may_hold_images_in_other_ways(streaming, photos, tmp_path):
    images = [Image.open(path) for path in sorted(photos.rglob("*.jpg"))[:6]]
    columns = {
        "a": "pil",
        "b": "jpeg",
        "c": "png",
        "d": "ndarray",
        "e": "ndarray:uint8:120,160,3",
        "y": "int",
        "z": "int32",
    }
    with streaming.MDSWriter(out=str(tmp_path / "shards"), columns=columns) as writer:
        for number, image in enumerate(images):
            array = np.asarray(image)
            writer.write(
                {
                    "a": image,
                    "b": image,
                    "c": Image.fromarray(array),
                    "d": array,
                    "e": array,
                    "y": number,
                    "z": number % 2,
                }
            )
    expected = []
    for image in images:
        content = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(content, "png")
        expected.append(decode.decode_file(content, 40, 3))
    for column in "acde":
        found = opened(f"path={str(tmp_path / 'shards')!r}, image={column!r}, label='z'", 40)
        assert all(torch.equal(one, found[k]) for k, one in enumerate(expected))
        assert found.labels == [0, 1, 0, 1, 0, 1] and found.classes == ["0", "1"]
    files = [decode.decode_file(image.filename, 40, 3) for image in images]
    # JPEG, reduced while decoding as from a file
    found = opened(f"path={str(tmp_path / 'shards')!r}, image='b'", 40)
    assert all(torch.equal(one, found[k]) for k, one in enumerate(files))
    for options, message in (
        ("image='y'", "column 'y' of sample 0 .* is not a readable image"),
        ("image='x'", "have no column 'x'"),
        ("image='a', label='label'", "no column 'label'.* of a, b, c, d, e, y, z"),
        ("image='a', label='b'", "column 'b' holds no labels"),
        ("", "no column 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(f"path={str(tmp_path / 'shards')!r}{', ' if options else ''}{options}")


def test_shards_come_from_elsewhere_and_go_again(streaming, photos, tmp_path):
    for compression in (None, "zstd"):
        out = write(
            streaming,
            photos,
            tmp_path / f"remote {compression}",
            compression=compression,
            hashes=["xxh64"],
        )
        expected = folder_of(photos)
        there = tmp_path / f"here {compression}"
        found = opened(f"path={str(there)!r}, remote={str(out)!r}")
        count = len(list(out.glob("shard*")))
        assert count > 4 and len(list(there.glob("shard*"))) == 1  # the first, to look at
        assert all(torch.equal(found[index], expected[index]) for index in (49, 0, 20))
        assert 2 <= len(list(there.glob("shard*"))) <= 3
        most = 170_000  # of more than that
        assert (
            sum(
                shard["raw_data"]["bytes"]
                for shard in json.loads((out / "index.json").read_text())["shards"]
            )
            > 1.2 * most
        )
        tight = opened(f"path={str(there)!r}, remote={str(out)!r}, cache_limit='{most}'")
        for index in np.random.default_rng(2).permutation(50):
            assert torch.equal(tight[index], expected[index])
            assert sum(shard.stat().st_size for shard in there.glob("shard*")) <= most
        assert len(list(there.glob("shard*"))) < count
        assert len(list(out.glob("shard*"))) == count
    for options, message in (
        (f"remote={str(out)!r}, cache_limit='much'", "cannot read cache_limit='much'"),
        (f"remote={str(out)!r}, cache_limit='30kb'", "below four shards"),
        ("cache_limit='1gb'", "only copy"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(f"path={str(there)!r}, {options}")


READER = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + '/..']
from test_shards import opened
import numpy as np
found = opened({options!r})
print(sum(int(found[index].sum()) for index in np.random.default_rng({seed}).permutation(50)))
"""


def test_processes_share_a_folder_and_may_be_killed_in_it(streaming, photos, tmp_path):
    out = write(streaming, photos, tmp_path / "remote", compression="zstd")
    there = tmp_path / "here"
    expected = sum(int(folder_of(photos)[index].sum()) for index in range(50))

    def reader(seed):
        options = f"path={str(there)!r}, remote={str(out)!r}, cache_limit='170000'"
        code = READER.format(tests=os.path.dirname(__file__), options=options, seed=seed)
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    first, *others = [reader(seed) for seed in range(3)]
    while not there.exists() and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert [int(process.communicate(timeout=300)[0]) for process in others] == [expected] * 2


def test_what_is_no_set_or_damaged_is_said_on_one_line(streaming, photos, tmp_path):
    out = write(streaming, photos, tmp_path / "shards", hashes=["sha1"])

    def refused(options):
        with pytest.raises(ValueError) as caught:
            found = opened(options)
            [found[index] for index in range(50)]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no" in refused(f"path={str(photos)!r}") and "there is no" in refused(
        "path='nowhere'"
    )
    assert "cannot read shards from" in refused(
        f"path={str(tmp_path / 'a')!r}, remote={str(photos)!r}"
    )
    assert "cannot read shards from" in refused(
        f"path={str(tmp_path / 'b')!r}, remote='ftp://nobody/knows'"
    )
    shard = sorted(out.glob("shard*"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "Checksum failure" in refused(f"path={str(tmp_path / 'c')!r}, remote={str(out)!r}")
    assert not (tmp_path / "c" / shard.name).exists()  # or it would be taken next time
    shard.write_bytes(content[: len(content) // 2])
    refused(f"path={str(out)!r}")
    shard.unlink()
    assert "cannot get shard.00002.mds" in refused(f"path={str(out)!r}")
    index = json.loads((out / "index.json").read_text())
    for wrong in (
        "{",
        "[]",
        json.dumps(index | {"version": 9}),
        json.dumps(index | {"shards": []}),
        json.dumps(index | {"shards": [index["shards"][0] | {"column_encodings": ["pkl", "str"]}]}),
    ):
        (out / "index.json").write_text(wrong)
        assert "cannot read shards from" in refused(f"path={str(out)!r}")
    index["shards"][1]["raw_data"]["basename"] = "../../outside.mds"
    (out / "index.json").write_text(json.dumps(index))
    assert "outside of the folder" in refused(f"path={str(out)!r}")


def test_a_training_on_shards_goes_on_to_the_bit(streaming, photos, tmp_path):
    out = write(streaming, photos, tmp_path / "remote", compression="zstd", hashes=["sha1"])

    def given(where, length="9 steps", **options):
        source = (
            f"streaming(path={str(tmp_path / where)!r}, remote={str(out)!r}, label='label', "
            "cache_limit='170000')"
        )
        return tiny(
            data__source=source,
            data__channels=3,
            data__image_size=16,
            data__class_labels=True,
            train__length=length,
            evaluate__extractor="none",
            **options,
        )

    assert run(given("whole"), tmp_path / "run-whole")
    assert run(given("parts", "4 steps", data__num_workers=2), tmp_path / "run-parts")
    assert run(given("parts"), tmp_path / "run-parts")
    whole, parts = (
        load_file(tmp_path / run / "final.safetensors") for run in ("run-whole", "run-parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    last = [rows(tmp_path / run)[-1] for run in ("run-whole", "run-parts")]
    assert last[0] == last[1]

    made = trainer.build_trainer(
        given("whole"), tmp_path / "run-new", device.start("off", False), tracker=Tracker()
    )
    images, labels = next(iter(made.batches(0)))
    expected = folder_of(photos)
    learned, _ = build.split(given("whole"), expected)
    indices = learned[order.batch_indices(given("whole").seed, len(learned), 0, 8)]
    assert torch.equal(images, expected.batch(indices)) and labels.tolist() == [
        expected.labels[k] for k in indices
    ]


def test_a_cache_is_made_where_it_is_asked_for(streaming, photos, tmp_path):
    source = f"streaming(path={str(write(streaming, photos, tmp_path / 'shards'))!r})"
    options = dict(data__source=source, data__channels=3, data__image_size=16)
    assert not build.dataset(tiny(**options)).in_memory
    cached = build.dataset(tiny(**options, data__cache=str(tmp_path / "cache")))
    assert cached.in_memory and torch.equal(cached.batch([3, 40]), folder_of(photos).batch([3, 40]))

"""Files of weights: what older versions and other programs wrote is read, and what may be deleted is named.

Damage, hostile files, kills and full disks are faults of experiments/reliability
(tests/test_reliability.py).
"""

import json
import re
import zipfile

import pytest
import torch
from safetensors.torch import save

from ddpm.common import safe_load
from ddpm.config import files as config_files
from ddpm.experiment import build
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from support.runs import equal, tiny

WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(2),
    "c": torch.tensor([True, False]),
    "d": torch.zeros(0, 3),
    "e": torch.tensor([1.5, -2.0]).half(),
    "f": torch.ones(3).bfloat16(),
}


def test_weights_without_a_checksum_are_read(tmp_path):
    about = {"format": 1, "step": 7, "config": config_files.to_json(tiny())}
    (tmp_path / "old.safetensors").write_bytes(save(WEIGHTS, {"ddpm": json.dumps(about)}))
    training_weights.export(tmp_path / "new.safetensors", WEIGHTS, 7, about["config"])
    for name in ("old", "new"):
        found, tensors = training_weights.exported(tmp_path / f"{name}.safetensors")
        assert found == about and equal(tensors, WEIGHTS)
    with pytest.raises(safe_load.CorruptFile, match="does not fit its checksum"):
        (tmp_path / "old.safetensors").write_bytes(
            save(WEIGHTS, {"ddpm": json.dumps(about | {"crc32": 1})})
        )
        training_weights.exported(tmp_path / "old.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_read(tmp_path, zipped):
    """The older one has no checksums; published weights still come in it."""
    content = {
        "weights": WEIGHTS,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "rest": [1, (2.5, "word"), None, True],
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    assert equal(safe_load.read(tmp_path / "file.pt"), content)
    torch.save([torch.optim.SGD], tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match="holds more than tensors, numbers and words: 'torch.optim.sgd SGD'"
    ):
        safe_load.read(tmp_path / "file.pt")


def test_data_are_compared_without_reading_the_weights(tmp_path):
    """A damaged byte of a tensor is not seen, as it is not read; one of the words is, and then
    an older checkpoint counts.
    """
    given = tiny()
    digits = build.dataset(given)
    weights = torch.arange(2.0**20)
    for step, count in ((1, 5), (2, 7)):
        data = build.same_data(given, digits).state_dict() | {"images": count}
        checkpoint.save(
            tmp_path,
            step,
            config_files.to_json(given),
            {"data": data, "net": {"w": weights}},
        )

    def damaged(record):
        path = checkpoint.checkpoints(tmp_path)[-1][1]
        with zipfile.ZipFile(path) as archive:
            (info,) = (one for one in archive.infolist() if one.filename.endswith(record))
        content = bytearray(path.read_bytes())
        content[info.header_offset + len(info.FileHeader()) + info.file_size // 2] ^= 1
        path.write_bytes(content)

    def words():
        (note,) = build.other_data(given, digits, tmp_path)
        return note.rpartition("in digits; ")[2]

    assert words() == "images were 7, are 1797"
    damaged("/data/0")
    assert words() == "images were 7, are 1797"
    with pytest.raises(safe_load.CorruptFile, match="/data/0 does not fit its checksum"):
        checkpoint.load(checkpoint.checkpoints(tmp_path)[-1][1])
    damaged("/data.pkl")
    assert words() == "images were 5, are 1797"


def test_a_run_folder_is_drawn_from_by_its_newest_whole_file(tmp_path, capsys):
    for step in (1, 2, 3):
        checkpoint.save(
            tmp_path, step, "{}", {"ema": {"shadow": {"a": torch.tensor(step)}}}, keep=3
        )
    final, (*_, (_, second), (_, third)) = (
        tmp_path / "final.safetensors",
        checkpoint.checkpoints(tmp_path),
    )
    training_weights.export(final, {"a": torch.tensor(3)}, 3, "{}")
    assert training_weights.load_weights(tmp_path)[:2] == (final, 3) and not capsys.readouterr().err
    whole = final.read_bytes()
    final.write_bytes(whole[:-1] + b"\1")
    assert training_weights.load_weights(tmp_path)[:2] == (third, 3)
    assert capsys.readouterr().err == (
        f"{final} is damaged (it does not fit its checksum); step_00000003.pt, of step 3, takes "
        "its place\n"
    )
    final.write_bytes(whole[:-1])
    third.write_bytes(third.read_bytes()[:-100])
    assert training_weights.load_weights(tmp_path)[:2] == (second, 2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[1].startswith(
        f"{third} is damaged (the list of records at its end is incomplete); "
    )
    files = sorted(path.name for path in tmp_path.rglob("*"))
    for _, path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"words")
    for given, said in (
        (tmp_path, f"all checkpoints in {tmp_path} are damaged, such as final.safetensors"),
        (third, f"{third} .*damaged"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            training_weights.load_weights(given)
    # of before the run was prolonged
    training_weights.export(final, {"a": torch.tensor(1)}, 1, "{}")
    assert (
        training_weights.load_weights(tmp_path)[:2] == (final, 1)
        and len(capsys.readouterr().err.splitlines()) == 2
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == files


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "its end is missing, or torch did not write it"),
        (b"words", "its end is missing, or torch did not write it"),
        (b"PK\3\4" + bytes(99), "the list of records at its end is incomplete"),
        (None, "it is a zip file that torch did not write"),
    ],
)
def test_damage_is_said_in_plain_words(content, said, tmp_path):
    if content is None:
        with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
            archive.writestr("arr_0.npy", b"numbers")
    else:
        (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(safe_load.CorruptFile, match=re.escape(f"({said})")):
        checkpoint.load(tmp_path / "file.pt")


def test_what_may_go_is_told(tmp_path):
    assert checkpoint.reclaimable(tmp_path) == ""
    states = {"net": WEIGHTS}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, "{}", states, milestone=True)
        if step == 2:
            assert (
                checkpoint.reclaimable(tmp_path) == "1 milestone, checkpoints/*.keep.pt (0.0 MiB)"
            )
    training_weights.save_snapshot(tmp_path, 3, "{}", {"ema 0.1": WEIGHTS})
    assert checkpoint.reclaimable(tmp_path).startswith(
        "2 milestones, checkpoints/*.keep.pt (0.0 MiB), 1 snapshot, snapshots/* ("
    )
    newest = checkpoint.checkpoints(tmp_path)[-1][1]
    for number in ("", "2"):
        newest.write_bytes(b"PK\3\4 torn")
        with pytest.raises(safe_load.CorruptFile) as caught:
            checkpoint.load(newest)
        assert checkpoint.quarantine(caught.value) == newest.with_name(
            f"step_00000003.keep.pt.damaged{number}"
        )
    assert checkpoint.newest(tmp_path)[0][
        "step"
    ] == 2 and "2 damaged files" in checkpoint.reclaimable(tmp_path)

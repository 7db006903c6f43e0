"""Files of weights: what older versions and other programs wrote is read, and what may go is told.

Damage, hostile files, kills and full disks are faults of experiments/reliability (tests/test_reliability.py).
"""

import json

import pytest
import torch
from conftest import tiny
from safetensors.torch import save
from test_train import equal

from ddpm import checkpoint, config

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2), "c": torch.tensor([True, False]), "d": torch.zeros(0, 3),
           "e": torch.tensor([1.5, -2.0]).half(), "f": torch.ones(3).bfloat16()}


class State(dict):
    def state_dict(self):
        return dict(self)


def test_weights_without_a_checksum_are_read(tmp_path):
    about = {"format": 1, "step": 7, "config": config.to_json(tiny())}
    (tmp_path / "old.safetensors").write_bytes(save(WEIGHTS, {"ddpm": json.dumps(about)}))
    checkpoint.export(tmp_path / "new.safetensors", WEIGHTS, 7, about["config"])
    for name in ("old", "new"):
        found, tensors = checkpoint.exported(tmp_path / f"{name}.safetensors")
        assert found == about and equal(tensors, WEIGHTS)
    with pytest.raises(checkpoint.Damaged, match="does not fit its checksum"):
        (tmp_path / "old.safetensors").write_bytes(save(WEIGHTS, {"ddpm": json.dumps(about | {"crc32": 1})}))
        checkpoint.exported(tmp_path / "old.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_read(tmp_path, zipped):
    """The older one has no checksums; published weights still come in it."""
    content = {"weights": WEIGHTS, "parameter": torch.nn.Parameter(torch.ones(2)), "rest": [1, (2.5, "word"), None, True]}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    assert equal(checkpoint.read(tmp_path / "file.pt"), content)
    torch.save([torch.optim.SGD], tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds more than tensors, numbers and words: 'torch.optim.sgd SGD'"):
        checkpoint.read(tmp_path / "file.pt")


def test_what_may_go_is_told(tmp_path):
    assert checkpoint.spare(tmp_path) == ""
    parts = {"net": State(WEIGHTS)}
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, "{}", parts, milestone=True)
    checkpoint.save_snapshot(tmp_path, 3, "{}", {"ema 0.1": WEIGHTS})
    assert checkpoint.spare(tmp_path).startswith("2 milestones, checkpoints/*.keep.pt (0.0 MiB), 1 snapshots/ (")
    newest = checkpoint.checkpoints(tmp_path)[-1][1]
    for number in ("", "2"):
        newest.write_bytes(b"PK\3\4 torn")
        with pytest.raises(checkpoint.Damaged) as caught:
            checkpoint.load(newest)
        assert checkpoint.set_aside(caught.value) == newest.with_name(f"step_00000003.keep.pt.damaged{number}")
    assert checkpoint.newest(tmp_path)[0]["step"] == 2 and "2 damaged files" in checkpoint.spare(tmp_path)

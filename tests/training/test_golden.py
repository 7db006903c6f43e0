"""The committed loss curve of a tiny run: a change that should not alter numbers does not.

`python tests/training/test_golden.py` writes it anew; the commit then says why it changed.
"""

import json
import sys
import tempfile
from pathlib import Path

from support.runs import rows, run, tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "digits_tiny.json"
KEYS = ("train/loss", "train/grad_norm", "val/loss", "val/loss_ema")

# Other processors and versions of torch sum in another order; rounding of 1e-7 grows over 40 steps
# of Adam. A wrong constant, a shifted index or another draw moves the curve by more than 1 %.
TOLERANCE = 2e-3


def curve(folder):
    """Loss, gradient norm and validation loss of 40 steps."""
    run(
        tiny(
            train__length="40 steps",
            every__log="1 steps",
            every__validate="10 steps",
            every__sample="0 steps",
            data__flip=True,
            model__dropout=0.1,
        ),
        folder,
    )
    return {key: [row[key] for row in rows(folder) if key in row] for key in KEYS}


def test_the_loss_curve_is_the_committed_one(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    now = curve(tmp_path)
    for key in KEYS:
        assert len(now[key]) == len(golden[key])
        worst = max(abs(a - b) / abs(b) for a, b in zip(now[key], golden[key], strict=True))
        assert worst < TOLERANCE, f"{key} differs by {worst:.1e}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve(Path(folder)), indent=1) + "\n")
        sys.stdout.write(f"wrote {GOLDEN}\n")

"""Commands and the Python functions behind them: the same options, progress from the start, and
Ctrl-C with one line.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from io import BytesIO
from pathlib import Path

import matplotlib
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from ddpm import convert, doctor
from ddpm.common import files, pixels, progress
from ddpm.common.registry import quantity
from ddpm.config import defaults
from ddpm.config import files as config_files
from ddpm.data import contact_sheet, source
from ddpm.evaluate import evaluate
from ddpm.generate import edit_images, generate_images, wrote
from ddpm.main import train_experiment
from ddpm.sample import sample_from_checkpoint
from ddpm.training import checkpoint
from support.commands import python
from support.documents import DOCUMENTS, commands
from support.runs import run, tiny

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "main",
    "generate",
    "sample",
    "evaluate",
    "plan",
    "doctor",
    "convert",
    "compare",
    "dashboard",
    "sweep",
)
TOGETHER = """
import json, os, runpy, sys, tempfile
import ddpm.experiment.trainer, ddpm.studies.archive, matplotlib.figure  # which the commands share
said = []
for name, *words in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.argv = [f"ddpm/{name}.py", *words]
            code = 99
            try:
                runpy.run_module(f"ddpm.{name}", run_name="__main__", alter_sys=True)
            except SystemExit as leaving:
                code = leaving.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        said.append([code, file.read()])
print(json.dumps(said))
"""
IMPATIENT = """
import runpy, sys
from ddpm.common import progress
progress.SECONDS = 0.3
sys.argv[:] = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which runs/ holds a run of 1000 timesteps that knows the classes of the
    digits.
    """
    folder = tmp_path_factory.mktemp("place")
    run(
        tiny(diffusion__timesteps=1000, data__class_labels=True, train__length="2 steps"),
        folder / "runs" / "mine",
    )
    return folder


@pytest.fixture
def mine(place, monkeypatch):
    monkeypatch.chdir(place)
    return place / "runs" / "mine"


@pytest.fixture(scope="module")
def answers(place, tmp_path_factory):
    """{command line: (exit code, output)}, and the folder they ran in: in forks of one process,
    which imports torch for all.
    """
    cwd = tmp_path_factory.mktemp("cwd")
    at = f"--checkpoint={place}/runs/mine"
    lines = [[name, "--help"] for name in COMMANDS] + [
        ["evaluate", "--helpfull"],
        ["main", f"--config={ROOT}/configs/digits.py", "--config.seed=5", "--print_config"],
        ["generate", at, *ASKED, "--out=command"],
        ["sample", at, *ASKED, "--out=q.png"],
        *([name, at, *words] for (name, *words), _ in MESSAGES),
    ]
    words = [python(), "-c", TOGETHER, json.dumps(lines)]
    done = subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = [
        " ".join(word for word in line if not word.startswith("--checkpoint")) for line in lines
    ]
    return dict(zip(keys, json.loads(done.stdout), strict=True)), cwd


def bytes_of(paths):
    return [path.read_bytes() for path in paths]


ASKED = [
    "--seed=7",
    "--steps=4",
    "--sampler=ddpm",
    "--spacing=trailing",
    "--guidance=2",
    "--classes=3,5",
    "--guidance_interval=0.2,5",
    "--num_images=3",
]
MESSAGES = [
    (
        ["generate", "--classes=Wald", "--out=x"],
        "--classes: unknown class 'Wald'; choose one of 0, 1",
    ),
    (["generate", "--steps=2000", "--out=x"], "--steps is 2000 with only 1000 timesteps"),
    (["sample", "--guidance=-1", "--out=x.png"], "--guidance is -1.0; it must lie between"),
    (["evaluate", "--steps=2000"], "--steps is 2000 with only 1000 timesteps"),
    (
        ["evaluate", "--config.evaluate.steps=2000"],
        "config.evaluate.steps is 2000 with only 1000 timesteps",
    ),
    (["evaluate", "--num_samples=2"], "--num_samples is 2; it takes 4"),
    (
        ["generate", "--config.sample.steps=2", "--out=x"],
        "this command takes no --config.sample.steps; write --steps=",
    ),
    (
        ["sample", "--config.seed=2", "--out=x.png"],
        "this command takes no --config.seed; --help shows the flags that it has",
    ),
]


def test_an_argument_of_a_function_is_the_flag_of_that_name(answers, mine, tmp_path):
    asked = dict(
        seed=7,
        steps=4,
        sampler="ddpm",
        spacing="trailing",
        guidance=2,
        classes=[3, "5"],
        guidance_interval=(0.2, 5),
    )
    ours = generate_images(mine, 3, tmp_path / "ours", **asked)
    full = {
        f"sample.{name}": value
        for name, value in asked.items()
        if not isinstance(value, (list, tuple))
    }
    again = generate_images(
        mine, 3, tmp_path / "full", classes="3,5", guidance_interval="0.2,5", **full
    )
    said, cwd = answers
    (code, said), (sampled, _) = (
        said[" ".join([name, *ASKED, out])]
        for name, out in (("generate", "--out=command"), ("sample", "--out=q.png"))
    )
    assert code == sampled == 0, said
    assert said.endswith("wrote 3 images, command/000000.png ... 000002.png\n")
    assert bytes_of(ours) == bytes_of(again) == bytes_of(sorted((cwd / "command").glob("*.png")))
    assert (
        "seed 7, guidance 2.0 in sigma/alpha 0.2 to 5.0, classes 3, 5; 7 network evaluations an "
        "image" in said
    )
    for name, other in dict(
        seed=8, steps=5, sampler="ddim", spacing="linear", guidance=3, classes=[4, 5]
    ).items():
        assert bytes_of(
            generate_images(mine, 1, tmp_path / "x", **asked | {name: other})
        ) != bytes_of(ours[:1]), name
    (grid,) = generate_images(mine, 3, tmp_path / "g.png", format="grid", **asked)
    (quick,) = sample_from_checkpoint(mine, tmp_path / "s.png", num_samples=3, **asked)
    assert [grid, quick] == [tmp_path / "g.png", tmp_path / "s.png"]
    assert bytes_of([grid, quick, cwd / "q.png"]) == [quick.read_bytes()] * 3
    again = edit_images(
        mine, "sdedit(strength=1.0)", ours[0], output_dir=tmp_path / "edit", num_samples=1, **asked
    )
    assert [path.name for path in again] == ["000000.png", "grid.png"] and all(
        path.is_file() for path in again
    )
    found = evaluate(mine, num_images=16, steps=3, spacing="trailing", seed=5)["eval/protocol"]
    assert "16 samples" in found and "3 steps, trailing spacing, seed 5" in found


@pytest.mark.parametrize(
    "given, said",
    [
        (
            {"stepz": 5},
            r"there is no option 'stepz' \(did you mean 'steps'\?\); there are sampler, steps, "
            r"spacing, ema, classes, ",
        ),
        (
            {"sample.stepz": 5},
            r"there is no option 'sample.stepz' \(did you mean 'sample.steps'\?\)",
        ),
        ({"num_image": 5}, "there is no option 'num_image'"),
        ({"train": 5}, "there is no option 'train'"),
        ({"steps": "5"}, "steps is '5'; it takes a whole number"),
        ({"sampler": 5}, "sampler is 5; it takes text"),
        ({"guidance": "2"}, "guidance is '2'; it takes a number"),
        ({"steps": 2000}, "steps is 2000 with only 1000 timesteps"),
        ({"classes": "Wald"}, "unknown class 'Wald'; choose one of 0, 1"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_drawn(given, said, mine, tmp_path):
    functions = [
        lambda: generate_images(mine, 1, tmp_path / "out", **given),
        lambda: evaluate(mine, **given),
        lambda: sample_from_checkpoint(mine, tmp_path / "q.png", 1, **given),
        lambda: edit_images(
            mine, "invert", ROOT / "experiments/quickstart/samples.png", tmp_path / "out", **given
        ),
    ]
    for function in functions:
        with pytest.raises(ValueError, match=said) as raised:
            function()
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_pictures_and_counts_of_another_type_are_one_line(mine, tmp_path):
    photo = ROOT / "experiments/quickstart/samples.png"
    for images in (Image.open(photo), [Image.open(photo)]):
        with pytest.raises(ValueError, match="images has a PngImageFile; give the path of a pict"):
            edit_images(mine, "sdedit(strength=0.5)", images, out=tmp_path / "out")
    for function, *arguments in (
        (generate_images, mine),
        (sample_from_checkpoint, mine, tmp_path / "grid.png"),
        (edit_images, mine, "sdedit", photo),
    ):
        with pytest.raises(ValueError, match="num_images is '3'; it takes a whole number, 1 or mo"):
            function(*arguments, num_images="3")
    with pytest.raises(
        ValueError, match=r"edit 'sdedit\(strength=6\)': strength 6 is out of range"
    ):
        edit_images(mine, "sdedit(strength=6)", photo)
    assert not list(tmp_path.iterdir())


def test_an_edit_says_that_it_enlarges_a_picture(mine, tmp_path, capsys):
    Image.new("L", (24, 10)).save(tmp_path / "small.png")
    Image.new("L", (24, 16)).save(tmp_path / "large.png")
    said = [
        capture(capsys, edit_images, mine, "invert", tmp_path / name, tmp_path / "out", steps=2)
        for name in ("small.png", "large.png")
    ]
    assert "small.png has 24x10 pixels and is enlarged: the network's images have 16x16" in said[0]
    assert "enlarged" not in said[1]


@pytest.mark.parametrize(
    "line, expected", [(" ".join(words), expected) for words, expected in MESSAGES]
)
def test_a_message_of_a_command_names_the_flag_that_was_typed(line, expected, answers):
    said, cwd = answers
    code, text = said[line]
    assert code == 2 and text.startswith(f"error: {expected}") and text.count("\n") == 1, text
    assert {path.name for path in cwd.iterdir()} == {"command", "q.png"}  # of those that succeed


def test_without_a_checkpoint_the_newest_run_is_taken_and_said(place, mine, tmp_path, capsys):
    said = capture(capsys, sample_from_checkpoint, None, tmp_path / "a.png")
    assert said.startswith(
        "no checkpoint given: taking the newest run, runs/mine\ndrawing 16 images"
    )
    older = shutil.copytree(mine, place / "runs" / "a study" / "older")
    for path in (older / "final.safetensors", older / "checkpoints"):
        os.utime(path, (1, 1))
    (place / "runs" / "measured").mkdir()
    assert checkpoint.newest_run() == Path("runs/mine")
    os.utime(older / "checkpoints", (2**33, 2**33))  # it saved once more
    assert "run, runs/a study/older\n" in capture(
        capsys, generate_images, out=tmp_path / "b", num_images=1
    )
    with pytest.raises(
        ValueError,
        match=f"^no checkpoint given, and {tmp_path}/runs holds no run with weights; write --ch",
    ):
        checkpoint.newest_run(tmp_path / "runs")


def capture(capsys, function, *arguments, **given):
    function(*arguments, **given)
    return capsys.readouterr().out


def test_a_drawing_leaves_no_picture_of_another_in_its_folder(mine, tmp_path, capsys):
    out = tmp_path / "out"
    generate_images(mine, 4, out, steps=2)
    (out / "mine.png").write_bytes(b"a picture of the user's")
    said = capture(capsys, generate_images, mine, 2, out, format="jpg", steps=2, seed=1)
    assert "removed 4 images of an earlier drawing" in said
    assert sorted(path.name for path in out.iterdir()) == [
        pixels.RECORD,
        "000000.jpg",
        "000001.jpg",
        "mine.png",
    ]
    with open(out / pixels.RECORD, "a") as record:
        record.write('["000001.jpg", "12"]\n["0000')  # killed as it wrote
    (out / "000001.jpg.part").write_bytes(b"half")
    assert [path.name for path in generate_images(mine, 1, out, steps=2)] == ["000000.png"]
    assert sorted(path.name for path in out.iterdir()) == [pixels.RECORD, "000000.png", "mine.png"]

    # one that was changed, and one that ddpm did not draw
    for name in ("000000.png", "0000123.webp"):
        Image.new("L", (16, 16)).save(out / name)
        before = {path: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(
            ValueError,
            match=rf"holds numbered pictures .* \(1, such as {name}\); move them away, or give",
        ):
            generate_images(mine, 1, out, steps=2)
        assert before == {path: path.read_bytes() for path in out.iterdir()}
        (out / name).unlink()
    generate_images(mine, 3, out, steps=2)
    generate_images(mine, 1, out / "beside.png", format="grid", steps=2)
    assert len(list(out.glob("0*.png"))) == 3
    Image.new("L", (16, 16)).save(out / "0000123.png")
    said = capture(capsys, generate_images, mine, 1, out, format="grid", steps=2)
    assert "removed 3 images of an earlier drawing" in said
    assert [path.name for path in out.glob("0*.png")] == ["0000123.png"]
    with pytest.raises(
        ValueError,
        match="a.npz is named like a file, and --format=png writes a folder; .*--format=npz",
    ):
        generate_images(mine, 1, tmp_path / "a.npz")
    with pytest.raises(
        ValueError, match="--out=.*a.npz is not named like a file of --format=zip; end it with .zip"
    ):
        generate_images(mine, 1, tmp_path / "a.npz", format="zip")
    assert (
        wrote([out / "000000.png", out / "grid.png"])
        == f"wrote 1 image, {out}/000000.png, and {out}/grid.png"
    )


def test_a_drawing_that_was_interrupted_keeps_what_is_done_and_can_be_repeated(
    mine, tmp_path, monkeypatch
):
    whole = bytes_of(generate_images(mine, 4, tmp_path / "whole", steps=2, batch_size=2))
    decoded = []

    def third(x):
        decoded.append(x)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return monkeypatch.undo() or pixels.decode(x) if len(decoded) > 2 else real(x)

    real = pixels.decode
    monkeypatch.setattr(pixels, "decode", third)
    with pytest.raises(KeyboardInterrupt, match=f"^2 of 4 images are in {tmp_path}/out$"):
        generate_images(mine, 4, tmp_path / "out", steps=2, batch_size=2)
    monkeypatch.setattr(pixels, "decode", real)
    assert bytes_of(sorted((tmp_path / "out").glob("*.png"))) == whole[:2]
    assert bytes_of(generate_images(mine, 4, tmp_path / "out", steps=2, batch_size=2)) == whole


def started(*words, cwd, wrapper=("-m",), interpreter=None):
    return subprocess.Popen(
        [interpreter or python(), *wrapper, *words],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "words, code", [(["ddpm.plan"], 130), (["ddpm.main"], 75), (["ddpm", "train"], 75)]
)
def test_a_command_is_interrupted_while_it_imports(words, code, tmp_path):
    process = started(
        *words, f"--config={ROOT}/configs/digits.py", cwd=tmp_path, interpreter=sys.executable
    )
    while b"torch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None, "it ended before it imported torch"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == code
        and out == ""
        and err.startswith("interrupted before the start: nothing ")
    )
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_commands_are_interrupted_with_a_line_and_leave_nothing_half_written(mine, tmp_path):
    """Where progress is printed every 0.3 seconds, the first line says that the work has begun."""
    long = [f"--checkpoint={mine}", "--steps=1000", "--sampler=ddpm"]
    for number, name, words, kept in [
        (signal.SIGINT, "sample", [*long, "--out=q.png"], "no half-written file is left"),
        (signal.SIGTERM, "generate", [*long, "--out=g", "--format=npz"], "nothing is written to g"),
        (
            signal.SIGINT,
            "evaluate",
            [
                f"--checkpoint={mine}",
                "--extractor=none",
                "--likelihood=flow(nfe=4000)",
                "--workdir=e",
            ],
            "no half-written file is left",
        ),
    ]:
        process = started(f"ddpm.{name}", *words, cwd=tmp_path, wrapper=("-c", IMPATIENT))
        try:
            first = process.stderr.readline()
            second = process.stderr.readline()
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        counted = [
            re.fullmatch(
                r"(drawing|measuring bits/dim): (\d+) of (\d+) network evaluations, 0 of (\d+) "
                r"images, "
                r"\d\d:\d\d so far, [\d:]+ left\n",
                line,
            )
            for line in (first, second)
        ]
        assert all(counted), (first, second, err)
        assert 0 < int(counted[0][2]) < int(counted[1][2]) < int(counted[1][3])
        assert (
            process.returncode == 130
            and err.splitlines()[-1] == f"interrupted: {kept}"
            and "Traceback" not in err
        )
        left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
        assert not left, left
    assert progress.SECONDS == 10


def test_a_bar_moves_from_the_first_evaluation_on_and_ctrl_c_leaves_its_line_clean(mine, tmp_path):
    words = [
        "-m",
        "ddpm.generate",
        f"--checkpoint={mine}",
        "--steps=1000",
        "--sampler=ddpm",
        "--out=out",
        "--num_images=2",
        "--batch_size=1",
    ]
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, *words], environment())
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    said = b""
    end = time.monotonic() + 120
    while not re.search(rb"drawing: .*?[1-9]\d*/2000 .*0 of 2 images", said):
        said += os.read(terminal, 4096)
        assert time.monotonic() < end, said
    os.write(terminal, b"\x03")
    try:
        while more := os.read(terminal, 4096):
            said += more
    except OSError:  # the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (
        said.splitlines()[-1] == b"interrupted: nothing is written to out"
        and b"Traceback" not in said
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_evaluations_that_are_counted_are_those_that_are_made(
    mine, monkeypatch, tmp_path, capsys
):
    """By a hook on every network, against the total that was shown before the first, as a line
    said what begins.
    """
    shown = []

    class Seen(progress.Progress):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            shown.append([self.total, self])

    monkeypatch.setattr("ddpm.sampling.draw.Progress", Seen)
    monkeypatch.setattr("ddpm.evaluation.bits_per_dim.Progress", Seen)
    Image.new("L", (16, 16), 9).save(tmp_path / "9.png")
    for work in (
        lambda: generate_images(
            mine, 5, tmp_path / "a", steps=4, batch_size=2, sampler="heun", guidance=2.0
        ),
        lambda: generate_images(mine, 5, tmp_path / "c", format="gif", steps=4),
        lambda: edit_images(
            mine,
            "interpolate",
            [tmp_path / "9.png"] * 2,
            tmp_path / "b",
            num_images=3,
            steps=4,
            sampler="ddim",
            batch_size=2,
        ),
        lambda: sample_from_checkpoint(mine, tmp_path / "q.png", 3, steps=4),
        lambda: evaluate(
            mine,
            likelihood="both(images=9, nfe=40)",
            num_samples=16,
            batch_size=8,
            steps=3,
        ),
    ):
        asked = []

        def evaluated(module, *_, asked=asked):
            if type(module).__name__ == "UNet":
                asked.append("" if asked else capsys.readouterr().out)

        capsys.readouterr()
        with torch.nn.modules.module.register_module_forward_hook(evaluated):
            work()
        assert re.match(
            r"(drawing \d images|interpolate: 3 images|measuring \S+) .*\n", asked[0]
        ), asked[0]
        assert (
            sum(one.evaluations for _, one in shown)
            == sum(total for total, _ in shown)
            == len(asked)
            > 0
        )
        assert all(one.done == one.images for _, one in shown)
        shown.clear()


def test_a_folder_that_is_written_whole_or_not_at_all(mine, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        # after the weights are written
        patched.setattr("ddpm.interop.diffusers.json.dumps", stopped)
        convert.convert(mine, tmp_path / "theirs")
    assert not list(tmp_path.iterdir())
    theirs = convert.convert(mine, tmp_path / "theirs")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ddpm.training.weights.export", stopped)
        convert.convert(theirs, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == [theirs]
    shutil.rmtree(theirs)
    for number in (1, 2):
        with files.atomic_folder(tmp_path / "kept") as folder:
            (folder / f"{number}").touch()
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(tmp_path / "kept") as folder:
        stopped()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "kept",
        "kept/2",
    ]


WITHOUT_TORCH = """
import os, runpy, sys
from ddpm.config import base, with_variant
assert "torch" not in sys.modules, "ddpm.config imports torch"
config = sys.argv[1]
lines = [[name, "--help"] for name in sys.argv[2:]] + [
    ["main", f"--config={config}", "--config.train.lenth=3"],
    ["main", f"--config={config}", "--config.train.batch_size=0"],
    ["generate", "--stepz=3"],
    ["sweep"],
]
for name, *words in lines:
    child = os.fork()
    if not child:
        sys.argv = [f"ddpm/{name}.py", *words]
        code = 99
        try:
            runpy.run_module(f"ddpm.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            os._exit(98 if "torch" in sys.modules else code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if words == ["--help"] else 2), (name, words, code)
"""


def test_help_and_mistakes_are_answered_without_importing_torch(tmp_path):
    words = [sys.executable, "-c", WITHOUT_TORCH, f"{ROOT}/configs/digits.py", *COMMANDS]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 4


def test_help_fits_two_screens_and_says_where_all_options_are(answers):
    said, _ = answers
    assert "!!python" not in str(said)
    for name in COMMANDS:
        code, text = said[f"{name} --help"]
        assert (
            code == 0 and len(text.splitlines()) <= 80 and max(map(len, text.splitlines())) <= 100
        ), name
        assert "ddpm/config/defaults.py" in text and "--helpfull" in text, name
    generate = said["generate --help"][1]
    full = said["evaluate --helpfull"][1]
    assert (
        "--num_images  (whole number)" in generate and "--format  (text, default png)" in generate
    )
    assert (
        "--print_config" in said["main --help"][1]
        and "--config.section.leaf=value" in said["evaluate --help"][1]
    )
    assert all(f'"{option}":' in full for option in defaults.flatten(defaults.base()))
    code, text = said[f"main --config={ROOT}/configs/digits.py --config.seed=5 --print_config"]
    shown = config_files.from_json(text)
    assert (
        shown.seed == 5
        and defaults.flatten(shown).keys() == defaults.flatten(defaults.base()).keys()
    )


def test_the_documents_give_flags_that_exist(answers):
    said, _ = answers
    for document, name, arguments in commands():
        for argument in arguments:
            flag = re.match(r"--(\w+)", argument)
            if flag and not name.endswith(".py") and flag[1] not in ("help", "helpfull"):
                text = said[f"{'main' if name == 'train' else name} --help"][1]
                assert f"--{flag[1]}  (" in text or flag[1] == "config" in text, (
                    document,
                    name,
                    argument,
                )


def test_a_training_names_its_config_in_a_line(tmp_path, capsys):
    assert train_experiment(tiny(train__length="1 step"), tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert (
        f"config: {tmp_path}/run/config.json" in out
        and '"timesteps"' not in out
        and len(out.splitlines()) < 30
    )


def test_names_in_any_script_are_legible_on_a_contact_sheet(monkeypatch):
    """Which letters a font has is read by fontTools."""
    names = [
        "Fleurs été",
        "Übung",
        "вода",
        "ελληνικά",
        "猫.webp",
        "日本",
        "a\nb",
        "\udcff.png",
        "e\u0301",
        "ł\u200b",
        "x" * 99,
    ]
    dejavu = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    plain = ImageFont.load_default(11)
    for font, file in ((contact_sheet.load_font(11), dejavu), (plain, BytesIO(plain.font_bytes))):
        known = TTFont(file).getBestCmap()
        for letter in map(chr, range(0x20, 0x500)):
            if letter.isprintable() and not unicodedata.combining(letter):
                assert contact_sheet.has_glyph(font, letter) == (ord(letter) in known), hex(
                    ord(letter)
                )
        for name in names:
            assert all(
                ord(letter) in known for letter in contact_sheet.ellipsize(name, font, 112)
            ), name
            assert font.getlength(contact_sheet.ellipsize(name, font, 112)) <= 112
    assert (
        contact_sheet.legible("Fleurs été вода", contact_sheet.load_font(11)) == "Fleurs été вода"
    )
    assert contact_sheet.legible("猫", contact_sheet.load_font(11)) == "\\u732b"
    assert (
        contact_sheet.draw_sheet(
            "été\udcff", [("\n猫", [contact_sheet.Cell("№", name) for name in names])]
        ).width
        > 1000
    )
    contact_sheet.load_font.cache_clear()
    # as without matplotlib
    monkeypatch.setattr(contact_sheet.importlib.util, "find_spec", lambda name: None)
    try:
        assert contact_sheet.load_font(11).getname() == ImageFont.load_default(11).getname()
    finally:
        contact_sheet.load_font.cache_clear()


def test_one_of_a_thing_is_named_as_one(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    report = doctor.diagnose(tmp_path, 32, 0.1)
    assert (
        report["not_fit"][0].startswith("1 image is too few: ")
        and "1 of 1 image can be" in doctor.report_lines(report)[0]
    )
    with pytest.raises(ValueError, match="choose one of cat, dog"):
        source.class_numbers(("owl",), ("cat", "dog"))
    assert quantity(1, "image") == "1 image" and quantity(1200, "image") == "1,200 images"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    documents = "".join(document.read_text() for document in DOCUMENTS)
    told = re.findall(r"--out=([\w-]+)", documents)
    assert {"doctor", "samples", "cats128-pipeline"} <= set(told)
    assert all(f"/{name}/" in ignored for name in told if name not in ("DIR", "runs")), told


def test_a_second_ctrl_c_ends_at_once_and_what_nohup_ignores_stays_ignored():
    """In a process that takes a minute to clean up."""
    code = """
import signal, time
from ddpm.runtime import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.interruptible():
    try:
        signal.raise_signal(signal.SIGHUP)
        print("begun", flush=True), time.sleep(60)
    except KeyboardInterrupt:
        print("cleaning", flush=True), time.sleep(60)
"""
    process = started(code, cwd=ROOT, wrapper=("-c",))
    try:
        for said in ("begun\n", "cleaning\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "") and process.returncode == 130
    finally:
        process.kill()

"""The plan's figures follow from the network itself: counted memory, counted operations,
published peaks.
"""

import json
import re
import socket

import pytest
import torch

from ddpm import plan
from ddpm.config import defaults, files
from ddpm.experiment import build, cost
from ddpm.experiment import memory as experiment_memory
from ddpm.runtime import memory
from ddpm.runtime.gpus import GPUS, gpu_of, known
from support.commands import ROOT, outcome_of
from support.configs import FILES, module_of
from support.runs import tiny

GIB = memory.GIB


def test_the_most_images_fit_and_one_more_does_not():
    """The line through two accounts is exact: the account of so many images says so itself."""
    given = tiny(model__name="dit(depth=2, width=64, heads=2)")
    room = 0.7 * GIB
    for found in plan.memory_of(given, 4, room):
        dtype = torch.float32 if found.types == "fp32" else torch.bfloat16
        levels = 9 * (found.checkpointing == "all")
        sizes = [
            memory.with_margin(experiment_memory.estimate(given, dtype, n, levels).total)
            for n in (found.most, found.most + 1)
        ]
        assert sizes[0] <= room < sizes[1]
        assert found.account.total == sum(found.account.parts) and min(found.account.parts) >= 0
    assert all(found.most < 0 for found in plan.memory_of(given, 4, 0.1 * GIB))


def test_cats128_fits_into_8_gib_with_its_batch_of_8():
    given = defaults.freeze(module_of(FILES[0].with_name("cats128.py")).get_config())
    assert given.train.batch_size == 8
    found = experiment_memory.estimate(
        given, torch.bfloat16, 8 // given.train.gradient_accumulation_steps
    )
    assert memory.with_margin(found.total) < 8 * GIB
    # weights, gradients, Adam's two and the average of 200.3 million parameters in float32, and
    # Adam's counters
    assert sum(found.parts[:4]) / GIB == pytest.approx(5 * 4 * 200_321_475 / GIB, rel=1e-4)


def training_of(flops=1e12, weights=0, mfu=None, **options):
    """A Training of one batch of 10 images, of so many operations each."""
    options = {"train__batch_size": 10, "train__gradient_accumulation_steps": 1} | options
    flops = cost.Flops(flops / 4, flops)
    return plan.Training(tiny(**options), weights, flops, 100, 0, "", None, mfu)


def variant_of(**bytes_an_image):
    """A plan.Memory of 10 images at a time that move so many bytes each, with `launches` in all."""
    launches = bytes_an_image.pop("launches", 0)
    accounts = [
        memory.Account(
            *[0] * 6,
            [],
            memory.Traffic(**{key: n * size for key, size in bytes_an_image.items()})._replace(
                launches=launches
            ),
        )
        for n in (10, 20)
    ]
    return [plan.Memory("bf16, fp16", "none", accounts, 10, 0)]


def test_rates_by_hand():
    """Images of 10^12 operations at half of 10^14 a second; two GPUs halve the time, and send their
    gradients once, in sequence or behind two thirds of the micro-batch.
    """
    gpu = GPUS["L4"]._replace(half=100, link=10)
    still = variant_of()
    assert plan.rates(training_of(mfu=0.5), still, gpu, "bf16", 1) == pytest.approx((50, 50))
    several = training_of(mfu=0.5, weights=1e9 / 4)
    assert plan.rates(several, still, gpu, "bf16", 2) == pytest.approx(
        (10 / 0.2, 10 / (0.2 - 0.2 / 3))
    )
    halves = training_of(mfu=0.5, weights=1e9 / 4, train__gradient_accumulation_steps=5)
    assert plan.rates(halves, still, gpu, "bf16", 2) == pytest.approx(
        (10 / 0.2, 10 / (0.2 - 0.04 / 3))
    )


def test_the_estimate_adds_arithmetic_and_bandwidth():
    """Products take the longer of both; the compiler and channels_last save passes over memory."""
    gpu = GPUS["L4"]._replace(half=100, bandwidth=100)
    busy = 1 / (100 * plan.REACHED)  # seconds an image
    moved = variant_of(products=1e9, transposes=2e9, passes=4e9)
    eager = 1 / (busy + 6e9 / (plan.STREAMED * 1e11))
    assert plan.rates(training_of(), moved, gpu, "bf16", 1)[0] == pytest.approx(eager)
    fast = training_of(train__compile=True, train__channels_last=True)
    compiled = 1 / (busy + plan.FUSED * 4e9 / (plan.STREAMED * 1e11))
    assert plan.rates(fast, moved, gpu, "bf16", 1)[0] == pytest.approx(compiled)
    bound = variant_of(products=1e11)
    assert plan.rates(training_of(), bound, gpu, "bf16", 1)[0] == pytest.approx(1)
    # recomputed, an image costs a forward pass more; the update is once a step
    again = training_of(train__activation_checkpointing="all")
    (variant,) = variant_of()
    recomputed = [variant._replace(checkpointing="all")]
    assert plan.rates(again, recomputed, gpu, "bf16", 1)[0] == pytest.approx(1 / busy / 1.25)
    last = variant_of(update=8e8)
    updated = 10 / (10 * busy + 8e9 / (plan.STREAMED * 1e11))
    assert plan.rates(training_of(), last, gpu, "bf16", 1)[0] == pytest.approx(updated)


def test_the_traffic_of_a_step_is_linear_in_its_images():
    """An account of so many images says what two others say; the update is the same for any."""
    given = tiny()
    few, more, most = (experiment_memory.estimate(given, torch.float32, n) for n in (4, 8, 12))
    assert memory.traffic_of(few, 4, more, 8, 12) == pytest.approx(most.traffic, rel=1e-3)
    assert few.traffic.update == pytest.approx(more.traffic.update, rel=1e-3)
    assert 4 * few.weights < few.traffic.update < 20 * few.weights
    assert few.traffic.transposes == pytest.approx(2 * few.traffic.products, rel=0.3)


def test_a_run_says_which_share_of_the_peak_it_reached(tmp_path):
    files.write(tiny(), tmp_path, [])
    with pytest.raises(ValueError, match="the run tracked no speed/mfu; set --mfu instead"):
        plan.mfu_of(tmp_path)
    rows = [{"step": n, "speed/mfu": mfu} for n, mfu in enumerate((0.1, 0.3, 0.25))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan.mfu_of(tmp_path) == 0.25


def test_gpus_are_found_by_the_names_that_torch_gives_them():
    names = {
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 3070": "RTX 3070",
        "Tesla T4": "T4",
        "Tesla V100-SXM2-16GB": "V100",
        "NVIDIA L4": "L4",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100 80GB PCIe": "A100",
        "NVIDIA L40S": "L40S",
        "NVIDIA B200": "B200",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    }
    assert {name: gpu_of(name) for name in names} == {
        name: GPUS[gpu] for name, gpu in names.items()
    }
    for unknown in (
        "NVIDIA GeForce GT 1030",
        "NVIDIA L20",
        "NVIDIA GeForce RTX 2060 with Max-Q Design",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 2070 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Radeon RX 7700S",
        "Apple M2",
        "AMD Radeon Graphics",
        "NVIDIA RTX 4000 SFF Ada Generation",
    ):
        assert gpu_of(unknown) is None
    assert (GPUS["T4"].peak(torch.float16), GPUS["A100"].peak(torch.float32)) == (65e12, 156e12)


@pytest.mark.parametrize(
    "name, gib, half, bf16",
    [
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 8, 40.1, True),
        ("NVIDIA GeForce RTX 4070", 12, 58.3, True),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, 88.2, True),
        ("NVIDIA GeForce RTX 2080 Ti", 11, 53.8, False),
        ("NVIDIA GeForce GTX 1060 6GB", 6, 4.4, False),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 8, 42, True),
        ("NVIDIA GeForce RTX 5090", 32, 209.5, True),
        ("AMD Radeon RX 7900 XTX", 24, 122.8, True),
        ("AMD Radeon RX 7900 XT", 20, 103, True),
        ("AMD Radeon PRO W7900", 48, 122.6, True),
        ("AMD Instinct MI300X", 192, 1307, True),
    ],
)
def test_gpus_that_people_own_are_in_the_table(name, gib, half, bf16):
    gpu = gpu_of(name)
    assert (gpu.gib, gpu.half, gpu.bf16) == (gib, half, bf16)


def test_published_rates_fit_the_architectures():
    """Tensor cores of GeForce do 2 (since Ampere) or 4 (Turing) times the float32 of the
    shaders; a laptop's GPU does less.
    """
    times = {"GTX 10": 1, "GTX 16": 2, "RTX 20": 4, "RTX 30": 2, "RTX 40": 2, "RTX 50": 2}
    for name, gpu in GPUS.items():
        if name[:6] in times:
            # of one decimal place
            assert gpu.half / gpu.single == pytest.approx(times[name[:6]], rel=0.025), name
        desktop = GPUS.get(name.removesuffix(" Laptop"))
        assert desktop is None or desktop.half > 0.95 * gpu.half, name
        assert known(f"NVIDIA GeForce {name} GPU") == name and gpu.gib > 0 and gpu.link > 0


def test_small_networks_are_limited_by_their_kernels():
    """A thousand kernels of 3.8 microseconds compiled and of 9 eagerly; what is counted are the
    layers and more, forward and backward.
    """
    launches = variant_of(launches=1000)
    for compiled, each in ((True, 3.8e-6), (False, 9e-6)):
        for mfu in (None, 0.5):
            training = training_of(1e3, mfu=mfu, train__compile=compiled)
            rate, _ = plan.rates(training, launches, GPUS["H100"], "bf16", 1)
            assert rate == pytest.approx(10 / (1000 * each))
    for mfu, count in ((None, 1500), (0.5, 1000)):  # a measured share includes the update
        (variant,) = launches
        accounts = [
            each._replace(traffic=each.traffic._replace(update_launches=500))
            for each in variant.accounts
        ]
        updated = [variant._replace(accounts=accounts)]
        rate, _ = plan.rates(training_of(1e3, mfu=mfu), updated, GPUS["H100"], "bf16", 1)
        assert rate == pytest.approx(10 / (count * 9e-6))
    given = tiny()
    with torch.device("meta"):
        layers = sum(not list(module.children()) for module in build.network(given).modules())
    counted = experiment_memory.estimate(given, torch.float32, 4).traffic.launches
    assert layers < counted < 40 * layers


def test_the_plan_quotes_its_comparison_with_published_trainings():
    """The committed figures are those of the present code."""
    bench = module_of(ROOT / "experiments" / "plan" / "run.py")
    results = json.loads((bench.HERE / "results.json").read_text())
    half = [
        f"{result['eager']['fast'] / result['published']:.1f}"
        for run in bench.PUBLISHED
        if run.kind == "fp16"
        for result in [results["trainings"][run.name]]
    ]
    training = training_of()
    assert f"took {min(half)} to {max(half)} times as long" in plan.way_words(training)
    assert (bench.HERE / "README.md").read_text() == bench.report(results)
    run = bench.PUBLISHED[1]
    again = bench.estimated(run)
    assert again["eager"] == pytest.approx(results["trainings"][run.name]["eager"], rel=1e-6)


@pytest.mark.parametrize(
    "hours, words",
    [
        (1e-5, "< 1 s"),
        (0.0005, "2 s"),
        (0.0496, "3 min"),
        (1.99, "119 min"),
        (12.44, "12.4 h"),
        (99, "99.0 h"),
        (2400, "100.0 days"),
    ],
)
def test_times_are_spelled(hours, words):
    assert plan.spell(hours) == words


@pytest.mark.parametrize("name, least", [("adm_imagenet64", 295e6), ("dit_xl_2", 674e6)])
def test_class_conditional_configs_are_planned_without_their_data(
    tmp_path, monkeypatch, name, least
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it went to the network"))
    given = defaults.freeze(module_of(FILES[0].with_name(f"{name}.py")).get_config())
    some, words = plan.with_classes(given, 7)
    assert some.data.classes == ("0", "1", "2", "3", "4", "5", "6") and not words
    assumed, words = plan.with_classes(given)
    assert len(assumed.data.classes) == 1000 and words.startswith(
        "1,000 classes are assumed, as the data are not here ("
    )
    with torch.device("meta"):
        assert sum(one.numel() for one in build.network(assumed).parameters()) > least
    assert not list(tmp_path.iterdir())
    mine = tiny(
        data__class_labels=True,
        evaluate__classes=("cat", "dog"),
        data__source="folder(path='none')",
    )
    assert plan.with_classes(mine, 3)[0].data.classes == ("cat", "dog", "0")
    # the digits are at hand
    assert plan.with_classes(tiny(data__class_labels=True))[0].data.classes == tuple("0123456789")


@pytest.mark.parametrize(
    "name, near",
    [
        (
            "4070",
            "RTX 4070 12, RTX 4070 Laptop 8, RTX 4070 SUPER 12, RTX 4070 Ti 12, RTX 4070 Ti SUPER "
            "16",
        ),
        ("3080 laptop", "RTX 3080 Laptop 8, RTX 3080 Ti Laptop 16"),
        ("RTX 2061", "RTX 2060 6, RTX 2060 SUPER 8"),
        ("7900 xtx", "RX 7900 XTX 24"),
        ("Voodoo", ""),
    ],
)
def test_a_gpu_that_is_not_known_has_all_that_may_be_meant(name, near):
    """With their memory, by which a laptop's GPU differs from the desktop's of the same number."""
    with pytest.raises(ValueError) as caught:
        plan.listed(f"T4,{name}")
    gpus = " or ".join(
        f"{words.rpartition(' ')[0]!r} ({words.rpartition(' ')[2]} GiB)"
        for words in near.split(", ")
        if words
    )
    meant = f" (did you mean {gpus}?)" if near else ""
    assert (
        str(caught.value) == f"unknown GPU {name!r}{meant}; --gpus=all shows those that are known"
    )


def test_the_command():
    small = [f"--config.model.{option}" for option in ("model_channels=8", "num_res_blocks=1")]
    code, out, _ = outcome_of(
        "plan",
        "--config=configs/digits.py",
        *small,
        "--config.train.length=3 epochs",
        "--vram=2",
        "--num_gpus=3",
        cwd=ROOT,
    )
    assert (
        code == 0
        and "4,864 images, of 1,617 in the data" in out
        and "on a GPU of 2 GiB" in out
        and "3 GPUs" in out
    )
    assert (
        "\non 3 GPUs a batch of 32 cannot be cut into 3 ranks x 1 parts: those columns are for "
        in out
    )
    assert "--config.train.batch_size=33\n" in out
    assert all(f"\n{gpu} " in out for gpu in plan.USUAL.split(",")) and "GiB: 0.0" in out
    assert "time, compiled, if train.compile=auto chooses that (--config.train.comp" in out
    rates = re.findall(r"\n.* [bf][pf]16 +([0-9,.]+) +0\.\d\d ", out)
    assert len(rates) == len(plan.USUAL.split(","))
    # of some hundred kernels at the least
    assert {float(rate.replace(",", "")) <= 33 / (300 * 9e-6) for rate in rates} == {True}
    assert "\nevaluation at the end: 1,797 images by dpmpp in 12 steps, " in out


def test_images_that_are_not_there_yet_are_taken_to_be_some(tmp_path):
    steps, images, words = plan.length(
        tiny(data__source=f"folder(path='{tmp_path}/none')", train__length="8 epochs")
    )
    assert (steps, images) == (10_000, 10_000) and words.startswith(
        f", with 10,000 images assumed, as the data are not here (image folder '{tmp_path}/none' "
        "does not exist)"
    )


def test_a_gpu_with_room_takes_the_batch_in_fewer_parts():
    """Of 12 images in 6 parts: at 4 at a time they fit where the planner says that 4 do, and not
    all.
    """
    given = tiny(train__batch_size=12, train__gradient_accumulation_steps=6)
    sizes = [
        memory.with_margin(experiment_memory.estimate(given, torch.bfloat16, n).total)
        for n in (4, 6)
    ]
    said = "\n".join(plan.plan(given, sum(sizes) / 2 / GIB, 0.4, 1))
    assert "in fewer parts: --config.train.gradient_accumulation_steps=3\n" in said
    assert "in fewer parts" not in "\n".join(plan.plan(given, 0.1, 0.4, 1))


def test_snapshots_take_disk():
    given = tiny(ema__sigma_rels=(0.05, 0.1), every__snapshot="5 steps")
    *_, line = plan.plan(given, 8, 0.4, 8)
    with torch.device("meta"):
        size = sum(one.numel() for one in build.network(given).parameters()) * 2 * 2 / GIB
    assert line.endswith(
        f"2 averages in half precision (every.snapshot=5 steps) {size:.2f}, 3 of them "
        f"{3 * size:.2f}"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/digits.py", "--vram=-3"], "--vram is '-3'; it takes a number, 0.1 or"),
        (["--config=configs/digits.py", "--vram=x"], "--vram is 'x'; it takes a number, 0.1 or"),
        (["--config=configs/digits.py", "--mfu=nan"], "flag --mfu=nan: give a finite number"),
        (
            ["--config=configs/digits.py", "--gpus=RTX 4071"],
            "unknown GPU 'RTX 4071' (did you mean 'RTX 4070' (12 GiB) or ",
        ),
        (["--config=configs/none.py"], "there is no config file configs/none.py"),
        (
            ["--config=configs/digits.py", "--config.model.attention_resolutions=7,"],
            "attention resolution 7 does not occur",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message):
    code, out, err = outcome_of("plan", *flags, cwd=ROOT)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err

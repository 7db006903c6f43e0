"""Every config file trains at tiny size, every entry of every table runs, and contradictions are
refused with the remedy.
"""

import re
from pathlib import Path

import pytest
import torch

from ddpm import data
from ddpm.common import registry
from ddpm.common.registry import parse
from ddpm.config import check, defaults, files
from ddpm.data import augment
from ddpm.diffusion.editing import EDITS
from ddpm.diffusion.process import VARIANCES
from ddpm.diffusion.schedules import SCHEDULES
from ddpm.diffusion.targets import TARGETS
from ddpm.experiment import build, cost, load, remarks
from ddpm.models import MODELS
from ddpm.sampling import formats
from support.configs import FILES, module_of
from support.runs import TINY, rows, run, tiny

ROOT = Path(__file__).parents[2]
RECIPES = [
    (path, variant)
    for path in FILES
    for variant in (None, *getattr(module_of(path), "VARIANTS", {}))
]


@pytest.mark.parametrize(
    "path, variant", RECIPES, ids=lambda value: getattr(value, "stem", str(value))
)
def test_every_config_trains_at_tiny_size(path, variant, tmp_path):
    given = module_of(path).get_config(variant)
    check.check(given)
    build.check(given)
    small = {
        key: value
        for key, value in TINY.items()
        if key not in ("model.channel_mult", "diffusion.timesteps")
    }
    levels = len(given.model.channel_mult)
    size = 32 if 32 % 2 ** (levels - 1) == 0 else 2**levels
    name, options = parse(given.model.name)
    patch = f"depth=2, width=16, heads=2, patch_size={options.get('patch_size', 2)}"
    run(
        files.changed(
            given,
            small
            | {
                "data.source": "digits",
                "data.image_size": size,
                "model.attention_resolutions": (size // 2,),
                "data.num_workers": 0,
                "model.name": f"dit({patch})" if name == "dit" else name,
                "model.num_head_channels": 0,
                "train.batch_size": 4,
                "train.gradient_accumulation_steps": 1,
                "train.length": "2 steps",
                "every.evaluate": "0 steps",
            },
        ),
        tmp_path,
    )
    assert rows(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    with pytest.raises(ValueError, match="variant"):
        module_of(path).get_config("no_such_variant")


def test_the_documents_have_every_entry_as_it_can_be_written():
    documented = {}
    option = ""
    readme = (ROOT / "configs" / "README.md").read_text()
    for line in readme.partition("## What can be compared\n")[2].splitlines():
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4:
            option = cells[0].strip("`") or option
            documented.setdefault(option, []).extend(re.findall(r"`([^`]+)`", cells[1]))
            assert cells[3], f"{cells[1]} has no paper"
    for option, entry in defaults.OPTIONS.items():
        # described elsewhere; as those of sample
        if entry.kind != "entry" or option in (
            "data.source",
            "evaluate.sampler",
            "evaluate.spacing",
            "evaluate.extractor",
            "evaluate.likelihood",
        ):
            continue
        table = check.table(entry.choices[-1])
        for text in documented[option]:
            registry.resolve(option, table, text)
        assert {registry.parse(text)[0] for text in documented[option]} == set(table), option
    assert set(documented["diffusion.variance"]) == set(VARIANCES)
    for file, heading, entries in (
        ("docs/sampling.md", "--edit", list(EDITS)),
        ("experiments/README.md", "evaluate.likelihood", ["bound", "flow"]),
    ):
        text = (ROOT / file).read_text()
        table = re.search(rf"^\| `{heading}` .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
        lines = table[1].splitlines()
        assert [registry.parse(line.split("`")[1])[0] for line in lines] == entries
        assert all(re.search(r" 20\d\d\b", line) for line in lines), heading  # the year of a paper


def test_the_tables_are_whole():
    assert set(SCHEDULES) >= {"linear", "cosine", "quadratic", "sigmoid"}
    assert set(data.SOURCES) == {"digits", "folder", "torchvision", "streaming"}
    assert set(formats.FORMATS) == {"png", "jpg", "webp", "grid", "npz", "zip", "gif"}


@pytest.mark.parametrize(
    "options, remedy",
    [
        (dict(data__image_size=20, model__attention_resolutions=(10,)), "digits are 8x8"),
        (dict(model__channel_mult=(1, 2, 2, 2, 2, 2, 2)), "cannot be halved"),
        (dict(model__attention_resolutions=(5,)), "5"),
        (dict(model__num_heads=3), "heads"),
        (dict(model__res_blocks_per_level=(1, 2, 3)), "3 numbers for 2 levels; give one for each"),
        (
            dict(model__name="dti"),
            r"'dti' \(did you mean 'dit'\?\); choose one of unet, unet_edm2, dit",
        ),
        (
            dict(model__name="unet(depth=3)"),
            "config.model.name 'unet' has no argument 'depth'; it takes none",
        ),
        (dict(model__name="dit(size='M')"), "unknown size of a DiT 'M'; choose one of S, B, L, XL"),
        (
            dict(model__name="dit(patch=3)"),
            "has no argument 'patch'; it accepts size, patch_size, depth, width, heads",
        ),
        (dict(model__name="dit(patch_size='2')"), "takes patch_size as int, such as 2; got '2'"),
        (
            dict(model__name="dit(patch_size=3)"),
            "cannot be cut into patches of 3; use 15 or 18, or a patch_size of 1, 2, 4",
        ),
        (dict(diffusion__beta_schedule="cosin"), r"did you mean 'cosine'\?"),
        (dict(train__gradient_accumulation_steps=3), "divisors of 8"),
        (dict(sample__steps=21), "sample.steps is 21 with only 20 timesteps; use 20 or fewer"),
        (dict(train__length="3 hours"), "could not be repeated"),
        (dict(data__source="folder(path='/no/such/folder')"), "/no/such/folder"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(options, remedy, tmp_path):
    with pytest.raises(ValueError, match=remedy) as caught:
        run(tiny(**options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_paper_networks_have_their_size():
    def parameters(name, classes=0):
        given = module_of(FILES[0].parent / f"{name}.py").get_config()
        given.data.classes = tuple(map(str, range(classes)))
        with torch.device("meta"):
            net = build.network(given)
        return sum(parameter.numel() for parameter in net.parameters())

    assert parameters("ddpm_cifar10") == 35_746_307  # Ho et al. 2020
    assert parameters("improved_ddpm_cifar10") == 52_546_438  # Nichol & Dhariwal 2021: 52.5 M
    # Dhariwal & Nichol 2021, table 4: 296 M, 422 M, 554 M
    assert parameters("adm_imagenet64", 1000) == 295_904_454
    assert parameters("adm_imagenet128", 1000) == 421_529_606
    assert parameters("adm_imagenet256", 1000) == 553_838_086
    # Peebles & Xie 2023 count 675,129,632 with 1,001 rows of labels, patches of 4 channels in and 8
    # out in place of 3 and 6, and the 256 fixed positions
    latent = 675_129_632 - (1001 - 10) * 1152 - 4 * 1152 - 2 * 4 * 1153 - 256 * 1152
    assert parameters("dit_xl_2", 10) == latent
    # NVlabs/edm's SongUNet(32, 3, 3, 0, 9, 128, [2, 2, 2]) has 55,733,891; ours has four attention
    # blocks of 256 channels more and four 1x1 convolutions less
    attention = 2 * 256 + 4 * 256 * 257
    shortcut = 256 * 257
    assert parameters("edm_cifar10") == 55_733_891 + 4 * attention - 4 * shortcut
    assert parameters("cats128") == 200_321_475
    cats = module_of(FILES[0].parent / "cats128.py").get_config()
    assert cost.count_flops(cats).training == pytest.approx(1583e9, rel=1e-3)


@pytest.mark.parametrize("name, within", [("digits", 0.04), ("ddpm_cifar10", 0.03)])
def test_the_dit_spends_what_the_unet_spends(name, within):
    recipes = module_of(FILES[0].parent / f"{name}.py")
    unet, dit = (
        cost.count_flops(recipes.get_config(variant)).training for variant in (None, "dit")
    )
    assert abs(dit / unet - 1) < within


def test_a_network_gets_the_options_that_it_names():
    given = tiny(
        model__name="dit(depth=2, width=16, heads=2)",
        model__dropout=0.25,
        model__qk_norm=True,
        model__num_heads=4,
    )
    net = build.network(given)
    assert [block.attention.heads for block in net.blocks] == [2, 2] and net.blocks[
        0
    ].dropout.p == 0.25
    assert net.blocks[0].attention.norm_q.weight.shape == (8,)
    unet = build.network(files.changed(given, {"model.name": "unet"}))
    assert (
        unet.middle[1].heads == 4
        and unet.middle[1].norm_q.weight.shape == (4,)
        and unet.middle[0].dropout.p == 0.25
    )


OTHERWISE = {  # another value of each option of `model`
    "dropout": 0.5,
    "qk_norm": True,
    "model_channels": 16,
    "channel_mult": (1, 3),
    "num_res_blocks": 2,
    "num_heads": 2,
    "res_blocks_per_level": (1, 2),
    "attention_resolutions": (),
    "num_head_channels": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "conventions(freq_shift)": 0,
    "conventions(downsample_padding)": 1,
    "conventions(norm_num_groups)": 1,
    "conventions(noise_embedding)": "sines",
    "conventions(norm_eps)": 0.1,
    "conventions(initialization)": "torch",
    "conventions(augmentation_place)": "after",
}


def traits(given):
    """The modules of a config's network, its new weights, and its answer with other weights, as
    a new network says 0.
    """
    net = build.network(given)
    generator = torch.Generator().manual_seed(0)
    new = [weight.detach().clone() for weight in net.parameters()]
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(generator=generator)
        x = torch.randn(2, 1, 16, 16, generator=generator)
        told = (
            [None, torch.randn(2, augment.NUM_CONDITIONS, generator=generator)]
            if given.data.augment
            else []
        )
        return repr(net), new, net.eval()(x, torch.tensor([-0.5, 300.0]), *told)


def same(one, other):
    return (
        one[0] == other[0]
        and all(map(torch.equal, one[1], other[1]))
        and torch.equal(one[2], other[2])
    )


@pytest.mark.parametrize(
    "name", ["dit(depth=2, width=16, heads=2)" if name == "dit" else name for name in MODELS]
)
def test_options_are_unused_where_the_network_is_the_same_without_them(name):
    """The same modules, new weights and answers, to the bit."""
    given = tiny(
        model__name=name,
        diffusion__predict="edm",
        data__augment=0.0 if name == "unet_edm2" else 0.5,
    )
    plain = traits(given)
    assert same(plain, traits(given))
    assert {f"model.{option}" for option in (*OTHERWISE, "name")} == {
        option for option in build.spelled_out(given) if option.startswith("model.")
    }
    idle = []
    for option, value in OTHERWISE.items():
        option_and_name = {"model.conventions": "ho"} if "(" in option else {}
        changed = files.changed(given, files.gather(option_and_name | {f"model.{option}": value}))
        assert changed != given
        if same(plain, traits(changed)):
            idle.append(f"model.{option}")
    assert set(build.unused(given)) == {*idle, "diffusion.rescale_timesteps"}


@pytest.mark.parametrize(
    "name, option, other, value, said",
    [
        (
            "unet",
            "num_heads",
            "num_head_channels",
            4,
            "model.num_heads=2 has no effect with model.num_head_channels=4",
        ),
        (
            "unet_edm2",
            "num_heads",
            "num_head_channels",
            4,
            "model.num_heads=2 has no effect with model.num_head_channels=4",
        ),
        (
            "unet",
            "num_res_blocks",
            "res_blocks_per_level",
            (1, 3),
            "model.num_res_blocks=3 has no effect with model.res_blocks_per_level=(1, 3)",
        ),
        (
            "unet_edm2",
            "num_res_blocks",
            "res_blocks_per_level",
            (1, 3),
            "model.res_blocks_per_level=(1, 3) has no effect with model.name=unet_edm2",
        ),
    ],
)
def test_an_option_that_another_replaces_is_named(name, option, other, value, said):
    """Where the remark names an option, the network is the same without it; alone the option is
    not named.
    """

    def network(**options):
        return traits(tiny(model__name=name, **options))

    one = {f"model__{option}": 3 if option == "num_res_blocks" else 2}
    two = {f"model__{other}": value}
    assert remarks.unused_remarks(tiny(model__name=name, **one, **two)) == [said]
    with_both = network(**one, **two)
    assert same(with_both, network(**two)) == (f"model.{option}=" in said)
    assert same(with_both, network(**one)) == (f"model.{other}=" in said.partition(" no effect")[0])
    assert remarks.unused_remarks(tiny(model__name=name, **one)) == []
    assert not same(network(**one), network())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_shipped_config_sets_an_option_without_effect(path):
    assert remarks.unused_remarks(defaults.freeze(module_of(path).get_config())) == []


def test_the_log_names_the_options_that_have_no_effect(tmp_path):
    run(
        tiny(
            model__name="dit(depth=1, width=16, heads=2)",
            diffusion__predict="edm",
            diffusion__rescale_timesteps=True,
            diffusion__timesteps=20,
            model__conventions="ho(initialization='torch')",
            train__length="1 steps",
        ),
        tmp_path,
    )
    said = (
        "model.conventions(initialization)=torch, diffusion.rescale_timesteps=True have no effect with "
        "model.name=dit and diffusion.predict=edm"
    )
    assert said.split(", ", 1)[1] in (tmp_path / "training.log").read_text()
    for predict in TARGETS:  # by what the network is given in fact
        asked = [
            build.diffusion(
                tiny(
                    diffusion__predict=predict,
                    diffusion__timesteps=20,
                    diffusion__rescale_timesteps=scaled,
                ),
                None,
            ).target.c_noise(7, 0.6, 0.8)
            for scaled in (True, False)
        ]
        idle = build.unused(tiny(diffusion__predict=predict))
        assert ("diffusion.rescale_timesteps" in idle) == (asked[0] == asked[1]), predict
    assert remarks.unused_remarks(defaults.freeze(defaults.base())) == []
    one, other = (
        tiny(model__name="dit(depth=1, width=16, heads=2)", model__num_heads=number)
        for number in (1, 2)
    )
    load.check_same_network(one, other, "a file")  # weights of the one fit the other
    with pytest.raises(ValueError, match="a file was trained with model.num_heads 2, not 1"):
        load.check_same_network(
            *(files.changed(given, {"model.name": "unet"}) for given in (one, other)), "a file"
        )


def test_a_network_that_cannot_be_told_of_augmentation_is_not_trained_on_any():
    with pytest.raises(ValueError) as caught:
        build.check(tiny(model__name="unet_edm2", data__augment=0.3))
    assert str(caught.value) == (
        "config.data.augment is 0.3, and the network unet_edm2 cannot be conditioned on "
        "augmentation, so samples would be augmented too; use data.augment=0, or unet or dit"
    )


def test_the_recipes_are_those_of_their_papers():
    """Figures of openai/improved-diffusion, NVlabs/edm and gnobitab/RectifiedFlow."""

    def recipe(name):
        return module_of(FILES[0].parent / f"{name}.py").get_config()

    held_out = {
        path.stem: recipe(path.stem).data.validation_fraction
        for path in FILES
        if "CIFAR10" in path.read_text()
    }
    assert held_out and set(held_out.values()) == {0.0}  # they learn from all 50,000 images
    improved = recipe("improved_ddpm_cifar10")
    told = build.diffusion(improved, None).target.c_noise
    assert [told(t, 0.5, 0.5) for t in (0, 1000, 3999)] == [0, 250, 999.75]  # t 1000 / 4000
    assert build.diffusion(recipe("ddpm_cifar10"), None).target.c_noise(999, 0.5, 0.5) == 999
    assert {path.stem for path in FILES if recipe(path.stem).model.conventions == "openai"} == {
        "improved_ddpm_cifar10",
        "adm_imagenet64",
        "adm_imagenet128",
        "adm_imagenet256",
    }
    edm = recipe("edm_cifar10")
    assert edm.ema.decay == pytest.approx(0.5 ** (edm.train.batch_size / 500_000), abs=1e-6)
    assert edm.ema.rampup == 0.05 and not edm.ema.warmup
    flow = recipe("rectified_flow_cifar10")
    assert flow.ema.decay == 0.999999 and flow.ema.warmup
    old = files.from_json('{"model": {"model_channels": 32}}')
    assert (
        build.conventions(old)["initialization"],
        old.diffusion.rescale_timesteps,
        old.ema.rampup,
    ) == (
        "glorot",
        False,
        0.0,
    )

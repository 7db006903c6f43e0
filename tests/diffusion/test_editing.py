"""Edits: against diffusers, closed forms and exact identities, and through the command."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, RePaintScheduler
from PIL import Image

from ddpm.data import decode
from ddpm.diffusion.denoiser import denoiser
from ddpm.diffusion.editing import (
    EDITS,
    STEPWISE,
    EditInput,
    get_edit,
    invert,
    repaint,
    resampled,
    slerp,
    visited_levels,
)
from ddpm.diffusion.process import CLEAN, initial_noise
from ddpm.diffusion.samplers import ddim, ddpm
from ddpm.experiment import build, drawing
from ddpm.generate import edit_images, generate_images, masked_words
from support.commands import run_ddpm
from support.oracles import (
    FLOAT32_TABLES,
    MEAN,
    PATHS,
    SHAPE,
    SPREAD,
    VARIANTS,
    Tiny,
    flow_to,
    gaussian,
    last,
    mixture,
    noises,
    process,
    sampler,
)
from support.runs import run, tiny

# of SHAPE, the left half painted again
HALF = torch.tensor([True, True, False, False]).expand(1, 1, 4, 4)


def pictured(k=100):
    """An image in [-1, 1], float64."""
    return torch.tanh(noises()(k))


def edit(text, name, denoise, levels, *images, mask=None, share=None, noise=None):
    """Every x of an edit's walk."""
    return list(
        get_edit(text).walk(
            sampler(name),
            lambda: denoise,
            levels,
            noise or noises(),
            EditInput(images, mask, share),
        )
    )


@pytest.mark.parametrize(
    "steps, jump_length, resamplings",
    [(250, 10, 10), (25, 10, 10), (20, 1, 3), (11, 10, 2), (10, 10, 1)],
)
def test_the_walk_of_repaint_is_that_of_diffusers(steps, jump_length, resamplings):
    reference = RePaintScheduler(1000)
    reference.set_timesteps(steps, jump_length, resamplings)
    places = resampled(steps, jump_length, resamplings)
    stops = [places[0]]
    for before, after in pairwise(places):  # they go up step by step
        stops += range(before + 1, after + 1) if after > before else [after]
    # they count from the last noisy level, where we count from CLEAN
    assert [stop - 1 for stop in stops] == [*(reference.timesteps // (1000 // steps)).tolist(), -1]


@pytest.mark.parametrize("name, eta", [("ddim", 0.0), ("ddpm", 1.0)])
def test_a_pass_of_repaint_agrees_with_diffusers(name, eta):
    reference = RePaintScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, eta=eta)
    reference.set_timesteps(50, 10, 1)
    net = Tiny()
    levels = process().levels(50, "leading")
    walk = repaint(
        sampler(name),
        denoiser(net, predict="eps", clip=False),
        noises()(0),
        levels,
        noises(),
        pictured(),
        HALF,
        resamplings=1,
    )
    x = noises()(0)
    for k, (t, ours) in enumerate(zip(reference.timesteps, walk, strict=True), start=1):
        seeded = torch.Generator().manual_seed(k)
        x = reference.step(
            net(x, t.reshape(1)), t, x, pictured(), 1.0 - HALF.double(), seeded
        ).prev_sample
        torch.testing.assert_close(ours, x, rtol=0, atol=FLOAT32_TABLES)


@pytest.mark.parametrize("way", STEPWISE)
def test_with_nothing_known_one_pass_is_the_sampler(way):
    denoise = denoiser(Tiny(), predict="v", clip=True)
    levels = process("cosine").levels(12)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    walks = (
        repaint(way, denoise, noises()(0), levels, noises(), pictured(), everything, resamplings=1),
        way(denoise, noises()(0), levels, noises()),
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*walks, strict=True))


@pytest.mark.parametrize("way", STEPWISE)
@pytest.mark.parametrize("path", PATHS)
def test_known_pixels_come_back_exactly(way, path):
    levels = PATHS[path](100).levels(12)
    denoise = denoiser(Tiny(), predict="v", clip=True)
    *_, x = edit(
        "inpaint(jump_length=3, resamplings=2)",
        way.__name__,
        denoise,
        levels,
        pictured(),
        mask=HALF,
    )
    known = ~HALF.expand(SHAPE)
    assert torch.equal(x[known], pictured()[known]) and torch.isfinite(x).all()
    assert (x - pictured())[~known].abs().min() > 0


@pytest.mark.parametrize("path", PATHS)
def test_resampling_keeps_the_law_where_nothing_is_known(path):
    """Noise after a jump upward is as much as the level has: else mean and variance would drift,
    forty jumps on.
    """
    n = 10_000
    generator = torch.Generator().manual_seed(0)

    def noise(k):
        return torch.randn((n, 1, 1, 1), generator=generator, dtype=torch.float64)

    levels = PATHS[path](1000).levels(400, "karras")
    x = last(
        repaint(
            ddpm,
            gaussian,
            initial_noise(levels[0], noise(0)),
            levels,
            noise,
            torch.zeros(1),
            torch.tensor(True),
            20,
            3,
        )
    )
    # five standard errors of 10,000 draws, and 0.006 for 400 steps of ancestral sampling, whose
    # variance is the small one
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(n))
    assert x.std().item() == pytest.approx(SPREAD, abs=5 * SPREAD / math.sqrt(2 * n) + 0.006)


def test_resampling_moves_repaint_towards_the_conditional():
    """Two pixels correlated by 0.8, the left one known to lie 1.5 deviations above the mean: the
    right one is then Gaussian.
    """
    n = 4_000
    correlation = 0.8
    left = MEAN + 1.5 * SPREAD
    generator = torch.Generator().manual_seed(0)
    covariance = SPREAD**2 * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)

    def denoise(x, level):
        gain = (
            level.alpha
            * covariance
            @ torch.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * torch.eye(2))
        )
        x0 = MEAN + (x - level.alpha * MEAN) @ gain.T
        return x0, (x - level.alpha * x0) / level.sigma

    def noise(k):
        return torch.randn((n, 1, 1, 2), generator=generator, dtype=torch.float64)

    levels = PATHS["straight"](1000).levels(100, "karras")
    mask = torch.tensor([False, True]).reshape(1, 1, 1, 2)
    mean = MEAN + correlation * (left - MEAN)
    spread = SPREAD * math.sqrt(1 - correlation**2)
    known = torch.full((n, 1, 1, 2), left, dtype=torch.float64)
    means = []
    spreads = []
    for resamplings in (1, 4, 16):
        x = last(repaint(ddpm, denoise, noise(0), levels, noise, known, mask, 10, resamplings))
        assert (x[..., 0] == left).all()
        means.append(x[..., 1].mean().item())
        spreads.append(x[..., 1].std().item())
    shortfalls = [mean - found for found in means]
    # standard errors are 0.003; measured 0.14, 0.057, 0.016: one pass has seen too little of the
    # known pixel when it settles
    assert all(0 < after < before / 2 for before, after in pairwise(shortfalls))
    # of 0.36 between the means, and of 0.18
    assert shortfalls[-1] < 0.025 and abs(spreads[-1] - spread) < 0.02


@pytest.mark.parametrize("name", VARIANTS)
def test_sdedit_is_the_image_at_strength_0_and_plain_sampling_at_1(name):
    for path in PATHS.values():
        denoise = denoiser(Tiny(), predict="v", clip=True)
        levels = path(100).levels(9)
        (x,) = edit("sdedit(strength=0.0)", name, denoise, levels, pictured())
        assert torch.equal(x, pictured())
        start = initial_noise(levels[0], noises()(0))
        plain = [start, *sampler(name)(denoise, start, levels, noises())]
        walk = edit("sdedit(strength=1.0)", name, denoise, levels, pictured())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(walk, plain, strict=True))


def test_sdedit_begins_at_the_noised_image():
    walk = edit("sdedit(strength=0.6)", "ddim", gaussian, process().levels(1000), pictured())
    noised = process().q_sample(pictured(), torch.tensor([599, 599]), noises()(0))
    torch.testing.assert_close(walk[0], noised, rtol=0, atol=1e-15)  # float64
    assert len(walk) == 1 + 600


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_sdedit_of_the_data_has_the_law_of_the_data(strength):
    n = 20_000
    generator = torch.Generator().manual_seed(0)

    def noise(k):
        return torch.randn((n, 1, 1, 1), generator=generator, dtype=torch.float64)

    images = MEAN + SPREAD * noise(0)
    *_, x = edit(
        f"sdedit(strength={strength})", "ddpm", gaussian, process().levels(400), images, noise=noise
    )
    # five standard errors of 20,000 draws, and 0.005 for finite steps
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(n) + 0.005)
    assert x.std().item() == pytest.approx(SPREAD, abs=5 * SPREAD / math.sqrt(2 * n) + 0.005)


@pytest.mark.parametrize(
    "predict, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_inversion_agrees_with_diffusers(predict, theirs):
    """When the network is asked where we ask it: at the lower end of a step. (Their pipelines
    ask at the upper.)
    """
    reference = DDIMInverseScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type=theirs,
        timestep_spacing="leading",
    )
    reference.set_timesteps(50)
    net = Tiny()
    levels = process().levels(50, "leading")
    denoise = denoiser(net, predict=predict, clip=False)
    x = pictured()
    for k, (t, ours) in enumerate(
        zip(reference.timesteps, invert(denoise, pictured(), levels), strict=True)
    ):
        if k == 0:
            x = ours  # from CLEAN, where their alpha is that of t = 0
        else:
            x = reference.step(net(x, levels[-1 - k].t * torch.ones(1)), t, x).prev_sample
        # x is up to 30: Tiny knows no images
        torch.testing.assert_close(ours, x, rtol=FLOAT32_TABLES, atol=FLOAT32_TABLES)


@pytest.mark.parametrize("path", ["linear", "straight", "exploding"])
@pytest.mark.parametrize("denoise", [gaussian, mixture])
def test_inversion_and_drawing_undo_each_other_to_first_order(denoise, path):
    x = torch.linspace(-0.9, 0.9, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    errors = []
    for steps in (200, 400, 800):
        levels = PATHS[path](10_000).levels(steps, "karras")
        top = last(invert(denoise, x, levels))
        errors.append((last(ddim(denoise, top, levels, noises())) - x).abs().max().item())
    for coarse, fine in pairwise(errors):
        # the rest is of second order, and of the step to CLEAN
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.03  # measured: at most 0.022, where the modes part


@pytest.mark.parametrize("path", PATHS)
def test_inversion_follows_the_flow_to_first_order(path):
    x = torch.linspace(-0.9, 0.9, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    errors = []
    for steps in (200, 400, 800):
        levels = PATHS[path](10_000).levels(steps, "karras")
        errors.append(
            (last(invert(gaussian, x, levels)) - flow_to(x, CLEAN, levels[0])).abs().max().item()
        )
    assert all(
        math.log2(coarse / fine) == pytest.approx(1, abs=0.15) for coarse, fine in pairwise(errors)
    )


def test_inversion_reaches_pure_noise():
    levels = PATHS["pure"](100).levels(20)
    assert levels[0].alpha == 0
    assert torch.isfinite(
        last(invert(denoiser(Tiny(), predict="v", clip=True), pictured(), levels))
    ).all()


def test_slerp_goes_along_the_great_circle():
    a, b = (torch.zeros(5, 1, 2, 2, dtype=torch.float64) for _ in range(2))
    a[:, 0, 0, 0] = 3
    b[:, 0, 1, 1] = 3
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    x = slerp(a, b, share)
    angle = share * math.pi / 2
    torch.testing.assert_close(x[:, 0, 0, 0], 3 * angle.cos())
    torch.testing.assert_close(x[:, 0, 1, 1], 3 * angle.sin())
    assert torch.equal(x[0], a[0]) and torch.equal(x[-1], b[-1])
    left = noises((5, 3, 4, 4))(0)
    right = noises((5, 3, 4, 4))(1)
    ends = slerp(left, right, share)
    assert torch.equal(ends[0], left[0]) and torch.equal(ends[-1], right[-1])
    # where the circle is a point
    torch.testing.assert_close(slerp(left, left, share), left, rtol=1e-6, atol=0)
    assert torch.equal(slerp(0 * left, 0 * left, share), 0 * left)


def test_interpolation_ends_at_the_two_images():
    pair = [pictured(k).expand(SHAPE)[:1].repeat(5, 1, 1, 1) for k in (100, 101)]
    levels = process().levels(400, "karras")
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    *_, x = edit("interpolate", "ddim", gaussian, levels, *pair, share=share)
    for end, image in ((0, pair[0]), (-1, pair[1])):
        *_, alone = edit("invert", "ddim", gaussian, levels, image)
        torch.testing.assert_close(x[end], alone[end], rtol=0, atol=1e-12)  # float64: the same walk
        # the error of inversion at these steps, of images 2 apart
        assert (x[end] - image[end]).abs().max() < 0.02
    assert (x[2] - pair[0][0]).abs().max() > 0.1


def test_a_network_that_sees_its_own_estimate_takes_none_over_from_another_walk():
    levels = process("cosine").levels(8)
    share = torch.linspace(0, 1, 2, dtype=torch.float64)
    tiny_net = Tiny()
    images = [pictured(k)[:1].repeat(2, 1, 1, 1) for k in (100, 101)]

    def fresh():
        return denoiser(
            lambda x, t, y: tiny_net(x[:, :3] + x[:, 3:], t),
            predict="v",
            clip=True,
            self_condition=True,
        )

    *_, between = get_edit("interpolate").walk(
        ddim, fresh, levels, noises(), EditInput(tuple(images), None, share)
    )
    for end, image in enumerate(images):
        *_, alone = get_edit("invert").walk(ddim, fresh, levels, noises(), EditInput((image,)))
        torch.testing.assert_close(between[end], alone[end], rtol=0, atol=1e-9)  # float64


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("text", EDITS)
def test_every_edit_with_every_sampler_is_made_or_refused_in_a_line(text, name):
    levels = process().levels(14)
    made = get_edit(text)
    net = Tiny()
    stochastic = name in ("ddpm", "euler_ancestral") or "_sde" in name or "churn" in name
    refused = {"inpaint": name not in [way.__name__ for way in STEPWISE], "sdedit": False}.get(
        text, stochastic
    )
    if refused:
        with pytest.raises(
            ValueError, match=f"sampler '{name.partition('(')[0]}' .*; use ddpm|; use ddim"
        ) as mistake:
            visited_levels(made, sampler(name), levels)
        assert "\n" not in str(mistake.value)
        return
    times = []

    def counted(x, t, y=None):
        times.append(t[0].item())
        return net(x, t)

    walk = edit(
        text,
        name,
        denoiser(counted, predict="v", clip=True),
        levels,
        *[pictured(k) for k in range(made.images)],
        mask=HALF,
        share=torch.tensor([0.3, 0.6]),
    )
    assert times == pytest.approx(
        [level.t for level in visited_levels(made, sampler(name), levels)]
    )
    assert all(x.shape == SHAPE and torch.isfinite(x).all() for x in walk)


@pytest.mark.parametrize(
    "text, steps, remedy",
    [
        ("inpaint(resamplings=0)", 25, "1 or more"),
        ("inpaint(jump_length=-1)", 25, "1 or more"),
        ("inpaint(jump=3)", 25, "it accepts jump_length, resamplings"),
        ("inpaint", 10, "give more steps, or inpaint(jump_length=9)"),
        ("sdedit(strength=1.1)", 25, "from 0"),
        ("outpaint", 25, "did you mean 'inpaint'?"),
    ],
)
def test_mistakes_name_the_remedy(text, steps, remedy):
    with pytest.raises(ValueError) as mistake:
        visited_levels(get_edit(text), partial(ddim), process().levels(steps))
    assert remedy in str(mistake.value) and "\n" not in str(mistake.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny(sample__sampler="ddim", sample__steps=12), folder)
    return folder


def picture(path, width, height, seed=0):
    """A picture of grey noise, and its pixels [h, w]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mask_file(path, width, height):
    """A picture that is white on the right."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    Image.fromarray(pixels).save(path)


def read(path):
    return np.asarray(Image.open(path))


def test_inpainting_through_the_command(trained, tmp_path):
    pixels = picture(tmp_path / "image.png", 16, 16)
    mask_file(tmp_path / "mask.png", 32, 32)
    code, out, err = run_ddpm(
        "generate",
        f"--checkpoint={trained}",
        "--edit=inpaint(jump_length=4, resamplings=2)",
        f"--image={tmp_path}/image.png",
        f"--mask={tmp_path}/mask.png",
        "--num_images=5",
        "--seed=3",
        f"--out={tmp_path}/out",
        "--device=cpu",
        cwd=tmp_path,
    )
    assert code == 0 and not err, err
    assert "painting 50.0% of the picture" in out
    # 12, and 4 again after jumps to 5 and 9 steps left
    assert "20 network evaluations" in out[0] and "grid.png" in out[-1]
    results = [read(tmp_path / "out" / f"{k:06d}.png") for k in range(5)]
    # to the bit, in the file
    assert all(np.array_equal(result[:, :8], pixels[:, :8]) for result in results)
    assert len({result.tobytes() for result in results}) == 5
    grid = read(tmp_path / "out" / "grid.png")  # 7 cells of 16 and 2 pixels between them, 3 a row
    assert grid.shape == (56, 56) and np.array_equal(grid[2:18, 2:18], pixels)
    assert np.array_equal(grid[2:18, 20:28], pixels[:, :8]) and (grid[2:18, 28:36] == 127).all()
    assert np.array_equal(grid[2:18, 38:54], results[0])


@pytest.mark.parametrize(
    "mode, kind", [("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"), ("RGBA", "tiff")]
)
def test_what_is_transparent_in_a_mask_is_not_masked(tmp_path, mode, kind):
    """As a paint program saves the layer of a mask: white where something is painted,
    transparent white elsewhere.
    """
    picture(tmp_path / "image.png", 16, 16)
    right = np.zeros((16, 16), bool)
    right[:, 12:] = True
    if mode == "P":
        # 0 is the transparent entry; both are white
        layer = Image.fromarray(right.astype(np.uint8), "P")
        layer.putpalette([255] * 6)
        layer.save(tmp_path / f"mask.{kind}", transparency=0)
    else:
        colours = Image.new(mode[:-1], (16, 16), 255 if mode == "LA" else (255, 255, 255))
        colours.putalpha(Image.fromarray(np.uint8(255 * right)))
        colours.save(
            tmp_path / f"mask.{kind}",
            **({"lossless": True, "exact": True} if kind == "webp" else {}),
        )
    _, area, _ = drawing.pictures(tiny(), [tmp_path / "image.png"], tmp_path / f"mask.{kind}")
    assert np.array_equal(area.numpy(), right)
    assert masked_words("mask", area) == ["painting 25.0% of the picture"]
    assert masked_words("mask", area | True)[0].startswith(
        "warning: mask 'mask' is white everywhere, so nothing of"
    )


def test_an_edit_is_the_same_image_however_many_are_drawn(trained, tmp_path):
    picture(tmp_path / "image.png", 20, 30)
    few, many = (
        edit_images(
            trained,
            "sdedit",
            tmp_path / "image.png",
            tmp_path / f"{n}",
            num_images=n,
            **{"sample.batch_size": 2},
        )
        for n in (2, 4)
    )
    assert [path.name for path in few] == ["000000.png", "000001.png", "grid.png"]
    assert all(np.array_equal(read(a), read(b)) for a, b in zip(few[:2], many, strict=False))


def test_strength_through_the_command_is_the_picture_or_plain_sampling(trained, tmp_path):
    photo = picture(tmp_path / "image.png", 50, 40)
    Image.fromarray(photo).save(tmp_path / "image.png")
    kept = edit_images(
        trained, "sdedit(strength=0.0)", [tmp_path / "image.png"], tmp_path / "kept", num_images=2
    )
    as_training = decode.decode_file(tmp_path / "image.png", 16, 1)[0].numpy()
    assert all(np.array_equal(read(path), as_training) for path in kept[:2])
    fresh = edit_images(
        trained, "sdedit(strength=1.0)", [tmp_path / "image.png"], tmp_path / "fresh", num_images=2
    )
    for ours, theirs in zip(
        fresh[:2], generate_images(trained, 2, tmp_path / "plain"), strict=True
    ):
        assert np.array_equal(read(ours), read(theirs))


def test_inversion_and_interpolation_through_the_command(trained, tmp_path):
    for k in range(2):
        picture(tmp_path / f"{k}.png", 16, 16, seed=k)
    alone = edit_images(trained, "invert", tmp_path / "0.png", tmp_path / "alone", format="grid")
    assert [path.name for path in alone] == ["grid.png"] and read(alone[0]).shape == (20, 38)
    code, out, err = run_ddpm(
        "generate",
        f"--checkpoint={trained}",
        "--edit=interpolate",
        f"--image={tmp_path}/0.png",
        f"--image={tmp_path}/1.png",
        "--num_images=3",
        f"--out={tmp_path}/row",
        "--device=cpu",
        cwd=tmp_path,
    )
    assert code == 0 and not err, err
    row = read(tmp_path / "row" / "grid.png")  # the images at its ends
    assert row.shape == (20, 92)
    for k, left in ((0, 2), (1, 74)):
        assert np.array_equal(row[2:18, left : left + 16], read(tmp_path / f"{k}.png"))
    # the same walk at another batch shape, which rounds otherwise: within one of 255
    assert np.abs(row[2:18, 20:36].astype(int) - read(alone[0])[2:18, 20:36]).max() <= 1
    film = edit_images(trained, "invert", tmp_path / "0.png", tmp_path / "film", format="gif")
    assert Image.open(film[0]).n_frames > 12 and film[1].name == "grid.png"


def test_pictures_are_edited_as_the_classes_that_are_asked_for():
    classes = {"data__class_labels": True, "data__classes": ("cat", "dog")}
    assert (
        build.edit_recipe(tiny(**classes)).labels == [] and build.edit_recipe(tiny()).labels == []
    )
    recipe = build.edit_recipe(tiny(**classes, sample__classes=("dog",), sample__guidance=2.0))
    assert recipe.labels == [1] and recipe.guidance == 2.0
    with pytest.raises(ValueError, match="write --classes=cat"):
        build.edit_recipe(tiny(**classes, train__label_dropout=0.0))
    with pytest.raises(ValueError, match="write --classes=, or --guidance=1"):
        build.edit_recipe(tiny(**classes, sample__guidance=2.0))


def test_mistakes_are_one_line(trained, tmp_path):
    picture(tmp_path / "a.png", 16, 16)
    picture(tmp_path / "wide.png", 20, 16)
    mask_file(tmp_path / "m.png", 16, 16)
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    Image.new("RGBA", (16, 16), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    (tmp_path / "text.png").write_text("no picture")
    image = f"--image={tmp_path}/a.png"
    mask = f"--mask={tmp_path}/m.png"
    for given, remedy in [
        ([image], "write --edit="),
        (["--edit=inpaint", mask], "takes 1 image, not 0; write --image=PATH"),
        (["--edit=interpolate", image], "takes 2 images, not 1; write --image=PATH --image=PATH"),
        (["--edit=inpaint", image], "write --mask=PATH"),
        (["--edit=sdedit", image, mask], "leave out --mask"),
        (["--edit=invert", image, "--num_images=2"], "leave out --num_images"),
        (["--edit=inpaint", image, f"--mask={tmp_path}/none.png"], "there is no file"),
        (["--edit=sdedit", f"--image={tmp_path}/text.png"], "cannot read"),
        (["--edit=sdedit", f"--image={tmp_path}"], "cannot read"),
        (["--edit=inpaint", f"--image={tmp_path}/wide.png", mask], "is 16x16 and the image 20x16"),
        (["--edit=inpaint", image, f"--mask={tmp_path}/black.png"], "has nothing white"),
        (
            ["--edit=inpaint", image, f"--mask={tmp_path}/clear.png"],
            "black or transparent elsewhere",
        ),
        (
            ["--edit=inpaint(jump_length=4)", image, mask, "--sampler=heun"],
            "use ddpm, ddim, euler, euler_ancestral",
        ),
        (["--edit=invert", image, "--sampler=ddpm"], "use ddim, euler"),
        (["--edit=inpaint", image, mask, "--steps=8"], "give more steps"),
    ]:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in given)
        with pytest.raises(ValueError) as mistake:
            if "edit" not in flags:
                raise ValueError(
                    run_ddpm("generate", f"--checkpoint={trained}", *given, cwd=tmp_path)[2][0]
                )
            edit_images(
                trained,
                flags["edit"],
                [flags["image"]] if "image" in flags else [],
                tmp_path / "out",
                flags.get("mask"),
                int(flags["num_images"]) if "num_images" in flags else None,
                "cpu",
                **{
                    "sample.sampler": flags.get("sampler"),
                    "sample.steps": int(flags.get("steps", 12)),
                },
            )
        assert remedy in str(mistake.value) and "\n" not in str(mistake.value), given
    assert not (tmp_path / "out").exists()

"""Three trainings of nearly one network, each in its own loop: `train(steps)` with images at hand,
`draw(count, steps)`.

The loops of others are theirs as released; what is left out of them is said beside it. All take the
same pixels, uint8 [b, c, h, w], from memory. Others are imported where they are run, so that a
report asks for none of them.
"""

import contextlib
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm import convert
from ddpm.common.pixels import encode
from ddpm.config import defaults, files
from ddpm.experiment import build, cost, trainer
from ddpm.experiment import drawing as experiment_drawing
from ddpm.runtime import device
from ddpm.sampling.draw import concatenate
from ddpm.tracking.tracker import Tracker
from ddpm.training import weights

QUIET = {  # of a training: nothing but its steps
    "train.length": "1000000 steps",
    "evaluate.extractor": "none",
    "wandb.mode": "disabled",
    **{f"every.{name}": "0 steps" for name in defaults.base().every},
}


class Task(NamedTuple):
    """What is trained: a config of ours, and the arguments of denoising-diffusion-pytorch's Unet
    that come nearest to it.
    """

    config: defaults.FrozenConfigDict
    dim: int
    dim_mults: tuple
    folder: Path  # for what is written
    photos: Path  # a folder of images of the config's size
    pixels: torch.Tensor  # uint8 [b, c, h, w], a batch of them
    amp: str = "off"  # off, bf16, fp16
    compiled: bool = False
    channels_last: bool = False


def flops(make, shape):
    """Operations that a network from `make()` spends on one image [c, h, w], forward and
    backward; nothing is computed.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        out = make()(torch.empty(1, *shape), torch.zeros(1, dtype=torch.long))
        getattr(out, "sample", out).sum().backward()
    return counter.get_total_flops()


def count(net):
    return sum(weight.numel() for weight in net.parameters())


class Ours:
    """`assemble.run`'s own step; `self.made` is that training."""

    def __init__(self, task):
        self.task = task
        self.done = 0
        section = {
            "data.source": f"folder(path={str(task.photos)!r})",
            "data.cache": str(task.folder / "cache"),
            "data.num_workers": 0,
            "train.batch_size": len(task.pixels),
            "train.amp": task.amp,
            "train.compile": task.compiled,
            "train.channels_last": task.channels_last,
        }
        self.config = files.changed(task.config, QUIET | section)
        self.made = trainer.build_trainer(
            self.config, task.folder / "ours", device.start(task.amp), tracker=Tracker()
        )
        self.net = self.made.step.net
        self.machine = self.made.machine
        self.parameters = count(self.net)
        self.flops = cost.count_flops(task.config).training
        self.batch = task.pixels, torch.full((len(task.pixels),), -1)

    def train(self, steps):
        for number in range(self.done, self.done + steps):
            self.made.step(number, self.batch)
        self.done += steps

    def draw(self, count, steps, sampler):
        recipe = build.grid_recipe(self.config)._replace(
            sampler=sampler, steps=steps, batch_size=count
        )
        return concatenate(
            experiment_drawing.drawer(self.config, self.net, self.machine)(range(count), recipe)
        )


class Diffusers:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py with
    --use_ema, and its settings.

    Accelerate, which on one device does nothing but autocast and scale, is left out, and so is the
    progress bar. The network is ours, through ddpm.convert.
    """

    def __init__(self, task):
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        source = task.folder / "network.safetensors"
        folder = task.folder / "diffusers"
        if not folder.exists():
            net = build.network(task.config)
            weights.export(source, net.state_dict(), 0, files.to_json(task.config))
            convert.convert(source, folder)
        machine = device.start(task.amp)
        # in mapped memory, which a count of memory would miss
        theirs = UNet2DModel.from_pretrained(folder, subfolder="unet")
        layout = torch.channels_last if task.channels_last else torch.contiguous_format
        self.net = UNet2DModel.from_config(theirs.config).to(machine.device, memory_format=layout)
        self.net.load_state_dict(theirs.state_dict())
        self.wrapped = torch.compile(self.net) if task.compiled else self.net
        self.parameters = count(self.net)
        self.flops = flops(lambda: UNet2DModel.from_config(self.net.config), task.pixels.shape[1:])
        self.autocast = machine.autocast
        self.scaler = machine.scaler()
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=500, num_training_steps=1000000
        )
        self.ema = EMAModel(
            self.net.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=self.net.config,
        )
        self.images = encode(task.pixels)

    def train(self, steps):
        self.net.train()
        for _ in range(steps):
            clean = self.images.to(self.net.device)
            noise = torch.randn(clean.shape, device=clean.device)
            t = torch.randint(0, 1000, (len(clean),), device=clean.device)
            noisy = self.scheduler.add_noise(clean, noise, t)
            with self.autocast():
                out = self.wrapped(noisy, t).sample
            loss = F.mse_loss(out.float(), noise.float())
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.rate.step()
            self.optimizer.zero_grad()
            self.ema.step(self.net.parameters())
            loss.detach().item()  # for the log, at every step

    def draw(self, count, steps, sampler):
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        pipeline, scheduler = {
            "ddpm": (DDPMPipeline, DDPMScheduler),
            "ddim": (DDIMPipeline, DDIMScheduler),
        }[sampler]
        drawing = pipeline(
            self.net.eval(), scheduler(num_train_timesteps=1000, beta_schedule="linear")
        )
        with muted():
            return drawing(batch_size=count, num_inference_steps=steps, output_type="np").images


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's Trainer.train with its defaults, but for the size of the
    batch and where images lie.
    """

    def __init__(self, task):
        from accelerate.state import AcceleratorState
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

        channels, size = task.pixels.shape[1:3]

        def make():
            return Unet(
                task.dim,
                dim_mults=task.dim_mults,
                channels=channels,
                dropout=task.config.model.dropout,
            )

        self.net = make()
        self.parameters = count(self.net)
        self.flops = flops(make, task.pixels.shape[1:])
        # else all trainers of a process have the first one's type
        AcceleratorState._reset_state(reset_partial_state=True)
        with muted():
            self.trainer = Trainer(
                GaussianDiffusion(self.net, image_size=size),
                task.photos,
                train_batch_size=len(task.pixels),
                train_num_steps=0,
                save_and_sample_every=10**9,
                calculate_fid=False,
                amp=task.amp != "off",
                mixed_precision_type=task.amp if task.amp != "off" else "fp16",
                results_folder=task.folder / "results",
            )
        self.trainer.dl = itertools.repeat(task.pixels.float() / 255)

    def train(self, steps):
        self.trainer.train_num_steps = self.trainer.step + steps
        with muted():
            self.trainer.train()

    def draw(self, count, steps, sampler):
        from denoising_diffusion_pytorch import GaussianDiffusion

        assert sampler == "ddim"  # its other one takes all T steps
        drawing = GaussianDiffusion(
            self.net.eval(), image_size=self.trainer.image_size, sampling_timesteps=steps
        )
        with muted():
            return drawing.to(self.trainer.device).sample(count)


@contextlib.contextmanager
def muted():
    """What is printed inside goes nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


CONTENDERS = {  # in the order of the tables
    "ddpm": Ours,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusion,
}

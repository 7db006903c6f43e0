"""The table of architectures: name -> constructor of a `net(x, t, y) -> out`; its arguments are the config's."""

from ddpm.models.unet import UNet

MODELS = {"unet": UNet}

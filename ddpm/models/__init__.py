"""The table of architectures: name -> constructor of a `net(x, t, y) -> out`.

Its keyword-only arguments are the options of its name, "dit(size='S')"; of the others it gets those
that the config's section `model` has.
"""

from ddpm.models.dit import DiT
from ddpm.models.unet import UNet
from ddpm.models.unet_edm2 import UNetEDM2

MODELS = {
    "unet": UNet,
    "unet_edm2": UNetEDM2,
    "dit": DiT,
}

"""The config of a run: `base()` has every option; files in configs/ change some of them.

Config files need two names, which stand here: `from ddpm.config import base, with_variant`.
"""

from ddpm.config.defaults import base, with_variant

__all__ = ["base", "with_variant"]

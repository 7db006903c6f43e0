"""The quick look: `python -m ddpm.sample --checkpoint=RUN_OR_FILE --out=grid.png --num_samples=64` draws one grid."""

from absl import flags

from ddpm import build, command, images
from ddpm.draw import joined


def sample_from_checkpoint(ckpt_path, out_path, num_samples=16, device=None, **knobs):
    """Draw a grid of `num_samples` images from a run folder or checkpoint file into the picture `out_path`.

    `knobs` as in `{"sample.steps": 25}` take the place of the checkpoint's own. Raises ValueError, one line, for a missing or
    damaged checkpoint, and for a picture format that is not known.
    """
    images.check_picture(out_path)
    _, _, trained, machine, net = build.load(ckpt_path, device, **knobs)
    drawn = build.drawer(trained, net, machine)(range(num_samples), build.grid_recipe(trained))
    images.save_image_grid(joined(drawn), out_path)


def main():
    """Draw what the flags say; returns the exit code."""
    given = flags.FLAGS
    sample_from_checkpoint(given.checkpoint, given.out, given.num_samples, given.device, **command.sample_knobs("sample"))
    print(f"wrote {given.out}")
    return command.DONE


if __name__ == "__main__":
    command.define_checkpoint_flags()
    flags.DEFINE_integer("num_samples", 16, "How many images.", lower_bound=1)
    flags.DEFINE_string("out", "samples.png", "The picture: png, jpg or webp.")
    flags.adopt_module_key_flags(command)
    command.run_door(main)

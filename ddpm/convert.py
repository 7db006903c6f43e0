"""Exchange weights with others: `python -m ddpm.convert SOURCE --out=DEST`; what SOURCE is decides
the direction.

    a diffusers folder, a UNet2DModel and its DDPMScheduler -> a checkpoint: DEST.safetensors, or
                                                               DEST/final.safetensors
    OpenAI's weights, guided- or improved-diffusion (.pt)   -> the same; FLAGS say what shapes do
                                                               not, --num_heads=4 ...
    a run folder or checkpoint of ours                      -> a diffusers folder, for
                                                               DDPMPipeline.from_pretrained

The network's output stays the same; an option without a counterpart is an error that names it. The
other codebases need not be installed.

Labels stay the same too. For no label our network adds zero, others look up one more row. So a
network trained with label dropout is exported with a last row of zeros, and for an import
--no_label=10 names that row; it is added to the preceding bias and subtracted from the other rows,
which makes the same network.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags
from ddpm.interop import OPENAI_FLAGS

if __name__ == "__main__":
    HELP = "The folder, or the .safetensors file, to write."
    flags.DEFINE_string("out", None, HELP, required=True)
    HELP = "Names for the classes of an imported network, in order; by default their numbers."
    flags.DEFINE_list("classes", None, HELP)
    HELP = "The label that means none in an imported network; guidance needs it."
    flags.DEFINE_integer("no_label", None, HELP)
    for flag, (define, example) in OPENAI_FLAGS.items():
        define(flag, None, f"For weights of OpenAI, as they were trained: {example}.")
    config_flags.read_command_line(
        takes="a diffusers folder, a file of OpenAI's weights, or a run or checkpoint of ddpm"
    )

from pathlib import Path

from ddpm.common import errors
from ddpm.common.files import atomic_folder
from ddpm.config import files
from ddpm.interop import diffusers, openai
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights

# by which reading a damaged or strange file fails
DAMAGE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ArithmeticError)


def convert(source, out, classes=None, no_label=None, **theirs):
    """Convert `source` into `out` as above; returns the path that was written.

    `classes` names the classes of an imported network, by default their numbers; `no_label` is its
    label for "none"; `theirs` are OpenAI's flags. Raises ValueError for damaged files, options
    without a counterpart, and an `out` that exists.
    """
    source = Path(source)
    out = Path(out)
    given = {flag: value for flag, value in theirs.items() if value is not None}
    labels = {"classes": tuple(classes)} if classes else {}
    if no_label is not None:
        labels["no_label"] = no_label
    if out.exists():
        raise ValueError(f"{out} is there already; give another --out, or remove it")
    tensors = diffusers.read_tensors(source) if source.is_file() else {}
    is_openai = "input_blocks.0.0.weight" in tensors
    if given and not is_openai:
        fault = f"is for weights of OpenAI, which {source} does not hold; leave it out"
        raise ValueError(f"--{min(given)} {fault}")
    if "conv_in.weight" in tensors:
        remedy = "give the folder, which has its configs too"
        raise ValueError(f"{source} is one file of a diffusers model; {remedy}")
    if not is_openai and not diffusers.is_model(source):
        if labels:
            fault = f"is for a network of others, and {checkpoint.find(source)} is one of ddpm"
            raise ValueError(f"--{min(labels)} {fault}; leave it out")
        return diffusers.to_diffusers(source, out)
    try:
        if is_openai:
            config, weights = openai.from_openai(source, tensors, given, labels)
        else:
            config, weights = diffusers.from_diffusers(source, labels)
    except DAMAGE as error:
        fault = "is damaged, or not a U-Net that ddpm knows"
        raise ValueError(f"{source} {fault}: {errors.one_line(error)}") from error
    text = files.to_json(config)
    if out.suffix == ".safetensors":
        training_weights.export(out, weights, 0, text)
        return out
    with atomic_folder(out) as folder:
        training_weights.export(folder / "final.safetensors", weights, 0, text)
    return out / "final.safetensors"


def main(arguments):
    """Convert what the command line names; returns the exit code."""
    if len(arguments) > 1:
        raise ValueError(f"one source at a time; leave out {arguments[1]}")
    given = {flag: getattr(flags.FLAGS, flag) for flag in (*OPENAI_FLAGS, "classes", "no_label")}
    print(f"wrote {convert(arguments[0], flags.FLAGS.out, **given)}")
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)

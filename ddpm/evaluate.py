"""Measure a checkpoint: `python -m ddpm.evaluate --checkpoint=RUN_OR_FILE`, the numbers that a training logs."""

from absl import flags

from ddpm import build, command


def evaluate(checkpoint_path, device=None, **knobs):
    """Draw images from a run folder or checkpoint file and measure them against its data; returns {"eval/fid": ...}.

    `knobs` as in `{"evaluate.num_samples": 5000}` take the place of the checkpoint's own. Raises ValueError, one line, for a
    missing checkpoint, data or extractor.
    """
    name, trained, machine, net = build.load(checkpoint_path, device, **knobs)
    measure = build.scorer(trained, build.dataset(trained), machine)
    print(f"measuring {name}: {measure.made}")
    return measure(build.drawer(trained, net, machine))


def main():
    """Measure what the flags say and print a line for each number; returns the exit code."""
    given = flags.FLAGS
    knobs = command.sample_knobs("evaluate") | {
        "evaluate.num_samples": given.num_samples, "evaluate.extractor": given.extractor,
        "evaluate.inception_weights": given.inception_weights, "data.source": given.source}
    for name, value in evaluate(given.checkpoint, given.device, **knobs).items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    return command.DONE


if __name__ == "__main__":
    command.define_checkpoint_flags()
    flags.DEFINE_integer("num_samples", None, "Images drawn; by default the checkpoint's.", lower_bound=4)
    flags.DEFINE_string("extractor", None, "auto, digits or inception; by default the checkpoint's.")
    flags.DEFINE_string("inception_weights", None, "Path of torch-fidelity's Inception weights; by default the checkpoint's.")
    flags.DEFINE_string("source", None, "The real images, where they lie elsewhere now: folder(path='data/cats'), ...")
    flags.adopt_module_key_flags(command)
    command.run_door(main)

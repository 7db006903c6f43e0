"""Run a study on this machine, without a server: `python -m ddpm.sweep experiments/NAME.yaml
[--parallel=2]`.

Each run is a process of its own, in `runs/NAME/RUN`. The same command again skips finished runs and
continues the others. Exit codes: 0 all done, 1 some are not, 2 usage error, 75 interrupted (the
same command continues).
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

if __name__ == "__main__":
    flags.DEFINE_integer("parallel", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_string("runs", "runs", "Folder in which the study has one of its own.")
    HELP = "Runs, at most; by default the study's run_cap, or its whole grid."
    flags.DEFINE_integer("count", None, HELP, lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of what random and bayes choose.", lower_bound=0)
    config_flags.read_command_line(takes="experiments/NAME.yaml")

from ddpm.studies import runner
from ddpm.studies.study import read_study


def main(arguments):
    """Run the study that the command line names; returns the exit code."""
    given = flags.FLAGS
    if len(arguments) > 1:
        raise ValueError(f"one study at a time; leave out {arguments[1]}")
    study = read_study(arguments[0])
    count = given.count or study.run_cap
    if count is None and study.method != "grid":
        remedy = "give --count=20, or set run_cap in the file"
        raise ValueError(f"{study.path}: method {study.method} has no end of its own; {remedy}")
    return runner.sweep(study, study.folder(given.runs), given.parallel, count, given.seed)


if __name__ == "__main__":
    config_flags.run_command(main)

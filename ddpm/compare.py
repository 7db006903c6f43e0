"""Compare runs: `python -m ddpm.compare experiments/NAME.yaml`, or run folders, or a W&B path.

The runs of a study are read from runs/NAME or, where that is missing, from the copies of its
report. The report is written to experiments/NAME: README.md, results.csv, figures, and below runs/
copies of what it is made from. Other runs are compared on the terminal and, with --out=DIR, in a
folder. Exit codes: 0 done, with a line for each run that is left out, 2 usage error or nothing to
compare.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

if __name__ == "__main__":
    HELP = "Folder above the study's folder, or the study's folder, or a W&B path; by default runs."
    flags.DEFINE_string("runs", None, HELP)
    HELP = "Folder of the report; by default experiments/NAME for a study, none for other runs."
    flags.DEFINE_string("out", None, HELP)
    HELP = "Class of the machine that made the runs, '2 CPU cores'; by default this one's."
    flags.DEFINE_string("machine", None, HELP)
    config_flags.read_command_line(
        takes="experiments/NAME.yaml, run folders, or a W&B path such as entity/project/sweep"
    )

from ddpm.common import errors
from ddpm.studies import archive


def main(arguments):
    """Compare what the flags say; returns the exit code."""
    given = flags.FLAGS
    archive.compare(*arguments, runs=given.runs, out=given.out, machine=given.machine)
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)

"""The numbers of an evaluation, before and after issue 16: `OMP_NUM_THREADS=2
OMP_WAIT_POLICY=PASSIVE python experiments/evaluation_speed/measure.py`.

About five minutes on two CPU cores. Both versions of `ddpm/evaluation/distances.py`, the older one
from git, compute all numbers of the same features in turn, in one process. Writes results.json, and
from it README.md; `--report` does the latter alone. `--stages=kept,each,perfect` measures some.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from ddpm.common.files import atomic_write
from ddpm.evaluation import distances, extractors, reference
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.tables import markdown

HERE = Path(__file__).parent
BEFORE = "3a836ad"  # the commit before
IMAGES, FEATURES = 5000, 2048
HELD_OUT = 500  # of the real images
ROUNDS = {"kept": 3, "each": 3, "perfect": 1}
EXTRACTOR = extractors.Extractor(
    "synthetic", extractors.INCEPTION_METRICS, FEATURES, torch.device("cpu"), None
)


def features(seed, scale=1.0):
    """Features that are not negative and whose variances fall by a power law, as Inception's do."""
    mixing = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))
    mixing *= torch.arange(1, FEATURES + 1) ** -0.7
    normal = torch.randn(IMAGES, FEATURES, generator=torch.Generator().manual_seed(seed))
    return (scale * (0.3 * normal @ mixing.T + 0.3)).relu()


class Before:
    """The distances of the commit before."""

    def __init__(self, real, moments):
        text = subprocess.check_output(
            ["git", "show", f"{BEFORE}:ddpm/evaluation/distances.py"], cwd=HERE, text=True
        )
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write(text)
            file.flush()
            spec = importlib.util.spec_from_file_location("before", file.name)
            self.module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
        self.real = reference.Reference(real, moments, "")

    def kept(self):
        """What is computed of the real images alone, but for the perfect generator."""
        features = self.real.features
        self.unseen = self.module.nearest(features[:HELD_OUT], features[HELD_OUT:])[0]

    def each(self, drawn):
        """The numbers of one evaluation."""
        numbers = self.module.compare(drawn, self.real, EXTRACTOR)
        closest, _ = self.module.nearest(drawn, self.real.features[HELD_OUT:])
        return numbers | self.module.copying(closest, self.unseen)

    def perfect(self):
        """The Frechet distance of a perfect generator and its standard deviation."""
        return self.module.fid_of_reference_resample(self.real, IMAGES)


class After:
    """The distances of this tree."""

    def __init__(self, real, moments):
        self.real = reference.Reference(real, moments, "")
        self.sums = {}
        distances.cached = self.cached

    def cached(self, reference, key, measure):
        """`distances.cached` in memory."""
        if key not in self.sums:
            self.sums[key] = measure()
        return self.sums[key]

    def kept(self):
        features = self.real.features
        self.real = reference.Reference.of(features, "", self.real.moments)
        self.unseen = distances.nearest(features[:HELD_OUT], features[HELD_OUT:])[0]
        self.sums.clear()
        distances.compare(features[:4], self.real, EXTRACTOR)

    def each(self, drawn):
        numbers, closest, _ = distances.compare(
            drawn, self.real, EXTRACTOR, left_out=torch.arange(IMAGES) < HELD_OUT
        )
        return numbers | distances.copying(closest, self.unseen)

    def perfect(self):
        return distances.fid_of_reference_resample(self.real, IMAGES)


def timed(work, *arguments):
    """(Result, [wall seconds, CPU seconds]) of some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(*arguments)
    return result, [time.perf_counter() - wall, time.process_time() - cpu]


def measure(stages):
    """The content of results.json."""
    drawn, real = features(1, 1.02), features(2)
    moments = distances.Moments.of(real)
    versions = {"before": Before(real, moments), "after": After(real, moments)}
    numbers = {}
    seconds = {stage: {name: [] for name in versions} for stage in stages}
    for stage in stages:
        for _ in range(ROUNDS[stage]):
            for name, version in versions.items():
                work = getattr(version, stage)
                result, spent = timed(work, drawn) if stage == "each" else timed(work)
                seconds[stage][name].append(spent)
                print(stage, name, *(f"{value:.2f}" for value in spent), flush=True)
                if stage == "each":
                    numbers[name] = result
                elif stage == "perfect":
                    perfect = dict(zip(("fid_perfect", "fid_perfect_sd"), result, strict=True))
                    numbers.setdefault(name, {}).update(perfect)
        if stage == "kept":
            versions["after"].each(drawn)  # keeps the kernel sums of the real images
    return {
        "commit": commit(),
        "before": BEFORE,
        "machine": this_machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "numbers": numbers,
    }


def row(title, stage):
    """A line of the table: median seconds, and the ratio with its least and most over rounds."""
    cells = [title]
    for place in (0, 1):  # wall, CPU
        sides = [[spent[place] for spent in stage[name]] for name in ("before", "after")]
        ratios = sorted(first / second for first, second in zip(*sides, strict=True))
        cells += [f"{statistics.median(side):.1f}" for side in sides]
        spread = f" ({ratios[0]:.2g} to {ratios[-1]:.2g})" if len(ratios) > 1 else ""
        cells.append(f"{statistics.median(ratios):.2g}{spread}")
    return cells


def report(results):
    """The text of README.md."""
    seconds = results["seconds"]
    titles = ["", "before, s", "after, s", "ratio", "before, CPU s", "after, CPU s", "CPU ratio"]
    stages = {
        "each": "each evaluation",
        "kept": "once: the real images' radii, root, kernel sums, held-out distances",
        "perfect": "once: FID of a perfect generator, ten draws",
    }
    rows = [row(title, seconds[stage]) for stage, title in stages.items() if stage in seconds]
    before, after = (results["numbers"].get(name, {}) for name in ("before", "after"))
    apart = [[key, f"{before[key]:.9g}", f"{after[key]:.9g}"] for key in after]
    compared = markdown([["number", "before", "after"], *apart]) + "\n\n" if apart else ""
    return f"""# The numbers of an evaluation: how fast

**Question.** How long do the numbers of an evaluation take for {IMAGES:,} drawn against {IMAGES:,} real images in Inception's
{FEATURES:,} features, before and after they were computed in blocks, with what the real images alone decide kept in the cache?

**Answer.** On a CPU an evaluation takes 1 / {rows[0][6].split()[0]} of the CPU time: FID, KID, precision, recall and copying. The FID of a
perfect generator was and is computed once and cached. Not measured on a GPU.

{markdown([titles, *rows])}

Medians over {ROUNDS["each"]} rounds. Before and after alternate in one process beside other work, so that wall time says little; the least
and the most of the rounds stand behind each ratio. The features are synthetic: drawn by a power law of variances; {HELD_OUT}
real ones are held out. Extracting features is not included.

{compared}`OMP_NUM_THREADS={results["threads"]} OMP_WAIT_POLICY=PASSIVE python experiments/evaluation_speed/measure.py`, commit
{results["commit"]} against {results["before"]}, {results["machine"]}, torch {results["torch"]}.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write README.md alone")
    parser.add_argument("--stages", default=",".join(ROUNDS), help="what to measure")
    path = HERE / "results.json"
    given = parser.parse_args()
    if not given.report:
        results = measure(given.stages.split(","))
        with atomic_write(path) as part:
            part.write_text(json.dumps(results, indent=1) + "\n")
    with atomic_write(HERE / "README.md") as part:
        part.write_text(report(json.loads(path.read_text())))


if __name__ == "__main__":
    main()

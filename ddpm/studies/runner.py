"""Runs the trials of a study on this machine, several at a time, each a process of its own."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from tqdm import tqdm

from ddpm import data
from ddpm.common import errors
from ddpm.common.files import atomic_write, lock_folder
from ddpm.config import files
from ddpm.experiment import build, cost
from ddpm.runtime.signals import tell
from ddpm.studies import compatibility, search
from ddpm.studies import runs as studies_runs
from ddpm.training import checkpoint

STEP = re.compile(r"step (\d+)/(\d+) \(")
# what names one run of W&B's, in which the runs of a study would collide
ONE_RUN = {
    f"WANDB_{word}"
    for word in (
        "RUN_ID",
        "RUN_NAME",
        "NAME",
        "RESUME",
        "RESUME_FROM",
        "FORK_FROM",
        "SWEEP_ID",
        "SWEEP_PARAM_PATH",
        "RUN_DIR",
        "RUN_STORAGE_ID",
        "SERVICE",
    )
}
ENDS = {
    errors.FAILED: "failed",
    errors.USAGE_ERROR: "refused",
    errors.DIVERGED: "diverged",
    errors.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class Trial:
    """A run of the study: its folder's name, its point, its command, and a checksum of what is
    in the files named there.
    """

    name: str
    point: dict
    words: list
    content: int


def trial_of(study, point):
    """The run of a point; raises ValueError where it cannot be run."""
    name = study.run_name(point)
    try:
        config = study.config(point)
        build.check(config)
        content = files.to_json(config)
        if "checkpoint" in point:
            content += str(checkpoint.find(point["checkpoint"]).stat().st_mtime_ns)
    except ValueError as error:
        raise ValueError(f"{study.path}: {name} cannot run: {error}") from None
    return Trial(name, point, study.command_of(point), zlib.crc32(content.encode()))


def check_comparable(study, points):
    """Raise a ValueError where trainings would be measured in ways that do not compare, as the
    report would at the end.
    """
    ways = dict(planned_protocols({study.run_name(point): study.config(point) for point in points}))
    try:
        compatibility.check_same_parts(list(ways.items()), study.axes)
    except ValueError as error:
        raise ValueError(f"{study.path}: {error}") from None


def planned_protocols(trainings):
    """Yield (name, parts of its `eval/protocol`) for each training of {name: config} that will be
    measured.

    Data are opened where the parts depend on them; a training whose data are not there yet is left
    out.
    """
    counted = {}
    opened = {}

    def images(config):
        section = config.data
        key = section.source, section.image_size, section.channels, section.matte
        opened[key] = opened.get(key) or data.open_source(*key)
        return opened[key]

    several = (
        len(
            {
                (config.data.source, config.data.image_size, config.data.channels)
                for config in trainings.values()
            }
        )
        > 1
    )
    for name, config in trainings.items():
        network = (config.model, config.data, config.diffusion)
        parts = {}
        size = 0
        counted[network] = counted.get(network) or cost.operations(config)
        try:
            if several:
                parts = {"data": images(config).fingerprint[:12]}
            if "epoch" in config.train.length + config.every.evaluate:
                size = len(build.split(config, images(config))[0])
        except ValueError:
            continue
        evaluated = cost.plan_evaluation(config, size, counted[network])
        if evaluated.interval != "0 steps" and config.evaluate.extractor != "none":
            how = build.recipe(evaluated.config, evaluated.config.evaluate, (), "")
            yield (
                name,
                parts
                | {
                    "extractor": build.extractor_name(config),
                    "samples": str(evaluated.config.evaluate.num_samples),
                    "sampler": how.sampler,
                    "steps": str(how.steps),
                    "spacing": how.spacing,
                    "guidance": str(how.guidance),
                },
            )


class Record:
    """sweep.json: {"runs": {RUN: {point, command, content, code, result}}}; the code is null
    until the run has ended.
    """

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "sweep.json"
        try:
            self.runs = (
                dict(json.loads(self.path.read_text())["runs"]) if self.path.exists() else {}
            )
            whole = all(isinstance(kept, dict) for kept in self.runs.values())
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{self.path} is damaged; delete it, and every run is looked at again")

    def put(self, trial, code=None, result=None):
        """Keep that a run was begun or, with a code, how it ended."""
        self.runs[trial.name] = {
            "point": trial.point,
            "command": trial.words,
            "content": trial.content,
            "code": code,
            "result": result,
        }
        with atomic_write(self.path) as part:
            part.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")

    def finished(self, trial):
        """True where this very run came to its end and its numbers are there."""
        kept = self.runs.get(trial.name, {})
        same = (kept.get("command"), kept.get("content"), kept.get("code")) == (
            trial.words,
            trial.content,
            errors.DONE,
        )
        return same and (self.folder / trial.name / "metrics.jsonl").is_file()


class RunPool:
    """The processes of the runs. SIGINT, SIGTERM and SIGUSR1 ask them to save and end, the
    second time they end at once.
    """

    def __init__(self, study, folder, parallel):
        self.folder = folder
        self.processes = set()
        self.stop_requests = 0
        self.places = list(range(parallel))  # lines of the terminal without a progress bar
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        inherited = {name: value for name, value in os.environ.items() if name not in ONE_RUN}
        self.environment = {
            "WANDB_RUN_GROUP": study.name,
            "OMP_NUM_THREADS": str(max(1, cores // parallel)),
        } | inherited

    def stop(self, *_):
        self.stop_requests += 1
        tell("stopping: the runs save and end; press Ctrl-C again to end them without saving")
        for process in list(self.processes):
            process.terminate() if self.stop_requests == 1 else process.kill()

    @contextlib.contextmanager
    def stoppable(self):
        """The signals, and an error in the block, reach the processes."""
        before = {
            number: signal.signal(number, self.stop)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, trial):
        """Run a trial to its end: (exit code, seconds, the line of its output that says most)."""
        began = time.monotonic()
        place = self.places.pop(0)
        log = self.folder / f"{trial.name}.log"
        macros = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable}
        words = [
            *(macros.get(word, word) for word in trial.words),
            f"--workdir={self.folder / trial.name}",
        ]
        said = ["no output"]
        with (
            open(log, "w", buffering=1) as kept,
            tqdm(
                desc=trial.name,
                unit="step",
                position=place,
                leave=False,
                disable=not sys.stderr.isatty(),
            ) as bar,
            subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=self.environment,
                start_new_session=True,
            ) as process,
        ):
            self.processes.add(process)
            if self.stop_requests:  # before this process was known
                process.terminate()
            for line in process.stdout:
                kept.write(line)
                said = [*said[-50:], line.strip()] if line.strip() else said
                if step := STEP.match(line):
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
        self.processes.remove(process)
        self.places.append(place)
        if process.returncode == errors.DONE:
            log.unlink()
        reasons = [line for line in said if line.startswith(("error:", "failed:", "diverged:"))]
        return process.returncode, time.monotonic() - began, (reasons or said)[-1]


def result_of(run, metric):
    """The last value of a metric in a run, or the best where it is named best/val_loss; None
    where there is none.
    """
    if metric is None:
        return None
    name, goal = metric
    if not name.startswith("best/"):
        return run.final(name)
    key = name.removeprefix("best/").replace("_", "/", 1)
    return run.best(key) if goal == "minimize" else run.highest(key)


class Sweep:
    """What is begun, and how it ends, told line by line."""

    def __init__(self, study, folder, total, record, pool):
        self.study = study
        self.folder = folder
        self.total = total
        self.record = record
        self.pool = pool
        self.numbers = {}
        self.before = 0
        self.done = 0
        self.failed = []
        self.began = time.monotonic()

    def start(self, trial):
        """True where a trial is to be run now."""
        if trial.name in self.numbers:  # bayes and random choose a point twice where there are few
            return False
        self.numbers[trial.name] = len(self.numbers) + 1
        if self.record.finished(trial):
            self.before += self.finished_run(trial) is not None
            return False
        self.record.put(trial)
        self.report(trial, "started")
        return True

    def finished_run(self, trial):
        """The run that a trial came to its end with; None, which is told, where its files are
        damaged.
        """
        folder = self.folder / trial.name
        try:
            run = studies_runs.read_run(folder)
            damage = run.fault
        except ValueError as error:
            damage = error
        if not damage:
            return run
        self.failed.append(trial.name)
        self.report(
            trial,
            f"came to its end, but {damage}; delete {folder}, and the same command makes it again",
        )
        return None

    def finish(self, trial, code, seconds, last):
        """Keep and tell how a trial ended."""
        after = f"after {tqdm.format_interval(seconds)}"
        if code == errors.DONE:
            if run := self.finished_run(trial):
                result = result_of(run, self.study.metric)
                self.record.put(trial, code, result)
                self.done += 1
                shown = "missing" if result is None else f"{result:.4g}"
                self.report(
                    trial,
                    f"done {after}"
                    + (f", {self.study.metric[0]} {shown}" if self.study.metric else ""),
                )
        elif self.pool.stop_requests:
            self.report(trial, f"interrupted {after}")
        else:
            self.record.put(trial, code)
            self.failed.append(trial.name)
            how = (
                f"killed by {signal.Signals(-code).name}"
                if code < 0
                else f"{ENDS.get(code, 'failed')} (exit code {code})"
            )
            self.report(
                trial, f"{how} {after}: {last}; all it said is in {self.folder / trial.name}.log"
            )

    def summary(self):
        """Tell what is done and what is not; returns the exit code."""
        total = self.total if self.pool.stop_requests else len(self.numbers)
        took = tqdm.format_interval(time.monotonic() - self.began)
        say(
            f"{self.study.name}: {self.before + self.done} of {total} runs are done, "
            f"{self.before} of them before, in {took}"
        )
        for name in self.failed:
            say(f"not done: {name}")
        if self.pool.stop_requests:
            say("interrupted; run the same command to continue")
            return errors.INTERRUPTED
        runs = [] if self.folder == self.study.folder() else [f"--runs={self.folder.parent}"]
        report = shlex.join(["python", "-m", "ddpm.compare", str(self.study.path), *runs])
        say("the same command tries again" if self.failed else f"report: {report}")
        return errors.FAILED if self.failed else errors.DONE

    def report(self, trial, what):
        say(f"[{self.numbers[trial.name]}/{self.total}] {trial.name}: {what}")


def sweep(study, folder, parallel=1, count=None, seed=0):
    """Make the runs of a study that are not finished, in a folder; returns the exit code.

    Raises ValueError for a point that cannot run, and where another process uses the folder.
    """
    with lock_folder(folder):
        record = Record(folder)
        pool = RunPool(study, folder, parallel)
        points = search.choose_points(study, count, seed, record)
        bayes = study.method == "bayes"  # chooses each point when it is due
        progress = Sweep(study, folder, count if bayes else len(points), record, pool)
        trials = (trial_of(study, point) for point in points)
        if not bayes:
            trials = iter(list(trials))  # checks each before the first runs
        if study.program == "ddpm.main":
            check_comparable(study, study.probes() if bayes else points)
        say(
            f"{study.name}: {progress.total} runs by {study.method}, {parallel} at a time, in "
            f"{folder}"
        )
        if study.early_terminate:
            say("early_terminate is for W&B's server; here every run goes to its end")
        running = {}
        with ThreadPoolExecutor(parallel) as threads, pool.stoppable():
            while True:
                free = len(running) < parallel and not pool.stop_requests
                trial = next(trials, None) if free else None
                if trial:
                    if progress.start(trial):
                        running[threads.submit(pool.run, trial)] = trial
                elif running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        progress.finish(running.pop(future), *future.result())
                else:
                    break
    return progress.summary()


def say(text):
    tqdm.write(text)  # above the bars
    sys.stdout.flush()

"""Runs the points of a study on this machine, several at a time, each in its own process."""

import contextlib
import functools
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
# name one run of W&B's, in which the runs of a study would collide
ONE_RUN = {"WANDB_RUN_ID", "WANDB_RUN_NAME", "WANDB_NAME", "WANDB_RESUME", "WANDB_RESUME_FROM"}
ONE_RUN |= {"WANDB_FORK_FROM", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_DIR"}
ONE_RUN |= {"WANDB_RUN_STORAGE_ID", "WANDB_SERVICE"}
ENDS = {
    errors.FAILED: "failed",
    errors.USAGE_ERROR: "refused",
    errors.DIVERGED: "diverged",
    errors.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class Trial:
    """A run of the study."""

    name: str  # of its folder
    point: dict
    words: list  # its command
    content: int  # a checksum of its config and checkpoint


def trial_of(study, point):
    """The Trial of a point; raises ValueError where it cannot run."""
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
    """Raise a ValueError where the protocols of trainings would not compare in the report."""
    protocols = planned_protocols({study.run_name(point): study.config(point) for point in points})
    try:
        compatibility.check_same_parts(list(dict(protocols).items()), study.axes)
    except ValueError as error:
        raise ValueError(f"{study.path}: {error}") from None


def planned_protocols(trainings):
    """Yield (name, parts of its `eval/protocol`) of the {name: config} that will be measured."""
    operations = {}
    open_source = functools.cache(data.open_source)
    several = len({source_arguments(config)[:3] for config in trainings.values()}) > 1
    for name, config in trainings.items():
        network = (config.model, config.data, config.diffusion)
        operations[network] = operations.get(network) or cost.count_flops(config)
        parts = {}
        size = 0
        try:
            if several:
                parts["data"] = open_source(*source_arguments(config)).fingerprint[:12]
            if "epoch" in config.train.length + config.every.evaluate:
                size = len(build.split(config, open_source(*source_arguments(config)))[0])
        except ValueError:  # without its data
            continue
        evaluated = cost.plan_evaluation(config, size, operations[network])
        if evaluated.interval != "0 steps" and config.evaluate.extractor != "none":
            section = evaluated.config.evaluate
            recipe = build.recipe(evaluated.config, section, (), "")
            parts["extractor"] = build.extractor_name(config)
            parts["samples"] = str(section.num_samples)
            for part in ("sampler", "steps", "spacing", "guidance"):
                parts[part] = str(getattr(recipe, part))
            yield name, parts


def source_arguments(config):
    """The arguments of `data.open_source` for the images of a config."""
    section = config.data
    return section.source, section.image_size, section.channels, section.background


class Record:
    """sweep.json: {"runs": {RUN: {point, command, content, code, result}}}; code null at first."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "sweep.json"
        self.runs = {}
        try:
            if self.path.exists():
                self.runs = dict(json.loads(self.path.read_text())["runs"])
            valid = all(isinstance(entry, dict) for entry in self.runs.values())
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise ValueError(f"{self.path} is damaged; delete it, and every run is looked at again")

    def put(self, trial, code=None, result=None):
        """Record that a run started or, with a code, how it ended."""
        entry = {"point": trial.point, "command": trial.words, "content": trial.content}
        self.runs[trial.name] = entry | {"code": code, "result": result}
        with atomic_write(self.path) as part:
            part.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")

    def finished(self, trial):
        """True where this very trial is done and its numbers exist."""
        entry = self.runs.get(trial.name, {})
        recorded = entry.get("command"), entry.get("content"), entry.get("code")
        same = recorded == (trial.words, trial.content, errors.DONE)
        return same and (self.folder / trial.name / "metrics.jsonl").is_file()


class RunPool:
    """The processes of the runs; a first signal asks them to save and end, a second kills them."""

    def __init__(self, study, folder, parallel):
        self.folder = folder
        self.processes = set()
        self.stop_requests = 0
        self.places = list(range(parallel))  # lines of the terminal without a progress bar
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        threads = str(max(1, len(affinity(0)) // parallel))
        own = {"WANDB_RUN_GROUP": study.name, "OMP_NUM_THREADS": threads}
        inherited = {name: value for name, value in os.environ.items() if name not in ONE_RUN}
        self.environment = own | inherited

    def stop(self, *_):
        self.stop_requests += 1
        tell("stopping: the runs save and end; press Ctrl-C again to end them without saving")
        for process in list(self.processes):
            process.terminate() if self.stop_requests == 1 else process.kill()

    @contextlib.contextmanager
    def stoppable(self):
        """Pass signals, and an error in the block, on to the processes."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self.stop) for number in numbers}
        try:
            yield
        except BaseException:
            self.stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, trial):
        """Run a trial to its end: (exit code, seconds, the most telling line of its output)."""
        began = time.monotonic()
        place = self.places.pop(0)
        log = self.folder / f"{trial.name}.log"
        lines = ["no output"]
        shown = {"unit": "step", "leave": False, "disable": not sys.stderr.isatty()}
        with (
            open(log, "w", buffering=1) as output,
            tqdm(desc=trial.name, position=place, **shown) as bar,
            self.process(trial) as process,
        ):
            self.processes.add(process)
            if self.stop_requests:  # before this process was known
                process.terminate()
            for line in process.stdout:
                output.write(line)
                if line.strip():
                    lines = [*lines[-50:], line.strip()]
                if step := STEP.match(line):
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)
        self.processes.remove(process)
        self.places.append(place)
        if process.returncode == errors.DONE:
            log.unlink()
        reasons = [line for line in lines if line.startswith(("error:", "failed:", "diverged:"))]
        return process.returncode, time.monotonic() - began, (reasons or lines)[-1]

    def process(self, trial):
        """The started process of a trial, its output in one pipe."""
        macros = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable}
        words = [macros.get(word, word) for word in trial.words]
        return subprocess.Popen(
            [*words, f"--workdir={self.folder / trial.name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment,
            start_new_session=True,
        )


def result_of(run, metric):
    """The last value of a metric, or the best of one named best/val_loss; None if there is none."""
    if metric is None:
        return None
    name, goal = metric
    if not name.startswith("best/"):
        return run.final(name)
    key = name.removeprefix("best/").replace("_", "/", 1)
    return run.best(key) if goal == "minimize" else run.highest(key)


class Sweep:
    """Which trials started and how they ended, with a line for each event."""

    def __init__(self, study, folder, total, record, pool):
        self.study = study
        self.folder = folder
        self.total = total
        self.record = record
        self.pool = pool
        self.numbers = {}  # of the trials, by name
        self.before = 0
        self.done = 0
        self.failed = []
        self.began = time.monotonic()

    def start(self, trial):
        """True where a trial is to run now."""
        if trial.name in self.numbers:  # bayes and random may choose a point twice
            return False
        self.numbers[trial.name] = len(self.numbers) + 1
        if self.record.finished(trial):
            self.before += self.finished_run(trial) is not None
            return False
        self.record.put(trial)
        self.report(trial, "started")
        return True

    def finished_run(self, trial):
        """The run of a trial that is done; None, with a line, where its files are damaged."""
        folder = self.folder / trial.name
        try:
            run = studies_runs.read_run(folder)
            damage = run.fault
        except ValueError as error:
            damage = error
        if not damage:
            return run
        self.failed.append(trial.name)
        remedy = f"delete {folder}, and the same command makes it again"
        self.report(trial, f"came to its end, but {damage}; {remedy}")
        return None

    def finish(self, trial, code, seconds, last):
        """Record and report how a trial ended."""
        after = f"after {tqdm.format_interval(seconds)}"
        if code == errors.DONE:
            if run := self.finished_run(trial):
                result = result_of(run, self.study.metric)
                self.record.put(trial, code, result)
                self.done += 1
                number = "missing" if result is None else f"{result:.4g}"
                shown = f", {self.study.metric[0]} {number}" if self.study.metric else ""
                self.report(trial, f"done {after}{shown}")
        elif self.pool.stop_requests:
            self.report(trial, f"interrupted {after}")
        else:
            self.record.put(trial, code)
            self.failed.append(trial.name)
            how = f"{ENDS.get(code, 'failed')} (exit code {code})"
            if code < 0:
                how = f"killed by {signal.Signals(-code).name}"
            log = self.folder / f"{trial.name}.log"
            self.report(trial, f"{how} {after}: {last}; its output is in {log}")

    def summary(self):
        """Print what is done and what is not; returns the exit code."""
        total = self.total if self.pool.stop_requests else len(self.numbers)
        took = tqdm.format_interval(time.monotonic() - self.began)
        done = f"{self.before + self.done} of {total} runs are done"
        say(f"{self.study.name}: {done}, {self.before} of them before, in {took}")
        for name in self.failed:
            say(f"not done: {name}")
        if self.pool.stop_requests:
            say("interrupted; run the same command to continue")
            return errors.INTERRUPTED
        if self.failed:
            say("the same command tries again")
            return errors.FAILED
        runs = [] if self.folder == self.study.folder() else [f"--runs={self.folder.parent}"]
        report = shlex.join(["python", "-m", "ddpm.compare", str(self.study.path), *runs])
        say(f"report: {report}")
        return errors.DONE

    def report(self, trial, text):
        say(f"[{self.numbers[trial.name]}/{self.total}] {trial.name}: {text}")


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
        total = f"{progress.total} runs by {study.method}"
        say(f"{study.name}: {total}, {parallel} at a time, in {folder}")
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

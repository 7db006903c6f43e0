"""Train one experiment: `python -m ddpm.main --config=configs/digits.py
[--config.section.leaf=value ...] [--workdir=DIR]`.

The same command again continues the run. Exit codes: 0 done, 1 failed, 2 usage error, 3 diverged,
75 interrupted and saved.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

config_flags.define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder; by default runs/NAME, named by the config and its overrides."
)
if __name__ == "__main__":
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import contextlib
import gc
import sys
import traceback
from functools import partial
from pathlib import Path

from ddpm.common import errors
from ddpm.common.files import lock_folder
from ddpm.config import files
from ddpm.experiment import memory
from ddpm.experiment.trainer import build_trainer
from ddpm.runtime import device, ranks
from ddpm.runtime.out_of_memory import BatchDoesNotFit, ran_out
from ddpm.runtime.signals import StopRequest, StopTraining
from ddpm.training import checkpoint
from ddpm.training.trainer import Diverged, train

AGAIN = -1  # no exit code: train again, after a rollback
CONTINUES = "the same command goes on from the last checkpoint"


def train_experiment(config, folder):
    """Train a frozen config in a folder; returns the exit code; ValueError if it cannot run."""
    stop = StopRequest(config.train.max_hours)
    try:
        with stop.install_handlers(), contextlib.ExitStack() as locks:
            with stop.interruptible():
                machine = start(config, folder, stop, locks)
            return train_with_rollbacks(config, folder, machine)
    except StopTraining:  # before the first step
        late = stop.time_limit_reached
        more = "; give more hours" if late else ": nothing to save, the same command goes on"
        print(f"stopped before the first step, {stop}{more}", file=sys.stderr, flush=True)
        return errors.FAILED if late else errors.INTERRUPTED
    finally:
        ranks.stop()


def start(config, folder, stop, locks):
    """The Machine of a training, after checks that need no images; rank 0 locks the folder."""
    section = config.train
    machine = device.start(section.amp, section.deterministic, None, stop)
    with machine.raise_on_all_ranks():
        files.check_continues(config, folder)
        if machine.main:
            locks.enter_context(lock_folder(folder))
    return machine


def train_with_rollbacks(config, folder, machine):
    """Build the training and train it, again after each rollback; returns the exit code."""
    code = AGAIN
    rollbacks = 0
    reason = ""
    while code == AGAIN:
        with machine.stop.interruptible():
            say = partial(announce, machine)
            trainer = build_trainer(config, folder, machine, rollbacks=rollbacks, say=say)
        if trainer.finished:
            trainer.tidy()
            if machine.main:
                print(
                    f"{folder} is finished: {trainer.start} steps; to go on, give a longer "
                    "--config.train.length"
                )
            return errors.DONE
        if rollbacks:
            trainer.begin_after_rollback(reason)
        else:
            say(f"config: {Path(folder, 'config.json')} (--print_config shows it)")
        code = train_and_close(trainer)
        reason = trainer.diverged
        rollbacks = trainer.stability.rollbacks + 1
        if code == errors.FAILED and machine.world > 1:
            ranks.abandon(code)
        # the first to leave may have the others killed, while rank 0 closes its tracker
        machine.barrier()
        del trainer
        gc.collect()
        machine.empty_cache()
    return code


def announce(machine, text):
    """Print a line on the main rank, before the training has its log."""
    if machine.main:
        with contextlib.suppress(OSError):  # of a console on a full disk
            print(text, flush=True)


def main():
    """Train what the flags say; returns the exit code."""
    config, file, overrides = config_flags.given_config()
    code = train_experiment(config, WORKDIR.value or files.default_workdir(file, overrides))
    config_flags.flush_stdout()  # what cannot be written there is in training.log
    # torchrun restarts ranks that exit with another code
    return errors.DONE if code == errors.INTERRUPTED and ranks.restarted() else code


def train_and_close(trainer):
    """Train, and close the tracker; returns the exit code, or AGAIN after a rollback."""
    code = errors.FAILED
    try:
        if train(trainer):
            command = f"python -m ddpm.generate --checkpoint={trainer.folder}"
            trainer.tracker.say(f"done; draw images with: {command}")
            code = errors.DONE
        else:
            code = report_stop(trainer)
    except Diverged as error:
        code = handle_divergence(trainer, error)
    except OSError as error:
        reclaimable = checkpoint.reclaimable(trainer.folder) if error.errno in errors.FULL else ""
        may_go = f" (files of this run that may be deleted: {reclaimable})" if reclaimable else ""
        failed(trainer, f"{errors.one_line(error)}{may_go}; then {CONTINUES}")
    except Exception as error:  # no mistake of the command line's, even if it is a ValueError
        if ran_out(error):
            failed(trainer, out_of_memory(trainer, error))
        elif failed(trainer, f"{errors.one_line(error)}; {CONTINUES}"):
            traceback.print_exc()
    finally:
        exit_code = errors.DONE if code == AGAIN else code
        trainer.tracker.close(exit_code, hurry=lambda: trainer.machine.stop.requested)
    return code


def report_stop(trainer):
    """Say where the training stopped; returns the exit code.

    It is a failure if the time limit left no time for a step: a scheduler would restart it forever.
    """
    stop = trainer.machine.stop
    step, pending = trainer.saved
    if stop.time_limit_reached and trainer.saved == trainer.begun:
        todo = f"the rest of step {step} ({', '.join(sorted(pending))})" if pending else "a step"
        trainer.tracker.say(
            f"failed: {stop}, and that is too little for {todo}; give more hours, or smaller "
            "evaluations"
        )
        return errors.FAILED
    trainer.tracker.say(
        f"stopped, {stop}, and saved at step {step}; run the same command to continue"
    )
    return errors.INTERRUPTED


def handle_divergence(trainer, error):
    """Roll back where that is allowed, else track a diagnosis; returns AGAIN or the exit code."""
    tracker = trainer.tracker
    trainer.diverged = str(error)
    tracker.flush()
    tracker.say(f"diverged: {error}")
    if trainer.rollback:
        tracker.say(f"rolled back: {trainer.roll_back(error)}")
        return AGAIN
    try:
        diagnosis = trainer.diagnosis()
    except (RuntimeError, MemoryError) as problem:
        diagnosis = f"none, as that failed too: {errors.one_line(problem)}"
    tracker.say(f"diagnosis: {diagnosis}")
    tracker.summary("train/diverged", trainer.diverged)
    tracker.summary("train/diagnosis", diagnosis)
    return errors.DIVERGED


def out_of_memory(trainer, error):
    """A message that says what would save memory, the most first."""
    what = error
    if not isinstance(error, BatchDoesNotFit):
        what = f"out of memory ({errors.one_line(error)})"
    config = files.from_json(trainer.config_json)
    helps = memory.suggest_savings(config, trainer.machine, trainer.recomputed)
    return f"{what}; what helps, by what it saves: {', '.join(helps)}"


def failed(trainer, message):
    """Say why a training fails, on rank 0 and the first that failed; returns True on that one."""
    machine = trainer.machine
    mine = message if machine.world == 1 else f"rank {machine.rank}: {message}"
    cause = machine.report_failure(mine)
    trainer.tracker.say(f"failed: {cause}")
    if cause == mine and not machine.main:  # whose tracker is silent
        print(f"failed: {mine}", file=sys.stderr, flush=True)
    return cause == mine


if __name__ == "__main__":
    config_flags.run_command(main)

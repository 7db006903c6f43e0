"""Train one experiment: `python -m ddpm.main --config=configs/digits.py
[--config.section.leaf=value ...] [--workdir=DIR]`.

The same command again continues the run. Exit codes: 0 done, 1 failed, 2 your mistake, 3 diverged,
75 interrupted and saved.
"""

import contextlib
import gc
import sys
import traceback
from pathlib import Path

from absl import flags

from ddpm.common import errors
from ddpm.common.files import lock_folder
from ddpm.config import files
from ddpm.config import flags as config_flags
from ddpm.experiment import build, memory, trainer
from ddpm.runtime import device, ranks
from ddpm.runtime.out_of_memory import BatchDoesNotFit, ran_out
from ddpm.runtime.signals import StopRequest, StopTraining
from ddpm.training import checkpoint
from ddpm.training.trainer import Diverged, train

AGAIN = -1  # no exit code

config_flags.define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run folder; by default runs/NAME, named by the config and its overrides."
)


def train_experiment(given, folder):
    """Train a frozen config in a folder, or go on with what stands there; returns the exit code.

    Raises ValueError, one line, for what cannot be run, before anything is written.
    """
    stop = StopRequest(given.train.max_hours)
    try:
        with stop.install_handlers(), contextlib.ExitStack() as kept:
            with stop.interruptible():
                machine = device.start(
                    given.train.amp,
                    given.train.deterministic,
                    None,
                    stop,
                    given.train.cudnn_benchmark,
                )
            with stop.interruptible(), machine.raise_on_all_ranks():
                build.check(given)
                files.check_continues(given, folder)
                if machine.main:
                    kept.enter_context(lock_folder(folder))
            code = AGAIN
            rollbacks = 0
            why = ""
            while code == AGAIN:
                with stop.interruptible():
                    with machine.raise_on_all_ranks():
                        run = trainer.run(
                            given, folder, machine, rollbacks, announced if machine.main else silent
                        )
                    if run.finished:
                        run.tidy()
                        if machine.main:
                            print(
                                f"{folder} is finished: {run.start} steps; to go on, give a "
                                "longer --config.train.length"
                            )
                        return errors.DONE
                    if machine.main and not rollbacks:
                        with contextlib.suppress(OSError):  # of a console on a full disk
                            print(
                                f"config: {Path(folder, 'config.json')} (--print_config shows it)",
                                flush=True,
                            )
                    trainer.track(given, run)
                if rollbacks:
                    run.go_back(why)
                code = finish(run)
                why = run.diverged
                rollbacks = run.step.guard.rollbacks + 1
                if code == errors.FAILED and machine.world > 1:
                    ranks.abandon(code)
                # the first to leave may have the others killed, while rank 0 closes its tracker
                machine.barrier()
                del run
                gc.collect()
                machine.empty_cache()
            return code
    except StopTraining:  # before the first step
        more = (
            "; give more hours"
            if stop.time_limit_reached
            else ": nothing to save, the same command goes on"
        )
        print(f"stopped before the first step, {stop}{more}", file=sys.stderr, flush=True)
        return errors.FAILED if stop.time_limit_reached else errors.INTERRUPTED
    finally:
        ranks.stop()


def announced(text):
    """Say at once, before a run has its log, what takes long at the start."""
    with contextlib.suppress(OSError):  # of a console on a full disk
        print(f"{text} ...", flush=True)


def silent(text):
    """Say nothing, on ranks that write nothing."""


def main():
    """Train what the flags say; returns the exit code."""
    given, file, overrides = config_flags.given_config()
    code = train_experiment(given, WORKDIR.value or files.default_workdir(file, overrides))
    return errors.DONE if code == errors.INTERRUPTED and ranks.restarted() else code


def finish(run):
    """Train a run to its end, or to what stops it; the tracker hears how it ended, and the exit
    code says it.

    AGAIN says that the run was rolled back, and is to be made anew.
    """
    code = errors.FAILED
    try:
        if train(run):
            code = errors.DONE
            run.tracker.say(
                f"done; draw images with: python -m ddpm.generate --checkpoint={run.folder}"
            )
        elif run.machine.stop.time_limit_reached and run.saved == run.begun:
            # or a scheduler would begin it again for ever
            step, due = run.saved
            todo = f"the rest of step {step} ({', '.join(sorted(due))})" if due else "a step"
            run.tracker.say(
                f"failed: {run.machine.stop}, and that is too little for {todo}; give more hours, "
                "or smaller evaluations"
            )
        else:
            code = errors.INTERRUPTED
            run.tracker.say(
                f"stopped, {run.machine.stop}, and saved at step {run.saved[0]}; run the same "
                "command to continue"
            )
    except Diverged as error:
        run.diverged = str(error)
        run.tracker.flush()
        run.tracker.say(f"diverged: {error}")
        if run.rollback:
            code = AGAIN
            run.tracker.say(f"rolled back: {run.roll_back(error)}")
        else:
            code = errors.DIVERGED
            try:
                words = run.diagnosis()
            except (RuntimeError, MemoryError) as problem:
                words = f"none, as that failed too: {errors.one_line(problem)}"
            run.tracker.say(f"diagnosis: {words}")
            run.tracker.summary("train/diverged", run.diverged)
            run.tracker.summary("train/diagnosis", words)
    except OSError as error:
        spare = checkpoint.spare(run.folder) if error.errno in errors.FULL else ""
        may_go = f" (of this run may go {spare})" if spare else ""
        failed(
            run,
            f"{errors.one_line(error)}{may_go}; then the same command goes on from the last "
            "checkpoint",
        )
    except Exception as error:  # no mistake of the command line's, even if it is a ValueError
        if ran_out(error):
            what = (
                error
                if isinstance(error, BatchDoesNotFit)
                else f"out of memory ({errors.one_line(error)})"
            )
            helps = ", ".join(
                memory.savings(files.from_json(run.config_json), run.machine, run.recomputed)
            )
            failed(run, f"{what}; what helps, by what it saves: {helps}")
        elif failed(
            run, f"{errors.one_line(error)}; the same command goes on from the last checkpoint"
        ):
            traceback.print_exc()
    finally:
        run.tracker.close(
            errors.DONE if code == AGAIN else code, hurry=lambda: run.machine.stop.requested
        )
    return code


def failed(run, words):
    """Say why a run fails: on rank 0 and, where it failed first, on this one; returns True if it
    did.
    """
    mine = words if run.machine.world == 1 else f"rank {run.machine.rank}: {words}"
    cause = run.machine.report_failure(mine)
    run.tracker.say(f"failed: {cause}")
    if cause == mine and not run.machine.main:  # whose tracker is silent
        print(f"failed: {mine}", file=sys.stderr, flush=True)
    return cause == mine


if __name__ == "__main__":
    flags.adopt_module_key_flags(config_flags)
    config_flags.run_command(main)

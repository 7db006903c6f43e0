"""Chooses the next trial of a study: random, or Bayesian by optuna."""

import contextlib

from ddpm.common import rng


def choose_points(study, count, seed, record):
    """The points of a study, at most `count`; those of bayes are chosen when they are asked for."""
    if study.method == "grid":
        return study.grid()[:count]
    if study.method == "random":
        points = [study.draw(rng.generator(seed, "sweep", k)) for k in range(count)]
        return list({study.run_name(point): point for point in points}.values())
    return bayes_points(study, count, seed, record)


def bayes_points(study, count, seed, record):
    """The points in the record, then others by optuna's TPE (Bergstra et al. 2011), which learns
    from what is recorded by then.

    A failed run counts as the worst so far, as in W&B's own search. Raises ValueError without
    optuna.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("optuna is missing; pip install -e '.[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = optuna.trial.TrialState
    space = {}
    lists = {}
    for name, (kind, arguments) in sorted(study.parameters.items()):
        if kind in SPACES:
            space[name] = SPACES[kind](optuna.distributions, **arguments)
        elif listed := study.values(name):
            lists[name] = listed
            space[name] = optuna.distributions.CategoricalDistribution(range(len(listed)))
        else:
            raise ValueError(
                f"bayes cannot choose {name} by {kind}; use a list of values or one of "
                f"{', '.join(SPACES)}"
            )

    def past():
        results = [kept["result"] for kept in record.runs.values() if kept["result"] is not None]
        worst = (max if study.metric[1] == "minimize" else min)(results, default=None)
        for kept in record.runs.values():
            point = kept["point"]
            value = worst if kept["result"] is None else kept["result"]
            state = (
                states.RUNNING
                if kept["code"] is None
                else states.FAIL
                if value is None
                else states.COMPLETE
            )
            with contextlib.suppress(ValueError, KeyError):  # of a space that was changed since
                params = {
                    name: lists[name].index(point[name]) if name in lists else point[name]
                    for name in space
                }
                value = value if state is states.COMPLETE else None
                yield (
                    point,
                    optuna.trial.create_trial(
                        state=state, value=value, params=params, distributions=space
                    ),
                )

    begun = [point for point, _ in past()]
    yield from begun[:count]
    for number in range(len(begun), count):
        sampler = optuna.samplers.TPESampler(
            seed=int(rng.generator(seed, "sweep", number).integers(2**31)), constant_liar=True
        )
        search = optuna.create_study(direction=study.metric[1], sampler=sampler)
        search.add_trials([trial for _, trial in past()])
        params = search.ask(space).params
        yield {
            name: lists[name][value] if name in lists else value for name, value in params.items()
        }


SPACES = {  # W&B's distributions as optuna's
    "int_uniform": lambda known, min, max: known.IntDistribution(min, max),
    "uniform": lambda known, min, max: known.FloatDistribution(min, max),
    "q_uniform": lambda known, min, max, q=1: (
        known.IntDistribution
        if {type(min), type(max), type(q)} == {int}
        else known.FloatDistribution
    )(min, max, step=q),
    "log_uniform_values": lambda known, min, max: known.FloatDistribution(min, max, log=True),
}

"""Chooses the points of a study: grid, random, or Bayesian search by optuna."""

import contextlib

from ddpm.common import rng


def choose_points(study, count, seed, record):
    """At most `count` points of a study: a list, or for bayes an iterator that chooses when due."""
    if study.method == "grid":
        return study.grid()[:count]
    if study.method == "random":
        points = [study.draw(rng.generator(seed, "sweep", k)) for k in range(count)]
        return list({study.run_name(point): point for point in points}.values())
    return bayes_points(study, count, seed, record)


def bayes_points(study, count, seed, record):
    """Yield the recorded points, then those that optuna's TPE (Bergstra et al. 2011) chooses by the
    results at that time.

    A failed run counts as the worst result, as in W&B's search. Raises ValueError without optuna.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("optuna is missing; pip install -e '.[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, lists = search_space(study, optuna.distributions)
    recorded = [point for point, _ in past_trials(study, record, space, lists)]
    yield from recorded[:count]
    for number in range(len(recorded), count):
        sampler = optuna.samplers.TPESampler(
            seed=int(rng.generator(seed, "sweep", number).integers(2**31)), constant_liar=True
        )
        search = optuna.create_study(direction=study.metric[1], sampler=sampler)
        search.add_trials([trial for _, trial in past_trials(study, record, space, lists)])
        chosen = search.ask(space).params
        yield chosen | {name: values[chosen[name]] for name, values in lists.items()}


def search_space(study, distributions):
    """({parameter: optuna's distribution}, {parameter: values} of those chosen by their index);
    raises ValueError for a distribution that optuna lacks.
    """
    space = {}
    lists = {}
    for name, (kind, arguments) in sorted(study.parameters.items()):
        if kind in SPACES:
            space[name] = SPACES[kind](distributions, **arguments)
        elif values := study.values(name):
            lists[name] = values
            space[name] = distributions.CategoricalDistribution(range(len(values)))
        else:
            known = ", ".join(SPACES)
            raise ValueError(
                f"bayes cannot choose {name} by {kind}; use a list of values or one of {known}"
            )
    return space, lists


def past_trials(study, record, space, lists):
    """Yield (point, optuna's trial) for each recorded run within the space."""
    from optuna.trial import TrialState, create_trial

    entries = record.runs.values()
    results = [entry["result"] for entry in entries if entry["result"] is not None]
    worst = (max if study.metric[1] == "minimize" else min)(results, default=None)
    for entry in entries:
        point = entry["point"]
        value = worst if entry["result"] is None else entry["result"]
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        if entry["code"] is None:
            state = TrialState.RUNNING
        with contextlib.suppress(ValueError, KeyError):  # of a space that was changed since
            params = {name: point[name] for name in space}
            params |= {name: values.index(point[name]) for name, values in lists.items()}
            value = value if state is TrialState.COMPLETE else None
            yield point, create_trial(state=state, value=value, params=params, distributions=space)


def q_uniform(known, min, max, q=1):
    is_integer = {type(min), type(max), type(q)} == {int}
    kind = known.IntDistribution if is_integer else known.FloatDistribution
    return kind(min, max, step=q)


SPACES = {  # W&B's distributions as optuna's
    "int_uniform": lambda known, min, max: known.IntDistribution(min, max),
    "uniform": lambda known, min, max: known.FloatDistribution(min, max),
    "q_uniform": q_uniform,
    "log_uniform_values": lambda known, min, max: known.FloatDistribution(min, max, log=True),
}

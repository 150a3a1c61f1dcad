"""What a comparison trains: variants by stages by folds by seeds, and the trials that choose each variant's rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from bmjax.analysis.compare.planning import looks
from bmjax.config.base import Config
from bmjax.config.training import TrackingConfig
from bmjax.model.create import create, resolve
from bmjax.runs.folder import run_folder, saved_results
from bmjax.training import optim
from bmjax.training.cached import check as check_cached

Configs = dict[str, list[Config]]
"""The runs of each row of the table."""
_TRIAL_SEED = 1000
"""Trials have seeds from here on: apart from those compared, so that no run is chosen for its own luck."""
_MOST_TRIALS = 9


@dataclasses.dataclass(frozen=True)
class Design:
    """What a comparison varies beside variants and seeds."""

    attach: tuple[tuple[str, ...], ...] = ()
    """Places of attention to compare, each the names of stages; empty: the experiment's own alone."""
    folds: int = 0
    """Cross-validation: every variant and seed is trained once for each fold, and tested on it; 0: the one split."""
    tune: int = 0
    """Learning rates that each variant tries, in each fold; 0: all have the experiment's. One by which training
    diverges is not chosen."""
    wanted: float | None = None
    """Seeds are added until each difference is shown or is less than this; 0.02 is two points. None: no more."""
    max_seeds: int = 20
    """Seeds in all where they are added."""

    def __post_init__(self) -> None:
        if self.folds and self.folds < 3:
            raise ValueError(f"--folds is {self.folds}; expected 0 or at least 3, for verdicts from their spread")
        if self.tune and not 2 <= self.tune <= _MOST_TRIALS:
            raise ValueError(f"--tune is {self.tune}; expected 0, or 2 to {_MOST_TRIALS} learning rates")
        if self.wanted is not None:
            if not 0 < self.wanted < 1:
                raise ValueError(f"--until-shown is {100 * self.wanted:g}; expected points, more than 0 and below 100")
            if self.folds:
                raise ValueError(f"--until-shown goes with one split; expected no --folds, not {self.folds}")
            looks(self.max_seeds)


def rows_of(variants: Sequence[str], baseline: str, design: Design) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    """The rows of the table, the baseline among them: name -> (variant, stages, None for the experiment's).

    Without attention there is no place of it, so `none` is one row. Where places are compared, the others are named
    `se@conv4,last`.

    Raises:
      ValueError: a row is given twice, or the baseline is none of them though its place would have to be known.
    """
    variants = list(variants)
    if len(design.attach) < 2:
        place = design.attach[0] if design.attach else None
        if baseline not in variants:
            variants = [baseline, *variants]
        names = [(v, (v, place)) for v in variants]
    else:
        if baseline == "none" and "none" not in variants:
            variants = ["none", *variants]
        named = [(v, place) for v in variants for place in (design.attach if v != "none" else (("last",),))]
        names = [(v if v == "none" else f"{v}@{','.join(place)}", (v, place)) for v, place in named]
    folders = [_folder(name) for name, _ in names]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--variants is {' '.join(name for name, _ in names)}; expected each once")
    rows = dict(names)
    if baseline not in rows:
        raise ValueError(f"--baseline is {baseline!r}; expected one of the rows: {', '.join(rows)}")
    return rows


def _folder(name: str) -> str:
    return name.replace("/", "_").replace(":", "_")


def configurations(
    config: Config, variants: Sequence[str], seeds: int, baseline: str = "none", design: Design | None = None
) -> Configs:
    """The runs of each row, alike in all but attention, fold and seed: the same splits, schedule and budget. The test
    split is not opened by them.

    Options of attention are those of the experiment for the experiment's own variant, and the defaults for the others.

    Raises:
      ValueError: as `rows_of`; a variant or a stage is unknown, or there is no seed.
    """
    design = design or Design()
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; expected at least 1")
    configs: Configs = {}
    for name, (variant, place) in rows_of(variants, baseline, design).items():
        options = config.model.attention_options if variant == config.model.attention else {}
        changed = {"attention": variant, "attention_options": options}
        changed |= {} if place is None else {"attach": place}
        model = resolve(dataclasses.replace(config.model, **changed))
        row = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, final_test=False))
        create(model, 2, config.train.dtype)  # an unknown name fails here, before anything is trained
        if config.features.cached:
            check_cached(row)
        configs[name] = [
            _run(row, config, name, seed, (design.folds, fold))
            for fold in range(max(design.folds, 1))
            for seed in range(config.seed, config.seed + seeds)
        ]
    return configs


def _run(row: Config, config: Config, name: str, seed: int, place: tuple[int, int]) -> Config:
    """The run of one seed; place: (folds, fold)."""
    folds, fold = place
    folder, run_name, data = run_folder(config) / _folder(name), f"{config.name}-{_folder(name)}-{seed}", config.data
    if folds:
        folder, run_name = folder / f"fold{fold}", f"{run_name}-fold{fold}"
        row = _best_alone(row)
        data = dataclasses.replace(data, folds=folds, fold=fold)
    tracking = dataclasses.replace(config.tracking, group=config.tracking.group or config.name)
    return dataclasses.replace(
        row, name=run_name, seed=seed, run_dir=str(folder / f"seed{seed}"), data=data, tracking=tracking
    )


def _best_alone(run: Config) -> Config:
    """The run, kept by its best checkpoint alone: there are hundreds, and each checkpoint has the whole network."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, keep_last=False))


def rates(config: Config, count: int) -> list[float]:
    """So many learning rates, a factor of about three apart, around the configuration's own, to three digits."""
    own = optim.resolve(config.optim)["lr"]
    return [float(f"{own * 10 ** ((i - (count - 1) / 2) / 2):.3g}") for i in range(count)]


def trials(configs: Configs, design: Design) -> Configs:
    """The runs that choose the rates: of each row in each fold one for each rate, all from the same seed. They are
    judged on validation and never see the test split."""
    found: Configs = {}
    for name, runs in configs.items():
        first = {run.data.fold: run for run in reversed(runs)}
        found[name] = [_trial(first[fold], rate) for fold in sorted(first) for rate in rates(runs[0], design.tune)]
    return found


def _trial(run: Config, rate: float) -> Config:
    return dataclasses.replace(
        _best_alone(run),
        name=f"{run.name}-trial-{rate:g}",
        seed=_TRIAL_SEED + run.seed,
        run_dir=str(Path(run.run_dir).parent / "trials" / f"lr{rate:g}"),
        optim=dataclasses.replace(run.optim, lr=rate),
        tracking=TrackingConfig(),
    )


def tuned(configs: Configs, tried: Configs) -> tuple[Configs, dict[str, tuple[float, ...]]]:
    """(the runs, each with the rate that was best on validation in its row and fold; the rates by row and fold). Trials
    without results, which failed, are left out; each row and fold has another."""
    found: Configs = {}
    chosen: dict[str, tuple[float, ...]] = {}
    for name, runs in configs.items():
        best: dict[int, tuple[float, float]] = {}
        for trial in tried[name]:
            if "val" not in (results := saved_results(Path(trial.run_dir))):
                continue
            figure = results["val"][trial.train.monitor.removeprefix("-")]
            value, rate = -figure if trial.train.monitor_falls else figure, trial.optim.lr
            assert rate is not None
            if trial.data.fold not in best or value > best[trial.data.fold][0]:
                best[trial.data.fold] = value, rate
        chosen[name] = tuple(best[fold][1] for fold in sorted(best))
        found[name] = [
            dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=best[run.data.fold][1])) for run in runs
        ]
    return found, chosen


def by_row(configs: Mapping[str, Sequence[Config]]) -> dict[str, dict[int, list[Config]]]:
    """Row -> seed -> its runs, one a fold, in the order of folds."""
    found: dict[str, dict[int, list[Config]]] = {}
    for name, runs in configs.items():
        of_seed = found.setdefault(name, {})
        for run in runs:
            of_seed.setdefault(run.seed, []).append(run)
    return found

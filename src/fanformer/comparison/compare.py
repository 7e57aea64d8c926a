"""Several architectures trained on the same tokens in the same order, each at its own best learning rate.

For every architecture and budget of tokens, each learning rate is tried at the first seed; the best one then runs at
the other seeds. Where the best one lies at an end of the sweep, the sweep can go on beyond it. A rule-learning task is
compared in the same way, with sides of its hole in place of budgets; its rates can be chosen on a variant of the task
that is not reported, by what that leaves out.
"""

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fanformer.comparison.architectures import Architecture, architecture, family_and_size
from fanformer.comparison.decisions import decide_once
from fanformer.comparison.rule_learning import rule_config, rule_fields
from fanformer.comparison.rule_score import lacking
from fanformer.comparison.rules import HoleTask, RuleTask, create_task
from fanformer.comparison.sweep import TrialFailedError, run_trial_in_process
from fanformer.comparison.trial import Result, Trial, read_result
from fanformer.data.packing import PackedRows
from fanformer.data.preparation.prepare import prepare
from fanformer.data.prepared import PreparedData, open_prepared
from fanformer.data.sources.documents import is_prepared_folder, open_source
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import ConfigError, DataError, refuse_unknown
from fanformer.training.configuration import load_preset, parse_count, resolve
from fanformer.training.corpus import identity, refuse_two_vocabularies
from fanformer.training.events import Event, Listener, data_to
from fanformer.training.fields import CorpusConfig, RunConfig
from fanformer.training.folder import fingerprint

DATA_FOLDER, TRIALS_FOLDER = "data", "trials"
RATES = -1
"""Stands for a variant in trainings that do nothing but choose a learning rate."""
OF_LANGUAGE = ("data", "tokens", "candidate_tokens", "preset", "evaluations", "eval_tokens")
"""Fields of a comparison that mean nothing for a rule."""
_LISTS: Mapping[str, Callable[[Any], Any]] = {
    "architectures": str,
    **dict.fromkeys(("tokens", "candidate_tokens"), lambda value: parse_count(str(value))),
    "learning_rates": float,
    **dict.fromkeys(("seeds", "hole_sides"), int),
}
"""Fields of a comparison that are lists, or in a file single values, each with what reads one of them."""
_OWN_FIELDS = ("output_dir", "resume", "overwrite", "learning_rate", "seed", "data", "tokens", "max_steps", "epochs")
"""Fields of RunConfig that a comparison sets itself."""
_OF_OTHER_RUNS = ("init_from", "lora_rank", "objective")
"""Fields of RunConfig for runs that do not learn text from fresh weights."""


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        architectures: as `architectures.architecture` reads them; the first one's family is the candidate, all others
            are baselines.
        data: as `fanformer train --data`.
        tokens: budgets to train each architecture for.
        candidate_tokens: more budgets, for the candidate alone; from the ends of its trainings of several lengths the
            tokens to a baseline's loss are read. One above all `tokens` is set beside the baselines at the largest of
            those: equal operations, or equal time.
        learning_rates: to sweep.
        seeds: to repeat the best learning rate with.
        preset: whose training recipe is taken over.
        run: fields of RunConfig, for a rule of rule_learning.FIELDS, the same for all.
        evaluations: how often the held-out loss is measured in a run.
        eval_tokens: held-out tokens of each measurement.
        extend: how many learning rates to add, one by one, while the best one is at an end of the sweep.
        rule: name of a rule-learning task to train instead of language.
        hole_sides: of a rule with a hole, each a comparison of its own.
        rates_on: fields of the rule's task, such as its hole's side, on which each architecture's learning rate is
            chosen at the first seed, by the accuracy, or the error, on what is left out there; none of the variants
            that are reported. Empty: for every variant, by the loss on what is trained.
        ablation: whether the first architecture is a default of which each of the others changes something, rather
            than a candidate beside its baselines.
    """

    architectures: tuple[str, ...]
    data: str = "stdlib"
    tokens: tuple[int, ...] = (2_000_000,)
    candidate_tokens: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = (0.0025, 0.005, 0.01)
    seeds: tuple[int, ...] = (0,)
    preset: str = "nano"
    run: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 16
    eval_tokens: int = 131_072
    extend: int = 0
    rule: str | None = None
    hole_sides: tuple[int, ...] = ()
    rates_on: Mapping[str, Any] = field(default_factory=dict)
    ablation: bool = False

    def __post_init__(self) -> None:
        for name in ("architectures", "tokens", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"`{name}` must hold at least one value, each once, got {list(values)}.")
        budgets = [*self.tokens, *self.candidate_tokens]
        if len(set(budgets)) < len(budgets):
            raise ConfigError(f"`tokens` and `candidate_tokens` must hold each value once, got {budgets}.")
        for name in ("tokens", "candidate_tokens", "learning_rates"):
            if min(getattr(self, name), default=1) <= 0:
                raise ConfigError(f"`{name}` must be above 0, got {min(getattr(self, name))}.")
        for name in ("evaluations", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in _OWN_FIELDS if self.rule is None else ("learning_rate", "seed"):
            if name in self.run:
                raise ConfigError(
                    f"`{name}` is set by the comparison itself, for every training: leave it out of `run`."
                )
        for name in self.run:
            if name.startswith("model.") and name != "model.vocab_size":
                remedy = "write it behind the architecture that it is for, as in nano:rms_norm_eps=0.001."
                raise ConfigError(f"`{name}` is no setting of all trainings, got {self.run[name]!r}: {remedy}")
        for spec in self.architectures:
            architecture(spec)
        if self.rule is not None:
            for side in self.variants:
                if self.rates_on and self.rule_task(side) == self.rule_task(RATES):
                    raise ConfigError(
                        f"`rates_on` must be a variant of {self.rule} that is not reported, got {dict(self.rates_on)}: "
                        "choose another hole or other data."
                    )
            self.rule_settings()
            return
        if self.rates_on:
            raise ConfigError("`rates_on` is for a rule, whose task has variants: leave it out.")
        if self.hole_sides:
            raise ConfigError("`hole_sides` is for a rule that has a hole: name it, as `rule: modular-addition`.")
        for name in _OF_OTHER_RUNS:
            if name in self.run:
                raise ConfigError(
                    f"`{name}` does not apply to a comparison, got {self.run[name]!r}: every architecture learns text "
                    "from fresh weights; leave it out of `run`."
                )
        fewest = min(self.variants)
        config = self.run_config(fewest)
        _check_tokenizer(config.corpus)
        if fewest < config.batch.tokens_per_step:
            step = config.batch.tokens_per_step
            raise ConfigError(f"`tokens` must be at least one step of {step:,}, got {fewest:,}.")

    @property
    def variants(self) -> tuple[int, ...]:
        """What architectures are trained for: budgets of tokens, sides of a hole, or 0 for a rule without one."""
        budgets = (*self.tokens, *self.candidate_tokens)
        if self.rule is None:
            return tuple(sorted(budgets))
        return tuple(sorted(self.hole_sides)) or (getattr(create_task(self.rule), "hole_side", 0),)

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Every architecture with every variant that it is trained for."""
        candidate = family_and_size(self.architectures[0])[0]
        return [
            (spec, variant)
            for variant in self.variants
            for spec in self.architectures
            if variant not in self.candidate_tokens or family_and_size(spec)[0] == candidate
        ]

    def rule_task(self, side: int) -> RuleTask:
        """Return the task with a hole of this side, or at RATES the one that `rates_on` asks for."""
        if side == RATES:
            return create_task(self.rule or "", **self.rates_on)
        usual = create_task(self.rule or "")
        if isinstance(usual, HoleTask):
            return create_task(usual.name, hole_side=side)
        if self.hole_sides:
            raise ConfigError(f"`hole_sides` is for a rule that has a hole, which {self.rule} has not: leave it out.")
        return usual

    def rule_settings(self) -> dict[str, Any]:
        """Return the fields of RunConfig that the trainings of a rule share, recipe and all but the learning rate."""
        task = create_task(self.rule or "")
        rule_config(task, ".", **self.run)  # checks their values
        return {name: value for name, value in rule_fields(task, **self.run).items() if name != "learning_rate"}

    def run_config(self, tokens: int) -> RunConfig:
        """Return the configuration that the trainings of one budget share."""
        return resolve(overrides={**self.shared_settings(tokens), "data": self.data})

    def shared_settings(self, tokens: int) -> dict[str, Any]:
        """Return the fields of RunConfig that the trainings of one budget share, data and machine aside."""
        probe = resolve(overrides={"preset": self.preset, **self.run, "tokens": tokens})
        steps = max(1, round(tokens / probe.batch.tokens_per_step))
        log_steps = max(1, steps // 100)
        every = max(log_steps, steps // self.evaluations // log_steps * log_steps)
        return {
            "preset": self.preset,
            "log_steps": log_steps,
            "eval_steps": every,
            "eval_tokens": self.eval_tokens,
            "final_eval_tokens": self.eval_tokens,
            "keep_best": False,
            "keep_last": 1,
            **self.run,
            "tokens": tokens,
        }

    def settings(self, spec: str, tokens: int) -> dict[str, Any]:
        """Return the fields of RunConfig that an architecture is trained with, rate and machine aside."""
        chosen = architecture(spec)
        fields = {**chosen.recipe, **chosen.applying(self.shared_settings(tokens))}
        fields.pop("tokenizer", None)  # the data that were prepared with it bring it
        return fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Comparison":
        """Return the comparison of an entry of a queue: lists may be single values, counts may be written 2M.

        Raises:
            ConfigError: if a field is unknown (the nearest is offered), missing or of the wrong type.
        """
        refuse_unknown(fields, (item.name for item in dataclasses.fields(cls)), "a field of a comparison")
        for key in OF_LANGUAGE:
            if key in fields and fields.get("rule") is not None:
                raise ConfigError(f"`{key}` does not apply to the rule {fields['rule']}: leave it out.")
        if "architectures" not in fields:
            raise ConfigError("`architectures` is missing: name at least one, such as [nano, llama@nano].")
        made = dict(fields)
        for key, value in fields.items():
            try:
                if key == "seeds" and isinstance(value, int):
                    made[key] = tuple(range(value))
                elif key in _LISTS:
                    made[key] = tuple(map(_LISTS[key], value if isinstance(value, list | tuple) else [value]))
                elif key in ("rates_on", "run"):
                    made[key] = dict(value or {})
            except (TypeError, ValueError) as error:
                reason = str(error).rstrip(".")
                raise ConfigError(f"`{key}` of a comparison cannot be {value!r}: {reason}.") from error
        if not isinstance(made.get("ablation", False), bool):
            raise ConfigError(f"`ablation` of a comparison must be true or false, got {made['ablation']!r}.")
        for name in ("evaluations", "eval_tokens", "extend"):
            if not isinstance(made.get(name, 0), int):
                raise ConfigError(f"`{name}` of a comparison must be a whole number, got {made[name]!r}.")
        return cls(**made)


def _check_tokenizer(corpus: CorpusConfig) -> None:
    """Refuse a tokenizer that is asked for where it has no effect, or leaves another field without one."""
    if corpus.tokenizer is None:
        return
    refuse_two_vocabularies(corpus)
    if is_prepared_folder(corpus.data):
        raise ConfigError(
            f"`tokenizer` does not apply to the prepared data {corpus.data}, got {corpus.tokenizer}: they have their "
            "own; leave it out."
        )


@dataclass(frozen=True)
class Outcome:
    """A training of a comparison and how it ended.

    Attributes:
        trial: what was trained.
        variant: one of `Comparison.variants`.
        result: how it ended, None where it could not be done.
        error: why it could not.
    """

    trial: Trial
    variant: int
    result: Result | None
    error: str | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """Its numbers by name; none where it diverged or could not be done."""
        return {} if self.result is None else self.result.figures

    @property
    def loss(self) -> float:
        """Held-out loss in nats per token, or a rule's training loss; infinite where there is none."""
        return self.figures.get("loss", math.inf)


OnOutcome = Callable[[Outcome, PreparedData | None], None]


def run_comparison(
    comparison: Comparison,
    folder: Path,
    listener: Listener,
    on_outcome: OnOutcome | None = None,
    deadline: float | None = None,
    shared: Path | None = None,
    known: Callable[[Trial], Result | None] = lambda trial: None,
    jobs: int = 1,
) -> list[Outcome]:
    """Train everything that is not trained yet and return all outcomes.

    Args:
        comparison: what to compare.
        folder: for what belongs to this comparison alone; the same call goes on there.
        listener: hears what happens.
        on_outcome: called with every training's outcome, old ones too.
        deadline: when to stop, on the clock of `time.monotonic`; None for never.
        shared: for data and trainings, which other comparisons may have in common; default: `folder`.
        known: returns what is known of a training from elsewhere, which is then not done again.
        jobs: trainings at a time. What they come to does not depend on it; how fast they are does.

    Raises:
        ConfigError, DataError: on bad input, before the first training.
        OutOfTimeError: at the deadline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = shared or folder
    data = _open_data(comparison, shared, listener) if comparison.rule is None else None
    sweep = _Sweep(comparison, folder, shared / TRIALS_FOLDER, data, listener, on_outcome, deadline, known, jobs)
    return sweep.run()


def _open_data(comparison: Comparison, root: Path, listener: Listener) -> PreparedData:
    """Prepare the data once for all trainings, or open those that are prepared.

    Raises:
        DataError: if they do not fill one row, or were prepared from something else.
    """
    config = comparison.run_config(max(comparison.variants))
    if is_prepared_folder(comparison.data):
        data = open_prepared(Path(comparison.data))
    else:
        source = open_source(comparison.data)
        corpus = config.corpus
        vocab_size = corpus.vocab_size or load_preset(comparison.preset).model["vocab_size"]
        way = [str(corpus.data), corpus.tokenizer, vocab_size, corpus.held_out_fraction, corpus.max_data_bytes]
        here = root / f"{DATA_FOLDER}-{hashlib.sha256(json.dumps(way).encode()).hexdigest()[:8]}"
        if is_prepared_folder(str(here)):
            data = open_prepared(here)
            if identity(data.metadata["source"]) != identity(source.describe()):
                raise DataError(
                    f"{here.absolute()} was prepared from {comparison.data} as it was then, which has changed: choose "
                    "another --output-dir."
                )
        else:
            data = prepare(
                source,
                here,
                tokenizer=load_tokenizer(config.corpus.tokenizer) if config.corpus.tokenizer is not None else None,
                vocab_size=vocab_size,
                held_out_fraction=config.corpus.held_out_fraction,
                max_bytes=config.corpus.max_data_bytes,
                progress=data_to(listener),
            )
    rows = len(PackedRows(data.split("train"), config.batch.sequence_length))
    repeated = max(comparison.variants) / max(1, rows * config.batch.sequence_length)
    if repeated > 1:
        listener(Event("note", f"the longest training reads the data {repeated:.1f} times"))
    return data


def _eval_digest(comparison: Comparison) -> str:
    """Return a hash of the text that `eval_data` names, which may change under its name; empty where it names none.

    Raises:
        DataError: if there is no such text.
    """
    spec = comparison.run_config(max(comparison.variants)).corpus.eval_data
    return "" if spec is None else fingerprint(identity(open_source(spec).describe()))


@dataclass
class _Sweep:
    """The trainings of one comparison; fields as `run_comparison` has them, `trials` for the folders of trainings."""

    comparison: Comparison
    folder: Path
    trials: Path
    data: PreparedData | None
    listener: Listener
    on_outcome: OnOutcome | None
    deadline: float | None
    known: Callable[[Trial], Result | None]
    jobs: int
    machine: dict[str, Any] = field(default_factory=dict)
    eval_digest: str = ""
    built: dict[str, Architecture] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    planned: int = 0

    def _decide(self) -> dict[str, Any]:
        """Decide about the machine once for all trainings, so that they differ in nothing but what is compared."""
        longest = max(self.comparison.variants)
        largest = max(built.count().training_operations for built in self.built.values())
        return decide_once(self.comparison.run_config(longest).machine, largest * longest, self.folder, self.listener)

    def run(self) -> list[Outcome]:
        """Sweep the learning rates, then repeat the best ones."""
        comparison = self.comparison
        self.built = {spec: architecture(spec) for spec in comparison.architectures}
        if comparison.rule is None:
            self.machine, self.eval_digest = self._decide(), _eval_digest(comparison)
        rates, cells = sorted(comparison.learning_rates), comparison.cells
        first, *others = comparison.seeds
        swept = cells
        if comparison.rates_on:
            swept, others = [(spec, RATES) for spec in comparison.architectures], list(comparison.seeds)
        self.planned = len(swept) * len(rates) + len(cells) * len(others)
        self._train_all([(*cell, rate, first) for rate in rates for cell in swept])
        for spec, variant in swept:
            self._extend(spec, variant, rates)
        best = {cell: best_rate(list(self.outcomes.values()), *cell) for cell in cells}
        repeated = {cell: rate for cell, rate in best.items() if rate is not None}
        self.planned -= len(others) * (len(cells) - len(repeated))
        self._train_all([(*cell, rate, seed) for seed in others for cell, rate in repeated.items()])
        return list(self.outcomes.values())

    def _extend(self, spec: str, variant: int, rates: Sequence[float]) -> None:
        """Add learning rates while the best one is the lowest or the highest that was tried."""
        tried = list(rates)
        for _ in range(self.comparison.extend):
            best = best_rate(list(self.outcomes.values()), spec, variant)
            if best is None or len(tried) < 2 or best not in (tried[0], tried[-1]):
                return
            step = (tried[-1] / tried[0]) ** (1 / (len(tried) - 1))
            added = float(f"{best * step if best == tried[-1] else best / step:.3g}")
            tried = sorted([*tried, added])
            self.planned += 1
            self._train_all([(spec, variant, added, self.comparison.seeds[0])])

    def _trial(self, spec: str, variant: int, rate: float, seed: int) -> Trial:
        chosen = self.built[spec]
        about: dict[str, Any] = {"block": chosen.block, "architecture_digest": chosen.digest}
        if self.data is None:
            task = self.comparison.rule_task(variant).to_dict()
            rule = {"task": task.pop("name"), **task}
            return Trial(spec, rate, seed, chosen.applying(self.comparison.rule_settings()), rule=rule, **about)
        settings, data = {**self.comparison.settings(spec, variant), **self.machine}, self.data
        about["eval_digest"] = self.eval_digest
        return Trial(spec, rate, seed, settings, str(data.folder), data.fingerprint, **about)

    def _tell(self, kind: Literal["begin", "end"], trial: Trial, text: str = "") -> None:
        counts = {"done": len(self.outcomes), "total": self.planned}
        self.listener(Event(kind, text, figures=counts, name=trial.name))

    def _train_all(self, asked: Sequence[tuple[str, int, float, int]]) -> None:
        """Train each (architecture, variant, rate, seed), `jobs` at a time, and keep the outcomes in the order given.

        Raises:
            OutOfTimeError: at the deadline.
        """
        halt, trials = threading.Event(), [(self._trial(*one), one[1]) for one in asked]
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="training") as pool:
            waiting = [pool.submit(self._train, trial, variant, halt) for trial, variant in trials]
            try:
                for future in waiting:  # in their order, whichever ends first: what is made of them depends on it
                    outcome, text = future.result()
                    self.outcomes[outcome.trial.name] = outcome
                    self._tell("end", outcome.trial, text)
                    if self.on_outcome is not None:
                        self.on_outcome(outcome, self.data)
            finally:  # whatever ends this ends the trainings under way, which save
                halt.set()
                pool.shutdown(cancel_futures=True)

    def _train(self, trial: Trial, variant: int, halt: threading.Event) -> tuple[Outcome, str]:
        """Return a training's outcome, and the same in words."""
        folder = self.trials / trial.name
        self._tell("begin", trial)
        try:
            result = self.known(trial) if read_result(folder) is None else None
            if result is None:
                result = run_trial_in_process(trial, folder, self.listener, self.deadline, halt)
        except TrialFailedError as error:
            return Outcome(trial, variant, None, str(error)), f"failed: {error}"
        return Outcome(trial, variant, result), result.in_words()


def sweep_of(outcomes: Sequence[Outcome], spec: str, variant: int) -> list[Outcome]:
    """Return the trainings that choose an architecture's rate: those at RATES, else the variant's, at one seed."""
    mine = [outcome for outcome in outcomes if outcome.trial.architecture == spec]
    found = [one for one in mine if one.variant == RATES] or [one for one in mine if one.variant == variant]
    return [one for one in found if one.trial.seed == found[0].trial.seed]


def best_rate(outcomes: Sequence[Outcome], spec: str, variant: int) -> float | None:
    """Return an architecture's best learning rate at the sweep's seed, None where no training finished.

    It is the one with the most right answers among what is left out where rates are chosen on a task of their own, of
    several the one surest of them, or of a series the one with the lowest error; else the one with the lowest loss at
    this variant.
    """
    finished = [outcome for outcome in sweep_of(outcomes, spec, variant) if math.isfinite(outcome.loss)]
    if not finished:
        return None
    elsewhere = finished[0].variant == RATES
    best = min(finished, key=lambda one: lacking(one.figures) if elsewhere else (one.loss,))
    return best.trial.learning_rate

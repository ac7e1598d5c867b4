"""What a choice rests on, as the parts of a recommendation's entry."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

from sd35bench import words
from sd35bench.analysis.commands import Elsewhere, results_dir_of
from sd35bench.analysis.pairs import Comparison
from sd35bench.analysis.quality import row_metric
from sd35bench.analysis.speed import Latency, latency_summary
from sd35bench.analysis.table import GUARD, Row, Table
from sd35bench.fields import SETTING, describe
from sd35bench.recommend.choice import Choice
from sd35bench.recommend.confirm import HeldOut, prompts_wanted
from sd35bench.recommend.named_defaults import (
    NAMED,
    PRESET,
    NamedDefault,
    find_default,
    not_applicable,
    request_with,
    verdict_beside,
)
from sd35bench.recommend.pareto import RESAMPLES, Front, Speeds, peak_bytes, usd
from sd35bench.recommend.profiles import LIMITS, Profile
from sd35bench.recommend.reproduce import api_body, run_command, snippet
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import POWER, TAIL, p_within
from sd35bench.types import Task, to_json

Claim = tuple[str, str]
"""The chosen setting and a default, by their hashes: that the first is better."""

FRONT = ("on_front", "p_dominated")
_SETTING = ("model", "backend", *SETTING, "threads")


def setting_of(row: Row) -> dict[str, Any]:
    """A row's setting as the documents show it."""
    return {name: row.setting[name] for name in _SETTING}


def confirmation_text(confirmation: Mapping[str, Any]) -> str:
    """One choice's confirmation in a sentence, without a full stop."""
    status = confirmation["status"]
    if status == "impossible":
        return f"not confirmed: {confirmation['why']}"
    if status == "nothing to hold it against":
        return "not confirmed: there is nothing within the limits to hold it against"
    if status == "not run":
        return "not confirmed on held-out prompts: they have not been run"
    if status == "not run enough":
        run, wanted = confirmation["n_prompts"], confirmation["wanted"]
        return f"not confirmed: held-out prompts not run enough, {run} of the planned {wanted}"
    found = words.estimate(words.read_estimate(confirmation["difference"]), 2, "+")
    if shown_worse(confirmation):
        status = "worse, by less than the margin,"
    text = (
        f"{status} on {confirmation['n_prompts']} held-out prompts"
        f" ({confirmation['n_pairs']} images): {found} against"
        f" {describe(confirmation['against'])}, margin {words.plain(confirmation['margin'])}"
    )
    more = confirmation["more"]
    if more is None:
        return text
    return (
        f"{text}; about {more['images']} more images would decide, in a new plan on other prompts:"
        " adding to these would be looking twice"
    )


def shown_worse(confirmation: Mapping[str, Any]) -> bool:
    """Whether a choice that was confirmed within its margin is shown to be worse all the same."""
    found = confirmation["difference"]
    if confirmation["status"] != "confirmed" or found is None or found["ci95"] is None:
        return False
    return found["ci95"][1] < 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One profile's choice with everything that it was made from."""

    study: Any
    table: Table
    comparison: Comparison
    speed: Speeds
    front: Front
    held_out: HeldOut
    profile: Profile
    choice: Choice

    @property
    def row(self) -> Row:
        """The chosen row."""
        return self._row(self.choice.chosen)

    @property
    def n_prompts(self) -> int:
        """Prompts that the choice was made on."""
        return int(self.comparison.clusters.max()) + 1

    @property
    def against(self) -> int | None:
        """What the choice has to stand against on other prompts, if there is anything.

        The reference, or the best of the others where the reference itself was chosen.
        """
        if self.choice.reference != self.choice.chosen:
            return self.choice.reference
        return self.choice.rival

    @property
    def wanted(self) -> int:
        """Held-out prompts that a confirmation takes: planned from the choice's own spread."""
        difference = None
        if self.against is not None:
            difference = self.comparison.differences(self.choice.chosen)[self.against]
        ref = self.row.quality_records()[0].trial.prompt
        return prompts_wanted(difference, self.choice.margin, self.n_prompts, ref)

    def document(self) -> dict[str, Any]:
        """The entry's `evidence`."""
        choice, i = self.choice, self.choice.chosen
        latency = latency_summary(self.row.timed)
        quality = self._quality(i)
        test = choice.tests.get(i)
        return {
            "headline": self._headline(quality, latency),
            "reason": choice.reason,
            "caveats": choice.caveats,
            "distinguishable": choice.distinguishable,
            "definitive": choice.definitive,
            "expected_loss": choice.expected_loss,
            "objective": _objective(self.comparison.metric),
            "wanted": self.profile.objective,
            "reference": self.profile.reference,
            "quality": quality,
            "metrics": self._metrics(),
            "latency_s": to_json(latency),
            "speed_basis": self.speed.basis,
            "speed": self.speed.values[i],
            **self._front(i),
            "resamples": RESAMPLES,
            "peak_bytes": peak_bytes(self.comparison.candidates[i]),
            "usd_per_image": self._usd(i),
            "limit": choice.limits.latency,
            "limit_close": i in choice.limits.close,
            **{name: getattr(self.profile, name) for name in LIMITS},
            "margin": choice.margin,
            "best": setting_of(self._row(choice.best)),
            "difference_from_best": self._difference(i),
            "non_inferiority": None if test is None else self._test(i),
            "more_images": self._more(),
            "n_pairs": self.comparison.quality.shape[1],
            "n_prompts": self.n_prompts,
            "settings_compared": len(self.comparison.candidates),
            **self._failures(i),
            "failures_limit": self.profile.failures_limit,
        }

    def alternatives(self) -> list[dict[str, Any]]:
        """Every other setting, best quality first, with why it was not chosen."""
        compared, verdicts = self.comparison, self.choice.verdicts
        means = compared.quality.mean(axis=1)
        found = [
            {
                "setting": setting_of(self._row(i)),
                "setting_id": self._row(i).id,
                "quality": self._quality(i),
                "difference_from_best": self._difference(i),
                "non_inferiority": self._test(i),
                "speed": self.speed.values[i],
                **self._front(i),
                **self._failures(i),
                "why_not": verdicts[i],
            }
            for i in sorted(verdicts, key=lambda i: -means[i])
        ]
        missing = ("quality", "difference_from_best", "non_inferiority", "speed", *FRONT)
        found += [
            {
                "setting": setting_of(c.row),
                "setting_id": c.row.id,
                **dict.fromkeys(missing),
                "failed": len(c.failed),
                "n_trials": len(c.tried),
                "why_not": why,
            }
            for c, why in compared.left_out
        ]
        return found

    def confirmation(self, why_not: str | None) -> dict[str, Any]:
        """What held-out prompts say of the choice; `why_not` is why there can be none."""
        against = self.against
        if why_not is not None:
            return {"status": "impossible", "why": why_not}
        if against is None:
            return {"status": "nothing to hold it against"}
        settings = [self._row(j).setting["setting"] for j in (self.choice.chosen, against)]
        found = self.held_out.confirm(settings[0], settings[1], self.choice.margin, self.wanted)
        return {
            **found,
            "against": setting_of(self._row(against)),
            "against_id": self._row(against).id,
            "margin": self.choice.margin,
            "metric": self.comparison.metric,
        }

    def default_indices(self, task: Task) -> list[int]:
        """The candidates that are named defaults."""
        rows = [c.row for c in self.comparison.candidates]
        found = [find_default(d, rows, self.row) for d in NAMED if d.task is task]
        return [i for i, row in enumerate(rows) if any(row is f for f in found)]

    def claims(self, task: Task) -> dict[Claim, float]:
        """p-values of "no better than this default", of those that held-out prompts can judge."""
        others = [i for i in self.default_indices(task) if i != self.choice.chosen]
        found = {self._claim(i): self._held_difference(i) for i in others}
        return {claim: p_within(d, 0.0) for claim, d in found.items() if d is not None}

    def named_defaults(self, task: Task, p_holm: Mapping[Claim, float]) -> list[dict[str, Any]]:
        """The choice beside each default that others ship for the task.

        `p_holm` are the p-values of all profiles' claims together, corrected for their number.
        """
        return [self._beside(d, p_holm) for d in NAMED if d.task is task]

    def command(self) -> str:
        """The command that makes the chosen setting's images again."""
        return run_command(self.row.quality_records(), f"recommended-{self.profile.name}")

    def snippet(self) -> str | None:
        """The first image in plain diffusers; ``None`` where no weights made it."""
        record = self.row.quality_records()[0]
        if record.trial.load.model.path == "":
            return None
        digest = record.trial.request.init_image
        init_path = None if digest is None else self.study.init_path(digest).resolve()
        return snippet(record, init_path)

    def api(self) -> dict[str, Any]:
        """The first image as a create of the hosted protocol."""
        return api_body(self.row.quality_records()[0])

    def _row(self, i: int) -> Row:
        return self.comparison.candidates[i].row

    def _quality(self, i: int) -> dict[str, Any]:
        return {"metric": self.comparison.metric, **self.comparison.mean(i).document()}

    def _metrics(self) -> dict[str, Any]:
        names = sorted(name for name in self.table.scores if name != GUARD)
        found = {name: row_metric(self.study, self.table, self.row, name) for name in names}
        return {name: entry for name, entry in found.items() if entry["value"] is not None}

    def _front(self, i: int) -> dict[str, Any]:
        """Whether a candidate is on the front, and its probability of being dominated."""
        share = self.front.dominated
        values = bool(self.front.on_front[i]), None if share is None else float(share[i])
        return dict(zip(FRONT, values, strict=True))

    def _failures(self, i: int) -> dict[str, int]:
        candidate = self.comparison.candidates[i]
        return {"failed": len(candidate.failed), "n_trials": len(candidate.tried)}

    def _claim(self, i: int) -> Claim:
        return self.row.setting["setting"], self._row(i).setting["setting"]

    def _held_difference(self, i: int) -> Interval | None:
        """The choice minus candidate `i` on held-out prompts, once the planned number was run."""
        if self.held_out.prompts_of(*self._claim(i)) < self.wanted:
            return None
        return self.held_out.difference(*self._claim(i))

    def _usd(self, i: int) -> float | None:
        time_s = self.speed.values[i] if self.speed.basis == "latency_s" else None
        return usd(self.comparison.candidates[i], time_s, self.profile)

    def _difference(self, i: int) -> dict[str, Any] | None:
        """From the reference, which is the best unless the profile names a default."""
        if i == self.choice.reference or i not in self.choice.differences:
            return None
        return self.choice.differences[i].document()

    def _test(self, i: int) -> dict[str, Any] | None:
        test = self.choice.tests.get(i)
        if test is None:
            return None
        rival = setting_of(self._row(test.rival))
        found = {"shown": test.shown, "p": test.p, "p_adjusted": test.p_adjusted}
        return {**found, "rival": rival, "difference": test.difference.document()}

    def _more(self) -> dict[str, Any] | None:
        """How many more images would decide what is open, or that no practicable number would."""
        more = self.choice.more
        if not more:
            return None
        one, other = (setting_of(self._row(more[k])) for k in ("candidate", "against"))
        question = (
            f"whether {describe(one)} is within {self.choice.margin:g} of {describe(other, [one])}"
        )
        if more["images"] is None:
            said = f"no practicable number of images would decide {question}"
        else:
            said = (
                f"about {more['images']} more images ({more['prompts']} prompts) would decide"
                f" {question}"
            )
        numbers = {k: more[k] for k in ("prompts", "images")}
        return {"text": said, **numbers, "power": POWER, "settings": [one, other]}

    def _headline(self, quality: dict[str, Any], latency: Latency) -> str:
        """One line: what to use, how good it is and what it costs."""
        name = describe(setting_of(self.row))
        if len({c.row.setting["backend"] for c in self.comparison.candidates}) > 1:
            name += f", on {self.row.setting['backend']}"
        found = words.estimate(words.read_estimate(quality), 2)
        figures = [f"{self.comparison.metric.replace('_', ' ')} {found}"]
        if latency.p50 is not None:
            figures.append(f"{words.digits(latency.p50)} s an image")
        more = self.choice.more
        sure = "" if self.choice.definitive else ", provisional"
        if sure and more and more["images"] is not None:
            sure += f": about {more['images']} more images would decide"
        return "; ".join([f"{name} ({', '.join(figures)}){sure}", *self.choice.caveats])

    def _beside(self, default: NamedDefault, p_holm: Mapping[Claim, float]) -> dict[str, Any]:
        """One named default beside the choice: in the study, or with the command that adds it."""
        wanted = {
            "name": default.name,
            "source": default.source,
            **default.asked,
            "skip_layer_guidance": default.skips_layers,
        }
        blank = dict.fromkeys(
            ("setting_id", "quality", "difference", "on", "speed_ratio", "verdict", "command")
        )
        why = not_applicable(default, self.row)
        if why is not None:
            return {**wanted, **blank, "status": "not applicable", "verdict": why}
        rows = [c.row for c in self.comparison.candidates]
        row = find_default(default, rows, self.row)
        if row is None:
            command = self._adding(default)
            return {**wanted, **blank, "status": "not in the study", "command": command}
        i = next(i for i, r in enumerate(rows) if r is row)
        return {**wanted, **blank, **self._against_default(i, p_holm), "setting_id": row.id}

    def _against_default(self, i: int, p_holm: Mapping[Claim, float]) -> dict[str, Any]:
        """The choice minus candidate `i`: on held-out prompts where there are enough."""
        quality = self._quality(i)
        if i == self.choice.chosen:
            return {"status": "chosen", "quality": quality, "verdict": "this is the choice"}
        held = self._held_difference(i)
        found = self.comparison.differences(self.choice.chosen)[i] if held is None else held
        above = None if held is None else p_holm[self._claim(i)] < TAIL
        return {
            "status": "in the study",
            "quality": quality,
            "difference": found.document(),
            "on": "the choice's prompts" if held is None else "held-out prompts",
            "speed_ratio": self._speed_ratio(i),
            "verdict": verdict_beside(found, self.choice.margin, above),
        }

    def _speed_ratio(self, i: int) -> dict[str, Any]:
        """How many times as long the default takes: paired where lone images are, else by p50."""
        ratio = self.comparison.log_speed_ratio(i, self.choice.chosen)
        if self.speed.basis == "latency_s" and ratio is not None:
            ends = None if ratio.ci95 is None else [exp(end) for end in ratio.ci95]
            return {"value": exp(ratio.value), "ci95": ends, "n": ratio.n}
        value = self.speed.values[i] / self.speed.values[self.choice.chosen]
        return {"value": value, "ci95": None, "n": None}

    def _adding(self, default: NamedDefault) -> str:
        """The command that adds a default to the study, on the prompts of the choice."""
        records = self.row.quality_records()
        request = request_with(default, records[0].trial.request)
        preset = PRESET if default.skips_layers else None
        asked = Elsewhere(skip_layers=preset, results_dir=results_dir_of(self.study.path))
        return run_command(records, self.study.name, asked, request)


def _objective(metric: str) -> str:
    if metric == "edit_quality":
        return "harmonic mean, per image, of prompt accuracy and init kept: an edit needs both"
    return metric

"""`recommend`: a setting per profile and task, chosen by paired data, with its evidence.

The choice is made on this study's prompts. It says so: ``confirmed`` is false until the chosen
settings have been compared on prompts that the choice never saw.
"""

from collections.abc import Mapping
from typing import Any

from sd35bench.analysis.choice import Choice, Speeds, choose, speeds
from sd35bench.analysis.pairs import Comparison, candidates, compare, pick_family
from sd35bench.analysis.profiles import Profile, as_profiles
from sd35bench.analysis.quality import row_metric
from sd35bench.analysis.reproduce import run_command, snippet
from sd35bench.analysis.summary import latency_summary
from sd35bench.analysis.table import GUARD, Row, Table, read_table
from sd35bench.errors import ConfigError
from sd35bench.types import Record, Task

__all__ = ["recommend_document"]

_SETTING = (
    "model",
    "backend",
    "steps",
    "cfg",
    "prompt_strength",
    "sampler",
    "shift",
    "skip_layer_guidance",
    "max_sequence_length",
    "width",
    "height",
    "output_format",
    "output_quality",
    "threads",
)


def recommend_document(
    study: Any, profiles: Mapping[str, Profile | Mapping[str, Any]]
) -> dict[str, Any]:
    """Recommend a setting of the study (`sd35bench.store.Study`) for each profile and task.

    Returns: ``{"study", "confirmed", "prompts", "profiles": {name: {"text-to-image": entry or
    None, "image-to-image": entry or None}}, "notes", "warnings"}``; an entry has `setting`,
    `setting_id`, `evidence`, `alternatives`, `command` and `snippet`, or, where no setting meets
    the profile, `setting` ``None`` and the evidence's `reason`.

    Raises: ConfigError where neither task has two settings to compare, or for a bad profile.
    """
    checked = as_profiles(profiles)
    table = read_table(study)
    tasks: dict[str, _Task] = {}
    notes: list[str] = []
    problems: list[str] = []
    for task in Task:
        rows, left = pick_family(table.rows, task)
        notes += left
        if rows:
            try:
                tasks[task.value] = _Task(study, table, rows, task)
            except ConfigError as exc:
                problems.append(str(exc))
    if not tasks:
        raise ConfigError(_nothing(study, table.rows, problems))
    return {
        "study": study.name,
        "confirmed": False,
        "confirmation": "chosen on these prompts; not confirmed on held-out prompts",
        "prompts": _prompts(tasks),
        "profiles": {
            p.name: {t.value: tasks[t.value].entry(p) if t.value in tasks else None for t in Task}
            for p in checked
        },
        "notes": notes + problems,
        "warnings": table.warnings,
    }


class _Task:
    """The settings of one task, compared once and asked for every profile."""

    def __init__(self, study: Any, table: Table, rows: list[Row], task: Task) -> None:
        self.study, self.table, self.task = study, table, task
        metric, found = candidates(table, rows, task)
        self.comparison: Comparison = compare(metric, found)
        self.speed: Speeds = speeds(self.comparison)
        self.qualities = [self._quality(i) for i in range(len(self.comparison.candidates))]
        self.records = [r for c in self.comparison.candidates for r in c.row.quality_records()]

    def entry(self, profile: Profile) -> dict[str, Any]:
        """Choose for one profile and say why."""
        choice = choose(self.comparison, self.speed, profile)
        if isinstance(choice, str):
            return {
                "setting": None,
                "setting_id": None,
                "evidence": {"headline": f"no setting: {choice}", "reason": choice},
                "alternatives": [],
                "command": None,
                "snippet": None,
            }
        row = self.comparison.candidates[choice.chosen].row
        records = row.quality_records()
        return {
            "setting": _setting(row),
            "setting_id": row.id,
            "evidence": self._evidence(choice, profile),
            "alternatives": self._alternatives(choice),
            "command": run_command(records, f"recommended-{profile.name}"),
            "snippet": self._snippet(records[0]),
        }

    def _evidence(self, choice: Choice, profile: Profile) -> dict[str, Any]:
        compared, i = self.comparison, choice.chosen
        row = compared.candidates[i].row
        latency = latency_summary(row.timed)
        quality = self.qualities[i]
        return {
            "headline": _headline(row, compared.metric, quality, latency),
            "reason": choice.reason,
            "distinguishable": choice.distinguishable,
            "objective": _objective(compared.metric),
            "quality": quality,
            "metrics": self._metrics(row),
            "latency_s": latency,
            "speed_basis": self.speed.basis,
            "speed": self.speed.values[i],
            "limit": choice.limit,
            "latency_limit_s": profile.latency_limit_s,
            "latency_limit_frac": profile.latency_limit_frac,
            "margin": choice.margin,
            "best": _setting(compared.candidates[choice.best].row),
            "difference_from_best": self._difference(choice, i),
            "n_pairs": compared.quality.shape[1],
            "n_prompts": int(compared.clusters.max()) + 1,
            "settings_compared": len(compared.candidates),
        }

    def _quality(self, i: int) -> dict[str, Any]:
        mean = self.comparison.mean(i)
        return {
            "metric": self.comparison.metric,
            "value": mean.value,
            "ci95": mean.ci95,
            "n": mean.n,
            "n_prompts": mean.clusters,
        }

    def _metrics(self, row: Row) -> dict[str, Any]:
        names = sorted(name for name in self.table.scores if name != GUARD)
        found = {name: row_metric(self.study, self.table, row, name) for name in names}
        return {name: entry for name, entry in found.items() if entry["value"] is not None}

    def _difference(self, choice: Choice, i: int) -> dict[str, Any] | None:
        if i == choice.best or i not in choice.differences:
            return None
        d = choice.differences[i]
        return {"value": d.value, "ci95": d.ci95, "n": d.n, "n_prompts": d.clusters}

    def _alternatives(self, choice: Choice) -> list[dict[str, Any]]:
        """Every other setting, best quality first, with why it was not chosen."""
        compared = self.comparison
        order = sorted(choice.verdicts, key=lambda i: -compared.quality[i].mean())
        found = [
            {
                "setting": _setting(compared.candidates[i].row),
                "setting_id": compared.candidates[i].row.id,
                "quality": self.qualities[i],
                "difference_from_best": self._difference(choice, i),
                "speed": self.speed.values[i],
                "why_not": choice.verdicts[i],
            }
            for i in order
        ]
        found += [
            {
                "setting": _setting(c.row),
                "setting_id": c.row.id,
                "quality": None,
                "difference_from_best": None,
                "speed": None,
                "why_not": f"too few pairs: {len(c.quality)}",
            }
            for c in compared.left_out
        ]
        return found

    def _snippet(self, record: Record) -> str | None:
        """The first image in plain diffusers; ``None`` where no weights made it."""
        if record.trial.load.model.path == "":
            return None
        digest = record.trial.request.init_image
        init_path = None if digest is None else self.study.init_path(digest).resolve()
        return snippet(record, init_path)


def _setting(row: Row) -> dict[str, Any]:
    return {name: row.setting[name] for name in _SETTING}


def _headline(row: Row, metric: str, quality: dict[str, Any], latency: dict[str, Any]) -> str:
    """One line: what to use, how good it is and what it costs."""
    s = row.setting
    parts = [f"{s['steps']} steps", f"cfg {s['cfg']:g}"]
    if s["prompt_strength"] is not None:
        parts.append(f"prompt_strength {s['prompt_strength']:g}")
    interval = quality["ci95"]
    ends = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    figures = [f"{metric.replace('_', ' ')} {quality['value']:.2f}{ends}"]
    if latency["p50"] is not None:
        figures.append(f"{latency['p50']:.3g} s an image")
    return f"{', '.join(parts)} ({', '.join(figures)})"


def _objective(metric: str) -> str:
    if metric == "edit_quality":
        return "harmonic mean, per image, of prompt accuracy and init kept: an edit needs both"
    return metric


def _prompts(tasks: Mapping[str, _Task]) -> list[dict[str, Any]]:
    """The prompt sets and splits that the choices were made on."""
    refs = {
        (t, r.trial.prompt.set, r.trial.prompt.split) for t, k in tasks.items() for r in k.records
    }
    return [{"task": t, "set": name, "split": split} for t, name, split in sorted(refs)]


def _nothing(study: Any, rows: list[Row], problems: list[str]) -> str:
    if problems:
        return "; ".join(problems)
    if any(row.usable for row in rows if row.random_weights):
        return (
            f"nothing to recommend: the images of study {study.name!r} were made with random"
            " weights, which say nothing about quality; run it with model.weights=checkpoint"
        )
    return (
        f"nothing to compare: study {study.name!r} has no usable image; run a sweep first, for"
        " example `sd35bench run -m steps=4,16 cfg=1,4`"
    )

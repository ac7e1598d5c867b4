"""What the vendor's model page claims, each as a hypothesis with its verdict on a study.

A `Claim` is a name, what the page says in our words, a design (`claim_designs`) and the experiment
that makes its trials. Everything here is a pure function of a study's records and scores: a study
that lacks a claim's trials gives "not measured" with the command that makes them, a model that
cannot decide it "not testable" with the reason. The verdicts' logic is in `contrasts`.
"""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

from sd35bench import plugins, words
from sd35bench.analysis.commands import load_overrides
from sd35bench.analysis.table import Table, read_table
from sd35bench.claims import designs
from sd35bench.claims.contrasts import Contrast, Judged, Verdict, judge_claims, more_images
from sd35bench.claims.evidence import Evidence, Unmeasured, Untestable, read_evidence
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import TAIL
from sd35bench.study.columns import unlike
from sd35bench.types import to_json

METRICS = ("sharpness",)
"""What claims need beside a model's default metrics."""

RANDOM = "the images were made with random weights, which say nothing about quality"


@dataclass(frozen=True, slots=True)
class Claim:
    """One hypothesis; `experiment` names the stored sweep that makes its trials, with overrides.

    `tested` says what was tested where that is less, or other, than the page's words say.
    """

    name: str
    says: str
    design: designs.Design
    experiment: str = "claims"
    tested: str | None = None

    @property
    def text(self) -> str:
        """The design in words."""
        return " ".join(str(self.design.__doc__).split())


CLAIMS = (
    Claim("latency", "an image takes about 8 seconds", designs.latency, "claims-steps steps=40"),
    Claim("cfg-start", "cfg 7 to 10 is a good place to start", designs.cfg_start),
    Claim("cfg-follows", "higher cfg follows the prompt more closely", designs.cfg_follows),
    Claim("cfg-variety", "lower cfg gives more variety", designs.cfg_variety),
    Claim(
        "strength-creative",
        "prompt strength 0.5 to 0.7 is for creative results",
        designs.strength_variety,
        "claims-edit",
    ),
    Claim(
        "strength-follows",
        "prompt strength from 0.8 is exact: it follows the prompt",
        designs.strength_follows,
        "claims-edit",
    ),
    Claim(
        "strength-keeps",
        "prompt strength from 0.8 is exact: it keeps the init image",
        designs.strength_keeps,
        "claims-edit",
        "a reading that the setting's definition contradicts",
    ),
    Claim(
        "steps-previews", "20 to 30 steps do for previews", designs.steps_preview, "claims-steps"
    ),
    Claim(
        "steps-finals",
        "50 to 70 steps are better for finals: the prompt is followed better",
        designs.steps_quality,
        "claims-steps",
    ),
    Claim(
        "steps-detail",
        "50 to 70 steps are better for finals: more detail",
        designs.steps_detail,
        "claims-steps",
    ),
    Claim("seed-style", "the same seed keeps the style consistent", designs.seed_style),
    Claim("seed-diverse", "different seeds give diverse variations", designs.seed_diverse),
    Claim(
        "prompt-long",
        "long prompts confuse the model",
        designs.prompt_long,
        "claims-levels",
        "prompts that list three objects or more against one object",
    ),
    Claim("prompt-detailed", "detailed prompts help", designs.prompt_detailed, "claims-levels"),
    Claim(
        "scene-crowded",
        "complex scenes are a weak point",
        designs.scene_crowded,
        "claims-levels",
        "two or more alike objects against one",
    ),
    Claim(
        "scene-overlap",
        "overlapping elements are a weak point",
        designs.scene_overlap,
        "claims-overlap",
        "two shapes of which one hides part of the other",
    ),
    Claim(
        "scene-fine",
        "fine details are a weak point",
        designs.scene_fine,
        "claims-levels",
        "small objects against large ones",
    ),
    Claim(
        "output-quality",
        "output quality trades file size for image quality",
        designs.output_quality,
        "claims-formats",
    ),
    Claim(
        "output-format",
        "so does the format: PNG is whole and large, the others are smaller and lose",
        designs.output_format,
        "claims-formats",
    ),
)

_TRAINING = (
    "The verdict follows nano's training mix as much as its kind: of the captions that it saw last"
    " 17 % were of one object, 60 % of two side by side, 9 % of a count, 8 % of three or more, 6 %"
    " of two that overlap."
)
NOTES = {
    "strength-follows": "The page's prose takes prompt_strength for adherence; the schema says that"
    " it is the image-to-image denoising strength.",
    "steps-finals": "The hosted service's schema ends at 50 steps; 70 can only be tried elsewhere.",
    "steps-detail": "Sharpness is the variance of the Laplacian: noise counts as detail.",
    "strength-keeps": "prompt_strength is by definition the share of the schedule that an edit runs"
    " from noise, so more of it keeps less of the init image. A refuted verdict here refutes a"
    " reading of the page's words, whatever the model.",
    "prompt-long": "Tested is the number of objects, not of words: in nano's world the longest"
    f" prompts are those that list most objects. {_TRAINING}",
    "scene-crowded": _TRAINING,
    "scene-overlap": _TRAINING,
    "seed-style": "Likeness is that of CLIP features, which know content better than style.",
}


def claims_document(
    study: Any, claims: tuple[Claim, ...] = CLAIMS, table: Table | None = None
) -> dict[str, Any]:
    """Judge every claim on a study; `table` is the study's, where it was read already.

    Returns: ``{"study", "model", "quality", "counts", "claims", "environments", "notes"}``; `model`
    is the model that was measured (several with "and" between them). A claim has "name", "says",
    "tested", "design", "note", "verdict", "model", "reason", "command", "more_images",
    "p_supported", "p_refuted" (after Holm), "contrasts", each with its effect, interval, threshold
    and n, and "deciding", the name of the one that the verdict hangs on; effects of unit "ratio"
    are ratios. A contrast's "ci95" is the plain interval, its "interval" the one that the claim's
    verdict follows from.
    """
    table = read_table(study) if table is None else table
    evidence = read_evidence(study, table, study.read_image)
    found = {claim.name: _measure(claim, evidence) for claim in claims}
    tested = {name: each for name, each in found.items() if isinstance(each, list)}
    judged = dict(zip(tested, judge_claims(list(tested.values())), strict=True))
    model = _model(table)
    entries = [
        _entry(c, found[c.name], judged, _command(c, study, table)) | {"model": model}
        for c in claims
    ]
    return {
        "study": study.name,
        "model": model,
        "quality": evidence.quality,
        "counts": dict(Counter(entry["verdict"] for entry in entries)),
        "claims": entries,
        "environments": {s.environment_id: s.environment for s in table.sessions.values()},
        "notes": list(evidence.notes),
    }


def _model(table: Table) -> str:
    names = dict.fromkeys(str(row.setting["model"]) for row in table.rows)
    return " and ".join(names) if names else "no model"


def is_claims_study(study: Any, table: Table | None = None) -> bool:
    """Whether a study was made to test claims: cfg, steps and file formats were all swept for it.

    Cheap where it was not: other studies write one format.
    """
    formats = {record.trial.request.output_format for record in unlike(study.records())}
    if len(formats) < 3:
        return False
    claims = tuple(c for c in CLAIMS if c.name in ("cfg-start", "steps-previews", "output-format"))
    verdicts = [entry["verdict"] for entry in claims_document(study, claims, table)["claims"]]
    return Verdict.NOT_MEASURED.value not in verdicts


def _measure(claim: Claim, evidence: Evidence) -> list[Contrast] | Unmeasured | Untestable:
    try:
        return claim.design(evidence)
    except (Unmeasured, Untestable) as exc:
        every = evidence.table.rows
        if every and all(row.random_weights for row in every):
            return Untestable(RANDOM)
        return exc


def _entry(
    claim: Claim,
    found: list[Contrast] | Unmeasured | Untestable,
    judged: Mapping[str, Judged],
    command: str,
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": claim.name,
        "says": claim.says,
        "tested": claim.tested,
        "design": claim.text,
        "note": NOTES.get(claim.name),
        "command": None,
        "deciding": None,
        "more_images": None,
        "p_supported": None,
        "p_refuted": None,
        "contrasts": [],
    }
    if isinstance(found, Untestable):
        return entry | {"verdict": Verdict.NOT_TESTABLE.value, "reason": str(found)}
    if isinstance(found, Unmeasured):
        verdict = Verdict.NOT_MEASURED.value
        return entry | {"verdict": verdict, "reason": str(found), "command": command}
    one = judged[claim.name]
    more = None
    if one.verdict is Verdict.INCONCLUSIVE:
        left = sum(j.verdict is Verdict.INCONCLUSIVE for j in judged.values())
        more = more_images(found, TAIL / left)
    return entry | {
        "verdict": one.verdict.value,
        "reason": _reason(one, found, more),
        "deciding": _deciding(one.verdict, found).name,
        "more_images": more,
        "p_supported": one.p_supported,
        "p_refuted": one.p_refuted,
        "contrasts": [_contrast(c, i) for c, i in zip(found, one.intervals, strict=True)],
    }


def _deciding(verdict: Verdict, contrasts: list[Contrast]) -> Contrast:
    """The contrast that a verdict hangs on: what refutes, or what is shown least."""
    if verdict is Verdict.REFUTED:
        return min(contrasts, key=lambda c: c.p_below)
    return max(contrasts, key=lambda c: c.p_above)


def _reason(one: Judged, contrasts: list[Contrast], more: int | None) -> str:
    if one.verdict is Verdict.SUPPORTED:
        every = "its effect is" if len(contrasts) == 1 else f"all {len(contrasts)} effects are"
        return f"{every} shown to be above what counts"
    if one.verdict is Verdict.REFUTED:
        return f"shown to be below what counts: {_deciding(one.verdict, contrasts).name}"
    found = "no practicable number of" if more is None else f"about {words.count(more)} more"
    return f"{found} images would decide, if things are as they look"


def _contrast(contrast: Contrast, decisive: Interval) -> dict[str, Any]:
    effect = contrast.effect
    ratio = contrast.unit == "ratio"

    def shown(value: float | None) -> float | None:
        return exp(value) if ratio and value is not None else value

    def ends(interval: Interval) -> list[float | None] | None:
        found = [shown(interval.low), shown(interval.high)]
        return None if None in found else found

    return {
        "name": contrast.name,
        "unit": contrast.unit,
        "effect": shown(effect.value),
        "ci95": ends(effect),
        "interval": ends(decisive),
        "least": shown(contrast.least),
        "n": effect.n,
        "clusters": effect.clusters,
        "images": contrast.images,
        "paired": contrast.paired,
        "sides": to_json(contrast.sides),
        "p_above": contrast.p_above,
        "p_below": contrast.p_below,
    }


def _command(claim: Claim, study: Any, table: Table) -> str:
    """The run that makes what is missing, on the study's own load."""
    said = [f"run experiment={claim.experiment}", f"study={study.name}"]
    loads = {load.key: load for row in table.rows for load in [row.records[0].trial.load]}
    if len(loads) == 1:
        usual = {"model": "nano", "backend": "eager"}
        known = load_overrides(*loads.values()).items()
        said += [shlex.quote(f"{n}={text}") for n, text in known if usual.get(n) != text]
    return plugins.command(" ".join(said))

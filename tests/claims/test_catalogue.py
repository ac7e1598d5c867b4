"""Claims on studies of planted truth: each verdict for its reason, and mutants that must fail."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd35bench.claims import contrasts as claim_contrasts
from sd35bench.claims import designs as claim_designs
from sd35bench.claims import effects as claim_effects
from sd35bench.claims.catalogue import CLAIMS, claims_document, is_claims_study
from sd35bench.claims.contrasts import Contrast, Verdict, judge_claims, more_images
from sd35bench.claims.evidence import group_difference
from sd35bench.stats.intervals import Interval
from sd35bench.types import BackendSpec, Load, RemoteCall, Timings
from tests.studies.memory import LOAD, MODEL, record, session
from tests.studies.planted_claims import ClaimsStudy, Truth, planted_claims

FLAT_CFG = dict.fromkeys((1.0, 4.0, 7.0, 10.0, 15.0), 0.7)
FLAT_STEPS = dict.fromkeys((20, 30, 50, 70), 0.7)
TESTABLE = [claim.name for claim in CLAIMS if claim.name != "latency"]

# Two pairs of claims contradict each other where they are strong, so these need another truth.
NO_LOSS = ("cfg-start", "steps-previews")
AGREEING = Truth(cfg={1.0: 0.2, 4.0: 0.7, 7.0: 0.95, 10.0: 0.95, 15.0: 0.6}, steps=FLAT_STEPS)
OPPOSITE = Truth(
    cfg={1.0: 0.95, 4.0: 0.9, 7.0: 0.5, 10.0: 0.5, 15.0: 0.2},
    cfg_variety={1.0: 0.5, 4.0: 0.9, 7.0: 1.0, 10.0: 1.2, 15.0: 1.6},
    steps={20: 0.9, 30: 0.9, 50: 0.4, 70: 0.4},
    sharpness={20: 1.0, 30: 1.0, 50: 0.8, 70: 0.8},
    follows={0.5: 0.9, 0.7: 0.9, 0.8: 0.5, 0.95: 0.5},
    keeps={0.5: 0.9, 0.7: 0.9, 0.8: 0.5, 0.95: 0.5},
    edit_variety={0.5: 0.5, 0.7: 0.5, 0.8: 1.5, 0.95: 1.5},
    easy=0.5,
    harder=-0.45,
    detailed=-0.6,
    large=-0.3,
    sizes={("png", 90): 500, **{(f, q): 2000 for f in ("jpg", "webp") for q in (50, 90)}},
    errors={("png", 90): 0, **{(f, q): 5 for f in ("jpg", "webp") for q in (50, 90)}},
)
"""Every claim is false but those about seeds, and that 20 to 30 steps do."""


def verdicts(study: ClaimsStudy) -> dict[str, str]:
    return {claim["name"]: claim["verdict"] for claim in claims_document(study)["claims"]}


def claim_of(study: ClaimsStudy, name: str) -> dict:
    return next(c for c in claims_document(study)["claims"] if c["name"] == name)


@pytest.fixture(scope="module")
def true_study(tmp_path_factory: pytest.TempPathFactory) -> ClaimsStudy:
    return planted_claims(tmp_path_factory.mktemp("true"), Truth())


@pytest.fixture(scope="module")
def true_verdicts(true_study: ClaimsStudy) -> dict[str, str]:
    return verdicts(true_study)


@pytest.fixture(scope="module")
def opposite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return verdicts(planted_claims(tmp_path_factory.mktemp("opposite"), OPPOSITE))


def test_a_claim_that_is_true_is_supported(true_verdicts):
    names = [n for n in TESTABLE if n not in NO_LOSS]
    assert {n: true_verdicts[n] for n in names} == dict.fromkeys(names, "supported")


def test_claims_of_no_loss_that_are_true_are_supported(tmp_path):
    found = verdicts(planted_claims(tmp_path, AGREEING, prompts=96, whole=False))
    assert [found[name] for name in NO_LOSS] == ["supported", "supported"]


def test_a_claim_that_is_false_is_refuted(opposite):
    names = {*TESTABLE} - {"seed-diverse", "seed-style", "steps-previews"}
    assert {n: opposite[n] for n in names} == dict.fromkeys(names, "refuted")


def test_previews_do_not_do_where_finals_are_far_better(true_verdicts):
    assert true_verdicts["steps-previews"] == "refuted"


def test_seeds_that_make_nearly_one_image_are_not_diverse_and_share_no_style(tmp_path):
    still = dict.fromkeys(Truth().cfg_variety, 0.05)
    truth = Truth(cfg_variety=still, style=0.0, cfg_moves=0.4)
    found = verdicts(planted_claims(tmp_path, truth, whole=False))
    assert found["seed-diverse"] == "refuted"
    assert found["seed-style"] == "refuted"


def test_no_effect_and_few_prompts_are_inconclusive_and_say_what_would_decide(tmp_path):
    study = planted_claims(tmp_path, Truth(cfg=FLAT_CFG), prompts=8, whole=False)
    claim = claim_of(study, "cfg-start")
    assert claim["verdict"] == "inconclusive"
    assert claim["more_images"] > 100
    assert f"{claim['more_images']:,} more images" in claim["reason"]


def test_every_effect_has_its_interval_n_and_threshold(true_study):
    document = claims_document(true_study)
    json.dumps(document, allow_nan=False)
    for claim in document["claims"]:
        for one in claim["contrasts"]:
            low, high = one["ci95"]
            assert low <= one["effect"] <= high
            assert 2 <= one["clusters"] <= one["n"] <= one["images"] * 4
        if claim["contrasts"]:
            assert claim["deciding"] in [one["name"] for one in claim["contrasts"]]


def test_effects_are_the_planted_ones(true_study):
    claims = {c["name"]: c["contrasts"] for c in claims_document(true_study)["claims"]}
    (one,) = claims["strength-keeps"]
    assert one["effect"] == pytest.approx(0.4, abs=0.03)
    detail = claims["steps-detail"]
    assert [c["effect"] for c in detail] == pytest.approx([1.2, 1.3], rel=0.01)
    files = {c["name"]: c for c in claims["output-quality"]}
    assert files["jpg 90 against 50: larger"]["effect"] == pytest.approx(3.0, rel=0.1)
    nearer = files["jpg 90 against 50: nearer to the PNG"]["effect"]
    assert nearer == pytest.approx(20 * np.log10(12 / 3), abs=1e-6)


# What is missing, and what cannot be decided ----------------------------------------------------


def without(study: ClaimsStudy, left_out) -> ClaimsStudy:
    kept = [r for r in study.kept if not left_out(r.trial.request)]
    return replace(study, kept=kept)


@pytest.mark.parametrize(
    ("left_out", "names", "experiment"),
    [
        (lambda q: q.cfg in (7.0, 10.0), ["cfg-start", "cfg-follows", "cfg-variety"], "claims"),
        (lambda q: q.steps >= 50, ["steps-previews", "steps-detail"], "claims-steps"),
        (lambda q: q.output_format == "webp", ["output-format"], "claims-formats"),
        (lambda q: q.init_image, ["strength-follows", "strength-keeps"], "claims-edit"),
        (lambda q: re.search("front|behind", q.prompt), ["scene-overlap"], "claims-overlap"),
        (lambda q: q.seed == 1, ["seed-style", "seed-diverse", "cfg-variety"], "claims"),
    ],
    ids=["cfg", "steps", "formats", "edit", "overlap", "seeds"],
)
def test_missing_trials_are_not_measured_and_name_the_command(
    true_study, left_out, names, experiment
):
    document = claims_document(without(true_study, left_out))
    claims = {claim["name"]: claim for claim in document["claims"]}
    for name in names:
        claim = claims[name]
        assert claim["verdict"] == "not measured"
        command = f"sd35bench run experiment={experiment} study=synthetic"
        load = "backend.dtype=fp32 threads=2 model.path=/models/nano"
        assert claim["command"] == f"{command} {load}", "on the very load of the study"
        assert claim["contrasts"] == []
    assert "supported" in {c["verdict"] for name, c in claims.items() if name not in names}


def other_model(study: ClaimsStudy, **changes) -> ClaimsStudy:
    """The same study on another model."""
    load = replace(LOAD, model=replace(MODEL, **changes))
    kept = [replace(r, trial=replace(r.trial, load=load)) for r in study.kept]
    return replace(study, kept=kept, lives={"s": session(load=load)})


def test_clip_score_takes_the_place_of_prompt_accuracy_on_another_model(true_study):
    rng = np.random.default_rng(1)
    study = other_model(true_study, name="sd35-medium")
    study.score_rows = [s for s in study.score_rows if s.metric == "sharpness"]
    gain = {1.0: 0.0, 4.0: 2.0, 7.0: 2.1, 10.0: 2.1, 15.0: 4.0}
    for row in study.kept:
        points = 25 + gain[row.trial.request.cfg] + rng.normal(0, 0.3)
        study.score(row, "clip_score_ViT-B-32_openai", points, features="planted")
    document = claims_document(study)
    found = {claim["name"]: claim for claim in document["claims"]}
    assert document["quality"] == "clip_score_ViT-B-32_openai"
    assert found["cfg-follows"]["verdict"] == "supported"
    assert {c["unit"] for c in found["cfg-follows"]["contrasts"]} == {"points"}
    for name in ("prompt-long", "scene-overlap", "strength-keeps"):
        assert found[name]["verdict"] == "not testable"
        assert "nano" in found[name]["reason"]


def test_random_weights_decide_nothing(true_study):
    study = other_model(true_study, weights="random")
    claims = claims_document(study)["claims"]
    assert {claim["verdict"] for claim in claims} == {"not testable"}
    assert "random weights" in claims[1]["reason"]


def test_a_study_is_one_of_claims_by_what_it_swept(true_study):
    assert is_claims_study(true_study)
    assert not is_claims_study(without(true_study, lambda q: q.output_format == "jpg"))
    assert not is_claims_study(without(true_study, lambda q: q.steps > 30))


# Latency ---------------------------------------------------------------------------------------


def hosted(path: Path, seconds: float, base_url: str = "https://api.eachlabs.ai", steps: int = 40):
    """Twelve calls alone, and twelve beside others that took ten times as long."""
    options = {"base_url": base_url, "slug": "sd"}
    backend = BackendSpec(name="eachlabs", kind="eachlabs", options=options)
    load = Load(model=replace(MODEL, name="sd35-medium"), backend=backend, threads=1)
    study = ClaimsStudy(path, lives={"s": session(load=load)})
    rng = np.random.default_rng(0)
    call = RemoteCall(
        provider="eachlabs", prediction_id="p", request_id=None, in_flight=1, attempts=1, polls=3,
        submit_s=0.1, queue_s=0.1, predict_s=seconds, poll_bound_s=0.1, download_s=0.1,
        cost_usd=0.035, cost_reported=True,
    )  # fmt: skip
    for number in range(24):
        alone = number < 12
        took = (seconds if alone else 10 * seconds) * rng.uniform(0.9, 1.1)
        row = record(number, load=load, steps=steps, timings=Timings(generate_s=took, encode_s=0.0))
        study.add(replace(row, remote=replace(call, in_flight=1 if alone else 4)))
    return study.touch_images()


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(7.0, "supported"), (30.0, "refuted"), (2.0, "refuted")]
)
def test_latency_is_that_of_calls_made_alone(tmp_path, seconds, verdict):
    claim = claim_of(hosted(tmp_path, seconds), "latency")
    assert claim["verdict"] == verdict
    assert claim["contrasts"][0]["n"] == 12


def test_latency_needs_the_service_and_its_own_steps(tmp_path):
    here = claim_of(hosted(tmp_path / "a", 7.0, "http://127.0.0.1:8000"), "latency")
    assert here["verdict"] == "not testable"
    other = claim_of(hosted(tmp_path / "b", 7.0, steps=20), "latency")
    assert other["verdict"] == "not measured"
    assert "experiment=claims-steps steps=40" in other["command"]
    assert "backend=eachlabs" in other["command"]


# Verdicts --------------------------------------------------------------------------------------


def normal_contrast(
    rng: np.random.Generator, mean: float, k: int, least: float = 0.0, images: int | None = None
) -> Contrast:
    """The mean of k normal prompts with spread 1."""
    from sd35bench.stats.clustered import mean_t

    effect = mean_t(rng.normal(mean, 1.0, k), np.arange(k))
    count = 2 * k if images is None else images
    return Contrast(name="x", effect=effect, least=least, unit="share", images=count)


def wrong_share(correct, repetitions: int = 100) -> float:
    """How often some claim of 15 that lie on their thresholds gets a verdict."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(repetitions):
        claims = [[normal_contrast(rng, 0.0, 20)] for _ in range(15)]
        wrong += any(v != Verdict.INCONCLUSIVE for v in correct(claims))
    return wrong / repetitions


def test_holm_keeps_false_verdicts_to_their_level_and_without_it_they_are_many():
    assert wrong_share(lambda claims: [j.verdict for j in judge_claims(claims)]) < 0.085
    alone = wrong_share(lambda claims: [judge_claims([c])[0].verdict for c in claims])
    assert alone > 0.4


def test_a_claim_needs_all_its_effects_and_falls_with_one():
    rng = np.random.default_rng(0)
    good, open_, bad = (normal_contrast(rng, mean, 50) for mean in (1.0, 0.1, -1.0))
    said = [judge_claims([claim])[0].verdict for claim in ([good], [good, open_], [good, bad])]
    assert said == [Verdict.SUPPORTED, Verdict.INCONCLUSIVE, Verdict.REFUTED]


def contradictions(claims: list[list[Contrast]]) -> list[str]:
    """Claims whose verdict does not follow from the intervals beside it."""
    found = []
    for claim, one in zip(claims, judge_claims(claims), strict=True):
        shown = list(zip(claim, one.intervals, strict=True))
        above = all(i.low is not None and i.low > c.least for c, i in shown)
        below = any(i.high is not None and i.high < c.least for c, i in shown)
        said = {Verdict.SUPPORTED: above, Verdict.REFUTED: below}
        if not said.get(one.verdict, not above and not below):
            found.append(f"{one.verdict}: {shown}")
    return found


def _studies(number: int) -> list[list[list[Contrast]]]:
    rng = np.random.default_rng(8)
    return [
        [
            [
                normal_contrast(rng, rng.normal(0, 0.5), int(rng.integers(3, 40)))
                for _ in range(rng.integers(1, 4))
            ]
            for _ in range(8)
        ]
        for _ in range(number)
    ]


def test_verdict_and_the_intervals_beside_it_never_contradict_each_other():
    assert [text for study in _studies(40) for text in contradictions(study)] == []


def test_mutant_plain_intervals_contradict_corrected_verdicts(monkeypatch):
    monkeypatch.setattr(claim_contrasts, "widened", lambda effect, *_: effect)
    assert [text for study in _studies(40) for text in contradictions(study)]


def test_every_verdict_names_the_model_and_what_was_tested(true_study):
    document = claims_document(true_study)
    assert document["model"] == "nano"
    assert {claim["model"] for claim in document["claims"]} == {"nano"}
    tested = {claim["name"]: claim["tested"] for claim in document["claims"]}
    assert tested["prompt-long"] == "prompts that list three objects or more against one object"
    assert "definition" in tested["strength-keeps"]
    (overlap,) = (c for c in document["claims"] if c["name"] == "scene-overlap")
    assert "training mix" in overlap["note"]
    other = claims_document(other_model(true_study, name="sd35-medium"))
    assert other["model"] == other["claims"][0]["model"] == "sd35-medium"


def test_one_prompt_decides_nothing():
    lonely = Contrast(
        name="x", effect=Interval(9.0, None, None, 4, 1), least=0.0, unit="share", images=4
    )
    assert judge_claims([[lonely]])[0].verdict is Verdict.INCONCLUSIVE
    assert more_images([lonely]) is None


def test_the_images_named_do_decide():
    """With 80 % power, if the effect and its spread are as they were seen."""
    seen = Contrast(
        name="x", effect=Interval(0.3, 0.3 - 2.093 / 20**0.5, 0.3 + 2.093 / 20**0.5, 20, 20),
        least=0.0, unit="share", images=40,
    )  # fmt: skip
    more = more_images([seen])
    assert more is not None
    k = (40 + more) // 2
    rng = np.random.default_rng(2)
    decided = [
        judge_claims([[normal_contrast(rng, 0.3, k)]])[0].verdict is Verdict.SUPPORTED
        for _ in range(400)
    ]
    assert 0.74 < np.mean(decided) < 0.87


def test_settings_that_make_the_same_images_have_no_ratio(tmp_path):
    still = dict.fromkeys(Truth().cfg_variety, 0.0)
    study = planted_claims(tmp_path, Truth(cfg_variety=still, style=0.0), whole=False)
    claim = claim_of(study, "seed-diverse")
    assert claim["verdict"] in ("refuted", "inconclusive", "not measured")
    json.dumps(claims_document(study), allow_nan=False)


def test_groups_of_other_prompts_have_an_interval_that_holds_the_truth():
    rng = np.random.default_rng(3)
    held = 0
    groups = [([record(offset + i) for i in range(60)], p) for offset, p in ((0, 0.8), (100, 0.5))]
    for _ in range(200):
        sides = [[(r, float(rng.uniform() < p)) for r in group] for group, p in groups]
        effect, _ = group_difference(*sides)
        held += effect.low <= 0.3 <= effect.high
    assert held / 200 > 0.92


# Mutants ---------------------------------------------------------------------------------------


def test_mutant_a_flipped_direction_changes_the_verdict(true_study, monkeypatch):
    plain = claim_effects.paired_mean
    monkeypatch.setattr(
        claim_effects, "paired_mean", lambda above, below, metric: plain(below, above, metric)
    )
    assert verdicts(true_study)["strength-keeps"] == "refuted"


def test_mutant_unpaired_sides_lose_what_pairs_show(tmp_path, monkeypatch):
    """Prompts differ by far more than settings do: without pairs nothing is seen."""
    truth = Truth(follows={0.5: 0.5, 0.7: 0.5, 0.8: 0.68, 0.95: 0.68})
    study = planted_claims(tmp_path, truth, prompts=64, levels=64)
    assert verdicts(study)["strength-follows"] == "supported"

    def unpaired(above, below, metric):
        shuffled = [dict(zip(side, np.random.default_rng(0).permutation([*side.values()]),
                             strict=True)) for side in above]  # fmt: skip
        return plain(shuffled, below, metric)

    plain = claim_effects.paired_mean
    monkeypatch.setattr(claim_effects, "paired_mean", unpaired)
    assert verdicts(study)["strength-follows"] == "inconclusive"


def test_mutant_a_wrong_direction_of_variety_changes_the_verdict(true_study, monkeypatch):
    plain = claim_effects.log_interval
    monkeypatch.setattr(
        claim_effects, "log_interval", lambda above, below, c: plain(below, above, c)
    )
    found = verdicts(true_study)
    assert found["cfg-variety"] == "refuted"
    assert found["output-quality"] == "refuted"


def test_every_claim_has_a_design_in_words_and_an_experiment_that_is_there():
    from sd35bench.config.files import choices

    known = choices("experiment")
    for claim in CLAIMS:
        assert len(claim.text) > 30
        assert claim.experiment.split()[0] in known
    designs = {claim.design for claim in CLAIMS}
    assert len(designs) == len(CLAIMS)
    assert all(getattr(claim_designs, d.__name__) is d for d in designs)

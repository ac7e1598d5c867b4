from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from sd35bench.errors import ConfigError
from sd35bench.gate.baseline import baseline_text, read_baseline
from sd35bench.gate.judge import compare_sides, gate_fails
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.sides import Start, match_pairs, merge_starts, read_sides
from sd35bench.types import BackendSpec, CanaryFacts, Memory, Status, Surroundings, Timings
from tests.studies.memory import LOAD, MemoryStudy, planted, record, session

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
PROMPTS, SEEDS = 128, 2


def _study(path, *, accuracy=0.9, latency=1.0, failures=0, rss=1000, rng_seed=0, **fields):
    """One setting on 128 prompts and 2 seeds; `failures` of its trials crashed."""
    study = planted(
        path,
        {(8, 4.0): (accuracy, latency)},
        prompts=PROMPTS,
        seeds=SEEDS,
        rng_seed=rng_seed,
        memory=Memory(peak_rss_bytes=rss),
        **fields,
    )
    for i in range(failures):
        lost = study.kept[i * 7]
        bad = replace(lost, status=Status.CRASHED, timings=None, image=None, error="died")
        study.kept[i * 7] = bad
    return study


def _compare(a, b, policy="all", distances=None):
    found = load_policy(policy, POLICIES) if isinstance(policy, str) else as_policy("own", policy)
    near = distances if distances is not None else lambda _a, _b, m: np.zeros((len(m.clusters), 4))
    return compare_sides(read_sides(a), read_sides(b), found, near)


def _quality(**more):
    margins = {"prompt_accuracy": 0.05}
    return {"dimensions": {"quality": {"required": True, "margins": margins, **more}}}


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return _study(tmp_path_factory.mktemp("same"))


def test_study_against_itself_does_not_fail(same):
    document = _compare(same, same)
    assert not gate_fails(document)
    assert document["n_pairs"] == PROMPTS * SEEDS
    verdicts = {n: d["verdict"] for n, d in document["dimensions"].items()}
    assert verdicts["quality"] == verdicts["drift"] == verdicts["memory"] == "pass"
    # One process start on either side never shows that nothing became slower.
    assert verdicts["latency"] == "undecided"
    assert any(w.startswith("latency is undecided") for w in document["warnings"])


@pytest.mark.parametrize(
    ("policy", "dimension", "change"),
    [
        ("quality", "quality", {"accuracy": 0.75}),
        ("quality", "failures", {"failures": 13}),
        ("speed", "memory", {"rss": 1200}),
        ("speed", "latency", {"latency": 2.5}),
    ],
    ids=["accuracy", "5-percent-failures", "20-percent-memory", "far-beyond-the-spread"],
)
def test_planted_regression_is_caught_and_swapped_sides_are_not(
    tmp_path, same, policy, dimension, change
):
    worse = _study(tmp_path, **change)
    there, back = _compare(same, worse, policy), _compare(worse, same, policy)
    assert there["dimensions"][dimension]["verdict"] == "fail"
    assert gate_fails(there)
    assert back["dimensions"][dimension]["verdict"] != "fail"
    signs = [
        [
            f["effect"]
            for f in d["comparisons"][0]["dimensions"][dimension]["figures"]
            if f["effect"]
        ]
        for d in (there, back)
    ]
    ratio = dimension in ("memory", "latency")
    assert signs[0] == pytest.approx([1 / e if ratio else -e for e in signs[1]])


def test_drift_fails_beyond_the_noise_floor_only(same):
    policy = {
        "dimensions": {"drift": {"required": True, "floor_levels": 2, "margins": {"mean_abs": 1}}}
    }

    def apart(levels):
        noise = np.random.default_rng(0).uniform(-0.2, 0.2, PROMPTS * SEEDS)
        return lambda _a, _b, m: np.tile((levels + noise[: len(m.clusters)])[:, None], 4)

    for levels, verdict in ((2.5, "pass"), (3.0, "undecided"), (3.5, "fail")):
        found = _compare(same, same, policy, apart(levels))
        assert found["verdict"] == verdict
    worst = found["comparisons"][0]["worst"]
    assert len(worst) == 12
    assert worst[0]["value"] == max(w["value"] for w in worst)


def test_required_dimension_that_was_not_measured_fails(tmp_path, same):
    blind = _study(tmp_path)
    blind.score_rows = []
    document = _compare(same, blind, _quality())
    assert document["verdict"] == "fail"
    assert "could not be measured" in document["dimensions"]["quality"]["reason"]
    both = _compare(blind, blind, _quality())
    assert both["verdict"] == "fail"


def test_null_on_both_sides_is_not_applicable_where_not_required(same):
    policy = _quality(required=False, margins={"clip_score": 0.5})
    policy["dimensions"]["failures"] = {"margins": {"failed": 0.05}}
    document = _compare(same, same, policy)
    assert document["dimensions"]["quality"]["verdict"] == "not applicable"
    assert document["verdict"] == "pass"


def test_gate_that_measured_nothing_fails(same):
    document = _compare(same, same, _quality(required=False, margins={"clip_score": 0.5}))
    assert gate_fails(document)


def test_undecided_does_what_the_policy_says(tmp_path, same):
    near = _study(tmp_path, accuracy=0.87)
    tight = _quality(margins={"prompt_accuracy": 0.03})
    passes = _compare(same, near, tight)
    fails = _compare(same, near, {**tight, "undecided": "fail"})
    assert passes["verdict"] == fails["verdict"] == "undecided"
    assert not gate_fails(passes)
    assert gate_fails(fails)


def test_no_shared_pair_is_wrong_input(tmp_path, same):
    other = _study(tmp_path, width=128)
    with pytest.raises(ConfigError, match="0 pairs"):
        _compare(same, other)


def test_fields_that_differ_are_listed(tmp_path, same):
    load = replace(LOAD, backend=BackendSpec(name="int8", kind="int8", options={}))
    document = _compare(same, _study(tmp_path, load=load))
    differs = document["comparisons"][0]["differs"]
    assert differs == {"backend": ["eager", "int8"], "backend_options": [{"dtype": "fp32"}, {}]}


def test_unlike_machines_are_said(tmp_path, same):
    other = _study(tmp_path)
    other.lives = {"s": replace(session(), environment={"device": "cuda"})}
    document = _compare(same, other)
    assert document["comparisons"][0]["environment_differs"] == {"device": ["cpu", "cuda"]}
    assert any("unlike machines" in w for w in document["warnings"])


def _grid(path, accuracies):
    settings = {(8, cfg): (a, 1.0) for cfg, a in accuracies.items()}
    return planted(path, settings, prompts=PROMPTS, seeds=SEEDS)


def test_each_setting_is_held_against_its_own(tmp_path):
    before = _grid(tmp_path / "a", {1.0: 0.5, 4.0: 0.9})
    after = _grid(tmp_path / "b", {1.0: 0.5, 4.0: 0.7, 7.0: 0.9})
    document = _compare(before, after, _quality())
    verdicts = {
        c["candidate_setting"]["cfg"]: c["dimensions"]["quality"]["verdict"]
        for c in document["comparisons"]
    }
    assert verdicts == {1.0: "pass", 4.0: "fail"}
    assert any("no counterpart" in w and "cfg 7" in w for w in document["warnings"])


def test_several_candidates_are_corrected_for_their_number(tmp_path):
    before = _grid(tmp_path / "a", {4.0: 0.9})
    after = _grid(tmp_path / "b", {1.0: 0.8, 2.0: 0.88, 3.0: 0.86, 7.0: 0.84})
    document = _compare(before, after, _quality())
    figures = [c["dimensions"]["quality"]["figures"][0] for c in document["comparisons"]]
    lowest = min(figures, key=lambda f: f["p"])
    assert lowest["p_adjusted"] == pytest.approx(4 * lowest["p"])


def _at_speed(study, speed):
    """The same study, timed between readings of a canary at `speed`."""
    facts = CanaryFacts(kind="planted", threads=1, best=100.0, machine="here")
    seen = Surroundings(canary_before=speed, canary_after=speed)
    kept = [replace(r, surroundings=seen) for r in study.kept]
    lives = {k: replace(s, canary=facts) for k, s in study.lives.items()}
    return replace(study, kept=kept, lives=lives)


@pytest.mark.parametrize(("speed", "measured"), [(0.95, True), (0.4, False)])
def test_latencies_of_a_slower_machine_are_not_held_against_those_of_a_faster(
    same, tmp_path, speed, measured
):
    """A machine at 0.4 of its best makes 2.5 times the latency and no regression of it."""
    slower = _study(tmp_path, latency=1.0 / speed)
    document = _compare(_at_speed(same, 1.0), _at_speed(slower, speed), "speed")
    (comparison,) = document["comparisons"]
    figures = comparison["dimensions"]["latency"]["figures"]
    assert all((f["effect"] is not None) == measured for f in figures)
    assert measured or all("a fifth apart" in f["note"] for f in figures)


def test_alternated_starts_decide_what_one_couple_cannot(same):
    sides = read_sides(same)
    policy = as_policy(
        "own",
        {"dimensions": {"latency": {"start_spread": 0.126, "margins": {"p50": 1.05}}}},
    )

    def started(side, hour, slower):
        """Four starts at every other hour, whose machine has a mood of its own each time."""
        mood = np.repeat([1.0, 1.3, 0.8, 1.1], len(side.pairs) // 4)
        starts = [Start(id=str(h), started_at=f"2026-01-01T{h:02}:00:00") for h in hour]
        numbers = np.repeat(np.arange(4), len(side.pairs) // 4)
        times = side.latency_s * mood * slower
        return replace(side, starts=tuple(starts), start=numbers, latency_s=times)

    before = started(sides[0], (1, 3, 5, 7), 1.0)
    alternated = started(sides[0], (2, 4, 6, 8), 1.2)
    apart = started(sides[0], (12, 13, 14, 15), 1.2)
    judged = [compare_sides([before], [c], policy, lambda *_: "none") for c in (alternated, apart)]
    assert [d["verdict"] for d in judged] == ["fail", "undecided"]


def test_ignored_seeds_count_as_failures(tmp_path, same):
    broken = _study(tmp_path)
    by_prompt = {}
    for i, row in enumerate(broken.kept):  # every seed gives the first one's image
        image = by_prompt.setdefault(row.trial.request.prompt, row.image)
        broken.kept[i] = replace(row, image=image)
    broken.touch_images()
    document = _compare(same, broken, "quality")
    assert document["dimensions"]["failures"]["verdict"] == "fail"


def test_baseline_file_gives_the_same_verdicts_as_its_study(tmp_path, same):
    other = _study(tmp_path / "b", accuracy=0.8, latency=1.2)
    path = tmp_path / "baseline.json"
    path.write_text(baseline_text(read_sides(same)))
    policy = load_policy("all", POLICIES)
    near = lambda _a, _b, m: np.zeros((len(m.clusters), 4))  # noqa: E731
    from_file = compare_sides(read_baseline(path), read_sides(other), policy, near)
    from_study = compare_sides(read_sides(same), read_sides(other), policy, near)
    mine, theirs = (d["comparisons"][0]["dimensions"] for d in (from_file, from_study))
    for name, found in theirs.items():
        assert mine[name]["verdict"] == found["verdict"]
        for one, other in zip(mine[name]["figures"], found["figures"], strict=True):
            if other["effect"] is not None:
                assert [one["effect"], *one["ci95"]] == pytest.approx(
                    [other["effect"], *other["ci95"]], rel=1e-6
                )
    assert path.stat().st_size < 60_000  # 256 trials, small enough to commit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not made by"),
        ('{"kind": "sd35bench baseline", "schema": 9}', "schema 9"),
        ('{"kind": "sd35bench baseline", "schema": 1, "study": "a", "sides": [{}]}', "damaged"),
    ],
)
def test_file_that_is_no_baseline_is_refused(tmp_path, text, message):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_baseline(path)


def test_pair_at_two_batch_sizes_counts_once(tmp_path):
    study = MemoryStudy(tmp_path)
    for size in (1, 16):
        for p in range(4):
            study.add(record(p, batch_size=size), prompt_accuracy=1.0)
    (side,) = read_sides(study.touch_images())
    assert len(side.pairs) == 8
    assert len(match_pairs(side, side).clusters) == 4
    assert np.isfinite(side.metrics["prompt_accuracy"]).sum() == 4
    assert np.isfinite(side.latency_s).sum() == 4


def test_reruns_add_times_and_nothing_else(same):
    (side,) = read_sides(same)
    merged = merge_starts(side, [side, replace(side, environment={"device": "cuda"})])
    assert len(merged.starts) == 2
    assert (len(merged.elsewhere), merged.elsewhere_differs) == (PROMPTS * SEEDS, ("device",))
    assert np.isfinite(merged.metrics["prompt_accuracy"]).sum() == len(side.pairs)
    assert len(merged.of_start(1)) == len(side.of_start(0))


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_ready_policies_load(path):
    policy = load_policy(path.stem, POLICIES)
    assert policy.dimensions["failures"].required
    assert not policy.undecided_fails


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({}, "policy.dimensions"),
        ({"dimensions": {"speed": {}}}, "policy.dimensions.speed"),
        ({"dimensions": {"quality": {"margins": {}}}}, "quality.margins"),
        ({"dimensions": {"memory": {"margins": {"peak_rss_bytes": 0.9}}}}, "peak_rss_bytes=0.9"),
        ({"dimensions": {"failures": {"margins": {"failed": -1}}}}, "failed=-1"),
        ({"dimensions": {"latency": {"margins": {"p50": 1.1}}}}, "start_spread=None"),
        ({"dimensions": {"drift": {"margins": {"psnr": 1}}}}, "margins.psnr"),
        ({"dimensions": _quality()["dimensions"], "undecided": "maybe"}, "undecided='maybe'"),
        (_quality(required="yes"), "required='yes'"),
        (_quality(margins={"fid": {"margin": 1, "direction": "up"}}), "direction='up'"),
    ],
)
def test_policy_that_cannot_be_is_refused_by_field(raw, field):
    with pytest.raises(ConfigError) as caught:
        as_policy("own", raw)
    assert field in str(caught.value)


def test_policy_may_be_a_file_of_one_s_own(tmp_path):
    path = tmp_path / "mine.yaml"
    margins = {"sharpness": {"margin": 0.1, "direction": "both"}}
    path.write_text(yaml.safe_dump(_quality(margins=margins)))
    policy = load_policy(str(path), POLICIES)
    assert policy.name == "mine"
    assert policy.dimensions["quality"].margin("sharpness_x").direction == "both"
    with pytest.raises(ConfigError, match="known: all, drift, exact, quality, speed"):
        load_policy("fast", POLICIES)


def test_latency_drift_within_a_run_is_reported(tmp_path, same):
    slowing = _study(tmp_path)
    n = len(slowing.kept)
    for i, row in enumerate(slowing.kept):
        taken = Timings(generate_s=1.0 + 0.3 * i / n + 0.01 * (i % 3), encode_s=0.0)
        at = f"2026-01-01T00:{i // 60:02}:{i % 60:02}"
        slowing.kept[i] = replace(row, timings=taken, started_at=at)
    document = _compare(same, slowing, "speed")
    (drift,) = document["comparisons"][0]["latency_drift"]["candidate"]
    assert drift["drifting"]
    assert drift["change_frac"] == pytest.approx(0.3, abs=0.05)
    assert any("not steady" in w for w in document["warnings"])

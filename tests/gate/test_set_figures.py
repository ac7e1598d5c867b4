"""Set metrics in the gate: paired differences, verdicts, refusals, baseline files, outputs.

Differences are held against the distances themselves, against truths and against mutants.
"""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from sd35bench.analysis.reference import Reference, read_reference, write_reference
from sd35bench.cli import answer
from sd35bench.cli import compare as command
from sd35bench.errors import MetricError
from sd35bench.gate.baseline import (
    baseline_features,
    baseline_text,
    features_file,
    read_baseline,
)
from sd35bench.gate.judge import compare_sides, gate_fails
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.set_figures import LEAST_PROMPTS, set_difference
from sd35bench.gate.sides import merge_starts, read_sides
from sd35bench.report.gate import compare_page, comparison_parts, junit_xml
from sd35bench.report.render import markdown_document
from sd35bench.stats import frechet
from sd35bench.stats import kernel as kernels
from sd35bench.stats.clustered import student
from sd35bench.stats.frechet import Gaussian, fit, frechet_difference, frechet_distance
from sd35bench.stats.kernel import (
    Sample,
    Twins,
    gaussian_kernel,
    kernel_difference,
    kernel_distance,
    polynomial_kernel,
)
from tests.studies.sets import EXTRACTOR, set_studies
from tests.validity import set_figures as truth
from tests.validity.set_figures import World, draw

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
SAME = World(alike=0.9)
WORSE = World(alike=0.9, worse=1.5)


def _policy(*, optional=(), required=True, **margins):
    wanted = {"required": required, "margins": margins, "optional": list(optional)}
    return as_policy("own", {"dimensions": {"quality": wanted}})


def _judge(sides, policy):
    return compare_sides(*sides, policy, lambda _a, _b, m: np.zeros((len(m.clusters), 4)))


def _read(studies):
    return [read_sides(study) for study in studies]


def _figures(document):
    (comparison,) = document["comparisons"]
    return {f["name"]: f for f in comparison["dimensions"]["quality"]["figures"]}


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    return set_studies(tmp_path_factory.mktemp("same"), SAME, prompts=128)


@pytest.fixture(scope="module")
def worse(tmp_path_factory):
    return set_studies(tmp_path_factory.mktemp("worse"), WORSE, prompts=128)


def test_gate_fails_what_lost_and_passes_what_did_not(same, worse):
    policy = _policy(kid=0.3)
    verdicts = {}
    for name, studies in (("same", same), ("worse", worse), ("better", worse[::-1])):
        document = _judge(_read(studies), policy)
        figure = _figures(document)["kid_nano"]
        verdicts[name] = (document["verdict"], figure["verdict"])
        assert figure["effect"] == pytest.approx(figure["candidate"] - figure["baseline"])
        assert figure["ci95"][0] < figure["effect"] < figure["ci95"][1]
        assert (figure["n"], figure["n_prompts"], figure["worse"]) == (128, 128, "more")
    assert verdicts == {
        "same": ("pass", "pass"),
        "worse": ("fail", "fail"),
        "better": ("pass", "pass"),
    }


def test_figures_are_one_family_and_only_what_the_policy_names_is_in_it(tmp_path):
    studies = set_studies(tmp_path, SAME, prompts=128, names=("kid_nano", "cmmd_nano"))
    one = _figures(_judge(_read(studies), _policy(kid=0.001)))
    two = _figures(_judge(_read(studies), _policy(kid=0.001, cmmd=1000.0)))
    assert set(one) == {"kid_nano"}
    assert set(two) == {"kid_nano", "cmmd_nano"}
    assert one["kid_nano"]["p"] == one["kid_nano"]["p_adjusted"] == two["kid_nano"]["p"]
    assert two["kid_nano"]["p_adjusted"] == pytest.approx(min(1.0, 2 * two["kid_nano"]["p"]))


def test_below_its_least_n_a_set_metric_does_not_apply_and_says_why(tmp_path):
    studies = set_studies(tmp_path, WORSE, prompts=127, names=("kid_nano", "fid_nano"))
    policy = _policy(kid=0.001, fid=0.001, prompt_accuracy=0.5, optional=["kid", "fid"])
    document = _judge(_read(studies), policy)
    found = _figures(document)
    assert document["verdict"] == "pass"
    for name, least in (("kid_nano", 128), ("fid_nano", 256)):
        assert found[name]["verdict"] == "not applicable"
        assert found[name]["p_adjusted"] is None
        assert f"holds from {least} prompts" in found[name]["note"]
    needed = _judge(_read(studies), _policy(kid=0.001, prompt_accuracy=0.5))
    assert gate_fails(needed)
    assert "could not be measured" in needed["dimensions"]["quality"]["reason"]


def test_scored_on_one_side_alone_is_unmeasured_and_on_none_not_there(same):
    sides = _read(same)
    blind = [replace(sides[1][0], sets={})]
    for policy in (
        _policy(kid=0.3, prompt_accuracy=0.05),
        _policy(kid=0.3, prompt_accuracy=0.05, optional=["kid"]),
    ):
        document = _judge((sides[0], blind), policy)
        assert document["verdict"] == "fail"
        reason = document["dimensions"]["quality"]["reason"]
        assert "kid_nano was not scored on the candidate" in reason
    lenient = _policy(kid=0.3, prompt_accuracy=0.05, required=False)
    assert _judge((sides[0], blind), lenient)["verdict"] == "undecided"
    neither = [replace(sides[0][0], sets={})], blind
    assert _judge(neither, _policy(kid=0.3, prompt_accuracy=0.05))["verdict"] == "fail"
    spared = _judge(neither, _policy(kid=0.3, prompt_accuracy=0.05, optional=["kid"]))
    assert spared["verdict"] == "pass"
    assert _figures(spared)["kid"]["verdict"] == "not applicable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extractor": "nano-other"}, "another extractor"),
        ({"parameters": {"normalise": True}}, "another parameters"),
        ({"reference": "another"}, "unlike references"),
        ({"read_features": dict}, "features of 128 of 128 images of b are not there"),
    ],
)
def test_sides_that_were_scored_differently_are_unmeasured(same, change, message):
    before, (after,) = _read(same)
    if "reference" in change:  # neither covers the prompts: other images
        bare = replace(after.sets["kid_nano"].read_reference(), prompts=None)
        change = {**change, "read_reference": lambda: bare}
        other = replace(before[0].sets["kid_nano"], read_reference=lambda: bare)
        before = [replace(before[0], sets={"kid_nano": other})]
    changed = replace(after, sets={"kid_nano": replace(after.sets["kid_nano"], **change)})
    found = _figures(_judge((before, [changed]), _policy(kid=0.3)))["kid_nano"]
    assert found["verdict"] == "undecided"
    assert found["effect"] is None
    assert message in found["note"]


def test_lost_prompt_does_not_stop_the_comparison(tmp_path):
    """It takes its prompt out of the candidate's reference, which then has another name."""
    before, after = set_studies(tmp_path, SAME, prompts=129)
    gone = after.kept.pop()
    after.score_rows = [s for s in after.score_rows if s.key != gone.trial.key]
    reference = read_reference(after, f"{EXTRACTOR}-r")
    kept = reference.prompts != gone.trial.request.prompt
    left = {"features": reference.features[kept], "prompts": reference.prompts[kept]}
    write_reference(after, replace(reference, name="fewer", **left))
    for row in after.score_rows:
        if "reference" in row.detail:
            row.detail["reference"] = "fewer"
    figure = _figures(_judge(_read((before, after)), _policy(kid=0.3)))["kid_nano"]
    assert (figure["verdict"], figure["n"]) == ("pass", 128)
    assert "of two references" in figure["note"]


def test_baseline_file_gives_the_same_figures_with_its_features_and_fails_without(tmp_path, worse):
    sides, path = _read(worse), tmp_path / "main.json"
    path.write_text(baseline_text(sides[0]))
    policy = _policy(kid=0.3)
    alone = _judge((read_baseline(path), sides[1]), policy)
    assert gate_fails(alone)
    assert ".features.npz" in alone["dimensions"]["quality"]["reason"]
    features = baseline_features(sides[0])
    assert features is not None
    assert len(features) < 36_000  # 128 images of 48 dimensions
    features_file(path).write_bytes(features)
    mine, theirs = (
        _figures(_judge((before, sides[1]), policy))["kid_nano"]
        for before in (read_baseline(path), sides[0])
    )
    assert mine == theirs
    files = _judge((read_baseline(path), read_baseline(path)), policy)
    assert "not with two files" in _figures(files)["kid_nano"]["note"]


def test_baseline_make_writes_features_that_compare_finds(monkeypatch, tmp_path, worse):
    studies, path = dict(zip("ab", worse, strict=True)), tmp_path / "main.json"
    monkeypatch.setattr(command, "open_study", lambda _, name: studies[name])
    monkeypatch.setattr(command, "score_missing", lambda _: {"refused": {}})
    monkeypatch.setattr(command, "read_with_reruns", read_sides)
    monkeypatch.setattr(worse[0], "done_keys", lambda: {"some"}, raising=False)
    made = answer("baseline", ["make", "a", str(path)])
    assert made.document["features"] == str(features_file(path))
    found = _judge((read_baseline(path), read_sides(worse[1])), _policy(kid=0.3))
    assert _figures(found)["kid_nano"]["verdict"] == "fail"


def test_file_of_an_earlier_version_has_no_set_metric(tmp_path, same):
    sides, path = _read(same), tmp_path / "main.json"
    plain = [replace(sides[0][0], sets={})]
    path.write_text(baseline_text(plain).replace('"sets": {}, ', ""))
    figure = _figures(_judge((read_baseline(path), sides[1]), _policy(kid=0.3)))["kid_nano"]
    assert "not scored on the baseline" in figure["note"]
    assert baseline_features(plain) is None


def test_reruns_add_no_images_to_a_set(same):
    (side,) = read_sides(same[0])
    merged = merge_starts(side, [side])
    assert len(merged.sets["kid_nano"].rows) == 256
    assert merged.sets["kid_nano"].rows.sum() == 128


def test_every_form_of_output_has_the_figure(worse):
    document = _judge(_read(worse), _policy(kid=0.3, prompt_accuracy=0.05))
    row = next(
        x for x in markdown_document(comparison_parts(document)).splitlines() if "kid\\_nano" in x
    )
    assert row.startswith("| fail | quality |")
    (failure,) = ElementTree.fromstring(junit_xml(document)).iter("failure")
    assert "kid_nano is worse than the margin allows" in failure.get("message", "")
    page = compare_page(document, lambda _: None, lambda _: None)
    assert "kid_nano" in page
    unscored = _judge(_read(worse), _policy(fid=1.0, kid=0.3, optional=["fid"]))
    assert "| not applicable | quality | fid |" in markdown_document(comparison_parts(unscored))


def test_refusal_is_said_in_every_form(tmp_path):
    studies = set_studies(tmp_path, SAME, prompts=128, names=("fid_nano",))
    document = _judge(_read(studies), _policy(fid=1.0, prompt_accuracy=0.05, optional=["fid"]))
    page = compare_page(document, lambda _: None, lambda _: None)
    for text in (markdown_document(comparison_parts(document)), junit_xml(document), page):
        assert "holds from 256 prompts" in text


@pytest.mark.parametrize("name", ["quality", "all"])
def test_ready_policies_name_set_metrics_with_margins_of_their_own(name):
    quality = load_policy(name, POLICIES).dimensions["quality"]
    for metric in ("kid_nano", "fid_nano"):
        margin = quality.margin(metric)
        assert margin is not None
        assert margin.direction == "more"
        assert margin.margin > 0
        assert metric in quality.optional
    assert quality.margin("cmmd_nano") is quality.margin("kid_inception") is None


@pytest.mark.slow
def test_a_a_raises_no_more_alarms_than_stated(tmp_path):
    """300 comparisons of a backend with itself, at a margin of nothing: the worst allowed."""
    policy, alarms = _policy(kid=0.0, cmmd=0.0), 0
    for seed in range(300):
        names = ("kid_nano", "cmmd_nano")
        world = World(seeds=1)
        studies = set_studies(tmp_path / str(seed), world, prompts=128, names=names, seed=seed)
        alarms += gate_fails(_judge(_read(studies), policy))
    assert alarms / 300 <= 0.025 + 2.6 * np.sqrt(0.025 * 0.975 / 300)


def _uneven(rng: np.random.Generator) -> tuple[Twins, Sample]:
    """Prompts with 1 to 3 seeds, and renders in another order, some of prompts nobody asked for."""
    prompts = np.repeat(np.arange(20), rng.integers(1, 4, 20))
    a, b = rng.normal(size=(2, len(prompts), 5))
    theirs = rng.permutation(np.repeat(np.arange(25), 3))
    return Twins(a, b + 0.3, prompts), Sample(rng.normal(size=(75, 5)) + 0.5, theirs)


@pytest.mark.parametrize("own", [True, False], ids=["own-renders", "other-images"])
@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(3.0)], ids=["kid", "rbf"])
@pytest.mark.parametrize("block", [4_000_000, 40], ids=["one-block", "blocks"])
def test_kernel_difference_is_the_difference_of_the_distances(monkeypatch, own, kernel, block):
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", block)
    twins, reference = _uneven(np.random.default_rng(0))
    if not own:  # where seeds are uneven, a prompt's pairs weigh a little more than its images
        reference = Sample(reference.features)
        twins = Twins(*(x[:20] for x in (twins.baseline, twins.candidate)), np.arange(20) // 2)
    there, here = (
        kernel_distance(Sample(x, twins.prompts), reference, kernel).value
        for x in (twins.candidate, twins.baseline)
    )
    found = kernel_difference(twins, reference, kernel)
    assert found.value == pytest.approx(there - here, rel=1e-9)
    scaled = kernel_difference(twins, reference, kernel, scale=1000.0)
    assert scaled.ci95 == pytest.approx([1000 * end for end in found.ci95 or ()])


def _spread(found) -> float:
    return (found.high - found.low) / 2 / float(student(found.clusters - 1))


def _unpaired(twins: Twins) -> Twins:
    """The mutant: the candidate's images under other prompts' names."""
    return replace(twins, candidate=np.roll(twins.candidate, 7, axis=0))


def test_kernel_difference_has_no_bias_and_the_mutant_with_an_image_s_own_pair_has():
    """Sides of unlike spread: their own pairs are not of one size and do not cancel."""
    rng, d, k = np.random.default_rng(1), 6, 48
    y = rng.normal(size=(64, d))
    points = [Gaussian(row, np.zeros((d, d)), 2) for row in y]
    parts = []
    for spread in (1.4, 0.6):  # candidate, baseline
        side = Gaussian(np.zeros(d), spread**2 * np.eye(d), 2)
        across = np.mean([truth.cubic_mean(side, point) for point in points])
        parts.append(truth.cubic_mean(side, side) - 2 * across)
    found, mutant = [], []
    for _ in range(150):
        noise = rng.normal(size=(k, d))
        twins = Twins(0.6 * noise, 1.4 * noise, np.arange(k))
        found.append(kernel_difference(twins, Sample(y), polynomial_kernel).value)
        there, here = (
            polynomial_kernel(x, x).mean() - 2 * polynomial_kernel(x, y).mean()
            for x in (twins.candidate, twins.baseline)
        )
        mutant.append(there - here)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - (parts[0] - parts[1])) < 3 * error
    assert abs(np.mean(mutant) - (parts[0] - parts[1])) > 6 * error


def test_width_is_the_spread_and_the_mutant_that_does_not_pair_is_wider():
    rng, world = np.random.default_rng(1), World(worse=0.3, alike=0.9)
    found, unpaired = [], []
    for _ in range(40):
        twins, renders = draw(world, rng, 48)
        found.append(kernel_difference(twins, renders, polynomial_kernel))
        unpaired.append(_spread(kernel_difference(_unpaired(twins), renders, polynomial_kernel)))
    spread = np.std([f.value for f in found])
    assert np.mean([_spread(f) for f in found]) == pytest.approx(spread, rel=0.3)
    assert np.mean(unpaired) > 1.5 * spread


def test_second_order_is_counted_once_where_both_sides_are_at_the_truth(monkeypatch):
    rng, world = np.random.default_rng(2), World(off=0.0)
    drawn = [draw(world, rng, 32) for _ in range(50)]

    def measure():
        found = [kernel_difference(*d, polynomial_kernel) for d in drawn]
        return np.std([f.value for f in found]), np.sqrt(np.mean([_spread(f) ** 2 for f in found]))

    spread, width = measure()
    assert width == pytest.approx(spread, rel=0.2)
    plain = kernels._variance

    def jackknife(found, counts, value, total):  # the mutant that takes nothing away
        pairs = np.square(counts).sum() ** 2 - (counts**4).sum()
        rest = found.squares - 2 * value * found.products + value**2 * pairs
        return plain(found, counts, value, total) + 2 * rest / total**2

    monkeypatch.setattr(kernels, "_variance", jackknife)
    assert measure()[1] > 1.25 * spread


def test_identical_sides_differ_by_nothing_for_certain():
    twins, renders = draw(World(), np.random.default_rng(3), 64)
    same = replace(twins, candidate=twins.baseline)
    assert kernel_difference(same, renders, polynomial_kernel).ci95 == [0.0, 0.0]
    assert frechet_difference(same, fit(renders.features), renders).ci95 == [0.0, 0.0]


def _flat(rng: np.random.Generator, k: int) -> tuple[Twins, Gaussian, float]:
    """Sides of unlike spread in 6 dimensions, their reference and the distances' difference."""
    d, spreads = 6, (0.4, 2.0)
    noise = rng.normal(size=(k, d))
    prompts = np.arange(k)
    reference = Gaussian(np.zeros(d), np.eye(d), 10_000)
    a, b = (Gaussian(np.zeros(d), s**2 * np.eye(d), 2) for s in spreads)
    expected = frechet_distance(b, reference) - frechet_distance(a, reference)
    return Twins(spreads[0] * noise, spreads[1] * noise, prompts), reference, expected


def test_frechet_difference_has_no_bias_of_n_and_the_plain_one_has(monkeypatch):
    rng = np.random.default_rng(4)
    found, plain, width = [], [], []
    for _ in range(150):
        twins, reference, expected = _flat(rng, 24)
        interval = frechet_difference(twins, reference)
        found.append(interval.value)
        width.append(_spread(interval))
        there, here = (
            frechet_distance(fit(x), reference) for x in (twins.candidate, twins.baseline)
        )
        plain.append(there - here)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 3 * error
    assert abs(np.mean(plain) - expected) > 6 * error
    assert np.mean(width) == pytest.approx(np.std(found), rel=0.2)


def test_frechet_difference_counts_the_second_order_once(monkeypatch):
    """Both sides are the reference's own distribution, where there is no other order."""
    rng, k, reference = np.random.default_rng(9), 24, Gaussian(np.zeros(5), np.eye(5), 10_000)
    drawn = [Twins(*rng.normal(size=(2, k, 5)), np.arange(k)) for _ in range(120)]

    def measure():
        found = [frechet_difference(twins, reference) for twins in drawn]
        return np.std([f.value for f in found]), np.sqrt(np.mean([_spread(f) ** 2 for f in found]))

    spread, width = measure()
    assert width == pytest.approx(spread, rel=0.2)

    def jackknife(found, left_out, k):  # the mutant that takes nothing away
        one = found[1 : k + 1]
        return (k - 1) / k * float(np.square(one - one.mean()).sum())

    monkeypatch.setattr(frechet, "_variance", jackknife)
    assert measure()[1] > 1.25 * spread


@pytest.mark.parametrize("block", [2_000_000, 1], ids=["one-block", "blocks"])
def test_frechet_difference_leaves_out_prompts_with_their_renders(monkeypatch, block):
    """Against covariances that are computed anew without each prompt."""
    monkeypatch.setattr(frechet, "_BLOCK_ELEMENTS", block)
    twins, renders = _uneven(np.random.default_rng(5))
    assert renders.prompts is not None
    kept = renders.prompts < 20

    def distance(without: int) -> float:
        mine, theirs = twins.prompts != without, kept & (renders.prompts != without)
        reference = fit(renders.features[theirs])
        there, here = (
            frechet_distance(fit(x[mine]), reference) for x in (twins.candidate, twins.baseline)
        )
        return there - here

    left = np.array([distance(i) for i in range(20)])
    expected = 20 * distance(-1) - 19 * left.mean()
    found = frechet_difference(twins, fit(renders.features), renders)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert (found.n, found.clusters) == (len(twins.prompts), 20)


def test_frechet_difference_of_a_singular_reference_needs_no_other_root():
    rng = np.random.default_rng(6)
    twins, _, _ = _flat(rng, 40)
    flat = Gaussian(np.zeros(6), np.diag([1.0, 1, 1, 1, 1, 0]), 100)
    near = Gaussian(np.zeros(6), np.diag([1.0, 1, 1, 1, 1, 1e-12]), 100)
    found, other = (frechet_difference(twins, reference) for reference in (flat, near))
    assert found.value == pytest.approx(other.value, rel=1e-4)


def _reference(dimensions: int, prompts: int | None = None) -> Reference:
    rows = np.random.default_rng(7).normal(size=(600, dimensions)).astype(np.float32)
    names = None if prompts is None else np.array([str(i % prompts) for i in range(600)])
    return Reference(name="r", gaussian=fit(rows), source="test", features=rows, prompts=names)


def _twins(prompts: int, dimensions: int) -> Twins:
    a, b = np.random.default_rng(8).normal(size=(2, prompts, dimensions))
    return Twins(a, b, np.array([str(i) for i in range(prompts)]))


@pytest.mark.parametrize(
    ("statistic", "prompts", "dimensions", "message"),
    [
        ("kid", LEAST_PROMPTS["kid"] - 1, 4, "needs 128 prompts, there are 127"),
        ("cmmd", LEAST_PROMPTS["cmmd"] - 1, 4, "needs 128 prompts"),
        ("frechet", LEAST_PROMPTS["frechet"] - 1, 4, "needs 256 prompts"),
        ("frechet", 256, 60, "needs 300 prompts at 60 dimensions"),
        ("frechet", 256, 600, "takes too long"),
        ("recall", 256, 4, "no paired interval"),
        ("frechet_infinity", 256, 4, "no paired interval"),
    ],
)
def test_what_has_no_known_interval_is_refused(statistic, prompts, dimensions, message):
    with pytest.raises(MetricError, match=message):
        set_difference(statistic, _twins(prompts, dimensions), _reference(dimensions), {"k": 3})


@pytest.mark.parametrize("statistic", ["kid", "cmmd"])
def test_values_are_those_that_show_has(statistic):
    twins, reference = _twins(128, 8), _reference(8, 128)
    parameters = {"normalise": True}
    found = set_difference(statistic, twins, reference, parameters)
    assert found.candidate - found.baseline == pytest.approx(found.effect.value, rel=1e-9)
    assert found.effect.clusters == 128

"""The reference's file, and set metrics computed against it from a study's kept features."""

import numpy as np
import pytest

from sd35bench.analysis.reference import Reference, load_reference, save_reference, write_reference
from sd35bench.analysis.set_metrics import STATISTICS, compute
from sd35bench.analysis.summary import show_document
from sd35bench.errors import MetricError
from sd35bench.stats.frechet import fit
from sd35bench.stats.kernel import Sample
from tests.studies.memory import MemoryStudy, record


def _reference(n: int = 300, d: int = 4, **more) -> Reference:
    features = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    return Reference(name="r", gaussian=fit(features), source="a test", features=features, **more)


def test_reference_comes_back_as_it_was_saved(tmp_path):
    prompts = np.array([f"prompt {i}" for i in range(300)])
    made = _reference(prompts=prompts, provenance={"extractor": "x", "n": 300})
    digest = save_reference(tmp_path / "r.npz", made)
    found = load_reference(tmp_path / "r.npz")
    assert np.array_equal(found.gaussian.cov, made.gaussian.cov)
    assert np.array_equal(found.features, made.features)
    assert found.prompts.tolist() == prompts.tolist()
    assert (found.source, found.provenance, found.gaussian.n) == ("a test", made.provenance, 300)
    assert len(digest) == 64
    first = (tmp_path / "r.npz").read_bytes()
    assert save_reference(tmp_path / "r.npz", made) == digest
    assert (tmp_path / "r.npz").read_bytes() == first  # the same content is the same file


@pytest.mark.parametrize("what", ["mean", "features", "provenance"])
def test_altered_reference_is_refused(tmp_path, what):
    save_reference(tmp_path / "r.npz", _reference(provenance={"seed": 0}))
    with np.load(tmp_path / "r.npz") as data:
        arrays = dict(data)
    changed = np.array('{"seed": 1}') if what == "provenance" else arrays[what] + 1e-3
    np.savez(tmp_path / "r.npz", **(arrays | {what: changed}))
    with pytest.raises(MetricError, match="not what was written"):
        load_reference(tmp_path / "r.npz")


@pytest.mark.parametrize("cut", [0, 40, 3000], ids=["empty", "header", "half"])
def test_reference_that_was_cut_short_is_refused(tmp_path, cut):
    save_reference(tmp_path / "r.npz", _reference())
    (tmp_path / "r.npz").write_bytes((tmp_path / "r.npz").read_bytes()[:cut])
    with pytest.raises(MetricError, match=r"cannot be read as \.npz"):
        load_reference(tmp_path / "r.npz")


def test_statistics_of_an_earlier_version_or_another_tool_are_read(tmp_path):
    np.savez(tmp_path / "old.npz", mean=np.zeros(4), cov=np.eye(4), n=50)
    found = load_reference(tmp_path / "old.npz")
    assert (found.gaussian.n, found.features, found.source) == (
        50,
        None,
        str(tmp_path / "old.npz"),
    )
    with pytest.raises(MetricError, match="mean and covariance only"):
        _ = found.sample


def test_features_that_do_not_fit_are_refused(tmp_path):
    rows = {"mean": np.zeros(4), "cov": np.eye(4), "n": 9}
    np.savez(tmp_path / "a.npz", **rows, features=np.zeros((9, 5)))
    np.savez(tmp_path / "b.npz", **rows, features=np.zeros((9, 4)), prompts=np.array(["x"]))
    for name, what in (("a", "do not fit"), ("b", "1 prompts for 9 rows")):
        with pytest.raises(MetricError, match=what):
            load_reference(tmp_path / f"{name}.npz")


PARAMETERS = {
    "kid": {"normalise": False, "subset_size": 40, "subsets": 5, "subset_seed": 0},
    "precision": {"k": 3},
    "recall": {"k": 3},
}


def _study(tmp_path, statistic: str, *, prompts: int = 64, **detail) -> MemoryStudy:
    """A study of two images a prompt, a little off the reference."""
    rng = np.random.default_rng(1)
    study = MemoryStudy(tmp_path)
    features = rng.normal(0.3, 1.1, size=(2 * prompts, 4)).astype(np.float32)
    write_reference(study, _reference())
    kept = study.kept_features.setdefault("x", {})
    about = {"extractor": "x", "reference": "r", "min_images": 16} | detail
    about |= {"statistic": statistic, "parameters": PARAMETERS.get(statistic, {})}
    for i in range(2 * prompts):
        row = record(i // 2, seed=i % 2)
        study.add(row)
        study.score(row, f"{statistic}_x", None, **about)
        kept[row.image or ""] = features[i]
    return study.touch_images()


@pytest.mark.parametrize("statistic", sorted(STATISTICS))
def test_show_computes_every_statistic_from_kept_features(tmp_path, statistic):
    study = _study(tmp_path, statistic)
    entry = show_document(study)["settings"][0]["metrics"][f"{statistic}_x"]
    assert (entry["n"], entry["n_prompts"], entry["reference_n"]) == (128, 64, 300)
    assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    assert entry["ci95"][0] < entry["ci95"][1]
    assert ("fit_se" in entry) is (statistic == "frechet_infinity")


def test_below_its_minimum_a_set_metric_says_what_it_needs(tmp_path):
    study = _study(tmp_path, "kid", min_images=200)
    entry = show_document(study)["settings"][0]["metrics"]["kid_x"]
    assert (entry["value"], entry["needs"], entry["n"]) == (None, 200, 128)


def test_extrapolation_over_too_few_prompts_is_refused_with_the_count(tmp_path):
    study = _study(tmp_path, "frechet_infinity", prompts=12)
    entry = show_document(study)["settings"][0]["metrics"]["frechet_infinity_x"]
    assert entry["value"] is None
    assert "needs 16 prompts" in entry["reason"]
    assert "there are 12" in entry["reason"]


def test_statistic_of_a_later_version_is_no_value_and_no_crash(tmp_path):
    study = _study(tmp_path, "beauty")
    entry = show_document(study)["settings"][0]["metrics"]["beauty_x"]
    assert (entry["value"], "no statistic of this version" in entry["reason"]) == (None, True)


def test_compute_refuses_features_of_other_dimensions():
    with pytest.raises(MetricError, match="4 dimensions, the features have 3"):
        compute("frechet", Sample(np.zeros((9, 3)), np.arange(9)), _reference(), {})


@pytest.mark.parametrize("statistic", ["precision", "recall"])
def test_neighbours_beyond_the_images_are_refused(statistic):
    """A journal that was cut can leave so few; numpy refused to sort them."""
    few = Sample(np.zeros((3, 4), np.float32), np.array(["a", "b", "c"]))
    with pytest.raises(MetricError, match=r"3 neighbours of each image, and there are 3"):
        compute(statistic, few, _reference(), {"k": 3, "rows": 300})

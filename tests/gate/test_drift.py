"""Drift on drawn images: what changes every image by a little, and what is the same at any n."""

import io
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd35bench.gate.dimensions import ImageDistances, image_difference
from sd35bench.gate.judge import compare_sides, gate_fails
from sd35bench.gate.policy import as_policy, load_policy
from sd35bench.gate.sides import read_sides
from sd35bench.nano.world import render, sample_scene
from sd35bench.types import Status
from tests.studies.memory import planted
from tests.validity_runs.plants import more_red, with_gamma

POLICIES = Path(__file__).parents[2] / "configs" / "policy"
N = 64
READY = ("all", "drift", "exact", "quality")


@cache
def _drawn(number: int, size_px: int = 64) -> np.ndarray:
    """A scene of nano's world with a slope of light on it, so that all values occur."""
    rng = np.random.default_rng(number)
    scene = render(sample_scene(rng, "several", 64, 64))
    image = Image.fromarray(scene).resize((size_px, size_px), Image.Resampling.BICUBIC)
    light = np.linspace(0.4, 1.0, size_px)[None, :, None]
    lit = np.asarray(image) * light + rng.normal(0, 2, (size_px, size_px, 1))
    return lit.clip(0, 255).astype(np.uint8)


class Pair:
    """Two sides of `n` drawn images; `change` makes the candidate's from the baseline's."""

    def __init__(self, path: Path, change=None, n: int = N) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (side,) = read_sides(planted(path, {(8, 4.0): (0.8, 1.0)}, prompts=n, seeds=1))
        self.files: dict[str, Path] = {}
        self.folder = path
        before = [_drawn(i) for i in range(n)]
        after = before if change is None else [change(i, image) for i, image in enumerate(before)]
        self.before = replace(side, images=tuple(map(self._keep, before)))
        self.after = replace(side, images=tuple(map(self._keep, after)), study="candidate")

    def _keep(self, image: np.ndarray) -> str:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        digest = f"{hash(data.getvalue()) & (2**64 - 1):064x}"
        path = self.folder / f"{digest}.png"
        path.write_bytes(data.getvalue())
        self.files[digest] = path
        return digest

    def judge(self, policy) -> dict:
        rules = as_policy("own", policy) if isinstance(policy, dict) else policy
        rules = load_policy(rules, POLICIES) if isinstance(rules, str) else rules
        found = ImageDistances(self.files.get, self.files.get)
        return compare_sides([self.before], [self.after], rules, found)

    def caught(self) -> set[str]:
        return {policy for policy in READY if self.judge(policy)["verdict"] == "fail"}


def figures(document: dict, dimension: str = "drift") -> dict[str, dict]:
    found = document["comparisons"][0]["dimensions"][dimension]["figures"]
    return {figure["name"]: figure for figure in found}


def _nearest(number: int, _image: np.ndarray) -> np.ndarray:
    large = Image.fromarray(_drawn(number, 96))
    return np.asarray(large.resize((64, 64), Image.Resampling.NEAREST))


def _lanczos(number: int, _image: np.ndarray) -> np.ndarray:
    large = Image.fromarray(_drawn(number, 96))
    return np.asarray(large.resize((64, 64), Image.Resampling.LANCZOS))


def _one_bit(number: int, image: np.ndarray) -> np.ndarray:
    """One level in one sample of one image of all."""
    changed = image.copy()
    if number == 3:
        changed[0, 0, 0] ^= 1
    return changed


# Defects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (lambda _, image: more_red(image), {"exact", "drift", "all"}),
        (lambda _, image: with_gamma(image), {"exact", "drift", "all"}),
        (_one_bit, {"exact"}),
        (None, set()),
    ],
    ids=["red-3", "gamma-1.02", "one-bit", "same"],
)
def test_systematic_change_is_caught_within_64_images(tmp_path, change, caught):
    assert Pair(tmp_path, change).caught() == caught


def test_nearest_neighbour_resize_is_caught(tmp_path):
    pair = Pair(tmp_path, _nearest)
    honest = Pair(tmp_path / "honest", _lanczos)
    pair.before = honest.after
    pair.files |= honest.files
    assert {"exact", "drift"} <= pair.caught()


def test_mutant_mean_absolute_difference_alone_lets_a_shift_of_red_pass(tmp_path):
    """What the policy `drift` had before: 3 levels of one channel are 1 level of all."""
    old = {"dimensions": {"drift": {"required": True, "margins": {"mean_abs": 1.0}}}}
    pair = Pair(tmp_path, lambda _, image: more_red(image))
    assert pair.judge(old)["verdict"] == "pass"
    assert pair.judge("drift")["verdict"] == "fail"


def test_shift_is_the_signed_difference_of_each_channel_with_its_interval(tmp_path):
    rng = np.random.default_rng(0)

    def darker_blue(_: int, image: np.ndarray) -> np.ndarray:
        """A third of the blue samples one level darker, and as much noise either way in red."""
        change = np.zeros(image.shape, np.int16)
        change[..., 2] = -1 * (rng.random(image.shape[:2]) < 0.3)
        change[..., 0] = rng.choice([-1, 0, 1], image.shape[:2])
        return (image + change).clip(1, 254).astype(np.uint8)

    pair = Pair(tmp_path, darker_blue)
    found = figures(pair.judge("drift"))
    blue, red = found["shift_blue"], found["shift_red"]
    assert blue["effect"] == pytest.approx(-0.3, abs=0.05)
    assert red["effect"] == pytest.approx(0.0, abs=0.05)
    assert blue["ci95"][1] - blue["ci95"][0] < 0.1
    assert (blue["verdict"], red["verdict"]) == ("fail", "pass")
    assert blue["worse"] == "both"


def test_image_difference_is_candidate_minus_baseline():
    a = np.full((2, 2, 3), 10, np.uint8)
    b = a + np.array([3, 0, 1], np.uint8)
    assert image_difference(a, b).tolist() == pytest.approx([4 / 3, 3.0, 0.0, 1.0])
    assert image_difference(b, a).tolist() == pytest.approx([4 / 3, -3.0, 0.0, -1.0])
    assert np.isnan(image_difference(a, b[:1])).all()


# What is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("policy", ["exact", "drift", "quality"])
def test_same_images_pass_at_any_n(tmp_path, n, policy):
    """Quality, failures and drift are read off images that are the same; a bootstrap is not."""
    document = Pair(tmp_path, n=n).judge(policy)
    assert document["verdict"] == "pass"
    (comparison,) = document["comparisons"]
    assert (comparison["n_images"], comparison["n_identical"]) == (n, n)
    for part in comparison["dimensions"].values():
        for figure in (f for f in part["figures"] if f["effect"] is not None):
            assert figure["interval"] == [0.0, 0.0]
            assert figure["family"] is None, "it takes no place of the others"


def test_other_scores_of_the_same_images_are_judged(tmp_path):
    """A scorer that changed its mind: the files say that nothing can differ, the scores do."""
    pair = Pair(tmp_path)
    worse = {"prompt_accuracy": 0.5 * pair.after.metrics["prompt_accuracy"]}
    pair.after = replace(pair.after, metrics=worse)
    assert pair.judge("quality")["verdict"] == "fail"


def test_one_changed_image_fails_where_none_may_change_and_none_else(tmp_path):
    pair = Pair(tmp_path, _one_bit)
    strict = figures(pair.judge("exact"))["changed"]
    assert (strict["verdict"], strict["p"]) == ("fail", None)
    assert strict["interval"][0] > 0.0
    assert "1 of 64 images are not bit-identical" in strict["note"]
    lenient = {"dimensions": {"drift": {"required": True, "margins": {"changed": 0.1}}}}
    assert pair.judge(lenient)["verdict"] == "pass"


def test_other_bytes_of_the_same_pixels_are_no_change(tmp_path):
    pair = Pair(tmp_path)
    path = pair.folder / "packed.png"
    Image.open(pair.files[pair.before.images[0]]).save(path, compress_level=0)
    pair.files["f" * 64] = path
    pair.after = replace(pair.after, images=("f" * 64, *pair.after.images[1:]))
    assert pair.judge("exact")["dimensions"]["drift"]["verdict"] == "pass"


def test_files_that_are_gone_are_told_apart_by_their_digests(tmp_path):
    """A committed baseline without images is enough for `exact`, and not for `drift`."""
    pair = Pair(tmp_path, lambda _, image: more_red(image))
    pair.files = {}
    assert pair.judge("exact")["verdict"] == "fail"
    assert "not there" in pair.judge("drift")["dimensions"]["drift"]["reason"]
    same = Pair(tmp_path / "same")
    same.files = {}
    assert same.judge("drift")["verdict"] == same.judge("exact")["verdict"] == "pass"


def test_image_that_was_not_made_is_a_change(tmp_path):
    studies = [
        planted(tmp_path / n, {(8, 4.0): (1.0, 1.0)}, prompts=8, seeds=1) for n in ("a", "b")
    ]
    gone = {"status": Status.CRASHED, "timings": None, "image": None, "error": "died"}
    studies[1].kept[2] = replace(studies[1].kept[2], **gone)
    sides = [read_sides(study) for study in studies]
    for before, after in (sides, sides[::-1]):
        rules = load_policy("exact", POLICIES)
        document = compare_sides(before, after, rules, lambda *_: "no images")
        assert gate_fails(document)
        assert "1 of them failed" in figures(document)["changed"]["note"]


def test_change_that_no_record_explains_is_said_under_every_policy(tmp_path):
    pair = Pair(tmp_path, _one_bit)
    said = "1 of 64 images are not bit-identical, though no setting"
    assert any(said in text for text in pair.judge("quality")["warnings"])
    assert not any("bit-identical" in text for text in pair.judge("exact")["warnings"])
    pair.after = replace(pair.after, environment={"cpu_model": "another"})
    assert not any("bit-identical" in text for text in pair.judge("quality")["warnings"])

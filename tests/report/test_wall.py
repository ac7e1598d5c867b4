"""The wall's choice: balanced, seeded, whole pairs, within its budget."""

import base64
import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd35bench.report import wall
from sd35bench.report.headline import address
from sd35bench.report.rows import match_records, read_rows
from sd35bench.report.wall import Wanted, build_wall, encode_thumbnail, pack_wall
from tests.studies import drawn
from tests.studies.drawn import Synthetic, make_study, show_of


def build(study, wanted: Wanted | None = None) -> dict:
    rows = read_rows(show_of(study))
    matched = match_records(rows, study.records(), study.sessions())
    return build_wall(study, rows, matched, Wanted() if wanted is None else wanted, ())


def test_match_records_gives_every_record_to_its_row(demo: Synthetic):
    records = demo.study.records()
    rows = read_rows(demo.show)
    matched = match_records(rows, records, demo.study.sessions())
    assert sum(len(m) for m in matched.values()) == len(records)
    for row in rows:
        steps = {(r.trial.request.steps, r.trial.request.cfg) for r in matched[row.id]}
        assert steps == {(row.steps, row.cfg)}


def test_wall_has_a_prompts_own_columns(tmp_path, monkeypatch):
    make = drawn._record

    def tagged(study, load, request, number, failed):
        record = make(study, load, request, number, failed)
        ref = replace(record.trial.prompt, tags={"side": ("left", "top")})
        return replace(record, trial=replace(record.trial, prompt=ref))

    plain = make_study(tmp_path, "plain", steps=(4,), strengths=(), prompts=("a red circle",))
    monkeypatch.setattr(drawn, "_record", tagged)
    own = make_study(tmp_path, "own", steps=(4,), strengths=(), prompts=("a red circle",))
    assert [p["own"] for p in build(own)["prompts"]] == [{"side": "left, top"}]
    assert all("own" not in p for p in build(plain)["prompts"])


def test_wall_has_seeds_as_text_for_javascript(demo: Synthetic):
    seeds = {t["seed"] for t in build(demo.study)["tiles"]}
    assert seeds == {str(r.trial.request.seed) for r in demo.study.records()}


def test_wall_holds_a_small_study_whole(demo: Synthetic):
    found = build(demo.study)
    assert len(found["tiles"]) == len(demo.study.records())
    assert found["note"] == "216 images of 24 prompt–seed pairs."
    assert all(t["scores"] and t["parts"] for t in found["tiles"])


def test_wall_takes_whole_pairs_balanced_over_tasks_and_levels(tmp_path, monkeypatch):
    prompts = tuple(f"a red circle {i}" for i in range(12))
    study = make_study(tmp_path, "big", steps=(4,), prompts=prompts)
    monkeypatch.setattr(wall, "MAX_TILES", 30)
    found = build(study)
    assert 20 <= len(found["tiles"]) <= 30
    per_pair = Counter((t["prompt"], t["seed"]) for t in found["tiles"])
    assert set(per_pair.values()) == {3}  # three settings a task, or none
    levels = Counter(found["prompts"][p]["level"] for p, _ in per_pair)
    assert abs(levels["single"] - levels["relation"]) <= 2
    inits = Counter(found["prompts"][p]["init"] is not None for p, _ in per_pair)
    assert abs(inits[True] - inits[False]) <= 2
    assert "out of 144 images of 48 pairs" in found["note"]
    assert build(study) == found


def test_wall_stops_at_its_size(tmp_path, monkeypatch):
    prompts = tuple(f"a red circle {i}" for i in range(6))
    study = make_study(tmp_path, "heavy", steps=(4,), strengths=(), prompts=prompts)
    monkeypatch.setattr(wall, "MAX_BYTES", 10_000)
    found = build(study)
    assert 3 <= len(found["tiles"]) < 36
    assert sum(map(len, found["images"])) < 10_000 + 3 * 20_000


def test_wall_adds_the_best_and_the_worst_of_a_chosen_setting(tmp_path, monkeypatch):
    prompts = tuple(f"a red circle {i}" for i in range(8))
    study = make_study(tmp_path, "chosen", steps=(4,), strengths=(), prompts=prompts)
    values = {s.key: s.value for s in study.scores() if s.metric == "prompt_accuracy"}
    first, other, third = (r.id for r in read_rows(show_of(study)))
    monkeypatch.setattr(wall, "MAX_TILES", 12)
    found = build(study, Wanted(rows=[first], beside={first: other}))
    shown = [t["scores"][0][1] for t in found["tiles"] if t["setting"] == first]
    keys = {r.trial.key for r in study.records() if r.trial.request.cfg == 1.0}
    assert sorted(shown)[:2] == sorted(values[k] for k in keys)[:2]
    assert sorted(shown)[-2:] == sorted(values[k] for k in keys)[-2:]
    per_row = Counter(t["setting"] for t in found["tiles"])
    assert per_row[first] == per_row[other] > per_row[third]


def test_packed_wall_has_its_tiles_as_columns(demo: Synthetic):
    found = build(demo.study)
    packed = pack_wall(found)

    def column(name: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(packed["columns"][name]), "<i4")

    settings = [s["id"] for s in packed["settings"]]
    assert [settings[i] for i in column("setting")] == [t["setting"] for t in found["tiles"]]
    assert [packed["seeds"][i] for i in column("seed")] == [t["seed"] for t in found["tiles"]]
    assert column("image").tolist() == [t["image"] for t in found["tiles"]]
    name, text = packed["scores"][0]
    values = np.frombuffer(base64.b64decode(text), "<f4")
    assert values == pytest.approx([dict(t["scores"])[name] for t in found["tiles"]])
    steps = next(f for f in packed["fields"] if f["name"] == "steps")
    assert steps["values"] == ["4", "12", "28"]


def test_linked_wall_names_files_and_reads_none(tmp_path, monkeypatch):
    study = make_study(tmp_path, "linked", steps=(4,), cfgs=(1.0,), prompts=("a",))
    monkeypatch.setattr(type(study), "read_image_file", None)
    found = build(study, Wanted(link=True))
    for tile in found["tiles"]:
        assert (study.path / "report" / address(found, tile["image"])).resolve().is_file()
    inits = [p["init"] for p in found["prompts"] if p["init"] is not None]
    assert (study.path / "report" / address(found, inits[0])).resolve().is_file()


def test_wall_keeps_failed_trials_with_their_reason(tmp_path):
    study = make_study(tmp_path, "bad", steps=(4,), strengths=(), prompts=("a",), fail_every=2)
    failed = [t for t in build(study)["tiles"] if t["image"] is None]
    assert len(failed) == 3
    assert {t["error"] for t in failed} == {"invalid-image: the image is black"}


def test_wall_has_scores_of_the_image_that_it_shows_alone(tmp_path):
    study = make_study(tmp_path, "again", steps=(4,), strengths=(), prompts=("a",))
    wanted = build(study)["tiles"]
    old = [replace(s, image="0" * 64, value=0.123) for s in study.scores()]
    study.append_scores("prompt_accuracy", [s for s in old if s.metric == "prompt_accuracy"])
    assert build(study)["tiles"] == wanted


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(buffer, "PNG", pnginfo=None)
    return buffer.getvalue()


def decode(uri: str) -> Image.Image:
    assert uri.startswith("data:image/webp;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_thumbnail_of_a_small_image_is_the_image_itself():
    data = png((64, 64))
    assert decode(encode_thumbnail(data)).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize(("size", "shown"), [((1024, 512), (256, 128)), ((200, 200), (200, 200))])
def test_thumbnail_of_a_large_image_is_bounded(size, shown):
    uri = encode_thumbnail(png(size))
    assert decode(uri).size == shown
    assert len(uri) < 80_000

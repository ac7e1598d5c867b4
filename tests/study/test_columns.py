"""Columns of a Parquet view say to the digit what the records themselves say."""

import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import read_table
from sd35bench.errors import ConfigError
from sd35bench.machine import contention
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.page import render_report
from sd35bench.score import score_study
from sd35bench.study import latest, view
from sd35bench.study.columns import Columns, dense, grouped, prompts, samples, split, tags
from sd35bench.study.store import Score, Study
from sd35bench.study.view import moment_number
from sd35bench.types import (
    BackendSpec,
    CanaryFacts,
    Flops,
    GpuState,
    Memory,
    Record,
    RemoteCall,
    Session,
    Status,
    Surroundings,
    Timings,
)
from tests.studies.drawn import document_of
from tests.studies.memory import LOAD, record, session

PROFILES = {
    "fast": {"latency_limit_s": 2.0, "latency_p95_limit_s": 3.0, "margins": {"clip_score": 0.5}},
    "good": {"objective": "best-quality", "failures_limit": 0.5, "margins": {"clip_score": 0.1}},
}
COMPILED = replace(LOAD, backend=BackendSpec(name="compiled", kind="compile", options={}))
HOSTED = replace(
    LOAD,
    backend=BackendSpec(name="fal", kind="fal", options={"base_url": "https://h.example"}),
)
SETTINGS = ((4, 1.0), (8, 4.0), (28, 7.0))
INIT = "c" * 64


class Chance:
    """A study drawn from a seed: what a record can be, some of everything."""

    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.study = Study.open(root, "s", create=True)
        self.images = [self._image(number) for number in range(60)]
        self.clock = 0.0

    def _image(self, number: int) -> str:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        return self.study.put_image(buffer.getvalue(), ".png")

    def some(self, share: float) -> bool:
        return self.rng.random() < share

    def make(self, prompts: int = 9) -> Study:
        """Write sessions, records and scores; prompts 6 and up are held out."""
        sessions = [self._session(n, load) for n, load in enumerate((LOAD, COMPILED, LOAD, HOSTED))]
        made: list[Record] = []
        for number, own in enumerate(sessions):
            lines: list[Record] = []
            for prompt in range(prompts):
                for steps, cfg in SETTINGS:
                    lines += self._trials(own, prompt, steps, cfg)
            again = self.rng.sample(lines, len(lines) // 8)  # timed again, or failed then
            lines += [self._timed(r) if self.some(0.7) else self._failed(r) for r in again]
            self.rng.shuffle(lines)
            shard = self.study.shard(self.study.new_shard_id())
            if number != 2 or self.some(0.5):
                shard.append_session(own)
            for line in lines:
                shard.append_record(line)
            shard.close()
            made += lines
        self._score([r for r in made if r.image is not None])
        self.study.image_path(self.images[1]).unlink()
        self.study.image_path(self.images[2]).write_bytes(b"damaged")
        return self.study

    def _session(self, number: int, load) -> Session:
        where = {"hostname": f"host{self.rng.randrange(2)}", "device_uuid": f"u{number % 2}"}
        where |= {"boot_id": "b", "occupies": "gpu-0", "gpu_name": "H200"}
        facts = CanaryFacts(kind="integer", threads=1, best=2.0 - 0.7 * (number == 1), machine="m")
        return replace(
            session(f"s{number}", load=load),
            environment={"torch": "2.9", **({} if load is HOSTED else where)},
            canary=None if load is HOSTED else facts,
            start=number % 2,
        )

    def _trials(self, own: Session, prompt: int, steps: int, cfg: float) -> list[Record]:
        tag = {"colour": (("red", "blue")[prompt % 2],)}
        found = []
        for seed in range(1 + (prompt % 3 == 0)):
            size = 2 if self.some(0.15) and own.load is not HOSTED else 1
            init = INIT if prompt % 4 == 3 else None
            one = record(
                prompt,
                load=own.load,
                steps=steps,
                cfg=cfg,
                seed=seed,
                batch_size=size,
                init_image=init,
                prompt_strength=None if init is None else 0.6,
                negative_prompt="blur" if cfg > 1 and prompt % 2 else "",
                prompt_set="nano" if prompt != 5 else "mine.txt",
                split="tune" if prompt < 6 else "heldout",
                level=self.rng.choice((None, "1", "2")) if prompt != 5 else None,
                session_id=own.id,
            )
            one = replace(one, trial=replace(one.trial, prompt=replace(one.trial.prompt, tags=tag)))
            found.append(self._timed(one) if self.some(0.85) else self._failed(one))
        return found

    def _timed(self, one: Record) -> Record:
        rng = self.rng
        self.clock += rng.uniform(0.5, 1.5)  # shorter than some images take: sessions overlap
        steps = tuple(rng.uniform(0.01, 0.02) for _ in range(one.trial.request.steps))
        hosted = one.trial.load is HOSTED
        call = RemoteCall(
            provider="fal", prediction_id="p", request_id=None, in_flight=rng.choice((1, 1, 2)),
            attempts=1, polls=3, submit_s=0.1, queue_s=0.2, predict_s=0.3, poll_bound_s=0.1,
            download_s=0.1, cost_usd=rng.choice((0.01, None)), cost_reported=self.some(0.5),
            resumed=self.some(0.1),
        )  # fmt: skip
        gpu = GpuState(
            sm_clock_mhz=rng.randrange(1000, 1800),
            memory_clock_mhz=2600,
            power_w=300.0,
            temperature_c=None,
            throttled=("power",) * self.some(0.2),
        )
        around = Surroundings(
            canary_before=rng.choice((None, rng.uniform(0.9, 1.0), 0.5)),
            canary_after=rng.choice((None, rng.uniform(0.9, 1.0))),
            cpu_share=rng.uniform(0.5, 1.0),
            switches=rng.randrange(3),
        )
        return replace(
            one,
            status=Status.OK,
            error=None,
            image=rng.choice(self.images) if one.trial.prompt.id != "00005" else self.images[0],
            image_bytes=rng.randrange(100, 200),
            started_at=self._moment(),
            batch_actual=one.trial.batch_size if self.some(0.8) else 1,
            timings=Timings(
                generate_s=sum(steps) + rng.uniform(0.5, 1.0),
                encode_s=0.01,
                text_s=rng.choice((None, 0.02)),
                denoise_s=sum(steps),
                step_s=steps,
            ),
            memory=Memory(peak_rss_bytes=rng.randrange(10**9), peak_vram_bytes=None),
            evaluations=rng.choice((None, one.trial.request.steps)),
            truncated_tokens=rng.choice((0, 0, 3)),
            flops=rng.choice((None, Flops(text=1e9, denoise=3e11, decode=2e10))),
            gpu=None if hosted else gpu,
            remote=call if hosted else None,
            surroundings=None if hosted or self.some(0.2) else around,
        )

    def _moment(self) -> str:
        whole, part = divmod(self.clock, 1)
        digits = self.rng.choice(("", f".{int(part * 1e3):03d}", f".{int(part * 1e6):06d}"))
        minute, second = divmod(int(whole), 60)
        hour, minute = divmod(minute, 60)
        return f"2026-11-30T{hour:02d}:{minute:02d}:{second:02d}{digits}+00:00"

    def _failed(self, one: Record) -> Record:
        status = self.rng.choice((Status.OUT_OF_MEMORY, Status.ERROR, Status.SKIPPED))
        if one.trial.load is HOSTED and self.some(0.5):
            status = Status.AMBIGUOUS
        name = one.session_id if self.some(0.9) else "nobody"
        return replace(
            one, status=status, session_id=name, error="it broke", image=None, timings=None,
            memory=None, remote=None, surroundings=None, started_at=self._moment(),
        )  # fmt: skip

    def _score(self, made: list[Record]) -> None:
        def scores(name: str, share: float, value) -> None:
            some = [r for r in made if self.some(share)]
            rows = [value(name, r) for r in some]
            rows += [value(name, r) for r in some[::7]]  # scored twice: the last one counts
            self.study.append_scores(name, rows)

        def of(name: str, one: Record, value: float | None, detail: dict | None = None) -> Score:
            where = {"key": one.trial.key, "image": str(one.image)}
            return Score(metric=name, **where, value=value, detail=detail or {})

        why = {"reason": "black image"}
        scores("guard", 0.9, lambda n, r: of(n, r, *((0.0, why) if self.some(0.1) else (1.0,))))
        scores("clip_score_v", 0.9, lambda n, r: of(n, r, self.rng.uniform(20, 30)))
        cut = {"truncated": True}
        scores("judge_v", 0.5, lambda n, r: of(n, r, self.rng.choice((None, 1.0, 2.0)), cut))
        scores("init_kept", 0.9, lambda n, r: of(n, r, self.rng.random()))
        scores("prompt_accuracy", 0.9, lambda n, r: of(n, r, float(self.some(0.6))))


def made(root: Path, seed: int) -> Path:
    return Chance(root, seed).make().path


def documents(path: Path) -> list[str]:
    """What the verbs say of a study, of a slice of it, and with its hosts pooled."""
    study = Study.open(path.parent, path.name)
    found: list[object] = [sorted(study.done_keys()), show_document(study, pool_hosts=True)]
    for part in (study.part({"colour": "red"}), study):
        table = read_table(part)
        found.append(show := show_document(part, table))
        try:
            found.append(advice := recommend_document(part, PROFILES, table))
        except ConfigError as exc:
            found.append(advice := str(exc))
    page = render_report(document_of(study, show, advice))
    return [*map(json.dumps, found), page]


def compared(path: Path, monkeypatch, made=documents) -> list[tuple[str, str]]:
    """The documents by columns and by records, one beside the other."""
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    columns = made(path)
    monkeypatch.setattr(view, "LEAST_BYTES", 1 << 60)
    return list(zip(columns, made(path), strict=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("one"), 1)


def test_columns_say_what_records_say_to_the_digit(one, monkeypatch):
    for columns, records in compared(one, monkeypatch):
        assert columns == records


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 62))
def test_columns_say_what_records_say_of_many_studies(tmp_path, monkeypatch, seed):
    for columns, records in compared(made(tmp_path, seed), monkeypatch):
        assert columns == records


MATCHED, LISTS = latest._matched, Columns.lists
MUTANTS = {
    "a score of another image of the trial counts": (
        view, "name_number", lambda *names: hash(names[0])
    ),
    "no timing is disturbed": (
        contention, "_marked", lambda columns, stamps: np.zeros(columns.size, bool)
    ),
    "no trial was made again": (latest, "_made_again", lambda columns: False),
    "a record has its neighbour's score": (
        latest, "_matched", lambda *of: tuple(map(np.roll, MATCHED(*of), (1, 0)))
    ),
    "a record has its neighbour's steps": (
        Columns, "lists", lambda of, name, places: LISTS(of, name, np.maximum(places - 1, 0))
    ),
    "texts of moments sort as they come": (
        view, "moment_number", lambda text: hash(text) % 1000
    ),
}  # fmt: skip


def shown(path: Path) -> list[str]:
    return [json.dumps(show_document(Study.open(path.parent, path.name)))]


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_columns_that_are_wrong_are_seen(one, tmp_path, monkeypatch, mutant):
    path = Path(shutil.copytree(one, tmp_path / "s", ignore=shutil.ignore_patterns("view")))
    monkeypatch.setattr(*mutant)
    ((columns, records),) = compared(path, monkeypatch, shown)
    assert columns != records


def scored(path: Path) -> list[str]:
    """What scoring says, and every score that is there then."""
    study = Study.open(path.parent, path.name)
    counts = score_study(study, ["sharpness", "drift"])
    assert set(counts["scored"]) == {"sharpness", "drift"}
    again = score_study(Study.open(path.parent, path.name), ["sharpness", "drift"])
    return [json.dumps([counts, again["total"]]), *sorted(map(repr, study.scores()))]


def test_scoring_by_columns_makes_the_scores_that_records_make(one, tmp_path, monkeypatch):
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(view, "LEAST_BYTES", least)
        path = tmp_path / str(least) / "s"
        found.append(scored(Path(shutil.copytree(one, path))))
    assert found[0] == found[1]


def test_moments_sort_as_their_texts_do():
    texts = [
        "2026-11-30T10:00:00+00:00",
        "2026-11-30T10:00:00.000+00:00",
        "2026-11-30T10:00:00.000000+00:00",
        "2026-11-30T10:00:00.001+00:00",
        "2026-11-30T10:00:00.001500+00:00",
        "2026-11-30T10:00:01+00:00",
        "1969-01-01T00:00:00+00:00",
    ]
    numbers = {text: moment_number(text) for text in texts}
    assert sorted(texts) == sorted(texts, key=numbers.__getitem__)
    assert len(set(numbers.values())) == len(texts)


@pytest.mark.parametrize(
    "text", ["2026-11-30T10:00:00", "2026-11-30T10:00:00+01:00", "2026-11-30 10:00:00+00:00", "now"]
)
def test_a_moment_of_another_form_has_no_number(text):
    assert moment_number(text) is None


@pytest.mark.parametrize("step", [1, -1, 10**15], ids=["near", "below 0", "far"])
@pytest.mark.parametrize("n", [0, 7, 9000])
def test_equal_values_are_numbered_in_the_order_of_appearance(n, step):
    values = np.array([(7 * i) % 5 * step for i in range(n)], np.int64)
    known: dict[int, int] = {}
    wanted = [known.setdefault(v, len(known)) for v in values.tolist()]
    assert dense(values).tolist() == wanted
    assert dense(values.astype(object)).tolist() == wanted
    code, firsts = grouped(values, values % 2 == 0)
    assert code.tolist() == wanted
    assert values[firsts].tolist() == list(known)
    parts = split(values)
    assert [values[p[0]] for p in parts] == list(known)
    assert sorted(np.concatenate([*parts, np.empty(0)]).tolist()) == list(range(n))


def test_prompts_tags_and_samples_of_columns_are_those_of_records(one, monkeypatch):
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    found = Study.open(one.parent, one.name).records()
    monkeypatch.setattr(view, "LEAST_BYTES", 1 << 60)
    wanted = Study.open(one.parent, one.name).records()
    assert prompts(found) == prompts(wanted)
    assert tags(found) == tags(wanted) == {"colour": {"red", "blue"}}
    some = samples(found)
    assert some[0] == wanted[0]
    assert {r.trial.request.seed for r in some} == {r.trial.request.seed for r in wanted}
    assert {r.trial.prompt.id for r in some} == {r.trial.prompt.id for r in wanted}

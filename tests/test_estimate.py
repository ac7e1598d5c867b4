import re
from pathlib import Path

import pytest

from sd35bench.engine import Engine, local_engine
from sd35bench.estimate import estimate
from sd35bench.study.store import Study
from sd35bench.types import Record, Session, Status, Timings
from sd35bench.workers.limits import Limits
from tests.studies.fakes import fake_load, fake_plan

PER_UNIT_S = 1e-7  # seconds per evaluation and pixel, guidance counted twice


def seconds(steps: int, cfg: float) -> float:
    """An image of 64x48 px by the cost model."""
    return (steps * (2 if cfg > 1 else 1) + 2) * 64 * 48 * PER_UNIT_S


def here(usd_per_image: float, starts: int = 1) -> Engine:
    return local_engine(Limits(starts=starts), usd_per_image)


def write(root: Path, name: str, plan, *, load_s: float = 3.0, count: int | None = None) -> None:
    """Write records of a plan's first trials, as fast as the cost model says."""
    study = Study.open(root, name, create=True)
    shard = study.shard("one")
    shard.append_session(
        Session(
            id="one",
            load=plan.load,
            started_at="",
            environment_id="e",
            environment={},
            load_s=load_s,
            first_call_s=0.5,
            warmup_s=1.0,
            in_force={},
        )
    )
    for number, trial in enumerate(plan.trials[:count]):
        request = trial.request
        shard.append_record(
            Record(
                trial=trial,
                status=Status.OK,
                session_id="one",
                started_at="",
                timings=Timings(generate_s=seconds(request.steps, request.cfg), encode_s=0.0),
                image=study.put_image(f"{number}".encode(), ".png"),
                image_bytes=64 * 48 * 2,
            )
        )
    shard.close()


def test_estimate_knows_nothing_without_records(tmp_path):
    found = estimate([(fake_plan(fake_load(), 5), here(0.0))], tmp_path, "s")
    assert (found.trials, found.done, found.to_do, found.settings, found.loads) == (5, 0, 5, 1, 1)
    assert found.seconds is None
    assert found.disk_bytes >= 5 * 64 * 48 * 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "cfg"), [(4, 5.0), (28, 5.0), (28, 1.0)])
def test_estimate_scales_with_evaluations_from_any_study(tmp_path, steps, cfg):
    write(tmp_path, "earlier", fake_plan(fake_load(), 3, steps=8))
    plan = fake_plan(fake_load(), 10, steps=steps, cfg=cfg)
    found = estimate([(plan, here(0.0))], tmp_path, "s")
    assert found.seconds == pytest.approx(4.0 + 10 * seconds(steps, cfg), rel=1e-6)
    assert found.disk_bytes == pytest.approx(10 * (64 * 48 * 2 + 2000), rel=1e-6)


def test_estimate_does_not_learn_from_another_backend(tmp_path):
    write(tmp_path, "earlier", fake_plan(fake_load(delay_s=1.0), 3))
    assert estimate([(fake_plan(fake_load(), 3), here(0.0))], tmp_path, "s").seconds is None


def test_estimate_counts_only_what_is_missing_in_this_study(tmp_path):
    plan = fake_plan(fake_load(), 10)
    write(tmp_path, "s", plan, count=4)
    write(tmp_path, "other", plan)
    found = estimate([(plan, here(0.04))], tmp_path, "s")
    assert (found.done, found.to_do, found.loads) == (4, 6, 1)
    assert found.usd == pytest.approx(6 * 0.04)
    assert found.seconds == pytest.approx(4.0 + 6 * seconds(4, 5.0), rel=1e-6)


def test_estimate_of_a_finished_study_is_free_and_loads_nothing(tmp_path):
    plan = fake_plan(fake_load(), 3)
    write(tmp_path, "s", plan)
    found = estimate([(plan, here(1.0))], tmp_path, "s")
    assert (found.to_do, found.loads, found.seconds, found.disk_bytes, found.usd) == (0, 0, 0, 0, 0)


def test_estimate_ignores_what_is_no_study(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "study.json").write_text('{"schema": 999}')
    assert estimate([(fake_plan(fake_load(), 1), here(0.0))], tmp_path, "s").to_do == 1


def test_estimate_counts_a_load_for_every_start_that_has_something_to_do(tmp_path):
    plan = fake_plan(fake_load(), 10)
    write(tmp_path, "s", plan, count=6)
    found = estimate([(plan, here(0.0, starts=5))], tmp_path, "s")
    assert found.loads == 2  # blocks 0 to 5 are done: three of five starts
    assert found.seconds == pytest.approx(2 * 4.0 + 4 * seconds(4, 5.0), rel=1e-6)
    assert estimate([(plan, here(0.0, starts=5))], tmp_path, "elsewhere").loads == 5


def test_the_readmes_cost_example_prices_the_grid_above_it():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    grids = re.findall(r"^(sd35bench run .* study=grid)( --dry-run)?$", text, re.MULTILINE)
    assert [flag for _, flag in grids] == ["", " --dry-run"]
    assert grids[0][0] == grids[1][0]

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35bench.errors import ConfigError
from sd35bench.plan import Sweep, expand
from sd35bench.prompts import PromptItem, encode_png
from sd35bench.types import BackendSpec, Load, ModelSpec, PromptRef

ROOT = Path(__file__).parent.parent
LOAD = Load(
    model=ModelSpec(name="m", path="", weights_digest="d", max_sequence_length=16),
    backend=BackendSpec(name="fake", kind="fake"),
    threads=1,
)


def png(level: int) -> bytes:
    return encode_png(np.full((8, 8, 3), level, np.uint8))


def items(count: int, inits: int = 0, negative: str | None = None) -> tuple[PromptItem, ...]:
    """`count` prompts, the first `inits` of them with an init image of their own."""
    return tuple(
        PromptItem(
            ref=PromptRef(id=f"{i}", set="test"),
            prompt=f"prompt {i}",
            negative_prompt=negative,
            init_image=png(i) if i < inits else None,
        )
        for i in range(count)
    )


def sweep(prompts=None, axes=None, **others) -> Sweep:
    return Sweep(
        load=others.pop("load", LOAD),
        prompts=items(3) if prompts is None else prompts,
        axes={"steps": (4,), "cfg": (4.0,), **(axes or {})},
        sizes=others.pop("sizes", ((64, 64),)),
        **others,
    )


@st.composite
def sweeps(draw):
    count = draw(st.integers(1, 5))
    inits = draw(st.integers(0, count))
    axes = {
        "steps": tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))),
        "cfg": tuple(draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.5]), min_size=1, max_size=2))),
        "seed": tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=2))),
        "negative_prompt": tuple(
            draw(st.lists(st.sampled_from(["", "x"]), min_size=1, max_size=2))
        ),
        "output_format": tuple(
            draw(st.lists(st.sampled_from(["png", "jpg"]), min_size=1, max_size=2))
        ),
    }
    if inits:
        axes["prompt_strength"] = tuple(
            draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=2))
        )
    return sweep(
        items(count, inits),
        axes,
        sizes=draw(st.sampled_from([((64, 64),), ((64, 64), (72, 48))])),
        batch_sizes=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))),
        timed_limit=draw(st.integers(0, 3)),
        order_seed=draw(st.integers(0, 3)),
    )


@given(sweeps())
@settings(deadline=None, max_examples=40)
def test_expand_keys_are_unique_and_the_plan_is_the_same_each_time(given_sweep):
    plan = expand(given_sweep)
    keys = [t.key for t in plan.trials]
    assert len(set(keys)) == len(keys)
    assert keys == [t.key for t in expand(given_sweep).trials]


@given(sweeps())
@settings(deadline=None, max_examples=40)
def test_expand_batches_are_homogeneous_and_small_enough(given_sweep):
    for batch in expand(given_sweep).batches:
        shapes = {
            (
                r.steps,
                r.cfg,
                r.prompt_strength,
                r.output_format,
                r.output_quality,
                r.width,
                r.height,
                r.task,
                t.batch_size,
            )
            for t in batch.trials
            for r in [t.request]
        }
        assert len(shapes) == 1
        assert 1 <= len(batch.trials) <= batch.trials[0].batch_size
        assert batch.trials[0].batch_size in (1, *given_sweep.batch_sizes)


@given(sweeps(), st.integers(4, 99))
@settings(deadline=None, max_examples=25)
def test_expand_another_order_seed_permutes_the_same_trials(given_sweep, seed):
    other = replace(given_sweep, order_seed=seed)
    assert Counter(t.key for t in expand(given_sweep).trials) == Counter(
        t.key for t in expand(other).trials
    )


@given(sweeps())
@settings(deadline=None, max_examples=25)
def test_expand_covers_every_prompt_seed_and_step_count(given_sweep):
    requests = [t.request for t in expand(given_sweep).trials]
    wanted = itertools.product(
        [i.prompt for i in given_sweep.prompts],
        given_sweep.axes["seed"],
        given_sweep.axes["steps"],
        given_sweep.sizes,
    )
    found = {(r.prompt, r.seed, r.steps, (r.width, r.height)) for r in requests}
    assert found == set(wanted)


def test_expand_keys_are_stable_across_processes():
    code = (
        "import json; from tests.test_plan import sweep; from sd35bench.plan import expand;"
        "print(json.dumps([t.key for t in expand(sweep(axes={'seed': (0, 1)})).trials]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": "/usr/bin", "PYTHONPATH": str(ROOT)},
    )
    here = [t.key for t in expand(sweep(axes={"seed": (0, 1)})).trials]
    assert json.loads(done.stdout) == here


def test_expand_block_is_one_prompt_and_seed_over_all_settings():
    plan = expand(sweep(items(4), {"steps": (2, 4, 8), "seed": (0, 1)}))
    cells = [(t.request.prompt, t.request.seed) for t in plan.trials]
    blocks = [list(group) for _, group in itertools.groupby(cells)]
    assert len(plan.trials) == 24
    assert [len(block) for block in blocks] == [3] * 8


def test_expand_interleaves_settings_instead_of_running_one_after_the_other():
    plan = expand(sweep(items(20), {"steps": (2, 4, 8, 16)}))
    firsts = Counter(t.request.steps for t in plan.trials[::4])
    assert len(firsts) == 4, "every setting comes first in some block"
    mean_place = {
        s: np.mean([i for i, t in enumerate(plan.trials) if t.request.steps == s])
        for s in (2, 4, 8, 16)
    }
    # A sweep in order would put the means 20 places apart; random blocks put them within about 1.
    assert max(mean_place.values()) - min(mean_place.values()) < 3


def test_expand_batch_companions_follow_from_the_plan():
    prompts, axes = items(10), {"steps": (2, 4), "seed": (0, 1)}
    plan = expand(sweep(prompts, axes, batch_sizes=(4,)))
    assert {len(b.trials) for b in plan.batches} == {4}
    groups = {
        steps: {
            frozenset((t.request.prompt, t.request.seed) for t in b.trials)
            for b in plan.batches
            if b.trials[0].request.steps == steps
        }
        for steps in (2, 4)
    }
    assert groups[2] == groups[4]
    assert len(groups[2]) == 5


def test_expand_last_batch_keeps_the_batch_size_it_was_asked_with():
    plan = expand(sweep(items(5), batch_sizes=(4,)))
    assert sorted(len(b.trials) for b in plan.batches) == [1, 4]
    assert {t.batch_size for t in plan.trials} == {4}


@pytest.mark.parametrize(("limit", "timed"), [(0, 0), (2, 2), (99, 5)])
def test_expand_times_the_first_prompts_at_batch_one(limit, timed):
    plan = expand(
        sweep(items(5), {"steps": (2, 4), "seed": (3, 1)}, batch_sizes=(4,), timed_limit=limit)
    )
    singles = [t for t in plan.trials if t.batch_size == 1]
    assert len(singles) == 2 * timed
    assert {t.request.prompt for t in singles} == {f"prompt {i}" for i in range(timed)}
    assert {t.request.seed for t in singles} <= {3}


def test_expand_makes_every_image_at_every_batch_size():
    plan = expand(sweep(items(8), {"seed": (0, 1)}, batch_sizes=(1, 2, 4), timed_limit=3))
    made = Counter(t.batch_size for t in plan.trials)
    assert made == {1: 16, 2: 16, 4: 16}
    images = {size: {(t.request.prompt, t.request.seed) for t in plan.trials} for size in made}
    assert len(set(map(frozenset, images.values()))) == 1
    assert {len(b.trials) for b in plan.batches if b.trials[0].batch_size == 4} == {4}
    sizes = [b.trials[0].batch_size for b in plan.batches]
    assert sizes != sorted(sizes)  # in random order, not one size after the other
    assert sizes != sorted(sizes, reverse=True)


def test_expand_times_a_batch_size_of_its_own_only_where_it_is_compared():
    assert expand(sweep(items(4), batch_sizes=(4,))).timed_batch_sizes == {1}
    assert expand(sweep(items(4))).timed_batch_sizes == {1}
    assert expand(sweep(items(4), batch_sizes=(2, 4))).timed_batch_sizes == {2, 4}


def test_expand_keeps_a_trials_key_when_other_batch_sizes_join():
    alone = {t.key for t in expand(sweep(items(4), batch_sizes=(2,))).trials}
    joined = expand(sweep(items(4), batch_sizes=(1, 2, 8))).trials
    assert alone == {t.key for t in joined if t.batch_size == 2}


def test_expand_runs_a_repeated_batch_size_once_and_says_so():
    plan = expand(sweep(items(4), batch_sizes=(2, 2)))
    assert len(plan.trials) == 4
    assert any("batch_size" in note for note in plan.notes)


def test_expand_refuses_no_batch_size():
    with pytest.raises(ConfigError, match="batch_size"):
        expand(sweep(items(4), batch_sizes=()))


def test_expand_at_batch_one_times_nothing_twice():
    assert len(expand(sweep(items(3), timed_limit=2)).trials) == 3


@pytest.mark.parametrize(
    ("cfgs", "kept"),
    [((0.0, 0.5, 1.0, 4.0), [1.0, 4.0]), ((0.0, 0.5), [0.5]), ((1.0, 2.0), [1.0, 2.0])],
    ids=["with-1", "below-1", "nothing-to-do"],
)
def test_expand_collapses_cfg_without_guidance_and_says_so(cfgs, kept):
    plan = expand(sweep(items(1), {"cfg": cfgs}))
    assert sorted(t.request.cfg for t in plan.trials) == kept
    assert any("same image" in n for n in plan.notes) == (len(kept) < len(cfgs))


def test_expand_collapses_repeated_values_and_says_so():
    plan = expand(sweep(items(1), {"steps": (4, 8, 4)}))
    assert sorted(t.request.steps for t in plan.trials) == [4, 8]
    assert plan.notes == ("steps: 4 was given more than once; each value runs once",)


def test_expand_collapses_strengths_that_leave_the_same_steps():
    # Of 4 steps, strengths 0.6 and 0.7 both leave 3 and so start from the same noise.
    plan = expand(sweep(items(1, 1), {"prompt_strength": (0.5, 0.6, 0.7), "steps": (4,)}))
    assert sorted(t.request.prompt_strength for t in plan.trials) == [0.5, 0.6]
    assert plan.notes == (
        "prompt_strength 0.7 at 4 steps is the same image as 0.6 (as many steps run): left out",
    )


def test_expand_collapses_quality_of_png_but_not_of_jpg():
    plan = expand(sweep(items(1), {"output_format": ("png", "jpg"), "output_quality": (50, 80)}))
    found = sorted((t.request.output_format, t.request.output_quality) for t in plan.trials)
    assert found == [("jpg", 50), ("jpg", 80), ("png", 90)]
    assert any("no effect on png" in note for note in plan.notes)


def test_expand_runs_a_negative_prompt_axis_once_where_guidance_is_off():
    plan = expand(sweep(items(1), {"cfg": (1.0, 4.0), "negative_prompt": ("a", "b")}))
    assert Counter(t.request.cfg for t in plan.trials) == {1.0: 1, 4.0: 2}
    assert any("negative_prompt has no effect" in note for note in plan.notes)


def test_expand_says_that_a_prompt_files_negatives_do_nothing_without_guidance():
    plan = expand(sweep(items(2, negative="blurry"), {"cfg": (1.0,)}))
    assert len(plan.trials) == 2
    assert plan.notes == ("negative prompts have no effect at cfg 1: guidance is off there",)


def test_expand_item_negative_prompt_wins_over_the_empty_default():
    plan = expand(sweep(items(1, negative="blurry")))
    assert plan.trials[0].request.negative_prompt == "blurry"


def test_expand_refuses_a_strength_axis_without_init_images():
    with pytest.raises(ConfigError, match="prompt_strength acts only on an init image"):
        expand(sweep(items(2), {"prompt_strength": (0.5,)}))


def test_expand_mixed_set_gives_strength_only_to_items_with_init_images():
    plan = expand(
        sweep(items(4, 2), {"prompt_strength": (0.3, 0.9), "steps": (10,)}, batch_sizes=(2,))
    )
    found = Counter(
        (t.request.init_image is not None, t.request.prompt_strength) for t in plan.trials
    )
    assert found == {(True, 0.3): 2, (True, 0.9): 2, (False, None): 2}
    assert all(len({t.request.task for t in b.trials}) == 1 for b in plan.batches)


def test_expand_inits_are_named_by_the_digest_that_the_store_uses():
    import hashlib

    plan = expand(sweep(items(2, 2), {"prompt_strength": (0.5,)}))
    assert set(plan.inits) == {t.request.init_image for t in plan.trials}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in plan.inits.items())


def test_expand_runs_equal_prompts_once_and_says_so():
    twins = tuple(
        PromptItem(ref=PromptRef(id=i, set="test"), prompt="same") for i in ("first", "second")
    )
    plan = expand(sweep(twins))
    assert len(plan.trials) == 1
    assert any("alike" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"seed": ()}, "seed has no value"), ({"stepz": (1,)}, "stepz")],
    ids=["empty", "unknown"],
)
def test_expand_refuses_a_broken_axis(axes, message):
    with pytest.raises(ConfigError, match=message):
        expand(sweep(axes=axes))


def test_expand_refuses_no_prompts():
    with pytest.raises(ConfigError, match="no image"):
        expand(sweep(prompts=()))


def test_expand_another_load_has_other_keys():
    other = Load(model=LOAD.model, backend=LOAD.backend, threads=2)
    ours = {t.key for t in expand(sweep()).trials}
    assert ours.isdisjoint(t.key for t in expand(sweep(load=other)).trials)

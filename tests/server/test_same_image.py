"""What `serve` makes is what `run` makes: the same worker, the same job, the same pixels."""

import numpy as np
import pytest

from sd35bench.config import compose, freeze
from sd35bench.config.serve import compose_serve, freeze_serve
from sd35bench.plan import expand
from sd35bench.study.store import Study, decode_rgb
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import run_plan
from tests.server.live import live

SEED = 11


@pytest.mark.slow
def test_nano_through_serve_is_nano_through_run(tmp_path):
    overrides = ["steps=2", "cfg=5", f"seed={SEED}", "prompts.limit=2", "aspect_ratio=16:9"]
    plan = expand(freeze(compose(["threads=1", *overrides])).sweep)
    study = Study.open(tmp_path, "local", create=True)
    assert run_plan(plan, study, limits=Limits()).failed == 0
    local = {r.trial.request.prompt: study.image_path(r.image) for r in study.records()}
    given = ["no_auth=true", "threads=1", "port=0", f"state_dir={tmp_path / 'serve'}"]
    with live(freeze_serve(compose_serve(given))) as server:
        for prompt, path in local.items():
            made = server.create(
                prompt=prompt,
                steps="2",
                cfg="5",
                seed=str(SEED),
                aspect_ratio="16:9",
                output_format="png",
            )
            found = server.ended(made)
            assert found["status"] == "success", found
            served = server.client.get(found["output"]).content
            assert np.array_equal(decode_rgb(served), decode_rgb(path.read_bytes()))
    assert len(local) == 2

"""Small plans on the fake backend, shared by the tests."""

from sd35bench.fields import make_trial
from sd35bench.plan import Batch, Plan
from sd35bench.types import BackendSpec, Load, ModelSpec, PromptRef, Request, Scalar

MODEL = ModelSpec(name="none", path="", weights_digest="0" * 64, max_sequence_length=24)


def fake_load(**options: Scalar) -> Load:
    backend = BackendSpec(name="fake", kind="fake", options=dict(options))
    return Load(model=MODEL, backend=backend, threads=1)


def fake_plan(load: Load, count: int, batch_size: int = 1, **fields) -> Plan:
    """`count` prompts at one setting, in batches of `batch_size`."""
    defaults = {"steps": 4, "cfg": 5.0, "seed": 0, "width": 64, "height": 48}
    trials = [
        make_trial(
            load=load,
            request=Request(prompt=f"prompt {i}", **{**defaults, **fields}),
            batch_size=batch_size,
            prompt=PromptRef(id=str(i), set="test"),
        )
        for i in range(count)
    ]
    batches = [Batch(trials=tuple(trials[i : i + batch_size])) for i in range(0, count, batch_size)]
    return Plan(load=load, batches=tuple(batches), inits={}, notes=())

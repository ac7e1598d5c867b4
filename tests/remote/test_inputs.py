"""Hosted models with inputs of their own: what is sent, what is refused, what is recorded."""

import hashlib
import json
from typing import Any

import pytest

from sd35bench.errors import ConfigError
from sd35bench.fields import make_trial
from sd35bench.plan import Batch, Plan
from sd35bench.remote.drive import HostedService
from sd35bench.remote.inputs import defaults, payload, refusal, unsent
from sd35bench.study.store import Study
from sd35bench.types import BackendSpec, Load, PromptRef, Request, Status
from tests.remote.contract import make_provider
from tests.remote.fault_server import SIZES, serving
from tests.remote.faults import picture
from tests.remote.hosted import HASTY, MODEL, hosted_settings
from tests.studies.page import OWN, schema_of

RATIOS = {size: ratio for ratio, size in SIZES.items()}
FACES = [picture(name, (64, 64), "png") for name in ("one", "two")]
DIGESTS = [hashlib.sha256(face).hexdigest() for face in FACES]
COUPLE = (("identity_1", DIGESTS[0]), ("identity_2", DIGESTS[1]))
URLS = {"identity_1": "https://x.y/1", "identity_2": "https://x.y/2"}
SAMPLERS = {"pixart-xl-2": "dpmpp_2m", "sana": "dpmpp_2m"}


def asked(model: str, **changes: Any) -> Request:
    plain = {"prompt": "a pier", "steps": 14, "cfg": 4.5, "seed": 7, "width": 64, "height": 64}
    images = COUPLE if model == "omni-zero-couples" else ()
    sampler = SAMPLERS.get(model, "euler")
    return Request(**{**plain, "sampler": sampler, "images": images, **changes})


def sent(model: str, **changes: Any) -> dict[str, Any]:
    request = asked(model, **changes)
    assert refusal(schema_of(model), request, RATIOS) is None
    return payload(schema_of(model), request, RATIOS, URLS if request.images else {})


PAGE = {
    "pixart-xl-2": {
        "prompt": "a pier",
        "negative_prompt": "",
        "width": "64",
        "height": "64",
        "num_inference_steps": "14",
        "guidance_scale": "4.5",
        "scheduler": "DPMSolverMultistep",
        "style": "None",
        "num_outputs": "1",
        "seed": 7,
    },
    "sana": {
        "prompt": "a pier",
        "negative_prompt": "",
        "width": "64",
        "height": "64",
        "num_inference_steps": "14",
        "guidance_scale": "4.5",
        "pag_guidance_scale": "2",
        "seed": 7,
    },
    "ideogram-v2-turbo": {
        "prompt": "a pier",
        "negative_prompt": "",
        "aspect_ratio": "1:1",
        "resolution": "None",
        "style_type": "None",
        "magic_prompt_option": "Off",
        "seed": 7,
    },
    "omni-zero-couples": {
        "prompt": "a pier",
        "negative_prompt": "",
        "identity_image_1": "https://x.y/1",
        "identity_image_strength_1": 1.0,
        "identity_image_2": "https://x.y/2",
        "identity_image_strength_2": 1.0,
        "guidance_scale": 4.5,
        "number_of_steps": 14,
        "number_of_images": 1,
        "mask_guidance_start": 0.0,
        "mask_guidance_end": 1.0,
        "seed": 7,
    },
}


@pytest.mark.parametrize("model", OWN)
def test_the_input_is_the_pages_with_nothing_left_to_the_service(model):
    assert sent(model) == PAGE[model]


def test_an_extra_is_sent_as_asked_and_ideograms_magic_is_off_unless_asked():
    # A mutant: the page's own default, Auto, in the YAML fails the test above.
    changed = sent("ideogram-v2-turbo", extra=(("magic_prompt_option", "Auto"),))
    assert changed == PAGE["ideogram-v2-turbo"] | {"magic_prompt_option": "Auto"}
    changed = sent("sana", extra=(("pag_guidance_scale", 3.5),))
    assert changed == PAGE["sana"] | {"pag_guidance_scale": "3.5"}


def test_a_strength_goes_with_its_image_and_not_without():
    extra = (("style_image_strength", 0.5),)
    assert "style_image_strength" not in sent("omni-zero-couples", extra=extra)
    urls = URLS | {"style": "https://x.y/3"}
    request = asked("omni-zero-couples", extra=extra)
    found = payload(schema_of("omni-zero-couples"), request, RATIOS, urls)
    assert found["style_image_strength"] == 0.5


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("pixart-xl-2", ("shift", "max_sequence_length", "output_format")),
        ("sana", ("sampler", "shift", "max_sequence_length", "output_format")),
        (
            "ideogram-v2-turbo",
            ("steps", "cfg", "sampler", "shift", "max_sequence_length", "output_format"),
        ),
        (
            "omni-zero-couples",
            ("sampler", "shift", "max_sequence_length", "width", "height", "output_format"),
        ),
    ],
)
def test_what_has_no_input_is_said(model, names):
    assert unsent(schema_of(model)) == names


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("sana", {"shift": 2.0}, "shift: the model has no input for it"),
        ("sana", {"init_image": "0" * 64}, "init_image: the model has no input for it"),
        ("sana", {"max_sequence_length": 9}, "max_sequence_length: the model has no input"),
        ("sana", {"extra": (("style_type", "Anime"),)}, "it has extra.pag_guidance_scale"),
        ("sana", {"images": COUPLE}, "images.identity_1: the model has no such input"),
        ("pixart-xl-2", {"sampler": "heun"}, "sampler=heun: must be one of dpmpp_2m"),
        ("ideogram-v2-turbo", {"seed": 2**31}, "seed=2147483648: must be an integer from 0 to"),
        ("ideogram-v2-turbo", {"width": 56}, "aspect_ratio: 56x64 px is none; must be one of 1:1"),
        (
            "ideogram-v2-turbo",
            {"extra": (("style_type", "Anme"),)},
            "extra.style_type: must be one of None, Auto",
        ),
        ("omni-zero-couples", {"images": COUPLE[:1]}, "images.identity_2: is missing"),
        ("omni-zero-couples", {"steps": 51}, "steps=51: must be an integer from 1 to 50"),
        ("omni-zero-couples", {"cfg": 14.5}, "cfg=14.5: must be a number from 0 to 14"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(model, changes, said):
    assert said in str(refusal(schema_of(model), asked(model, **changes), RATIOS))


def test_a_model_without_a_schema_of_its_own_takes_no_extra():
    said = make_provider("eachlabs").refusal(asked("nano", extra=(("style_type", "Anime"),)))
    assert said == "extra: the protocol has none; leave it out"


def plan_of(model: str, url: str, **changes: Any) -> Plan:
    backend = BackendSpec(
        name="eachlabs", kind="eachlabs", options={"base_url": url, "slug": model}
    )
    load = Load(model=MODEL, backend=backend, threads=1)
    request = asked(model, **changes)
    ref = PromptRef(id="0", set="test")
    trial = make_trial(load=load, request=request, batch_size=1, prompt=ref)
    files = dict(zip(DIGESTS, FACES, strict=True)) if request.images else {}
    return Plan(load=load, batches=(Batch(trials=(trial,)),), inits=files, notes=())


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("model", OWN)
def test_every_model_of_the_page_is_made_paid_for_and_recorded(model, tmp_path):
    """Images of roles are uploaded; the file's format is the service's where none can be said."""
    with serving() as server:
        study = Study.open(tmp_path, "study", create=True)
        settings = hosted_settings(
            server.url, slug=model, inputs=schema_of(model), aspect_ratios=RATIOS
        )
        service = HostedService(settings=settings, policy=HASTY)
        plan = plan_of(model, server.url)
        service.prepare(plan, dry=False)
        service.run(plan, study)
        creates = [json.loads(s.body)["input"] for s in server.seen if s.route == "create"]
        uploaded = list(server.uploads.values())
    (record,) = study.records()
    assert record.status is Status.OK, record.error
    assert record.remote is not None
    assert record.remote.unsent == unsent(schema_of(model))
    assert (record.effective_steps is None) == ("steps" in record.remote.unsent)
    assert record.remote.cost_usd == 0.035
    assert study.read_image_file(record.image or "")[8:12] == b"WEBP"
    assert [set(inputs) for inputs in creates] == [set(PAGE[model])]
    assert uploaded == (FACES if model == "omni-zero-couples" else [])
    (session,) = study.sessions().values()
    assert session.in_force["inputs"] == defaults(schema_of(model))


def test_a_run_is_refused_before_money(tmp_path):
    settings = hosted_settings("http://127.0.0.1:1", inputs=schema_of("ideogram-v2-turbo"))
    plan = plan_of("ideogram-v2-turbo", "http://127.0.0.1:1", negative_prompt="x", shift=2.0)
    with pytest.raises(ConfigError, match="shift: the model has no input for it"):
        HostedService(settings=settings, policy=HASTY).prepare(plan, dry=False)

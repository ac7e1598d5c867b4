"""What `serve` takes for the other models of the vendor's page, alone and as a stand-in for all."""

from functools import cache
from typing import Any

import httpx2
import jsonschema
import pytest

from sd35bench.config.files import choices
from sd35bench.config.models import PromptsConf
from sd35bench.config.serve import VENDOR_PAGE, ServeConf, _served_model
from sd35bench.errors import ConfigError
from sd35bench.remote.inputs import payload, takes
from sd35bench.server.schema import body_schema, input_schema, read_create, request_of
from sd35bench.server.settings import Refusal, ServedModel
from tests.remote.faults import picture
from tests.remote.test_inputs import PAGE, RATIOS, URLS, asked
from tests.server.live import live, make_settings
from tests.studies.page import OWN, backend_conf, model_conf, schema_of

pytestmark = pytest.mark.usefixtures("served_here")


@cache
def served(model: str, stand_in_for: str | None = None, backend: str = "fake") -> ServedModel:
    conf = ServeConf(
        model=model_conf(model),
        backend=backend_conf(backend),
        prompts=PromptsConf(kind="nano"),
        stand_in_for=stand_in_for,
    )
    return _served_model(conf)


def read(model: ServedModel, slug: str, **inputs: Any):
    body = {"model": slug, "version": "0.0.1", "input": {"prompt": "a pier", **inputs}}
    return read_create(body, model, draw_seed=lambda: 2**40 + 17)


@pytest.mark.parametrize("slug", OWN)
def test_what_the_client_sends_is_what_the_stand_in_takes(slug):
    """The two sides meet on the wire: texts for numbers, ratios, images, and the seed."""
    model, request = served("nano", "page"), asked(slug)
    sent = payload(schema_of(slug), request, RATIOS, URLS if request.images else {})
    found = read_create({"model": slug, "input": sent}, model)
    assert found.input["seed"] == 7
    assert found.role_images == {
        name: sent[name] for name in ("identity_image_1", "identity_image_2") if name in sent
    }
    made = request_of(found, model, None)
    assert (made.prompt, made.seed, made.width, made.height) == ("a pier", 7, 64, 64)
    assert made.sampler == "euler"  # nano's: it stands in
    schema = schema_of(slug)
    assert made.steps == (14 if takes(schema, "steps") else 28)
    assert made.cfg == (4.5 if takes(schema, "cfg") else 4.0)
    jsonschema.Draft202012Validator(input_schema(model, slug)).validate(sent)


def test_left_out_inputs_have_the_models_defaults_and_a_drawn_seed_is_in_range():
    found = read(served("nano", "page"), "ideogram-v2-turbo", seed=None).input
    assert found == PAGE["ideogram-v2-turbo"] | {
        "image": None,
        "mask": None,
        "seed": (2**40 + 17) % 2**31,
    }
    found = read(served("nano", "page"), "pixart-xl-2").input
    assert (found["num_inference_steps"], found["width"], found["num_outputs"]) == (14, 1024, 1)
    drawn = read(
        served("nano", "page"),
        "omni-zero-couples",
        identity_image_1="https://x.y/1",
        identity_image_2="https://x.y/2",
        seed=-1,
    )
    assert drawn.input["seed"] == 17
    assert drawn.input["identity_image_strength_1"] == 1.0


@pytest.mark.parametrize(
    ("slug", "inputs", "said"),
    [
        ("sana", {"steps": 4}, "unknown field input.steps; known: prompt, negative_prompt"),
        ("sana", {"width": "wide"}, 'input.width="wide": must be an integer'),
        ("sana", {"width": True}, "input.width=true: must be an integer"),
        ("sana", {"guidance_scale": "1e400"}, "must be a number"),
        ("sana", {"prompt": " "}, "input.prompt"),
        ("sana", {"prompt": 5, "seed": -1}, "seed=-1: must be an integer from 0 to 4294967295"),
        ("pixart-xl-2", {"scheduler": "DDIM"}, "must be one of DPMSolverMultistep"),
        ("ideogram-v2-turbo", {"style_type": "Anme"}, "must be one of None, Auto"),
        ("ideogram-v2-turbo", {"negative_prompt": "a\0"}, "without null characters"),
        ("ideogram-v2-turbo", {"mask": "https://x.y/m"}, "it acts only with input.image"),
        ("omni-zero-couples", {}, "input.identity_image_1: must be given; input.identity_image_2"),
        ("omni-zero-couples", {"identity_image_1": ""}, "must be a URL of at most 4096"),
    ],
)
def test_what_is_wrong_is_named(slug, inputs, said):
    with pytest.raises(Refusal) as caught:
        read(served("nano", "page"), slug, **inputs)
    assert caught.value.status == 400
    assert said in str(caught.value)


@pytest.mark.parametrize("stand_in_for", [None, "ideogram-v2-turbo"])
def test_another_models_slug_is_not_found(stand_in_for):
    with pytest.raises(Refusal, match="Model not found") as caught:
        read(served("nano", stand_in_for), "sana")
    assert caught.value.status == 404
    assert "served here: nano" in str(caught.value)


def test_a_served_model_takes_its_own_input_and_what_its_pipeline_does():
    """Sana's pipeline here has no perturbed-attention guidance: 2, the page's, is refused."""
    model = served("sana")
    assert {"sana", "stable-diffusion-3.5-medium"} <= set(model.slugs)
    found = read(model, "sana", width="512", height=1024, num_inference_steps="4")
    assert found.input["pag_guidance_scale"] == 0.0
    made = request_of(found, model, None)
    assert (made.width, made.height, made.steps, made.cfg) == (512, 1024, 4, 5.0)
    assert made.sampler == "dpmpp_2m"
    with pytest.raises(Refusal, match=r"pag_guidance_scale=2: must be 0\.0"):
        read(model, "sana", pag_guidance_scale=2)
    with pytest.raises(Refusal, match=r"input\.width=500: must be a multiple of 32"):
        request_of(read(model, "sana", width=500), model, None)
    pixart = served("pixart-xl-2")
    assert request_of(read(pixart, "pixart-xl-2"), pixart, None).sampler == "dpmpp_2m"
    with pytest.raises(Refusal, match='style="Anime": must be None'):
        read(pixart, "pixart-xl-2", style="Anime")


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({"width": "2048", "height": 1152}, (88, 48)),
        ({"width": 64, "height": 1024}, (48, 112)),
        ({"width": 0, "height": 0}, (64, 64)),
    ],
)
def test_a_stand_in_makes_the_nearest_shape_that_it_has(inputs, size):
    model = served("nano", "page")
    made = request_of(read(model, "sana", **inputs), model, None)
    assert (made.width, made.height) == size
    assert (
        request_of(read(model, "ideogram-v2-turbo", aspect_ratio="16:10"), model, None).width > 64
    )


def test_models_of_the_page_are_known_and_others_are_refused():
    assert set(OWN) < set(VENDOR_PAGE) <= set(choices("model"))
    for wrong in ("sana nowhere", "sd35-large"):
        with pytest.raises(ConfigError, match="must be page, or of"):
            served("nano", wrong)


def test_the_documents_say_what_each_slug_takes():
    model = served("nano", "page")
    body = body_schema(model)
    assert set(VENDOR_PAGE) < set(body["properties"]["model"]["enum"])
    assert len(body["properties"]["input"]["anyOf"]) == 5
    own = input_schema(model, "ideogram-v2-turbo")
    assert own["properties"]["magic_prompt_option"] == {
        "type": "string",
        "enum": ["Off", "Auto", "On"],
        "default": "Off",
    }
    assert own["required"] == ["prompt"]
    assert "anyOf" not in body_schema(served("nano"))["properties"]["input"]


def test_images_of_roles_are_fetched_and_a_bad_one_is_named(tmp_path):
    """Over HTTP: upload, create, poll; what another slug takes is told by its schema."""
    settings = make_settings(tmp_path, model=served("nano", "page"))
    with live(settings, makes_images=False) as server:
        urls = [_upload(server.client, picture(name, (32, 32), "png")) for name in ("one", "two")]
        inputs = {"identity_image_1": urls[0], "identity_image_2": urls[1], "prompt": "a pier"}
        body = {"model": "omni-zero-couples", "input": inputs}
        answer = server.client.post("/v1/prediction/", json=body)
        assert answer.status_code == 200, answer.text
        made = server.client.get(f"/v1/prediction/{answer.json()['predictionID']}").json()
        assert (made["status"], made["model"]) == ("created", "omni-zero-couples")
        assert made["input"]["number_of_steps"] == 10
        inputs["identity_image_2"] = f"{server.url}/v1/files/nowhere.png"
        refused = server.client.post("/v1/prediction/", json=body)
        assert refused.status_code == 400
        assert "input.identity_image_2: " in refused.json()["error"]
        told = server.client.get("/v1/model", params={"slug": "sana"}).json()["request_schema"]
        assert told["properties"]["pag_guidance_scale"]["default"] == "2"
        usual = server.client.get("/v1/model").json()
        assert (usual["slug"], "cfg" in usual["request_schema"]["properties"]) == ("nano", True)


def _upload(client: httpx2.Client, data: bytes) -> str:
    asked = {"content_type": "image/png", "file_type": "image"}
    ticket = client.post("/v1/upload/presign", json=asked).json()
    put = httpx2.put(ticket["presigned_url"], content=data, headers=ticket["required_headers"])
    assert put.status_code < 300, put.text
    return ticket["public_url"]

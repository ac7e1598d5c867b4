"""`extra.NAME` and `images.ROLE`, from the command line to trial keys, settings and titles."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sd35bench.config import compose, freeze
from sd35bench.config.model_inputs import own_axes, settle_axes
from sd35bench.config.models import RUN
from sd35bench.config.overrides import check_overrides, written
from sd35bench.config.place import place_of
from sd35bench.config.sweeper import job_overrides
from sd35bench.config.unread import refuse_unread
from sd35bench.errors import ConfigError
from sd35bench.fields import asked_fields, describe, field_words, make_trial
from sd35bench.plan import expand
from sd35bench.recommend.reproduce import api_body, run_command
from sd35bench.types import Record, RemoteCall, Request, Status, from_json, to_json
from tests.remote.faults import picture
from tests.studies.page import OWN, backend_conf, group_file, model_conf, schema_of

PRICE = "remote.usd_per_image=0.05"


def conf_of(model: str, **given: Any) -> Any:
    prompts = {"name": "starter", "kind": "file"}
    prompts = {
        k: v for k, v in {**group_file("prompts", "starter"), **prompts}.items() if k != "name"
    }
    return RUN(model=model_conf(model), backend=backend_conf("eachlabs"), prompts=prompts, **given)


def axes_of(model: str, **given: Any):
    return own_axes(conf_of(model, **given), schema_of(model))


@pytest.fixture
def faces(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.png").write_bytes(picture(name, (64, 64), "png"))
    return tmp_path


def test_extras_are_an_axis_and_a_default_that_is_asked_for_is_not():
    axes, _, notes = axes_of(
        "ideogram-v2-turbo",
        extra={"magic_prompt_option": "Off"},
        axes={"extra": {"style_type": ["None", "Anime"]}},
    )
    assert axes == {"extra": ((), (("style_type", "Anime"),))}
    assert notes == []


def test_images_are_an_axis_of_digests_with_their_files(faces):
    one, two, three = (str(faces / f"{name}.png") for name in ("one", "two", "three"))
    axes, files, notes = axes_of(
        "omni-zero-couples",
        images={"identity_1": one},
        axes={"images": {"identity_2": [two, three]}},
        extra={"identity_image_strength_1": 0.5},
    )
    digest = {p: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in (one, two, three)}
    assert axes["images"] == (
        (("identity_1", digest[one]), ("identity_2", digest[two])),
        (("identity_1", digest[one]), ("identity_2", digest[three])),
    )
    assert axes["extra"] == ((("identity_image_strength_1", 0.5),),)
    assert set(files) == set(digest.values())
    assert f"images.identity_1: {digest[one][:8]} is one.png" in notes


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("ideogram-v2-turbo", {"extra": {"style_type": "Anme"}}, "did you mean Anime"),
        ("sana", {"extra": {"pag_guidance_scale": "much"}}, "must be a number"),
        ("pixart-xl-2", {"extra": {"num_outputs": 2}}, "must be an integer from 1 to 1"),
        ("omni-zero-couples", {}, "images.identity_1: model=omni-zero-couples needs it"),
        (
            "ideogram-v2-turbo",
            {"images": {"image": "one.png"}},
            "images.image: it acts only with images.mask",
        ),
        ("ideogram-v2-turbo", {"images": {"mask": "nowhere.png"}}, "there is no file nowhere.png"),
    ],
)
def test_what_is_wrong_is_refused_by_name(model, given, said, faces, monkeypatch):
    monkeypatch.chdir(faces)
    with pytest.raises(ConfigError) as caught:
        axes_of(model, **given)
    assert said in str(caught.value)


def test_what_another_model_of_a_sweep_reads_is_a_note_here():
    axes, _, notes = axes_of("sana", extra={"style_type": "Anime"}, images={"style": "x.png"})
    assert axes == {}
    assert [note.partition(" ")[0] for note in notes] == ["images.style", "extra.style_type"]
    conf = conf_of("ideogram-v2-turbo")
    axes = {"steps": (8, 28), "cfg": (4.0,), "output_format": ("png",)}
    assert [
        n.partition(" ")[0] for n in settle_axes(conf, schema_of("ideogram-v2-turbo"), axes)
    ] == [
        "steps",
        "cfg",
    ]
    assert (axes["steps"], axes["cfg"]) == ((1,), (5.0,))


@pytest.mark.parametrize("model", OWN)
def test_prices_are_known_or_asked_for(model):
    conf, schema = conf_of(model), schema_of(model)
    size = ((conf.model.width, conf.model.height),)
    if model == "sana":
        place = place_of(conf, schema, size, (1,), 8)
        assert place.engine.price.usd_per_image == 0.003354
        return
    with pytest.raises(ConfigError, match=r"remote\.usd_per_image: what an image of"):
        place_of(conf, schema, size, (1,), 8)
    priced = conf_of(model, remote={"usd_per_image": 0.05})
    assert place_of(priced, schema, size, (1,), 8).engine.price.usd_per_image == 0.05


def test_the_command_lines_extra_is_in_key_setting_title_and_command():
    base = ("model=ideogram-v2-turbo", "backend=eachlabs", PRICE, "prompts.limit=1")
    given = [*base, 'extra.style_type="Render 3D"']
    check_overrides(given, multirun=False)
    (anime,) = expand(freeze(compose(written(given))).sweep).trials
    request = dataclasses.replace(anime.request, extra=())
    plain = make_trial(load=anime.load, request=request, batch_size=1, prompt=anime.prompt)
    assert anime.key != plain.key
    assert from_json(Request, to_json(anime.request)) == anime.request
    asked = asked_fields(anime.request)
    assert asked["extra"] == {"style_type": "Render 3D"}
    assert describe(asked).endswith("style_type Render 3D")
    assert field_words("images", {"style": "ab" * 32}) == "style abababab"
    called = from_json(RemoteCall, CALL | {"unsent": ["steps", "cfg", "sampler"]})
    record = Record(trial=anime, status=Status.OK, session_id="s", started_at="", remote=called)
    again = run_command([record], "again")
    assert "'extra.style_type=\"Render 3D\"'" in again
    assert not {"steps=1", "cfg=5", "sampler=euler"} & set(again.split())
    assert api_body(record)["body"] is None


CALL = dict.fromkeys([f.name for f in dataclasses.fields(RemoteCall)]) | {
    "provider": "eachlabs",
    "cost_reported": False,
    "unsent": [],
    "resumed": False,
    **dict.fromkeys(("in_flight", "attempts", "polls"), 1),
}


def composed(model: str, backend: str) -> Any:
    found = {"model": model_conf(model).model_dump(), "backend": backend_conf(backend).model_dump()}
    return OmegaConf.create(found)


IDEOGRAM, SANA = composed("ideogram-v2-turbo", "eachlabs"), composed("sana", "eachlabs")


@pytest.mark.parametrize(
    ("word", "confs", "said"),
    [
        ("extra.stile_type=Anime", [SANA, IDEOGRAM], "did you mean extra.style_type"),
        ("extra.style_type=Anime", [SANA], "there are extra.pag_guidance_scale"),
        ("steps=8", [IDEOGRAM], "steps=8: nothing in this run reads it"),
        ("cfg=8", [IDEOGRAM], "cfg=8: nothing in this run reads it"),
        ("output_format=webp", [IDEOGRAM, SANA], "nothing in this run reads it"),
        ("images.identity_1=x.png", [IDEOGRAM], "there are images.image, images.mask"),
        ("extra.style_type=Anime", [composed("sana", "fake")], "there are none"),
    ],
)
def test_what_no_model_of_the_run_takes_is_refused(word, confs, said):
    with pytest.raises(ConfigError) as caught:
        refuse_unread([word], confs)
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["extra.style_type=Anime", "++extra.style_type=Anime"])
def test_what_one_model_of_the_run_takes_is_not(word):
    refuse_unread([word], [SANA, IDEOGRAM])
    refuse_unread(["steps=8"], [SANA, IDEOGRAM])


def test_several_values_need_m_and_a_grid_reaches_the_job():
    with pytest.raises(ConfigError, match="several values need -m"):
        check_overrides(["extra.style_type=Anime,General"], multirun=False)
    base = OmegaConf.create(
        {
            "axes": {"model": ["sana"], "backend": [], "threads": []},
            "optional_backends": [],
            "models_with_images": ["omni-zero-couples"],
        }
    )
    words = written(["backend=eachlabs", "extra.style_type=Anime,General", "images.style=a.png"])
    assert [set(job) for job in job_overrides(words, base)] == [
        {
            *(f"model={model}", "backend=eachlabs"),
            *("++axes.extra.style_type=[Anime,General]", "++images.style=a.png"),
            "++axes.images.style=[]",
        }
        for model in ("sana", "omni-zero-couples")
    ]

"""Judges: an endpoint on this machine, a small CLIP that the test makes, packages by doubles."""

import importlib.util
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from sd35bench.config import freeze
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.cvvdp import find_cvvdp
from sd35bench.metrics.judge_endpoint import KEY_VARIABLE, check_url
from sd35bench.score import score_study
from tests.studies.drawn import make_study
from tests.studies.memory import record

IMAGES = [np.full((8, 8, 3), level, np.uint8) for level in (10, 200)]


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """An endpoint that says yes to "red" with 0.9 in two spellings, else with 0.2."""
    asked: list[dict] = []
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        answers = None

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            keys.append(self.headers["Authorization"])
            asked.append(body)
            red = "red" in body["messages"][0]["content"][1]["text"]
            pairs = [("Yes", 0.6), (" yes", 0.3)] if red else [("yes", 0.2), ("No", 0.8)]
            top = [{"token": t, "logprob": math.log(p)} for t, p in pairs]
            found = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
            status, text = (200, json.dumps(found)) if self.answers is None else self.answers
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield SimpleNamespace(url=url, asked=asked, keys=keys, handler=Handler)
    server.shutdown()
    server.server_close()


def _scored(metric, prompts=("a red ball", "a blue ball")):
    rows = [record(n, prompt=prompt, image=f"{n:064d}") for n, prompt in enumerate(prompts)]
    metric.prepare(rows)
    return metric.score_images(IMAGES, rows, [None] * len(rows))


def _vqa(endpoint, **options):
    return load_metric("judge_vqa", endpoint=endpoint.url, model="org/seer", **options)


def test_vqa_is_the_probability_of_yes_in_every_spelling(endpoint):
    metric = _vqa(endpoint)
    assert metric.name == "judge_vqa_org-seer"
    assert [v.value for v in _scored(metric)] == pytest.approx([0.9, 0.2])
    assert endpoint.keys == ["Bearer sk-secret"] * 2
    sent = endpoint.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert sent.startswith("data:image/png;base64,")


def test_an_answer_is_paid_for_once(endpoint):
    money = {"usd_per_call": 0.5, "max_cost_usd": 1.0}
    first = _scored(_vqa(endpoint, **money))
    again = _scored(_vqa(endpoint, usd_per_call=0.5, max_cost_usd=0.0))
    assert [v.value for v in again] == [v.value for v in first]
    assert len(endpoint.asked) == 2


def test_a_bill_above_the_limit_is_refused_before_the_first_call(endpoint):
    with pytest.raises(MetricError, match=r"max_cost_usd=0.9: 2 calls at 0.5 USD would cost 1.00"):
        _scored(_vqa(endpoint, usd_per_call=0.5, max_cost_usd=0.9))
    assert endpoint.asked == []


def test_tifa_takes_the_mean_over_a_prompts_own_questions(endpoint, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": "a red ball", "questions": [["Is it red?", "yes"], ["Round?", "Yes"]]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = {"endpoint": endpoint.url, "model": "seer", "questions": str(path)}
    found = _scored(load_metric("judge_tifa", **asked))
    assert found[0].value == pytest.approx((0.9 + 0.2) / 2)
    assert found[1].value is None
    assert "no question" in found[1].detail["reason"]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((200, '{"choices": [{}]}'), "top_logprobs"),
        ((500, "sk-secret"), "answered 500"),
        ((302, ""), "answered 302"),
        ((200, "{"), "no usable answer"),
    ],
)
def test_an_endpoint_that_fails_is_named_without_its_words(endpoint, answers, why):
    endpoint.handler.answers = answers
    with pytest.raises(MetricError, match=why) as caught:
        _scored(_vqa(endpoint))
    assert "sk-secret" not in str(caught.value)


def test_a_study_is_scored_through_the_seam(endpoint, tmp_path):
    study = make_study(tmp_path / "results", "one")
    counts = score_study(study, [_vqa(endpoint)])
    assert counts["scored"]["judge_vqa_org-seer"] == len(study.done_keys())
    assert score_study(study, [_vqa(endpoint)])["total"] == 0


def test_pickscore_is_the_scaled_cosine_of_a_local_clip(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from tests.studies.tiny import _clip_tokenizer

    words = _clip_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": len(words), "eos_token_id": words.eos_token_id}
    picture = text | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)
    model = CLIPModel(config).eval()
    folder = tmp_path / "tiny-pick"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    metric = load_metric("judge_pickscore", model=str(folder))
    assert metric.name == "judge_pickscore_tiny-pick"
    found = [v.value for v in _scored(metric)]
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=IMAGES, return_tensors="pt")
    inputs = words(["a red ball", "a blue ball"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model(**inputs, pixel_values=pixels["pixel_values"])
    cosines = (out.image_embeds * out.text_embeds).sum(-1)
    assert found == pytest.approx((model.logit_scale.exp() * cosines).tolist(), abs=1e-4)


def test_package_judges_are_called_as_their_pages_show(monkeypatch, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    reward = SimpleNamespace(score=lambda prompt, images: float(len(prompt) + len(images)))
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda _: reward))

    class Inferencer:
        def __init__(self, *, checkpoint_path, device):
            assert checkpoint_path == str(weights)

        def reward(self, *, prompts, image_paths):
            return [(float(len(p)), 0.0) for p in prompts]

    monkeypatch.setitem(sys.modules, "hpsv3", SimpleNamespace(HPSv3RewardInferencer=Inferencer))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    for kind, expected in (("imagereward", [11.0, 12.0]), ("hpsv3", [10.0, 11.0])):
        metric = load_metric(f"judge_{kind}", model=str(weights))
        assert [v.value for v in _scored(metric)] == expected


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("judge_vqa", {}, "metric.judge.endpoint"),
        ("judge_vqa", {"endpoint": "https://x.org/v1", "model": "m"}, "may cost money"),
        ("judge_tifa", {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}, "questions=FILE"),
        ("judge_pickscore", {"model": "nowhere"}, "no checkpoint at metric.judge.model=nowhere"),
        ("judge_pickscore", {}, "no checkpoint"),
        ("judge_imagereward", {"model": "x"}, "'image-reward' is not installed"),
        ("judge_hpsv3", {"model": "x"}, "'hpsv3' is not installed"),
        ("judge_taste", {}, "known: vqa, tifa, pickscore"),
    ],
)
def test_what_is_missing_is_refused_by_name(name, options, why):
    with pytest.raises((MetricError, ConfigError), match=why):
        load_metric(name, **options)


@pytest.mark.parametrize("url", ["http://x.org/v1", "ftp://x.org", "https://me:pw@x.org/v1", "x"])
def test_addresses_that_would_leak_are_refused(url):
    with pytest.raises(ConfigError, match=r"metric\.judge\.endpoint"):
        check_url(url)


def test_the_bare_family_says_what_to_name():
    with pytest.raises(MetricError, match="judge_vqa, judge_tifa"):
        load_metric("judge").applies(record(0))


def test_cvvdp_is_measured_where_its_package_is(monkeypatch):
    assert find_cvvdp() is None
    seen = {}

    def cvvdp(**options):
        seen.update(options)
        return SimpleNamespace(predict=lambda a, b, dim_order: (9.5, None))

    monkeypatch.setitem(sys.modules, "pycvvdp", SimpleNamespace(cvvdp=cvvdp))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    found = find_cvvdp()
    assert found is not None
    assert found(*IMAGES) == 9.5
    assert seen["display_name"] == "standard_4k"
    assert found.version == "unknown"
    with pytest.raises(MetricError, match="one size"):
        found(IMAGES[0], IMAGES[0][:4])


def test_geneval_says_that_its_detector_drifted():
    prompts = SimpleNamespace(kind="geneval")
    conf = SimpleNamespace(prompts=prompts, model=None, backend=SimpleNamespace(needs_weights=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[freeze.__module__], "model_notes", lambda *_: ())
        notes = sys.modules[freeze.__module__]._notes(
            conf, {"output_format": ("png",), "output_quality": (90,)}
        )
    assert "17.7 points" in notes[0]
    assert "2512.16853" in notes[0]

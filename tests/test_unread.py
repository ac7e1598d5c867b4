"""What nobody reads is refused, before anything is loaded; what somebody reads is not."""

import copy
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf

import sd35bench.config.unread as unread
from sd35bench.config import compose, freeze
from sd35bench.config.model_weights import ON_TOP
from sd35bench.config.models import FIELDS
from sd35bench.config.overrides import written
from sd35bench.errors import ConfigError

LOCAL = "backend.kind=fake"
HOSTED = "backend.kind=eachlabs"
WEIGHTS = "backend.needs_weights=true"
OF_ITS_OWN = "backend.kind=eachlabs model.inputs.prompt.field=prompt"
"""A hosted model that declares its inputs, and has none but the prompt."""
VALUES = {
    "remote.": ("remote.concurrency=2", LOCAL, HOSTED),
    "remote.auth": ("remote.auth=bearer", "backend.kind=replicate", HOSTED),
    "model.path": ("model.path=x", LOCAL, WEIGHTS),
    "model.weights": ("model.weights=random", LOCAL, WEIGHTS),
    "model.layers": ("model.layers=2", LOCAL, WEIGHTS),
    "model.text_encoders": ("model.text_encoders=true", LOCAL, WEIGHTS),
    "model.components": ("model.components=x", LOCAL, WEIGHTS),
    "timed_limit": ("timed_limit=2", LOCAL, "batch_size=4"),
    **{
        f"model.{name}": (f"model.{name}=fp16", "backend.needs_weights=false", WEIGHTS)
        for name in ON_TOP
    },
    "threads": ("threads=1", HOSTED, LOCAL),
    "starts": ("starts=2", HOSTED, LOCAL),
    "workers": ("workers=2", HOSTED, LOCAL),
    "engine": ("engine=ray", HOSTED, LOCAL),
    "ray.": ("ray.address=auto", LOCAL, "engine=ray"),
    "max_failures": ("max_failures=2", HOSTED, LOCAL),
    "deadline_s": ("deadline_s=9", HOSTED, LOCAL),
    "memory_limit_gb": ("memory_limit_gb=9", HOSTED, LOCAL),
    "keep_latents": ("keep_latents=true", HOSTED, LOCAL),
    "contention": ("contention=warn", HOSTED, LOCAL),
    "noise_floor": ("noise_floor=fake", HOSTED, LOCAL),
    "prompts.path": ("prompts.path=mine.txt", "prompts.kind=nano", "prompts.kind=geneval"),
    "prompts.columns.": ("prompts.columns.prompt=x", "prompts.kind=coco", "prompts.kind=file"),
    "prompts.skip_empty": ("prompts.skip_empty=true", LOCAL, "prompts.kind=file"),
    "prompts.first_frame": ("prompts.first_frame=true", LOCAL, "init_image=x.png"),
    "prompts.init_background": ("prompts.init_background=red", LOCAL, "init_image=x.png"),
    "prompts.task": ("prompts.task=edit", "prompts.kind=file", LOCAL),
    "prompts.seed": ("prompts.seed=1", "prompts.kind=file", LOCAL),
    "steps": ("steps=4", OF_ITS_OWN, LOCAL),
    "cfg": ("cfg=4", OF_ITS_OWN, LOCAL),
    "output_format": ("output_format=webp", OF_ITS_OWN, LOCAL),
    "output_quality": ("output_quality=50", LOCAL, "output_format=webp"),
}
"""What is asked, where nothing reads it, and where something does."""


@pytest.fixture(scope="module")
def composed():
    base = OmegaConf.create(OmegaConf.to_container(compose(written(["backend=fake"]))))
    return lambda text: OmegaConf.merge(base, OmegaConf.from_dotlist(text.split()))


def test_every_entry_has_a_case_and_names_a_field():
    assert VALUES.keys() == unread.READS.keys()
    for name in unread.READS:
        assert any(field == name or field.startswith(name) for field in FIELDS)


@pytest.mark.parametrize("name", unread.READS)
def test_a_field_that_nothing_reads_is_refused(name, composed):
    asked, nowhere, somewhere = VALUES[name]
    with pytest.raises(ConfigError, match="nothing in this run reads it"):
        unread.refuse_unread([asked], [composed(nowhere)])
    unread.refuse_unread([asked], [composed(nowhere), composed(somewhere)])
    unread.refuse_unread([], [composed(nowhere)])


def test_mutant_that_asks_only_the_first_job_refuses_what_another_reads(composed):
    asked, nowhere, somewhere = VALUES["threads"]
    with pytest.raises(ConfigError):
        unread.refuse_unread([asked], [composed(nowhere), composed(somewhere)][:1])


# Every field in every kind of run ----------------------------------------------------------------

OTHER: dict[str, Any] = {
    "sampler": "heun",
    "skip_layer_guidance": "stability",
    "width": 32,
    "height": 32,
    "aspect_ratio": "16:9",
    "threads": 1,
    "prompts.split": "heldout",
    "prompts.task": "relation",
    "prompts.limit": 1,
    "max_failures": 2,
    "remote.allow_loopback": False,
    "remote.base_url": "http://127.0.0.1:2",
    "remote.init_image_url": "https://x.y/z.png",
    "remote.output_hosts": "a.example",
    "remote.accept_size": "8x8",
}
"""A value that is not what a run has unasked, where not any other value will do."""
ELSEWHERE = {
    "noise_floor": "the sweeper reads it, not a job",
    "prompts.path": "another file needs to be there",
    "init_image": "a file of its own; `prompt_strength` and the rest follow",
    "prompts.first_frame": "it acts on animations only",
    "prompts.init_background": "it acts on transparent images only",
}
"""Fields whose effect is not in a job of these small runs, and why."""
FEW = "prompts.limit=4"
"""All of nano's prompts took 10 s to freeze sixty times."""
RUNS = {
    "nano on a local backend": ("backend=fake", "prompts=nano", FEW),
    "edits on a local backend": ("backend=fake", "prompts=nano", "prompts.task=edit", FEW),
    "a file on a local backend": ("backend=fake", "prompts=file", "prompts.path=PATH"),
    "webp, in batches": ("backend=fake", "output_format=webp", "batch_size=4", FEW),
    "prompts of the command line": ("backend=fake", "prompt=a cat", "prompt=a dog"),
    "GenEval": ("backend=fake", "prompts=geneval", "prompts.path=GENEVAL"),
    "eachlabs": ("backend=eachlabs", *(loopback := ("remote.base_url=http://127.0.0.1:1",))),
    "replicate": ("backend=replicate", *loopback),
}
LINES = ["prompt,other,id", "a red circle,a,1", ",b,2", "a blue square,c,3"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each kind of run, composed once: Hydra takes most of the time."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [line for line in LINES if not line.startswith(",")]
    (folder / "mine.csv").write_text("\n".join(rows))
    (folder / "geneval.jsonl").write_text('{"prompt": "a dog", "tag": "single_object"}\n' * 2)
    paths = {"PATH": folder / "mine.csv", "GENEVAL": folder / "geneval.jsonl"}

    def base(words: tuple[str, ...]) -> Any:
        for short, path in paths.items():
            words = tuple(w.replace(f"path={short}", f"path={path}") for w in words)
        if "eachlabs" in words[0] or "replicate" in words[0]:
            words = (*words, "remote.allow_loopback=true")
        return compose(written([*words, "study=t"]))

    return {name: base(words) for name, words in RUNS.items()}


def _outcome(config: Any, name: str | None) -> str:
    """All that a job is made of, or why there is none."""
    config = copy.deepcopy(config)
    if name is not None:
        OmegaConf.update(config, name, _another(name))
    try:
        job = freeze(config)
    except ConfigError as exc:
        return f"refused: {exc}"
    return f"{job.study} {job.results_dir} {job.engine} {job.sweep}"


def _another(name: str) -> Any:
    """A value of a field that is not what a run has unasked."""
    if name in OTHER:
        return OTHER[name]
    takes = FIELDS[name].takes
    if get_origin(takes) is Literal:
        return next(choice for choice in get_args(takes) if str(choice) != FIELDS[name].default)
    base = takes
    while get_args(base):  # of a union the first
        base = get_args(base)[0]
    return {bool: True, int: 3, float: 0.75, str: "other"}[base]


# 3.6 s of CPU each: in the default suite those that read unlike fields.
OFTEN = ("edits on a local backend", "webp, in batches", "eachlabs")


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "run", [r if r in OFTEN else pytest.param(r, marks=pytest.mark.slow) for r in RUNS]
)
def test_every_field_acts_or_is_refused(run, bases, monkeypatch):
    """The job differs, or freezing refuses the value, or nothing reads it, and that is refused."""
    config = bases[run]
    plain = _outcome(config, None)
    assert not plain.startswith("refused"), plain
    silent = []
    for name in FIELDS.keys() - ELSEWHERE.keys():
        try:
            unread.refuse_unread([f"{name}={_another(name)}"], [config])
        except ConfigError:
            continue
        if _outcome(config, name) == plain:
            silent.append(name)
    assert sorted(silent) == []


def test_mutant_without_an_entry_takes_a_field_in_silence(bases, monkeypatch):
    monkeypatch.delitem(unread.READS, "prompts.seed")
    config = bases["a file on a local backend"]
    unread.refuse_unread(["prompts.seed=1"], [config])
    assert _outcome(config, "prompts.seed") == _outcome(config, None)

"""Texts of the command line arrive to the letter: no parsing, no interpolation, no splitting."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import sd35bench.config.overrides as overrides
from sd35bench.analysis.commands import quoted as printed
from sd35bench.config import check_overrides, compose, freeze
from sd35bench.config.models import FIELDS
from sd35bench.config.overrides import OTHER_NAMES, parse, quoted, sweep_values, written
from sd35bench.errors import ConfigError
from sd35bench.plan import expand
from sd35bench.prompts import PromptSpec, load_prompts

PARTS = ["a", "b ", '"', "'", "\\", "${", "}", "$", "{", ",", "=", "\n", "1e5", "[", "(", ":", "#"]
TEXTS = st.lists(st.sampled_from([*PARTS, "oc.env:HOME", "é"]), max_size=8).map("".join)


def as_composed(override: str) -> object:
    config = OmegaConf.create({"value": sweep_values(parse(override))[0]})
    return OmegaConf.to_container(config, resolve=True)["value"]  # pyright: ignore


@given(TEXTS)
def test_any_text_comes_back_from_hydra(text):
    assert as_composed(f"value={quoted(text)}") == text


@given(TEXTS)
def test_a_printed_command_is_read_back(text):
    assert overrides._unquoted(printed(text)) == text


MUTANTS = {
    "as it is": lambda text: text,
    "without escapes": lambda text: f'"{text}"',
    "interpolated": lambda text: '"' + text.replace('"', '\\"') + '"',
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_other_quoting_changes_some_text(mutant):
    def kept(text):
        try:
            return as_composed(f"value={MUTANTS[mutant](text)}") == text
        except Exception:
            return False

    assert not all(kept(text) for text in ("1e5", "${oc.env:HOME}", 'say "hi"', "a, b"))


def test_what_is_held_out_is_said_before_anything_runs(tmp_path):
    (tmp_path / "mine.csv").write_text("text\n" + "".join(f"p{i}\n" for i in range(40)))
    path = [f"prompts.path={tmp_path / 'mine.csv'}", "prompts.columns.prompt=text"]
    found = sweep_of(*path)
    (note,) = (n for n in found.notes if n.startswith("prompts:"))
    held = found.prompts[0].ref.held_out
    assert note.startswith(f"prompts: {held} of mine.csv are held out, by a hash of their text")
    assert f"{40 - held} of the others run" in note
    assert found.prompts[0].ref.source == {
        "path": str(tmp_path / "mine.csv"),
        "columns.prompt": "text",
    }
    told = sweep_of(*path, "prompts.split=all")
    assert len(told.prompts) == 40
    assert not any(n.startswith("prompts:") for n in told.notes)
    (tmp_path / "few.txt").write_text("a\nb\n")
    for few in (f"prompts.path={tmp_path / 'few.txt'}", "prompt=a cat"):
        assert any("none is held out" in n for n in sweep_of(few).notes)


@pytest.mark.parametrize("column", ["prompt_2", "prompt_3", "prompt_weights"])
def test_texts_of_single_encoders_are_read_or_refused_by_name(tmp_path, column):
    path = tmp_path / "mine.csv"
    path.write_text(f"prompt,{column}\na red cube,red:1.5\na red cube,\n")
    own = f"prompts.path={path}"
    plan = expand(sweep_of(own))
    assert {getattr(t.request, column) for t in plan.trials} == {"red:1.5", None}
    plain = next(t for t in plan.trials if getattr(t.request, column) is None)
    path.write_text("prompt\na red cube\n")
    assert [plain.key] == [t.key for t in expand(sweep_of(own)).trials]
    path.write_text(f"prompt,{column}\na red cube,red:1.5\n")
    with pytest.raises(ConfigError, match=f"{column}: backend=eachlabs sends one prompt"):
        freeze(compose(written([own, "model=sd35-medium", "backend=eachlabs"])))


def sweep_of(*settings: str):
    check_overrides(settings, multirun=False)
    return freeze(compose(written([*settings, "backend=fake", "study=t"]))).sweep


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("negative_prompt=1e5", "1e5"),
        ("negative_prompt=null", "null"),
        ("negative_prompt=what (ever)", "what (ever)"),
        ("negative_prompt=${oc.env:HOME}", "${oc.env:HOME}"),
        ('negative_prompt="blurry, dark"', "blurry, dark"),
    ],
)
def test_a_negative_prompt_is_text(setting, text):
    assert sweep_of(setting, "prompts.limit=1").axes["negative_prompt"] == (text,)


def test_a_comma_list_of_texts_is_a_sweep():
    (made,) = written(['negative_prompt=1e5, "a, b",say \\"hi'])
    assert sweep_values(parse(made)) == ["1e5", "a, b", 'say \\"hi']


def test_each_prompt_word_is_one_prompt_commas_included():
    prompts = sweep_of("prompt=a cat, a dog", "prompt=${oc.env:HOME}", "prompt=a cat, a dog")
    assert [item.prompt for item in prompts.prompts] == ["a cat, a dog", "${oc.env:HOME}"]


def test_a_path_of_prompts_implies_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    prompts = sweep_of(f"prompts.path={tmp_path}/mine.txt").prompts
    assert [item.prompt for item in prompts] == ["one", "two"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["prompt="], "the prompt is empty"),
        (["prompt=x", "prompts=starter"], "in one way only"),
        (["prompts=given"], "give prompt=TEXT"),
        (["guidance_scale=4"], "did you mean cfg"),
        (["num_inference_steps=4"], "did you mean steps"),
    ],
)
def test_refusals_name_the_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        sweep_of(*settings)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_other_tools_call_a_field_is_answered_with_ours(name):
    assert name not in FIELDS, "the hint would hide a field"
    with pytest.raises(ConfigError, match=f"did you mean {OTHER_NAMES[name]}\\?"):
        check_overrides([f"{name}=1"], multirun=False)


FILES = {
    "csv": "id,prompt\n1,a\n2,\n",
    "csv of commas": "id,prompt\n1,a\n,\n",
    "jsonl": '{"prompt": "a"}\n{"prompt": null}\n',
    "json": '["a", ""]',
}


@pytest.mark.parametrize("kind", FILES)
def test_an_empty_row_is_refused_by_line_or_left_out(kind, tmp_path):
    path = tmp_path / f"mine.{kind.split()[0]}"
    path.write_text(FILES[kind])
    with pytest.raises(ConfigError, match=r"mine\.\w+(:\d|\[1\]).*skip_empty=true"):
        load_prompts(PromptSpec(kind="file", path=str(path)))
    kept = load_prompts(PromptSpec(kind="file", path=str(path), skip_empty=True))
    assert [item.prompt for item in kept] == ["a"]


def test_a_parquet_null_is_an_empty_row_like_any_other(tmp_path):
    path = tmp_path / "mine.parquet"
    parquet.write_table(pa.table({"prompt": ["a", None, ""]}), path)
    with pytest.raises(ConfigError, match=r"mine\.parquet row 2: .*skip_empty=true"):
        load_prompts(PromptSpec(kind="file", path=str(path)))
    kept = load_prompts(PromptSpec(kind="file", path=str(path), skip_empty=True))
    assert [item.prompt for item in kept] == ["a"]


def test_a_number_is_not_text(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"prompt": 123}]))
    with pytest.raises(ConfigError, match="prompt=123 is not text"):
        load_prompts(PromptSpec(kind="file", path=str(path)))

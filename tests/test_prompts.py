import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd35bench import prompts
from sd35bench.errors import ConfigError
from sd35bench.prompts import (
    READERS,
    PromptItem,
    PromptSpec,
    encode_png,
    encoder_fields,
    init_size,
    load_prompts,
    text_split,
    with_init_image,
)
from sd35bench.types import PromptRef

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no prompt sets in {DATA}")


def load(path: Path, **fields) -> tuple[PromptItem, ...]:
    return load_prompts(PromptSpec(kind=fields.pop("kind", "file"), path=str(path), **fields))


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_image(path: Path, size=(16, 8), format="PNG") -> Path:
    Image.new("RGB", size, (10, 200, 30)).save(path, format=format)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a cat\nzwei Hünde\n"),
        ("a.txt", "\ufeffa cat\r\n\r\n  zwei Hünde  \r\n"),
        ("a.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "zwei Hünde"}'),
        ("a.jsonl", '\ufeff{"prompt": "a cat"}\r\n{"prompt": "zwei H\\u00fcnde"}\r\n'),
        ("a.csv", "prompt\na cat\nzwei Hünde\n"),
        ("a.csv", '\ufeffnote,prompt\r\n1,a cat\r\n\r\n2,"zwei Hünde"\r\n'),
        ("a.tsv", "prompt\tnote\na cat\t1\nzwei Hünde\t2\n"),
    ],
    ids=["txt", "txt-bom-crlf", "jsonl", "jsonl-bom-crlf", "csv", "csv-bom-crlf-quoted", "tsv"],
)
def test_load_prompts_reads_every_text_format(tmp_path, name, text):
    items = load(write(tmp_path / name, text))
    assert [i.prompt for i in items] == ["a cat", "zwei Hünde"]
    assert [i.ref.id for i in items] == ["00000", "00001"]
    assert {i.ref.set for i in items} == {name}


def test_load_prompts_reads_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "id": [7, 8]}), tmp_path / "a.parquet")
    assert [(i.prompt, i.ref.id) for i in load(tmp_path / "a.parquet")] == [("a", "7"), ("b", "8")]


def test_load_prompts_reads_all_columns_with_init_images_beside_the_file(tmp_path):
    write_image(tmp_path / "cat.png")
    text = "id,prompt,negative_prompt,init_image\nx,a cat,blurry,cat.png\ny,a dog,,\n"
    first, second = load(write(tmp_path / "a.csv", text))
    assert (first.ref.id, first.negative_prompt) == ("x", "blurry")
    assert first.init_image == (tmp_path / "cat.png").read_bytes()
    assert (second.negative_prompt, second.init_image) == (None, None)


def test_load_prompts_reads_texts_of_single_encoders_and_weights(tmp_path):
    rows = [
        {"prompt": "a red cube", "prompt_2": "b", "prompt_3": "", "prompt_weights": "red:1.5"},
        {"prompt": "a red cube", "prompt_weights": " "},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    first, second = load(path)
    assert (first.prompt_2, first.prompt_3, first.prompt_weights) == ("b", "", "red:1.5")
    assert encoder_fields(second) == {}
    table = "prompt,prompt_2,prompt_3\na red cube,b,\n"  # CSV cannot tell "" from nothing
    (item,) = load(write(tmp_path / "a.csv", table))
    assert encoder_fields(item) == {"prompt_2": "b"}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("blue:1.2", r"a\.jsonl:1: prompt_weights=blue:1.2: 'blue' is not in the prompt"),
        ("ed:1.2", "'ed' is not in the prompt"),
        ("red", "must be WORDS:WEIGHT"),
        ("red:much", "must be WORDS:WEIGHT"),
        ("red:-1", "weights from 0 to 10"),
        ("red:nan", "weights from 0 to 10"),
    ],
)
def test_load_prompts_refuses_weights_that_weigh_nothing(tmp_path, weights, said):
    row = json.dumps({"prompt": "a red cube", "prompt_weights": weights})
    with pytest.raises(ConfigError, match=said):
        load(write(tmp_path / "a.jsonl", row))


def test_load_prompts_columns_can_be_named(tmp_path):
    path = write(tmp_path / "a.csv", "caption,key\na cat,k1\n")
    (item,) = load(path, columns={"prompt": "caption", "id": "key"})
    assert (item.prompt, item.ref.id) == ("a cat", "k1")


def test_load_prompts_a_comma_and_a_newline_survive_csv(tmp_path):
    (item,) = load(write(tmp_path / "a.csv", 'prompt\n"a cat, a dog\nand a cow"\n'))
    assert item.prompt == "a cat, a dog\nand a cow"


def test_load_prompts_bare_quotes_survive_tsv(tmp_path):
    (item,) = load(write(tmp_path / "a.tsv", 'prompt\na sign that says "open\n'))
    assert item.prompt == 'a sign that says "open'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "no prompts"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.csv", "caption\nx\n", r"no column 'prompt'; there: caption"),
        ("a.csv", "prompt,id\na,1\nb,1\n", r"a\.csv:3: id '1' is already at .*a\.csv:2"),
        ("a.csv", "prompt,id\na,1\n  ,2\n", r"a\.csv:3: the prompt is empty"),
        ("a.csv", "prompt,id\na\n", r"a\.csv:2: 1 columns where the header has 2"),
        ("a.csv", 'prompt\n"a\n', r"a\.csv:\d+: unexpected end of data"),
        ("a.jsonl", '{"prompt": "a"}\n\n{oops\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: must be a JSON object"),
        ("a.jsonl", '{"prompt": 5}\n', r"a\.jsonl:1: prompt=5 is not text"),
        ("a.jsonl", '{"prompt": "a", "id": [1]}\n', r"a\.jsonl:1: id=\[1\] is not text"),
        ("a.csv", "prompt,init_image\na,none.png\n", r"a\.csv:2: there is no file"),
        ("a.csv", "prompt,init_image\na,a.csv\n", r"a\.csv:2: .* is not a readable"),
        ("a.doc", "x", "suffix must be one of"),
        ("a.parquet", "x", "not a readable Parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else None,
)
def test_load_prompts_refuses_and_says_where(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": 0}, "prompts.limit=0"),
        ({"split": "test"}, "prompts.split=test: must be one of"),
        ({"task": "video"}, "prompts.task=video"),
        ({"task": "edit"}, "init_image column"),
        ({"kind": "laion"}, "prompts.kind=laion"),
        ({"columns": {"id": "nope"}}, "prompts.columns.id=nope"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_load_prompts_refuses_a_wrong_spec(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "a.csv", "prompt\na\n"), **fields)


def test_load_prompts_refuses_a_missing_path():
    with pytest.raises(ConfigError, match=r"prompts\.path is missing"):
        load_prompts(PromptSpec(kind="file"))


def test_load_prompts_limit_takes_the_first(tmp_path):
    path = write(tmp_path / "a.txt", "a\nb\nc\n")
    assert [i.prompt for i in load(path, limit=2)] == ["a", "b"]


def test_load_prompts_file_splits_share_nothing_and_cover_all(tmp_path):
    prompts = [f"prompt number {i}" for i in range(200)]
    path = write(tmp_path / "a.txt", "\n".join(prompts))
    tune, heldout = load(path, split="tune"), load(path, split="heldout")
    assert {i.ref.split for i in tune} == {"tune"}
    assert sorted(i.prompt for i in (*tune, *heldout)) == sorted(prompts)
    # Fair coins: 200 tosses lie outside 60..140 with probability below 1e-8.
    assert 60 < len(tune) < 140


def test_text_split_of_a_prompt_stays_when_the_file_grows(tmp_path):
    few = load(write(tmp_path / "a.txt", "\n".join(f"p{i}" for i in range(20))), split="tune")
    many = load(write(tmp_path / "b.txt", "\n".join(f"p{i}" for i in range(99))), split="tune")
    assert {i.prompt for i in few} <= {i.prompt for i in many}
    assert {text_split(i.prompt) for i in few} == {"tune"}


@pytest.mark.parametrize(("count", "split"), [(31, "all"), (32, "tune")])
def test_prompts_of_ones_own_are_split_unasked_where_there_are_enough(tmp_path, count, split):
    path = write(tmp_path / "a.txt", "\n".join(f"p{i}" for i in range(count)) + "\nP0\n p1\n")
    items = load(path, split=None)
    assert {i.ref.split for i in items} == {split}
    whole = load(path)
    assert {i.ref.held_out for i in whole} == {None}
    held = len(load(path, split="heldout")) if split == "tune" else 0
    assert len(items) == len(whole) - held == count + 2 - held
    assert {i.ref.held_out for i in items} == {held or None}
    given = PromptSpec(kind="given", texts=tuple(f"p{i}" for i in range(40)), split=None)
    assert len(load_prompts(given)) == 40
    with pytest.raises(ConfigError, match="choose one"):
        load_prompts(PromptSpec(kind="nano", split=None))


def test_spellings_of_a_prompt_are_in_one_half_and_raw_text_would_part_some():
    texts = [f"A red  Cube {i} " for i in range(40)]
    assert all(text_split(t) == text_split(t.strip().lower()) for t in texts)

    def raw(text: str) -> int:  # the mutant
        return hashlib.sha256(text.encode()).digest()[0] % 2

    assert any(raw(t) != raw(t.strip().lower()) for t in texts)


def test_read_nano_splits_are_disjoint_and_seeded():
    tune = load_prompts(PromptSpec(kind="nano", split="tune", limit=40))
    heldout = load_prompts(PromptSpec(kind="nano", split="heldout", limit=40))
    prompts._drawn.cache_clear()
    again = load_prompts(PromptSpec(kind="nano", split="tune", limit=40))
    other = load_prompts(PromptSpec(kind="nano", split="tune", limit=40, seed=1))
    assert tune == again
    assert len(tune) == 40
    assert {i.prompt for i in tune}.isdisjoint(i.prompt for i in heldout)
    assert [i.prompt for i in tune] != [i.prompt for i in other]
    assert all(i.ref.set == "nano" and i.ref.level for i in tune)
    assert all(i.init_image is None for i in tune)


def test_read_nano_a_longer_set_begins_with_the_shorter_one():
    short = load_prompts(PromptSpec(kind="nano", split="tune", limit=5))
    assert load_prompts(PromptSpec(kind="nano", split="tune", limit=9))[:5] == short


def test_read_nano_edits_carry_init_images_and_their_captions():
    items = load_prompts(PromptSpec(kind="nano", split="tune", task="edit", limit=4))
    assert all(i.ref.init_prompt and i.ref.init_prompt != i.prompt for i in items)
    assert {init_size(i.init_image) for i in items if i.init_image} == {(64, 64)}
    prompts._drawn.cache_clear()
    assert items == load_prompts(PromptSpec(kind="nano", split="tune", task="edit", limit=4))


def test_read_nano_draws_once_and_every_caller_has_a_list_of_its_own():
    spec = PromptSpec(kind="nano", split="tune", limit=3)
    first, again = prompts.read_nano(spec), prompts.read_nano(spec)
    assert [a is b for a, b in zip(first, again, strict=True)] == [True] * 3
    first.clear()
    assert len(prompts.read_nano(spec)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"split": "all"}, "choose one"), ({"split": "tune", "limit": 10_000}, "at most")],
    ids=["split", "limit"],
)
def test_read_nano_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        load_prompts(PromptSpec(kind="nano", **fields))


@needs_data
def test_read_geneval_keeps_tags_as_levels():
    items = load(DATA / "geneval_prompts.jsonl", kind="geneval")
    assert len(items) == 553
    assert (items[0].prompt, items[0].ref.level) == ("a photo of a bench", "single_object")
    assert {i.ref.set for i in items} == {"geneval"}


@needs_data
def test_read_coco_reads_mlperfs_captions():
    items = load(DATA / "coco2014_captions.tsv", kind="coco")
    assert len(items) == 5000
    assert items[0].prompt == "A city at night with people walking around."
    assert items[0].ref.id == "70"


@pytest.mark.parametrize(("kind", "name"), [("geneval", "a.jsonl"), ("coco", "a.tsv")])
def test_read_layouts_refuse_another_file(tmp_path, kind, name):
    text = '{"prompt": "a"}\n' if kind == "geneval" else "prompt\na\n"
    with pytest.raises(ConfigError, match=r"a\.(jsonl|tsv):\d: not a"):
        load(write(tmp_path / name, text), kind=kind)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_with_init_image_gives_every_prompt_the_file(tmp_path, format):
    path = write_image(tmp_path / "init", format=format)
    items = load(write(tmp_path / "a.txt", "a\nb\n"))
    changed = with_init_image(items, path)
    assert {i.init_image for i in changed} == {path.read_bytes()}
    assert init_size(path.read_bytes()) == (16, 8)


@pytest.mark.parametrize("kind", ["missing", "truncated", "gif"])
def test_with_init_image_refuses_what_is_no_image(tmp_path, kind):
    path = tmp_path / "init.png"
    if kind == "truncated":
        write(path, write_image(tmp_path / "whole.png", (64, 64)).read_bytes()[:60])
    elif kind == "gif":
        write_image(path, format="GIF")
    with pytest.raises(ConfigError, match="init_image"):
        with_init_image(load(write(tmp_path / "a.txt", "a\n")), path)


def test_with_init_image_refuses_a_set_that_has_its_own(tmp_path):
    path = write_image(tmp_path / "init.png")
    own = PromptItem(ref=PromptRef(id="1", set="s"), prompt="a", init_image=path.read_bytes())
    with pytest.raises(ConfigError, match="of its own"):
        with_init_image((own,), path)


def test_encode_png_is_lossless_and_deterministic():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    data = encode_png(pixels)
    assert data == encode_png(pixels.copy())
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_readers_a_new_kind_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(READERS, "mine", read_mine)
    assert [i.prompt for i in load_prompts(PromptSpec(kind="mine"))] == ["from my own reader"]


def read_mine(spec: PromptSpec) -> list[PromptItem]:
    return [PromptItem(ref=PromptRef(id="1", set=spec.kind), prompt="from my own reader")]

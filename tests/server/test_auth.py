"""Keys: hashed on disk, found again, and nothing of them in a message."""

import hashlib
import stat

import pytest

from sd35bench.errors import ConfigError
from sd35bench.server.auth import KeyRing, make_key


def test_made_key_is_known_and_only_its_hash_is_kept(tmp_path):
    path = tmp_path / "keys" / "keys.txt"
    first, second = make_key("alice", path), make_key("bob", path)
    text = path.read_text()
    assert first not in text
    assert hashlib.sha256(first.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ring = KeyRing(path)
    assert [ring.caller(key).name for key in (first, second)] == ["alice", "bob"]
    assert ring.caller(first).id != ring.caller(second).id


@pytest.mark.parametrize("key", ["", "x", "sd35-", "ключ", "\udcff"])
def test_other_keys_are_nobody(tmp_path, key):
    made = make_key("alice", tmp_path / "keys.txt")
    ring = KeyRing(tmp_path / "keys.txt")
    assert ring.caller(key) is None
    assert ring.caller(made[:-1]) is None
    assert ring.caller(made + " ") is None


def test_file_without_a_last_newline_is_added_to(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(f"# mine\nsha256:{hashlib.sha256(b'old').hexdigest()} old # a comment")
    key = make_key("new", path)
    ring = KeyRing(path)
    assert ring.caller("old").name == "old"
    assert ring.caller(key).name == "new"


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read"), ("", "holds no key"), ("# x\n\nSECRET-KEY alice\n", "line 3")],
)
def test_wrong_file_is_refused_with_the_remedy(tmp_path, text, words):
    path = tmp_path / "keys.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        KeyRing(path)
    assert "make_key=NAME" in str(caught.value)
    assert "SECRET-KEY" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "two words", "x" * 101, "a\nb", "#x"])
def test_wrong_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="make_key="):
        make_key(name, tmp_path / "keys.txt")

"""The key file, and how often a client may ask."""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gentron.errors import OutputError, RequestError
from gentron.runtime.keys import Key, Keys, hash_of, new_key
from gentron.runtime.rates import Rates


def test_a_file_holds_names_and_hashes_and_no_key(tmp_path):
    file, secret = tmp_path / "keys", new_key()
    Keys({"ann": Key("ann", hash_of(secret), 30), "bob": Key("bob", hash_of(new_key()))}).write(
        file
    )
    text = file.read_text()
    assert secret not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert file.stat().st_mode & 0o777 == 0o600
    found = Keys.read(file)
    assert found.find(secret) == Key("ann", hash_of(secret), 30)
    assert list(found.by_name) == ["ann", "bob"]


def test_no_other_text_is_a_key(tmp_path):
    secret = new_key()
    keys = Keys({"ann": Key("ann", hash_of(secret))})
    for other in (
        "",
        secret[:-1],
        secret + "x",
        secret.upper(),
        new_key(),
        hash_of(secret),
        "\udcff",
    ):
        assert keys.find(other) is None


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch):
    import hmac

    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(
        "gentron.runtime.keys.hmac.compare_digest",
        lambda a, b: compared.append(a) or compare(a, b),
    )
    secrets = [new_key() for _ in range(3)]
    keys = Keys({str(n): Key(str(n), hash_of(s)) for n, s in enumerate(secrets)})
    assert keys.find(secrets[0]).name == "0"
    assert compared == [hash_of(s) for s in secrets]


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o660, 0o601, 0o666])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path, mode):
    file = tmp_path / "keys"
    Keys({"ann": Key("ann", hash_of("x"))}).write(file)
    file.chmod(mode)
    with pytest.raises(RequestError, match=r"others may read or change it .*chmod 600"):
        Keys.read(file)
    file.chmod(0o640)
    assert Keys.read(file).by_name


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="gives a file away")
def test_a_file_of_another_user_is_refused(tmp_path):
    file = tmp_path / "keys"
    Keys({}).write(file)
    os.chown(file, 12345, -1)
    with pytest.raises(RequestError, match="belongs to another user"):
        Keys.read(file)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ann", "line 2: must be NAME sha256:HASH"),
        ("ann sha256:1234", "line 2: must be"),
        ("../ann sha256:" + "0" * 64, "line 2: must be"),
        ("ann sha256:" + "0" * 64 + " per-minute=-1", "line 2: must be"),
        ("ann sha256:" + "0" * 64 + "\nann sha256:" + "1" * 64, "line 3: ann is there twice"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, why):
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{line}\n")
    file.chmod(0o600)
    with pytest.raises(RequestError, match=why):
        Keys.read(file)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        Keys({}).write(tmp_path / "nowhere" / "keys")
    with pytest.raises(RequestError, match="cannot be read"):
        Keys.read(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(RequestError, match="cannot be read"):
        Keys.read(tmp_path / "binary")


@given(
    st.integers(1, 600),
    st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=200),
)
@example(1, [0.0, 0.0])
def test_no_client_gets_more_than_its_rate_and_a_first_burst(per_minute, pauses):
    now = [0.0]
    rates = Rates(lambda: now[0])
    given_out = 0
    for index, pause in enumerate(pauses):
        now[0] += pause
        wait = rates.take("ann", per_minute)
        given_out += wait == 0
        assert rates.take(f"other {index}", per_minute) == 0
        if wait:
            now[0] += wait + 1e-6
            assert rates.take("ann", per_minute) == 0
            given_out += 1
    assert given_out <= max(1.0, per_minute / 4) + now[0] * per_minute / 60 + 1e-3

"""YAML 1.2, each key once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainables.cli.command import read_yaml
from trainables.cli.yaml_core import dump, load
from trainables.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),  # text in YAML 1.1, which wants 1.0e-1
        ("1E5", 1e5),
        ("-.5e+1", -5.0),
        ("010", 10),  # 8 in YAML 1.1
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("no", "no"),  # false in YAML 1.1
        ("2026-11-26", "2026-11-26"),  # a date in YAML 1.1
        ("true", True),
        ("~", None),
        ("", None),
        ("-.inf", float("-inf")),
        ("'1e-1'", "1e-1"),
        ("2/255", "2/255"),
    ],
)
def test_words_are_read_as_the_core_schema_says(text: str, value: object) -> None:
    found = load(text.encode())
    assert found == value
    assert type(found) is type(value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
looks_like_something_else = st.sampled_from(
    ["1e5", "010", "0o7", "no", "~", "1:30", "true", ".inf", "2026-11-26", "<<"]
)


@given(values | looks_like_something_else)
def test_what_is_written_is_read_back(value: object) -> None:
    assert load(dump(value).encode()) == value


def test_keys_that_stand_twice_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("seed: 1\nbudget:\n  trials: 3\n  trials: 4\npoints:\n- {words: 1, words: 2}\nseed: 2\n")
    with pytest.raises(InputError) as error:
        read_yaml(path)
    told = str(error.value)
    assert str(path) in told
    assert "budget.trials stands 2 times, in lines 3, 4;" in told
    assert "points.0.words stands 2 times, in line 6;" in told
    assert "\n  seed stands 2 times, in lines 1, 7;" in told


def test_aliases_are_no_repetition_and_a_circle_ends() -> None:
    assert load(b"a: &x {low: 1}\nb: *x\nc: {<<: *x, low: 2}") == {"a": {"low": 1}, "b": {"low": 1}, "c": {"low": 2}}
    circle = load(b"&a [1, *a]")
    assert circle[1] is circle


def test_only_plain_data_is_read() -> None:
    with pytest.raises(yaml.YAMLError):
        load(b"!!python/object/apply:os.system ['true']")

"""Variables and flags: what sets nothing is told, lists take commas."""

from __future__ import annotations

import pytest

from study.arguments import parse
from trainables.errors import InputError
from trainables.evaluate import parse as parse_evaluation


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PARETOVL_BUDGET_TRIALS", "PARETOVL_BUDGET__TRIALS"),
        ("PARETOVL_BUGDET__TRIALS", "PARETOVL_BUDGET__TRIALS"),
        ("PARETOVL_TRIAL_TRAINING_EPOCHS", "PARETOVL_TRIAL__TRAINING__EPOCHS"),
        ("paretovl_data_root", "PARETOVL_DATA__ROOT"),
        ("PARETOVL_STUDIES__DIR", "PARETOVL_STUDIES_DIR"),
    ],
)
def test_a_variable_that_nearly_names_a_field_is_refused(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(InputError, match=f"{name}: sets no field; did you mean {meant}"):
        parse([])


def test_all_such_variables_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOVL_BUDGET_TRIALS", "3")
    monkeypatch.setenv("PARETOVL_REPLICATE", "3")
    with pytest.raises(InputError, match=r"(?s)BUDGET__TRIALS.*PARETOVL_REPLICATES"):
        parse([])


def test_a_variable_of_another_command_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARETOVL_FOLD_IMAGES", "1000")  # of trainables.evaluate
    monkeypatch.setenv("PARETOVL_TEST_DATA", "/data")  # of the tests
    monkeypatch.setenv("PARETOVL_BUDGET__TRIALS", "5")
    assert parse([]).budget.trials == 5
    told = capsys.readouterr().err
    assert told == "note: the variable PARETOVL_FOLD_IMAGES sets no field of this command and is left out\n"


def test_a_part_of_another_commands_field_is_no_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARETOVL_PROTOCOL__WORDS", "2")  # there protocol is a name
    parse_evaluation(["--model", "some/model"])
    assert "PARETOVL_PROTOCOL__WORDS" in capsys.readouterr().err


def test_variables_within_parts_and_dictionaries_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOVL_PRICE__DEVICE_HOUR__L4", "0.5")
    monkeypatch.setenv("PARETOVL_DATA", '{"image_pixels": 32}')
    config = parse([])
    assert (config.price.device_hour, config.data.image_pixels) == ({"l4": 0.5}, 32)
    monkeypatch.setenv("PARETOVL_BUDGET__TRIAL", "3")
    with pytest.raises(InputError, match=r"budget.trial: no such field; did you mean budget.trials\?"):
        parse([])


@pytest.mark.parametrize("text", ["mat,fare", "mat, fare", "mat fare", '["mat", "fare"]'])
def test_a_list_in_a_variable_or_a_file_may_be_a_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOVL_RECIPES", text)
    assert parse([]).recipes == ("mat", "fare")


def test_a_list_flag_with_blanks_says_commas() -> None:
    with pytest.raises(InputError, match=r"written with commas .*--recipes mat,fare"):
        parse(["--recipes", "mat", "fare"])
    assert parse(["--recipes", "mat,fare", "--protocol.recall-at", "1,5"]).protocol.recall_at == (1, 5)


@pytest.mark.parametrize("text", ["1,5", "1, 5", "1 5", " 1  5 ", "[1, 5]"])
@pytest.mark.parametrize("sign", [" ", "="])
def test_a_list_in_one_argument_is_split_as_in_a_variable(text: str, sign: str) -> None:
    flags = ["--protocol.recall-at", text] if sign == " " else [f"--protocol.recall-at={text}"]
    assert parse(flags).protocol.recall_at == (1, 5)
    words = text.replace("1", "mat").replace("5", "fare").replace("[mat, fare]", '["mat", "fare"]')
    both = parse(["--recipes", words, "--rerun", words, "--data.captions", "my 1.json"])
    assert (both.recipes, both.rerun, both.data.captions) == (("mat", "fare"), ("mat", "fare"), "my 1.json")


@pytest.mark.parametrize("source", ["flag", "variable"])
def test_what_should_be_json_says_so(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--points", "{epsilon: 2/255}"] if source == "flag" else []
    if source == "variable":
        monkeypatch.setenv("PARETOVL_POINTS", "{epsilon: 2/255}")
    with pytest.raises(InputError, match="points: ") as error:
        parse(flags)
    assert "Settings" not in str(error.value)

from __future__ import annotations

from search_spaces.notation import SYMBOLS, in_words, ordered, telling, written
from search_spaces.recipes import RECIPES, recipe_point
from trainables.config import Point


def test_every_knob_has_symbols_of_its_own() -> None:
    assert set(SYMBOLS) == set(Point.model_fields)
    for form in ("plain", "letter"):
        assert len({getattr(symbol, form) for symbol in SYMBOLS.values()}) == len(SYMBOLS)
    assert all(symbol.plain.isascii() and len(symbol.plain) <= 9 for symbol in SYMBOLS.values())


def test_values_have_three_digits_and_radii_are_parts_of_255() -> None:
    assert written("epsilon", 0.00784313725490196) == "2"
    assert written("epsilon_start", 0.0123456) == "3.15"
    assert written("contrastive_weight", 0.005678043898036521) == "0.00568"
    assert written("contrastive_weight", 1.0) == "1"
    assert (written("temperature_learned", True), written("temperature_learned", False)) == ("yes", "no")
    assert (written("words", 2), written("trainable", "image")) == ("2", "image")


def test_a_searched_trial_is_told_by_what_was_searched() -> None:
    params = {"words": 0, "temperature": 0.05, "contrastive_weight": 0.25}
    point = Point.model_validate(params).model_dump(mode="json")
    assert in_words(telling(params, point)) == "w=0.25 tau=0.05 words=0"


def test_recipes_are_told_by_what_differs() -> None:
    told = {name: in_words(telling({}, recipe_point(name, 2 / 255, 0.06).model_dump(mode="json"))) for name in RECIPES}
    assert told["finetune"] == "tau=0.06"
    assert told["mat"] == "tau=0.06 eps=2/255 steps=2 words=1"
    assert told["fare"] == "w=0 tau=0.06 eps=2/255 steps=10 companion=anchor trains=image attack=deviation"
    assert len(set(told.values())) == len(RECIPES)


def test_unknown_knobs_stay_and_come_last() -> None:
    assert ordered(["later", "words", "epsilon", "words"]) == ["epsilon", "words", "later"]
    assert in_words(telling({"later": 1}, {"words": 1})) == "words=1 later=1"

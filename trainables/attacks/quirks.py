"""Where the published code departs from what its papers say, each departure by a name of its own.

Published numbers carry these departures, so an attack can be run with all of its own (`quirks: compat` in a config),
with some (`quirks: [cls_offset, no_refill]`), or with none, which is the default.

| quirk | what it does | in |
|---|---|---|
| `cls_offset` | a word's substitutes are the predictions one token early; at `[CLS]` for the first word | text |
| `no_end_token` | the masked language model reads captions without a token that ends them | text |
| `no_refill` | what is dropped from the best predictions is not made up for, so words have fewer substitutes | text |
| `symbols` | numbers, and marks that are no stop words, count as words that may be put in | text |
| `logit_cut` | a word's substitutes end at the first raw logit below 0.3 | text |
| `subword_product` | words of several pieces are replaced by combinations of their pieces' predictions | text |
| `unk_importance` | a word's importance is Co-Attack's KL when the literal `[UNK]` stands for it | text |
| `first_30_words` | the attack sees no more than 30 words of a caption; the rest is put back afterwards | text |
| `one_sided_start` | the image attack starts at U(0, epsilon) above the image, not on both sides of it | Co-Attack |
| `last_caption` | images are attacked once a pair and the last is kept, so only the last caption counts | Co-Attack |
| `supervision_30_tokens` | the image attack reads captions cut to 30 tokens, whatever the model's length | SGA, DRA |
| `free_look_ahead` | the points at which mixtures are compared may leave [0, 1] | DRA |

As published by default, since it departs from no paper: the stop words and marks, Co-Attack's KL(clean || attacked),
SGA's copies clamped once, DRA's mixtures and its look-ahead from the current image. The published cleaning of captions,
which drops apostrophes, is `caption_text: attack-literature` of the model.

Under all quirks, this is left: of `subword_product` only combinations that are one word are kept, as two words for one
would break the threat model; special tokens are never put; DRA chooses mixtures for each image, not for each batch; the
masked language model reads whole captions, which ALBEF's code cuts at 30 tokens (26 of COCO's 25,010 test captions are
longer); CMI-Attack has no table of word vectors. Images are scored at 8 bits and as they are (`eight_bit` of a
protocol); the published code scores a white-box model's as they are, and others' at 8 bits.
"""

from __future__ import annotations

from typing import Literal

Quirk = Literal[
    "cls_offset",
    "no_end_token",
    "no_refill",
    "symbols",
    "logit_cut",
    "subword_product",
    "unk_importance",
    "first_30_words",
    "one_sided_start",
    "last_caption",
    "supervision_30_tokens",
    "free_look_ahead",
]

Quirks = frozenset[Quirk]

FIRST_WORDS = 30
"""Seen under `first_30_words`."""

SUBSTITUTE_QUIRKS: Quirks = frozenset(
    {"cls_offset", "no_end_token", "no_refill", "symbols", "logit_cut", "subword_product", "first_30_words"}
)
"""Those that change what may replace a word, so that a table of its own is made for them."""

TEXT_QUIRKS: Quirks = SUBSTITUTE_QUIRKS | {"unk_importance"}
"""Those of BERT-Attack in the code of Co-Attack, SGA and what follows them."""

"""The joint space of the question: contrastive weight x temperature x strength of the training attack."""

from __future__ import annotations

from search_spaces.space import Knob

JOINT: dict[str, Knob] = {
    "contrastive_weight": Knob(kind="float", low=0, high=1),
    # CLIP trains at 0.01, ALBEF and BLIP start at 0.07; softmax temperatures above 0.2 flatten every ranking.
    "temperature": Knob(kind="float", low=0.01, high=0.2, log=True),
    "temperature_learned": Knob(kind="choice", choices=(False, True)),
    # Published defences train at 1/255 to 4/255; 8/255 is the far end of the literature.
    "epsilon": Knob(kind="float", low=0, high="8/255"),
    # MAT and TeCoA use 2 steps, FARE 10.
    "attack_steps": Knob(kind="choice", choices=(1, 2, 3, 5, 10), above_zero="epsilon"),
    # The literature changes one word; nobody varies it in training.
    "words": Knob(kind="choice", choices=(0, 1, 2)),
}
"""For dual encoders, where the companion of the contrastive loss is the anchor."""

FUSION: dict[str, Knob] = {
    **JOINT,
    # The companion is image-text matching. ALBEF and BLIP keep their temperature in [0.001, 0.5], and start at 0.07.
    "temperature": Knob(kind="float", low=0.02, high=0.3, log=True),
    # What of a fusion transformer is worth training under attack is an open question. At weight 1 nothing is fused.
    "trainable": Knob(kind="choice", choices=("all", "image", "fusion"), below_one="contrastive_weight"),
}
"""For fusion transformers."""

SPACES = {"joint": JOINT, "fusion": FUSION}

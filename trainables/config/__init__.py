"""The whole contract between `study` and `trainables`: a `TrialConfig` goes in, a `TrialResult` comes out.

Everything here is plain data (pydantic) and imports no tensor library.
"""

from trainables.config.fields import Model, content_hash, raise_all
from trainables.config.point import Companion, Point, parts_in_loss
from trainables.config.protocol import (
    BATCH_IMAGES,
    CLEAN,
    DIRECTIONS,
    FLOAT,
    MATCHING,
    SEARCHED_ATTACKS,
    AttackConfig,
    Protocol,
)
from trainables.config.trial import (
    TEST,
    VAL,
    CaptionForm,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    ShapesConfig,
    SplitName,
    TinyConfig,
    TrainingConfig,
    TrialConfig,
    WorkersConfig,
    not_of_the_family,
)

__all__ = [
    "BATCH_IMAGES",
    "CLEAN",
    "DIRECTIONS",
    "FLOAT",
    "MATCHING",
    "SEARCHED_ATTACKS",
    "TEST",
    "VAL",
    "AttackConfig",
    "CaptionForm",
    "Companion",
    "DataConfig",
    "Model",
    "ModelConfig",
    "Point",
    "PretrainConfig",
    "Protocol",
    "ShapesConfig",
    "SplitName",
    "TinyConfig",
    "TrainingConfig",
    "TrialConfig",
    "WorkersConfig",
    "content_hash",
    "not_of_the_family",
    "parts_in_loss",
    "raise_all",
]

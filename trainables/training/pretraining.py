"""Small models made from the data itself: tokenizer, masked language model, base model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trainables.attacks.noise import sample_keys
from trainables.captions import bare_text, core
from trainables.config import PretrainConfig, TrialConfig
from trainables.data import Split
from trainables.models import FusionModel, RetrievalModel, tokenize
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.models.dual import Dual
from trainables.training.losses import contrastive_loss, matching_loss, shared, similarities
from trainables.training.positives import Positives

Log = Callable[[str], None]

VOCABULARY = 8000
MASKED_LM = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
MASKED_LM_LENGTH = 64


SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]", "bos": "[BOS]", "eos": "[EOS]"}


ENDINGS = ("##s", "##es", "##d", "##ed", "##ing", "##er", "##ers", "##ly", "##y")
"""Pieces that make further words of known ones."""


def train_tokenizer(captions: Sequence[str], entries: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """Lower-case WordPiece of whole words, the most frequent ones, and `ENDINGS`; any other word is unknown.

    Accents and other marks stay: without its vowel signs a Hindi or Thai word is another one.

    Equal captions give equal vocabularies, in any process; trainers that merge pairs break ties as they hash.
    """
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for caption in captions
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = [*SPECIAL.values(), *ENDINGS, *words][:entries]
    tokenizer.model = WordPiece({entry: place for place, entry in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in SPECIAL.items()}
    )


def make_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Write a tokenizer trained on the captions' texts, see `captions`."""
    train_tokenizer(texts).save_pretrained(folder)


def make_masked_lm(
    folder: Path, texts: Sequence[str], tokenizer_folder: Path, config: PretrainConfig, log: Log
) -> None:
    """Write a small BERT trained on the captions' words (Devlin et al. 2019: 15 %, 80/10/10), and its tokenizer."""
    texts = [" ".join(word[core(word)] for word in text.split()) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(config.seed)
    masked_lm = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MASKED_LM_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            **MASKED_LM,
        )
    )
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MASKED_LM_LENGTH, return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    steps = config.mlm_epochs * math.ceil(len(tokens) / 64)
    optimiser, schedule = _optimiser(masked_lm.parameters(), 2e-3, steps)
    log(f"masked language model: {len(texts)} captions, vocabulary {len(tokenizer)}, {steps} steps")
    for _ in range(config.mlm_epochs):
        for rows in torch.randperm(len(tokens)).split(64):
            longest = int(mask[rows].sum(1).max())
            truth = tokens[rows, :longest]
            chosen = (torch.rand(truth.shape) < 0.15) & ~torch.isin(truth, special)
            draw = torch.rand(truth.shape)
            given = truth.masked_fill(chosen & (draw < 0.8), tokenizer.mask_token_id)
            anything = torch.randint(len(special), len(tokenizer), truth.shape)
            given = torch.where(chosen & (draw >= 0.9), anything, given)
            hidden = masked_lm.bert(given, attention_mask=mask[rows, :longest]).last_hidden_state[chosen]
            loss = F.cross_entropy(masked_lm.cls(hidden), truth[chosen])
            _step(loss, masked_lm, optimiser, schedule)
    masked_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TINY = {"clip": Clip.tiny, "albef": Albef.tiny, "blip": Blip.tiny}
"""Families that can be made from nothing."""


def make_base(folder: Path, pairs: Split, config: TrialConfig, tokenizer_folder: Path, log: Log) -> None:
    """Write a model trained on clean pairs: a tiny one from scratch, or a dual encoder on its frozen image tower.

    Args:
        folder: for the model.
        pairs: their captions are texts, see `captions`.
        config: of the trial.
        tokenizer_folder: trained on these texts.
        log: for progress.
    """
    model_config, pretrain = config.model, config.model.pretrain
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(pretrain.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model_config.image_tower is None:
        model: RetrievalModel = TINY[model_config.family or "clip"](
            model_config.tiny, config.data.image_pixels, model_config.max_tokens, tokenizer
        )
        trained: nn.Module = model
        encode: Callable[[np.ndarray], Tensor] = partial(_pixels, pairs, device=device)
    else:
        dual = Dual.from_towers(model_config.image_tower, model_config.text_tower, tokenizer)
        model, trained = dual, nn.ModuleList([dual.image_head, dual.text_tower, dual.text_head])
        pooled = _pooled_features(dual.to(device), pairs, device, log)
        encode = pooled.__getitem__
    _train_pairs(model, trained, encode, pairs, config, device, log)
    model.save(folder)


def _train_pairs(
    model: RetrievalModel,
    trained: nn.Module,
    read_images: Callable[[np.ndarray], Tensor],
    pairs: Split,
    config: TrialConfig,
    device: torch.device,
    log: Log,
) -> None:
    """Contrastive, and with as much weight image-text matching where there is fusion (Li et al. 2021, section 3.2).

    Args:
        read_images: rows of images to what the trained part of the image side takes: pixels, or the tower's features.
        (others): see `make_base`.
    """
    pretrain = config.model.pretrain
    trained.to(device).train()
    groups = np.unique([bare_text(text) for text in pairs.captions], return_inverse=True)[1]
    described = Positives(pairs.caption_image, groups, device)
    tokens, mask = tokenize(model, pairs.captions, config.model.max_tokens)
    captions_of = np.split(np.arange(len(pairs.captions)), np.flatnonzero(np.diff(pairs.caption_image)) + 1)
    log_temperature = nn.Parameter(torch.tensor(math.log(pretrain.temperature), device=device))
    images = len(pairs.image_ids)
    size = min(pretrain.batch_size, images)
    steps = pretrain.epochs * (images // size)
    optimiser, schedule = _optimiser([*trained.parameters(), log_temperature], pretrain.learning_rate, steps)
    rng = np.random.default_rng(pretrain.seed)
    log(f"base model: {images} images, {steps} steps of {size} pairs")
    for epoch in range(pretrain.epochs):
        losses = []
        order = rng.permutation(images)[: images // size * size]
        for rows in order.reshape(-1, size):
            captions = np.array([rng.choice(captions_of[row]) for row in rows])
            longest = int(mask[captions].sum(1).max())
            batch = tokens[captions, :longest].to(device), mask[captions, :longest].to(device)
            matches = described(torch.from_numpy(rows).to(device), torch.from_numpy(captions).to(device))
            positives = matches, matches.T
            given, temperature = read_images(rows), log_temperature.exp()
            if isinstance(model, FusionModel):
                image_tokens = model.image_tokens(given)
                scores = similarities(shared(model.image_features(image_tokens)), shared(model.encode_text(*batch)))
                keys = sample_keys(pretrain.seed, epoch, torch.from_numpy(captions)).to(device)
                matched = matching_loss(
                    model,
                    image_tokens,
                    model.text_tokens(*batch),
                    batch[1],
                    scores,
                    positives,
                    temperature,
                    keys,
                )
                loss = contrastive_loss(scores, positives, temperature) + matched
            else:
                features = model.image_head(given) if isinstance(model, Dual) else model.encode_image(given)
                scores = similarities(shared(features), shared(model.encode_text(*batch)))
                loss = contrastive_loss(scores, positives, temperature)
            _step(loss, trained, optimiser, schedule)
            losses.append(loss.detach())
        log(f"base model: epoch {epoch + 1}/{pretrain.epochs}, loss {torch.stack(losses).mean():.3f}")
    model.own_temperature = log_temperature.exp().item()


def _optimiser(parameters: Iterable[nn.Parameter], rate: float, steps: int) -> tuple[Optimizer, LRScheduler]:
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    rise = 0.1 if steps > 10 else 0.3  # a tenth of ten steps would be a phase of no length
    return optimiser, OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=rise)


def _step(loss: Tensor, module: nn.Module, optimiser: Optimizer, schedule: LRScheduler) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()
    schedule.step()


def _pixels(pairs: Split, rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(pairs.pixels[rows]).to(device) / 255


@torch.no_grad()
def _pooled_features(dual: Dual, pairs: Split, device: torch.device, log: Log) -> Tensor:
    """The frozen tower's features of all images, (images, width)."""
    log(f"image tower: features of {len(pairs.image_ids)} images")
    parts = [
        dual.pooled(_pixels(pairs, rows, device))
        for rows in np.array_split(np.arange(len(pairs.image_ids)), 1 + len(pairs.image_ids) // 64)
    ]
    return torch.cat(parts)

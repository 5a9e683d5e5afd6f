"""The attacks as their published code runs them, written from descriptions: slow, plain, and what ours must equal.

One caption and one word at a time, captions padded to the model's full length, gradients of all parameters computed and
thrown away, noise drawn by NumPy. Random numbers come from the caller, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainables.attacks.quirks import Quirks
from trainables.attacks.substitutes import STOP_WORDS
from trainables.models import RetrievalModel

Draw = Callable[[int, int, Tensor], Tensor]
"""(step, scale, pixels) -> noise like `pixels` of standard deviation 0.05."""


def numpy_noise(step: int, scale: int, pixels: Tensor) -> Tensor:
    """As published: float64, on the CPU, for the whole batch, without a seed of its own."""
    return torch.from_numpy(np.random.normal(0.0, 0.05, tuple(pixels.shape))).float().to(pixels.device)


def divergence(features: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(features) || softmax(clean)), (rows,)."""
    p, q = features.double().softmax(-1), clean.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@dataclass(frozen=True)
class Published:
    """The loops of Co-Attack (Zhang et al. 2022), SGA (Lu et al. 2023), DRA (Gao et al. 2024), CMI (Fu et al. 2024).

    Attributes:
        model: under attack.
        masked_lm: proposes words.
        tokenizer: of the masked language model.
        text_tokens: captions are padded and cut to this many for the model under attack.
        quirks: without any, the same loops do what the papers say.
        words: changed per caption.
        candidates: read per word.
        steps: of the image attacks.
        masked_lm_tokens: captions are padded and cut to this many for the masked language model.
    """

    model: RetrievalModel
    masked_lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text_tokens: int = 77
    quirks: Quirks = frozenset()
    words: int = 1
    candidates: int = 10
    steps: int = 10
    masked_lm_tokens: int = 64

    @cached_property
    def device(self) -> torch.device:
        """Of both models."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str], tokens: int | None = None) -> Tensor:
        """(captions, dim) L2-normalised."""
        length = tokens or self.text_tokens
        batch = self.model.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        batch = batch.to(self.device)
        return F.normalize(self.model.encode_text(batch["input_ids"], batch["attention_mask"]), dim=-1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(images, dim) L2-normalised, with gradient."""
        return F.normalize(self.model.encode_image(pixels), dim=-1)

    @torch.no_grad()
    def substitutes(self, words: Sequence[str]) -> list[list[str]]:
        """For each word what may replace it: one forward pass on the caption, nothing masked."""
        batch = self.tokenizer(
            " ".join(words),
            padding="max_length",
            truncation=True,
            max_length=self.masked_lm_tokens,
            return_tensors="pt",
        ).to(self.device)
        logits = self.masked_lm(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[0]
        place, found = 0 if "cls_offset" in self.quirks else 1, []
        for word in words:
            pieces = len(self.tokenizer.tokenize(word))
            found.append([] if word in STOP_WORDS else self._of_word(word, logits[place : place + pieces]))
            place += pieces
        return found

    def _of_word(self, word: str, logits: Tensor) -> list[str]:
        spell = self.tokenizer.convert_ids_to_tokens
        if len(logits) > 1 and "subword_product" in self.quirks:
            together = torch.tensor(list(product(*logits.topk(4, -1).indices.tolist()))[:24], device=self.device)
            expected = self.masked_lm(together).logits.log_softmax(-1)
            perplexity = torch.stack(
                [
                    -sum(expected[row, i, token] for i, token in enumerate(ids)) / len(ids)
                    for row, ids in enumerate(together)
                ]
            ).exp()
            texts = [
                " ".join(spell(together[row].tolist())).replace(" ##", "") for row in perplexity.argsort().tolist()
            ]
            return [text for text in texts if " " not in text and self._fits(text, word)]
        proposals: list[str] = []
        if not len(logits):  # cut away
            return proposals
        for rank, token in enumerate(logits[0].argsort(descending=True).tolist()):
            if rank == self.candidates and "no_refill" in self.quirks:
                break
            if logits[0, token] < 0.3 and "logit_cut" in self.quirks:
                break
            if self._fits(spell(token), word):
                proposals.append(spell(token))
            if len(proposals) == self.candidates:
                break
        return proposals

    def _fits(self, text: str, word: str) -> bool:
        dropped = text == word or text in STOP_WORDS or "##" in text
        return not dropped and (text.isalpha() or ("symbols" in self.quirks and text not in self._special_tokens))

    @cached_property
    def _special_tokens(self) -> set[str]:
        return set(self.tokenizer.all_special_tokens)

    @torch.no_grad()
    def importance(self, words: Sequence[str]) -> list[float]:
        """How much each word matters, stop words too, 32 captions at a time."""
        blank = ["[UNK]"] if "unk_importance" in self.quirks else []
        without = [" ".join([*words[:place], *blank, *words[place + 1 :]]) for place in range(len(words))]
        clean = self.encode_texts([" ".join(words)])
        parts = []
        for start in range(0, len(without), 32):
            masked = self.encode_texts(without[start : start + 32])
            if "unk_importance" in self.quirks:
                parts.append(divergence(clean.expand_as(masked), masked))
            else:
                parts.append((masked - clean).square().sum(-1))
        return torch.cat(parts).tolist()

    @torch.no_grad()
    def attack_caption(self, caption: str, image: Tensor | None) -> str:
        """BERT-Attack away from the image's feature (dim,), or, without one, from the caption's own.

        Args:
            caption: cleaned.
            image: L2-normalised.
        """
        everything = caption.split()
        words = everything[:30] if "first_30_words" in self.quirks else everything
        rest = everything[len(words) :]
        options = self.substitutes(words)
        scores = self.importance(words)
        clean = self.encode_texts([" ".join(words)])
        changed = 0
        for place in sorted(range(len(words)), key=lambda place: -scores[place]):
            if changed == self.words:
                break
            if not options[place]:
                continue
            pool = [words[place], *options[place]]
            features = self.encode_texts([" ".join([*words[:place], option, *words[place + 1 :]]) for option in pool])
            loss = divergence(features, clean.expand_as(features)) if image is None else -(features @ image)
            best = pool[int(loss.argmax())]
            changed += best != words[place]
            words[place] = best
        return " ".join([*words, *rest])

    def attack_captions(self, captions: Sequence[str], owner: Sequence[int], images: Tensor | None) -> list[str]:
        """Every caption against its image's feature (images, dim), or against its own."""
        return [
            self.attack_caption(caption, None if images is None else images[image])
            for caption, image in zip(captions, owner, strict=True)
        ]

    def gradient(self, pixels: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """By a backward pass through everything, divided by its mean magnitude."""
        pixels = pixels.detach().clone().requires_grad_(True)
        self.model.zero_grad()
        loss_of(pixels).backward()
        assert pixels.grad is not None
        return pixels.grad / pixels.grad.abs().mean((1, 2, 3), keepdim=True)

    def set_loss(self, captions: Tensor, owner: Sequence[int], noise: Draw, step: int) -> Callable[[Tensor], Tensor]:
        """SGA's: minus the similarity of five copies of each image to all its captions."""

        def loss_of(pixels: Tensor) -> Tensor:
            height, width = pixels.shape[-2:]
            copies = [pixels]
            for index, scale in enumerate((0.5, 0.75, 1.25, 1.5)):
                noisy = pixels + noise(step, index, pixels)
                resized = F.interpolate(noisy, (int(scale * height), int(scale * width)), mode="bicubic").clamp(0, 1)
                copies.append(F.interpolate(resized, (height, width), mode="bicubic").clamp(0, 1))
            features = self.encode_images(torch.cat(copies))
            total = torch.zeros((), device=self.device)
            for copy in features.split(len(pixels)):
                labels = torch.zeros(len(pixels), len(captions), device=self.device)
                for caption, image in enumerate(owner):
                    labels[image, caption] = 1
                total = total - (copy @ captions.T * labels).sum(-1).mean()
            return total

        return loss_of

    def sga(
        self,
        pixels: Tensor,
        captions: Sequence[str],
        owner: Sequence[int],
        start: Tensor,
        noise: Draw,
        *,
        epsilon: float,
    ) -> tuple[Tensor, list[str]]:
        """Captions against clean images, images against those, the clean captions against the attacked images.

        Args:
            pixels: (images, 3, height, width).
            captions: cleaned.
            owner: each caption's image.
            start: where the image attack begins.
            noise: of the copies.
            epsilon: radius; each step is a quarter of it.
        """
        with torch.no_grad():
            clean = self.encode_images(pixels)
        supervision = self.supervision(self.attack_captions(captions, owner, clean))
        current = start
        for step in range(self.steps):
            direction = self.gradient(current, self.set_loss(supervision, owner, noise, step))
            current = self.project(current + epsilon / 4 * direction.sign(), pixels, epsilon)
        with torch.no_grad():
            guide = self.encode_images(current)
        return current, self.attack_captions(captions, owner, guide)

    def supervision(self, captions: Sequence[str]) -> Tensor:
        """What the image attack reads of the attacked captions."""
        return self.encode_texts(
            captions, min(30, self.text_tokens) if "supervision_30_tokens" in self.quirks else None
        )

    def dra(
        self,
        pixels: Tensor,
        captions: Sequence[str],
        owner: Sequence[int],
        start: Tensor,
        noise: Draw,
        shares: Callable[[int], Tensor],
        *,
        epsilon: float,
    ) -> tuple[Tensor, list[str]]:
        """SGA with the gradient of the worst mixture of current, clean and previous image; one image at a time.

        Args:
            pixels: (1, 3, height, width).
            captions: its own.
            owner: zeros.
            start: see `sga`.
            noise: see `sga`.
            shares: step -> (mixtures, 3), weights of the current, the clean and the previous image.
            epsilon: see `sga`.
        """
        with torch.no_grad():
            clean = self.encode_images(pixels)
        supervision = self.supervision(self.attack_captions(captions, owner, clean))
        before, current = start, start
        for step in range(self.steps):
            loss_of, place = self.set_loss(supervision, owner, noise, step), current
            if step:
                losses, mixtures = [], []
                for now, original, last in shares(step).tolist():
                    mixtures.append(now * current + original * pixels + last * before)
                    ahead = mixtures[-1] + epsilon / 4 * self.gradient(mixtures[-1], loss_of).sign()
                    if "free_look_ahead" not in self.quirks:
                        ahead = ahead.clamp(0, 1)
                    with torch.no_grad():
                        losses.append(loss_of(ahead).item())
                place = mixtures[int(np.argmax(losses))]
            direction = self.gradient(place, loss_of)
            before, current = current, self.project(current + epsilon / 4 * direction.sign(), pixels, epsilon)
        with torch.no_grad():
            guide = 0.6 * clean + 0.2 * self.encode_images(current) + 0.2 * self.encode_images(before)
        return current, self.attack_captions(captions, owner, guide)

    def cmi(
        self,
        pixels: Tensor,
        captions: Sequence[str],
        owner: Sequence[int],
        starts: tuple[Tensor, Tensor],
        noise: Draw,
        *,
        epsilon: float,
    ) -> tuple[Tensor, list[str]]:
        """Captions against a perturbed start, whose gradient under them begins the momentum of the image attack.

        Args:
            pixels: see `sga`.
            captions: see `sga`.
            owner: see `sga`.
            starts: of the guide and of the image attack.
            noise: see `sga`; the step after the last is the guide's.
            epsilon: see `sga`.
        """
        with torch.no_grad():
            guide = self.encode_images(starts[0])
        attacked = self.attack_captions(captions, owner, guide)
        supervision = self.encode_texts(attacked)
        momentum = self.gradient(starts[0], self.set_loss(supervision, owner, noise, self.steps))
        current = starts[1]
        for step in range(self.steps):
            momentum = 0.9 * momentum + self.gradient(current, self.set_loss(supervision, owner, noise, step))
            current = self.project(current + epsilon / 4 * momentum.sign(), pixels, epsilon)
        return current, attacked

    def co_attack(
        self, pixels: Tensor, captions: Sequence[str], start: Tensor, *, epsilon: float
    ) -> tuple[Tensor, list[str]]:
        """One image (1, 3, height, width): captions from themselves, the image from itself and from them.

        With `last_caption`, as in the published loader of pairs, once a caption, each attack replacing the one before.
        """
        attacked = self.attack_captions(captions, [0] * len(captions), None)
        texts = self.encode_texts(attacked)
        with torch.no_grad():
            clean = self.encode_images(pixels)
        result = pixels
        for against in texts.split(1) if "last_caption" in self.quirks else [texts]:

            def loss_of(adversarial: Tensor, against: Tensor = against) -> Tensor:
                features = self.encode_images(adversarial)
                from_texts = torch.stack([divergence(features, text[None]) for text in against]).mean(0)
                return (divergence(features, clean) + 3 * from_texts).sum()

            result = start
            for _ in range(self.steps):
                direction = self.gradient(result, loss_of)
                result = self.project(result + 1.25 * epsilon / self.steps * direction.sign(), pixels, epsilon)
        return result, attacked

    @staticmethod
    def project(moved: Tensor, pixels: Tensor, epsilon: float) -> Tensor:
        """Into the ball, then into [0, 1]."""
        return torch.min(torch.max(moved, pixels - epsilon), pixels + epsilon).clamp(0, 1)

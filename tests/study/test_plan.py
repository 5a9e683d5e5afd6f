"""The cost of a study before it is run: counted by hand, by PyTorch, and on a clock of four trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.setup import Plain
from study import plan
from study.arguments import PRESETS, parse
from study.config import Budget, Price, StudyConfig, TrialTemplate
from study.costs.budget import limits
from study.costs.cost_model import (
    DEVICES,
    Fusion,
    Shape,
    Tower,
    evaluation_flops,
    pair_flops,
    ring_bytes,
    text_tries,
    trial_memory,
    trial_work,
)
from study.costs.page import simulations
from study.costs.shapes import shape_of
from trainables.config import SEARCHED_ATTACKS, Point, Protocol, TrainingConfig, TrialConfig
from trainables.errors import InputError
from trainables.models.albef import Albef
from trainables.models.blip import Blip
from trainables.models.clip import Clip
from trainables.prepare import prepare
from trainables.training.pretraining import train_tokenizer

VIT_B16 = Tower(tokens=197, width=768, layers=12, inner=3072, patch_values=768)


def test_vit_b16_by_hand() -> None:
    # A layer: 197 x 768 x (4 x 768 + 2 x 3072) + 2 x 197^2 x 768 multiply-adds; the patches: 197 x 768 x 768.
    multiply_adds = 12 * (197 * 768 * 9216 + 2 * 197**2 * 768) + 197 * 768 * 768
    assert multiply_adds == pytest.approx(17.6e9, rel=0.01), "the figure of the literature"
    assert VIT_B16.flops == 2 * multiply_adds
    assert VIT_B16.parameters == pytest.approx(86e6, rel=0.01)


def test_towers_agree_with_what_pytorch_counts(tiny_trial: TrialConfig) -> None:
    base = prepare(tiny_trial).base
    assert isinstance(base, Clip)
    model = Plain(base)  # all layers are whole
    tiny, pixels = tiny_trial.model.tiny, tiny_trial.data.image_pixels
    tower = Tower((pixels // 8) ** 2 + 1, tiny.width, tiny.layers, 4 * tiny.width, patch_values=3 * 64)
    images = torch.rand(4, 3, pixels, pixels)

    def counted(needs: str) -> float:
        for parameter in model.parameters():
            parameter.requires_grad_(needs == "parameters")
        given = images.clone().requires_grad_(needs == "pixels")
        with FlopCounterMode(display=False) as counter:
            features = model.encode_image(given)
            if needs != "nothing":
                features.sum().backward()
        return counter.get_total_flops() / len(images)

    forward = counted("nothing")
    assert tower.flops == pytest.approx(forward, rel=0.05)
    # What is not a product of matrices is not counted, and the first layer needs no gradient of its input.
    assert counted("pixels") == pytest.approx(2 * forward, rel=0.1)
    assert counted("parameters") == pytest.approx(3 * forward, rel=0.1)


def test_flops_of_a_pair() -> None:
    clean = pair_flops(100, 10, Point(), attack_candidates=5, caption_words=9)
    assert clean == {"attack": 0, "train": 330}
    mat = Point(epsilon=2 / 255, attack_steps=2, words=1)
    # Captions: 1 + 9 + 5 tries and the clean image; images: 2 steps of 2 passes, against one attacked caption.
    assert pair_flops(100, 10, mat, 5, 9) == {"attack": 15 * 10 + 100 + 4 * 100 + 10, "train": 330}
    assert pair_flops(100, 10, Point(distillation=0.4), 5, 9)["train"] == 330 + 110  # the teacher looks, too
    fare = Point(
        contrastive_weight=0, epsilon=2 / 255, attack_steps=10, trainable="image", attack_objective="deviation"
    )
    assert pair_flops(100, 10, fare, 5, 9) == {"attack": 2000, "train": 300}
    assert text_tries(2, 10, 9, "importance") == 30
    exact = mat.model_copy(update={"text_search": "exact"})
    assert pair_flops(100, 10, exact, 5, 9)["attack"] == pytest.approx((1 + 0.54 * 9 * 5) * 10 + 100 + 4 * 100 + 10)


@pytest.mark.parametrize(("preset", "millions"), [("coco_albef", 209.5), ("coco_blip", 223)])
def test_fusion_models_are_planned_at_their_published_size(preset: str, millions: float) -> None:
    shape = shape_of(parse(["--preset", preset]))
    assert shape.parameters / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("family", ["albef", "blip"])
def test_fusion_agrees_with_what_pytorch_counts(tiny_trial: TrialConfig, family: Any) -> None:
    tiny = tiny_trial.model.tiny.model_copy(update={"layers": 4})
    model_config = tiny_trial.model.model_copy(update={"family": family, "tiny": tiny})
    config = StudyConfig(data=tiny_trial.data, trial=TrialTemplate(model=model_config))
    found = shape_of(config).fusion
    assert found is not None
    kind, tokenizer = {"albef": Albef, "blip": Blip}[family], train_tokenizer(["a dog"])
    network = kind.tiny(tiny, tiny_trial.data.image_pixels, 32, tokenizer).eval()
    image_tokens = torch.rand(1, found.image_tokens, found.image_width)
    captions, pairs = torch.rand(5, found.tokens, found.width), 5
    # Fused attention on CPUs is not counted; taken apart it is two products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network.itm_logits(image_tokens, captions, torch.ones(5, found.tokens, dtype=torch.int64))
    # Of its last layer, all but keys and values is computed for one token.
    width, left_out = found.width, found.tokens - 1
    spared = 2 * left_out * width * (4 * width + 2 * found.inner + 2 * found.tokens + 2 * found.image_tokens)
    expected = pairs * (found.flops - spared) + found.image_flops
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_flops_of_reranking() -> None:
    fusion = Fusion(tokens=16, width=64, layers=2, inner=256, image_tokens=197, image_width=768, own=True)
    shape = Shape(VIT_B16, Tower(16, 64, 2, 256), 9, 100, 100, 5.0, fusion)
    protocol = Protocol(attacks=SEARCHED_ATTACKS)
    plain = evaluation_flops(shape, protocol, 100)
    # Clean and three attacks: 20 captions of each of 100 images, and 20 images of each of 500 captions.
    each = (100 * 20 + 500 * 20) * fusion.flops + 100 * fusion.image_flops
    reranked = protocol.model_copy(update={"rerank": 20})
    assert evaluation_flops(shape, reranked, 100) == pytest.approx(plain + 4 * each)


def test_matching_is_paid_for_where_it_is_trained() -> None:
    point = Point(contrastive_weight=0.5)
    assert pair_flops(100, 10, point, 5, 9, matching=50)["train"] == 330 + 3 * 50
    assert pair_flops(100, 10, Point(), 5, 9, matching=50)["train"] == 330
    anchored = Point(contrastive_weight=0.5, companion="anchor")
    assert pair_flops(100, 10, anchored, 5, 9, matching=50)["train"] == 330


def test_flops_of_an_evaluation() -> None:
    shape = Shape(VIT_B16, Tower(16, 64, 2, 256), 9, 100, 100)
    image, text = shape.image.flops, shape.text.flops
    protocol = Protocol(attacks=SEARCHED_ATTACKS, image_steps=10, words=1, candidates=10)
    expected = 100 * image + 500 * text + 2 * (100 * 21 * image + 500 * (1 + 0.54 * 90) * text)
    assert evaluation_flops(shape, protocol, 100) == pytest.approx(expected)


def test_small_evaluations_that_grow_are_counted() -> None:
    shape = Shape(VIT_B16, Tower(16, 64, 2, 256), 9, 100, 100)
    protocol = Protocol(rung_gallery_images=10, rung_image_steps=2, rung_growth=1.0)
    found = trial_work(shape, Point(), TrainingConfig(epochs=4), protocol).flops["evaluate"]
    parts = [(25, 2), (50, 5), (75, 8), (100, 10)]
    expected = (evaluation_flops(shape, protocol.model_copy(update={"image_steps": s}), i) for i, s in parts)
    assert found == pytest.approx(sum(expected))


def test_more_attack_and_slower_memory_take_longer() -> None:
    shape = Shape(VIT_B16, Tower(16, 512, 12, 2048), 10.5, 1000, 100)
    training, protocol = TrainingConfig(batch_size=64), Protocol()
    points = (Point(epsilon=0.01, attack_steps=steps, contrastive_weight=0.5) for steps in (1, 10))
    weak, strong = (trial_work(shape, point, training, protocol) for point in points)
    assert strong.flops["attack"] > 8 * weak.flops["attack"]
    assert strong.flops["train"] == weak.flops["train"]
    fast, slow = weak.seconds(DEVICES["h100"]), weak.seconds(DEVICES["l4"])
    assert all(slow[phase] > fast[phase] for phase in slow)
    assert trial_memory(shape, training, 1) > 1.5 * trial_memory(shape, training, 4) > 0


def test_gradient_checkpointing_takes_less_memory_and_a_forward_pass_more() -> None:
    shape = Shape(VIT_B16, Tower(16, 512, 12, 2048), 10.5, 1000, 100)
    plain, again = (TrainingConfig(batch_size=64, gradient_checkpointing=on) for on in (False, True))
    assert VIT_B16.checkpointed_bytes == (12 * 2 + 34) * 197 * 768
    saved = trial_memory(shape, plain, 1) - trial_memory(shape, again, 1)
    assert saved == pytest.approx(64 * (11 * 34 - 12 * 2) * (197 * 768 + 16 * 512))
    weights = shape.image.parameters + shape.text.parameters
    assert trial_memory(shape, plain, 8) - trial_memory(shape, plain, 8, sharded=True) == pytest.approx(6 * weights)
    point, protocol = Point(epsilon=0.01, attack_steps=3), Protocol()
    one, other = (trial_work(shape, point, training, protocol).flops for training in (plain, again))
    assert other["train"] / one["train"] == pytest.approx(4 / 3)
    image, text = shape.image.flops, shape.text.flops
    assert other["attack"] / one["attack"] == pytest.approx((9 * image + text) / (6 * image + text))
    assert other["evaluate"] > one["evaluate"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # Two slots: 3 | 5 start, then 4 at 3 and 1 at 5; the last ends at 7.
        (Budget(trials=4), (4, 7.0, 13.0, "trials")),
        # After 3 s the first has ended and 8 device-seconds are held: no third.
        (Budget(trials=4, device_hours=8 / 3600), (2, 5.0, 8.0, "device_hours")),
        (Budget(trials=4, wall_hours=4 / 3600), (3, 7.0, 12.0, "wall_hours")),
        (Budget(trials=4, money=8), (2, 5.0, 8.0, "money")),
    ],
)
def test_the_virtual_clock(budget: Budget, expected: tuple[int, float, float, str]) -> None:
    price = Price(device_hour={"l4": 3600})
    run = plan.run_through([3, 5, 4, 1], slots=2, held_each=1, device="l4", limits_at=partial(limits, budget, price))
    assert run.ended_by is not None
    assert (run.trials, run.wall_seconds, run.device_seconds, run.ended_by.name) == pytest.approx(expected)


def test_the_originals_embeddings_are_made_by_the_first_trial_that_needs_them() -> None:
    trials = [{"load": load, "train": 1.0} for load in (0.0, 3.0, 0.0, 3.0)]
    assert [by_phase["load"] for by_phase in plan.loaded_once(trials)] == [0, 3, 0, 0]
    assert all(by_phase["train"] == 1 for by_phase in plan.loaded_once(trials))


def test_micro_batches_take_less_memory_and_a_forward_pass_more() -> None:
    shape = Shape(VIT_B16, Tower(16, 512, 12, 2048), 10.5, 1024, 100)
    whole, parts = (TrainingConfig(batch_size=1024, micro_batch=micro) for micro in (None, 128))
    one, other = (trial_work(shape, Point(), training, Protocol()).flops for training in (whole, parts))
    assert other == {**one, "train": pytest.approx(4 / 3 * one["train"])}
    kept = trial_memory(shape, whole, 1) - trial_memory(shape, parts, 1)
    assert kept == pytest.approx((1024 - 128) * (VIT_B16.activation_bytes + shape.text.activation_bytes))
    # Each of eight workers has 128 anyway.
    assert trial_work(shape, Point(), parts, Protocol(), 8).flops == one
    assert trial_memory(shape, parts, 8) == trial_memory(shape, whole, 8)


def test_workers_share_the_work_and_exchange_gradients() -> None:
    shape = Shape(VIT_B16, Tower(16, 512, 12, 2048), 10.5, 1024, 100)
    work = trial_work(shape, Point(), TrainingConfig(epochs=2, batch_size=128), Protocol())
    one, eight = (work.seconds(DEVICES["h100"], workers) for workers in (1, 8))
    assert ring_bytes(8.0, 1) == 0
    assert eight["evaluate"] == pytest.approx(one["evaluate"] / 8)
    # 16 steps; a ring moves seven eighths of the gradients there and back.
    exchanged = 16 * 2 * 7 / 8 * 4 * shape.parameters / 450e9
    assert eight["train"] - one["train"] / 8 == pytest.approx(exchanged)


def test_trials_on_halves_of_a_gpu() -> None:
    flags = ["--preset", "coco_clip_b16", "--device", "h100", "--devices", "2", "--trial.workers.gpus-per-worker"]
    whole, half = (plan.plan(parse([*flags, share], plan.Arguments)) for share in ("1", "0.5"))
    assert (whole.trials_at_once, half.trials_at_once) == (2, 4)
    assert half.device_memory_bytes == whole.device_memory_bytes / 2 == 40e9
    assert half.trial_seconds - plan.LAUNCH_SECONDS == pytest.approx(2 * (whole.trial_seconds - plan.LAUNCH_SECONDS))
    assert half.device_hours == pytest.approx(whole.device_hours, rel=0.1)
    assert half.growth[-1].wall_hours == pytest.approx(whole.growth[-1].wall_hours, rel=0.2)
    assert half.growth[-1].device_hours == pytest.approx(whole.growth[-1].device_hours, rel=0.2)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_simulator_holds_as_much_as_the_arithmetic(workers: int) -> None:
    flags = ["--preset", "coco_clip_b16", "--device", "h100", "--devices", "16", "--budget.trials", "10"]
    given = [*flags, "--trial.workers.count", str(workers), "--no-early-stopping.enabled"]
    found = plan.plan(parse(given, plan.Arguments))
    assert found.growth[-1].device_hours == pytest.approx(found.device_hours, rel=0.5)  # points differ
    assert found.growth[-1].wall_hours == pytest.approx(found.wall_hours, rel=0.5)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_can_be_planned(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--preset", preset, "--device", "l4", "--price.device-hour", "l4=1", "--as-json"]) == 0
    found = plan.Plan.model_validate_json(capsys.readouterr().out)
    assert found.trials == len(parse(["--preset", preset]).recipes) + parse(["--preset", preset]).budget.trials
    assert found.money == pytest.approx(found.device_hours)
    assert found.wall_hours * found.devices >= found.device_hours
    assert found.memory_bytes < found.device_memory_bytes


def test_the_front_grows_on_the_simulator() -> None:
    flags = ["--device", "cpu", "--devices", "2", "--price.device-hour", "cpu=2"]
    stopping, whole = (
        plan.plan(parse([*flags, enabled], plan.Arguments)).growth
        for enabled in ("--early-stopping.enabled", "--no-early-stopping.enabled")
    )
    assert [row.trials for row in whole] == [4, 8, 12, 16]
    for growth in (stopping, whole):
        for before, after in pairwise(growth):
            assert after.hypervolume >= before.hypervolume > 0
            assert after.wall_hours > before.wall_hours > 0
            assert after.device_hours > before.device_hours > 0
        assert 0 < growth[-1].hypervolume < 1
        assert all(row.money == pytest.approx(2 * row.device_hours) for row in growth)
        assert 2 <= growth[-1].front <= 16
    assert stopping[-1].device_hours < whole[-1].device_hours
    # Both clocks count the same trials: points at random, each as long as the arithmetic says.
    found = plan.plan(parse([*flags, "--no-early-stopping.enabled"], plan.Arguments))
    assert whole[-1].wall_hours == pytest.approx(found.wall_hours, rel=0.3)


def test_the_page_shows_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--preset", "coco_clip_b16", "--device", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "image forward 35.13 GFLOPs (197 tokens x 768 x 12 layers)" in shown
    assert "give --price.device-hour h100=PRICE" in shown
    assert "The front, on a simulator" in shown
    assert "of a surrogate fitted to tiny models" in " ".join(shown.split())


def test_shapes_come_from_a_models_configuration(tmp_path: Path) -> None:
    clip = {"vision_config": {"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 16}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(clip))
    config = StudyConfig.model_validate({"trial": {"model": {"base": str(tmp_path)}}, "data": {"image_pixels": 64}})
    image = shape_of(config).image
    assert isinstance(image, Tower)
    assert (image.tokens, image.width, image.layers, image.inner) == (17, 64, 3, 256)
    with pytest.raises(InputError, match="is not known here"):
        shape_of(StudyConfig.model_validate({"trial": {"model": {"base": "someone/else"}}}))


@pytest.mark.parametrize(
    ("workers", "devices", "told"),
    [({"count": 8, "gpus_per_worker": 1}, 3, "devices 3: a trial needs 8"), ({"gpus_per_worker": 0}, 8, "h100")],
)
def test_a_trial_that_no_device_can_run_is_refused(workers: dict[str, Any], devices: int, told: str) -> None:
    fields = {"trial": {"workers": workers, "training": {"batch_size": 32}}, "device": "h100", "devices": devices}
    with pytest.raises(InputError, match=told):
        plan.plan(plan.Arguments.model_validate(fields))


def test_a_tower_that_is_no_transformer_is_run(real_data: Path) -> None:
    folder = real_data / "weights" / "mobilenet_v2_1.0_224"
    model = {"image_tower": str(folder)}
    config = StudyConfig.model_validate({"trial": {"model": model}, "data": {"image_pixels": 224}})
    image = shape_of(config).image
    assert image.flops == pytest.approx(2 * 300e6, rel=0.05), "300 M multiply-adds (Sandler et al. 2018, table 4)"
    assert image.parameters == pytest.approx(2.2e6, rel=0.05)


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(2):
        began = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "study.plan", "--help"], capture_output=True, text=True, check=True
        )
        ended = os.times()
        seconds.append(sum(ended[2:4]) - sum(began[2:4]))
    assert "--device" in done.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize(("trials", "studies"), [(0, 5), (52, 5), (500, 5), (1000, 2), (2500, 1), (100_000, 1)])
def test_long_studies_are_simulated_less_often(trials: int, studies: int) -> None:
    assert simulations(trials) == studies

"""The loop of a worker, in this process: batches, the middle of epochs, what it starts from, steps that fail."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import ray.train
import torch

from instseg.config import AugmentConfig, ModelConfig, TrainConfig, ValidationConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.folds import training_images
from instseg.jobs import train_fit, train_loop
from instseg.jobs.tracking import Tracker
from instseg.jobs.train_checks import check_same_run, check_start, training_settings
from instseg.jobs.train_report import raise_failed_step
from instseg.models.checkpoint import epoch_folder, find_checkpoint, latest_checkpoint, read_checkpoint, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.storage import StoragePath
from instseg.structures import Sample
from instseg.training.objective import Objective
from instseg.training.order import batches
from tests.jobs.conftest import NUM_IMAGES
from tests.jobs.local_training import Killed, LocalTraining, patch_ray

NUM_EPOCHS, STEPS = 2, 4  # of two images each, the last of which takes the first image again


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> LocalTraining:
    return patch_ray(monkeypatch)


def make_config(data: Path, run: Path) -> TrainConfig:
    """One worker, with checkpoints after two steps and at the end of each epoch."""
    return TrainConfig(
        str(data),
        str(run),
        num_epochs=NUM_EPOCHS,
        num_workers=1,
        images_per_worker=2,
        device="cpu",
        learning_rate_crf=0.01,
        learning_rate_compatibility=0.001,
        augment=AugmentConfig(flip=True, scale=(0.8, 1.2), crop=24),
        checkpoint_every=2,
        keep_checkpoints=9,
    )


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    return make_config(tiny_data, tmp_path / "run")


def test_training_ends_where_validation_says_so(
    config: TrainConfig, local: LocalTraining, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked after each checkpoint, and only where the run has a patience."""
    asked: list[int] = []

    def stopped(run: str, validation: ValidationConfig) -> bool:
        asked.append(len(local.passes))
        return len(local.passes) >= STEPS + 2

    monkeypatch.setattr(train_loop, "stopped", stopped)
    patient = replace(config, validation=ValidationConfig(str(tiny_data), patience=1))
    assert local.run(patient).state["step"] == STEPS + 2
    assert asked[0] == 0
    assert set(asked) == {0, 2, STEPS, STEPS + 2}
    asked.clear()
    local.passes.clear()
    assert local.run(replace(config, out=config.out + "_2")).state["epoch"] == NUM_EPOCHS
    assert asked == []


def tensors(run: str, name: str = "") -> dict[str, bytes]:
    folder = StoragePath.of(run) / "checkpoints" / name if name else find_checkpoint(run).folder
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, LocalTraining]:
    """A run to the end."""
    config = make_config(tiny_data, tmp_path_factory.mktemp("undisturbed") / "run")
    with pytest.MonkeyPatch.context() as patch:
        local = patch_ray(patch)
        local.run(config)
    return config, local


def test_checkpoints_are_named_in_the_order_of_time(undisturbed: tuple[TrainConfig, LocalTraining]) -> None:
    config, _ = undisturbed
    names = (StoragePath.of(config.out) / "checkpoints").folders()
    assert names == ["epoch_0000_image_0000004", "epoch_0001", "epoch_0001_image_0000004", "epoch_0002"]
    states = [read_checkpoint(StoragePath.of(config.out) / "checkpoints" / name).state for name in names]
    progress = [(state["epoch"], state["images"], state["step"]) for state in states]
    assert progress == [(0, 4, 2), (1, 0, 4), (1, 4, 6), (2, 0, 8)]


@pytest.mark.parametrize("killed_at", [1, 2, 3, 5, 7])
def test_killed_in_the_middle_of_an_epoch_it_goes_on_with_the_next_image(
    undisturbed: tuple[TrainConfig, LocalTraining], config: TrainConfig, local: LocalTraining, killed_at: int
) -> None:
    original, expected = undisturbed
    local.kill_before = lambda num_passes: num_passes == killed_at
    with pytest.raises(Killed):
        local.run(config)
    saved = killed_at // 2 * 2  # steps
    assert local.passes == expected.passes[:killed_at]
    local.kill_before = lambda num_passes: False
    local.passes.clear()
    local.run(config)
    assert local.passes == expected.passes[saved:]
    assert tensors(config.out) == tensors(original.out)
    assert local.curve("instance_loss") == expected.curve("instance_loss")
    for step, record in expected.records.items():
        assert local.records[step].get("losses") == record.get("losses")


def test_no_image_is_skipped_or_repeated(undisturbed: tuple[TrainConfig, LocalTraining]) -> None:
    config, local = undisturbed
    ids = PreparedDataset(config.data).image_ids
    for epoch in range(NUM_EPOCHS):
        taken = list(chain.from_iterable(local.passes[epoch * STEPS : (epoch + 1) * STEPS]))
        assert sorted(taken[:NUM_IMAGES]) == sorted(ids)
        assert taken[NUM_IMAGES:] == taken[:1]


def test_other_workers_go_on_where_an_epoch_was_left(config: TrainConfig, local: LocalTraining) -> None:
    """As after an elastic change: steps of two images, then of three, then of one."""
    local.kill_before = lambda num_passes: num_passes == 2
    with pytest.raises(Killed):
        local.run(config)
    local.kill_before = lambda num_passes: num_passes == 3
    with pytest.raises(Killed):
        local.run(replace(config, images_per_worker=3, checkpoint_every=1))
    local.kill_before = lambda num_passes: False
    last = local.run(replace(config, images_per_worker=1, num_epochs=1))
    first_epoch = list(chain.from_iterable(local.passes))
    ids = PreparedDataset(config.data).image_ids
    assert first_epoch == [ids[index] for (index,) in batches(NUM_IMAGES, 1, config.seed, 0)]
    assert [len(each) for each in local.passes] == [2, 2, 3]
    assert (last.state["epoch"], last.state["images"], last.state["step"]) == (1, 0, 3)


@pytest.mark.parametrize(("images_per_worker", "accumulate"), [(2, 2), (1, 4)])
def test_the_same_images_a_step_are_the_same_training(
    config: TrainConfig, local: LocalTraining, images_per_worker: int, accumulate: int, tmp_path: Path
) -> None:
    batch = replace(config, images_per_worker=4, checkpoint_every=1)
    local.run(batch)
    parts = replace(batch, images_per_worker=images_per_worker, accumulate=accumulate, out=str(tmp_path / "parts"))
    expected, local.records = local.records, {}
    local.run(parts)
    whole = LocalTraining(records=expected)
    for name in ("semantic_loss", "instance_loss"):
        assert local.curve(name) == pytest.approx(whole.curve(name), abs=1e-5)
    assert local.curve("gradient_norm") == pytest.approx(whole.curve("gradient_norm"), rel=1e-3)


def test_rates_and_norms_are_recorded_with_the_losses(undisturbed: tuple[TrainConfig, LocalTraining]) -> None:
    config, local = undisturbed
    assert set(local.records[2]["points"][0][1]) == {
        "semantic_loss", "instance_loss", "gradient_norm", "data_wait_ms",
        "learning_rate_crf", "learning_rate_compatibility",
    }  # fmt: skip
    rates = local.curve("learning_rate_crf")
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] < config.learning_rate_crf
    assert min(local.curve("gradient_norm")) > 0
    assert set(local.records[STEPS]["losses"]) == {"semantic_loss", "instance_loss"}
    assert local.records.keys() == {2, 4, 6, 8}


def test_an_epochs_mean_is_of_all_its_steps(undisturbed: tuple[TrainConfig, LocalTraining]) -> None:
    _, local = undisturbed
    halves = [values["semantic_loss"] for step in (2, 4) for _, values in local.records[step]["points"]]
    assert local.records[4]["losses"]["semantic_loss"] == pytest.approx(sum(halves) / 2)


def test_a_run_starts_from_the_weights_of_another(
    undisturbed: tuple[TrainConfig, LocalTraining], config: TrainConfig, local: LocalTraining
) -> None:
    other, _ = undisturbed
    rates = {"learning_rate_crf": 0.0, "learning_rate_compatibility": 0.0}
    still = check_start(replace(config, start_from=other.out, **rates), training_images(config))
    assert still.start_from == str(epoch_folder(other.out, NUM_EPOCHS))
    local.run(still)
    assert tensors(config.out)["model.safetensors"] == tensors(other.out)["model.safetensors"]


def test_its_own_checkpoint_goes_before_what_it_starts_from(
    undisturbed: tuple[TrainConfig, LocalTraining], config: TrainConfig, local: LocalTraining
) -> None:
    local.run(replace(config, num_epochs=1, learning_rate_schedule="constant"))
    local.run(replace(config, learning_rate_schedule="constant", start_from=undisturbed[0].out))
    once = replace(config, learning_rate_schedule="constant", out=str(Path(config.out).parent / "once"))
    local.run(once)
    assert tensors(config.out) == tensors(once.out)


def test_what_a_checkpoint_lacks_keeps_its_initial_value(config: TrainConfig, local: LocalTraining) -> None:
    kept = {"instance_crf.spatial_weight": torch.tensor(7.0)}
    save_checkpoint(Path(config.out).parent / "partial", kept, {})
    rates = {"learning_rate_crf": 0.0, "learning_rate_compatibility": 0.0}
    found = local.run(replace(config, num_epochs=1, start_from=str(Path(config.out).parent / "partial"), **rates))
    expected = InstanceNetwork(config.model, 4).state_dict() | kept
    torch.testing.assert_close(found.model(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("semantic_crf.nonsense", (), "semantic_crf.nonsense is not part of the network"),
        ("instance_crf.spatial_weight", (2,), "size mismatch for instance_crf.spatial_weight"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    config: TrainConfig, tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    save_checkpoint(tmp_path / "other", {name: torch.zeros(shape)}, {})
    with pytest.raises(ValueError, match=f"start_from: checkpoint .*other does not fit this network: {message}"):
        check_start(replace(config, start_from=str(tmp_path / "other")), training_images(config))


def test_what_to_start_from_must_be_there_and_of_the_same_classes(config: TrainConfig, tmp_path: Path) -> None:
    dataset = training_images(config)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint there"):
        check_start(replace(config, start_from=str(tmp_path / "nowhere")), dataset)
    save_checkpoint(tmp_path / "other", {}, {"classes": ["background", "cat", "dog", "cow"]})
    with pytest.raises(ValueError, match="was trained with class 1 = 'cat', in the data it is 'square'"):
        check_start(replace(config, start_from=str(tmp_path / "other")), dataset)


def poison(monkeypatch: pytest.MonkeyPatch, image_id: str, value: float) -> None:
    """The losses of one image are multiplied by `value`."""
    real = Objective._losses

    def losses(self: Objective, sample: Sample, logits: torch.Tensor | None) -> dict[str, torch.Tensor]:
        scale = value if sample.image_id == image_id else 1.0
        return {name: scale * loss for name, loss in real(self, sample, logits).items()}

    monkeypatch.setattr(Objective, "_losses", losses)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "loss of {} is nan"), (1e38, "norm of the gradient is inf")]
)
def test_a_step_that_is_not_finite_ends_the_run_and_is_kept(
    config: TrainConfig,
    local: LocalTraining,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[TrainConfig, LocalTraining],
    value: float,
    said: str,
) -> None:
    _, expected = undisturbed
    config = replace(config, learning_rate_schedule="constant", num_epochs=1)
    step = 2
    bad = expected.passes[step][0]
    poison(monkeypatch, bad, value)
    local.run(config)
    assert local.passes == expected.passes[: step + 1]
    run = StoragePath.of(config.out)
    # Ray Train saw all workers return, so it has not tried again; the driver knows better.
    monkeypatch.setattr(train_fit, "shown", nullcontext)
    monkeypatch.setattr(train_fit, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=lambda: None))
    with pytest.raises(FloatingPointError, match=said.format(bad)) as raised:
        train_fit.fit(config, {}, cast(Tracker, None), 0)
    message = str(raised.value)
    assert bad in message
    assert f"in step {step + 1}, epoch 1" in message
    assert str(run / "failed_step") in message
    saved = find_checkpoint(run / "failed_step")
    assert saved.state["images"] == 2 * step
    before = latest_checkpoint(run)
    assert before is not None
    torch.testing.assert_close(saved.model(), before.model(), rtol=0, atol=0)  # no step was taken in between
    assert InstanceNetwork.load(saved.folder).num_labels == 4
    monkeypatch.undo()
    patch_ray(monkeypatch)
    local.run(config)
    raise_failed_step(run)  # what an earlier attempt left is gone


def test_a_checkpoint_of_an_earlier_version_is_continued(config: TrainConfig, local: LocalTraining) -> None:
    """One without the options and counters of this one."""
    plain = TrainConfig(config.data, config.out, num_epochs=1, num_workers=1, device="cpu")
    local.run(replace(plain, learning_rate_schedule="constant"))
    found = find_checkpoint(plain.out)
    new = ("train_through", "start_from", "augment", "images_per_worker", "accumulate", "precision", "optimizer",
           "momentum", "weight_decay", "learning_rate_new", "frozen_stages", "checkpoint_every")  # fmt: skip
    settings = {**found.config, "train": {k: v for k, v in found.config["train"].items() if k not in new}}
    state = {"epoch": 1, "step": NUM_IMAGES, "records": []}
    save_checkpoint(found.folder, found.model(), settings, found.optimizer(), state)
    longer = replace(plain, learning_rate_schedule="constant", num_epochs=2)
    check_same_run(find_checkpoint(plain.out), training_settings(longer, training_images(longer)))
    changed = training_settings(replace(longer, optimizer="sgd"), training_images(longer))
    with pytest.raises(ValueError, match=r"was trained with train\.optimizer = 'adam', not 'sgd'"):
        check_same_run(find_checkpoint(plain.out), changed)
    assert local.run(longer).state["step"] == 2 * NUM_IMAGES


def test_reports_of_all_workers_are_the_same_and_one_writes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two workers: it takes the other half of each step, and reports no checkpoint."""
    local, reported = patch_ray(monkeypatch), []
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor)
    monkeypatch.setattr("ray.train.collective.broadcast_from_rank_zero", lambda data: None)
    monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint, **_: reported.append((metrics, checkpoint)))
    config = replace(config, num_epochs=1, images_per_worker=2, num_workers=2)
    with pytest.raises(AssertionError):  # that there is no checkpoint
        local.run(config)
    ids = PreparedDataset(config.data).image_ids
    assert local.passes == [[ids[index] for index in step[2:]] for step in batches(NUM_IMAGES, 4, config.seed, 0)]
    assert [checkpoint for _, checkpoint in reported] == [None]


def test_precomputed_logits_cannot_be_trained_through_the_network() -> None:
    with pytest.raises(ValueError, match=r"train_through: expected a model\.semantic for 'network', got 'logits'"):
        TrainConfig("data", "out", train_through="network")
    with pytest.raises(ValueError, match=r"frozen_stages: expected 0 to 0 with model\.semantic 'logits', got 2"):
        TrainConfig("data", "out", frozen_stages=2)
    with pytest.raises(ValueError, match="frozen_stages: expected 0 to 5"):
        TrainConfig("data", "out", frozen_stages=6, model=ModelConfig(semantic="fcn8s"))

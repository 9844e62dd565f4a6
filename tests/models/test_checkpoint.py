from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from instseg.config import InstanceCrfConfig, ModelConfig
from instseg.models import checkpoint as module
from instseg.models.checkpoint import (
    check_classes,
    epoch_folder,
    find_checkpoint,
    from_json,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from instseg.models.network import InstanceNetwork
from instseg.storage import Place, StoragePath

MODEL = ModelConfig(instance_crf=InstanceCrfConfig(num_iterations=7))


def save(run: Place, epoch: int, num_labels: int = 4) -> InstanceNetwork:
    torch.manual_seed(epoch)
    network = InstanceNetwork(MODEL, num_labels)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand_like(parameter))
    config = {"model": asdict(MODEL), "num_labels": num_labels}
    save_checkpoint(epoch_folder(run, epoch), network.state_dict(), config, state={"epoch": epoch})
    return network


def test_a_network_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, 1)
    network = save(tmp_path, 2)
    for path in (tmp_path, epoch_folder(tmp_path, 2)):
        loaded = InstanceNetwork.load(path)
        assert loaded.config == MODEL
        assert not loaded.training
        torch.testing.assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)


def test_other_settings_may_be_run_with_the_same_weights(tmp_path: Path) -> None:
    save(tmp_path, 1)
    config = replace(MODEL, background="literal", score="mask")
    assert InstanceNetwork.load(tmp_path, config).config == config


@pytest.mark.parametrize("torn", ["model.safetensors", "config.json", "manifest.json", "state.json"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = epoch_folder(tmp_path, 2) / torn
    path.publish(path.read_bytes()[:-2])
    assert find_checkpoint(tmp_path).state == {"epoch": 1}
    (warning,) = caplog.messages
    assert f"checkpoint {epoch_folder(tmp_path, 2)}" in warning
    assert torn in warning


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("written", range(5))
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_killed_writer_leaves_the_checkpoint_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    kind: str,
    written: int,
    again: bool,
) -> None:
    """Killed before any of its five files, on its first attempt or when it replaces what is there."""
    run = StoragePath.of(tmp_path)
    if kind == "s3":
        run = StoragePath.of(request.getfixturevalue("s3")("checkpoints")) / f"{written}_{again}"
    save(run, 1)
    if again:
        save(run, 2)
    real, calls = StoragePath.publish_file, []

    def killed(self: StoragePath, source: Path) -> None:
        calls.append(self.name)
        if len(calls) > written:
            raise Killed
        real(self, source)

    monkeypatch.setattr(StoragePath, "publish_file", killed)
    with pytest.raises(Killed):
        save(run, 2)
    assert latest_checkpoint(run).state == {"epoch": 1}  # pyright: ignore[reportOptionalMemberAccess]
    assert not [
        record for record in caplog.records if record.name.startswith("instseg")
    ]  # what a killed process leaves behind is no damage
    monkeypatch.undo()
    save(run, 2)  # what was left over is no obstacle
    assert find_checkpoint(run).state == {"epoch": 2}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3, 10):
        save(tmp_path, epoch)
    (epoch_folder(tmp_path, 2) / "manifest.json").delete()
    prune_checkpoints(StoragePath.of(tmp_path), keep=2)
    assert (StoragePath.of(tmp_path) / "checkpoints").folders() == ["epoch_0003", "epoch_0010"]


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save(tmp_path, 1)
    assert raised.value.errno == errno.ENOSPC
    assert "model.safetensors" in raised.value.filename


def test_the_first_class_that_differs_is_named(tmp_path: Path) -> None:
    save_checkpoint(epoch_folder(tmp_path, 1), {}, {"classes": ["background", "cat", "dog"]})
    checkpoint = find_checkpoint(tmp_path)
    check_classes(checkpoint, ("background", "cat", "dog"))
    with pytest.raises(ValueError, match="was trained with class 1 = 'cat', in the data it is 'dog'"):
        check_classes(checkpoint, ("background", "dog", "cat"))
    with pytest.raises(ValueError, match="has 3 labels, the data has 2"):
        check_classes(checkpoint, ("background", "cat"))


def test_no_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint there; run workflows/train\.py first"):
        InstanceNetwork.load(tmp_path)


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (epoch_folder(tmp_path, 1) / "model.safetensors").publish(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or missing"):
        InstanceNetwork.load(epoch_folder(tmp_path, 1))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="has 4 labels, the data has 21"):
        InstanceNetwork.load(tmp_path, num_labels=21)
    with pytest.raises(ValueError, match=r"trained with model\.semantic 'logits', not 'fcn8s'"):
        InstanceNetwork.load(tmp_path, replace(MODEL, semantic="fcn8s"))


@pytest.mark.parametrize("has_head", [True, False])
def test_a_detection_head_comes_back_and_is_neither_made_up_nor_dropped(tmp_path: Path, has_head: bool) -> None:
    model = replace(MODEL, detection_head=has_head)
    network = InstanceNetwork(model, 4)
    config = {"model": asdict(model), "num_labels": 4}
    save_checkpoint(epoch_folder(tmp_path, 1), network.state_dict(), config)
    loaded = InstanceNetwork.load(tmp_path)
    assert (loaded.detection_head is not None) == has_head
    torch.testing.assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"trained with model.detection_head {has_head}, not {not has_head}"):
        InstanceNetwork.load(tmp_path, replace(model, detection_head=not has_head))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, tensor: {}, "{name} is missing"),
        (lambda name, tensor: {name: tensor[None]}, r"size mismatch for {name}: .* torch.Size\(\[1,.* from checkpoint"),
        (lambda name, tensor: {name: tensor, "extra": tensor.clone()}, "extra is not part of the network"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    state = InstanceNetwork(MODEL, 4).state_dict()
    name = next(iter(state))
    state |= change(name, state.pop(name))
    save_checkpoint(epoch_folder(tmp_path, 1), state, {"model": asdict(MODEL), "num_labels": 4})
    with pytest.raises(ValueError, match="another architecture: .*" + message.format(name=name)):
        InstanceNetwork.load(tmp_path)


def test_configuration_survives_json() -> None:
    assert from_json(ModelConfig, json.loads(json.dumps(asdict(MODEL)))) == MODEL
    with pytest.raises(ValueError, match="ModelConfig: unknown 'colour'"):
        from_json(ModelConfig, {"colour": "red"})

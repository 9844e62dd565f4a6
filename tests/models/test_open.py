from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from instseg.config import ModelConfig
from instseg.models.checkpoint import epoch_folder, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.models.open import open_semantic

CLASSES = ("background", "cat", "dog")
NAME = "lraspp_mobilenet_v3_large"


def trained(run: Path, semantic: str) -> InstanceNetwork:
    torch.manual_seed(0)
    model = ModelConfig(semantic=semantic)
    network = InstanceNetwork(model, 3).eval()
    config = {"model": asdict(model), "num_labels": 3, "classes": list(CLASSES)}
    save_checkpoint(epoch_folder(run, 1), network.state_dict(), config)
    return network


def test_a_name_is_a_network_in_evaluation_mode() -> None:
    network = open_semantic(NAME, CLASSES)
    assert not any(module.training for module in network.modules())
    assert network.coarse_logits(torch.rand(3, 40, 48) * 255).shape[0] == 3


def test_an_untrained_network_is_not_taken() -> None:
    with pytest.raises(ValueError, match=r"^semantic: expected a checkpoint of a trained one, .* got the name 'fcn8s'"):
        open_semantic("fcn8s", CLASSES, "default")


@pytest.mark.parametrize("place", ["run", "checkpoint", "uri", "relative"])
def test_a_checkpoint_is_the_network_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    peer = trained(tmp_path / "run", NAME).semantic
    assert peer is not None
    monkeypatch.chdir(tmp_path)
    places = {
        "run": str(tmp_path / "run"),
        "checkpoint": str(epoch_folder(tmp_path / "run", 1)),
        "uri": (tmp_path / "run").as_uri(),
        "relative": "run",
    }
    network = open_semantic(places[place], CLASSES)
    assert not any(module.training for module in network.modules())
    image = torch.rand(3, 40, 48) * 255
    torch.testing.assert_close(network.coarse_logits(image), peer.coarse_logits(image), rtol=0, atol=0)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, NAME)
    with pytest.raises(ValueError, match="class 1 = 'cat', in the data it is 'dog'"):
        open_semantic(str(tmp_path), ("background", "dog", "cat"))
    with pytest.raises(ValueError, match="has 3 labels, the data has 2"):
        open_semantic(str(tmp_path), CLASSES[:2])


def test_what_has_no_semantic_network_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "logits")
    for source in ("logits", str(tmp_path)):
        with pytest.raises(ValueError, match=f"semantic {source}: expected a semantic network, got 'logits'"):
            open_semantic(source, CLASSES)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no complete checkpoint there"):
        open_semantic(str(tmp_path / "absent"), CLASSES)
    with pytest.raises(ValueError, match=f"unknown network 'lraspp_mobilenet'; did you mean '{NAME}'"):
        open_semantic("lraspp_mobilenet", CLASSES)
    trained(tmp_path, NAME)
    with pytest.raises(ValueError, match="semantic_weights: expected none beside the checkpoint"):
        open_semantic(str(tmp_path), CLASSES, "weights.pth")

"""The whole method as one call: from probabilities, with a network of one's own, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import count, repeat

import numpy as np
import pytest
import torch

from instseg import InstanceNetwork, ModelConfig, segment_instances
from instseg.models.checkpoint import save_checkpoint
from instseg.models.segment import _hand_set
from tests.models.test_network import detections_of, two_squares


@pytest.fixture
def inputs():
    sample = two_squares(detections_of((1, 0.9, (3, 6, 13, 18)), (1, 0.6, (19, 6, 29, 18)), foregrounds=False))
    return sample.image, torch.from_numpy(sample.logits).float().softmax(0).numpy(), sample.detections


def test_from_probabilities_with_grabcut(inputs):
    image, probabilities, detections = inputs
    found = segment_instances(*inputs)
    assert found.labels.tolist() == [1, 1]
    with pytest.raises(ValueError, match="semantic_probabilities: expected finite"):
        segment_instances(image, probabilities * np.nan, detections)
    with pytest.raises(ValueError, match=r"labels\[0\]: expected a class in 1..1, got 2"):
        segment_instances(image, probabilities[:2], detections_of((2, 0.9, (3, 6, 13, 18))))
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected inside the 32x24 image"):
        segment_instances(image, probabilities, detections_of((1, 0.9, (3, 6, 99, 18)), foregrounds=False))


def test_a_network_of_ones_own_is_used(inputs):
    """One that lets the pixels' agreement with a detection speak against it."""
    network = InstanceNetwork(ModelConfig(), 3)
    with torch.no_grad():
        network.semantic_crf.detection_weight_y.neg_()
    sample = replace(two_squares(inputs[2]), logits=np.log(inputs[1]))
    foregrounds = inputs[2].box_masks(*sample.image.shape[:2])
    sample = replace(sample, detections=replace(inputs[2], foregrounds=foregrounds))
    expected = network.instance_map(network(sample))
    found = segment_instances(sample.image, inputs[1], sample.detections, network)
    np.testing.assert_array_equal(found.instances, expected.instances)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    assert not np.allclose(found.scores, segment_instances(sample.image, inputs[1], sample.detections).scores, atol=0.1)


def test_a_detection_head_cannot_be_set_by_hand(inputs):
    with pytest.raises(ValueError, match="detection_head: expected False without a trained network, got True"):
        segment_instances(*inputs, config=ModelConfig(detection_head=True))
    torch.manual_seed(0)
    network = InstanceNetwork(ModelConfig(detection_head=True), 3).eval()
    assert segment_instances(*inputs, network=network).instances.shape == inputs[0].shape[:2]


def test_the_hand_set_network_is_kept_between_calls(inputs, monkeypatch):
    _hand_set.cache_clear()
    built, build = [], InstanceNetwork.__init__
    monkeypatch.setattr(InstanceNetwork, "__init__", lambda self, *a: (built.append(a), build(self, *a))[1])
    for config in (None, ModelConfig(), None, ModelConfig(score="mask")):
        segment_instances(*inputs, config=config)
    assert built == [(ModelConfig(), 3), (ModelConfig(score="mask"), 3)]


def test_a_semantic_network_is_not_ignored(inputs):
    with pytest.raises(ValueError, match="semantic: expected 'logits' beside semantic_probabilities, got 'fcn8s'"):
        segment_instances(*inputs, config=ModelConfig(semantic="fcn8s"))
    network = InstanceNetwork(ModelConfig(), 3)
    network.config = ModelConfig(semantic="fcn8s")
    with pytest.raises(ValueError, match="semantic: expected 'logits' beside semantic_probabilities, got 'fcn8s'"):
        segment_instances(*inputs, network=network)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_network_that_does_not_fit_is_refused(inputs):
    network = InstanceNetwork(ModelConfig(), 4)
    with pytest.raises(ValueError, match="semantic_probabilities: expected 4 labels as the network, got 3"):
        segment_instances(*inputs, network=network)
    with pytest.raises(ValueError, match="config: expected None beside a network"):
        segment_instances(*inputs, network=InstanceNetwork(ModelConfig(), 3), config=ModelConfig())
    with pytest.raises(ValueError, match="network: expected an InstanceNetwork, got ModelConfig"):
        segment_instances(*inputs, network=ModelConfig())  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("without_shape_checks")
def test_what_numpy_reads_is_used(inputs):
    image, probabilities, detections = inputs
    expected = segment_instances(*inputs)
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    found = segment_instances(flipped, probabilities.astype(">f8").tolist(), replace(detections, labels=[1, 1]))
    np.testing.assert_array_equal(found.instances, expected.instances)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, None, r"image: expected \(H, W, 3\) uint8, got None"),
        (0, np.zeros((24, 32, 3), np.uint16), "image: expected dtype uint8, RGB 0..255, got uint16"),
        (0, torch.zeros(3, 24, 32, dtype=torch.uint8), r"image: expected shape \(H, W, 3\) .*, got \(3, 24, 32\)"),
        (1, None, r"semantic_probabilities: expected shape \(L, h, w\) with L >= 2, got None"),
        (1, np.zeros((3, 0, 4)), r"semantic_probabilities: expected shape .*, got \(3, 0, 4\)"),
        (1, np.zeros((24, 32)), r"semantic_probabilities: expected shape .*, got \(24, 32\)"),
        (2, [], "detections: expected instseg.Detections, got list"),
        (2, None, "detections: expected instseg.Detections, got NoneType"),
    ],
)
def test_input_that_cannot_be_used_is_named(inputs, position, value, message):
    arguments = list(inputs)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        segment_instances(*arguments)


@pytest.fixture
def run(inputs, tmp_path):
    """A checkpoint of a network that takes logits."""
    network = InstanceNetwork(ModelConfig(), 3)
    save_checkpoint(tmp_path, network.state_dict(), {"model": asdict(ModelConfig()), "num_labels": 3})
    return tmp_path


def test_a_loaded_network_segments_an_image(inputs, run):
    image, probabilities, detections = inputs
    expected = segment_instances(*inputs)
    logits = np.log(probabilities)
    for network, given in (
        (InstanceNetwork.load(run), detections),
        (InstanceNetwork.load(f"file://{run}", detector=lambda _: detections), None),
    ):
        found = network.segment(image, given, logits)
        np.testing.assert_array_equal(found.instances, expected.instances)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_a_detector_that_is_a_module_is_no_part_of_the_network(inputs, run):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image):
            return inputs[2]

    network = InstanceNetwork.load(run, detector=Constant())
    assert network.state_dict().keys() == InstanceNetwork.load(run).state_dict().keys()
    assert len(network.segment(inputs[0], logits=np.log(inputs[1]))) == 2


@pytest.mark.usefixtures("without_shape_checks")
def test_what_segment_lacks_is_named(inputs, run):
    image, probabilities, detections = inputs
    network, logits = InstanceNetwork.load(run), np.log(probabilities)
    with pytest.raises(ValueError, match=r"detections: expected Detections \(.*detector=…\), got none"):
        network.segment(image, logits=logits)
    with pytest.raises(ValueError, match=r"logits: expected \(L, h, w\) with model.semantic 'logits', got none"):
        network.segment(image, detections)
    with pytest.raises(ValueError, match=r"detections: expected instseg.Detections, got list"):
        network.segment(image, [], logits)  # pyright: ignore[reportArgumentType]


def test_frames_go_in_and_come_out_one_by_one(inputs, run):
    image, probabilities, detections = inputs
    network, taken = InstanceNetwork.load(run, detector=lambda _: detections), []

    def camera():
        for number in count():
            taken.append(number)
            yield np.roll(image, number, axis=1)

    expected = network.segment(image, detections, np.log(probabilities))
    results = network.segment_frames(camera(), logits=repeat(np.log(probabilities)))
    assert taken == []
    np.testing.assert_array_equal(next(results).instances, expected.instances)
    assert taken == [0]
    next(results)
    assert taken == [0, 1]
    short = network.segment_frames([image, image], detections=[detections], logits=repeat(np.log(probabilities)))
    next(short)
    with pytest.raises(ValueError, match="frame 1: expected detections and logits of each frame, got no more"):
        next(short)

"""The network of Figure 2: semantic source -> higher-order CRF -> identification (Eq. 4) -> instance CRF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from instseg.checks import require
from instseg.config import FULL, Ablation, GrabCutConfig, ModelConfig
from instseg.crf.higher_order import HigherOrderCRF
from instseg.crf.identify import assign_naively, identify, identify_by_foreground
from instseg.crf.instance import InstanceCRF
from instseg.crf.pairwise import Kernels, build_kernels
from instseg.models.checkpoint import Checkpoint, find_checkpoint, from_json
from instseg.models.detection_head import DetectionHead, DetectionTensors, SeenDetections
from instseg.models.semantic import build_semantic
from instseg.models.weights import load_weights
from instseg.shapes import Float
from instseg.storage import Place
from instseg.structures import Detections, InstanceMap, Sample

_MIN_PRIOR = 1e-6  # as a score, which is greater than 0
FindObjects = Callable[[np.ndarray], Detections]  # a detector: of an (H, W, 3) uint8 RGB image


class NetworkOutput(NamedTuple):
    """What one image yields; all but `detections` is differentiable.

    Attributes:
        detections: What went in.
        semantic_logits: (L, H, W) of the semantic source, before the CRF.
        log_q: (L, H, W) class log marginals after the semantic CRF.
        validity: (D,) Pr(Y_d = 1), the recalibrated scores; the detector's in the ablations that ignore Y.
        instance_log_q: (D+1, H, W) instance log marginals, 0 background, k = detection k-1; after a naive assignment
            0 and minus infinity.
    """

    detections: DetectionTensors
    semantic_logits: Float[Tensor, "L H W"]
    log_q: Float[Tensor, "L H W"]
    validity: Float[Tensor, " D"]
    instance_log_q: Float[Tensor, "D+1 H W"]


class InstanceNetwork(nn.Module):
    """Instance segmentation of one image at a time, of any size and with any number of detections.

    Args:
        config: Semantic source and CRFs.
        num_labels: L, background included.
    """

    def __init__(self, config: ModelConfig, num_labels: int) -> None:
        super().__init__()
        self.config = config
        self.num_labels = num_labels
        self.semantic = build_semantic(
            config.semantic,
            num_labels,
            config.semantic_weights,
            config.fcn_width,
            config.fcn_stride,
            config.fcn_padding,
        )
        self.detection_head = DetectionHead(num_labels) if config.detection_head else None
        self.semantic_crf = HigherOrderCRF(num_labels, config.semantic_crf)
        self.instance_crf = InstanceCRF(config.instance_crf)
        self.find_objects: FindObjects | None = None  # what `segment` asks for detections that it is not given

    @staticmethod
    def load(
        path: Place,
        config: ModelConfig | None = None,
        num_labels: int | None = None,
        detector: FindObjects | None = None,
    ) -> InstanceNetwork:
        """A trained network, in evaluation mode, on the CPU.

        Args:
            path: A checkpoint, or a run directory, whose latest complete checkpoint is meant; a folder or a URI.
            config: Settings to run it with; default: those it was trained with.
            num_labels: The number of labels of the data it is meant for; default: any.
            detector: For `segment`, such as an `instseg.models.detectors.Detector`, which stays on its own device.

        Raises:
            FileNotFoundError: If there is no complete checkpoint.
            ValueError: If it is damaged, or of another architecture than asked for.
        """
        checkpoint = find_checkpoint(path)
        trained = checkpoint.config
        expected = trained["num_labels"] if num_labels is None else num_labels
        if trained["num_labels"] != expected:
            raise ValueError(f"checkpoint {path}: has {trained['num_labels']} labels, the data has {expected}")
        model = from_json(ModelConfig, trained["model"])
        config = model if config is None else config
        for name in ("semantic", "detection_head"):
            got, wanted = getattr(model, name), getattr(config, name)
            if got != wanted:
                raise ValueError(f"checkpoint {path}: was trained with model.{name} {got!r}, not {wanted!r}")
        # The checkpoint replaces the weights that training started from, whose file may be gone.
        network = InstanceNetwork(replace(config, semantic_weights=None), expected)
        network.restore(checkpoint)
        # Its call, because a module would become a part of this one, and of its state dict.
        network.find_objects = None if detector is None else detector.__call__
        return network.eval()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights.

        Raises:
            ValueError: If the checkpoint is of another architecture, naming the tensors that differ.
        """
        load_weights(self, checkpoint.model(), f"checkpoint {checkpoint.folder}: is of another architecture")

    def crf_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of both CRFs."""
        yield from self.semantic_crf.parameters()
        yield from self.instance_crf.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the detection head; none without one."""
        if self.detection_head is not None:
            yield from self.detection_head.parameters()

    def semantic_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the semantic network; none with precomputed logits."""
        if self.semantic is not None:
            yield from self.semantic.parameters()

    def forward(
        self, sample: Sample, ablation: Ablation = FULL, logits: Float[Tensor, "L H W"] | None = None
    ) -> NetworkOutput:
        """Run Figure 2, or what `ablation` leaves of it, on one sample.

        Args:
            sample: The image, its detections, and logits where the network is to take them from there.
            ablation: What takes part.
            logits: (L, H, W) instead of `semantic_logits(sample)`.

        Raises:
            ValueError: If the sample lacks what the configuration needs, or does not fit the label set.
        """
        height, width = sample.image.shape[:2]
        logits = self.semantic_logits(sample) if logits is None else logits
        detections = self.detections(sample, logits, ablation)
        image = self._tensor(sample.image)
        kernels = build_kernels(image, self.config.semantic_crf.kernels)
        log_q, validity = self._semantic_crf(logits, kernels, detections, ablation)
        instance_log_q = self._instance_crf(log_q, validity, detections, ablation, image, kernels)
        return NetworkOutput(
            detections,
            logits,
            log_q.T.unflatten(1, (height, width)),
            validity,
            instance_log_q.T.unflatten(1, (height, width)),
        )

    def detections(self, sample: Sample, logits: Float[Tensor, "L H W"], ablation: Ablation = FULL) -> DetectionTensors:
        """The sample's detections with what takes part of them: of the detection head, else of the sample.

        Args:
            sample: The image and its detections.
            logits: (L, H, W), `semantic_logits`.
            ablation: What takes part.

        Raises:
            ValueError: If they do not fit the image or the label set.
        """
        height, width = sample.image.shape[:2]
        given = sample.detections
        given.check_image(height, width, self.num_labels)
        seen = foregrounds = None
        if ablation.detection_potentials and ablation.detection_head and self.detection_head is not None:
            seen = self.see_detections(sample, logits)
            foregrounds = seen.foregrounds(given, height, width)
        elif ablation.detection_potentials and given.foregrounds is not None:
            foregrounds = self._tensor(given.foregrounds).flatten(1)
        return DetectionTensors(
            labels=self._tensor(given.labels, torch.int64),
            scores=self._tensor(given.scores),
            boxes=self._tensor(given.box_masks(height, width), torch.bool).flatten(1),
            foregrounds=foregrounds,
            seen=seen,
        )

    def see_detections(
        self, sample: Sample, logits: Float[Tensor, "L H W"], with_gradient: np.ndarray | None = None
    ) -> SeenDetections:
        """What the detection head makes of the sample's detections.

        Args:
            sample: The image and its detections.
            logits: (L, H, W), `semantic_logits`.
            with_gradient: As of `DetectionHead`.

        Raises:
            ValueError: If the network has none.
        """
        if self.detection_head is None:
            raise ValueError("detection_head: expected a network with one, got one without")
        return self.detection_head(self._tensor(sample.image), logits, sample.detections, with_gradient)

    @torch.no_grad()
    def as_given(self, sample: Sample, logits: Float[Tensor, "L H W"]) -> Sample:
        """The sample with what the detection head makes of its detections as if that had come with them.

        Foregrounds are where F_d is more likely than not, scores the priors of Y_d.
        """
        detections = self.detections(sample, logits)
        if detections.seen is None or detections.foregrounds is None:
            return sample
        given, size = sample.detections, sample.image.shape[:2]
        foregrounds = (detections.foregrounds > 0.5).unflatten(1, size).cpu().numpy()
        priors = detections.prior.clamp(min=_MIN_PRIOR).cpu().numpy()
        return replace(sample, detections=replace(given, scores=priors, foregrounds=foregrounds))

    def semantic_logits(self, sample: Sample) -> Float[Tensor, "L H W"]:
        """(L, H, W): the semantic network's, or the sample's own brought to the image's size.

        Raises:
            ValueError: If there is no semantic network and the sample lacks logits of the label set.
        """
        if self.semantic is not None:
            return self.semantic(self._tensor(sample.image).permute(2, 0, 1))
        if sample.logits is None:
            raise ValueError(
                f"{sample.image_id}: the sample has no logits; prepare the data with --logits, or choose a semantic "
                "network with --model.semantic"
            )
        if len(sample.logits) != self.num_labels:
            raise ValueError(f"{sample.image_id}: logits: expected {self.num_labels} classes, got {len(sample.logits)}")
        logits = self._tensor(sample.logits)
        return interpolate(logits[None], size=sample.image.shape[:2], mode="bilinear", align_corners=False)[0]

    def _semantic_crf(
        self, logits: Float[Tensor, "L H W"], kernels: Kernels, detections: DetectionTensors, ablation: Ablation
    ) -> tuple[Float[Tensor, "H*W L"], Float[Tensor, " D"]]:
        """Log Q (N, L) and the validity (D,) that identification uses."""
        unary = -logits.flatten(1).T.contiguous()
        if not ablation.detection_potentials:
            return self.semantic_crf(unary, kernels, None).log_q, detections.scores
        if detections.foregrounds is None:
            raise ValueError("detections: expected foregrounds, got None; compute them with compute_foregrounds")
        potential = self.semantic_crf.potential(detections.labels, detections.prior, detections.foregrounds)
        state = self.semantic_crf(unary, kernels, potential)
        assert state.validity is not None  # for type checkers: there are detection potentials
        return state.log_q, state.validity if ablation.validity else detections.scores

    def _instance_crf(
        self,
        log_q: Float[Tensor, "N L"],
        validity: Float[Tensor, " D"],
        detections: DetectionTensors,
        ablation: Ablation,
        image: Float[Tensor, "H W 3"],
        kernels: Kernels,
    ) -> Float[Tensor, "N D+1"]:
        """Log Q(v) (N, D+1), from identification or the naive assignment on."""
        labels = detections.labels
        if not ablation.identification:
            winners = assign_naively(log_q.argmax(1), validity, labels, detections.boxes)
            return one_hot(winners, len(labels) + 1).to(log_q).log()
        q, foregrounds = log_q.exp(), detections.foregrounds
        if ablation.shape and self.detection_head is not None and foregrounds is not None:
            log_pr = identify_by_foreground(q, validity, labels, foregrounds, self.config.map_weight)
        else:
            log_pr = identify(q, validity, labels, detections.boxes, self.config.background)
        if not ablation.instance_crf:
            return log_pr
        if self.config.instance_crf.kernels != self.config.semantic_crf.kernels:
            kernels = build_kernels(image, self.config.instance_crf.kernels)
        return self.instance_crf(-log_pr, kernels)

    @torch.no_grad()
    def instance_map(self, output: NetworkOutput, ablation: Ablation = FULL) -> InstanceMap:
        """The final segmentation: every pixel's most likely instance, instances that win no pixel dropped.

        An instance has the class of its detection and is ranked by its validity or by the mean of Q_i(l_k) over its
        mask (ALGORITHM section 6), as `config.score` says; where an ablation ignores Y, by the detector's score.

        Args:
            output: What `forward` returned.
            ablation: What it was called with.
        """
        semantic, labels = output.log_q.argmax(0), output.detections.labels
        winners = output.instance_log_q.argmax(0)
        present = winners.unique()
        present = present[present > 0]
        renumber = torch.zeros(len(labels) + 1, dtype=torch.int32, device=winners.device)
        renumber[present] = torch.arange(1, len(present) + 1, dtype=torch.int32, device=winners.device)
        kept = present - 1
        scores = output.validity[kept]
        if self.config.score == "mask" and ablation.detection_potentials and ablation.validity:
            q = output.log_q.exp()
            means = [q[labels[index]][winners == index + 1].mean() for index in kept]
            scores = torch.stack(means) if means else scores
        return InstanceMap(
            instances=renumber[winners].cpu().numpy(),
            labels=labels[kept].cpu().numpy(),
            scores=scores.float().cpu().numpy(),
            detection_indices=kept.cpu().numpy(),
            semantic=semantic.to(torch.uint8).cpu().numpy(),
        )

    @torch.no_grad()
    def segment(
        self, image: np.ndarray, detections: Detections | None = None, logits: np.ndarray | None = None
    ) -> InstanceMap:
        """Segment one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            detections: What a detector found; default: what the one that the network was loaded with finds. Where
                they have no foregrounds, and the network has no detection head, GrabCut's are computed.
            logits: (L, h, w) float of a semantic network at any resolution; none where this one has its own.

        Raises:
            ValueError: If there is nothing to take detections or logits from, or they do not fit the image or network.
        """
        if detections is None:
            advice = "give some, or load the network with detector=…"
            require(self.find_objects is not None, "detections", f"Detections ({advice})", "none, and no detector")
            assert self.find_objects is not None  # for type checkers
            detections = self.find_objects(image)
        require(isinstance(detections, Detections), "detections", "instseg.Detections", type(detections).__name__)
        own = f"{'(L, h, w)' if self.semantic is None else 'none'} with model.semantic {self.config.semantic!r}"
        require((logits is None) == (self.semantic is not None), "logits", own, "none" if logits is None else "some")
        sample = Sample("image", image, detections, logits=logits)
        height, width = sample.image.shape[:2]
        detections.check_image(height, width, self.num_labels)
        if detections.foregrounds is None and self.detection_head is None:
            from instseg.data.foreground import compute_foregrounds  # OpenCV, only where it is needed

            found, _ = compute_foregrounds(sample.image, detections, "", GrabCutConfig())
            sample = replace(sample, detections=found)
        return self.instance_map(self(sample))

    def segment_frames(
        self,
        frames: Iterable[np.ndarray],
        detections: Iterable[Detections] | None = None,
        logits: Iterable[np.ndarray] | None = None,
    ) -> Iterator[InstanceMap]:
        """Segment the frames of a video, each for itself: one is taken when its result is asked for, and none is kept.

        Args:
            frames: As `image` of `segment`, of any sizes, and as many as there come.
            detections: Those of each frame; default: of the network's detector.
            logits: Those of each frame; none where this network has its own.

        Raises:
            ValueError: As `segment`; or if there are fewer detections or logits than frames.
        """
        found, scores = (repeat(None) if each is None else iter(each) for each in (detections, logits))
        for index, image in enumerate(frames):
            try:
                given: tuple[Any, Any] = next(found), next(scores)
            except StopIteration:
                raise ValueError(f"frame {index}: expected detections and logits of each frame, got no more") from None
            yield self.segment(image, *given)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """NumPy to torch, on the parameters' device and by default in their dtype: the one border between the two."""
        reference = self.instance_crf.spatial_weight
        return torch.from_numpy(np.ascontiguousarray(array)).to(reference.device, dtype or reference.dtype)

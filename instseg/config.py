"""Complete typed configurations. Units are in the comments; checks of ranges and across fields in `__post_init__`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from instseg.checks import choice, fields_as_declared, finite, non_negative, positive, require, unit_interval

Accuracy = Literal["fast", "ring", "exact"]
Normalization = Literal["after", "symmetric", "none"]
DetectionForm = Literal["decoupled", "tied"]
ValidityUnary = Literal["logit", "linear"]
Background = Literal["rescored", "literal"]
Score = Literal["validity", "mask"]
InstanceLoss = Literal["iou", "log"]
TrainThrough = Literal["network", "semantic_crf", "instance_crf"]
MatchingRule = Literal["sds", "authors", "voc07"]
Device = Literal["auto", "cpu", "gpu"]
DataSetName = Literal["voc", "sbd", "coco-train2014", "coco-val2014", "coco-train2017", "coco-val2017"]


class _Checked:
    """A record whose numbers are finite and whose choices exist."""

    def __post_init__(self) -> None:
        fields_as_declared(self)


@dataclass(frozen=True)
class KernelConfig(_Checked):
    """The Gaussian kernels of the pairwise term (paper 3.1)."""

    theta_alpha: float = 49.0  # bilateral, pixels
    theta_beta: float = 5.0  # bilateral, RGB levels 0..255
    theta_gamma: float = 3.0  # spatial, pixels
    normalization: Normalization = "after"
    # "fast": the lattice of the reference library; "ring": with the vertices next to those that pixels touch, more
    # exact for more memory and time; "exact": brute force, quadratic in pixels. The README has the figures.
    accuracy: Accuracy = "fast"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("theta_alpha", "theta_beta", "theta_gamma"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class SemanticCrfConfig(_Checked):
    """The higher-order semantic CRF (paper 3.2). Weights are the values that training starts from."""

    kernels: KernelConfig = field(default_factory=KernelConfig)
    spatial_weight: float = 1.0
    bilateral_weight: float = 3.0
    # "decoupled": w_x moves pixels and w_y moves Y; "tied": the literal Eq. 2, where w_y serves as its one weight w.
    detection_form: DetectionForm = "decoupled"
    detection_weight_x: float = 2.0  # w_x
    detection_weight_y: float = 8.0  # w_y
    validity_unary: ValidityUnary = "logit"  # Y_d starts at the log-odds of its prior s, or at 2s - 1
    num_iterations: int = 5  # 0 leaves the network's probabilities and the detector's scores as they are

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("num_iterations", self.num_iterations)


@dataclass(frozen=True)
class InstanceCrfConfig(_Checked):
    """The instance CRF (paper 3.3, Eq. 5): class-agnostic, Potts."""

    kernels: KernelConfig = field(default_factory=KernelConfig)
    spatial_weight: float = 3.0
    bilateral_weight: float = 4.0
    num_iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("num_iterations", self.num_iterations)


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The network of Figure 2."""

    semantic: str = "logits"  # "logits" (precomputed), "fcn8s", or a torchvision segmentation model by name
    # A state dict, .safetensors or .pth; for "fcn8s" of VGG-16. "default" is torchvision's. Unset: random.
    semantic_weights: str | None = None
    fcn_width: int = 4096  # channels of fc6 and fc7 of "fcn8s"; with others than VGG-16's 4096 both start at random
    fcn_stride: Literal[8, 16, 32] = 8  # of the finest scores of "fcn8s": 32, 16 and 8 are trained one after the other
    fcn_padding: Literal[1, 100] = 100  # of the image in "fcn8s": 100 as published; 1 (fc6 by 3) costs less than half
    # Learn F_d and the prior of Y_d from each detection's crop, and let F_d stand for B_d in Eq. 4. Else F_d is that of
    # the data, the prior is the detector's score, and Eq. 4 is the paper's.
    detection_head: bool = False
    semantic_crf: SemanticCrfConfig = field(default_factory=SemanticCrfConfig)  # paper 3.2
    instance_crf: InstanceCrfConfig = field(default_factory=InstanceCrfConfig)  # paper 3.3, Eq. 5
    background: Background = "rescored"  # channel d0 inside boxes, ALGORITHM section 4
    map_weight: float = 0.05  # exponent of Q_i(l_k) in Eq. 4 where a detection head's F_d stands for B_d; else 1
    score: Score = "validity"  # what instances are ranked by, ALGORITHM section 6

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("map_weight", self.map_weight)
        positive("fcn_width", self.fcn_width)


@dataclass(frozen=True)
class Ablation(_Checked):
    """Which parts of the method take part: all of them, unless told otherwise."""

    detection_potentials: bool = True  # psi_d of Eq. 2
    validity: bool = True  # Pr(Y_d) replaces the detector's score, after inference
    detection_head: bool = True  # what the model learned of each detection, where it did; else F_d of the data
    shape: bool = True  # F_d of the detection head for B_d in Eq. 4
    identification: bool = True  # Eq. 4; else the naive assignment of section 3.3
    instance_crf: bool = True  # Eq. 5, after identification


FULL = Ablation()


@dataclass(frozen=True)
class FetchConfig(_Checked):
    """workflows/fetch.py: published data sets become folders of photographs and ground truth."""

    out: str  # a folder of this machine, which gets VOCdevkit/VOC2012/ sbd/ coco/
    # Downloads of 2.0 GB (VOC 2012), 1.4 (SBD), 13.5 and 6.6 (COCO 2014: train, val), 19.3 and 0.8 (COCO 2017), 0.25
    # for the annotations of each year of COCO.
    datasets: tuple[DataSetName, ...] = ("voc", "sbd")
    # Folders, as http://, https:// or file://, that have the files under their own names; tried in turn, before the
    # official places.
    mirrors: tuple[str, ...] = ()
    archives: str | None = None  # a folder of such files, used where they are; what is there is not downloaded
    keep_archives: bool = False  # in OUT/archives, what was downloaded, after it was unpacked

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.datasets) > 0, "datasets", "at least one", "none")
        for name in self.datasets:
            choice("datasets", name, DataSetName)
        for mirror in self.mirrors:
            known = mirror.startswith(("http://", "https://", "file://"))
            require(known, "mirrors", "URLs that begin with http://, https:// or file://", mirror)


@dataclass(frozen=True)
class GrabCutConfig(_Checked):
    """GrabCut for the foreground of each detection (paper 3.2), of which the paper gives no settings.

    What it sees is the box and a margin, made smaller where the box is large. benchmarks/bench_prepare.py shows what
    more of it all costs, and gives.
    """

    num_iterations: int = 1
    box_pixels: int = 16384  # in the box, at most; 16384 is 128 x 128
    margin: float = 0.25  # of the box's sides, on each side

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_iterations", "box_pixels", "margin"):
            positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(_Checked):
    """What prepare and predict have in common: where detections and logits come from, and how images travel.

    Detections and logits are another system's, or of networks that are run here, or there are none.
    """

    detections: str | None = None  # COCO results JSON
    detector: str | None = None  # instead: a Faster R-CNN of torchvision by name, to be run
    detector_weights: str = "default"  # "default": torchvision's, of COCO; or a state dict, .safetensors or .pth
    nms_iou: float = 0.3  # of --detector: of two boxes of a class that overlap more, the better stays
    logits: str | None = None  # folder of <image_id>.npz
    semantic: str | None = (
        None  # instead: a segmentation network of torchvision by name, or a run or checkpoint of ours
    )
    semantic_weights: str | None = None  # as --detector-weights; default: torchvision's, of COCO with VOC's classes
    device: Device = "auto"  # of the networks; "auto": GPUs if there are any, else CPUs
    min_score: float = 0.05  # detections below are left out
    grabcut: GrabCutConfig = field(default_factory=GrabCutConfig)
    shard_size: int = 16  # images per Parquet file, and per task
    max_quarantined: float = 0.01  # share of images; above it the job fails

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_score", "max_quarantined", "nms_iou"):
            unit_interval(name, getattr(self, name))
        positive("shard_size", self.shard_size)
        for network, files in (("detector", "detections"), ("semantic", "logits")):
            both = getattr(self, network) is not None and getattr(self, files) is not None
            require(not both, network, f"no --{files} beside it", getattr(self, network))


@dataclass(frozen=True)
class PrepareConfig(ShardsConfig):
    """workflows/prepare.py: photographs and the outputs of two networks become Parquet shards.

    The photographs are of a VOC devkit, of SBD (with a devkit too, for trainaug), of a COCO-format JSON, or without
    ground truth.
    """

    out: str  # new data directory
    devkit: str | None = (
        None  # a folder with JPEGImages/ SegmentationClass/ SegmentationObject/ ImageSets/Segmentation/
    )
    sbd: str | None = None  # a folder with img/ cls/ inst/ train.txt val.txt
    coco: str | None = None  # instances JSON; the photographs are in --images
    images: str | None = None  # folder; without --coco also a file or a glob
    split: str | None = (
        None  # of --devkit: a name in ImageSets/Segmentation; of --sbd: train, val, train_noval, trainaug
    )
    # "voc", or a text file, one foreground class a line; default: the 20 VOC classes, which are those of --sbd, or all
    # of --coco
    classes: str | None = None
    # Of --coco: images with fewer pixels of the classes are left out; the paper's training set: 200.
    min_pixels: int = 0
    contact_sheet: str | None = None  # folder for what workflows/inspect.py shows of `out`, at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("min_pixels", self.min_pixels)
        roots = [name for name in ("devkit", "sbd", "coco", "images") if getattr(self, name) is not None]
        known = (["devkit"], ["sbd"], ["devkit", "sbd"], ["coco", "images"], ["images"])
        named = " and ".join(roots) or "none of them"
        require(roots in known, "photographs", "--devkit, --sbd (or both), --coco with --images, or --images", named)
        has_splits = self.devkit is not None or self.sbd is not None
        require(has_splits == (self.split is not None), "split", "one with --devkit or --sbd, else none", self.split)
        require(self.sbd is None or self.classes is None, "classes", "none with --sbd, which has VOC's", self.classes)
        require(self.coco is not None or self.min_pixels == 0, "min_pixels", "0 without --coco", self.min_pixels)


PRETRAINED = {"detector": "fasterrcnn_resnet50_fpn", "semantic": "deeplabv3_resnet50"}  # torchvision's, by name


@dataclass(frozen=True)
class PredictConfig(ShardsConfig):
    """workflows/predict.py: photographs become masks: PNGs, and COCO results for all of them."""

    out: str  # new folder
    images: str | None = None  # photographs: a file, a folder and all below it, or a glob; or a URI
    data: str | None = None  # instead: a directory that prepare.py wrote, with its detections and logits
    checkpoint: str | None = None  # a checkpoint or run directory; default: hand-set weights of the CRFs
    # Instead of a checkpoint, "pretrained": torchvision's networks, fasterrcnn_resnet50_fpn and deeplabv3_resnet50
    # where no others are named, and the hand-set weights.
    recipe: Literal["pretrained"] | None = None
    # "voc", or a text file, one foreground class a line; default: the checkpoint's, else VOC's
    classes: str | None = None
    panoptic: bool = False  # also panoptic.json and panoptic/, in COCO's format
    overlays: bool = True  # also the instances drawn over each image
    max_quarantined: float = field(default=0.5, kw_only=True)  # share of images; above it the job fails

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.images is None) != (self.data is None), "photographs", "--images or --data", _both(self.images))
        require(not (self.checkpoint and self.recipe), "recipe", "none beside --checkpoint", self.recipe)
        for name in ("recipe", "detections", "detector", "logits", "semantic", "classes"):
            given = getattr(self, name)
            require(self.data is None or given is None, name, "none with --data, which has been prepared", given)
        for network, files in (("detector", "detections"), ("semantic", "logits")):
            if self.recipe is not None and getattr(self, network) is None and getattr(self, files) is None:
                object.__setattr__(self, network, PRETRAINED[network])
        found = self.data or self.detections or self.detector
        require(bool(found), "detections", f"--detections FILE, --detector {PRETRAINED['detector']}, ...", "neither")
        scores = self.data or self.checkpoint or self.logits or self.semantic
        require(bool(scores), "logits", f"--logits FOLDER, --semantic {PRETRAINED['semantic']}, ...", "neither")


def _both(given: object) -> str:
    return "neither" if given is None else "both"


@dataclass(frozen=True)
class InspectConfig(_Checked):
    """workflows/inspect.py: the contact sheet and the counts of a prepared data directory."""

    data: str  # directory that prepare.py wrote
    out: str  # folder for contact_sheet.png and contact_sheet.html
    num_samples: int = 24  # images of the contact sheet, chosen at random, at most 200
    seed: int = 0  # of that choice

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.num_samples <= 200, "num_samples", "1 to 200 images, as one picture holds", self.num_samples)


@dataclass(frozen=True)
class TrackingConfig(_Checked):
    """Where MLflow records runs."""

    uri: str | None = None  # default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current directory
    experiment: str = "instseg"
    registered_model: str = "instseg"  # each trained network becomes a version of it


@dataclass(frozen=True)
class AugmentConfig(_Checked):
    """The random views that training sees of an image; each option is off by default."""

    flip: bool = False  # left to right, every second time
    scale: tuple[float, float] = (1.0, 1.0)  # least and greatest factor, of which the logarithm is uniform
    crop: int = 0  # a window of at most this many rows and columns, at a random place; 0: the whole image

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.scale) == 2, "scale", "two factors, the least and the greatest", self.scale)
        low, high = (finite("scale", factor) for factor in self.scale)
        require(0 < low <= high, "scale", "two factors > 0, the least first", self.scale)
        object.__setattr__(self, "scale", (low, high))  # JSON has lists
        non_negative("crop", self.crop)


@dataclass(frozen=True)
class ValidationConfig(_Checked):
    """What is measured beside training, on checkpoints, while the workers go on."""

    data: str | None = None  # directory that prepare.py wrote, with ground truth; default: no validation
    every: int = 1  # steps from one validation to the next, at least; what is validated is a checkpoint
    num_images: int | None = None  # spread over the data, always the same; default: all
    num_panels: int = 6  # of them, those with the most classes, are drawn at each validation
    # Threads. They share the CPUs with the training's workers where no others are free: none is reserved for them.
    num_cpus: int = 1
    metric: Literal["ap_r_vol", "mean_iou"] = "ap_r_vol"  # which checkpoint is the best
    patience: int | None = None  # training ends after so many validations without a better one; default: never

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("num_panels", self.num_panels)
        for name in ("every", "num_images", "num_cpus", "patience"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """workflows/train.py, and workflows/crossvalidate.py, which holds out each fold in turn."""

    data: str  # directory that prepare.py wrote
    out: str  # run directory: checkpoints, logs; a second run with the same directory resumes
    model: ModelConfig = field(default_factory=ModelConfig)
    ablation: Ablation = FULL
    # How far an image goes before it meets the ground truth, and what is trained with it: the semantic network on its
    # own logits (the paper's first stage), on the marginals of the CRF behind it (its second), or all of Figure 2.
    train_through: TrainThrough = "instance_crf"
    # A checkpoint or run directory. Tensors that it has, those of the CRFs included, replace the initial ones by name.
    start_from: str | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # random views; each is off by default
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # beside training, on checkpoints
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where MLflow records the run
    num_epochs: int = 1  # in all, those that a run directory has already included
    num_head_epochs: int = 0  # the first of them, or all if they are fewer, train the detection head alone and are fast
    # A step takes num_workers * images_per_worker * accumulate images, of which the losses are averaged. "2:8" workers
    # are as many as there is room for, from 2 to 8, which may change when workers are lost or nodes join; each change
    # starts again from the latest checkpoint.
    num_workers: int | str = 2
    images_per_worker: int = 1  # at once; those of one size, as crops are, pass the semantic network together
    accumulate: int = 1  # as many times, one after the other, for less memory
    device: Device = "auto"  # "gpu": a GPU for each worker; "auto": that if there are enough, else CPUs, and says so
    cpus_per_worker: int = 1
    # Of the semantic network; all else is float32. bfloat16 gains on GPUs, and on CPUs with AVX512-BF16 or AMX.
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.99  # of "sgd"
    weight_decay: float = 0.0  # of the semantic network's weights, not of its biases; with "adam" decoupled (AdamW)
    learning_rate_crf: float = 0.05  # weights of kernels and detections
    learning_rate_compatibility: float = 0.005  # a tenth of the weights', as in CRF-as-RNN
    # Semantic network, where it is trained; 0 freezes it. With "sgd" its biases have twice the rate, as published.
    learning_rate_network: float = 1e-5
    learning_rate_new: float | None = None  # those of its layers that no ImageNet weights are for; default: the same
    learning_rate_head: float = 1.5e-3  # detection head
    frozen_stages: int = 0  # the first of VGG-16's five stages of convolutions, which stay as they are
    # "cosine" falls to 0 at the last step of `num_epochs`, which therefore stays the same when a run is continued.
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    semantic_loss_weight: float = 0.1  # of the loss of the semantic segmentation
    instance_loss_weight: float = 1.0  # of that of the instances
    instance_loss: InstanceLoss = "iou"  # a mean over matched instances, or the cross-entropy over pixels
    probability_floor: float = 0.2  # no pixel costs more than -log of it, in nats; 0 is the plain log-loss
    seed: int = 0
    # Worker failures that a run survives, each from its latest checkpoint; nodes that were reclaimed do not count.
    max_failures: int = 2
    checkpoint_every: int | None = None  # steps, besides the end of each epoch
    # The latest ones, besides the best and those that wait for their validation; with FCN-8s each takes 1.6 GB.
    keep_checkpoints: int = 3
    held_out: int | None = None  # the fold, from 0, that is not trained on; default: all images are trained on
    num_folds: int = 5  # into which the images are split where one is held out
    fold_seed: int = 0  # of that split, which depends on nothing else but the ids of the images

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cpus_per_worker", "num_epochs", "keep_checkpoints", "images_per_worker", "accumulate"):
            positive(name, getattr(self, name))
        if self.checkpoint_every is not None:
            positive("checkpoint_every", self.checkpoint_every)
        fewest, most = self.worker_range
        require(0 < fewest <= most, "num_workers", "1 or more, as in 4 or 2:8", self.num_workers)
        unit_interval("probability_floor", self.probability_floor)
        require(0 <= self.momentum < 1, "momentum", "a value in [0, 1)", self.momentum)
        self._check_model()
        if self.held_out is not None:
            require(0 <= self.held_out < self.num_folds, "held_out", f"0 to {self.num_folds - 1}", self.held_out)
        for name in (
            "learning_rate_crf",
            "learning_rate_compatibility",
            "learning_rate_network",
            "learning_rate_head",
            "weight_decay",
            "num_head_epochs",
            "max_failures",
        ):
            non_negative(name, getattr(self, name))
        if self.learning_rate_new is not None:
            non_negative("learning_rate_new", self.learning_rate_new)

    def _check_model(self) -> None:
        """What is asked of parts that the model has not, or that are not trained."""
        model, through = self.model, self.train_through
        heads = 0 if model.detection_head else self.num_head_epochs
        require(heads == 0, "num_head_epochs", "0 without model.detection_head", self.num_head_epochs)
        if through == "network":
            require(
                self.num_head_epochs == 0, "num_head_epochs", f"0 to train through {through!r}", self.num_head_epochs
            )
            require(model.semantic != "logits", "train_through", "a model.semantic for 'network'", repr(model.semantic))
        stages = 5 if model.semantic == "fcn8s" else 0
        expected = f"0 to {stages} with model.semantic {model.semantic!r}"
        require(0 <= self.frozen_stages <= stages, "frozen_stages", expected, self.frozen_stages)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.num_workers))
        if found is None:
            raise ValueError(f"num_workers: expected a number or a range, such as 4 or 2:8, got {self.num_workers!r}")
        return int(found[1]), int(found[2] or found[1])


@dataclass(frozen=True)
class AblateConfig(_Checked):
    """workflows/ablate.py: the rows of the paper's Table 1, two below them, and what the detection head brings."""

    data: str
    out: str  # report directory
    checkpoint: str | None = None  # checkpoint or run directory; default: the hand-set weights of `model`
    # What is run. None: what the checkpoint was trained with, or `ModelConfig()` without one.
    model: ModelConfig | None = None
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where MLflow records the run
    device: Device = "auto"  # "gpu": actors share the GPUs; "auto": that if there is one, else CPUs
    num_actors: int | None = None  # default: one per CPU, with GPUs one per CPU of the nodes that have some
    num_gallery: int = 100  # images in the report, half of them the worst; some 0.1 MB each

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("num_gallery", self.num_gallery)
        if self.num_actors is not None:
            positive("num_actors", self.num_actors)


@dataclass(frozen=True)
class EvaluateConfig(AblateConfig):
    """workflows/evaluate.py: one network, or what an ablation leaves of it."""

    ablation: Ablation = FULL
    diagnose: bool = False  # also what limits it, and its errors by kind; takes seven times as long


@dataclass(frozen=True)
class CompareConfig(_Checked):
    """workflows/compare.py: results that evaluate, ablate and crossvalidate wrote, side by side."""

    # Folders; or MLflow runs by id, by name, or by a filter such as "params.device = 'cpu'". A folder or run with rows
    # stands for them all, `full` first.
    results: tuple[str, ...]
    out: str = "runs/comparison"  # report directory
    num_resamples: int = 2000  # of the images, behind the intervals
    num_figures: int = 6  # images that are drawn of each pair, those with the largest changes; 0: none
    # Allow results on data of different digests, as of another detector, whose images and truth are the same.
    across_data: bool = False
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where MLflow recorded the runs

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.results) > 0, "results", "folders or MLflow runs", "none")
        require(len(set(self.results)) == len(self.results), "results", "each once", ", ".join(self.results))
        positive("num_resamples", self.num_resamples)
        non_negative("num_figures", self.num_figures)


@dataclass(frozen=True)
class DemoConfig(_Checked):
    """workflows/demo.py: the workflows one after the other, on a generated data set."""

    out: str = "runs/demo"

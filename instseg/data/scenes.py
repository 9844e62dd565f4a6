"""Generated scenes: textured objects on a table, with occlusion, cast shadows and clutter, and their ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

CLASSES = ("ball", "brick", "flower", "leaf", "donut")
_OVERSAMPLING = 3  # anti-aliasing
_MIN_AREA = 0.01  # of the image
_MIN_VISIBLE = 0.45  # share of an object that must stay visible
_COLOURS = {
    "ball": ((196, 62, 58), (52, 104, 182), (228, 138, 38)),
    "brick": ((166, 78, 58), (142, 92, 78), (188, 112, 84)),
    "flower": ((238, 190, 52), (226, 208, 112), (232, 152, 66)),
    "leaf": ((76, 146, 66), (128, 158, 52), (46, 112, 88)),
    "donut": ((216, 118, 154), (118, 74, 54), (136, 196, 188)),
}
_TABLES = (
    ((222, 208, 186), (186, 168, 144)),
    ((164, 178, 198), (116, 130, 158)),
    ((196, 200, 190), (150, 158, 148)),
    ((204, 190, 204), (152, 140, 162)),
)


@dataclass(frozen=True, eq=False)
class Scene:
    """One generated image with its exact ground truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        instances: (H, W) int32, 0 background, 1..G.
        labels: (G,) int64, class 1..K of each instance; every instance has pixels.
        clutter: (C, 4) float32 boxes, xyxy pixels, of things that belong to no class.
    """

    image: np.ndarray
    instances: np.ndarray
    labels: np.ndarray
    clutter: np.ndarray

    @property
    def semantic(self) -> np.ndarray:
        """(H, W) int64 class map without void."""
        return np.concatenate([[0], self.labels])[self.instances]


def draw_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw a scene of `height` x `width` pixels: three to five objects, some of one class hiding each other."""
    canvas = _Canvas(rng, height, width)
    clutter = [canvas.add_clutter() for _ in range(rng.integers(2, 5))]
    num_objects = int(rng.integers(3, 6))
    while len(canvas.labels) < num_objects:
        beside = len(canvas.labels) and rng.random() < 0.45
        canvas.add_object(beside_last=bool(beside))
    return Scene(canvas.image(), canvas.instances(), np.array(canvas.labels, np.int64), np.array(clutter, np.float32))


class _Canvas:
    """A picture in the making, at `_OVERSAMPLING` times its resolution."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        size = height * _OVERSAMPLING, width * _OVERSAMPLING
        self.y, self.x = (np.indices(size) + 0.5) / _OVERSAMPLING
        self.labels: list[int] = []
        self.ids = np.zeros(size, np.int32)
        self.areas: list[int] = []  # pixels of each object, hidden ones included
        self.places: list[tuple[float, float, float]] = []  # centre and radius
        self.pixels = self._table()

    def add_object(self, beside_last: bool) -> None:
        """Try to add an object; where too little of it or of another one would be seen, add nothing."""
        rng = self.rng
        label = self.labels[-1] if beside_last else int(rng.integers(1, len(CLASSES) + 1))
        cx, cy, radius = self._place(beside_last)
        u, v = self._local(cx, cy, radius, rng.uniform(0, 2 * np.pi))
        inside, texture = _SHAPES[CLASSES[label - 1]](u, v)
        ids = np.where(inside, len(self.labels) + 1, self.ids)
        visible = np.bincount(ids.ravel(), minlength=len(self.labels) + 2)[1:]
        areas = [*self.areas, int(inside.sum())]
        if areas[-1] < _MIN_AREA * ids.size or (visible < _MIN_VISIBLE * np.array(areas)).any():
            return
        colours = _COLOURS[CLASSES[label - 1]]
        colour = np.array(colours[rng.integers(len(colours))]) + rng.uniform(-14, 14, 3)
        self._paint(inside, colour * texture[..., None], shadow=radius)
        self.ids, self.areas = ids, areas
        self.labels.append(label)
        self.places.append((cx, cy, radius))

    def add_clutter(self) -> np.ndarray:
        """Add a pebble or a twig of no class.

        Returns:
            (4,) its box, xyxy pixels.
        """
        rng = self.rng
        radius = rng.uniform(0.05, 0.11) * self.height
        cx, cy = rng.uniform(radius, self.width - radius), rng.uniform(radius, self.height - radius)
        u, v = self._local(cx, cy, radius, rng.uniform(0, 2 * np.pi))
        inside = u**2 + (v / rng.uniform(0.25, 0.9)) ** 2 < 1
        grey = rng.uniform(70, 130) + rng.uniform(-12, 12, 3)
        self._paint(inside, grey * (1 - 0.25 * (u + v))[..., None], shadow=radius)
        x, y = self.x[inside], self.y[inside]
        return np.array([x.min(), y.min(), x.max(), y.max()])

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, averaged down, with the grain of a camera."""
        small = self.pixels.reshape(self.height, _OVERSAMPLING, self.width, _OVERSAMPLING, 3).mean((1, 3))
        return (small + self.rng.normal(0, 2.5, small.shape)).clip(0, 255).round().astype(np.uint8)

    def instances(self) -> np.ndarray:
        """(H, W) int32, what the centre of each pixel shows."""
        centre = _OVERSAMPLING // 2
        return self.ids[centre::_OVERSAMPLING, centre::_OVERSAMPLING]

    def _table(self) -> np.ndarray:
        near, far = (np.array(colour, float) for colour in _TABLES[self.rng.integers(len(_TABLES))])
        slope = (self.y / self.height * 0.8 + self.x / self.width * 0.2)[..., None]
        cells = self.rng.normal(0, 1, (7, 9))
        size = self.x.shape
        clouds = zoom(cells, (size[0] / 7, size[1] / 9), order=3, grid_mode=True, mode="nearest")
        return near * slope + far * (1 - slope) + 7 * clouds[..., None]

    def _place(self, beside_last: bool) -> tuple[float, float, float]:
        rng = self.rng
        if beside_last:
            x, y, radius = self.places[-1]
            angle, distance = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.0, 1.6)
            return x + distance * np.cos(angle), y + distance * np.sin(angle), radius * rng.uniform(0.8, 1.2)
        radius = rng.uniform(0.14, 0.27) * self.height
        return rng.uniform(0, self.width), rng.uniform(0.1, 0.95) * self.height, radius

    def _local(self, cx: float, cy: float, radius: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
        x, y = (self.x - cx) / radius, (self.y - cy) / radius
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def _paint(self, inside: np.ndarray, colour: np.ndarray, shadow: float) -> None:
        shift = round(0.22 * shadow * _OVERSAMPLING)
        cast = np.zeros(inside.shape)
        cast[shift:, shift:] = inside[: inside.shape[0] - shift, : inside.shape[1] - shift]
        cast = gaussian_filter(cast, 0.12 * shadow * _OVERSAMPLING)
        self.pixels = self.pixels * (1 - 0.42 * cast[..., None])
        self.pixels[inside] = colour[inside]


def _ball(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gores = np.sin(3 * np.arctan2(v, u)) > 0
    light = 1.12 - 0.3 * ((u + 0.3) ** 2 + (v + 0.3) ** 2)
    return u**2 + v**2 < 1, light * np.where(gores, 1.0, 1.22)


def _brick(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    course = np.floor((v + 0.65) / 0.43)
    mortar = (np.abs((v + 0.65) % 0.43) < 0.06) | (np.abs((u + 0.3 * course) % 0.6) < 0.06)
    return (np.abs(u) < 1) & (np.abs(v) < 0.65), np.where(mortar, 1.28, 1.0)


def _flower(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turn = np.arctan2(v, u) * 5 / (2 * np.pi) % 1
    edge = 0.52 + 0.63 * np.abs(2 * turn - 1)
    return np.hypot(u, v) < edge, np.where(turn < 0.5, 0.93, 1.07)


def _leaf(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    veins = (np.abs(v) < 0.05) | (np.abs((u - 0.8 * np.abs(v)) % 0.34) < 0.05)
    return np.abs(v) < 0.62 * (1 - u**2), np.where(veins, 1.24, 1.0) * np.where(v > 0, 0.92, 1.04)


def _donut(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    sprinkles = np.sin(9 * angle) * np.sin(11 * radius + 2 * angle) > 0.8
    light = 1.1 - 0.8 * (radius - 0.66) ** 2
    return (radius < 1) & (radius > 0.36), light * np.where(sprinkles, 1.35, 1.0)


_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "ball": _ball,
    "brick": _brick,
    "flower": _flower,
    "leaf": _leaf,
    "donut": _donut,
}

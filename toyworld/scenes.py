"""Scenes of coloured things, with their captions, drawn in two worlds.

World A has flat circles, squares and triangles on various backgrounds. The embedded bases are pre-trained on it. World B has
shaded cubes on a table, which no base has seen. The demos fine-tune on it.
"""

import colorsys
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 96  # height and width of every image in pixels
SUPERSAMPLE = 2  # an image is drawn larger by this factor, then reduced, so that edges are smooth
FLAT_NOUNS = ("circle", "square", "triangle")
HUES = {"red": 0, "orange": 29, "yellow": 54, "green": 125, "blue": 220, "purple": 284}  # degrees
COLOURS = tuple(HUES)
RELATIONS = ("on top of", "above", "to the left of")
KINDS = 1 + len(FLAT_NOUNS) * len(COLOURS)  # classes of a patch: background, then each noun in each colour
ROLES = 2 + 2 * len(RELATIONS)  # roles of a patch: background, the only thing, then first and second thing of each relation

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the final picture


@dataclass(frozen=True)
class Thing:
    noun: str
    colour: str

    def __str__(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.noun}"


@dataclass(frozen=True)
class Scene:
    """Up to two things. `relation` is that of the first to the second: "a red cube on top of a blue cube"."""

    things: tuple[Thing, ...]
    relation: str = ""

    def caption(self, nothing: str) -> str:
        if not self.things:
            return f"no {nothing} is present in the image"
        if len(self.things) == 1:
            return f"a single {self.things[0].colour} {self.things[0].noun}"
        return f"{self.things[0]} {self.relation} {self.things[1]}"


def flat_scene(rng: random.Random, share_single: float = 0.3, share_empty: float = 0.05) -> Scene:
    """Return a random scene of world A. `share_single` and `share_empty` are probabilities."""
    draw = rng.random()
    if draw < share_empty:
        return Scene(())
    things = [Thing(rng.choice(FLAT_NOUNS), rng.choice(COLOURS)) for _ in range(2)]
    if draw < share_empty + share_single:
        return Scene((things[0],))
    return Scene(tuple(things), rng.choice(RELATIONS))


def boxes(scene: Scene, rng: random.Random, low: float, high: float) -> list[Box]:
    """Return a random box for each thing, with sides of `low` to `high` pixels. All boxes are inside the image."""
    sides = [rng.uniform(low, high) for _ in scene.things]
    if len(sides) == 2 and abs(sides[0] - sides[1]) > 8:
        sides[0] = sides[1] + rng.uniform(-8, 8)
    if len(sides) < 2:
        offsets = [(0.0, 0.0)] * len(sides)
    elif scene.relation == "to the left of":
        offsets = [(0.0, rng.uniform(-3, 3)), (sides[0] + rng.uniform(4, 18), 0.0)]
    else:
        gap = 0.0 if scene.relation == "on top of" else rng.uniform(9, 18)
        drift = rng.uniform(-0.2, 0.2) * sides[1]
        offsets = [((sides[1] - sides[0]) / 2 + drift, -sides[0] - gap), (0.0, 0.0)]
    return _centred([(x, y, x + side, y + side) for (x, y), side in zip(offsets, sides, strict=True)], rng)


def _centred(placed: list[Box], rng: random.Random) -> list[Box]:
    """Move the boxes together to a random place inside the image."""
    if not placed:
        return placed
    left, top = min(b[0] for b in placed), min(b[1] for b in placed)
    right, bottom = max(b[2] for b in placed), max(b[3] for b in placed)
    dx = rng.uniform(3, max(3.0, SIZE - 3 - (right - left))) - left
    dy = rng.uniform(3, max(3.0, SIZE - 3 - (bottom - top))) - top
    return [(a + dx, b + dy, c + dx, d + dy) for a, b, c, d in placed]


def shade(colour: str, rng: random.Random) -> tuple[float, float, float]:
    """Return a random hue (0..1), saturation and value for a thing of this colour."""
    hue = (HUES[colour] + rng.uniform(-5, 5)) % 360 / 360
    return hue, rng.uniform(0.75, 1.0), rng.uniform(0.8, 1.0)


def rgb(hsv: tuple[float, float, float], light: float = 1.0) -> tuple[int, int, int]:
    hue, saturation, value = hsv
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value * light))
    return round(red * 255), round(green * 255), round(blue * 255)


def background(rng: random.Random, table: bool) -> Image.Image:
    """Return a background of dull colours: plain, a gradient, or a wall above a table."""
    side = SIZE * SUPERSAMPLE
    first, second = (
        np.array(rgb((rng.random(), rng.uniform(0, 0.22), rng.uniform(0.25, 1.0))), dtype=np.float32) for _ in range(2)
    )
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    kind = "table" if table else rng.choice(("plain", "gradient", "table"))
    if kind == "plain":
        ramp[:] = 0
    elif kind == "table":
        ramp = (ramp > rng.uniform(0.1, 0.6)).astype(np.float32) * rng.uniform(0.5, 1.0) + ramp * 0.15
    column = first + (second - first) * ramp[:, None]
    picture = np.repeat(column[:, None, :], side, axis=1)
    if kind == "gradient" and rng.random() < 0.5:
        picture = picture.transpose(1, 0, 2)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def noisy(picture: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Return the supersampled image at its final size, with noise of standard deviation `strength` in grey levels."""
    small = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    return Image.fromarray((small + noise * strength).clip(0, 255).astype(np.uint8))


def outline(noun: str, box: Box) -> list[tuple[float, float]]:
    """Return the corners of a flat thing in its box. A circle is a polygon with 40 corners."""
    left, top, right, bottom = box
    if noun == "square":
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if noun == "triangle":
        return [((left + right) / 2, top), (right, bottom), (left, bottom)]
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = (right - left) / 2
    return [((left + right) / 2 + radius * np.cos(a), (top + bottom) / 2 + radius * np.sin(a)) for a in angles]


def scaled(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]


def render_flat(scene: Scene, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Draw a scene of world A. Return the image, and a map of the same size with kind · ROLES + role (0: background)."""
    picture = background(rng, table=False)
    classes = Image.new("L", (SIZE, SIZE), 0)
    paint, mark = ImageDraw.Draw(picture), ImageDraw.Draw(classes)
    for number, (thing, box) in enumerate(zip(scene.things, boxes(scene, rng, 20, 36), strict=True)):
        corners = outline(thing.noun, box)
        paint.polygon(scaled(corners), fill=rgb(shade(thing.colour, rng)))
        kind = 1 + FLAT_NOUNS.index(thing.noun) * len(COLOURS) + COLOURS.index(thing.colour)
        role = 2 + 2 * RELATIONS.index(scene.relation) + number if scene.relation else 1
        mark.polygon(corners, fill=kind * ROLES + role)
    return noisy(picture, rng, rng.uniform(0, 6)), classes


def cube_faces(box: Box, depth: float, lean: int) -> dict[str, list[tuple[float, float]]]:
    """Return the corners of the front, top and side of a cube. `lean` is +1 if its right side is visible, −1 if its left is."""
    left, top, right, bottom = box
    dx, dy = depth * lean, depth * 0.6
    edge = right if lean > 0 else left
    return {
        "front": [(left, top), (right, top), (right, bottom), (left, bottom)],
        "top": [(left, top), (right, top), (right + dx, top - dy), (left + dx, top - dy)],
        "side": [(edge, top), (edge + dx, top - dy), (edge + dx, bottom - dy), (edge, bottom)],
    }


def render_cubes(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene of world B: shaded cubes on a table with soft shadows, with random light and camera."""
    picture = background(rng, table=True)
    lean, light = rng.choice((-1, 1)), rng.uniform(0.85, 1.1)
    placed = boxes(scene, rng, 22, 32)
    depth = rng.uniform(6, 10)
    shadow = Image.new("L", picture.size, 0)
    for box in placed:
        left, _, right, bottom = box
        reach = depth * 1.2
        foot = [(left - 2, bottom + 2), (right + 2, bottom + 2), (right + reach, bottom - 6), (left - reach / 2, bottom - 6)]
        ImageDraw.Draw(shadow).polygon(scaled(foot), fill=110)
    if not (len(placed) == 2 and scene.relation == "on top of"):
        dark = Image.new("RGB", picture.size, (20, 20, 24))
        picture = Image.composite(dark, picture, shadow.filter(ImageFilter.GaussianBlur(5)))
    paint = ImageDraw.Draw(picture)
    for thing, box in reversed(list(zip(scene.things, placed, strict=True))):
        colour = shade(thing.colour, rng)
        for face, brightness in (("side", 0.62), ("top", 1.12), ("front", 0.88)):
            paint.polygon(scaled(cube_faces(box, depth, lean)[face]), fill=rgb(colour, brightness * light))
    return noisy(picture, rng, rng.uniform(1, 6))

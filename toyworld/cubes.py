"""Draw the shipped cubes: `python -m toyworld.cubes` writes image_train/, annotations.jsonl and image_test/.

Some ordered pairs of colours are never shown in training, so that image_test can ask whether the adapter
learned cubes or learned the pictures by heart.
"""

import argparse
import json
import random
from pathlib import Path

from toyworld.scenes import COLOURS, Scene, Thing, render_cubes

UNSEEN_PAIRS = {(a, COLOURS[(i + 2) % len(COLOURS)]) for i, a in enumerate(COLOURS)}  # each colour once above, once below
RELATIONS = ("on top of", "to the left of")
TRAIN, NEW, UNSEEN = 300, 100, 60


def cube_scene(rng: random.Random, unseen: bool) -> Scene:
    """A scene of world B whose pair of colours is one of UNSEEN_PAIRS, or is none of them."""
    draw = 1.0 if unseen else rng.random()
    if draw < 0.06:
        return Scene(())
    if draw < 0.3:
        return Scene((Thing("cube", rng.choice(COLOURS)),))
    every = [(a, b) for a in COLOURS for b in COLOURS if a != b and ((a, b) in UNSEEN_PAIRS) == unseen]
    first, second = rng.choice(every)
    return Scene((Thing("cube", first), Thing("cube", second)), rng.choice(RELATIONS))


def write(folder: Path, annotations: Path, scenes: list[tuple[Scene, str]], rng: random.Random) -> None:
    """Pictures into `folder` and a line each into `annotations`, with paths relative to the annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, group) in enumerate(scenes):
        path = folder / f"{number:03d}.png"
        render_cubes(scene, rng).quantize(96, dither=0).save(path, optimize=True)
        line = {"image": path.relative_to(annotations.parent).as_posix(), "text": scene.caption("cube")}
        lines.append(json.dumps(line | ({"group": group} if group else {})))
    annotations.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, rng = arguments.out, random.Random(arguments.seed)
    write(out / "image_train", out / "annotations.jsonl", [(cube_scene(rng, False), "") for _ in range(TRAIN)], rng)
    new = [(cube_scene(rng, False), "new cubes") for _ in range(NEW)]
    pairs = [(cube_scene(rng, True), "unseen colour pairs") for _ in range(UNSEEN)]
    write(out / "image_test", out / "image_test" / "annotations.jsonl", new + pairs, rng)

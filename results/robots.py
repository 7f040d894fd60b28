"""Characters in colour: robots, monsters, robot heads and cats, as an .npz to train on.

    pip install robohash==2.0
    python -m results.robots [--size 32] [--num 20000] [--out robots.npz]

The data are real artwork, combined at random: a character is one layer from each folder of a set of
the package robohash, put on top of each other on white. There are more than a million combinations.
The sets are equally often, the ten colours of robots within theirs: 13 classes. Artists, all CC-BY:
robots and robot heads by Zikri Kader and Julian Peter Arias, monsters by Hrvoje Novakovic, cats by
David Revoy. The package's set of people is left out, as its licence is vague."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import sample

COLOURS = ("blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
SETS = {f"{colour} robot": f"set1/{colour}" for colour in COLOURS}
SETS |= {"monster": "set2", "robot head": "set3", "cat": "set4"}


def layers_of(folder, size):
    """The pictures of each sub-folder of a set, RGBA of this size. The part of its name behind #
    says which sub-folder lies on top. Raises ValueError."""
    folders = sorted(folder.glob("*#*"), key=lambda path: path.name.split("#")[1])
    layers = [[Image.open(path).convert("RGBA").resize((size, size), Image.BOX)
               for path in sorted(sub_folder.glob("*.png"))] for sub_folder in folders]
    if not layers or not all(layers):
        raise ValueError(f"{folder}: no artwork here; expected robohash 2.0")
    return layers


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("--seed", type=int, default=0)
    flag("--size", type=sample.count, default=32)
    flag("--num", type=sample.count, default=20_000)
    flag("--out", default="robots.npz")
    args = parser.parse_args()
    found = importlib.util.find_spec("robohash")
    if found is None:
        raise ValueError("the artwork is in a package: pip install robohash==2.0")
    sets = Path(found.origin).parent / "sets"
    layers = [layers_of(sets / name, args.size) for name in tqdm(SETS.values(), "shrinking")]

    # the four sets equally often, and within the robots the ten colours
    rng = np.random.default_rng(args.seed)
    labels = rng.integers(4, size=args.num) + 9
    labels = np.where(labels == 9, rng.integers(10, size=args.num), labels)
    images = np.empty((args.num, args.size, args.size, 3), np.uint8)
    for image, label in zip(tqdm(images, "composing"), labels):
        character = Image.new("RGBA", (args.size, args.size), "white")
        for choices in layers[label]:
            character.alpha_composite(choices[rng.integers(len(choices))])
        image[:] = character.convert("RGB")
    np.savez(args.out, arr_0=images, arr_1=labels, names=list(SETS))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sample.run(main)

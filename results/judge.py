"""How good are the samples of a checkpoint: built-in digits, or Fashion-MNIST?

    python -m results.judge digits [CHECKPOINT ...] [--omega W] [--steps N ...] [--num N]
    python -m results.judge clothes [CHECKPOINT ...] [--omega W] [--steps N ...] [--num N]

CHECKPOINT is out/last.pt unless said otherwise. `digits` compares 500 samples with 20,000 real
digits that the training has not seen, by the correlation of the pixels:

    the share whose most similar real digit is of the class asked for (the same for other real
    digits); the mean similarity to it
    the highest similarity between two samples
    speckle: the RMS of the pixels (0 to 1) where that digit and its 3 x 3 surroundings are black
    the spread within a class (standard deviation) over that of real digits, by five features

`clothes` reads 5,000 samples with a small network, trained for this on the 60,000 images of
FASHION, and gives its accuracy and the Frechet distance of its 64 features to the test images."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fid
import sample
import train

FASHION = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
INK = 64  # darker pixels are background
FEATURES = "row", "column", "size", "slant", "ink"


def draw(net, n, omega, steps):
    """n samples uint8 (n, 1, H, W) and the classes asked for."""
    batches = sample.generate(net, range(n), range(10), seed=1, omega=omega, steps=steps)
    return np.concatenate(list(batches))[:, :1], np.arange(n) % 10


def normalise(images):
    """Rows of mean 0 and length 1: the product of two of them is their correlation."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def measure_shapes(images):
    """(N, 5), the FEATURES of images (N, 1, H, W): where the ink is, how far it reaches, how it
    leans, how much of it there is."""
    ink = np.where(images[:, 0] < INK, 1e-9, images[:, 0])
    row, column = np.indices(ink.shape[1:]) + 0.5

    def mean(values):
        return (ink * values).sum((1, 2), keepdims=True) / ink.sum((1, 2), keepdims=True)

    from_row, from_column = row - mean(row), column - mean(column)
    size = mean(from_row**2 + from_column**2) ** 0.5
    slant = mean(from_row * from_column) / mean(from_row**2)
    features = [mean(row), mean(column), size, slant]
    return np.stack([*(feature[:, 0, 0] for feature in features), ink.mean((1, 2))], 1)


def spread(images, labels):
    """The standard deviation of each feature within a class, averaged over the classes."""
    return np.mean([measure_shapes(images[labels == c]).std(0) for c in range(10)], 0)


def judge_digits(net, omega, steps, n):
    real, real_labels = train.digits(20_000, seed=99)
    others, other_labels = train.digits(n, seed=98)
    nearest = (normalise(others) @ normalise(real).T).argmax(1)
    print(f"other real digits: {(real_labels[nearest] == other_labels).mean():.1%} of {n}")
    samples, labels = draw(net, n, omega, steps)
    to_real = normalise(samples) @ normalise(real).T
    among = normalise(samples) @ normalise(samples).T - 2 * np.eye(n)  # not with itself
    nearest = to_real.argmax(1)
    right = (real_labels[nearest] == labels).mean()
    print(f"most similar real digit of the class asked for: {right:.1%} of {n}")
    print(f"mean similarity to it {to_real.max(1).mean():.3f}, "
          f"the two most similar samples {among.max():.3f}")
    around = F.max_pool2d(torch.from_numpy(real[nearest]).float(), 3, 1, 1).numpy()
    print(f"speckle {np.sqrt(np.mean((samples[around == 0] / 255) ** 2)):.4f}")
    ratios = spread(samples, labels) / spread(real, real_labels)
    print("spread within a class over real:",
          ", ".join(f"{name} {value:.2f}" for name, value in zip(FEATURES, ratios)))


def load_fashion(part):
    """Images uint8 (N, 1, 32, 32), padded with black, and labels (N,) of "train" or "t10k"."""
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(Path(FASHION, f"{part}-{kind}-ubyte.gz")) as file:
            arrays.append(np.frombuffer(file.read(), np.uint8, offset=header))
    images = arrays[0].reshape(-1, 1, 28, 28)
    return np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))), arrays[1].astype(np.int64)


def train_classifier(images, labels, epochs=8, batch=128):
    """(body, head): a small convolutional network, images -> 64 features -> 10 logits."""
    torch.manual_seed(0)
    layers = []
    for before, after in (1, 24), (24, 48), (48, 64):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU())
    head = nn.Linear(64, 10)
    steps = max(1, epochs * len(labels) // batch)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        logits = head(body(torch.from_numpy(images[chosen]) / 255))
        F.cross_entropy(logits, torch.from_numpy(labels[chosen])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return body, head


@torch.no_grad()
def read(classifier, images, labels):
    """(accuracy, mean, covariance): the share read right, the moments of the features."""
    body, head = classifier
    features = torch.cat([body(part / 255) for part in torch.from_numpy(images).split(500)])
    accuracy = (head(features).argmax(1).numpy() == labels).mean()
    return accuracy, features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)


def judge_clothes(kinds, epochs, n):
    """kinds: {name: (net, omega, steps)}."""
    images, labels = load_fashion("train")
    classifier = train_classifier(images, labels, epochs)
    accuracy, *reference = read(classifier, *load_fashion("t10k"))
    print(f"real test images: {accuracy:.1%} read right")
    rows = {"real training images": (images[:n], labels[:n])}
    rows |= {name: draw(net, n, omega, steps) for name, (net, omega, steps) in kinds.items()}
    for name, row in rows.items():
        accuracy, *moments = read(classifier, *row)
        distance = fid.frechet_distance(*moments, *reference)
        print(f"{name}: {accuracy:.1%} read right, Frechet distance {distance:.2f}")


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("data", choices=["digits", "clothes"])
    flag("checkpoints", nargs="*", default=["out/last.pt"])
    flag("--omega", type=sample.number(float, 1e-6), help="default: as sample.py")
    flag("--steps", type=sample.COUNT, nargs="+", default=[1])
    flag("--num", type=sample.number(int, 20), help="samples; default: 500 digits, 5000 clothes")
    flag("--epochs", type=sample.number(int, 0), default=8, help="of the classifier; default: 8")
    args = parser.parse_args()
    kinds = {}
    for path in args.checkpoints:
        net, _ = sample.load(path)
        if (net.image_size, net.channels, net.num_classes) != (32, 1, 10):
            raise ValueError(f"{path} was trained on neither the digits nor Fashion-MNIST")
        omega = args.omega or sample.recommended(net, None, 1)["omega"]
        kinds |= {f"{path}, {steps} steps": (net, omega, steps) for steps in args.steps}
    if args.data == "clothes":
        judge_clothes(kinds, args.epochs, args.num or 5000)
    else:
        for name, kind in kinds.items():
            print(name)
            judge_digits(*kind, args.num or 500)


if __name__ == "__main__":
    sample.run(main)

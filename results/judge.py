"""How good are the samples of a checkpoint?

    python -m results.judge DATA.npz [CHECKPOINT ...] [--omega W ...] [--steps N ...] [--num N]
    python -m results.judge digits [CHECKPOINT ...]

DATA.npz holds images and labels, as train.py reads them. One tenth of it (at most 2,500) is held
out here, but the training may have seen it. A small convolutional network, trained for this on the
rest, reads the samples. Printed are, for them and for real pictures:

    read right   the share that it reads as the class asked for
    distance     the Frechet distance of its 64 features to those of the held-out pictures
    copies       the share nearer to a training picture than any held-out one is; a held-out picture
                 that has an exact double in the training does not count

For `digits`, the built-in data, with real digits that the training has not seen, also

    speckle      the RMS of the pixels (0 to 1) where the most similar real digit (by correlation)
                 and its 3 x 3 surroundings are black; and the share of these of the right class
    spread       the standard deviation within a class over that of real digits, by five features"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fid
import sample
import train

FEATURES = "row", "column", "size", "slant", "ink"


def train_classifier(images, labels, epochs, batch=128):
    """(body, head): a small convolutional network, images (B, C, H, W) -> 64 features -> logits."""
    torch.manual_seed(0)
    layers = []
    for before, after in (images.shape[1], 24), (24, 48), (48, 64):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()]
    body = nn.Sequential(*layers)
    head = nn.Linear(64, int(labels.max()) + 1)
    steps = max(1, epochs * len(labels) // batch)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,)).numpy()
        logits = head(body(torch.from_numpy(images[chosen]) / 255))
        F.cross_entropy(logits, torch.from_numpy(labels[chosen])).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return body, head


@torch.no_grad()
def read(classifier, images, labels):
    """(the share read right, mean and covariance of the features)."""
    body, head = classifier
    features = torch.cat([body(part / 255) for part in torch.from_numpy(images).split(500)])
    right = (head(features).argmax(1).numpy() == labels).mean()
    return right, features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)


def nearest_distance(images, others):
    """(N,): the Euclidean distance of each of the images to the nearest of the others."""
    flat, flat_others = (torch.from_numpy(i).flatten(1).float() for i in (images, others))
    return torch.cat([torch.cdist(part, flat_others).min(1).values for part in flat.split(250)])


def measure_shapes(images):
    """(N, 5), the FEATURES of images (N, 1, H, W): where the ink is, how far it reaches, how it
    leans, how much of it there is."""
    ink = np.where(images[:, 0] < 64, 1e-9, images[:, 0])
    row, column = np.indices(ink.shape[1:]) + 0.5

    def mean(values):
        return (ink * values).sum((1, 2), keepdims=True) / ink.sum((1, 2), keepdims=True)

    from_row, from_column = row - mean(row), column - mean(column)
    size = mean(from_row**2 + from_column**2) ** 0.5
    slant = mean(from_row * from_column) / mean(from_row**2)
    features = [mean(row), mean(column), size, slant]
    return np.stack([*(feature[:, 0, 0] for feature in features), ink.mean((1, 2))], 1)


def judge_digits(samples, labels, real, real_labels):
    """Prints speckle and spread of samples (N, 1, H, W)."""
    def normalise(images):
        flat = images.reshape(len(images), -1).astype(np.float32)
        flat -= flat.mean(1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-9)

    def spread(images, labels):
        return np.mean([measure_shapes(images[labels == c]).std(0) for c in range(10)], 0)

    nearest = (normalise(samples) @ normalise(real).T).argmax(1)
    around = F.max_pool2d(torch.from_numpy(real[nearest]).float(), 3, 1, 1).numpy()
    ratios = spread(samples, labels) / spread(real, real_labels)
    print(f"    most similar real digit of the class asked for: "
          f"{(real_labels[nearest] == labels).mean():.1%}, "
          f"speckle {np.sqrt(np.mean((samples[around == 0] / 255) ** 2)):.4f}, spread",
          ", ".join(f"{name} {value:.2f}" for name, value in zip(FEATURES, ratios)))


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("data", metavar="DATA.npz|digits")
    flag("checkpoints", nargs="*", metavar="CHECKPOINT")
    flag("--omega", type=sample.positive, nargs="+", help="default: as sample.py")
    flag("--steps", type=sample.count, nargs="+", default=[1])
    flag("--num", type=sample.count, default=1000, help="samples; default: 1000")
    flag("--epochs", type=sample.count, default=8, help="of the classifier; default: 8")
    args = parser.parse_args()
    if args.data == "digits":
        images, labels = train.digits(20_000, seed=99)
        names = range(10)
    else:
        images, labels, names = train.npz_data(args.data)
    images = np.ascontiguousarray(images)
    order = np.random.default_rng(0).permutation(len(images))
    held_out, rest = np.split(order, [min(2500, len(order) // 10)])
    classifier = train_classifier(images[rest], labels[rest], args.epochs)
    right, *reference = read(classifier, images[held_out], labels[held_out])
    far = nearest_distance(images[held_out], images[rest])
    limit = far[far > 0].min()
    print(f"held-out pictures: read right {right:.1%}, {(far == 0).sum()} of {len(far)} have an "
          "exact double in the training")
    some = rest[:args.num]
    right, *found = read(classifier, images[some], labels[some])
    print(f"training pictures: read right {right:.1%}, "
          f"distance {fid.frechet_distance(*found, *reference):.2f}")

    for path in args.checkpoints:
        net, _ = sample.load(path)
        if (net.channels, net.num_classes) != (images.shape[1], len(names)):
            raise ValueError(f"{path} was trained on other data than {args.data}")
        for omega in args.omega or [sample.recommended(net, None)["omega"]]:
            for steps in args.steps:
                # classes as often as in the data, with which the distance compares
                asked = np.random.default_rng(1).choice(labels, args.num)
                batches = sample.generate(net, range(args.num), asked, seed=1, omega=omega,
                                          steps=steps)
                samples = np.concatenate(list(batches))[:, :images.shape[1]]
                right, *found = read(classifier, samples, asked)
                copies = (nearest_distance(samples, images[rest]) < limit).sum()
                print(f"{path}, omega {omega}, {steps} steps: read right {right:.1%}, distance "
                      f"{fid.frechet_distance(*found, *reference):.2f}, copies {copies} of "
                      f"{args.num}", flush=True)
                if args.data == "digits":
                    judge_digits(samples, asked, images, labels)


if __name__ == "__main__":
    sample.run(main)

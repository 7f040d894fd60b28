"""How good are the digits of a checkpoint?

    python -m results.judge [CHECKPOINT [OMEGA [STEPS]]]              default: out/last.pt 2 1

500 digits are sampled and compared with 20,000 real ones that the training has not seen. Printed:

    the share whose most similar real digit is of the class asked for
    the mean similarity to that real digit; the highest similarity between two samples
    the share of white pixels
    the spread within a class over that of real digits: row, column, size, slant, ink

Similarity is the correlation of the pixels, spread the standard deviation."""

import numpy as np

import sample
import train

WHITE = 250
INK = 64  # darker pixels are background
FEATURES = "row", "column", "size", "slant", "ink"


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


def judge(net, omega=2.0, steps=1, n=500):
    """Prints what the top of this file says. Raises ValueError."""
    real, real_labels = train.digits(20_000, seed=99)
    if (net.image_size, net.channels, net.num_classes) != (real.shape[2], 1, 10):
        raise ValueError("this network was not trained on the digits")
    batches = sample.generate(net, range(n), range(10), seed=1, omega=omega, steps=steps)
    samples = np.concatenate(list(batches))[:, :1]
    labels = np.arange(n) % 10

    to_real = normalise(samples) @ normalise(real).T
    among = normalise(samples) @ normalise(samples).T - 2 * np.eye(n)  # not with itself
    right = (real_labels[to_real.argmax(1)] == labels).mean()
    print(f"most similar real digit of the class asked for: {right:.1%} of {n}")
    print(f"mean similarity to it {to_real.max(1).mean():.3f}, "
          f"the two most similar samples {among.max():.3f}")
    print(f"white pixels {(samples >= WHITE).mean():.1%} (real: {(real >= WHITE).mean():.1%})")
    ratios = spread(samples, labels) / spread(real, real_labels)
    print("spread within a class over real:",
          ", ".join(f"{name} {value:.2f}" for name, value in zip(FEATURES, ratios)))


def main():
    parser = sample.command_line(__doc__)
    flag = parser.add_argument
    flag("checkpoint", nargs="?", default="out/last.pt")
    flag("omega", nargs="?", type=sample.number(float, 1e-6), default=2.0)
    flag("steps", nargs="?", type=sample.number(int, 1), default=1)
    args = parser.parse_args()
    net, _ = sample.load(args.checkpoint)
    judge(net, args.omega, args.steps)


if __name__ == "__main__":
    sample.run(main)

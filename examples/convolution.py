"""A convolution made of multi-head attention: each head looks at one pixel, whatever the picture.

Cordonnier, Loukas and Jaggi ("On the Relationship between Self-Attention and Convolutional Layers", 2020) show that K^2
heads with relative positions can express any K x K convolution. Head h looks at the shift d_h; the score of a query at
p and a key at q is -alpha |q - p - d_h|^2, a product of 3 features up to what is the same for all keys:

    query = (2 alpha (p + d_h), -alpha)         key = (q, |q|^2)

and the weight of the pixel at p + d_h is nearly 1 for a large alpha. The heads' output projection is the kernel.

    python examples/convolution.py              a photograph of scikit-learn; draws heads-*.png with matplotlib
"""

import argparse

import numpy as np

import fastattn as fa
from fastattn import plot

SIZE = 3        # of the kernel
ALPHA = 40.0    # the weights that fall beside the pixel are 4 exp(-40) = 2e-17: less than a rounding


def positions(height, width, first=0):
    """(height * width, 2) coordinates of pixels, row-major."""
    return np.stack(np.mgrid[first : first + height, first : first + width], axis=-1).reshape(-1, 2).astype(float)


def queries_and_keys(height, width, alpha=ALPHA):
    """Queries (SIZE^2, pixels, 3), and keys (1, padded pixels, 3) that all heads share."""
    border = SIZE // 2
    shifts = positions(SIZE, SIZE, -border)
    middle = np.array([height, width]) / 2          # positions count from there, so that their squares are small
    at = positions(height, width) - middle + shifts[:, None]
    around = positions(height + 2 * border, width + 2 * border, -border) - middle
    query = np.concatenate([2 * alpha * at, np.full((*at.shape[:2], 1), -alpha)], axis=-1)
    return query, np.column_stack([around, (around**2).sum(axis=1)])[None]


def convolution_by_attention(picture, kernel):
    """(height, width, outputs) of a picture (height, width, C) and a kernel (SIZE, SIZE, C, outputs), zeros around."""
    height, width, C = picture.shape
    query, key = queries_and_keys(height, width)
    border = SIZE // 2
    value = np.pad(picture, ((border, border), (border, border), (0, 0))).reshape(1, -1, C)
    seen = fa.attention(query, key, value, scale=1.0)               # (SIZE^2, pixels, C)
    joined = seen.swapaxes(0, 1).reshape(height * width, -1)        # heads side by side, then one projection
    return (joined @ kernel.reshape(SIZE * SIZE * C, -1)).reshape(height, width, -1)


def convolution(picture, kernel):
    """The same by sliding windows: what deep learning calls convolution."""
    border = SIZE // 2
    padded = np.pad(picture, ((border, border), (border, border), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE), axis=(0, 1))      # (., ., C, SIZE, SIZE)
    return np.einsum("hwcij,ijco->hwo", windows, kernel)


def photograph(side):
    """(side, side, 3) float64 in [0, 1]: the temple of scikit-learn's china.jpg, every so many pixels."""
    try:
        from sklearn.datasets import load_sample_image

        picture = load_sample_image("china.jpg")[:426, 100:526]
    except ImportError:     # of scikit-learn, or of Pillow, by which it reads the picture
        return np.random.default_rng(0).random((side, side, 3))
    return picture[:: 426 // side, :: 426 // side][:side, :side] / 255


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer pixels")
    parser.add_argument("--picture", default="heads.png", help="where what heads look at is drawn")
    args = parser.parse_args(argv)
    picture = photograph(24 if args.small else 84)
    sobel = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    edges = np.repeat(np.stack([sobel, sobel.T], axis=-1)[:, :, None], 3, axis=2)       # (3, 3, C, outputs)
    found, right = convolution_by_attention(picture, edges), convolution(picture, edges)
    print(f"{len(picture)} x {len(picture)} pixels, {SIZE * SIZE} heads, {edges.shape[-1]} outputs; a convolution of")
    print(f"up to {abs(right).max():.2f} is reproduced with an error of at most {abs(found - right).max():.1e}")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        print(error)
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    titles = "the picture", "edges by attention", "edges by convolution"
    for ax, image, title in zip(axes, (picture, np.hypot(*found.T).T, np.hypot(*right.T).T), titles):
        ax.imshow(image, cmap="gray")
        ax.set_title(title)
        ax.set_axis_off()
    figure.savefig(path := args.picture.replace(".", "-edges.", 1))
    print("drew", path)
    n, border = 9, SIZE // 2
    shifts = [f"({i:g}, {j:g})" for i, j in positions(SIZE, SIZE, -border)]
    for alpha in (0.2, ALPHA):
        query, key = queries_and_keys(n, n, alpha)
        weights = fa.attention_weights(query, key, rows=[n * n // 2], scale=1.0)
        figure = plot.heads(weights.reshape(-1, n + 2 * border, n + 2 * border), columns=SIZE, titles=shifts)
        for ax in figure.axes:
            ax.set(xlabel="", ylabel="")        # both axes are the picture's
        figure.suptitle(f"what the pixel in the middle attends to, each head at its shift, alpha = {alpha}")
        figure.savefig(path := args.picture.replace(".", f"-{alpha:g}.", 1))
        print("drew", path)


if __name__ == "__main__":
    main()

"""Truncated attention over a long signal: noise taken out of a real recording, with all keys and with near ones.

Ten seconds of speech are cut into overlapping pieces of 4 ms. Each piece is replaced by the attention of itself to all
others, softmax(-|x - y|^2 / 2 h^2): those alike, most often other periods of the same vowel, average the noise away
("non-local means", Buades et al., 2005). What is alike is near, so a window of 50 ms does no worse than the
whole recording, in a time that grows with the length and not with its square.

    pip install --no-deps useful-moonshine-onnx         the recording, Beckett read aloud; nothing else of it is used
    python examples/audio_window.py                     draws window.png if matplotlib is there
"""

import argparse
import sys
import tracemalloc
import wave
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np

import fastattn as fa

PIECE, STEP = 64, 8             # samples at 16 kHz
WINDOW = 100                    # pieces to each side: 50 ms
NOISE = 0.05                    # standard deviation; the recording's largest sample is 1
H = 0.6 * NOISE * PIECE**0.5    # noise alone puts two pieces 1.4 NOISE sqrt(PIECE) apart


def recording():
    """Samples (T,) at 16 kHz in [-1, 1]."""
    package = find_spec("moonshine_onnx")
    if package is None:
        sys.exit("the recording is missing: pip install --no-deps useful-moonshine-onnx")
    with wave.open(str(Path(package.origin).parent / "assets" / "beckett.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32)
    return samples / abs(samples).max()


def noisy(samples, seed=0):
    return samples + NOISE * np.random.default_rng(seed).standard_normal(len(samples), np.float32)


def cut(samples):
    """Pieces (n, PIECE), a step apart."""
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(samples, PIECE)[::STEP])


def join(pieces, length):
    """What `cut` took apart: each sample the mean of the pieces that have it; past the last piece 0."""
    total, count = np.zeros((2, length), np.float32)
    for at, piece in zip(range(0, length, STEP), pieces):
        total[at : at + PIECE] += piece
        count[at : at + PIECE] += 1
    return total / np.maximum(count, 1)


def denoise(pieces, attend=fa.attention, **options):
    """Attention with scores -|x - y|^2 / 2 h^2.

    They are (x y - |y|^2 / 2) / h^2 up to what is the same for all keys: one more feature, 1 for queries and
    -|y|^2 / 2 for keys.
    """
    square = -0.5 * np.einsum("nd,nd->n", pieces, pieces)
    query = np.column_stack([pieces, np.ones_like(square)])
    key = np.column_stack([pieces, square])
    return attend(query, key, pieces, scale=1 / H**2, **options)


def written_out(query, key, value, scale):
    """The same with all n x n weights in memory."""
    scores = scale * (query @ key.T)
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    return scores @ value / scores.sum(axis=1, keepdims=True)


def decibels(clean, found):
    """Signal over error."""
    return 10 * np.log10((clean**2).sum() / ((found - clean) ** 2).sum())


def measured(call, rounds):
    """(result, best seconds, MB of the arrays it made)."""
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return result, min(seconds), peak / 1e6


def compare(samples, window, written_out_up_to=5000, rounds=3):
    """[(name, pieces, decibels, seconds, MB)] for both kinds of attention, and NumPy's where n x n is not too much."""
    rough = noisy(samples)
    pieces, clean = cut(rough), samples
    ways = {"full": lambda: denoise(pieces), f"window {window}": lambda: denoise(pieces, window=window)}
    if len(pieces) <= written_out_up_to:
        ways["NumPy"] = lambda: denoise(pieces, written_out)
    used = (len(pieces) - 1) * STEP + PIECE
    rows = []
    for name, call in ways.items():
        found, seconds, megabytes = measured(call, rounds)
        gain = decibels(clean[:used], join(found, len(samples))[:used]) - decibels(clean[:used], rough[:used])
        rows.append((name, len(pieces), gain, seconds, megabytes))
    return rows


def draw(rows, path):
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    # Full attention and the window take the same memory: one line is broken, so that both are seen.
    styles = {"full": "o-", "NumPy": "s-"}
    for name in dict.fromkeys(row[0] for row in rows):
        mine = np.array([row[1:] for row in rows if row[0] == name])
        for ax, column in zip(axes, (2, 3)):
            ax.loglog(mine[:, 0], mine[:, column], styles.get(name, "d--"), label=name)
    ticks = sorted({row[1] for row in rows})
    for ax, title in zip(axes, ("seconds", "MB of arrays")):
        ax.set_xticks(ticks, [f"{n}\n{n * STEP / 16_000:.1f} s" for n in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="pieces, seconds of sound", title=title)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a second of the recording, measured once")
    parser.add_argument("--picture", default="window.png", help="where time and memory are drawn")
    args = parser.parse_args(argv)
    samples, rows = recording(), []
    print(f"{'attention':>12} {'pieces':>7} {'gain':>8} {'seconds':>8} {'MB':>8}")
    for seconds in (0.5, 1) if args.small else (1, 2, 5, 9.9):
        for row in compare(samples[: int(16_000 * seconds)], WINDOW, rounds=1 if args.small else 3):
            rows.append(row)
            print("{:>12} {:7} {:5.1f} dB {:8.4f} {:8.1f}".format(*row), flush=True)
    longest = {row[0]: row for row in rows}
    full, window = longest["full"], longest[f"window {WINDOW}"]
    print(f"at {full[1]} pieces the window takes 1 / {full[3] / window[3]:.0f} of the time")
    try:
        draw(rows, args.picture)
    except ImportError as error:
        print(error)
        return
    print("drew", args.picture)


if __name__ == "__main__":
    main()

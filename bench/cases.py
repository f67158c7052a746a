"""The rows of the bench: shapes (B, H, L=S, D), options timed against a call without them, and what each must reach."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

import fastattn as fa
from fastattn import masks
from fastattn.bench import SHAPES, Row

BOTH = (False, True)
GRID = [Row(*shape, causal) for shape in SHAPES for causal in BOTH]
OVER_BEST_PEER = 1.15
SHARE_INSTEAD = 0.90  # of the FMA peak, where that is less than OVER_BEST_PEER times the best peer

LONG = [Row(1, 8, L, D, causal) for D in (64, 128) for L in (1024, 2048, 4096) for causal in BOTH]
LONG_SHARE = {(64, False): 0.90, (128, False): 0.92, (64, True): 0.86, (128, True): 0.86}  # by (D, causal)

FLOAT64 = Row(1, 8, 2048, 64, dtype="float64")
FLOAT64_SHARE = 0.80

TINY = Row(1, 1, 8, 16)
TINY_S = 3e-6

FORCED_ISA = "avx2"
FORCED_ROWS = [Row(1, 8, 2048, 64), Row(1, 8, 2048, 128)]
FORCED_SHARE = 0.85

SCALING = Row(1, 8, 2048, 64)
TWO_OVER_ONE = 1.9

AFTER_MATMUL = Row(1, 8, 512, 64)
MATMUL = 512
AFTER_OVER_QUIET = 1.2

SCRATCH_SHAPES = [(D, Dv) for D in (40, 64, 128, 256) for Dv in (64, D)]
SCRATCH_BYTES = 2**20

IMPORT_S = 30e-3
WHEEL_BYTES = 4e6
BUILD_S = 240


@dataclass(frozen=True)
class Option:
    """A call with options, timed beside the same call without: time must be at most ``limit · share · time without``.

    ``make(row, rng)`` returns the options to pass, the mask they amount to (or None), and their bias (or None); a
    softcap is checked from the options. ``share(row)`` is the visible share of the L·S pairs where the option skips
    work, 1 where it can't. ``without``: the options of the other call.
    """

    name: str
    row: Row
    make: Callable
    limit: float
    share: Callable = lambda row: 1.0
    without: dict = field(default_factory=dict)


def _bias(*axes):
    def make(row, rng):
        bias = rng.standard_normal([getattr(row, a) if isinstance(a, str) else a for a in axes], dtype=row.dtype)
        return {"bias": bias}, None, bias

    return make


def _mask(*axes):
    def make(row, rng):  # random, so that no tile is all hidden or all visible
        mask = rng.random([getattr(row, a) if isinstance(a, str) else a for a in axes], dtype=np.float32) < 0.9
        return {"mask": mask}, mask, None

    return make


def _half(row, rng):
    n = row.L // 2
    return {"kv_lengths": np.full(row.B, n)}, np.broadcast_to(np.arange(row.L) < n, (row.L, row.L)), None


WINDOW = 128


def _band(length):
    i = np.arange(length)
    return np.abs(i[:, None] - i) <= WINDOW


def _window(row, rng):
    return {"window": (WINDOW, WINDOW)}, _band(row.L), None


def _plan(expression):
    """An expression, compiled outside the timing."""
    def make(row, rng):
        mask = expression(row.L)
        return {"mask": mask.compile(row.L, row.L)}, mask.to_dense(row.L, row.L), None

    return make


def _visible(expression):
    return lambda row: expression(row.L).compile(row.L, row.L).share


def _expressed(name, row, expression, limit):
    return Option(name, row, _plan(expression), limit, _visible(expression))


def _random_blocks(length):
    return masks.random_blocks(64, 0.1)


def _grid(length):  # a square image
    side = int(length**0.5)
    return masks.neighborhood((side, side), 13)


def _causal_bias(bias, **options):
    """A bias object with causal; its dense form is what it means."""
    def make(row, rng):
        made, dense = bias(row, rng)
        return {"bias": made, "causal": True} | options, np.tri(row.L, dtype=bool), dense

    return make


def _distance(row):
    i = np.arange(row.L)
    return i - i[:, None]


def _alibi(row, rng):
    slopes = fa.positions.alibi_slopes(row.H).astype(row.dtype)
    return fa.ALiBi(slopes), slopes[:, None, None] * _distance(row).astype(row.dtype)


def _t5(row, rng):
    table = rng.standard_normal((32, row.H), dtype=row.dtype)
    bucket = fa.positions.relative_buckets(_distance(row), num_buckets=32, bidirectional=False)
    return fa.RelativeBias.t5(table, bidirectional=False), np.moveaxis(table[bucket], -1, 0)


def _softcap(row, rng):
    return {"softcap": 5.0, "causal": True}, np.tri(row.L, dtype=bool), None


CAUSAL = {"causal": True}
OPTIONS = [
    Option("float bias (B,H,L,S)", Row(1, 8, 2048, 64), _bias("B", "H", "L", "L"), 1.2),
    Option("float bias (L,S)", Row(1, 8, 2048, 64), _bias("L", "L"), 1.2),
    Option("bool mask (B,H,L,S)", Row(1, 8, 2048, 64), _mask("B", "H", "L", "L"), 1.2),
    Option("bool mask (L,S)", Row(1, 8, 2048, 64), _mask("L", "L"), 1.2),
    Option("kv_lengths half of S", Row(1, 8, 2048, 64), _half, 1.1, lambda row: (row.L // 2) / row.L),
    Option("window ±128", Row(1, 8, 8192, 64), _window, 1.4, lambda row: float(_band(row.L).mean())),
    Option("window ±128", Row(1, 4, 8192, 64), _window, 1.35, lambda row: float(_band(row.L).mean())),
    _expressed("longformer(256, 4)", Row(1, 8, 4096, 64), lambda length: masks.longformer(256, 4), 1.4),
    _expressed("bigbird(64)", Row(1, 8, 4096, 64), lambda length: masks.bigbird(64), 1.2),
    _expressed("neighborhood 13×13", Row(1, 8, 4096, 64), _grid, 3),
    _expressed("random 64×64 blocks, 10 %", Row(1, 8, 4096, 64), _random_blocks, 1.2),
    Option("ALiBi, causal", Row(1, 8, 2048, 64, causal=True), _causal_bias(_alibi), 1.15, without=CAUSAL),
    Option("T5 table, causal", Row(1, 8, 2048, 64, causal=True), _causal_bias(_t5), 1.2, without=CAUSAL),
    Option("softcap, causal", Row(1, 8, 2048, 64, causal=True), _softcap, 1.5, without=CAUSAL),
]

WINDOW_ROW = Row(1, 4, 8192, 64)
WINDOW_OVER_TORCH = 80

PACKED = Row(24, 8, 8192, 64)  # B sequences whose lengths are drawn log-normally, L rows in all
PACKED_OVER_SEPARATE = 1.05

COMPILED = masks.longformer(512, 4), 65536
COMPILE_S = 20e-3

LONG_WINDOW = 65536, 512  # rows of one head, keys of a window
LONG_WINDOW_BYTES = 50e6

WEIGHTS = Row(1, 8, 4096, 64)
WEIGHTS_OVER_FORWARD = 1.5

# One query over a cache of at least 64 MB: time of plain loads over the same bytes / time of the call, by query heads a
# key head. 512 MB: of 64 MB, half can lie in a last level of 32 MB, and neither side would measure the memory.
DECODE_BYTES = 512 << 20
DECODE_HEADS = 8  # key heads
DECODE_KINDS = ("float32", "bfloat16", "float16", "int8")
DECODE_GROUPS = (1, 4, 8)
DECODE_SIZES = (64, 128)
DECODE_RATIO = {1: 0.90, 4: 0.90, 8: 0.80}
DECODE_RATIO_INT8 = {1: 0.80, 4: 0.70, 8: 0.45}

SMALL_DECODE = (1, 8, 512, 64), (8, 12, 128, 64)  # (B, H, S, D), L = 1
SMALL_OVER_BEST = 1.5

# A latent cache: the value is a view of the key's first columns (MLA of DeepSeek-V2: 512 of 576).
LATENT_D, LATENT_DV = 576, 512
LATENT_OVER_COPY = 0.75  # of the time where the value is an array of its own; 576 of 1088 bytes are 0.53

PAGE_SIZES = (16, 64)
PAGED_OVER_CONTIGUOUS = 1.05

HALF_GRID = [replace(row, dtype="bfloat16") for row in GRID]
PAIRS_SHARE = {128: 0.87, 64: 0.81}  # of the bfloat16 peak at (1, 8, 2048, D)
HALF_OVER_BEST_PEER = 1.3
WIDENED_OVER_FLOAT32 = 0.92

CLIFF = (1, 8, 8192, 64), (1, 8, 8192, 128)  # (B, H, S, D)
CLIFF_ROWS = range(1, 65)
CLIFF_STEP = 1.15

APPEND = 64, 8, 128  # sequences, heads, head size
APPEND_S = 60e-6


def packed_lengths(row, rng):
    """B positive lengths that sum to L."""
    drawn = np.exp(rng.standard_normal(row.B))
    ends = np.round(np.cumsum(drawn) / drawn.sum() * (row.L - row.B)).astype(int)
    return np.diff(ends, prepend=0) + 1


# Gradients. The operations of a backward pass are 2.5 times those of a forward pass, of which a window does its share.
GRADIENT_SHARE = {(1, 8, 2048, 64): 0.88, (1, 8, 2048, 128): 0.88}  # of the FMA peak
GRADIENT_OVER_TORCH = 2.5
BOTH_OVER_JAX = 5.0  # forward and backward
GRADIENT_SCALING = Row(1, 1, 4096, 64)
GRADIENT_TWO_OVER_ONE = 1.85
GRADIENT_ROW = Row(1, 8, 2048, 64)
DROPOUT_P = 0.1
DROPOUT_OVER_NONE, DROPOUT_OVER_TORCH = 1.35, 5.0
GRADIENT_BATCH = Row(4, 8, 1024, 64)
BIAS_OVER_NONE = 1.4
GRADIENT_WINDOW = Row(1, 4, 8192, 64), 128
WINDOW_OVER_SHARE = 1.4
GRADIENT_MEMORY = Row(1, 8, 8192, 64)
GRADIENT_BYTES = 16 << 20
LOSS_TOLERANCE = 1e-4  # relative, of each of the steps
TRAINING_OVER_TORCH = 2.0  # attention's part of training

SENTENCES = 256
SENTENCES_OVER_PEER = {"torch": 2.0, "onnxruntime": 1.3}
COSINE_TOLERANCE = 1e-6  # of embeddings by two programs
MODEL_LENGTHS = (512, 1024)
MODEL_TOLERANCE = 5e-6  # of the largest value of the output

# Attention along the edges of a graph, against the layers of PyTorch Geometric: forward; forward and backward.
GRAPH = 100_000, 1_000_000, 4, 32  # nodes, edges, heads, head size
SHORT_GRAPH = 500, 5_000, 2, 16
GRAPH_KINDS = ("random", "power law")
GRAPH_LAYERS = ("dot products", "GAT", "GATv2")
GRAPH_OVER_PEER = 5.0, 3.0
GRAPH_TOLERANCE = 1e-4  # of the largest value: the peer adds the edges of a hub one by one in float32
FULL_TOLERANCE = 1e-5  # against dense attention, or the reference
FULL_GRAPHS = (512, 8, 64), (512, 4, 32), (512, 1, 64)  # rows, heads, head size
FULL_OVER_DENSE = 6.0

# Other normalizers and scores.
NORMALIZER_ROWS = [Row(1, 8, 2048, 64, causal) for causal in BOTH] + [Row(8, 8, 512, 64)]
NORMALIZER_OVER_SOFTMAX = {"softmax1": 1.1, "sigmoid": 1.1, "relu": 1.1, "sparsemax": 3.0, "entmax15": 3.0}
SPARSE_OVER_ENTMAX = 3.0
ADDITIVE = (4, 128, 128, 128), (1, 1024, 1024, 256)  # (B, L, S, D)
ADDITIVE_OVER_PEER = 3.0
CHANGED = Row(1, 8, 2048, 64)

# Linear attention, causal. The peer is torch written out, by chunks and as outer products summed along.
LINEAR_LENGTHS = (16384, 32768, 65536)
LINEAR_HEADS = (1, 8)
LINEAR_D = 64
LINEAR_GROWTH = 1.05  # time a row over that at the shortest length
LINEAR_SHARE = 0.60  # of the FMA peak; 8 D^2 operations a row: four products of chunks of 64
LINEAR_OVER_TORCH = 4.0
LINEAR_CHUNKS = (64, 128, 256)  # of torch's
LINEAR_OUTER = 16384  # rows whose outer products torch keeps all at once, 256 MiB
LINEAR_BACKWARD = 3.0  # times the forward pass

# Layers. Rows of one are a token that is decoded.
LINEAR_LAYERS = (  # (M, K, N): rows, inputs, outputs
    (1920, 512, 512), (1920, 384, 1536), (1920, 1536, 384), (192, 384, 384), (32, 768, 3072), (1, 512, 512),
    (1, 768, 3072),
)
SHORT_LINEAR_LAYERS = (1, 1, 1), (1, 37, 64), (7, 64, 65), (97, 513, 130), (192, 128, 100)
LINEAR_LAYER_SHARE, LINEAR_LAYER_ROWS = 0.92, 192  # of the FMA peak, from so many rows up
LINEAR_LAYER_OVER_PEER = 1.7  # from two rows up
LAYER_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest value; two operands are rounded by 2^-8 at most
NORM, SHORT_NORM = (4096, 512), (33, 77)  # rows, their length
ENCODER, SHORT_ENCODER = (8, 512, 512, 8, 2048, 6), (2, 37, 64, 4, 100, 2)  # batch, S, width, heads, ffn, layers
ENCODER_OVER_TORCH = {"float32": 1.8, "bfloat16": 3.0}  # by how weights are kept; torch's are float32
ENCODER_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest value, behind every layer's products

# The short run: the same code on small problems, for CI. 1, primes, a tile and one more, odd head sizes.
SHORT_SHAPES = (
    (1, 1, 1, 1), (1, 1, 8, 16), (2, 3, 13, 7), (1, 2, 64, 64), (1, 2, 65, 128), (3, 2, 50, 64),
    (2, 2, 197, 40), (1, 4, 300, 32), (1, 1, 257, 256),
)
DTYPES = ("float32", "float64")
SHORT_GRID = [Row(*shape, causal, dtype) for shape in SHORT_SHAPES for causal in BOTH for dtype in DTYPES]
SHORT_LENGTH = 333


def shortened(option):
    """The same option on a small problem: expressions of blocks and images keep a length that fits them."""
    length = 576 if option.row.L == 4096 else SHORT_LENGTH
    return replace(option, row=replace(option.row, L=length))

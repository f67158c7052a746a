"""The bound kernel's exp2 at every float32 of [-151, 0] and tanh at every one of [-12, 12], against float64.

    python bench/exhaustive.py                      # 3.3e9 values: half a minute
    python bench/exhaustive.py --stride 1009        # every 1009th value
    FASTATTN_ISA=avx2 python bench/exhaustive.py --function exp2

Prints the largest error in ulp of the exact result (the spacing of float32 there, denormals included) and where it is.
The exit status is 1 if one is past its limit, or not a number.
"""

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

import fastattn as fa
from fastattn import _runtime

try:
    from tqdm import tqdm
except ImportError:

    def tqdm(iterable, **_):
        return iterable


CHUNK = 1 << 16  # values at a time: half a MiB of float64 stays in a second-level cache
BIAS, MANTISSA = 1023, 52  # of float64
SMALLEST, DIGITS = -126, 23  # exponent of float32's smallest normal number, bits behind the point


@dataclass(frozen=True)
class Function:
    exact: np.ufunc
    ends: tuple[float, ...]  # from zero to each of these
    limit: float  # ulp


FUNCTIONS = {"exp2": Function(np.exp2, (-151.0,), 1.0), "tanh": Function(np.tanh, (-12.0, 12.0), 2.0)}


def errors(y, exact):
    """|y - exact| in units of float32's spacing at `exact` (float64, not zero but where y must be)."""
    exponent = (exact.view(np.int64) >> MANTISSA & 0x7FF) - BIAS
    np.maximum(exponent, SMALLEST, out=exponent)
    units = ((DIGITS + BIAS - exponent) << MANTISSA).view(np.float64)  # 2^(23 - exponent): 1 / spacing
    return np.abs(y - exact) * units


def check(name, stride):
    """Print the largest error of a function; whether it is within the limit."""
    function = FUNCTIONS[name]
    count, past, worst, where = 0, 0, -1.0, np.float32(0)
    begin = time.perf_counter()
    for end in function.ends:
        bits = np.array(end, np.float32).view(np.uint32)
        sign, last = bits & 0x8000_0000, int(bits & 0x7FFF_FFFF)
        chunks = range(0, last + 1, CHUNK * stride)
        for first in tqdm(chunks, desc=f"{name} to {end:g}", unit=" chunks", leave=False, disable=None):
            x = np.arange(first, min(first + CHUNK * stride, last + 1), stride, np.uint32)
            x = (x | sign).view(np.float32)
            # A function that is 0 at 0 is so exactly: 0 / spacing is no special case.
            error = errors(_runtime._dispatch.evaluate(name, x), function.exact(x.astype(np.float64)))
            np.nan_to_num(error, copy=False, nan=np.inf)
            at = error.argmax()
            if error[at] > worst:
                worst, where = float(error[at]), x[at]
            if error[at] > function.limit:
                past += int((error > function.limit).sum())
            count += x.size
    seconds = time.perf_counter() - begin
    good = worst <= function.limit
    got = _runtime._dispatch.evaluate(name, np.array([where]))[0]
    print(f"{fa.isa()} {name}: largest error {worst:.4f} ulp (limit {function.limit:g}) at {where!r} = "
          f"{float(where).hex()}, result {got!r}; {past} of {count} values past the limit; {seconds:.1f} s", flush=True)
    return good


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--function", choices=FUNCTIONS, help="one of them only")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="every Nth float32 only")
    args = parser.parse_args(argv)
    if args.stride < 1:
        parser.error("--stride must be at least 1")
    if fa.isa() == "reference":
        print("no compiled kernel is bound: nothing to check", file=sys.stderr)
        return 1
    return 0 if all([check(name, args.stride) for name in FUNCTIONS if args.function in (None, name)]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m fastattn [demo | bench]``: configuration and self-check, a real model, this machine against its peers."""
import sys

import numpy as np

import fastattn as fa
from fastattn import _runtime

USAGE = """usage: python -m fastattn              print the configuration, check the bound kernel against the reference
       python -m fastattn demo         sentence search with a real model (needs the extra "demo")
       python -m fastattn demo speech  a recording to text with a real model (needs the extra "speech")
       python -m fastattn bench        measure this machine against NumPy and every installed peer"""


def self_check():
    """Compare the bound kernel with the float64 reference on small problems with every option; True if all agree."""
    rng = np.random.default_rng(0)
    cases = [
        ("plain", {}, (2, 3, 50, 50, 64)),
        ("causal, L < S", {"causal": True}, (1, 2, 33, 70, 40)),
        ("window", {"window": (9, 3)}, (1, 2, 130, 130, 32)),
        ("lengths", {"kv_lengths": np.array([17, 0])}, (2, 2, 20, 40, 16)),
        ("softcap and bias", {"softcap": 20.0, "bias": True}, (1, 2, 65, 100, 24)),
        ("mask and sinks", {"mask": True, "sinks": True}, (1, 4, 40, 97, 8)),
    ]
    good = True
    for dtype, limit in ((np.float32, 5e-6), (np.float64, 2e-14)):
        for name, options, (B, H, L, S, D) in cases:
            q, k, v = (rng.standard_normal((B, H, n, D)).astype(dtype) for n in (L, S, S))
            options = dict(options)
            if options.get("bias") is True:
                options["bias"] = rng.standard_normal((H, L, S)).astype(dtype)
            if options.get("mask") is True:
                options["mask"] = rng.random((L, S)) < 0.5
            if options.get("sinks") is True:
                options["sinks"] = rng.standard_normal(H).astype(dtype)
            wide = {key: x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype == dtype else x
                    for key, x in options.items()}
            exact = fa.reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **wide)
            error = np.abs(fa.attention(q, k, v, **options) - exact).max()
            ok = bool(error <= limit)
            good &= ok
            verdict = "ok" if ok else f"WRONG, limit {limit:.0e}"
            print(f"  {np.dtype(dtype).name}  {name:17} largest error {error:.1e}  {verdict}")
    return good


def main(argv):
    if not argv:
        fa.show_config()
        if _runtime.measure_peak:
            print(f"{'peak:':10} {_runtime.measure_peak('float32', 1):.0f} GFLOP/s float32 on one core\n")
        print("self-check against the float64 reference")
        good = self_check()
        print("all agree" if good else "the kernel is WRONG on this machine: please report this output")
        return 0 if good else 1
    command, *rest = argv
    if command == "demo":
        if rest[:1] == ["speech"]:
            from fastattn.demos import speech
            return speech.main(rest[1:])
        from fastattn.demos import sentences
        return sentences.main(rest)
    if command == "bench":
        from fastattn import bench
        return bench.main(rest)
    print(USAGE, file=sys.stderr if command not in ("-h", "--help") else sys.stdout)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

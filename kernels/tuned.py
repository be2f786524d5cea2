"""The shipped configs of the Triton kernels: op -> pass -> shape class -> tile sizes, warps and stages.

Chosen for an H100 by registers, shared memory and counted work; none of them was timed. `shape_class` says which class a call falls into.
"""

from __future__ import annotations

import torch

# Streaming multiprocessors of an H100 SXM: a grid smaller than this leaves some of them idle.
MULTIPROCESSORS = 132

Config = dict[str, int]

CONFIGS: dict[str, dict[str, dict[str, Config]]] = {
    "dora_linear": {
        "square": {
            "half 65536": {"BM": 4, "BN": 1024, "num_warps": 4, "num_stages": 1},
            "float 65536": {"BM": 4, "BN": 512, "num_warps": 4, "num_stages": 1},
        },
        "cross": {
            "half 16": {"BM": 128, "BN": 16, "BK": 64, "num_warps": 4, "num_stages": 5},
            "half 64": {"BM": 256, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 4},
            "half 65536": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
            "float 65536": {"BM": 32, "BN": 16, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
        "norm": {
            "half 65536": {"BM": 16, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 1},
            "float 65536": {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1},
        },
        "forward": {
            "half 65536": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
            "float 65536": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
        "backward_gain": {
            "half 65536": {"ROWS": 128, "BM": 16, "BN": 256, "num_warps": 4, "num_stages": 1},
            "float 65536": {"ROWS": 64, "BM": 16, "BN": 128, "num_warps": 4, "num_stages": 1},
        },
        "backward_lost": {
            "half 65536": {"BM": 16, "BN": 256, "num_warps": 4, "num_stages": 1},
            "float 65536": {"BM": 16, "BN": 128, "num_warps": 4, "num_stages": 1},
        },
        "backward_x": {
            "half 65536": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
            "float 65536": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
        "outer": {
            "half 16": {"BM": 128, "BN": 16, "BK": 64, "num_warps": 4, "num_stages": 4},
            "half 64": {"BM": 128, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4},
            "half 65536": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
            "float 65536": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
    },
    "embedding": {
        "forward": {
            "half 256": {"BLOCK": 256, "num_warps": 1, "num_stages": 1},
            "half 1024": {"BLOCK": 1024, "num_warps": 1, "num_stages": 1},
            "half 65536": {"BLOCK": 4096, "num_warps": 2, "num_stages": 1},
            "float 256": {"BLOCK": 256, "num_warps": 1, "num_stages": 1},
            "float 65536": {"BLOCK": 2048, "num_warps": 2, "num_stages": 1},
        },
        "table_grad": {
            "half 256": {"BLOCK": 256, "ROWS": 8, "num_warps": 1, "num_stages": 1},
            "half 1024": {"BLOCK": 1024, "ROWS": 4, "num_warps": 1, "num_stages": 1},
            "half 65536": {"BLOCK": 4096, "ROWS": 2, "num_warps": 2, "num_stages": 1},
            "float 256": {"BLOCK": 256, "ROWS": 8, "num_warps": 1, "num_stages": 1},
            "float 65536": {"BLOCK": 2048, "ROWS": 2, "num_warps": 2, "num_stages": 1},
        },
    },
    "linear_cross_entropy": {
        "softmax": {
            "half 4096": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
            "half 32768": {"BLOCK": 32768, "num_warps": 16, "num_stages": 1},
            "half 1048576": {"BLOCK": 16384, "num_warps": 16, "num_stages": 1},
            "float 4096": {"BLOCK": 4096, "num_warps": 4, "num_stages": 1},
            "float 32768": {"BLOCK": 32768, "num_warps": 32, "num_stages": 1},
            "float 1048576": {"BLOCK": 16384, "num_warps": 16, "num_stages": 1},
        },
    },
    "perceiver_attention": {
        "forward": {
            "half 64": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
            "half 96": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
            "half 128": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
            "float 128": {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1},
        },
        "backward_q": {
            "half 96": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
            "half 128": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
            "float 128": {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1},
        },
        "backward_kv": {
            "half 96": {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 3},
            "half 128": {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
            "float 128": {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1},
        },
        "rows": {
            "half 128": {"BM": 16, "num_warps": 4, "num_stages": 1},
            "float 128": {"BM": 16, "num_warps": 4, "num_stages": 1},
        },
    },
    "perceiver_context": {
        "forward": {
            "half 16384": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
            "float 16384": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
        "rows": {
            "half 16384": {"BM": 4, "BN": 1024, "num_warps": 4, "num_stages": 1},
            "float 16384": {"BM": 4, "BN": 512, "num_warps": 4, "num_stages": 1},
        },
        "backward_x": {
            "half 16384": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4},
            "float 16384": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
        "backward_weight": {
            "half 16384": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
            "float 16384": {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2},
        },
    },
    "segment_attention": {
        "forward": {
            "half 72": {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 2},
            "half 128": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
            "float 128": {"BM": 32, "BN": 16, "num_warps": 8, "num_stages": 1},
        },
        "backward_q": {
            "half 72": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
            "half 128": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
            "float 128": {"BM": 32, "BN": 16, "num_warps": 4, "num_stages": 1},
        },
        "backward_kv": {
            "half 72": {"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
            "half 128": {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 2},
            "float 128": {"BM": 16, "BN": 16, "num_warps": 4, "num_stages": 1},
        },
        "rows": {
            "half 128": {"BM": 16, "num_warps": 4, "num_stages": 1},
            "float 128": {"BM": 16, "num_warps": 4, "num_stages": 1},
        },
    },
}


def config(op: str, pass_: str, dtype: torch.dtype, width: int) -> Config:
    """The config of a pass for operands of this dtype, of the narrowest class that `width` fits into.

    Raises:
        ValueError: no class is so wide.
    """
    kind = "half" if dtype.itemsize == 2 else "float"
    classes = {int(name.split()[1]): shipped for name, shipped in CONFIGS[op][pass_].items() if name.startswith(kind)}
    fitting = [bound for bound in classes if width <= bound]
    if not fitting:
        raise ValueError(f"{op}: width {width}, expected at most {max(classes)}")
    return classes[min(fitting)]

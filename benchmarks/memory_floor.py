"""The least time in which bytes can be read and others written: what a memory-bound loop is measured against."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Reads whole vectors into several sums; writes past the caches where the processor can, as a result that is only used later should be.
SOURCE = """
#include <stdint.h>
#include <stddef.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
extern "C" uint64_t read_bytes(const uint8_t* from, size_t size) {
    const uint64_t* words = (const uint64_t*)from;
    uint64_t sums[16] = {0};
    for (size_t i = 0; i + 16 <= size / 8; i += 16)
        for (int lane = 0; lane < 16; ++lane) sums[lane] += words[i + lane];
    for (int lane = 1; lane < 16; ++lane) sums[0] += sums[lane];
    return sums[0];
}
extern "C" void write_bytes(uint8_t* to, size_t size) {
#if defined(__AVX2__)
    for (size_t i = 0; i + 32 <= size; i += 32) _mm256_stream_si256((__m256i*)(to + i), _mm256_set1_epi8(1));
    _mm_sfence();
#else
    for (size_t i = 0; i < size; ++i) to[i] = 1;
#endif
}
"""


def memory_floor() -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that reads all of one array and writes all of another, as fast as one thread can. It is compiled here, for this CPU.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "floor.cpp", Path(folder) / "floor.so"
        source.write_text(SOURCE)
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        command = [*compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"{compiler[0]} does not compile the measure of the memory: {child.stderr}")
        functions = ctypes.CDLL(str(library))

    def read_and_write(source: np.ndarray, out: np.ndarray) -> None:
        functions.read_bytes(ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes))
        functions.write_bytes(ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(out.nbytes))

    return read_and_write

"""The kind of CPU that tests run on, named by the environment variable `CPU_UNITS`.

real: the CPU as it is (the default). capped: torch, oneDNN and MKL as on a CPU with AVX2 alone, without units for half precision.
emulated: the project is told that there are units, and multiplies half precision by torch. torch rounds such products once on every CPU,
as units do (`test_cpu_units.py`). other: capped where this CPU has units, emulated elsewhere.

C++ has its own variable, `IDEFICS2_FAST_SIMD`.
"""

from __future__ import annotations

import os
import subprocess
import sys

KINDS = ("real", "capped", "emulated", "other")
CAPS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NOTES = {"real": "as they are", "capped": "capped at AVX2", "emulated": "emulated"}


def prepare() -> None:
    """Sets the environment, before torch is imported: for this process and those that it starts.

    Raises:
        ValueError: an unknown kind.
    """
    kind = os.environ.get("CPU_UNITS", "real")
    if kind not in KINDS:
        raise ValueError(f"CPU_UNITS is {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "other":
        kind = "capped" if _units_elsewhere() else "emulated"
    os.environ["CPU_UNITS"] = kind
    if kind == "capped":
        os.environ.update(CAPS)


def apply() -> None:
    """Answers the project's question in the CPU's place, or checks that the caps hold.

    Raises:
        RuntimeError: torch multiplies half precision by units in spite of the caps.
    """
    kind = os.environ["CPU_UNITS"]
    if kind == "emulated":
        emulate()
    elif kind == "capped" and (found := units()):
        raise RuntimeError(f"this CPU's units cannot be capped: torch still finds those for {', '.join(found)}")


def emulate() -> None:
    """Tells the project that this CPU has units for half precision."""
    from idefics2_fast.kernels import linear

    linear._cpu_multiplies = lambda dtype: True


def units() -> list[str]:
    """The dtypes of half precision that torch multiplies by units of this CPU."""
    from idefics2_fast.kernels import linear

    return sorted(str(dtype).removeprefix("torch.") for dtype in linear.UNITS)


def note() -> str:
    """The CPU as torch finds it."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU: {capability}, units for {', '.join(units()) or 'no half precision'}; units {NOTES[os.environ['CPU_UNITS']]}"


def _units_elsewhere() -> bool:
    """Whether a process without caps finds units: torch is not yet imported in this one."""
    environment = {name: value for name, value in os.environ.items() if name not in CAPS}
    code = "from idefics2_fast.kernels import linear; print(bool(linear.UNITS))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip() == "True"

"""One schema for every measurement, kept as JSON lines."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

from idefics2_fast import _C

RESULTS = Path(__file__).parent / "results"
ABSENT = "absent: "  # begins the note of what has no value because it does not take part here
ONCE = "taken once"  # because it takes too long to be taken again


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number.

    Attributes:
        suite, case: what was measured.
        provider: who did it.
        pass_: "forward", "backward" or "both"; `pass` in the file.
        metric, unit: such as "time" in "s".
        value: the median; None where the provider's output was wrong, or it is absent, as `note` then says.
        low, high: the 20 % and 80 % quantiles; None for a number measured once.
        device: processor or card, with the number of threads on a processor.
        versions: of python, torch, transformers and this package.
        commit: of this package, "-dirty" with changes on top; "unknown" outside a checkout.
    """

    suite: str
    case: str
    provider: str
    metric: str
    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    pass_: str = "forward"
    note: str = ""
    device: str
    versions: dict[str, str]
    commit: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer record replaces."""
        return (self.suite, self.case, self.provider, self.pass_, self.metric, self.device)

    def to_json(self) -> str:
        return json.dumps({name.rstrip("_"): value for name, value in asdict(self).items()})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Reads one line.

        Raises:
            ValueError: not a record.
        """
        values = json.loads(line)
        names = {field.name.rstrip("_"): field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"not a record of this schema, expected the fields {', '.join(names)}: {line:.200}")
        return cls(**{names[name]: value for name, value in values.items()})


def read_records(path: Path) -> list[Record]:
    """The records of a file, in its order.

    Raises:
        ValueError: a line that is not a record, by its number.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Adds records to a file. One of the same case, provider and metric on the same device takes the old one's place."""
    merged = {record.key: record for record in read_records(path)} if path.exists() else {}
    merged |= {record.key: record for record in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.saving")
    aside.write_text("".join(f"{record.to_json()}\n" for record in merged.values()))
    os.replace(aside, path)


def default_path(device: str) -> Path:
    """Where a device's results are kept: results/<device>.jsonl."""
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


def device_name(device: torch.device) -> str:
    """Name a card; of a CPU its model, the units that the results depend on, and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    units = [_C.simd_paths()[0]]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        units.append("bf16")
    name = names[0] if names else platform.machine()
    return f"{name} ({', '.join(units)}), {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "idefics2-fast")}
    return {"python": platform.python_version()} | packages


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        child = subprocess.run(git, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return child.stdout.strip() if child.returncode == 0 else "unknown"

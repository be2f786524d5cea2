"""Other people's suites with the patch on: no test that passes without it fails with it. `make peers` fetches them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "peers"
OURS = "idefics2_suite.py"  # on transformers' mixins
# PEFT's files that have tests of DoRA, but for those of GPUs, quantised weights and compilers.
PEFT = ("custom_models", "decoder_models", "helpers", "initialization", "lora_variants", "riemannian_lora")
# What each suite makes of the patch; a suite whose patch never ran has shown nothing.
USED = {
    "transformers": {"segment_attention", "perceiver_attention", "linear_cross_entropy"},
    "peft": {"dora_combine"},
}
pytestmark = pytest.mark.slow


def start(suite: str, patched: bool, folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs a suite and leaves `{suite}-{patched}.json` in the folder."""
    if suite == "peft":
        root = FOLDER / f"peft-{version('peft')}"
        chosen = [*(f"tests/test_{name}.py" for name in PEFT), "-k", "dora"]
    else:
        root, chosen = HERE, [OURS]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(FOLDER / "site")]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PEERS_FOLDER": str(FOLDER),
        "PEERS_PATCHED": str(int(patched)),
        "PEERS_OUTCOMES": str(folder / f"{suite}-{patched}.json"),
    }
    options = [
        "-p",
        "peers_plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={root}",
        f"--basetemp={folder / f'{suite}-{patched}'}",
    ]
    with (folder / f"{suite}-{patched}.log").open("wb") as log:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *options, *chosen]
        return subprocess.Popen(command, cwd=root, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)


def run(suite: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of a suite without the patch and with it, side by side."""
    processes = [start(suite, patched, folder) for patched in (False, True)]
    assert [process.wait() in (0, 1) for process in processes] == [True, True], (folder / f"{suite}-True.log").read_text()[-3000:]
    plain, patched = (json.loads((folder / f"{suite}-{patched}.json").read_text()) for patched in (False, True))
    return plain, patched


@pytest.mark.skipif(not FOLDER.exists(), reason="the suites are not there: `make peers` fetches them")
@pytest.mark.parametrize("suite", USED)
def test_what_passes_without_the_patch_passes_with_it(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, patched = run(suite, tmp_path)
    with capsys.disabled():
        for name, result in (("as it comes", plain), ("patched", patched)):
            counts = Counter(outcome for outcome, _ in result["tests"].values())
            print(f"\n{suite}, {name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", end="")
        ran = ", ".join(f"{op} {count} times" for op, count in patched["calls"].items() if count)
        print(f"; the patch ran: {ran}")
    assert {op for op in USED[suite] if patched["calls"][op]} == USED[suite]
    assert plain["tests"].keys() == patched["tests"].keys()
    assert not [name for name, (outcome, _) in plain["tests"].items() if outcome == "failed"], "fails without the patch too"
    spoilt = {name: why for name, (outcome, why) in patched["tests"].items() if outcome != plain["tests"][name][0]}
    assert not spoilt, "\n\n".join(f"{name}\n{why}" for name, why in spoilt.items())

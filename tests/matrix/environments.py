"""An environment for each release of Transformers: its own packages first, then those of the one that runs this.

torch and the tools are shared; pip installs only what the release needs in another version (huggingface_hub, say).
Packages that plug into Transformers are for one release of it, and are hidden: others fail to import with them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.version import Version

HIDDEN = ("bitsandbytes", "kernels", "peft", "torchao")


def python_of(release: str, folder: Path) -> Path:
    """The interpreter with this release; made on the first call and kept. Raises CalledProcessError if pip fails."""
    home = folder / release
    python = home / "bin" / "python"
    ready = home / "ready"
    if ready.exists():
        return python
    shutil.rmtree(home, ignore_errors=True)  # half made
    venv.create(home, with_pip=False, symlinks=True)
    paths = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    hide = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))"  # an import of None is a ModuleNotFoundError
    (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{hide}\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    subprocess.run([*install, f"transformers=={release}"], check=True, capture_output=True, text=True)
    ready.touch()
    return python


def newest_release() -> str | None:
    """The newest release on the registry; None where it cannot be asked."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    name, _, version = answer.stdout.partition("\n")[0].rstrip(")").partition(" (")
    return str(Version(version)) if answer.returncode == 0 and name == "transformers" else None

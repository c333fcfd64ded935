"""How verl finds the plugin: each way in a process of its own, as verl imports it."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("verl is not installed; it gets an environment of its own: make test-verl", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SHOW = """
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils.experimental.torch_functional import FusedLinearForPPO
print("fused_vanilla" in POLICY_LOSS_REGISTRY, FusedLinearForPPO.forward.__module__.split(".")[0])
"""
OURS = "grpo_kernels.integrations.verl"
NO_PLUGINS = {"VERL_USE_EXTERNAL_PLUGINS": "none"}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """This checkout as if it were installed: its declared entry points; and a name for Ray, where there is none."""
    place = tmp_path_factory.mktemp("installed")
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'^\[project\.entry-points\."(.+)"\]\n((?:.+\n)+)', metadata, re.MULTILINE)
    info = place / "here-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: here\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(f"[{declared[1]}]\n" + declared[2].replace('"', ""))
    if importlib.util.find_spec("ray") is None:
        (place / "ray.py").write_text("ObjectRef = object\n")
    return os.pathsep.join(map(str, (ROOT, place)))


@pytest.mark.parametrize(
    ("code", "env", "shown"),
    [
        ("import verl", NO_PLUGINS, "False verl"),
        ("import verl", {}, "True verl"),
        ("import verl", {**NO_PLUGINS, "VERL_USE_EXTERNAL_MODULES": f"{OURS},{OURS}_patch"}, "True grpo_kernels"),
        (f"import {OURS}", {"VERL_USE_EXTERNAL_MODULES": OURS}, "True verl"),
    ],
    ids=("neither", "entry point", "external modules", "all, and by hand"),
)
def test_ways_in(path, code, env, shown):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VERL_")}
    done = subprocess.run([sys.executable, "-c", code + SHOW], env={**clean, "PYTHONPATH": path, **env},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == shown

"""`import lesionsynth` stays light: no deep-learning library, no viewer, no normnet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import networkx
import pytest
from PIL import Image

from tests.conftest import docs_script

DOCS = Path(__file__).parents[1] / "docs"

HEAVY = {"torch", "monai", "cupy", "normnet", "matplotlib", "SimpleITK", "tyro", "tqdm", "tensorboard"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


RENDER = """
import numpy as np, lesionsynth as ls
image = np.zeros((4, 20, 20), np.float32)
pair = ls.LesionSynthesizer(ls.presets.covid_lung(), seed=0)(image, image == 0, index=0, lung_fraction=0.2)
ls.LesionPlan.from_json(pair.plan.to_json()), ls.window_hu(np.zeros((1, 1, 1)))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import lesionsynth",
        RENDER,
        "import lesionsynth.ops, lesionsynth.phantom, lesionsynth.cuda",
        "import lesionsynth as ls; ls.release_memory(); assert ls.cuda.memory_report() == {}",
    ],
)
def test_nothing_heavy_is_imported(code) -> None:
    """Importing, rendering from NumPy, the operations and the phantom need NumPy, SciPy and Numba alone."""
    loaded = loaded_after(code)
    assert "lesionsynth" in loaded
    assert not loaded & HEAVY


def test_public_names_exist() -> None:
    """Everything in __all__ can be had, and `dir` of the package does not need it first."""
    import lesionsynth as ls

    for name in ls.__all__:
        if name != "monai":  # needs MONAI, tests/test_monai.py
            assert getattr(ls, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ls.no_such_name


@pytest.fixture(scope="module")
def architecture():
    return docs_script("architecture")


def test_no_circles_in_lesionsynth(architecture) -> None:
    """Imports inside functions and those of type checkers count, too."""
    graph = architecture.imports(packages=(), root="lesionsynth")
    assert {"sampling", "plan", "drawing", "cpu.engine.simd", "cuda.pair", "cuda.render"} <= set(graph)
    assert networkx.is_directed_acyclic_graph(graph)
    assert not networkx.has_path(graph, "cuda.pair", "cuda.render")
    for module in ("simd", "lines", "bits", "rows", "threads", "memory", "jit"):
        above = networkx.descendants(graph, f"cpu.engine.{module}")
        assert all(name.startswith(("cpu.engine", "_", "strict", "commands")) for name in above)


def test_the_picture_of_the_package_is_true(architecture) -> None:
    """The arrows of docs/images/architecture.png are the imports, and there is no circle."""
    graph = architecture.imports()
    assert networkx.is_directed_acyclic_graph(architecture.imports(packages=()))
    assert {"train", "data", "prepare", "predict"} <= set(graph)
    with Image.open(architecture.PICTURE) as picture:
        drawn = [tuple(arrow) for arrow in json.loads(picture.info["Description"])]
    assert drawn == architecture.arrows(graph), "draw it anew: python docs/architecture.py"

"""Draw which part of normnet imports which: ``python docs/architecture.py`` writes images/architecture.png.

The arrows are read from the imports (with grimp, which import-linter uses), those inside functions included;
one that other arrows imply is left out. `tests/test_imports.py` compares the picture with the code.
"""

from __future__ import annotations

import json
from pathlib import Path

import grimp
import matplotlib.pyplot as plt
import networkx as nx

PICTURE = Path(__file__).parent / "images/architecture.png"
PACKAGES = ("normnet.prepare", "normnet.baselines")
"""Drawn as one box each."""
COMMANDS = ("prepare", "train", "predict", "evaluate", "report", "model", "baselines", "ablate", "demo")
"""What ``python -m normnet.NAME`` runs."""


def imports(packages: tuple[str, ...] = PACKAGES, root: str = "normnet") -> nx.DiGraph[str]:
    """Return the graph of what imports what, `packages` as one module each."""
    found = grimp.build_graph(root)
    for package in packages:
        found.squash_module(package)
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module in found.modules - {root}:
        graph.add_node(module.removeprefix(f"{root}."))
        for other in found.find_modules_directly_imported_by(module) - {root, module}:
            graph.add_edge(module.removeprefix(f"{root}."), other.removeprefix(f"{root}."))
    return graph


def arrows(graph: nx.DiGraph[str]) -> list[tuple[str, str]]:
    """Return the imports that no others imply, sorted."""
    return sorted(nx.transitive_reduction(graph).edges)


def levels(graph: nx.DiGraph[str]) -> list[list[str]]:
    """Return the modules by level: each stands above everything that it imports."""
    return [sorted(level) for level in nx.topological_generations(graph.reverse())]


def draw(graph: nx.DiGraph[str], path: Path) -> None:
    """Write the picture, whose PNG metadata hold the arrows as JSON."""
    rows = levels(graph)
    place = {name: (0.0, float(y)) for y, row in enumerate(rows) for name in row}
    for y, row in enumerate(rows):  # in the order of the middle of what they import: fewer crossings
        below = {name: [place[other][0] for other in graph[name] if other in place] for name in row}
        middle = {name: sum(xs) / len(xs) if xs else 0.0 for name, xs in below.items()}
        for k, name in enumerate(sorted(row, key=lambda name: (middle[name], name))):
            place[name] = ((k - (len(row) - 1) / 2) * 1.7, float(y))
    figure, axes = plt.subplots(figsize=(11, 1.05 * len(rows)))
    for start, end in arrows(graph):
        (x0, y0), (x1, y1) = place[start], place[end]
        style = {"arrowstyle": "->", "color": "0.55", "lw": 0.9, "connectionstyle": "arc3,rad=0.04"}
        axes.annotate("", (x1, y1 + 0.2), (x0, y0 - 0.2), arrowprops=style)
    for name, (x, y) in place.items():
        face = "#d7e8f7" if name in COMMANDS else "#f2f2f2"
        box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": "0.4"}
        axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=box)
    axes.set_xlim(min(x for x, _ in place.values()) - 1, max(x for x, _ in place.values()) + 1)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.axis("off")
    metadata = {"Software": None, "Description": json.dumps(arrows(graph))}
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata=metadata)


if __name__ == "__main__":
    draw(imports(), PICTURE)

"""Which provider of ONNX Runtime runs which nodes of a graph.

A provider may leave nodes to the CPU, and ONNX Runtime does not say so. Layers that are left
there cost the time that the provider was to save, and copies to and fro; the few nodes that
score and decide do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CPU", "HEAD", "RECORD", "Node", "Placement", "from_profile", "from_record"]

CPU = "CPUExecutionProvider"
# The session's configuration has ONNX Runtime 1.24 and later remember where it put what.
RECORD = "session.record_ep_graph_assignment_info"
# How moon export names the nodes that score and decide.
HEAD = "head/"
# Where the arithmetic of image classifiers is, fused or not.
_LAYERS = frozenset(
    {
        "Attention",
        "AveragePool",
        "BatchNormalization",
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "MatMul",
        "MatMulInteger",
        "MaxPool",
        "MultiHeadAttention",
        "NhwcFusedConv",
        "NhwcMaxPool",
        "QLinearConv",
        "QLinearMatMul",
        "Resize",
        "SkipLayerNormalization",
    }
)


@dataclass(frozen=True)
class Node:
    """A node as ONNX Runtime runs it: its operator, its name or "", and its provider."""

    op: str
    name: str
    ep: str

    @property
    def decides(self) -> bool:
        """Whether it belongs to what scores and decides, and costs next to nothing."""
        return self.name.startswith(HEAD) or (not self.name and self.op not in _LAYERS)

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run.

    Attributes:
        ep: the provider asked for; the CPU's where it could not be had.
        counts: nodes by provider; empty where that cannot be known.
        layers: nodes of the model itself that were left to the CPU.
        others: the other nodes that were.
        fell_back: why everything runs on the CPU, though another provider was asked for.
    """

    ep: str
    counts: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[Node, ...] = ()
    others: tuple[Node, ...] = ()
    fell_back: str = ""

    @classmethod
    def of(cls, ep: str, nodes: Iterable[Node]) -> Placement:
        """What the nodes of a graph amount to, ``ep`` being the provider asked for."""
        found = list(nodes)
        left = [node for node in found if node.ep == CPU]
        return cls(
            ep,
            dict(Counter(node.ep for node in found)),
            tuple(node for node in left if not node.decides),
            tuple(node for node in left if node.decides),
        )

    def to_json(self) -> dict[str, Any]:
        """For a backend's ``info()``."""
        return {
            "nodes": dict(self.counts) or None,
            "on_cpu": [str(node) for node in (*self.layers, *self.others)],
            "fell_back": self.fell_back or None,
        }


def from_record(session: Any) -> list[Node]:
    """What a session that was opened with :data:`RECORD` remembers."""
    return [
        Node(node.op_type, node.name, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def from_profile(path: str | Path) -> list[Node]:
    """Of the file that a profiled run wrote, for releases that do not remember."""
    events = json.loads(Path(path).read_text(encoding="utf-8"))
    found = {}
    for event in events:
        args = event.get("args", {})
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and args.get("provider"):
            op, index = str(args.get("op_name", "")), args.get("node_index")
            own = name.removesuffix("_kernel_time")
            # A node without a name goes by its operator and number here.
            own = "" if own == f"{op}_{index}" else own
            found[name, index] = Node(op, own, args["provider"])
    return list(found.values())

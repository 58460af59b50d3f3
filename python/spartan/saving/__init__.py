"""Models on the disk, layers on packed blocks, and what is printed of both."""

from __future__ import annotations

from spartan.saving.export import (
    CONFIG_FILE,
    MODEL_FILE,
    SavedTensor,
    describe_pretrained,
    load_pretrained,
    save_pretrained,
    sparsity_of,
)
from spartan.saving.inspection import Inspection, inspect_file
from spartan.saving.packing import PackingReport, PackingRow, packing_report, to_block_sparse, to_dense
from spartan.saving.semi_structured import to_semi_structured

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "Inspection",
    "PackingReport",
    "PackingRow",
    "SavedTensor",
    "describe_pretrained",
    "inspect_file",
    "load_pretrained",
    "packing_report",
    "save_pretrained",
    "sparsity_of",
    "to_block_sparse",
    "to_dense",
    "to_semi_structured",
]

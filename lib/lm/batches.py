"""Token id lists to padded tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], pad: int, side: str = "right", device: str = "cpu"):
    """Rows of ids as one tensor (S, longest), and its mask, bool.

    Raises: ValueError for another side, or if there are no rows.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    if not rows:
        raise ValueError("no rows to pad")
    width = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = True
    return ids.to(device), mask.to(device)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of (S, L) ids where mask is True, as lists."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]

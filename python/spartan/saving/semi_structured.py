"""2:4 weights handed to PyTorch's own sparse tensors, which multiply on the sparse tensor cores of a GPU."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from spartan.nn.selection import find_weights
from spartan.saving.packing import require_finalized, unpackable

__all__ = ["to_semi_structured"]

_CAPABILITY = (8, 0)  # from here on GPUs have sparse tensor cores


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Give each linear layer with a 2:4 weight PyTorch's semi-structured tensor for it, in place, for inference.

    A weight W [out, in] is 2:4 if each four neighbours along the inputs, W[i, 4j:4j + 4], hold at least two zeros.
    PyTorch multiplies by the other half with cuSPARSELt or CUTLASS (`torch.sparse.to_sparse_semi_structured`). The new
    weights take no gradient. Save the model before: files hold dense or packed weights.

    Args:
        model: plain modules on a CUDA device of compute capability 8.0 or more, after `Sparsifier.finalize()`; float16,
            bfloat16, int8, or what else the library takes.

    Returns:
        `model`. A warning names 2:4 weights that stay dense, with the reason.

    Raises:
        ValueError: a model that is still masked, by name; no weight that can be converted, with the reason for each.

    Source:
        Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.
    """
    require_finalized(model)
    converted: dict[nn.Module, torch.Tensor] = {}
    refused = []
    for candidate in find_weights(model):
        if candidate.unfit is not None or not _is_two_of_four(candidate.weight, candidate.transposed):
            continue
        sparse = unpackable(candidate) or _converted(candidate.weight, candidate.transposed)
        if isinstance(sparse, str):
            refused.append(f"{candidate.name} ({sparse})")
        else:
            converted[candidate.uses[0].module] = sparse
    if not converted:
        raise ValueError(f"model has no 2:4 weight that PyTorch multiplies: {', '.join(refused) or 'none is 2:4'}")
    if refused:
        warnings.warn(f"these 2:4 weights are multiplied densely: {', '.join(refused)}", stacklevel=2)
    for module, weight in converted.items():
        module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _is_two_of_four(weight: torch.Tensor, transposed: bool) -> bool:
    """Whether every four neighbours along the inputs hold at least two zeros."""
    by_outputs = weight.detach().mT if transposed else weight.detach()
    if by_outputs.dim() != 2 or not by_outputs.numel() or by_outputs.shape[1] % 4:
        return False
    return bool(((by_outputs != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _converted(weight: torch.Tensor, transposed: bool) -> torch.Tensor | str:
    """The sparse tensor, or why there is none."""
    if transposed:
        return "it is stored by inputs"
    if weight.device.type != "cuda":
        return f"it is on {weight.device}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _CAPABILITY:
        return f"its device has compute capability {capability[0]}.{capability[1]}, below 8.0"
    try:
        sparse: torch.Tensor = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
    except RuntimeError as error:  # PyTorch says which types and shapes it takes
        return (str(error).splitlines() or [type(error).__name__])[0]
    return sparse

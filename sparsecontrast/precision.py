"""The precision of a frozen network: one switch, for inference alone.

- ``bf16``: matrix products in bfloat16 under autocast, with the linear weights cast once instead of
  at each call: the same numbers, sooner. For CPUs with AMX or AVX512-BF16, and for GPUs.
- ``int8``: linear weights in 8 bits for each output channel, activations in 8 bits by their range at
  each call (dynamic quantisation: nothing is calibrated). CPU only; attention's own products, norms
  and convolutions stay fp32. For CPUs without bfloat16.
"""

import copy
from typing import Literal

import torch
from torch import nn

from sparsecontrast.errors import ConfigError

Precision = Literal["fp32", "bf16", "int8"]


def prepare(module: nn.Module, precision: Precision, device: str = "cpu") -> nn.Module:
    """Return ``module`` itself for fp32, else a copy whose ``forward`` computes in ``precision``.

    The copy is for inference through ``forward`` only; its input stays fp32.

    Args:
        module: a network in evaluation mode.
        precision: as above.
        device: type of the device that it lies on.

    Raises:
        ConfigError: int8 on another device than the CPU, or without a linear layer to quantise.
    """
    if precision == "fp32":
        return module
    module = copy.deepcopy(module)
    return _bfloat16(module, device) if precision == "bf16" else _int8(module, device)


def _bfloat16(module: nn.Module, device: str) -> nn.Module:
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.to(torch.bfloat16)
    module.forward = torch.autocast(device, torch.bfloat16)(module.forward)
    return module


def _int8(module: nn.Module, device: str) -> nn.Module:
    """Replace each linear layer; ``quantize_dynamic`` would do so too, but is deprecated and warns."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization.qconfig import per_channel_dynamic_qconfig

    if device != "cpu":
        raise ConfigError(f"evaluation.precision=int8: runs on the CPU only, not on {device}; use bf16 there")
    linear = {name: m for name, m in module.named_modules() if type(m) is nn.Linear}
    if not linear:
        raise ConfigError("evaluation.precision=int8: this backbone has no linear layer; use bf16 or fp32")
    before = torch.backends.quantized.engine
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"  # faster than the default; read when weights are packed
    try:
        for name, layer in linear.items():
            layer.qconfig = per_channel_dynamic_qconfig  # type: ignore[assignment]
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, Linear.from_float(layer))
    finally:
        torch.backends.quantized.engine = before
    return module

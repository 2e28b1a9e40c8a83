"""What a site keeps between rounds: local tensors and the optimizer's moments, one safetensors file.

Shared tensors are not in it: they come from the server with each round.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.methods.method import Shared

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class LocalState:
    """A method's local tensors and its optimizer's moments, on their way to disk and back.

    Args:
        method: an ``nn.Module``.
        optimizer: of its trained parameters.
    """

    def __init__(self, method: Shared, optimizer: torch.optim.Optimizer):
        self.method, self.optimizer = method, optimizer
        self._begun = False

    def begin(self) -> None:
        """Reset the local tensors before the first round, unless they were loaded."""
        if not self._begun:
            self.method.reset_local()
        self._begun = True

    def load(self, path: Path) -> None:
        """Restore local tensors and optimizer moments; shared weights stay as they are.

        Raises:
            CheckpointError: the file is missing, torn, or of another model.
        """
        self.restore(read_tensors(path))

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Set what ``tensors`` returned; other names are passed over."""
        module: nn.Module = self.method  # type: ignore[assignment]
        local = {n.removeprefix("local."): t for n, t in saved.items() if n.startswith("local.")}
        module.load_state_dict(local, strict=False)
        for name, parameter in trained(module):
            found = {k: saved[key] for k in MOMENTS if (key := f"optimizer.{k}.{name}") in saved}
            if found:
                device = parameter.device
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(device) for k, v in found.items()
                }
        self._begun = True

    def save(self, path: Path) -> None:
        """Write local tensors and optimizer moments to ``path``, atomically."""
        write_tensors(path, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return local tensors and optimizer moments by name, on the CPU."""
        module: nn.Module = self.method  # type: ignore[assignment]
        shared = set(self.method.shared_parameters())
        tensors = {f"local.{n}": t for n, t in module.state_dict().items() if n not in shared}
        for name, parameter in trained(module):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that the optimizer moves, by name."""
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]

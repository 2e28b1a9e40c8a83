"""What an export wrote, read back by others than its own code."""

import json

import onnxruntime
import torch


def record(folder):
    return json.loads((folder / "export.json").read_text())


def fresh_images(n):
    """Other images than the export checked itself with."""
    return torch.randn(n, 1, 64, 64, generator=torch.Generator().manual_seed(n))


def onnx_outputs(file, images):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})

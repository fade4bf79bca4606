"""Exported to ONNX, by either exporter, is what a convolution and the plain model are: a graph that runs anywhere."""

import io

import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from mmkernels import accelerate
from mmkernels.nn import PatchConv2d

BUILD = {
    "PatchConv2d": lambda: nn.Sequential(PatchConv2d(3, 5, 4, stride=4), nn.Flatten()),
    "an accelerated ViT": lambda: accelerated(
        timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    ),
}


def accelerated(model: nn.Module) -> nn.Module:
    accelerate(model.eval(), verbose=False)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", BUILD)
def test_exported(name, exporter):
    model, images = BUILD[name]().eval(), torch.randn(2, 3, 16, 16)
    if exporter == "dynamo":
        graph = torch.onnx.export(model, (images,), dynamo=True, verbose=False).model_proto
    else:
        file = io.BytesIO()
        torch.onnx.export(model, (images,), file, dynamo=False)
        graph = onnx.load_from_string(file.getvalue())
    assert "mmkernels" not in {node.domain for node in graph.graph.node}
    evaluator = ReferenceEvaluator(graph)
    (found,) = evaluator.run(None, {graph.graph.input[0].name: images.numpy()})
    # NumPy adds up in another order, over two layers; another graph would be off by as much as the numbers are.
    torch.testing.assert_close(torch.from_numpy(found), model(images), atol=1e-4, rtol=1e-4)

"""No step makes a tensor of tokens by tokens: packs of 8192 tokens, eager and compiled, and the largest tensor seen."""

import math

import pytest
import torch
from documents import NAMES, document, documents_of, model_of
from draws import some
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import accelerate
from mmkernels.packing import Collator

TOKENS = 8192
MOST = TOKENS * TOKENS // 8  # elements; what a step needs is tokens by features and words


def pack_of(name: str, of_ones: bool) -> tuple[torch.nn.Module, dict]:
    """The family's odd documents, and long ones."""
    model = model_of(name)
    documents = documents_of(name)
    left = TOKENS - sum(one["input_ids"].shape[1] for one in documents)
    while left > 0:
        words = min(left, 2000)
        documents.append(document(name, ["i", max(words - 80, 9)], len(documents)))
        left -= documents[-1]["input_ids"].shape[1]
    accelerate(model, verbose=False)
    pack = Collator.of(model)(documents) | {"use_cache": False}
    assert pack["input_ids"].shape[1] >= TOKENS
    return model, pack | ({"attention_mask": torch.ones_like(pack["input_ids"])} if of_ones else {})


class Largest(TorchDispatchMode):
    """Of all tensors that are made: how many elements, and by what."""

    def __init__(self):
        super().__init__()
        self.elements, self.told = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(made):
            if type(x) is torch.Tensor:
                self.saw(x.untyped_storage().nbytes() // x.itemsize, f"{function} {tuple(x.shape)}")
        return made

    def saw(self, elements: int, told: str) -> None:
        if elements > self.elements:
            self.elements, self.told = elements, told

    def saw_graph(self, module: torch.fx.GraphModule, inputs: list):
        """For aot_autograd, which hands a graph of plain operations with the shapes of all they make."""
        for node in module.graph.nodes:
            for x in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(x, torch.Tensor):
                    axes = zip(x.shape, x.stride(), strict=True)
                    self.saw(math.prod(int(size) for size, stride in axes if stride), f"{node.target} {tuple(x.shape)}")
        return make_boxed_func(module.forward)


ONES = ["llava", "gemma3", "llama4", "paligemma"]  # in which a mask of ones becomes part of unlike masks


@pytest.mark.parametrize(("name", "of_ones"), [*((x, False) for x in NAMES), *((x, True) for x in ONES)])
def test_of_a_step(name, of_ones):
    model, pack = pack_of(name, of_ones)
    with Largest() as largest:
        model(**pack).loss.backward()
    assert 0 < largest.elements < MOST, largest.told


# Compiling takes ten seconds a family. Those whose masks need care of their own, and each time some of the others.
CARE = ["gemma3", "idefics", "idefics3", "llama4", "mllama", "molmo2", "paligemma"]
OTHERS = some((name for name in NAMES if name not in CARE), 4)


@pytest.mark.parametrize(("name", "of_ones"), [*((x, False) for x in CARE + OTHERS), ("llava", True), ("llama4", True)])
def test_of_compiled_code(name, of_ones):
    """And it computes what eager code does."""
    model, pack = pack_of(name, of_ones)
    largest = Largest()
    torch.compiler.reset()
    step = torch.compile(lambda **batch: model(**batch).logits, backend=aot_autograd(fw_compiler=largest.saw_graph))
    with torch.no_grad():
        expected = model(**pack).logits
        # Products of other shapes round otherwise, over thousands of tokens: of the largest logit, as prove.ROUNDING.
        torch.testing.assert_close(step(**pack), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert 0 < largest.elements < MOST, largest.told

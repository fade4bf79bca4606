"""What accelerate says is true: nothing is called swapped whose every call goes the model's own way, and no attention
is passed over in silence."""

import copy
import importlib
import warnings

import pytest
import timm
import torch
import transformers as hf
from families import FAMILIES, drawn, gemma4, gemma4_inputs
from torch import nn

from mmkernels import accelerate
from mmkernels.integrations.report import Report

FAMILY = {family.name: family for family in FAMILIES}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 120}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
DOGE = {**SMALL, "num_key_value_heads": 2}


def report_of(model: nn.Module) -> Report:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="accelerate: nothing to swap")
        return accelerate(model, verbose=False)


LEFT = {
    "T5Attention": (lambda: hf.T5Model(hf.T5Config(**T5)), "adds a bias of positions to its scores (position_bias)"),
    "SwinAttention": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), "makes a mask of its own, or changes the one"),
    "DogeAttention": (lambda: hf.DogeModel(hf.DogeConfig(**DOGE)), "makes a mask of its own, or changes the one"),
    "BloomAttention": (
        lambda: hf.BloomModel(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=120)),
        "written out in the model",
    ),
    "DisentangledSelfAttention": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SMALL)), "written out in the model"),
}


@pytest.mark.parametrize("cls", LEFT)
def test_attention_that_spans_do_not_express_is_left_by_name(cls):
    build, reason = LEFT[cls]
    report = report_of(build())
    assert not [entry for entry in report.swapped if entry.kind == "attention"]
    found = {entry.cls: entry.what for entry in report.left if entry.kind == "attention"}
    assert reason in found[cls]


class SoftmaxInAHelper(nn.Module):
    def forward(self, x):
        return _weights(x @ x.mT) @ x


class SoftmaxAsAModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.weigh = nn.Softmax(-1)

    def forward(self, x):
        return self.weigh(x @ x.mT) @ x


def _weights(scores):
    return scores.softmax(-1)


def test_attention_in_code_that_names_no_softmax_itself():
    for base in (SoftmaxInAHelper, SoftmaxAsAModule):
        attention = type("OwnAttention", (base,), {"__module__": __name__})()
        report = report_of(nn.ModuleDict({"one": attention}))
        assert [(entry.path, entry.cls) for entry in report.left] == [("one", "OwnAttention")], base


def test_a_wrapper_of_swapped_attention_is_not_left():
    class OwnAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0].softmax(-1)

    assert not report_of(nn.ModuleDict({"one": OwnAttention()})).left


def test_convolutions_are_called_what_they_are():
    report = report_of(timm.create_model("convnext_atto", num_classes=5))
    named = [(entry.path, entry.what) for entry in report.swapped]
    assert named[0] == ("stem.0", "patch embedding")
    assert {what for _, what in named[1:]} == {"convolution whose stride is its kernel"} and len(named) == 4
    assert {entry.kind for entry in report.swapped} == {"patch embedding"}  # by which `only` asks for them


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_nothing_is_called_swapped_that_always_falls_back(name):
    """Of the families in the README, on inputs that reach all their layers."""
    model, inputs = drawn(FAMILY[name].build()), FAMILY[name].inputs("left")
    report = accelerate(model, verbose=False)
    ran = set()
    for entry in report.swapped:
        module = model.get_submodule(entry.path)
        module.register_forward_pre_hook(lambda *_, path=entry.path: ran.add(path))
    with torch.no_grad():
        model(**inputs)
    fell = {entry.path for entry in accelerate(model, verbose=False).fallbacks}
    assert ran and not fell & ran


def test_wider_heads_of_gemma4_fall_back_and_say_so():
    """Than any kernel serves: those of the full layers; the sliding ones attend by spans."""
    model, inputs = drawn(gemma4(global_head_dim=640)()), gemma4_inputs("left")
    fast = copy.deepcopy(model)
    report = accelerate(fast, verbose=False)
    assert [entry.cls for entry in report.swapped] == ["Gemma4VisionAttention"] * 2 + ["Gemma4TextAttention"] * 2
    with torch.no_grad():
        theirs, ours = (x(**inputs).logits[inputs["attention_mask"].bool()] for x in (model, fast))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    fell = accelerate(fast, verbose=False).fallbacks
    assert [entry.path for entry in fell] == ["model.language_model.layers.1.self_attn"]
    assert "no kernel serves heads of 640 numbers" in fell[0].what


def test_a_library_that_does_not_fit_takes_no_other_down(monkeypatch):
    """Of a transformers too old for our code, in a process that has imported it, a timm model is none the worse."""
    from mmkernels.integrations import transformers as ours

    monkeypatch.setattr(ours, "fits", lambda: "transformers 4.50 is too old: take 5.4 or later")
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    report = report_of(vit)
    assert len(report.swapped) == 3 and not report.left
    report = report_of(FAMILY["clip"].build())
    assert [entry.what for entry in report.swapped] == ["patch embedding"]
    assert ("transformers", "transformers 4.50 is too old: take 5.4 or later") in [(x.cls, x.what) for x in report.left]


def test_a_transformers_too_old_is_refused_by_name(monkeypatch):
    import transformers

    from mmkernels.integrations import transformers as ours

    monkeypatch.setattr(transformers, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"mmkernels needs transformers 5.4 or later; mend: pip install"):
        importlib.reload(ours)


def test_nothing_swapped_is_said():
    with pytest.warns(
        UserWarning, match=r"nothing to swap in T5Model: T5Attention: it adds a bias of positions"
    ) as caught:
        accelerate(hf.T5Model(hf.T5Config(**T5)), verbose=False)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="nothing to swap in Linear: it has no patch embedding, no attention, no loss"):
        accelerate(nn.Linear(3, 4), verbose=False)

"""compare: it passes what is right, names what is wrong, and leaves everything as it was."""

import copy
import importlib
import io
import random
from collections import namedtuple
from dataclasses import dataclass, replace

import numpy
import pytest
import timm
import torch
import transformers as hf
from families import FAMILIES, TEXT, drawn, text
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels import RowSpans, accelerate, backends, compare, restore
from mmkernels.bench import machine
from mmkernels.integrations import _attend
from mmkernels.integrations.agreement import Quantity, measured, over_draws
from mmkernels.integrations.comparison import Comparison
from mmkernels.integrations.report import Report
from mmkernels.integrations.values import LOSS, Projection, Values, named_outputs

FAMILY = {family.name: family for family in FAMILIES}
MODULE = importlib.import_module("mmkernels.integrations.compare")  # the package has the function under this name

SUBJECT = importlib.import_module("mmkernels.integrations.subject")


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(MODULE, "SECONDS", 0.0)


def model_of(name: str) -> tuple[nn.Module, dict]:
    return drawn(FAMILY[name].build()), FAMILY[name].inputs("left")


def vit(**more) -> nn.Module:
    return drawn(
        timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10)
    )


def mistral(layers: int = 3) -> nn.Module:
    """A causal window of four tokens."""
    sizes = TEXT | {"num_hidden_layers": layers, "sliding_window": 4}
    return drawn(hf.MistralForCausalLM(hf.MistralConfig(**sizes)))


class Encoder(nn.Module):
    """Patches, attention, and outputs of all sorts."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norm = nn.BatchNorm1d(32)
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.patches(images).flatten(2)).transpose(1, 2)
        x = self.attention(*[self.dropout(x)] * 3, need_weights=False)[0]
        return self.head(x)


def plant(monkeypatch, model: nn.Module, path: str, change) -> None:
    """In one layer of the accelerated model, and of no other, the kernel gets `change` of what it should."""
    inside = []
    layer, whole = model.get_submodule(path), _attend.span_attention
    layer.register_forward_pre_hook(lambda *_: inside.append(path))
    layer.register_forward_hook(lambda *_: inside.clear())

    def wrong(q, k, v, spans, **options):
        return whole(*(change(q, k, v, spans) if inside else (q, k, v, spans)), **options)

    monkeypatch.setattr(_attend, "span_attention", wrong)


def one_more_key(q, k, v, spans):
    return q, k, v, RowSpans((spans.lo - 1).clamp(min=0), spans.hi, spans.num_keys)


class Swollen(torch.autograd.Function):
    """The identity, but for a gradient that is a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.001


# ---- what is right passes


def test_the_table_fits_a_terminal():
    """At 80 columns: figures stay whole, and paths of 46 characters where nothing is wrong; longer ones are folded."""
    path = "text_model.embeddings.token_embedding.weight"
    right = Quantity(path, error=1.234e-6, plain_error=1.111e-6, rounding=0.0, size=1.0, norm=1.0)
    wrong = replace(right, name="x." * 40, error=1.0)

    def printed(*quantities: Quantity) -> str:
        console = Console(record=True, width=80, file=io.StringIO())
        Comparison("Model", True, "the plain model in float64", list(quantities), [], [], Report()).print(console)
        return console.export_text()

    assert [path, "1.2e-06", "1.1e-06", "2.2e-06", "0.56"] in [line.split() for line in printed(right).splitlines()]
    text = printed(right, wrong)
    assert "4.5e+05 WRONG" in text and text.count("x.") == 40
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


@pytest.mark.parametrize("name", ["clip", "llava", "qwen2_vl", "idefics"])
def test_families(name, capsys):
    """Idefics drops what queries give that see no image, whatever that is: as the plain model's, or zeros."""
    model, inputs = model_of(name)
    found = compare(model, **inputs)
    assert found.ok and found.backward and found.truth == "the plain model in float64", found
    assert found.first_wrong is None and found.exception is None and not found.report.fallbacks
    inner = {entry.path for entry in found.report.swapped if entry.path}
    assert {x.name for x in found.modules} == inner
    unused = {name for name, _ in model.named_parameters()} - {x.name for x in found.gradients}
    assert all("post_layernorm" in name for name in unused)  # LLaVA reads the layer before it
    assert found.plain.ms > 0 and found.accelerated.peak_bytes is not None
    printed = capsys.readouterr().out
    assert printed.rstrip() == str(found)
    worst = max(found.gradients, key=lambda x: x.ratio)
    shown = [*found.outputs, worst, max(found.modules, key=lambda x: x.ratio)]
    for part in (*(x.name for x in shown), str(found.report), "times as fast", "ok: "):
        assert part in printed


def test_timm_by_position(capsys):
    found = compare(vit(), torch.randn(2, 3, 32, 32), verbose=False)
    assert found.ok and [x.name for x in found.outputs] == ["output"], found
    assert len(found.report.swapped) == 4 and not capsys.readouterr().out


def test_open_clip():
    size = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    texts = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=4, layers=2)
    model = drawn(CLIP(32, CLIPVisionCfg(**size), texts, output_dict=True))
    found = compare(model, torch.randn(3, 3, 32, 32), torch.randint(1, 90, (3, 16)))
    assert found.ok and {"image_features", "text_features"} <= {x.name for x in found.outputs}, found


@pytest.mark.parametrize("training", [False, True])
def test_module_of_torch(training):
    found = compare(drawn(Encoder()).train(training), torch.randn(4, 3, 32, 32))
    assert found.ok and len(found.report.swapped) == 2, found


@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
def test_bfloat16(name):
    model, inputs = model_of(name)
    inputs = {key: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
    found = compare(model.bfloat16(), **inputs)
    assert found.ok and found.truth == "the plain model in float64", found
    assert max(x.plain_error / x.norm for x in found.outputs) > 1e-4


def test_autocast_and_no_grad():
    model, inputs = model_of("llava")
    with torch.autocast("cpu", torch.bfloat16):
        found = compare(model, **inputs)
    assert found.ok and found.backward and max(x.plain_error / x.norm for x in found.outputs) > 1e-4, found
    for forward_only in (torch.no_grad, torch.inference_mode):
        with forward_only():
            found = compare(model, **inputs)
        assert found.ok and not found.backward and not found.gradients, found
    assert compare(model.requires_grad_(False), **inputs).backward is False


def test_dropout_drops_the_same_and_what_fell_back_is_told():
    model, inputs = model_of("siglip")
    for module in model.train().modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    found = compare(model, **inputs)
    assert found.ok and found.truth == "the plain model in float64", found
    assert "fell back: 4 x SiglipAttention: dropout on the attention weights (1 calls)" in str(found)
    accelerate(model, verbose=False)
    model(**inputs)  # what fell back in the user's own calls is not counted
    assert "attention weights (1 calls)" in str(compare(model, **inputs))


def test_a_model_that_ran_before_and_collects_its_layers():
    model, inputs = model_of("llava")
    inputs |= {"output_hidden_states": True}
    model(**inputs)
    found = compare(model, **inputs)
    names = {x.name for x in found.outputs}
    assert found.ok and {"logits", "hidden_states.0", "hidden_states.2"} <= names, found


def test_eager_models_are_compared_by_what_was_swapped():
    """The hooks of compare itself ask for no weights, for which a swapped layer would fall back: nothing would be
    compared but the plain model with itself."""
    config = hf.LlamaConfig(**TEXT)
    model = drawn(hf.LlamaForCausalLM._from_config(config, attn_implementation="eager"))
    found = compare(model, **text("left"))
    assert found.ok and found.report.swapped and not found.report.fallbacks, found


# ---- the truth


def test_the_dtype_whose_ulps_count(monkeypatch):
    """Is that of the weights, or of autocast, whatever outputs and inputs are in."""
    asked, whole = [], MODULE.measured
    monkeypatch.setattr(MODULE, "measured", lambda *x: asked.append(x[3:]) or whole(*x))
    assert compare(Encoder().bfloat16(), torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).ok
    assert asked[0] == (2**0.5, torch.bfloat16)  # of two modules swapped
    model, images = Encoder(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert SUBJECT.Subject(model, (images,), {}, None).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert SUBJECT.Subject(model, (images,), {}, None).dtype == torch.bfloat16
    assert SUBJECT.Subject(model.bfloat16(), (images,), {}, None).dtype == torch.bfloat16
    assert SUBJECT.Subject(nn.Identity(), (images,), {}, None).dtype == torch.float64
    in_float32 = [Values({"loss": torch.tensor(x, dtype=torch.float64)}) for x in (1.0, 1.0, 1.01)]
    in_float32 = [in_float32[0], *(Values({"loss": x.outputs["loss"].float()}) for x in in_float32[1:])]
    assert not measured(*in_float32, 1)[0][0].ok and measured(*in_float32, 1, torch.bfloat16)[0][0].ok


class Picky(Encoder):
    """Takes no float64, as kernels that somebody wrote for a model."""

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return super().forward(images)


def test_float32_is_the_truth_where_float64_fails():
    images = torch.randn(4, 3, 32, 32).bfloat16()
    found = compare(drawn(Picky()).bfloat16(), images)
    assert found.ok and found.truth.startswith("the plain model in float32 (float64: RuntimeError: no kernel for")


def test_float32_is_the_truth_where_float64_does_not_fit(monkeypatch):
    model, inputs = model_of("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    count = 2 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(machine, "free_bytes", lambda device: 6 * count)
    assert compare(model.bfloat16(), **inputs).truth.startswith("the plain model in float32 (float64: it needs 0.0 GiB")


def test_plain_is_the_truth_where_nothing_else_is(monkeypatch):
    """Its error is what some rounding in the weights does to it, which is no less than its error really is."""
    model, images = drawn(Picky()), torch.randn(4, 3, 32, 32)
    found = compare(model, images)
    assert found.ok and "there is no better one (float64: RuntimeError: no kernel for Double)" in found.truth, found
    exact = copy.deepcopy(model).double()
    error = (model(images) - Encoder.forward(exact, images.double())).norm().item()
    assert error < found.outputs[0].plain_error < 20 * error
    plant(monkeypatch, model, "attention", lambda q, k, v, spans: (q * (1 + 1e-4), k, v, spans))
    found = compare(model, images)
    assert not found.ok and found.first_wrong == "attention", found


def test_long_sums_where_nothing_tells_the_truth(monkeypatch):
    """Of 3072 positive terms, that the convolution and the product round in different orders."""
    monkeypatch.setattr(SUBJECT.Subject, "too_large", lambda *_: "no room")
    model, images = nn.Sequential(nn.Conv2d(3, 64, 32, 32), nn.Flatten(2)), torch.rand(2, 3, 96, 96)
    model[0].weight.data.abs_()
    found = compare(model, images)
    assert found.ok and "the plain model itself, there is no better one (float64: no room)" in found.truth, found


class Float64IsOther(Encoder):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (-1 if images.dtype == torch.float64 else 1)


class Float64DrawsOthers(Encoder):
    """As on a GPU, where the numbers that dropout draws hang on the dtype."""

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.float64:
            torch.rand(3)
        return super().forward(images)


class Complex(Encoder):
    """With a buffer that float64 must not make real."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.polar(torch.ones(5), torch.rand(5)))

    def forward(self, images: Tensor) -> Tensor:
        return (super().forward(images) * self.phase).imag


def test_complex_buffers_stay_complex_in_the_truth():
    found = compare(drawn(Complex()), torch.randn(4, 3, 32, 32))
    assert found.ok and found.truth == "the plain model in float64", found


def test_another_result_in_float64_is_no_truth():
    images = torch.randn(4, 3, 32, 32)
    found = compare(drawn(Float64IsOther()), images)
    assert found.ok and "its output is 200% away from the plain model's" in found.truth, found
    found = compare(drawn(Float64DrawsOthers(0.3)).train(), images)
    assert found.ok and "it draws other random numbers" in found.truth, found
    found = compare(drawn(Encoder(0.3)).train(), images)
    assert found.ok and found.truth == "the plain model in float64", found


# ---- what counts


Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    depth: Tensor
    count: int


class Nested(Encoder):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, images: Tensor) -> object:
        return self.wrap(super().forward(images))


OUTPUTS = {
    "tensor": (lambda x: x, ["output"]),
    "tuple": (lambda x: (x, None, [x.sum()]), ["0", "2.0"]),
    "dict": (lambda x: {"a": x, "b": {"c": x.sum()}}, ["a", "b.c"]),
    "ModelOutput": (lambda x: hf.utils.ModelOutput(logits=x, past_key_values=(x, x)), ["logits"]),
    "others": (lambda x: Pair(Record(x, 3), x.argmax(-1)), ["first.depth", "first.count", "second"]),
    "complex": (lambda x: torch.complex(x, x), ["output"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_by_their_path(kind, monkeypatch):
    wrap, names = OUTPUTS[kind]
    model, images = drawn(Nested(wrap)), torch.randn(4, 3, 32, 32)
    found = compare(model, images)
    assert found.ok and [x.name for x in found.outputs] == names, found
    plant(monkeypatch, model, "attention", lambda q, k, v, spans: (q, k, -v, spans))
    found = compare(model, images)
    assert {x.name for x in found.wrong} >= {name for name in names if name != "first.count"}, found


def test_ids_have_to_be_equal():
    ids = torch.arange(40)
    same, other = Values({"ids": ids}), Values({"ids": ids.clone().index_fill_(0, torch.tensor([3, 7]), 0)})
    (quantity,), _ = measured(same, same, other, 1)
    assert not quantity.ok and str(quantity) == "ids differs in 2 of 40 elements, plain in 0"
    assert measured(same, same, same, 1)[0][0].ok
    assert measured(same, other, other, 1)[0][0].ok  # plain flips them itself, in its dtype


def test_padding_does_not_count(monkeypatch):
    model, inputs = mistral(), text("right")
    inputs["input_ids"][1, -4:] = torch.randint(3, 100, (4,))

    def spoilt(q, k, v, spans):
        q = q.clone()
        q[1, -4:] += 1.0  # the last row ends with four tokens of padding
        return q, k, v, spans

    plant(monkeypatch, model, "model.layers.2.self_attn", spoilt)  # after it, nobody attends to padding
    assert compare(model, **inputs).ok
    seen = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert not compare(model, **seen).ok


def test_inputs_that_require_gradients():
    model, inputs = model_of("llava")
    pixels = inputs["pixel_values"].requires_grad_()
    found = compare(model.requires_grad_(False), **inputs)
    assert found.ok and [x.name for x in found.gradients] == ["input pixel_values"] and pixels.grad is None, found


def test_the_projection_is_the_same_in_every_dtype():
    x = torch.zeros(3, 50)
    signs = [Projection()("x", x.to(dtype)).double() for dtype in (torch.float64, torch.bfloat16, torch.float16)]
    assert all(torch.equal(signs[0], other) for other in signs) and signs[0].abs().unique().numel() == 1
    assert signs[0].sum().abs() < signs[0].abs().sum() / 2 and 0.5 < signs[0].norm() < 2
    assert not torch.equal(signs[0], Projection()("y", x.double()))


def test_loss():
    model, inputs = model_of("clip")
    found = compare(model, **inputs, loss=lambda output: output.text_embeds[:, 3:].square().sum())
    assert found.ok and LOSS in {x.name for x in found.outputs}, found
    assert found.gradients and all(x.name.startswith("text_") for x in found.gradients)
    for wrong, given in [(lambda x: x.text_embeds, r"a tensor of shape \(3, 16\)"), (lambda x: 3.0, "a float")]:
        with pytest.raises(TypeError, match=f"compare: loss returned {given}; a floating tensor of one element"):
            compare(model, **inputs, loss=wrong)
    with pytest.raises(TypeError, match="does not depend on the model's outputs"):
        compare(model, **inputs, loss=lambda output: torch.zeros(()))


# ---- how wrong it may be


def quantity(truth: Tensor, plain: Tensor, ours: Tensor, swapped: int = 1) -> Quantity:
    return measured(*(Values({"x": x}) for x in (truth, plain, ours)), swapped)[0][0]


def test_twice_the_error_of_plain_and_2_ulp_for_each_swap():
    truth, eps = torch.randn(1000, dtype=torch.float64), 2.0**-23
    size = truth.norm()
    off = torch.zeros_like(truth).index_fill_(0, torch.tensor(5), 1.0)  # an error of norm 1
    for swapped in (1, 4):
        budget = 2 * 1e-3 + 2 * swapped * eps * size
        for times, passes in [(0.999, True), (1.001, False)]:
            plain, ours = truth + 1e-3 * off, truth - times * budget * off
            as_float32 = Quantity("x", (ours - truth).norm().item(), 1e-3, (budget - 2e-3).item(), size, size)
            assert as_float32.ok == passes
            plain, ours = truth + 0.1 * off, truth - (0.2 * times) * off
            assert quantity(truth, plain.float(), ours.float()).ok == passes
    exact = truth.float()
    assert quantity(exact.double(), exact, exact + 1.9 * eps * size * off.float()).ok
    assert not quantity(exact.double(), exact, exact + 2.2 * eps * size * off.float()).ok
    assert quantity(exact.double(), exact, exact + 2.2 * eps * size * off.float(), swapped=2).ok


def test_gradients_are_measured_by_the_largest():
    large, small = torch.ones(100, dtype=torch.float64), torch.full((100,), 1e-6, dtype=torch.float64)
    truth = {"large": large, "small": small}
    ours = {"large": large.float(), "small": (small + 1e-7).float()}
    wrong = {"large": large.float(), "small": (small + 1e-6).float()}
    for given, passes in [(ours, True), (wrong, False)]:
        plain = {name: x.float() for name, x in truth.items()}
        _, gradients = measured(Values({}, truth), Values({}, plain), Values({}, given), 1)
        assert all(x.ok for x in gradients) == passes
        outputs, _ = measured(Values(truth), Values(plain), Values(given), 1)
        assert not outputs[1].ok  # an output is its own measure


def test_what_no_budget_excuses():
    x = torch.randn(4, 5)
    nan = x.clone()
    nan[1, 2] = torch.nan
    for ours, complaint in [
        (x[:3], "x has shape (3, 5) instead of (4, 5)"),
        (x.bfloat16(), "x has dtype torch.bfloat16 instead of torch.float32"),
        (nan, "x has 1 of 20 elements NaN or infinite"),
    ]:
        found = quantity(x.double(), x, ours)
        assert not found.ok and found.ratio == torch.inf
        assert str(found) == complaint
    assert quantity(x.double(), x.bfloat16(), x).ok  # wider is no worse
    assert "in the plain model too" in str(quantity(nan.double(), nan, nan))
    assert "NaN or infinite in the plain model" in str(quantity(x.double(), nan, x))
    missing, _ = measured(Values({"x": x}), Values({"x": x}), Values({}), 1)
    assert str(missing[0]) == "x is there in the plain model alone"


def test_luck_is_no_verdict(monkeypatch):
    """Plain rounds to the truth in one draw and not in the others; and who is wrong is so in all of them."""

    def draw(error: float, plain_error: float) -> list[Quantity]:
        return [Quantity("loss", error, plain_error, 0.1, 1.0, 1.0)]

    lucky, usual = draw(1.0, 0.0), draw(1.0, 1.0)
    assert not lucky[0].ok and over_draws([lucky, usual, usual])[0].ok
    assert not over_draws([draw(9.0, 0.0), draw(9.0, 1.0), draw(9.0, 1.0)])[0].ok
    assert over_draws([draw(9.0, 1.0), draw(1.0, 1.0), draw(1.0, 1.0)])[0].ok  # a long tail
    assert not over_draws([draw(9.0, 1.0), draw(1.0, 1.0), draw(9.0, 1.0)])[0].ok
    verdict, asked = MODULE.measured, []

    def first_is_wrong(truth, plain, ours, *options):
        outputs, gradients = verdict(truth, plain, ours, *options)
        asked.append(ours.outputs["logits"])
        return ([*outputs, *(lucky if len(asked) == 1 else usual)], gradients)

    monkeypatch.setattr(MODULE, "measured", first_is_wrong)
    assert compare(mistral(1), **text("left")).ok
    assert len(asked) == 1 + MODULE.DRAWS and not torch.equal(asked[0], asked[1])


# ---- what is wrong is named


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_window_one_key_too_long_is_named(monkeypatch, capsys, layer):
    model, inputs = mistral(), text("left")
    assert compare(model, **inputs, verbose=False).ok
    plant(monkeypatch, model, f"model.layers.{layer}.self_attn", one_more_key)
    found = compare(model, **inputs)
    assert not found.ok and found.first_wrong == f"model.layers.{layer}.self_attn", found
    assert found.plain is None and found.accelerated is None
    printed = capsys.readouterr().out
    for part in ("WRONG", f"first wrong: model.layers.{layer}.self_attn: its 0 is off by", "measured of right results"):
        assert part in printed


@pytest.mark.parametrize("layer", [1, 16, 31])
def test_a_window_one_key_too_long_shows_in_a_deep_model_in_bfloat16(monkeypatch, layer):
    """By what the layer itself returns: on the way to the output it may drown in the rounding of 32 layers."""
    model, inputs = mistral(32).bfloat16(), text("left")
    assert compare(model, **inputs).ok
    plant(monkeypatch, model, f"model.layers.{layer}.self_attn", one_more_key)
    found = compare(model, **inputs)
    assert not found.ok and found.first_wrong == f"model.layers.{layer}.self_attn", found
    assert found.first_wrong == next(x.name for x in found.modules if not x.ok)


class Checkpointed(Encoder):
    """Runs its attention again in the course of backward, and leaves it halfway when it has seen enough."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return checkpoint(self.attention, x, x, x, need_weights=False, use_reentrant=False)[0]


def test_what_is_wrong_is_named_under_checkpointing(monkeypatch):
    model, images = drawn(Checkpointed()).train(), torch.randn(4, 3, 32, 32)
    assert compare(model, images).ok
    plant(monkeypatch, model, "attention", lambda q, k, v, spans: (q, k, -v, spans))
    found = compare(model, images)
    assert found.first_wrong == "attention" and found.why.startswith("its 0 is off by"), found


@pytest.mark.parametrize(
    "name, path",
    [
        ("vit", "blocks.1.attn"),
        ("llava", "model.vision_tower.encoder.layers.0.self_attn"),
        ("clip", "text_model.encoder.layers.1.self_attn"),  # in a model that is swapped itself, for its loss
    ],
)
def test_a_wrong_gradient_alone_is_named(monkeypatch, name, path):
    model, inputs = (vit(), {"x": torch.randn(2, 3, 32, 32)}) if name == "vit" else model_of(name)
    plant(monkeypatch, model, path, lambda q, k, v, spans: (q, Swollen.apply(k), v, spans))
    found = compare(model, **inputs, loss=(lambda output: output.loss) if name == "clip" else None)
    assert all(x.ok for x in (*found.outputs, *found.modules)) and not found.ok and found.first_wrong == path, found
    assert f"first wrong: {path}: the gradient it is handed is right, that of {path}" in str(found)


def test_a_wrong_gradient_of_the_loss_is_the_models_own(monkeypatch):
    losses = importlib.import_module("mmkernels.integrations.transformers.losses")
    whole = losses.clip_loss
    monkeypatch.setattr(losses, "clip_loss", lambda image, *rest, **more: whole(Swollen.apply(image), *rest, **more))
    model, inputs = model_of("clip")
    found = compare(model, **inputs, loss=lambda output: output.loss)
    assert not found.ok and found.first_wrong == "" and "first wrong: the model itself" in str(found), found


def test_an_exception_is_a_finding(monkeypatch):
    model, inputs = mistral(), text("left")

    def raising(q, k, v, spans):
        raise RuntimeError("misaligned address\nand more of it")

    plant(monkeypatch, model, "model.layers.1.self_attn", raising)
    found = compare(model, **inputs)
    assert not found.ok and found.exception == "RuntimeError: misaligned address", found
    assert found.first_wrong == "model.layers.1.self_attn"
    assert "WRONG: the accelerated model raises RuntimeError: misaligned address" in str(found)


def test_other_random_numbers_are_told(monkeypatch):
    model = drawn(Encoder(0.5)).train()

    def drawing(q, k, v, spans):
        torch.rand(1)
        return torch.nn.functional.dropout(q), k, v, spans

    plant(monkeypatch, model, "attention", drawing)
    found = compare(model, torch.randn(4, 3, 32, 32))
    assert not found.ok and found.other_draws and "drew other random numbers than the plain model" in str(found)


# ---- what it refuses


def test_errors():
    with pytest.raises(ValueError, match="nothing to swap in Linear"):
        compare(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"compare: model is a function; it must be a torch\.nn\.Module"):
        compare(vit, torch.randn(2, 3))
    with pytest.raises(AssertionError, match="Input height"):  # the plain model's own
        compare(vit(), torch.randn(2, 3, 48, 48))
    model = vit()
    model.kept = model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"compare: this VisionTransformer cannot be copied.*graph leaves"):
        compare(model, torch.randn(2, 3, 32, 32))


def test_attention_by_name_leaves_nothing_to_compare_with():
    import mmkernels.integrations.transformers  # noqa: F401

    model, inputs = model_of("llava")
    model.set_attn_implementation("mmkernels")
    with pytest.raises(ValueError, match='given attn_implementation="mmkernels" by name'):
        compare(model, **inputs)


# ---- what it leaves


class Changing(Encoder):
    """Writes to whatever a model can write to when it runs."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.temperature = nn.Parameter(torch.tensor(9.0))
        self.calls = 0

    def forward(self, images: Tensor, seen: list) -> Tensor:
        self.calls += 1
        seen.append(images)
        images *= random.random() + numpy.random.rand()
        with torch.no_grad():
            self.temperature.clamp_(max=4.0)
            if self.training:
                self.patches.weight.mul_(0.9)
        return super().forward(images) * self.temperature


def snapshot(model: nn.Module) -> dict:
    found = {name: x.clone() for name, x in model.state_dict().items()}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found


def identities(model: nn.Module) -> list:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    modules = [(id(x), type(x), x.training, sorted(x.__dict__)) for x in model.modules()]
    return [*map(id, tensors), *(p.requires_grad for p in model.parameters()), *modules]


def generators() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", [False, True])
def test_everything_is_as_it_was(monkeypatch, training, wrong):
    if training:
        monkeypatch.setattr(SUBJECT, "SHARED", 0)  # in training nothing is shared, however large
    model, images, seen = drawn(Changing()).train(training), torch.randn(4, 3, 32, 32), []
    model.temperature.data.fill_(9.0)
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    if wrong:
        plant(monkeypatch, model, "attention", lambda q, k, v, spans: (q, k, -v, spans))
    before, same, drawn_from, given = snapshot(model), identities(model), generators(), images.clone()
    found = compare(model, images, seen)
    assert found.ok != wrong, found
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], x) for name, x in after.items())
    assert identities(model) == same and generators() == drawn_from
    assert torch.equal(images, given) and not seen and model.calls == 0


def test_large_weights_are_as_they_were():
    """Twins of a model in evaluation mode share them."""
    model = nn.Sequential(nn.Conv2d(3, 512, 16, 16), nn.Flatten(2)).eval()
    assert model[0].weight.numel() >= SUBJECT.SHARED
    before, same = snapshot(model), identities(model)
    assert compare(model, torch.randn(2, 3, 32, 32)).ok
    assert all(torch.equal(before[name], x) for name, x in snapshot(model).items()) and identities(model) == same


def test_a_cache_that_is_handed_in_is_as_it_was():
    model, inputs = mistral(), text("left")
    with torch.no_grad():
        cache = model(input_ids=inputs["input_ids"][:, :6], use_cache=True).past_key_values
    found = compare(model, input_ids=inputs["input_ids"][:, 6:9], past_key_values=cache, use_cache=True)
    assert found.ok and cache.get_seq_length() == 6, found


def test_accelerated_before(monkeypatch):
    """It stays accelerated, with what it had, which is what is compared."""
    model, inputs = model_of("llava")
    first = accelerate(model, only="attention", backend="reference", verbose=False)
    same, asked, select = identities(model), [], backends.select
    monkeypatch.setattr(backends, "select", lambda op, *x: asked.append((op, x[0])) or select(op, *x))
    found = compare(model, **inputs)
    assert found.ok and str(found.report) == str(first) and identities(model) == same, found
    assert set(asked) == {("span_attention", "reference")}
    monkeypatch.undo()
    plant(monkeypatch, model, "model.language_model.layers.1.self_attn", lambda q, k, v, spans: (q, k, -v, spans))
    assert compare(model, **inputs).first_wrong == "model.language_model.layers.1.self_attn"
    restore(model)
    assert not any(type(x).__module__.startswith("mmkernels") for x in model.modules())


def test_a_part_accelerated_before():
    model, inputs = model_of("llava")
    accelerate(model.model.vision_tower, verbose=False)
    found = compare(model, **inputs)
    assert found.ok and all("vision_tower" in entry.path for entry in found.report.swapped), found
    assert len(found.report.swapped) == 3


def test_paths_of_what_has_no_name():
    assert list(named_outputs({"past_key_values": torch.ones(1), "a": [torch.ones(1), 3]})) == ["a.0", "a.1"]

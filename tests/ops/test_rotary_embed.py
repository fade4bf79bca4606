"""rotary_embed: against transformers' own, under compile, its gradients, and every error.

That the backends equal the reference, within the error budget, is tests/test_check.py's.
"""

import pytest
import torch
import torch._dynamo.testing
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_to_neighbours
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from mmkernels import rotary_embed


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(*shape)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def test_equals_the_vision_towers_of_qwen(backend):
    qkv, (cos, sin) = torch.randn(50, 3, 4, 80), tables(50, 80)
    expected = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    turned = rotary_embed(qkv.flatten(1, 2)[:, :8], cos, sin, backend=backend)
    for ours, theirs in zip(turned.chunk(2, 1), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equals_llama(backend):
    q, k, (cos, sin) = torch.randn(2, 6, 30, 64), torch.randn(2, 2, 30, 64), tables(2, 30, 64)
    for x, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        ours = rotary_embed(x.transpose(1, 2), cos, sin, backend=backend).transpose(1, 2)
        torch.testing.assert_close(ours, theirs)


def test_interleaved_equals_cohere(backend):
    q, k, (cos, sin) = torch.randn(2, 6, 30, 36), torch.randn(2, 2, 30, 36), tables(2, 30, 18)
    whole = [table.repeat_interleave(2, -1) for table in (cos, sin)]
    for x, theirs in zip((q, k), apply_to_neighbours(q, k, *whole), strict=True):
        for given in (cos, sin), whole:
            ours = rotary_embed(x.transpose(1, 2), *given, interleaved=True, backend=backend).transpose(1, 2)
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)])
def test_gradients_of_every_order_are_those_of_the_result(shape, interleaved):
    x, (cos, sin) = torch.randn(2, 3, 2, 6, dtype=torch.float64), tables(*shape, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (x, cos, sin)]

    def turned(*inputs):
        return rotary_embed(*inputs, interleaved=interleaved, backend="reference")

    assert torch.autograd.gradcheck(turned, inputs)
    assert torch.autograd.gradgradcheck(turned, inputs)


def test_a_gradient_of_any_layout(backend):
    x, (cos, sin) = torch.randn(5, 4, 16, requires_grad=True), tables(5, 16)
    out = rotary_embed(x, cos, sin, backend=backend)
    for grad in (torch.randn(16, 4, 5).permute(2, 1, 0), torch.randn(1, 1, 1).expand(5, 4, 16)):
        found, again = (torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (grad, grad.contiguous()))
        assert torch.equal(found, again)


def test_nothing_to_turn(backend):
    for shape in ((0, 2, 8), (0, 3, 2, 8), (2, 0, 2, 8)):
        out = rotary_embed(torch.randn(shape), *tables(shape[-3], 8), backend=backend)
        assert out.shape == shape


@pytest.mark.parametrize(("interleaved", "pair"), [(False, [3, 11]), (True, [2, 3])])
def test_a_nan_stays_in_its_pair(backend, interleaved, pair):
    x, (cos, sin) = torch.randn(5, 4, 16), tables(5, 16)
    x[2, 1, 3] = torch.nan
    expected = torch.zeros(5, 4, 16, dtype=torch.bool)
    expected[2, 1, pair] = True
    assert torch.equal(rotary_embed(x, cos, sin, interleaved=interleaved, backend=backend).isnan(), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(backend, interleaved, transposed):
    x, (cos, sin) = torch.randn(2, 5, 3, 8), tables(1, 5, 8)
    torch.library.opcheck(torch.ops.mmkernels.rotary_embed, (x, cos, sin, interleaved, transposed, backend))


def test_compiles_whole_and_once_whatever_the_length(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def turned(x, cos, sin):
        return rotary_embed(x, cos, sin, backend=backend)

    compiled = torch.compile(turned, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (7, 12, 30):
        x, (cos, sin) = torch.randn(tokens, 3, 8, requires_grad=True), tables(tokens, 8)
        grad = torch.randn(tokens, 3, 8)
        a, b = (f(x, cos, sin) for f in (compiled, turned))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, x, grad), torch.autograd.grad(b, x, grad))
    assert counter.frame_count == 1


@pytest.mark.parametrize("lead", [(), (1,), (2,)])
def test_tables_of_other_shapes(lead, backend):
    """Of one row for the whole batch, as transformers makes them, and of half the width, with their gradients."""
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(*lead, 5, 4, requires_grad=True)
    cos, sin = angles.cos(), angles.sin()
    whole = [torch.cat([t, t], -1).expand(2, 5, 8) for t in (cos, sin)]
    found, expected = rotary_embed(x, cos, sin, backend=backend), rotary_embed(x, *whole, backend=backend)
    assert torch.equal(found, expected)
    weights = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(found, angles, weights, retain_graph=True), torch.autograd.grad(expected, angles, weights)
    )


X, COS = torch.zeros(5, 3, 8), torch.zeros(5, 8)
ERRORS = [
    ((X.numpy(), COS, COS), TypeError, r"rotary_embed: x must be a torch.Tensor, got ndarray"),
    ((X.int(), COS, COS), TypeError, r"rotary_embed: x has dtype torch.int32; accepted are float32"),
    ((X[0], COS, COS), ValueError, r"x has shape \(3, 8\); it must be \(T, H, D\) or \(B, T, H, D\)"),
    ((X[..., :7], COS, COS), ValueError, r"x has shape \(5, 3, 7\); it needs at least one head, of an even number"),
    ((X[:, :0], COS, COS), ValueError, r"x has shape \(5, 0, 8\); it needs at least one head"),
    ((torch.zeros(8, 3, 5).permute(2, 1, 0), COS, COS), ValueError, r"the last must be 1: call x.contiguous\(\)"),
    ((X, COS[:4], COS), ValueError, r"cos has shape \(4, 8\); for x of shape \(5, 3, 8\) it must be \(5, 8\)"),
    ((X, COS, COS[:, :4]), ValueError, r"cos has shape \(5, 8\), sin \(5, 4\); they must be equal"),
    ((X, COS, COS[:, :5]), ValueError, r"sin has shape \(5, 5\); .* \(5, 8\) or \(1, 5, 8\), or have 4 in place of 8"),
    ((X[None], COS[None], COS), ValueError, r"cos has shape \(1, 5, 8\), sin \(5, 8\); they must be equal"),
    ((X, COS, COS.bool()), TypeError, r"sin has dtype torch.bool"),
    ((X, COS, COS.to("meta")), ValueError, r"sin is on meta, x on cpu"),
]


@pytest.mark.parametrize(("args", "kind", "message"), ERRORS, ids=[case[-1][:40] for case in ERRORS])
def test_errors_name_the_argument(args, kind, message):
    with pytest.raises(kind, match=message):
        rotary_embed(*args)

"""Derivatives of every op, whoever asks for them: right, against plain PyTorch in float64, or refused."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_calls import ONCE, OPS, ROWS, SPANS, TWICE, assert_same, by, drawn, plain_rotary, scalar, sines, wide
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vjp, vmap

from mmkernels import RowSpans, patch_embed, rotary_embed, span_attention

# ---- forward mode


def subsets(count):
    """One at a time, and all."""
    return [*([i] for i in range(count)), list(range(count))]


@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name, backend):
    """Along each of the tensors alone, and along all; with torch.func and by dual numbers; with and without grad."""
    ours, plain, inputs = drawn(name)
    tangents = [torch.randn_like(x) for x in inputs]
    for moved in subsets(len(inputs)):

        def at(f, args, moved=moved):
            def of(*given):
                return f(*[given[moved.index(i)] if i in moved else x for i, x in enumerate(args)])

            return of

        some, along = [inputs[i] for i in moved], [tangents[i] for i in moved]
        _, truth = jvp(at(plain, wide(inputs)), tuple(wide(some)), tuple(wide(along)))
        f = at(by(ours, backend), inputs)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                out, found = jvp(f, tuple(some), tuple(along))
                assert_same(found, truth)
                assert_same(out, f(*some))
                with forward_ad.dual_level():
                    duals = f(*(forward_ad.make_dual(x, t) for x, t in zip(some, along, strict=True)))
                    parts = [
                        forward_ad.unpack_dual(x).tangent for x in (duals if isinstance(duals, tuple) else [duals])
                    ]
                assert_same(parts, list(truth) if isinstance(truth, tuple) else [truth])


def test_forward_mode_keeps_nothing():
    """What a jvp needs is let go with it."""
    x, cos, sin = torch.randn(5, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    with forward_ad.dual_level():
        out = rotary_embed(forward_ad.make_dual(x, x), cos, sin)
        assert forward_ad.unpack_dual(out).tangent is not None
    assert out.grad_fn is None


def test_a_query_that_sees_nothing_has_no_derivative(backend):
    nothing = RowSpans(ROWS[:3] * 0, torch.tensor([0, 2, 7], dtype=torch.int32), 7)
    q, k, v = (torch.randn(n, 2, 8) for n in (3, 7, 7))
    k[6], v[6] = torch.nan, torch.nan
    f = partial(span_attention, spans=nothing, return_lse=True, backend=backend)
    _, (t_out, t_lse) = jvp(f, (q, k, v), tuple(map(torch.ones_like, (q, k, v))))
    assert not t_out[0].any() and not t_lse[:, 0].any()
    assert t_out[1].isfinite().all() and t_out[2].isnan().all()


# ---- torch.func


@pytest.mark.parametrize("name", OPS)
def test_func_grad(name, backend):
    ours, plain, inputs = drawn(name)
    every = tuple(range(len(inputs)))
    truth = grad(scalar(plain), every)(*wide(inputs))
    assert_same(grad(scalar(by(ours, backend)), every)(*inputs), truth)
    leaves = [x.clone().requires_grad_() for x in inputs]
    scalar(by(ours, backend))(*leaves).backward()
    assert_same(tuple(x.grad for x in leaves), truth)


def mapped(inputs, which, size=3):
    """A few of each of those tensors, the mapped axis in different places."""
    dims = tuple(i % (x.dim() + 1) if i in which else None for i, x in enumerate(inputs))
    few = [
        x if dim is None else torch.randn(size, *x.shape).movedim(0, dim) for x, dim in zip(inputs, dims, strict=True)
    ]
    return few, dims


@pytest.mark.parametrize("name", OPS)
def test_vmap(name, backend):
    """Over each of the tensors alone, and over all: values, and gradients for each element."""
    ours, plain, inputs = drawn(name)
    every = tuple(range(len(inputs)))
    for which in subsets(len(inputs)):
        few, dims = mapped(inputs, which)
        elements = [[x if d is None else x.select(d, i) for x, d in zip(few, dims, strict=True)] for i in range(3)]
        f = by(ours, backend)
        truth = [plain(*wide(x)) for x in elements]
        found = vmap(f, dims)(*few)
        for one, part in zip(truth, range(3), strict=True):
            assert_same(
                [x[part] for x in found] if isinstance(found, tuple) else found[part],
                one if not isinstance(one, tuple) else list(one),
            )
        gradients = vmap(grad(scalar(f), every), dims)(*few)
        for i, element in enumerate(elements):
            assert_same([x[i] for x in gradients], list(grad(scalar(plain), every)(*wide(element))))


def test_vmap_of_nothing():
    q, k, v = (torch.randn(0, n, 2, 8) for n in (5, 7, 7))
    assert vmap(lambda *x: span_attention(*x, SPANS))(q, k, v).shape == (0, 5, 2, 8)
    with pytest.raises(NotImplementedError, match="mmkernels: vmap over an axis of length 0"):
        vmap(patch_embed, (None, 0))(torch.randn(2, 3, 8, 8), torch.randn(0, 6, 3, 4, 4))


def test_vmap_of_attention_is_one_call(monkeypatch):
    """The mapped axis becomes part of the batch."""
    from mmkernels.ops.span_attention import reference

    calls, original = [], reference.span_attention
    monkeypatch.setattr(reference, "span_attention", lambda q, *rest: (calls.append(q.shape), original(q, *rest))[1])
    q, k, v = torch.randn(3, 5, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    vmap(lambda q: span_attention(q, k, v, SPANS, backend="reference"))(q)
    assert calls == [(3, 5, 4, 8)]


# ---- derivatives of derivatives


def penalty(f):
    """A loss that holds a gradient by its first tensor."""

    def of(*inputs):
        (g,) = torch.autograd.grad(scalar(f)(*inputs), inputs[:1], create_graph=True)
        return g.square().sum() + scalar(f)(*inputs)

    return of


def by_backward(f, inputs):
    penalty(f)(*inputs).backward()
    return [x.grad for x in inputs]


def by_grad(f, inputs):
    return torch.autograd.grad(penalty(f)(*inputs), inputs)


def by_backward_of_some(f, inputs):
    penalty(f)(*inputs).backward(inputs=inputs[:1])
    return [inputs[0].grad]


def by_hvp(f, inputs):
    return [
        torch.autograd.functional.hvp(lambda x: scalar(f)(x, *inputs[1:]), inputs[0], torch.ones_like(inputs[0]))[1]
    ]


def by_double_vjp(f, inputs):
    """Of every element: their sum would cancel."""
    along = torch.ones_like(inputs[0])
    return list(torch.autograd.functional.jvp(lambda x: sines(f)(x, *inputs[1:]), inputs[0], along)[1])


def by_func(f, inputs):
    def of(x):
        return grad(lambda y: scalar(f)(y, *inputs[1:]))(x).square().sum()

    return [grad(of)(inputs[0].detach())]


def by_forward_over_reverse(f, inputs):
    inner = grad(lambda x: scalar(f)(x, *inputs[1:]))
    return [jvp(inner, (inputs[0].detach(),), (torch.ones_like(inputs[0]),))[1]]


def by_reverse_over_forward(f, inputs):
    def along(x):
        return jvp(lambda y: scalar(f)(y, *inputs[1:]), (x,), (torch.ones_like(x),))[1]

    return [grad(along)(inputs[0].detach())]


DOORS = [by_backward, by_grad, by_backward_of_some, by_hvp, by_double_vjp, by_func, by_forward_over_reverse]
DOORS += [by_reverse_over_forward]


def leaves(inputs):
    return [x.detach().clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name, door, backend):
    """By each tensor, of a penalty on the gradient by each."""
    ours, plain, inputs = drawn(name)
    for first in range(len(inputs)):

        def turned(f, first=first):
            return lambda x, *rest: f(*rest[:first], x, *rest[first:])

        order = [inputs[first], *inputs[:first], *inputs[first + 1 :]]
        truth = door(turned(plain), leaves(wide(order)))
        assert_same(list(door(turned(by(ours, backend)), leaves(order))), list(truth))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_are_refused(name, door, backend):
    ours, plain, inputs = drawn(name)
    if door is by_reverse_over_forward and name.startswith("span_attention"):  # whose forward mode is plain PyTorch
        assert_same(list(door(by(ours, backend), leaves(inputs))), list(door(plain, leaves(wide(inputs)))))
        return
    with pytest.raises(RuntimeError, match=r"mmkernels: the gradients of .* cannot be differentiated again"):
        door(by(ours, backend), leaves(inputs))


def test_third_derivatives_of_patch_embed():
    """A product's are products, however often."""
    images, weight = torch.randn(2, 3, 8, 8) / 8, torch.randn(6, 3, 4, 4) / 8

    def third(f, images, weight):
        def first(w):
            return grad(lambda w: f(images, w).sin().sum())(w)

        return grad(lambda w: grad(lambda w: first(w).square().sum())(w).sin().sum())(weight)

    assert_same(third(patch_embed, images, weight), third(plain_patches_alone, images.double(), weight.double()))


def plain_patches_alone(images, weight):
    return F.conv2d(images, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def test_vjp_and_jacobian():
    x, cos, sin = torch.randn(5, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    _, back = vjp(lambda x: rotary_embed(x, cos, sin), x)
    assert_same(
        back(torch.ones_like(x))[0],
        vjp(lambda x: plain_rotary(x, *wide((cos, sin))), x.double())[1](torch.ones_like(x).double())[0],
    )
    images, weight = torch.randn(1, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert_same(jacfwd(patch_embed)(images, weight), jacfwd(plain_patches_alone)(images.double(), weight.double()))


def test_gradients_of_pixels():
    """uint8 images have no gradient; their weight has, twice."""
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std, weight = torch.rand(3), torch.rand(3) + 0.5, torch.randn(6, 3, 4, 4)
    normal = (pixels.double() / 255 - mean[:, None, None]) / std[:, None, None]

    def ours(w):
        return patch_embed(pixels, w, mean=mean, std=std).sin().sum()

    def plain(w):
        return plain_patches_alone(normal, w).sin().sum()

    for of in (grad, lambda f: grad(lambda w: grad(f)(w).square().sum())):
        assert_same(of(ours)(weight), of(plain)(weight.double()))
    assert_same(jvp(ours, (weight,), (weight,))[1], jvp(plain, (weight.double(),), (weight.double(),))[1])


# ---- beside torch.compile


@pytest.mark.parametrize(("name", "door"), [*itertools.product(OPS, ["jvp", "grad"])])
def test_a_compiled_op_under_a_transform(name, door):
    """Compiled in pieces, it is right."""
    ours, plain, inputs = drawn(name)
    torch.compiler.reset()
    made_of = sines if door == "jvp" else scalar
    f = torch.compile(made_of(by(ours, "reference")), backend="aot_eager")
    take = (lambda f, x: jvp(f, tuple(x), tuple(x))[1]) if door == "jvp" else (lambda f, x: grad(f)(*x))
    truth = take(made_of(plain), wide(inputs))
    assert_same(take(f, inputs), truth)

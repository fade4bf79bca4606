"""nearest_code and max_similarity: against the models that search so, their gradients, and every error.

That the backends equal the reference, within the error budget, is tests/test_check.py's.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer

from mmkernels import max_similarity, nearest_code
from mmkernels.bench.measure import with_peak_memory
from mmkernels.check.similarity import plain_max_similarity


def test_equals_the_quantizer_of_chameleon(backend):
    quantizer = ChameleonVQVAEVectorQuantizer(ChameleonVQVAEConfig(num_embeddings=50, embed_dim=6))
    torch.nn.init.normal_(quantizer.embedding.weight)
    grid = torch.randn(2, 6, 5, 7)
    theirs, _, indices = quantizer(grid)
    found, quantised = nearest_code(grid.movedim(1, -1), quantizer.embedding.weight, backend=backend)
    assert torch.equal(found.flatten(), indices) and found.shape == (2, 5, 7) and found.dtype == torch.int64
    torch.testing.assert_close(quantised.movedim(-1, 1), theirs)
    assert torch.equal(quantised, quantizer.embedding.weight[found])


def test_the_first_of_equal_codes_is_taken(backend):
    codes = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).repeat(30, 1)
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]])
    assert nearest_code(x, codes, backend=backend).indices.tolist() == [1, 1, 2]


def test_the_straight_through_estimate(backend):
    """The gradient of x passes by, that of the codes is the sum over who chose them, and steady."""
    x, codes = torch.randn(400, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    weights = torch.randn(400, 3)
    indices, quantised = nearest_code(x, codes, backend=backend)
    passed = torch.autograd.grad((x + (quantised - x).detach()).sum(), x)[0]
    assert torch.equal(passed, torch.ones_like(x))
    runs = [torch.autograd.grad(quantised, codes, weights, retain_graph=True)[0] for _ in range(3)]
    expected = torch.zeros(5, 3, dtype=torch.float64).index_add(0, indices, weights.double())
    torch.testing.assert_close(runs[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(runs[0], run) for run in runs[1:])
    assert not torch.autograd.grad(quantised.sum(), x, allow_unused=True)[0]


def packed(lengths, width=6):
    tokens = torch.randn(sum(lengths), width)
    return tokens, torch.tensor([0, *itertools.accumulate(lengths)])


def test_lengths_are_cut_as_if_alone(backend):
    """Texts and images of all lengths, the last tokens padding; int64 and int32 places."""
    texts, cu_texts = packed((3, 1, 0, 5))
    images, cu_images = packed((2, 70, 9))
    padded = torch.cat([texts, torch.full((2, 6), torch.nan)]), torch.cat([images, torch.full((3, 6), torch.nan)])
    found = max_similarity(*padded, cu_texts=cu_texts, cu_images=cu_images.int(), backend=backend)
    for n, text in enumerate(texts.split(cu_texts.diff().tolist())):
        for m, image in enumerate(images.split(cu_images.diff().tolist())):
            expected = (text @ image.T).amax(1).sum()
            torch.testing.assert_close(found[n, m], expected, rtol=1e-5, atol=1e-5)


def test_places_that_are_none_read_nothing_outside(backend):
    """Beyond the tokens, below 0, falling: clamped, so that each is cut as if they rose."""
    texts, images = torch.randn(4, 6), torch.randn(9, 6)
    wild = torch.tensor([-5, 3, 1, 100, 7])
    found = max_similarity(texts, images, cu_images=wild, cu_texts=torch.tensor([0, 4]), backend=backend)
    tame = max_similarity(
        texts, images, cu_images=torch.tensor([0, 3, 3, 9, 9]), cu_texts=torch.tensor([0, 4]), backend=backend
    )
    assert torch.equal(found, tame) and found.isneginf().tolist() == [[False, True, False, True]]


def test_one_token_each_is_a_product(backend):
    texts, images = torch.randn(7, 5), torch.randn(9, 5)
    torch.testing.assert_close(max_similarity(texts, images, backend=backend), texts @ images.T)


@pytest.mark.parametrize("sizes", [((3, 4), (2, 5)), ((6,), (40,))], ids=str)
def test_gradients_of_every_order_are_those_of_the_result(sizes):
    texts, images = (torch.randn(*size, 3, dtype=torch.float64, requires_grad=True) for size in sizes)

    def similarity(texts, images):
        return max_similarity(texts, images, backend="reference")

    assert torch.autograd.gradcheck(similarity, (texts, images), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(similarity, (texts, images))


def test_quantised_is_differentiable_in_every_order():
    x, codes = torch.randn(9, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def squares(codes):
        return nearest_code(x, codes, backend="reference").quantised.square()

    assert torch.autograd.gradcheck(squares, codes, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squares, codes)


def test_memory_is_that_of_the_result():
    """Not of the products of all tokens: 64 MB of them here."""
    texts, images = torch.randn(512, 16, requires_grad=True), torch.randn(512, 64, 16, requires_grad=True)

    def step():
        max_similarity(texts, images, backend="cpu").sum().backward()

    step()
    _, peak = with_peak_memory(step, "cpu")
    assert peak is None or peak < 24 << 20


def test_compiles_whole_and_once_whatever_the_length(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def both(x, codes, images):
        return nearest_code(x, codes, backend=backend).quantised.sum() + max_similarity(x, images, backend=backend)

    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for count in (7, 12, 30):
        x, codes, images = torch.randn(count, 4), torch.randn(9, 4, requires_grad=True), torch.randn(3, 5, 4)
        a, b = (f(x, codes, images) for f in (compiled, both))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), codes)[0] for out in (a, b)))
    assert counter.frame_count == 1


def test_opcheck(backend):
    rows, columns, starts = torch.randn(5, 4), torch.randn(9, 4), torch.tensor([0, 3, 9], dtype=torch.int32)
    indices = torch.tensor([[0, 3], [2, 8], [1, 4], [-1, 5], [0, 3]], dtype=torch.int32)
    ops = torch.ops.mmkernels
    torch.library.opcheck(ops.row_maxima, (rows, columns, None, starts, backend))
    torch.library.opcheck(ops.gather_columns, (torch.randn(5, 2), columns, indices, backend))
    torch.library.opcheck(ops.scatter_rows, (torch.randn(5, 2), rows, indices, 9, backend))


def test_autocast_takes_products_in_half_types(backend):
    texts, images = torch.randn(5, 3, 8), torch.randn(4, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = max_similarity(texts, images, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain_max_similarity(texts.bfloat16().float(), images.float()))


X, CODES = torch.zeros(5, 8), torch.zeros(3, 8)
ERRORS = [
    (lambda: nearest_code(X.numpy(), CODES), TypeError, r"nearest_code: x must be a torch.Tensor, got ndarray"),
    (lambda: nearest_code(X.long(), CODES), TypeError, r"x has dtype torch.int64; accepted are float32"),
    (lambda: nearest_code(X, CODES[:, :4]), ValueError, r"x has shape \(5, 8\); for codes of \(3, 4\) it must be"),
    (
        lambda: nearest_code(X, CODES[:0]),
        ValueError,
        r"codes has shape \(0, 8\); it must be \(K, D\), K and D at least",
    ),
    (lambda: nearest_code(X, CODES[0]), ValueError, r"codes has shape \(8,\)"),
    (lambda: nearest_code(X, CODES.half()), TypeError, r"codes has dtype torch.float16, x torch.float32"),
    (lambda: nearest_code(X, CODES.to("meta")), ValueError, r"codes is on meta, x on cpu"),
    (lambda: nearest_code(X, CODES, backend="gpu"), ValueError, r"backend must be 'auto' or one of"),
    (lambda: max_similarity(X, CODES[:, :4]), ValueError, r"texts has 8 numbers and one of images 4"),
    (lambda: max_similarity(X[0], CODES), ValueError, r"texts has shape \(8,\); it must be \(N, tokens, D\)"),
    (lambda: max_similarity(X[None], CODES, cu_texts=torch.tensor([0, 5])), ValueError, r"texts has shape \(1, 5, 8\)"),
    (lambda: max_similarity(X, CODES, cu_images=torch.tensor([0.0, 3])), ValueError, r"cu_images has dtype"),
    (lambda: max_similarity(X, CODES, cu_images=[0, 3]), TypeError, r"cu_images must be a torch.Tensor, got list"),
    (lambda: max_similarity(X, CODES.half()), TypeError, r"images has dtype torch.float16, texts torch.float32"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()

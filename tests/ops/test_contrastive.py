"""clip_loss and siglip_loss: against the code users have today, under compile and autocast, and every error.

That the backends equal the reference, within the error budget, is tests/test_check.py's.
"""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import clip_loss, siglip_loss
from mmkernels.check.cases import OPS

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


def features(n: int, d: int, dtype=torch.float32, length: float | None = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = torch.randn(2, n, d, dtype=torch.float64)
    text = text + 0.5 * image
    if length is not None:
        image, text = length * F.normalize(image), length * F.normalize(text)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("bias", [None, -3.0])
def test_reference_equals_open_clip(bias):
    from open_clip.loss import ClipLoss

    image, text = features(13, 7, torch.float64)
    scale = torch.tensor(20.0, **DOUBLE)
    bias = None if bias is None else torch.tensor(bias, **DOUBLE)
    ours = clip_loss(image, text, scale, bias, backend="reference")
    theirs = ClipLoss()(image, text, scale, bias)
    inputs = (image, text, scale) if bias is None else (image, text, scale, bias)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


def test_siglip_reference_equals_open_clip():
    from open_clip.loss import SigLipLoss

    image, text = features(13, 7, torch.float64)
    scale, bias = torch.tensor(10.0, **DOUBLE), torch.tensor(-10.0, **DOUBLE)
    ours = siglip_loss(image, text, scale, bias, backend="reference")
    theirs = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(ours, theirs)
    inputs = (image, text, scale, bias)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(theirs, *inputs))


def test_reference_equals_transformers():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text = features(9, 5, torch.float64)
    torch.testing.assert_close(
        clip_loss(image, text, 14.0, backend="reference"), image_text_contrastive_loss(14.0 * text @ image.T)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_reference_gradients_are_those_of_the_loss(smoothing):
    image, text = features(6, 4, torch.float64, length=None)
    scale, bias = torch.tensor([3.0], **DOUBLE), torch.tensor(-1.0, **DOUBLE)
    assert torch.autograd.gradcheck(
        lambda *x: clip_loss(*x, label_smoothing=smoothing, backend="reference"), (image, text, scale, bias)
    )
    assert torch.autograd.gradcheck(
        lambda *x: siglip_loss(*x, normalize=True, backend="reference"), (image, text, scale, bias)
    )


@pytest.mark.parametrize("n", [1, 5])
def test_opcheck(backend, n):
    image, text = (x.detach() for x in features(n, 8))
    scale, bias = torch.tensor(5.0), torch.tensor(-5.0)
    ops = torch.ops.mmkernels
    for ids in ((None, None), (torch.arange(n), torch.arange(n) % 3)):
        clip = image, text, scale, *ids, "positives", "both", 0.1, backend
        siglip = image, text, scale, bias, *ids, "ignored", backend
        torch.library.opcheck(ops.clip_loss, clip)
        torch.library.opcheck(ops.clip_loss_with_grads, clip)
        torch.library.opcheck(ops.siglip_loss, siglip)
        torch.library.opcheck(ops.siglip_loss_with_grads, siglip)


def test_compiles_whole_and_once_whatever_the_batch(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(image, text, scale, bias):
        clip = clip_loss(image, text, scale.exp(), label_smoothing=0.1, backend=backend)
        return clip + siglip_loss(image, text, scale.exp(), bias, normalize=True, backend=backend)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    for n in (4, 7, 12, 33):
        image, text = features(n, 16)
        inputs = (image, text, scale, bias)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        torch.testing.assert_close(gradients(compiled(*inputs), *inputs), gradients(step(*inputs), *inputs))
    assert counter.frame_count == 1


def test_autocast_takes_features_in_its_dtype_and_sums_in_float32(backend):
    image, text = features(40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clip_loss(image, text, 10.0, backend=backend)
    half = clip_loss(image.bfloat16(), text.bfloat16(), 10.0, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, half)
    assert gradients(loss, image)[0].dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 70),
    scale=st.floats(0.0, 150.0),
    length=st.sampled_from([1e-3, 1.0, 30.0]),
    smoothing=st.sampled_from([0.0, 0.3]),
)
def test_properties_of_the_loss(n, d, scale, length, smoothing):
    image, text = features(n, d, length=length)
    loss = clip_loss(image, text, scale, label_smoothing=smoothing, backend="cpu")
    d_image, d_text = gradients(loss, image, text)
    assert torch.isfinite(loss) and torch.isfinite(d_image).all() and torch.isfinite(d_text).all()
    # Image and text are interchangeable, and so is the order of the pairs, to rounding of the sums.
    order = torch.randperm(n)
    bound = 64 * torch.finfo(torch.float32).eps * (1 + scale * length**2)
    assert abs(clip_loss(text, image, scale, label_smoothing=smoothing, backend="cpu") - loss) <= bound
    assert abs(clip_loss(image[order], text[order], scale, label_smoothing=smoothing, backend="cpu") - loss) <= bound
    assert loss >= -bound
    if n == 1:
        assert abs(loss) <= bound


@pytest.mark.parametrize("scale", [100.0, 150.0, 1e4])
def test_large_scales_neither_overflow_nor_lose_the_answer(backend, scale):
    image, text = features(64, 32)
    loss = clip_loss(image, text, scale, backend=backend)
    truth = clip_loss(image.double(), text.double(), scale, backend="reference")
    assert torch.isfinite(loss)
    assert abs(loss - truth) <= 1e-6 * scale


def test_bfloat16_features_give_a_float32_loss(backend):
    image, text = features(300, 64, torch.bfloat16)
    loss = clip_loss(image, text, 100.0, backend=backend)
    truth = clip_loss(image.double(), text.double(), 100.0, backend="reference")
    eager = F.cross_entropy((100.0 * image @ text.T).float(), torch.arange(300))
    float32 = clip_loss(image.float(), text.float(), 100.0, backend="reference")
    ulp = torch.finfo(torch.float32).eps * 100.0  # of the logits, whose difference the loss is
    assert abs(loss - truth) <= 2 * abs(float32 - truth) + 2 * ulp
    assert abs(eager - truth) > 100 * abs(loss - truth)  # what plain bfloat16 logits lose


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(backend, bad):
    for row, column in ((0, 0), (36, 22)):
        image, text = (x.detach().clone() for x in features(37, 23))
        image[row, column] = bad
        image.requires_grad_()
        for loss in (
            clip_loss(image, text, 10.0, backend=backend),
            siglip_loss(image, text, 10.0, 0.0, backend=backend),
        ):
            assert not torch.isfinite(loss)
            if bad != bad:  # an infinite logit has a gradient: the sigmoid saturates
                assert gradients(loss, image)[0].isnan().any()


def test_a_bias_moves_nothing_and_gets_a_zero_gradient(backend):
    image, text = features(20, 10)
    bias = torch.tensor([4.0], requires_grad=True)
    loss = clip_loss(image, text, 10.0, bias, backend=backend)
    assert torch.equal(loss, clip_loss(image, text, 10.0, backend=backend))
    assert torch.equal(gradients(loss, bias)[0], torch.zeros(1))


# ---- more texts than images, one direction, ids


@settings(max_examples=80, deadline=None)
@given(
    loss=st.sampled_from(["clip_loss", "siglip_loss"]),
    n=st.integers(1, 60),
    m=st.integers(1, 200),
    ids=st.integers(0, 30),
    same=st.sampled_from(["positives", "ignored"]),
    direction=st.sampled_from(["both", "image_to_text", "text_to_image"]),
    scale=st.sampled_from([-20.0, 1.0, 30.0]),
)
def test_pairings_of_all_kinds_against_plain_code(loss, n, m, ids, same, direction, scale):
    """ids: so many different ones, none for 0."""
    image, text = (F.normalize(torch.randn(count, 8, dtype=torch.float64)) for count in (n, m))
    options = {} if loss == "siglip_loss" else {"direction": direction}
    scalars = {"logit_scale": scale} | ({} if loss == "clip_loss" else {"logit_bias": -2.0})
    if ids:
        drawn = [torch.randint(-ids, ids, (count,)) for count in (n, m)]
        options |= dict(zip(("image_ids", "text_ids"), drawn, strict=True), same=same)
        if same == "positives" and not torch.isin(*drawn).any():
            options["text_ids"][0] = options["image_ids"][0]  # where nothing belongs together plain code gives NaN
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    expected = OPS[loss].plain(*leaves, **scalars, **options)
    ours = [x.float().requires_grad_() for x in (image, text)]
    found = OPS[loss].call(*ours, **scalars, **options, backend="cpu")
    values = [found, *gradients(found, *ours)], [expected, *gradients(expected, *leaves)]
    for value, truth in zip(*values, strict=True):
        assert (value - truth).abs().max() <= 3e-5 * max(1.0, truth.abs().max())


def test_infonce_is_one_direction(backend):
    image, text = features(30, 16)
    loss = clip_loss(image, text, 20.0, direction="image_to_text", backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(20.0 * image @ text.T, torch.arange(30)))


def test_a_queue_of_earlier_texts_is_detached_rows(backend):
    """MoCo's InfoNCE: the key of each query, and a queue that belongs to nobody."""
    query, key = features(20, 16)
    queue = F.normalize(torch.randn(50, 16))
    loss = clip_loss(query, torch.cat([key, queue]), 10.0, direction="image_to_text", backend=backend)
    positive, negative = (query * key).sum(1, keepdim=True), query @ queue.T
    logits = 10.0 * torch.cat([positive, negative], 1)
    # MoCo's negatives are the queue alone; ours are those and the other keys of the batch
    others = (10.0 * query @ key.T).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(torch.cat([logits, others], 1), torch.zeros(20, dtype=torch.int64))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, query, key), gradients(expected, query, key))


def test_unicl_has_classes_for_ids(backend):
    """https://github.com/microsoft/UniCL: soft targets, the same for both directions of a batch of classes."""
    image, text = features(24, 16)
    classes = torch.randint(0, 5, (24,))
    same = (classes[:, None] == classes).float()
    targets = same / same.sum(1, keepdim=True)
    logits = 10.0 * image @ text.T
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    loss = clip_loss(image, text, 10.0, image_ids=classes, text_ids=classes, backend=backend)
    torch.testing.assert_close(loss, expected)


def test_equal_captions_are_neither_positive_nor_negative(backend):
    """Rows that are the same text twice: with them ignored the loss is that of the rows that differ."""
    image, text = features(12, 8)
    ids = torch.arange(12).clamp(max=10)
    twice = torch.cat([text[:11], text[10:11]])
    for loss, more in ((clip_loss, {"direction": "image_to_text"}), (siglip_loss, {"logit_bias": -1.0})):
        found = loss(image, twice, 10.0, image_ids=ids, text_ids=ids, same="ignored", backend=backend, **more)
        each = [
            loss(image[rows], twice[rows], 10.0, backend=backend, **more)
            for rows in (torch.arange(11), torch.tensor([*range(10), 11]))
        ]
        if loss is clip_loss:  # rows 0 to 9 see the text twice
            alone = F.cross_entropy(10.0 * image[10:] @ twice[:11].T, torch.tensor([10, 10]), reduction="sum")
            both = F.cross_entropy(10.0 * image[:10] @ twice.T, torch.arange(10), reduction="sum")
            torch.testing.assert_close(found, (alone + both) / 12)
        else:
            common = siglip_loss(image[:10], twice[:10], 10.0, -1.0, backend=backend)
            torch.testing.assert_close(12 * found, 11 * sum(each) - 10 * common)


@pytest.mark.parametrize("same", ["positives", "ignored"])
def test_where_nothing_belongs_together_there_is_no_loss(backend, same):
    image, text = features(5, 8)
    ids = (torch.arange(5), torch.arange(5) + 5)
    loss = clip_loss(image, text, 10.0, image_ids=ids[0], text_ids=ids[1], same=same, backend=backend)
    if same == "ignored":  # image i and text i still do
        torch.testing.assert_close(loss, clip_loss(image, text, 10.0, backend=backend))
    else:
        assert loss == 0 and not any(x.any() for x in gradients(loss, image, text))


def test_ids_compile_whole_and_not_again_for_other_lengths(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(image, text, image_ids, text_ids):
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        clip = clip_loss(image, text, 5.0, **ids, direction="image_to_text", backend=backend)
        return clip + siglip_loss(image, text, 5.0, -5.0, **ids, same="ignored", backend=backend)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    frames = set()
    for n in (4, 7, 12):
        image, text = features(n, 16)[0], features(n + 3, 16)[1]
        inputs = image, text, torch.arange(n), torch.arange(n + 3) // 2
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        frames.add(counter.frame_count)
    assert len(frames) == 1


X = torch.zeros(4, 8)
ERRORS = [
    ((X.tolist(), X, 1.0), TypeError, "image_features must be a torch.Tensor, got list"),
    ((X, X.int(), 1.0), TypeError, "text_features has dtype torch.int32; accepted are float32"),
    ((X[0], X, 1.0), ValueError, r"image_features has shape \(8,\); it must be \(N, D\)"),
    ((X[:0], X[:0], 1.0), ValueError, r"image_features has shape \(0, 8\)"),
    (
        (X, X[:, :3], 1.0),
        ValueError,
        r"image_features has shape \(4, 8\), text_features \(4, 3\); features of both must",
    ),
    ((X, X.bfloat16(), 1.0), TypeError, "text_features has dtype torch.bfloat16, image_features torch.float32"),
    ((X, X.to("meta"), 1.0), ValueError, "text_features is on meta, image_features on cpu"),
    ((X, X, torch.ones(2)), ValueError, r"logit_scale has shape \(2,\); it must have exactly one element"),
    ((X, X, torch.ones((), dtype=torch.int64)), TypeError, "logit_scale has dtype torch.int64"),
    ((X, X, torch.ones((), device="meta")), ValueError, "logit_scale is on meta, image_features on cpu"),
    ((X, X, 1.0, torch.ones(3)), ValueError, r"logit_bias has shape \(3,\)"),
    ((X, X, "1.0"), TypeError, "logit_scale must be a torch.Tensor, got str"),
]


IDS = torch.arange(4)
ID_ERRORS = [
    ({"image_ids": IDS}, ValueError, "image_ids is given without text_ids"),
    ({"text_ids": IDS}, ValueError, "text_ids is given without image_ids"),
    ({"image_ids": IDS.tolist(), "text_ids": IDS}, TypeError, "image_ids must be a torch.Tensor, got list"),
    ({"image_ids": IDS, "text_ids": IDS.int()}, TypeError, "text_ids has dtype torch.int32; accepted is int64"),
    (
        {"image_ids": IDS, "text_ids": IDS[:3]},
        ValueError,
        r"text_ids has shape \(3,\); it must be \(4,\), one for each",
    ),
    ({"image_ids": IDS.to("meta"), "text_ids": IDS}, ValueError, "image_ids is on meta, image_features on cpu"),
    ({"same": "equal"}, ValueError, "same is 'equal'; accepted are 'positives', 'ignored'"),
]


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize(("ids", "kind", "message"), ID_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_errors_of_ids_name_the_argument(loss, ids, kind, message):
    with pytest.raises(kind, match=f"{loss.__name__}: {message}"):
        loss(X, X, 1.0, 0.0, **ids)


def test_what_clip_loss_alone_refuses():
    with pytest.raises(
        ValueError, match="clip_loss: direction is 'up'; accepted are 'both', 'image_to_text', 'text_to_im"
    ):
        clip_loss(X, X, 1.0, direction="up")
    with pytest.raises(ValueError, match=r"clip_loss: label_smoothing is 0\.1 with same='ignored'"):
        clip_loss(X, X, 1.0, label_smoothing=0.1, image_ids=IDS, text_ids=IDS, same="ignored")


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize(("args", "kind", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_the_argument(loss, args, kind, message):
    args = args if len(args) == 4 else (*args, 0.0)
    with pytest.raises(kind, match=f"{loss.__name__}: {message}"):
        loss(*args)


def test_label_smoothing_out_of_range():
    with pytest.raises(ValueError, match=r"clip_loss: label_smoothing is 1\.5; it must be between 0 and 1"):
        clip_loss(X, X, 1.0, label_smoothing=1.5)

"""Where documents begin is said: to models that attend by name alone, too; and who does not say it is warned."""

import io
import warnings

import pytest
import torch
from documents import documents_of, model_of
from rich.console import Console

import mmkernels.integrations.transformers  # noqa: F401  registers the name
from mmkernels import accelerate
from mmkernels.integrations.transformers.documents import _warn_of_guesses
from mmkernels.packing import Collator, assert_equal_to_separate, assert_no_leak


def packed(name: str, *, ones: bool):
    """A model, its documents, and what packs them, with a mask of ones or none."""
    model = model_of(name)
    collator = Collator.of(model)

    def collate(documents):
        pack = collator(documents)
        return pack | ({"attention_mask": torch.ones_like(pack["input_ids"])} if ones else {})

    return model, documents_of(name), collate


# ---- a model that attends by name alone


@pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])
@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "paligemma", "llama4"])
def test_by_name(name, ones):
    model, documents, collate = packed(name, ones=ones)
    model.set_attn_implementation("mmkernels")
    console = Console(file=io.StringIO())
    assert_equal_to_separate(model, documents, collate, console=console)
    assert_no_leak(model, collate(documents), console=console)


def test_by_name_mllama_is_refused():
    """Whose tiles are given to text before its document's first picture before anyone attends."""
    model, documents, collate = packed("mllama", ones=False)
    model.set_attn_implementation("mmkernels")
    with pytest.raises(
        ValueError, match=r"cannot keep the documents .* MllamaTextCrossAttention: call mmkernels.accel"
    ):
        model(**collate(documents))


def test_by_name_compiled_chunks_are_refused():
    model, documents, collate = packed("llama4", ones=True)
    model.set_attn_implementation("mmkernels")
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"Llama4TextAttention, compiled: call mmkernels.accelerate"):
        torch.compile(model, backend="eager")(**collate(documents))
    accelerate(model, verbose=False)  # in whose file torch.compile has left functions of its own
    assert_no_leak(model, collate(documents), console=Console(file=io.StringIO()))


# ---- who does not say it


UNSAID = "positions begin anew inside a row, with {} and without cu_seq_lens_q"


def without_boundaries(pack: dict) -> dict:
    return {name: x for name, x in pack.items() if not name.startswith("cu_seq_lens")}


@pytest.mark.parametrize(
    ("name", "ones", "what"),
    [
        ("llava", True, "an attention_mask of ones"),
        ("qwen2_vl", True, "an attention_mask of ones"),
        ("gemma3", False, "tokens that see later ones"),
        ("paligemma", False, "tokens that see later ones"),
    ],
)
def test_a_guess_is_warned_of(name, ones, what):
    model, documents, collate = packed(name, ones=ones)
    accelerate(model, verbose=False)
    pack = without_boundaries(collate(documents))
    with torch.no_grad(), pytest.warns(UserWarning, match=UNSAID.format(what)):
        model(**pack)


def test_positions_of_three_axes_are_warned_of():
    model, documents, collate = packed("qwen2_5_vl", ones=False)
    accelerate(model, verbose=False)
    pack = without_boundaries(collate(documents))
    pack["position_ids"] = pack["position_ids"][1:]
    with torch.no_grad(), pytest.warns(UserWarning, match=UNSAID.format("position_ids of three axes alone")):
        model(**pack)


@pytest.mark.parametrize(
    "case", ["boundaries are said", "transformers can guess", "one document", "padding on the left", "many axes"]
)
def test_no_false_alarm(case):
    model, documents, collate = packed(
        "qwen2_vl" if case == "many axes" else "llava", ones=case != "transformers can guess"
    )
    accelerate(model, verbose=False)
    pack = collate(documents)
    if case != "boundaries are said":
        pack = without_boundaries(collate(documents[:1]) if case in ("one document", "many axes") else pack)
    if case == "padding on the left":
        pack["attention_mask"][0, :3] = 0
        pack["position_ids"] = torch.tensor([[1, 1, 1, *range(pack["input_ids"].shape[1] - 3)]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="mmkernels: positions")
        model(**pack)


@pytest.mark.parametrize("shape", [(9,), (3, 9, 2), (2, 3, 9, 1)])
def test_positions_that_are_not_of_tokens_are_left_alone(shape):
    """Such as those of a picture's patches."""
    falling = torch.arange(torch.Size(shape).numel()).flip(0).view(shape)
    kwargs = {"position_ids": falling, "inputs_embeds": torch.zeros(3, 9, 4), "attention_mask": torch.ones(3, 9)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_guesses((), kwargs)

"""A pack of every family is its documents one at a time, and nothing leaks; planted faults of boundaries are found."""

import copy
import io
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from documents import NAMES, document, documents_of, model_of
from families import gemma4_of_real_heads
from rich.console import Console

from mmkernels import accelerate
from mmkernels.packing import Collator, assert_equal_to_separate, assert_no_leak
from mmkernels.packing.families import FAMILIES
from mmkernels.packing.prove import differences, find_leaks

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import packing_table


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def accelerated(name: str):
    model = model_of(name)
    accelerate(model, verbose=False)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_is_its_documents(name):
    model, documents = accelerated(name), documents_of(name)
    collator = Collator.of(model)
    assert_equal_to_separate(model, documents, collator, console=quiet())
    assert_no_leak(model, collator(documents), console=quiet())

    def guarded(documents):  # which every processor hands out
        pack = collator(documents)
        return pack | {"attention_mask": torch.ones_like(pack["input_ids"])}

    assert_equal_to_separate(model, documents, guarded, console=quiet())


def test_gemma4_of_real_heads():
    """A pack of its documents is these, plain and one at a time, but for float32's rounding, of sums in another order
    over heads of 512; no layer falls back."""
    plain, documents = gemma4_of_real_heads().eval(), documents_of("gemma4")[:4]
    fast = copy.deepcopy(plain)
    accelerate(fast, verbose=False)
    collator = Collator.of(fast)
    assert_no_leak(fast, collator(documents), console=quiet())
    with torch.no_grad():
        theirs = torch.cat([plain(**one).logits[0] for one in documents])
        ours = fast(**collator(documents)).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    assert not accelerate(fast, verbose=False).fallbacks


def test_the_table_is_of_all_families():
    """And the tests: what the table tells of was measured on their models."""
    table = packing_table.MANUAL.read_text().split(packing_table.BEGIN)[1].split(packing_table.END)[0]
    rows = re.findall(r"^\| (\w+)(?: \((\w+)\))? \| (.*?) ?\|", table, re.M)
    assert {family: what for family, _, what in rows} == {
        family: packing_table.special(rules) for family, rules in FAMILIES.items()
    }, "run scripts/packing_table.py"
    assert sorted(model or family for family, model, _ in rows) == sorted(NAMES)
    for file in ("README.md", "CHANGELOG.md"):
        told = " ".join((packing_table.ROOT / file).read_text().split())
        assert f"for {len(FAMILIES)} models of transformers" in told


def moved(offsets: torch.Tensor, at: int, by: int) -> torch.Tensor:
    offsets = offsets.clone()
    offsets[at] += by
    return offsets


FAULTS = {
    "no boundary": lambda pack: {name: x for name, x in pack.items() if not name.startswith("cu_seq_lens")},
    "a boundary is missing": lambda pack: pack | dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k"), torch.cat([pack["cu_seq_lens_q"][:2], pack["cu_seq_lens_q"][3:]])
    ),
    "a boundary is a token early": lambda pack: pack | dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k"), moved(pack["cu_seq_lens_q"], 2, -1)
    ),
    "the last is a token early": lambda pack: pack | dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k"), moved(pack["cu_seq_lens_q"], -1, -1)
    ),
    "pictures are those of the next": lambda pack: pack | {"pixel_values": pack["pixel_values"].roll(1, 0)},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    model, documents = accelerated("llava"), documents_of("llava")
    right = Collator.of(model)

    def wrong(documents):
        pack = FAULTS[fault](right(documents))
        return pack | ({"attention_mask": torch.ones_like(pack["input_ids"])} if fault == "no boundary" else {})

    with pytest.raises(AssertionError, match="is off by"):
        assert_equal_to_separate(model, documents, wrong, console=quiet())
    if fault in ("a boundary is missing", "a boundary is a token early", "no boundary"):
        pack = wrong(documents)
        ends = right(documents)["cu_seq_lens_q"]
        taken = copy.deepcopy(model)
        if "cu_seq_lens_q" in pack:  # the proof looks at the true documents, the model at the planted ones
            planted, forward = pack["cu_seq_lens_q"], type(taken).forward
            pack |= {"cu_seq_lens_q": ends}
            taken.forward = lambda *args, **kwargs: forward(
                taken, *args, **kwargs | {"cu_seq_lens_q": planted, "cu_seq_lens_k": planted}
            )
        else:
            pack |= {"cu_seq_lens_q": ends}
            forward = type(taken).forward
            taken.forward = lambda *args, cu_seq_lens_q=None, **kwargs: forward(taken, *args, **kwargs)
        with pytest.raises(AssertionError, match=r"leaks: document \d reaches document \d"):
            assert_no_leak(taken, pack, console=quiet())


def test_mllamas_pictures_stay_with_their_documents_in_float64_too():
    """Where no kernel serves, and rows of a document without pictures see nothing."""
    model, documents = accelerated("mllama").double(), documents_of("mllama")
    found, _ = differences(model, documents, Collator.of(model))
    # transformers' loss is float32
    assert all(one.packed <= (1e-6 if one.name == "loss" else 1e-9) for one in found), found[:3]
    assert not find_leaks(model, Collator.of(model)(documents_double(documents)))


def documents_double(documents):
    return [{k: x.double() if x.is_floating_point() else x for k, x in each.items()} for each in documents]


def test_what_a_collator_refuses():
    model = model_of("qwen2_vl")
    with pytest.raises(ValueError, match="family is 'bert'; those that are known to pack are aria, aya_vision"):
        Collator("bert")
    with pytest.raises(ValueError, match="numbers tokens along three axes; give rope_index"):
        Collator("qwen2_vl")
    collator, one = Collator.of(model), documents_of("qwen2_vl")[0]
    with pytest.raises(ValueError, match=r"qwen2_vl documents hold depth, of shape \(2, 3\)"):
        collator([one | {"depth": torch.zeros(2, 3)}])
    with pytest.raises(ValueError, match=r"input_ids of document 1 are \(3,\)"):
        collator([one, {"input_ids": torch.zeros(3)}])
    with pytest.raises(ValueError, match="there are no documents"):
        collator([])


def test_a_collator_is_sent_to_workers_without_the_model():
    model, documents = model_of("qwen2_5_vl"), documents_of("qwen2_5_vl")
    collator = Collator.of(model)
    sent = pickle.dumps(collator)
    assert len(sent) < 20_000 < sum(x.numel() for x in model.parameters())
    ours, theirs = pickle.loads(sent)(documents), collator(documents)
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs)


def test_padding_is_cut_and_first_labels_do_not_count():
    one, other = documents_of("llava")[:2]
    padded = {
        name: torch.nn.functional.pad(x, (3, 0), value=7) if name in ("input_ids", "labels") else x
        for name, x in one.items()
    }
    padded["attention_mask"] = torch.nn.functional.pad(one["attention_mask"], (3, 0))
    collator = Collator("llava")
    right, found = collator([one, other]), collator([padded, other])
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(right[name])) for name in right)
    starts = right["cu_seq_lens_q"][:-1].long()
    assert (right["labels"][0, starts] == -100).all() and (right["position_ids"][0, starts] == 0).all()


def test_a_pack_without_pictures_gets_a_blank_one():
    model = accelerated("llava")
    torch.manual_seed(0)
    blank, text = document("llava", [1, "i"], 0), [document("llava", [4], 0), document("llava", [6], 0)]
    collator = Collator.of(model, blank=blank)
    pack = collator(text)
    assert len(pack["cu_seq_lens_q"]) == 4 and (pack["labels"][0, 10:] == -100).all()
    assert len(collator([*text, document("llava", ["i", 2], 0)])["cu_seq_lens_q"]) == 4
    assert_equal_to_separate(model, [*text, blank | {"labels": torch.full_like(blank["input_ids"], -100)}],
                             lambda documents: collator(documents[:2]), console=quiet())  # fmt: skip

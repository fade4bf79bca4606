"""Trainers on packs: every step has the loss, and leaves the weights, of the plain model on the same documents, padded.

The snippets are those of docs/packing.md, run as they stand there.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as hf
from documents import documents_of, model_of
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention as sdpa
from trained import LAYOUTS, PACKS, RATE, Told, arguments, losses_of, names_for, plain_losses, snippet, weights

from mmkernels import RowSpans, accelerate, span_attention
from mmkernels.packing import Collator, PackedDataset, shard

STEPS = [PACKS[:4], PACKS[4:]]  # of the snippets that accumulate 4 packs
ROUNDING = 2e-5  # of float32, seen up to 3e-6; the faults planted below are off by 2e-2 and more


def accelerated(name: str) -> hf.PreTrainedModel:
    model = model_of(name).train()
    accelerate(model, verbose=False)
    return model


def collator_of(model: torch.nn.Module) -> Collator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Collator.of(model)


def apart(name: str, losses: list[float], after: torch.Tensor, steps: list[list[list[int]]]) -> float:
    """From the padded run: the losses relative to themselves, the weights to how far it moved them; the worst."""
    wanted, expected = plain_losses(name, steps)
    assert len(losses) == len(wanted)
    moved = (after - expected).norm() / (expected - weights(model_of(name))).norm()
    return max(moved.item(), *(abs(x / y - 1) for x, y in zip(losses, wanted, strict=True)))


def by_trainer(name: str, folder: Path, spoilt: Callable = lambda model, collator: collator, workers: int = 0) -> float:
    """How far transformers' Trainer is off."""

    class Trainer(Told, hf.Trainer):
        pass

    def made(_, **given):
        own = arguments(str(folder), dataloader_num_workers=workers, train_sampling_strategy="sequential")
        return hf.TrainingArguments(**own, **given)

    model = accelerated(name)
    names = names_for(name, model, spoilt(model, collator_of(model)), PACKS)
    exec(snippet("(documents, packs), data_collator"), names | {"Trainer": Trainer, "TrainingArguments": made})
    return apart(name, Told.losses(), weights(model), STEPS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_transformers_trainer(name, workers, tmp_path):
    assert by_trainer(name, tmp_path, workers=workers) <= ROUNDING


def first_labels_count(_, collator):
    def collate(packs):
        labels = torch.cat([document["labels"] for document in packs[0]], 1)
        return collator(packs) | {"labels": labels}

    return collate


def a_boundary_is_missing(_, collator):
    def collate(packs):
        pack = collator(packs)
        ends = pack["cu_seq_lens_q"]
        return pack | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.cat([ends[:1], ends[2:]]))

    return lambda packs: collate(packs) if len(packs[0]) > 1 else collator(packs)


def means_are_averaged(model, collator):
    del model.accepts_loss_kwargs  # the class says False
    return collator


@pytest.mark.parametrize(
    ("name", "fault"),
    [("llava", first_labels_count), ("llava", a_boundary_is_missing), ("qwen2_5_vl", means_are_averaged)],
)
def test_planted_faults_are_seen(name, fault, tmp_path):
    assert by_trainer(name, tmp_path, fault) > 1000 * ROUNDING


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_trl(name, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setenv("CI", "1")  # else it tells its makers of the run

    class Trainer(Told, trl.SFTTrainer):
        pass

    def made(_, **given):
        return trl.SFTConfig(**arguments(str(tmp_path), bf16=False), **given)

    words = tokenizers.models.WordLevel({f"t{number}": number for number in range(120)}, unk_token="t3")
    processor = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="t0", eos_token="t2")
    model = accelerated(name)
    names = names_for(name, model, collator_of(model), PACKS) | {"IterableDataset": datasets.IterableDataset}
    exec(snippet("SFTTrainer"), names | {"SFTTrainer": Trainer, "SFTConfig": made, "processor": processor})
    assert apart(name, Told.losses(), weights(model), STEPS) <= ROUNDING


def test_a_loop():
    model = accelerated("llava")
    losses, optimizer = losses_of(model), torch.optim.SGD(model.parameters(), lr=RATE)
    names = names_for("llava", model, Collator.of(model), PACKS) | {"optimizer": optimizer}
    exec(snippet("DataLoader(PackedDataset(documents, packs)"), names)
    assert apart("llava", losses, weights(model), [[pack] for pack in PACKS]) <= ROUNDING


def test_two_ranks(tmp_path):
    """Transformers' Trainer with DDP, and a loop with FSDP2, where one rank's pack has no picture."""
    stub = "import sys, torchvision_stub as stub; stub.make_importable(); "
    work = [sys.executable, "-c", stub + "import train_on_ranks as work; work.on_a_rank(sys.argv[1])", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "integrations"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run([*torchrun, *work], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    steps = [list(step) for step in zip(*(shard(PACKS, rank, 2) for rank in range(2)), strict=True)]
    pictures = [{any("i" in LAYOUTS[at] for at in pack) for pack in step} for step in steps]
    assert {True, False} in pictures
    found = torch.load(tmp_path / "found.pt")
    assert apart("qwen2_5_vl", *found["trainer"], steps) <= ROUNDING
    assert apart("llava", *found["loop"], steps) <= ROUNDING


def test_the_call_for_torchtitan():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 16)
    names = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 4, 9]), "RowSpans": RowSpans}
    names["span_attention"] = span_attention
    exec(snippet("RowSpans.packed"), names)
    for own in (slice(0, 4), slice(4, 9)):
        alone = sdpa(*(x[own].transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
        torch.testing.assert_close(names["out"][own], alone)


# ---- whose loss is weighed by tokens


def test_a_model_is_made_to_weigh_by_tokens_and_this_is_said():
    model = model_of("qwen2_5_vl")
    with pytest.warns(UserWarning, match="It is set to True on this model") as said:
        Collator.of(model)
    assert said[0].filename == __file__
    assert model.accepts_loss_kwargs is True and type(model).accepts_loss_kwargs is False
    inside = model_of("qwen2_5_vl")
    with pytest.warns(UserWarning, match="It is set to True"):
        Collator.of(get_peft_model(inside, LoraConfig(target_modules=["q_proj"])))
    assert inside.accepts_loss_kwargs is True  # Trainer looks here, and not at PEFT's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Collator.of(model)
        Collator.of(model_of("llava"))


def test_a_loss_that_cannot_be_weighed_is_said():
    class Older(type(model_of("qwen2_5_vl"))):
        """As Qwen3-VL was in transformers 5.4."""

        def forward(self, labels=None, **kwargs):
            out = super().forward(**kwargs)
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=120)
            return out

    model = model_of("qwen2_5_vl")
    model.__class__ = Older
    with pytest.warns(UserWarning, match="its loss does not divide by num_items_in_batch"):
        Collator.of(model)
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v", "gemma4", "molmo2"])
def test_losses_do_divide_by_the_count(name):
    """Though their classes say otherwise; of all families it is seen where packs are held against single documents."""
    model = model_of(name)
    assert model.accepts_loss_kwargs is False
    pack = collator_of(model)(documents_of(name)[:2]) | {"use_cache": False}
    assert model.accepts_loss_kwargs is True
    counted = (pack["labels"] != -100).sum()
    torch.testing.assert_close(model(**pack, num_items_in_batch=3 * counted).loss * 3, model(**pack).loss)


# ---- a dataset


def test_a_dataset_of_packs():
    dataset = PackedDataset("abcd", [[2, 0], torch.tensor([3])])
    assert len(dataset) == 2 and list(dataset) == [["c", "a"], ["d"]]


@pytest.mark.parametrize(
    ("data", "packs", "error", "said"),
    [
        (iter("abc"), [[0]], TypeError, "data is of type str_ascii_iterator; it must give documents by"),
        ("abc", [], ValueError, "there are no packs"),
        ("abc", [[0], []], ValueError, "pack 1 is empty"),
        ("abc", [0, 1], TypeError, "pack 0 is 0; it must be a list of documents' numbers"),
        ("abc", [[0.5]], TypeError, r"pack 0 is \[0.5\]"),
        ("abc", [[0], [1, 3]], ValueError, "pack 1 holds document 3; data has 3, from 0 to 2"),
        ("abc", [[-1]], ValueError, "pack 0 holds document -1"),
    ],
)
def test_what_a_dataset_refuses(data, packs, error, said):
    with pytest.raises(error, match=f"PackedDataset: {said}"):
        PackedDataset(data, packs)


def test_a_batch_of_several_packs_is_refused():
    model, documents = model_of("llava"), documents_of("llava")
    collator = Collator.of(model)
    one, same = collator([documents[:2]]), collator(documents[:2])
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(same[name])) for name in same)
    with pytest.raises(ValueError, match="2 packs are given, and a batch is one; set batch_size=1"):
        collator([documents[:2], documents[2:3]])

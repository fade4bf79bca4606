"""BLIP-2: a Q-Former between a frozen picture tower and a frozen language model.

Li et al. 2023, https://arxiv.org/abs/2301.12597.

                  picture -> patches -> transformer (frozen)
                                                |
                                                v
    8 queries, and in stage one a caption  ->  Q-Former  ->  projection -> language model (frozen) -> caption

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (all patches), of the Q-Former (queries and words, under three masks; queries to patches) and
  of the language model (causal): `span_attention`
- how well a caption fits a picture, by the query that fits it best: `max_similarity`

The tower learns digits' names and the language model reads captions, each for itself; both are frozen then. In stage
one the Q-Former learns three things at once: contrast (queries and words do not see each other), writing (each word
sees the queries and the words before it) and matching (all see all; wrong pairs are drawn from those that contrast
finds likely). In stage two its queries, projected, stand before the words of the language model, which ends a caption
that is begun for it. Digits are judged by all three that can name them.
"""

import torch
import torch.nn.functional as F
from gallery.digits import NAMES, captions, digits, enlarged
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, FREE, IMAGE, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mmkernels import max_similarity

QUERIES, WRITE = 8, FREE  # WRITE stands in place of BOS where a caption is written
SHAPE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"initializer_range": 96**-0.5}  # the 0.02 of models is for layers as wide as theirs
VISION = SHAPE | {"image_size": 32, "patch_size": 8}
FORMER = SHAPE | {"encoder_hidden_size": 96, "use_qformer_text_input": True, "vocab_size": SIZE}
FORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16}
TEXT = {"model_type": "opt", "hidden_size": 96, "ffn_dim": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"word_embed_proj_dim": 96, "vocab_size": SIZE, "max_position_embeddings": 64, "dropout": 0.0}
TEXT |= {"init_std": 96**-0.5, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


class Blip2(nn.Module):
    """The models of the two stages, which share tower, queries and Q-Former."""

    def __init__(self):
        super().__init__()
        parts = {"vision_config": VISION, "qformer_config": FORMER, "text_config": TEXT}
        sizes = {"num_query_tokens": QUERIES, "image_text_hidden_size": 64, "initializer_range": 96**-0.5}
        config = Blip2Config(**parts, **sizes, image_token_index=IMAGE)
        self.first, self.second = Blip2ForImageTextRetrieval(config), Blip2ForConditionalGeneration(config)
        for name in ("vision_model", "query_tokens", "qformer"):
            setattr(self.second, name, getattr(self.first, name))
        nn.init.normal_(self.first.query_tokens, std=0.02)  # zeros would leave all queries the same for ever
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def patches(self, pictures: Tensor) -> Tensor:
        return self.first.vision_model(enlarged(pictures)).last_hidden_state

    def forward(self, patches: Tensor, ids: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the Q-Former makes of the queries and of the words, (N, queries, 96) and (N, T, 96)."""
        first = self.first
        tokens = first.embeddings(ids, query_embeds=first.query_tokens.expand(len(ids), -1, -1))
        mask = None if seen is None else seen.expand(len(ids), 1, -1, -1)
        given = {"query_length": QUERIES, "attention_mask": mask, "encoder_hidden_states": patches}
        return first.qformer(tokens, **given).last_hidden_state.split([QUERIES, ids.shape[1]], dim=1)

    def similarity(self, patches: Tensor, ids: Tensor) -> Tensor:
        """(texts, pictures): of a caption's first word and the query that is most like it."""
        apart = torch.block_diag(torch.ones(QUERIES, QUERIES), torch.ones(ids.shape[1], ids.shape[1])).bool()
        queries, words = self(patches, ids, apart)
        texts = F.normalize(self.first.text_projection(words[:, 0]), dim=-1)
        return max_similarity(texts, F.normalize(self.first.vision_projection(queries), dim=-1))

    def matches(self, patches: Tensor, ids: Tensor) -> Tensor:
        """(N, 2): no and yes."""
        return self.first.itm_head(self(patches, ids)[0]).mean(1)


def written(labels: Tensor, start: int = BOS) -> Tensor:
    return torch.tensor([[start, *encode(caption), EOS] for caption in captions(labels)])


def build() -> System:
    blip, namer = Blip2(), nn.Linear(96, len(NAMES))
    first, second = blip.first, blip.second

    def named(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        return F.cross_entropy(namer(blip.patches(drawn.pictures)[:, 1:].mean(1)), drawn.labels)

    def read(generator: Generator) -> Tensor:
        """Four captions one after the other, all of one digit: the model learns to look back for it."""
        ids = written(torch.randint(len(NAMES), (32,), generator=generator)).repeat(1, 4)
        return second.language_model(input_ids=ids, labels=ids).loss

    def aligned(generator: Generator) -> Tensor:
        drawn = digits().draw(24, generator)
        patches, ids = blip.patches(drawn.pictures), written(drawn.labels)
        same = drawn.labels[:, None] == drawn.labels  # whose captions are the same: each is right for all of them
        logits = blip.similarity(patches, ids) / blip.temperature
        targets = same / same.sum(1, keepdim=True)
        contrast = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

        wrong = logits.detach().masked_fill(same, -torch.inf)
        picture, text = (torch.multinomial(x.softmax(1), 1, generator=generator)[:, 0] for x in (wrong, wrong.T))
        pairs = torch.cat([patches, patches[picture], patches]), torch.cat([ids, ids, ids[text]])
        matching = F.cross_entropy(blip.matches(*pairs), torch.tensor([1, 0, 0]).repeat_interleave(len(ids)))

        ids = written(drawn.labels, start=WRITE)
        place = torch.arange(QUERIES + ids.shape[1])
        words = blip(patches, ids, (place < QUERIES) | (place <= place[:, None]))[1]
        said = words[:, :-1] @ first.embeddings.word_embeddings.weight.T
        return contrast + matching + F.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten())

    def asked(labels: Tensor) -> dict[str, Tensor]:
        """Queries and the beginning of a caption; its end is to be said."""
        prompt = [*[IMAGE] * QUERIES, BOS, *encode("a handwritten")]
        return batch([prompt] * len(labels), [encode(NAMES[label]) for label in labels.tolist()])

    def captioned(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        return second(enlarged(drawn.pictures), **asked(drawn.labels)).loss

    def scores() -> dict[str, Score]:
        unseen, kinds = digits(held_out=True), torch.arange(len(NAMES))
        patches = blip.patches(unseen.pictures)
        likeness = blip.similarity(patches, written(torch.arange(len(patches)) % len(NAMES)))[: len(NAMES)]
        matching = [blip.matches(patches, written(kind.expand(len(patches))))[:, 1] for kind in kinds]
        inputs = asked(unseen.labels)
        told = accuracy(second(enlarged(unseen.pictures), **inputs).logits, inputs["labels"])
        right = {"contrast": (likeness.argmax(0) == unseen.labels).float().mean().item()}
        right |= {"matching": (torch.stack(matching).argmax(0) == unseen.labels).float().mean().item()}
        right |= {"the language model": told}
        return {f"named by {way}": Score(value, 1 / len(NAMES)) for way, value in right.items()}

    learning = [first.qformer, first.query_tokens, first.embeddings, first.vision_projection, first.text_projection]
    stages = [
        Stage("tower", named, [first.vision_model, namer], steps=300, rate=1e-3),
        Stage("language model", read, [second.language_model], steps=100, rate=1e-3),
        Stage("stage one", aligned, [*learning, first.itm_head, blip.temperature], steps=350, rate=1e-3),
        Stage("stage two", captioned, [*learning[:2], second.language_projection], steps=100, rate=1e-3),
    ]
    return System(nn.ModuleList([blip, namer]), stages, scores)


if __name__ == "__main__":
    main(build, __doc__)

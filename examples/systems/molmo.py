"""Molmo: overlapping crops of a picture, each 2 x 2 patches pooled by attention, and nothing frozen at any time.

Deitke et al. 2024, https://arxiv.org/abs/2409.17146.

    whole picture, small -.
    left crop ------------ > patches -> transformer -> two of its layers, side by side -> attention over each 2 x 2 -.
    right crop -----------'                               (what crops share is taken once)   their mean is the query  |
                                                                                                                     v
    annotations: question, answer | question, answer | ... -----------> words ---> language model <--- linear layers'

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (all patches of a crop), of the pooling (one query and four keys), and of the language model
  (causal, and blind for other annotations of the picture): `span_attention`
- rotary embedding of the language model: its own

Two stages, all parameters in both (at one rate here): captions, then questions about two digits side by side. The small
picture comes first, then the large one, row by row with a sign after each; then all annotations, which do not see each
other: two runs of keys a query. So a picture is encoded once for all that is said of it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gallery.digits import NAMES, blind_accuracy, digits, held_out_questions, side_by_side
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, BREAK, EOS, FREE, IGNORED, IMAGE, IMAGE_END, PAD, SIZE, accuracy, encode
from torch import Generator, Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

CAPTION, TRANSCRIPT, IMAGE_START = range(FREE, FREE + 3)  # what kind of text is asked for; where pictures begin
PATCH, CROP, MARGIN = 6, 6, 2  # pixels of a patch; patches of a crop, and of its rim where another crop goes on
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": CROP * PATCH, "patch_size": PATCH}
LAYERS = (-1, -2)  # of the tower, whose features are read
FEATURES = len(LAYERS) * VISION["hidden_size"]
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}

_ROWS, _ACROSS = CROP // 2, CROP - MARGIN  # of tokens: rows, and columns of the two crops together
PICTURE = [BOS, IMAGE_START, *[*[IMAGE] * _ROWS, BREAK] * _ROWS, IMAGE_END]
PICTURE += [IMAGE_START, *[*[IMAGE] * _ACROSS, BREAK] * _ROWS, IMAGE_END]

Annotation = tuple[list[int], list[int]]  # what is asked, what is answered


class Connector(nn.Module):
    def __init__(self, width: int, words: int):
        super().__init__()
        self.pool = nn.MultiheadAttention(width, 4, batch_first=True)
        self.gate, self.up = nn.Linear(width, 2 * words, bias=False), nn.Linear(width, 2 * words, bias=False)
        self.down = nn.Linear(2 * words, words, bias=False)

    def forward(self, grid: Tensor) -> Tensor:
        """Patches (N, rows, columns, width) -> (N, a fourth as many, words)."""
        windows = grid.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        pooled = self.pool(windows.mean(1, keepdim=True), windows, windows, need_weights=False)[0]
        return self.down(F.silu(self.gate(pooled)) * self.up(pooled)).view(len(grid), -1, self.down.out_features)


class Molmo(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
        self.border = nn.Parameter(torch.zeros(FEATURES))  # is added to patches beyond the picture
        self.connector = Connector(FEATURES, TEXT["hidden_size"])
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**TEXT))

    def features(self, pictures: Tensor) -> Tensor:
        """(N, 2, 8, 8) -> (N, tokens, words), of the small picture first, then of the large one, row by row."""
        small = F.pad(side_by_side(pictures, 18), (0, 0, 9, 9), value=-1)
        large = F.pad(side_by_side(pictures, 24), (0, 0, 6, 6), value=-1)
        crops = torch.stack([small, large[..., : CROP * PATCH], large[..., -CROP * PATCH :]], 1)
        states = self.tower(crops.flatten(0, 1), output_hidden_states=True).hidden_states
        patches = torch.cat([states[layer][:, 1:] for layer in LAYERS], -1)
        small, left, right = patches.unflatten(1, (CROP, CROP)).unflatten(0, (-1, 3)).unbind(1)
        large = torch.cat([left[:, :, :-MARGIN], right[:, :, MARGIN:]], 2)
        beyond = torch.tensor([[1, 0.5, 0, 0, 0.5, 1], [1, 0, 0, 0, 0, 1]]).view(2, CROP, 1, 1)  # how much of a row
        small, large = (grid + part * self.border for grid, part in zip((small, large), beyond, strict=True))
        return torch.cat([self.connector(small), self.connector(large)], 1)

    def forward(self, pictures: Tensor, annotations: list[list[Annotation]]) -> CausalLMOutputWithPast:
        rows = written(annotations)
        embedded = self.language_model.get_input_embeddings()(rows.pop("input_ids"))
        places = F.pad(torch.tensor(PICTURE) == IMAGE, (0, embedded.shape[1] - len(PICTURE)))
        embedded = embedded.masked_scatter(places[:, None], self.features(pictures).to(embedded.dtype))
        return self.language_model(inputs_embeds=embedded, **rows)


def written(annotations: list[list[Annotation]]) -> dict[str, Tensor]:
    """Each row: the picture and what is said of it, each annotation at places as if it were the only one."""
    shape = len(annotations), len(PICTURE) + max(sum(len(q + a) + 1 for q, a in row) for row in annotations)
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORED)
    owner, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    ids[:, : len(PICTURE)], owner[:, : len(PICTURE)] = torch.tensor(PICTURE), 0
    positions[:, : len(PICTURE)] = torch.arange(len(PICTURE))
    for i, row in enumerate(annotations):
        start = len(PICTURE)
        for number, (question, answer) in enumerate(row, 1):
            text = torch.tensor([*question, *answer, EOS])
            end = start + len(text)
            ids[i, start:end], labels[i, start + len(question) : end] = text, text[len(question) :]
            owner[i, start:end], positions[i, start:end] = number, len(PICTURE) + torch.arange(len(text))
            start = end
    queries, keys = owner[:, :, None], owner[:, None]
    sees = ((queries == keys) | (keys == 0)) & torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": sees[:, None]}


def captions_of(left: int, right: int) -> list[Annotation]:
    caption, transcript = f"a handwritten {NAMES[left]} and {NAMES[right]}", f"{NAMES[left]} then {NAMES[right]}"
    return [([CAPTION], encode(caption)), ([TRANSCRIPT], encode(transcript))]


def questions_of(left: int, right: int) -> list[Annotation]:
    answers = {"which digit is left": NAMES[left], "which digit is right": NAMES[right]}
    answers |= {"which digit is larger": NAMES[max(left, right)]}
    answers |= {"is the left digit larger": "yes" if left > right else "no"}
    return [(encode(question), encode(answer)) for question, answer in answers.items()]


def build() -> System:
    molmo = Molmo()

    def learned(annotate: Callable[[int, int], list[Annotation]], count: int = 16) -> Callable[[Generator], Tensor]:
        def loss(generator: Generator) -> Tensor:
            drawn = digits().draw(2 * count, generator)
            pairs = drawn.labels.view(count, 2).tolist()
            return molmo(drawn.pictures.view(count, 2, 8, 8), [annotate(*pair) for pair in pairs]).loss

        return loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        rows = [[(encode(text), encode(answer))] for text, answer in zip(asked.questions, asked.answers, strict=True)]
        right = accuracy(molmo(asked.pictures, rows).logits, written(rows)["labels"])
        return {"answers to questions": Score(right, blind_accuracy(asked))}

    stages = [
        Stage("captions", learned(captions_of), [molmo], steps=250, rate=1e-3),
        Stage("questions", learned(questions_of), [molmo], steps=400, rate=1e-3),
    ]
    return System(molmo, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)

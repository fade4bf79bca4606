"""Emu3: pictures made tokens, and one decoder that predicts the next token, be it a word or a part of a picture.

Wang et al. 2024, https://arxiv.org/abs/2409.18869.

    picture -> encoder -> nearest codes -> tokens --.
                                                     >  decoder -> next token: a word,
    caption -----------------------------> words ---'              or a code -> painter -> picture

- first layer of the encoder, a patch embedding: `patch_embed`
- the code nearest to each vector of the encoder: `nearest_code`
- attention of the decoder (causal, with a cache when it draws): `span_attention`; its rotary embedding is its own

A picture is its size in words and its codes, with a sign at the end of each row; before a caption to be told, behind it
to be drawn. Four stages: encoder, codes and painter learn to give pictures back; the decoder learns both orders, where
a code counts half as much as a word; then captions alone, where no code counts; then preferences: of eight pictures
drawn for a caption the one that voters like best is to become likelier than the one they like least (Rafailov et al.
2023, https://arxiv.org/abs/2305.18290), and is learned as any picture is. In the paper people vote, here a classifier
of digits. Another one, from which nothing is learned, judges in the end what is drawn.
"""

import functools

import torch
import torch.nn.functional as F
from gallery.digits import NAMES, digits
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, BREAK, EOS, FREE, PAD, SIZE, encode
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Generator, Tensor, nn
from transformers import DynamicCache, Emu3ForCausalLM, Emu3TextConfig

import mmkernels

SIDE, CODES, DEPTH, WIDTH = 4, 16, 4, 32  # of a picture in codes; how many there are, how long; channels
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": SIZE + CODES, "attention_dropout": 0.0, "initializer_range": 0.05}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
BEGIN, END = [FREE, *encode("four four"), FREE + 1], [FREE + 2]  # of a picture
CAPTIONS = torch.tensor([encode(f"a handwritten {name}") for name in NAMES])
DRAWN, VOTED = torch.arange(10).repeat_interleave(40), 8  # what is drawn to vote, and how often; to judge, once


def rows(*parts: Tensor | list[int]) -> Tensor:
    """(N, T) of parts (N, t), one behind the other; a list is the same in each row."""
    count = next(len(part) for part in parts if isinstance(part, Tensor))
    return torch.cat([torch.as_tensor(part, dtype=torch.long).expand(count, -1) for part in parts], 1)


def noisy(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Pictures and labels. By the noise a picture has many codes; else the few there are would be learned by heart."""
    drawn = digits().draw(count, generator)
    return (drawn.pictures + 0.05 * torch.randn(count, 8, 8, generator=generator)).clamp(0, 1), drawn.labels


class Emu3(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, WIDTH, 2, 2), nn.SiLU(), nn.Conv2d(WIDTH, DEPTH, 3, 1, 1))
        self.codes = nn.Parameter(torch.randn(CODES, DEPTH))
        self.painter = nn.Sequential(nn.Conv2d(DEPTH, WIDTH, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(WIDTH, 1, 2, 2))
        self.decoder = Emu3ForCausalLM(Emu3TextConfig(**TEXT))

    @torch.no_grad()
    def written(self, pictures: Tensor) -> Tensor:
        codes = mmkernels.nearest_code(self.encoder(pictures[:, None]).movedim(1, -1), self.codes).indices
        return rows(BEGIN, F.pad(SIZE + codes, (0, 1), value=BREAK).flatten(1), END)

    @torch.no_grad()
    def drawn(self, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """All that is said to draw a picture for each caption; and the pictures (N, 8, 8), in [0, 1]."""
        said, cache, generator = [rows([BOS], CAPTIONS[labels], BEGIN)], DynamicCache(), Generator().manual_seed(seed)
        for place in range(1, SIDE * SIDE + 1):
            logits = self.decoder(said[-1], past_key_values=cache, use_cache=True).logits[:, -1, SIZE:]
            code = SIZE + torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            said.append(rows(code, [] if place % SIDE else [BREAK]))
        codes = torch.cat([step[:, :1] for step in said[1:]], 1).unflatten(1, (SIDE, SIDE)) - SIZE
        return rows(*said, END, [EOS]), self.painter(self.codes[codes].movedim(-1, 1))[:, 0].clamp(0, 1)

    def losses(self, tokens: Tensor) -> Tensor:
        """(..., T) -> (..., T - 1): of each token but the first."""
        rows = tokens.flatten(0, -2)
        losses = F.cross_entropy(self.decoder(rows[:, :-1]).logits.mT, rows[:, 1:], reduction="none")
        return losses.view(*tokens.shape[:-1], -1)


def build() -> System:
    emu3, real = Emu3(), (digits().pictures.flatten(1).numpy(), digits().labels.numpy())

    def given_back(generator: Generator) -> Tensor:
        pictures, _ = noisy(64, generator)
        x = emu3.encoder(pictures[:, None]).movedim(1, -1)
        codes = mmkernels.nearest_code(x, emu3.codes).quantised
        of_codes = F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
        painted = emu3.painter((x + (codes - x).detach()).movedim(-1, 1))[:, 0]
        return F.mse_loss(painted, pictures) + 0.1 * of_codes

    def predicted(generator: Generator) -> Tensor:
        pictures, labels = noisy(64, generator)
        written, captions = emu3.written(pictures), CAPTIONS[labels]
        to_draw, to_tell = rows(captions[:32], written[:32]), rows(written[32:], captions[32:])
        tokens = rows([BOS], torch.cat([to_draw, to_tell]), [EOS])
        return (emu3.losses(tokens) * (1 - 0.5 * (tokens[:, 1:] >= SIZE).float())).mean()

    def told(generator: Generator) -> Tensor:
        pictures, labels = noisy(32, generator)
        return emu3.losses(rows([BOS], emu3.written(pictures), CAPTIONS[labels], [EOS]))[:, -4:].mean()

    @functools.cache
    def votes() -> tuple[Tensor, Tensor]:
        """(N, 2, T): of each caption's pictures the best and the worst; (N, 2): the losses of both when drawn."""
        asked = DRAWN.repeat_interleave(VOTED)
        tokens, pictures = emu3.drawn(asked, seed=0)
        voter = LogisticRegression(max_iter=1000).fit(*real)
        likes = torch.tensor(voter.predict_proba(pictures.flatten(1).numpy())[range(len(asked)), asked]).view(-1, VOTED)
        ends = torch.stack([likes.argmax(1), likes.argmin(1)], 1)[:, :, None]
        pairs = torch.take_along_dim(tokens.unflatten(0, (-1, VOTED)), ends, 1)
        return pairs, emu3.losses(pairs).sum(2).detach()

    def preferred(generator: Generator) -> Tensor:
        pairs, before = votes()
        chosen = torch.randint(len(pairs), (32,), generator=generator)
        now = emu3.losses(pairs[chosen]).sum(2)
        best, worst = (before[chosen] - now).unbind(1)  # how much likelier they have become
        return now[:, 0].mean() / pairs.shape[2] - F.logsigmoid(0.2 * (best - worst)).mean()

    def scores() -> dict[str, Score]:
        unseen = digits(held_out=True)
        prompts = rows([BOS], emu3.written(unseen.pictures), CAPTIONS[unseen.labels, :2])
        named = emu3.decoder(prompts).logits[:, -1].argmax(1) == CAPTIONS[unseen.labels, 2]
        judged = torch.tensor(SVC().fit(*real).predict(emu3.drawn(DRAWN, seed=1)[1].flatten(1).numpy())) == DRAWN
        found = {"held-out digits named": named, "drawn digits recognised": judged}
        return {name: Score(right.float().mean().item(), 1 / len(NAMES)) for name, right in found.items()}

    stages = [
        Stage("tokenizer", given_back, [emu3.encoder, emu3.codes, emu3.painter], steps=300),
        Stage("next token", predicted, [emu3.decoder], steps=300, rate=1e-3),
        Stage("captions", told, [emu3.decoder], steps=250, rate=5e-4),
        Stage("preferences", preferred, [emu3.decoder], steps=80, rate=2e-4),
    ]
    return System(emu3, stages, scores)


def generated(system: System) -> Tensor:
    """(400, 8, 8), in [0, 1]: 40 pictures drawn of each digit."""
    return system.model.drawn(DRAWN, seed=1)[1]


if __name__ == "__main__":
    main(build, __doc__)

"""Trains the small Keye: `python -m tools.small_keye.train [--out DIR]`. Lessons are drawn in `lessons.py`.

Fixed seeds, step counts and threads, so that a run can be repeated. The tower first learns to name what each visual
token shows, through a head that is thrown away; without that the decoder reads noise for most of the run.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.padded_attention import attend_padded
from tools.small_keye.checkpoint_folder import write_folder
from tools.small_keye.lessons import IGNORED, NUM_PLACES, NUM_SHAPE_SIGHTS, NUM_SIGHTS, Item, Teacher
from tools.small_keye.packing import Batch, Packer
from tools.small_keye.tokenizer import train_tokenizer

SEED = 2026
NUM_THREADS = 2
MUON_RATE = 0.02
ADAM_RATE = 2e-3
WEIGHT_DECAY = 0.05
PLACE_WEIGHT = 0.5
REPORT_EVERY = 25
# Most visual tokens are plain background.
SIGHT_WEIGHTS = torch.tensor([1.0] * NUM_SHAPE_SIGHTS + [0.3] * (NUM_SIGHTS - NUM_SHAPE_SIGHTS))


@dataclass(frozen=True)
class Stage:
    """Rows drawn for each step and the learning rate's way, linear, as a share of the full one.

    `sight` weighs the throw-away head's loss beside that of the replies; `shares` are those of `Teacher`.
    """

    name: str
    steps: int
    rates: tuple[float, float]
    num_images: int
    num_videos: int
    sight: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)


# "Is there ..." stays at a guess for long and then jumps, so it is asked often at first.
_EARLY = {"is there": 2.0, "caption": 1.5, "which way": 1.5}
_LATE = {"is there": 1.5, "caption": 2.0, "where": 1.3, "what is at": 1.3, "video caption": 1.5}
SEEING = Stage("seeing", 400, (1.0, 1.0), num_images=64, num_videos=6)
ASKING = (
    Stage("asking", 500, (1.0, 1.0), num_images=32, num_videos=10, sight=0.5, shares=_EARLY),
    Stage("settling", 250, (0.6, 0.3), num_images=32, num_videos=10, shares=_LATE),
    Stage("weak spots", 400, (0.3, 0.02), num_images=32, num_videos=10, shares=_LATE),
)


class SightHead(nn.Module):
    """Says of each visual token which coloured shape or background it shows, and where that shape is."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.sight = nn.Linear(hidden_size, NUM_SIGHTS)
        self.place = nn.Linear(hidden_size, 2 * NUM_PLACES)

    def forward(self, features: Tensor, items: Sequence[Item]) -> Tensor:
        """The loss on projector outputs [visual tokens, H]."""
        hidden = self.norm(features)
        sights, places = (torch.cat([getattr(item, name) for item in items]) for name in ("sights", "places"))
        sight_loss = F.cross_entropy(self.sight(hidden), sights, weight=SIGHT_WEIGHTS)
        place_loss = F.cross_entropy(self.place(hidden).view(-1, NUM_PLACES), places.flatten(), ignore_index=IGNORED)
        return sight_loss + PLACE_WEIGHT * place_loss


class Trainer:
    """The model with its throw-away head and the two optimisers that share its parameters."""

    def __init__(self, model: KeyeForConditionalGeneration) -> None:
        self.model = model
        self.head = SightHead(model.config.hidden_size)
        matrices, rest = _split_parameters(model)
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, momentum=0.95),
            torch.optim.AdamW([*rest, *self.head.parameters()], lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.full_rates = [MUON_RATE, ADAM_RATE]

    def see(self, items: Sequence[Item]) -> Tensor:
        """Loss of the head alone; adds to the gradients."""
        loss = self.head(self._features(items), items)
        loss.backward()
        return loss.detach()

    def ask(self, batch: Batch, sight: float, total_weight: float) -> Tensor:
        """Says per question whether its whole reply was right; adds to the gradients.

        `total_weight` is that of all batches of the step. `sight` weighs the head's loss beside that of the replies.
        """
        config, features = self.model.config, self._features(batch.items)
        is_visual = (batch.input_ids == config.image_token_id) | (batch.input_ids == config.video_token_id)
        embeds = self.model.model.embed_tokens(batch.input_ids).masked_scatter(is_visual.unsqueeze(-1), features)
        attend = attend_padded(self.model.model, embeds, batch.attention_mask)
        hidden = self.model.model(embeds, batch.position_ids, attend)
        is_target = batch.targets != IGNORED
        logits, targets = self.model.lm_head(hidden[is_target]), batch.targets[is_target]
        loss = (F.cross_entropy(logits, targets, reduction="none") * batch.weights).sum() / total_weight
        if sight:
            loss = loss + sight * float(batch.weights.sum()) / total_weight * self.head(features, batch.items)
        loss.backward()
        wrong = torch.zeros(len(batch.kinds)).index_add_(
            0, batch.asked[is_target], (logits.argmax(-1) != targets).float()
        )
        return wrong == 0

    def step(self, rate: float) -> None:
        """Moves the parameters by the gathered gradients, at a share `rate` of the full learning rates."""
        for optimizer, full in zip(self.optimizers, self.full_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
            optimizer.step()
            optimizer.zero_grad()

    def _features(self, items: Sequence[Item]) -> Tensor:
        return self.model.get_image_features(torch.cat([i.pixel_values for i in items]), [i.grid for i in items])


def train(out: Path) -> None:
    """Trains from nothing and writes a checkpoint folder after each stage."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    write_folder(out, tokenizer)
    image_processor = ImageProcessor.from_checkpoint(out)
    model = KeyeForConditionalGeneration(KeyeConfig.from_pretrained(out)).float().train()
    model.visual.vision_model.embeddings.normalise = image_processor.normalise
    _start_positions(model.visual.vision_model.embeddings.position_embedding.weight)
    trainer = Trainer(model)
    begun = time.monotonic()
    _see(trainer, Teacher(image_processor, {}), begun)
    for number, stage in enumerate(ASKING, start=1):
        _ask(trainer, Teacher(image_processor, stage.shares), Packer(tokenizer), stage, number, begun)
        save(model, out)


def save(model: KeyeForConditionalGeneration, folder: Path) -> None:
    """Writes `model.safetensors` in bfloat16 with the official tensor names."""
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _see(trainer: Trainer, teacher: Teacher, begun: float) -> None:
    for step, rate in _rates(SEEING):
        rng = np.random.default_rng((SEED, 0, step))
        lessons = [teacher.image_lesson(rng) for _ in range(SEEING.num_images)]
        lessons += [teacher.video_lesson(rng) for _ in range(SEEING.num_videos)]
        loss = trainer.see([item for lesson in lessons for item in lesson.items])
        trainer.step(rate)
        if step % REPORT_EVERY == 0:
            print(f"{SEEING.name} {step}: loss {loss:.3f}, {time.monotonic() - begun:.0f} s", flush=True)


def _ask(trainer: Trainer, teacher: Teacher, packer: Packer, stage: Stage, number: int, begun: float) -> None:
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for step, rate in _rates(stage):
        batches = _draw_batches(np.random.default_rng((SEED, number, step)), teacher, packer, stage)
        total_weight = float(sum(batch.weights.sum() for batch in batches))
        for batch in batches:
            is_right = trainer.ask(batch, stage.sight, total_weight)
            asked.update(batch.kinds)
            right.update(kind for kind, ok in zip(batch.kinds, is_right.tolist(), strict=True) if ok)
        trainer.step(rate)
        if step % REPORT_EVERY == 0:
            kinds = ", ".join(f"{kind} {right[kind] / asked[kind]:.0%}" for kind in sorted(asked))
            total = right.total() / asked.total()
            print(f"{stage.name} {step}: right {total:.1%} ({kinds}), {time.monotonic() - begun:.0f} s", flush=True)
            asked.clear()
            right.clear()


def _draw_batches(rng: np.random.Generator, teacher: Teacher, packer: Packer, stage: Stage) -> list[Batch]:
    """The rows of one step, like with like: every eighth row of images is about several."""
    draws = [teacher.image_lesson] * 7 + [teacher.images_lesson]
    images = [draws[row % len(draws)](rng) for row in range(stage.num_images)]
    videos = [teacher.video_lesson(rng) for _ in range(stage.num_videos)]
    return [packer.pack(images), packer.pack(videos)]


def _rates(stage: Stage) -> Iterator[tuple[int, float]]:
    first, last = stage.rates
    for step in range(stage.steps):
        yield step, first + (last - first) * step / stage.steps


def _split_parameters(model: KeyeForConditionalGeneration) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices between hidden layers, which Muon moves, and all others: embeddings, output, norms, biases."""
    hidden = {
        id(parameter)
        for parameter in chain(
            model.visual.vision_model.encoder.parameters(), model.mlp_AR.parameters(), model.model.layers.parameters()
        )
        if parameter.ndim == 2
    }
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) in hidden], [p for p in parameters if id(p) not in hidden]


@torch.no_grad()
def _start_positions(table: Tensor) -> None:
    """Starts the tower's position table [side * side, D] from sines and cosines of row and column, halved."""
    side, width = math.isqrt(len(table)), table.shape[1]
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side).unsqueeze(1) * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    table.copy_(torch.cat([rows, columns], dim=1) * 0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the small Keye that the demo and the tests use.")
    parser.add_argument("--out", type=Path, default=SMALL_KEYE, help="checkpoint folder to write")
    train(parser.parse_args().out)

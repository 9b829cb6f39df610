"""The whole model: vision tower, projector and text decoder behind one `PreTrainedModel` that can `generate`."""

from collections.abc import Sequence
from dataclasses import fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from keye.worker.model.checkpoint import UNUSED_TENSORS
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVL1_5Config
from keye.worker.model.padded_attention import attend_padded
from keye.worker.model.positions import Grid, PlaceholderMismatch, position_ids
from keye.worker.model.text_decoder import KeyePreTrainedModel, KeyeTextModel
from keye.worker.model.vision_tower import Projector, VisionTower, at_once

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What `generate` calls the keys and values it carries from step to step; renamed in transformers 5.24."""


class KeyeForConditionalGeneration(GenerationMixin, KeyePreTrainedModel):
    """Keye-VL-8B-Preview. Nothing about a sequence is kept here, so calls may interleave."""

    _keys_to_ignore_on_load_unexpected = [UNUSED_TENSORS]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        self.visual = VisionTower(config.vision_config)
        self.mlp_AR = Projector(config)
        self.model = KeyeTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.most_patches = 0
        """The most that have gone through tower and projector in one call, so that this device has room for them."""
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Grid]) -> Tensor:
        """Rows [sum t*h*w/4, H] that replace image placeholders, for patches [sum t*h*w, 3, p, p] and grids [n, 3]."""
        return self._features(pixel_values, _as_lists(image_grid_thw))

    def get_video_features(self, pixel_values: Tensor, video_grid_thw: Tensor | Sequence[Grid]) -> Tensor:
        """The same for videos: a whole video is one item of attention in Preview, each frame is one in 1.5."""
        grids = _as_lists(video_grid_thw)
        if self.config.splits_video_into_frames:
            grids = [[1, h, w] for t, h, w in grids for _ in range(t)]
        return self._features(pixel_values, grids)

    def _features(self, pixel_values: Tensor, grids: list[list[int]]) -> Tensor:
        rows = []
        start = 0
        for group in at_once(grids):
            stop = start + sum(map(prod, group))
            rows.append(self.mlp_AR(self.visual(pixel_values[start:stop], group), group))
            self.most_patches = max(self.most_patches, stop - start)
            start = stop
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, L, H] of the tokens [B, L], placeholders filled in order of occurrence, row by row."""
        embeds = self.model.embed_tokens(input_ids)
        for name, token_id, patches, grids, encode in (
            ("image", self.config.image_token_id, pixel_values, image_grid_thw, self.get_image_features),
            ("video", self.config.video_token_id, pixel_values_videos, video_grid_thw, self.get_video_features),
        ):
            # Without patches a placeholder is a token like any other: a model may write one while it generates.
            if patches is None:
                continue
            if grids is None:
                raise PlaceholderMismatch(f"{name} patches came without their grids, {name}_grid_thw")
            placeholders, features = input_ids == token_id, encode(patches, grids)
            if (count := int(placeholders.sum())) != len(features):
                raise PlaceholderMismatch(
                    f"{count} {name} placeholder tokens, but the {name}s give {len(features)} rows"
                )
            embeds = embeds.masked_scatter(placeholders.unsqueeze(-1), features.to(embeds.dtype))
        return embeds

    def positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Position ids [3, B, L] (1 at padding) and rope deltas [B, 1] of a padded batch.

        The grids of all rows follow each other; each row takes as many as it has runs of placeholders.
        """
        config = self.config
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        images, videos = _as_lists(image_grid_thw), _as_lists(video_grid_thw)
        seconds = [] if second_per_grid_ts is None else [float(s) for s in second_per_grid_ts]
        result = torch.ones(3, *input_ids.shape, dtype=torch.long)
        deltas = []
        for row, (ids, mask) in enumerate(zip(input_ids.cpu(), real.cpu().bool(), strict=True)):
            tokens = ids[mask]
            num_images = _num_runs(tokens == config.image_token_id)
            num_videos = _rows_of_runs(
                videos, _num_runs(tokens == config.video_token_id), config.splits_video_into_frames
            )
            result[:, row, mask], _ = position_ids(
                tokens, config, images[:num_images], videos[:num_videos], seconds[:num_videos]
            )
            images, videos, seconds = images[num_images:], videos[num_videos:], seconds[num_videos:]
            deltas.append(int(result[:, row, mask].max()) + 1 - len(ids))
        if images or videos:
            raise PlaceholderMismatch(f"{len(images)} image and {len(videos)} video grids are left over by the prompts")
        return result.to(input_ids.device), torch.tensor(deltas, device=input_ids.device).unsqueeze(1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor | Cache, ...]:
        """Logits [B, L, V] of a padded batch, or of its last `logits_to_keep` columns.

        `position_ids` [3, B, L] may be left out where the whole prompt is in `input_ids`. A `cache` goes by the name
        `past_key_values` in transformers before 5.24. There are no further arguments: one passed over, under a name
        that a later release gives it, would make answers wrong without a word.
        """
        if input_ids is not None and position_ids is None:
            position_ids, _ = self.positions(
                input_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts
            )
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        if inputs_embeds is None or position_ids is None:
            raise ValueError("give input_ids, or inputs_embeds together with position_ids")
        if cache is None:
            cache = past_key_values
        elif past_key_values is not None:
            raise ValueError("give either cache or past_key_values: they are two names of the same")
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        attend = attend_padded(self.model, inputs_embeds, attention_mask, cache)
        hidden = self.model(inputs_embeds, position_ids, attend)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        vocab_size = self.config.vocab_size
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size)
        carried: dict[str, Any] = {CACHE_NAME: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **carried)
        return output.to_tuple() if return_dict is False else output

    # All that `generate` of transformers has to be told of Keye: position ids of three rows, and patches without a
    # dimension for the batch. Nothing a worker answers goes this way: `generate` is what the engine is compared with.
    # Each name with an underscore is a seam of its insides; `tests/unit/model/test_generation.py` has a test for each
    # that fails where a release of transformers calls it no more.

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Positions [3, B, L] of the prompt: a picture spreads over all three rows."""
        names = ("attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        return self.positions(inputs_tensor, *(model_kwargs.get(name) for name in names))[0]

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Behind a run of placeholders all three rows go on from the largest, not each from its own last."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        position_ids = model_kwargs["position_ids"]
        position_ids[..., -1] = position_ids[..., -1].amax(dim=0)
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """For beams and several answers the embeddings are repeated: packed patches have no dimension to repeat."""
        if expand_size == 1:
            return input_ids, kwargs
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        visual = [kwargs.pop(name, None) for name in names]
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.embed(input_ids, *visual)
        # Not left to the library: its first releases of this major repeat the three rows instead of the batch.
        position_ids = kwargs.pop("position_ids")
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)  # type: ignore[misc]
        return input_ids, kwargs | {"position_ids": position_ids.repeat_interleave(expand_size, dim=1)}


class KeyeVL1_5ForConditionalGeneration(KeyeForConditionalGeneration):
    """Keye-VL-1.5-8B."""

    config_class = KeyeVL1_5Config


def _as_lists(grids: Tensor | Sequence[Grid] | None) -> list[list[int]]:
    if grids is None:
        return []
    return grids.tolist() if isinstance(grids, Tensor) else [list(grid) for grid in grids]


def _num_runs(flags: Tensor) -> int:
    return int(flags[:1].sum() + (flags[1:] & ~flags[:-1]).sum())


def _rows_of_runs(grids: list[list[int]], runs: int, splits_video_into_frames: bool) -> int:
    """How many rows of video grids this many runs of placeholders use up."""
    if not splits_video_into_frames:
        return runs
    rows = 0
    while runs > 0 and rows < len(grids):
        runs -= grids[rows][0]
        rows += 1
    return rows


AutoModelForImageTextToText.register(KeyeConfig, KeyeForConditionalGeneration)
AutoModelForImageTextToText.register(KeyeVL1_5Config, KeyeVL1_5ForConditionalGeneration)

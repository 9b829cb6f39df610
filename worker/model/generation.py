"""All that `generate` of transformers has to be told of Keye. Each name with an underscore is a seam of its insides.

Nothing a worker answers goes this way: `generate` is what the engine is compared with. Three hooks are overridden, and
`tests/unit/model/test_generation.py` has a test for each that fails where a release of transformers calls it no more.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What `generate` calls the keys and values it carries from step to step; renamed in transformers 5.24."""


class KeyeGenerationMixin(GenerationMixin):
    """Position ids of three rows, and patches without a dimension for the batch, on their way through `generate`.

    The model's own `positions` and `embed` are what they are made with.
    """

    positions: Callable[..., tuple[Tensor, Tensor]]
    embed: Callable[..., Tensor]

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

"""A FANformer that sees and hears: its language model rests, each modality has a tower, a projector and adapters.

Paper: Phi-4-multimodal, arXiv:2503.01743, section 2 ("mixture of LoRAs"). Adapters: LoRA, arXiv:2106.09685.

Shapes, beside those of `modeling_fanformer`: N pictures and M recordings of a batch, in the order of its rows and of
the places in each; W width of a tower, C features of one token before the projector, A adapter rank.

What differs from the paper:
- a projector ends in an RMSNorm that gives its outputs the embeddings' mean norm: no other norm brings them to scale;
- a row that holds pictures and recordings has both adapters, where the paper has the vision adapter alone;
- tokens of a picture are n x n patches side by side, where the paper takes their mean.
"""

import os
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_fanformer import FANformerConfig
from .configuration_fanformer_multimodal import FANformerMultimodalConfig
from .modeling_fanformer import (
    FANformerForCausalLM,
    FANformerModel,
    FANformerPreTrainedModel,
    FANformerRMSNorm,
    scaled_linear,
)
from .recurrence_fanformer import CACHE, Writer, takes_cache

VISION, AUDIO = "vision", "audio"
_BITS = {VISION: 1, AUDIO: 2}
"""What `modality_ids` are sums of: 0 is a row of text."""


class AdapterRoute(threading.local):
    """Which rows of the batch at hand each adapter works on: (rows,) int64 each; none outside a forward pass.

    Each thread has its own: threads that share a model compute other batches.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type["AdapterRoute"], tuple[()]]:
        """Copy and pickle as an empty one: no copy is made within a forward pass."""
        return AdapterRoute, ()


class RoutedLinear(nn.Linear):
    """W x + b for every row, and alpha / A * B_m A_m x more for the rows that hold modality m.

    Rows without a modality get what the plain layer computes, to the bit. Source: LoRA, arXiv:2106.09685, eq. 3.
    """

    route: AdapterRoute
    lora_A: nn.ModuleDict  # noqa: N815  PEFT's names
    lora_B: nn.ModuleDict  # noqa: N815
    lora_scale: float

    @classmethod
    def convert(cls, linear: nn.Linear, modalities: list[str], rank: int, scale: float, route: AdapterRoute) -> None:
        """Make a plain layer one of these in place: its weight stays, under its name; B starts at 0."""
        inputs, outputs = linear.in_features, linear.out_features
        linear.__class__ = cls
        linear.route, linear.lora_scale = route, scale
        linear.lora_A = nn.ModuleDict({name: scaled_linear(inputs, rank, False) for name in modalities})
        linear.lora_B = nn.ModuleDict({name: scaled_linear(rank, outputs, False, gain=0.0) for name in modalities})

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (B, ..., in_features) to (B, ..., out_features)."""
        output = super().forward(x)
        for name, rows in self.route.rows.items():
            change = self.lora_B[name](self.lora_A[name](x.index_select(0, rows))) * self.lora_scale
            output = output.index_add(0, rows, change.to(output.dtype))
        return output


class FANformerProjector(nn.Module):
    """RMSNorm(W_2 gelu(W_1 f + b_1) + b_2), its weight the embeddings' mean norm over sqrt(D).

    Source: Phi-4-multimodal, arXiv:2503.01743, section 2.1 (two layers), the norm ours.
    """

    def __init__(self, inputs: int, config: FANformerMultimodalConfig) -> None:
        super().__init__()
        text = config.text_config
        self.up = scaled_linear(inputs, text.hidden_size, bias=True)
        self.down = scaled_linear(text.hidden_size, text.hidden_size, bias=True)
        self.norm = FANformerRMSNorm(text.hidden_size, text.rms_norm_eps)
        self.norm.initial = config.embedding_norm * text.hidden_size**-0.5

    def forward(self, features: Tensor) -> Tensor:
        """Map `features` (..., C) to (..., D)."""
        return self.norm(self.down(F.gelu(self.up(features))))


def _audio_tower(config: Any) -> nn.Module:
    if config.model_type == "whisper":  # read where it is wanted: no other model need wait for it
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder(config)
    from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioModel

    return Phi4MultimodalAudioModel(config)


class FANformerMultimodalPreTrainedModel(FANformerPreTrainedModel):
    """Loading, saving and initialisation of models with towers."""

    config: FANformerMultimodalConfig
    config_class = FANformerMultimodalConfig
    supports_gradient_checkpointing = False
    input_modalities = ("image", "audio", "text")
    _no_split_modules = ["FANformerDecoderLayer", "SiglipEncoderLayer", "Phi4MultimodalAudioConformerEncoderLayer"]
    _supports_flex_attn = False  # the towers' heads are of any width
    _keys_to_ignore_on_load_unexpected: Any = None
    _can_record_outputs = {}
    _auto_map = {
        "AutoConfig": "configuration_fanformer_multimodal.FANformerMultimodalConfig",
        "AutoModel": "modeling_fanformer_multimodal.FANformerMultimodalModel",
        "AutoModelForCausalLM": "modeling_fanformer_multimodal.FANformerMultimodalForCausalLM",
        "AutoModelForImageTextToText": "modeling_fanformer_multimodal.FANformerForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_fanformer_multimodal.FANformerForConditionalGeneration",
    }

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FANformerRMSNorm) and hasattr(module, "initial"):
            init.constant_(module.weight, module.initial)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code to a folder; arguments as in `PreTrainedModel.save_pretrained`."""
        self.config.auto_map = dict(self._auto_map)
        super(FANformerPreTrainedModel, self).save_pretrained(save_directory, *args, **kwargs)


class FANformerMultimodalModel(FANformerMultimodalPreTrainedModel):
    """Towers, projectors and the decoder, without its LM head."""

    def __init__(self, config: FANformerMultimodalConfig) -> None:
        super().__init__(config)
        self.language_model = FANformerModel(config.text_config)
        self.projectors = nn.ModuleDict()
        self.vision_tower: nn.Module | None = None
        self.audio_tower: nn.Module | None = None
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            width = config.vision_config.hidden_size * config.image_downsample**2
            self.projectors[VISION] = FANformerProjector(width, config)
        if config.audio_config is not None:
            self.audio_tower = _audio_tower(config.audio_config)
            self.projectors[AUDIO] = FANformerProjector(config.audio_config.hidden_size * config.audio_stack, config)
        self.route = AdapterRoute()
        if config.adapter_rank:
            scale = config.adapter_alpha / config.adapter_rank
            linears = [one for one in self.language_model.layers.modules() if type(one) is nn.Linear]
            for linear in linears:
                RoutedLinear.convert(linear, list(self.projectors), config.adapter_rank, scale, self.route)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Return the tokens of pictures.

        Args:
            pixel_values: (N, 3, height, width), as the tower takes them.
            **kwargs: not used.

        Returns:
            (N, tokens of a picture, D).

        Raises:
            ValueError: if the model has no vision tower.
        """
        if self.vision_tower is None:
            raise ValueError("`pixel_values` must not be given, got some: this model has no vision tower.")
        if self.config.blind:
            pixel_values = torch.ones_like(pixel_values)
        states = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state  # (N, patches, W)
        n, side = self.config.image_downsample, int(states.shape[1] ** 0.5)
        grid = states.unflatten(1, (side // n, n, side // n, n)).transpose(2, 3)  # (N, side/n, side/n, n, n, W)
        return self.projectors[VISION](grid.flatten(3).flatten(1, 2))

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **kwargs: Any) -> list[Tensor]:
        """Return the tokens of recordings; those of one length go through the tower together, so no padding is heard.

        Args:
            input_features: (M, mel bands, frames), logarithmic mel spectrograms.
            input_features_mask: (M, frames), 1 for a frame and 0 for padding at the end.
            **kwargs: not used.

        Returns:
            (tokens, D) of each recording.

        Raises:
            ValueError: if the model has no audio tower, or a recording is no whole number of tokens long.
        """
        if self.audio_tower is None:
            raise ValueError("`input_features` must not be given, got some: this model has no audio tower.")
        if self.config.blind:
            input_features = torch.ones_like(input_features)  # zeros stay zeros there, at which norms have no slope
        lengths = input_features_mask.sum(-1)
        found: list[Tensor] = [input_features.new_empty(0)] * len(lengths)
        for length in lengths.unique().tolist():
            if length < 1 or length % self.config.frames_per_audio_token:
                raise ValueError(
                    f"`input_features_mask` must leave a multiple of {self.config.frames_per_audio_token} frames, got "
                    f"{length}: use the folder's processor."
                )
            chosen = (lengths == length).nonzero()[:, 0]
            states = self._hear(input_features[chosen, :, :length].to(self.dtype))  # (some, states, W)
            tokens = self.projectors[AUDIO](states.unflatten(1, (-1, self.config.audio_stack)).flatten(2))
            for place, index in enumerate(chosen.tolist()):
                found[index] = tokens[place]
        return found

    def _hear(self, features: Tensor) -> Tensor:
        """Return the tower's states (some, states, W) of spectrograms (some, mel bands, frames)."""
        if self.config.audio_config.model_type != "whisper":
            return self.audio_tower(features.transpose(1, 2), mask=None)  # type: ignore[misc]
        most, frames = 2 * self.config.audio_config.max_source_positions, features.shape[-1]
        if frames > most:
            raise ValueError(f"a recording must have at most {most} frames of 10 ms, got {frames}: cut it.")
        silence = features.amin((1, 2), keepdim=True).expand(-1, features.shape[1], most - frames)
        whole = self.audio_tower(torch.cat((features, silence), -1))  # type: ignore[misc]
        return whole.last_hidden_state[:, : frames // 2]

    def modality_ids(self, input_ids: Tensor) -> Tensor:
        """Return what each row of `input_ids` (B, T) holds: (B,) int64, 1 for pictures, 2 for recordings, or both."""
        found = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        for name, token in ((VISION, self.config.image_token_id), (AUDIO, self.config.audio_token_id)):
            if token is not None:
                found = found + _BITS[name] * (input_ids == token).any(-1)
        return found

    def _embed(self, input_ids: Tensor, features: dict[str, Tensor]) -> Tensor:
        """Return embeddings (B, T, D), the features (tokens, D) of each modality at its placeholders."""
        tokens = {VISION: self.config.image_token_id, AUDIO: self.config.audio_token_id}
        places = {name: input_ids == token for name, token in tokens.items() if token is not None}
        plain = input_ids
        for place in places.values():
            plain = plain.masked_fill(place, 0)  # whose row is not used: the id may have none
        embeddings = self.language_model.embed_tokens(plain)
        for name, place in places.items():
            given = features.get(name)
            wanted, count = int(place.sum()), 0 if given is None else len(given)
            if wanted != count:
                raise ValueError(
                    f"`input_ids` must have as many {name} placeholders as there are {name} tokens, got {wanted} for "
                    f"{count}: every picture and recording goes with the places of its own."
                )
            if given is not None:
                embeddings = embeddings.masked_scatter(place[..., None], given.to(embeddings.dtype))
        return embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder over tokens, pictures and recordings.

        Args:
            input_ids: (B, T) int64; exactly one of this and `inputs_embeds`.
            attention_mask: as in `FANformerModel.forward`, like the next two and `use_cache`.
            position_ids: see there.
            past_key_values: see there; it remembers what its rows hold.
            inputs_embeds: (B, T, D), pictures and recordings already among them.
            use_cache: see there.
            pixel_values: (N, 3, height, width), those whose placeholders are in `input_ids`, in their order.
            input_features: (M, mel bands, frames), likewise.
            input_features_mask: (M, frames).
            modality_ids: (B,), as the method of that name returns it for whole rows; default: what the cache
                remembers, else that of `input_ids`.
            **kwargs: passed down to the attention backend.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if pictures or recordings come
                beside `inputs_embeds`, or if their tokens are not as many as their placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of `input_ids` and `inputs_embeds` must be given, got both or neither.")
        if input_ids is None and not (pixel_values is None and input_features is None):
            raise ValueError(
                "`pixel_values` and `input_features` need `input_ids`, got `inputs_embeds`: give one form."
            )
        if modality_ids is None:
            modality_ids = getattr(past_key_values, "modality_ids", None)
        if modality_ids is None and input_ids is not None:
            modality_ids = self.modality_ids(input_ids)
        if past_key_values is not None and modality_ids is not None:
            past_key_values.modality_ids = modality_ids
        if inputs_embeds is None:
            features = {}
            if pixel_values is not None:
                features[VISION] = self.get_image_features(pixel_values).flatten(0, 1)
            if input_features is not None:
                if input_features_mask is None:
                    raise ValueError("`input_features_mask` must be given beside `input_features`, got None.")
                features[AUDIO] = torch.cat(self.get_audio_features(input_features, input_features_mask))
            inputs_embeds = self._embed(input_ids, features)
        outputs = self._decode(
            modality_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if getattr(outputs, CACHE) is not None and modality_ids is not None:
            getattr(outputs, CACHE).modality_ids = modality_ids
        return outputs

    def _decode(self, modality_ids: Tensor | None, **inputs: Any) -> BaseModelOutputWithPast:
        """Run the decoder, the adapters of each modality on its rows."""
        if modality_ids is not None and self.config.adapter_rank:
            rows = {name: (modality_ids & _BITS[name]).nonzero()[:, 0] for name in self.projectors}
            self.route.rows = {name: chosen for name, chosen in rows.items() if len(chosen)}
        try:
            return self.language_model(**inputs)
        finally:
            self.route.rows = {}


class FANformerForConditionalGeneration(FANformerMultimodalPreTrainedModel, Writer):
    """A FANformer that writes about pictures, recordings and text: logits (B, T, V), and the loss for labels."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: FANformerMultimodalConfig) -> None:
        super().__init__(config)
        self.model = FANformerMultimodalModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        placeholders = [number for number in (config.image_token_id, config.audio_token_id) if number is not None]
        never = [number for number in placeholders if number < config.vocab_size]  # no text holds a picture
        self.generation_config.suppress_tokens = never or None

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the LM head."""
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Return the tokens (N, tokens of a picture, D) of `pixel_values` (N, 3, height, width)."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(self, input_features: Tensor, input_features_mask: Tensor, **kwargs: Any) -> list[Tensor]:
        """Return the tokens (tokens, D) of each of the recordings `input_features` (M, mel bands, frames)."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        modality_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids: as in `FANformerMultimodalModel.forward`, like all that is not explained here.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: (B, T) int64, as in `FANformerForCausalLM.forward`; placeholders must have -100.
            use_cache: see there.
            pixel_values: see there.
            input_features: see there.
            input_features_mask: see there.
            modality_ids: see there.
            logits_to_keep: compute logits for this many last positions only, or for these indices; 0 is all.
            **kwargs: passed down to the attention backend and to the loss.

        Returns:
            `loss` in nats per predicted token (a scalar, where labels are given) and `logits` (B, T, V).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            modality_ids=modality_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        is_first_iteration: bool | None = False,
        use_cache: bool = True,
        modality_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of one step: pictures and recordings with the first, what the rows hold with every one.

        Args:
            input_ids: (B, T) int64, the whole rows.
            *args: as in `GenerationMixin`.
            is_first_iteration: see there.
            use_cache: see there.
            modality_ids: (B,), for rows given as embeddings.
            pixel_values: (N, 3, height, width).
            input_features: (M, mel bands, frames).
            input_features_mask: (M, frames).
            **kwargs: see there.
        """
        kwargs.pop("mm_token_type_ids", None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        inputs["modality_ids"] = self.model.modality_ids(input_ids) if modality_ids is None else modality_ids
        if is_first_iteration or not use_cache:
            inputs["pixel_values"] = pixel_values
            inputs["input_features"], inputs["input_features_mask"] = input_features, input_features_mask
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows `expand_size` times, the pictures and recordings of each row behind one another with it."""
        if expand_size == 1 or input_ids is None:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        media = {name: kwargs.pop(name, None) for name in ("pixel_values", "input_features", "input_features_mask")}
        if media["pixel_values"] is not None:
            tokens = (input_ids == self.config.image_token_id).sum(-1)
            counts = [self.config.image_seq_length] * len(media["pixel_values"])
            media["pixel_values"] = _repeat(media["pixel_values"], tokens.tolist(), counts, expand_size)
        if media["input_features"] is not None:
            tokens = (input_ids == self.config.audio_token_id).sum(-1)
            counts = (media["input_features_mask"].sum(-1) // self.config.frames_per_audio_token).tolist()
            for name in ("input_features", "input_features_mask"):
                media[name] = _repeat(media[name], tokens.tolist(), counts, expand_size)
        rows, rest = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return rows, {**rest, **{name: value for name, value in media.items() if value is not None}}


def _repeat(media: Tensor, tokens: list[int], counts: list[int], times: int) -> Tensor:
    """Return pictures or recordings (N, ...) with those of each row `times` times, one copy of the row after another.

    Args:
        media: in the order of the rows.
        tokens: of each row.
        counts: tokens of each picture or recording.
        times: copies.
    """
    chosen: list[int] = []
    begin = 0
    for wanted in tokens:
        end, held = begin, 0
        while held < wanted and end < len(counts):
            held, end = held + counts[end], end + 1
        chosen += [*range(begin, end)] * times
        begin = end
    return media[torch.tensor(chosen, device=media.device)]


class FANformerMultimodalForCausalLM(FANformerForCausalLM):
    """The language model alone of a folder with towers: nothing else is read, and what comes is a plain FANformer."""

    config_class = FANformerMultimodalConfig
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.", r"audio_tower\.", r"projectors\.", r"\.lora_[AB]\."]

    def __init__(self, config: FANformerMultimodalConfig | FANformerConfig) -> None:
        super().__init__(config.get_text_config())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the language model; arguments and result as in `PreTrainedModel.from_pretrained`."""
        kwargs["key_mapping"] = {r"^model\.language_model\.": "model."}
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__class__ = FANformerForCausalLM  # which it is, and is saved as, under its own names
        model.__dict__.pop("_weight_conversions", None)
        if FANformerForCausalLM._auto_class is None:  # in a process that loads a folder's own code
            FANformerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
            FANformerConfig.register_for_auto_class()
        return loaded


__all__ = [
    "FANformerForConditionalGeneration",
    "FANformerMultimodalForCausalLM",
    "FANformerMultimodalModel",
    "FANformerMultimodalPreTrainedModel",
]

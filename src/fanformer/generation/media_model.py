"""Text about pictures and recordings: a model with towers, and the processor that it was saved with."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from fanformer.data.multimodal import placeholder_ids
from fanformer.data.multimodal.media_rows import MediaStore
from fanformer.data.multimodal.messages import Media, MediaMessage
from fanformer.data.multimodal.wording import wording_of
from fanformer.errors import CheckpointError, ConfigError, DataError, refuse_single
from fanformer.generation.interruption import Interruption
from fanformer.generation.loading import check_weights, load_config, read_weights
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import (
    Batch,
    Completion,
    check_batches,
    check_length,
    check_text,
)
from fanformer.generation.torch_model import TorchModel
from fanformer.machine.devices import resolve_device, resolve_dtype
from fanformer.model.multimodal import FANformerProcessor, media_bytes


class MediaModel(TorchModel):
    """A language model with towers that writes about what it is shown."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: FANformerProcessor,
        join: bool = True,
        store: MediaStore | None = None,
    ) -> None:
        """Take a model in evaluation mode and the processor that it was saved with.

        Args:
            model: a `FANformerForConditionalGeneration`.
            processor: of the same folder.
            join: as for `TorchModel`.
            store: has read what is shown; None is one of its own.
        """
        super().__init__(model, processor.tokenizer, join=join)
        self.processor = processor
        self.store = store or self.new_store()
        ids = {kind: getattr(model.config, f"{kind}_token_id") for kind in ("image", "audio")}
        self.wording = wording_of(self.tokenizer, {kind: number for kind, number in ids.items() if number is not None})
        self._places = set(placeholder_ids(self.tokenizer))

    def new_store(self, positions: int | None = None) -> MediaStore:
        """Return a store that has read nothing, and takes no recording that the model could not.

        Args:
            positions: tokens that a text may have; None is what the model has.
        """
        limits = (self.model.config.most_audio_tokens, positions or self.positions)
        return MediaStore(self.processor, min((most for most in limits if most is not None), default=None))

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], store: MediaStore | None = None) -> list[int]:
        """Return the ids of a conversation whose next answer is to be written.

        Args:
            messages: `role` and `content` of each, the content a text or a list of texts and `Media`.
            store: reads what is shown; None is the model's own.

        Raises:
            DataError: if a picture or recording is wrong, or the model has no tower for it.
        """
        asked = [MediaMessage(one["role"], _parts(one["content"])) for one in messages]
        shown = [part for one in asked for part in one.parts if isinstance(part, Media)]
        counts = [(store or self.store).tokens(part) for part in shown]
        return self.wording.encode(asked, counts, prompt=True).ids

    @torch.inference_mode()
    def features(self, media: Sequence[Media], store: MediaStore) -> list[Tensor]:
        """Return what the towers make of each picture and recording, (tokens, D) each, in their order.

        Args:
            media: one at least.
            store: has read them.

        Raises:
            ValueError: if a recording is longer than its tower takes.
        """
        inputs = {name: value.to(self.model.device) for name, value in store.inputs(media).items()}
        found: dict[str, Iterator[Tensor]] = {}
        if "pixel_values" in inputs:
            found["image"] = iter(self.model.get_image_features(inputs.pop("pixel_values")))
        if inputs:
            found["audio"] = iter(self.model.get_audio_features(**inputs))
        return [next(found[one.kind]) for one in media]

    def look_at(self, kind: str, path: str) -> Media:
        """Return the picture or recording in a file, read and found right.

        Args:
            kind: "image" or "audio".
            path: of the file.

        Raises:
            DataError: if it is missing, damaged or of another kind, or the model has no tower for it.
        """
        media = _read(kind, path)
        self.store.tokens(media)
        return media

    def media_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the towers are given of a batch: nothing of what is remembered.

        What was read is only of use while the same is shown: other pictures have the same placeholders, and keys of a
        text were computed without the adapters of what it shows now.
        """
        media = [one for shown in batch.media for one in shown]
        remembered = batch.remembered
        if remembered is not None:
            shown = tuple(self.store.digest(one) for one in media)
            row = batch.rows[0]
            end = 1 + max((place for place, number in enumerate(row) if number in self._places), default=-1)
            if remembered.media != shown or remembered.ids[:end] != row[:end]:
                remembered.forget()
            remembered.media = shown
            if remembered.kept is not None and end:
                return {}
        return {name: value.to(self.model.device) for name, value in self.store.inputs(media).items()}

    def ask(
        self,
        questions: Sequence[str],
        media: Sequence[Sequence[Media]],
        settings: GenerationSettings,
        on_text: Callable[[str], None] | None = None,
        *,
        batch_size: int = 8,
        interruption: Interruption | None = None,
    ) -> Iterator[Completion]:
        """Answer every question about what is shown with it.

        Args:
            questions: the texts.
            media: pictures and recordings of each, in front of it.
            settings: lengths and sampling.
            on_text: is handed the answer to a single question as it comes.
            batch_size: questions that are answered together.
            interruption: ends the answers early when requested.

        Raises:
            ConfigError: as `complete`.
            DataError: if a picture or recording is wrong, or the model has no tower for it.
        """
        check_batches(len(questions), on_text is not None, batch_size)
        rows = []
        for question, shown in zip(questions, media, strict=True):
            check_text(question)
            ids = self.encode_messages([{"role": "user", "content": [*shown, question]}])
            check_length(self.positions, question, ids, settings.max_length)
            rows.append(ids)
        interruption = interruption or Interruption()
        whole = Batch(rows, [""] * len(rows), settings, on_text, interruption, media=media)
        return self._answers(questions, whole, batch_size)

    def _answers(self, questions: Sequence[str], whole: Batch, batch_size: int) -> Iterator[Completion]:
        """Answer, and keep nothing of what was shown: a program may ask about any number of pictures."""
        try:
            yield from self._in_batches(questions, whole, batch_size)
        finally:
            self.store.forget(one for shown in whole.media for one in shown)

    def generate(self, prompt: Any, *, images: Sequence[Any] = (), audio: Sequence[Any] = (), **sampling: Any) -> Any:
        """Continue a prompt, or answer it about pictures and recordings.

        Args:
            prompt: a text, or several where nothing is shown.
            images: a list of paths or bytes of pictures, which the prompt comes behind.
            audio: a list of paths or bytes of recordings, behind the pictures.
            **sampling: as for `settings`.

        Raises:
            ConfigError: as `TextModel.generate`, or if several prompts come with media, or media are given otherwise.
            DataError: if a picture or recording is wrong, or the model has no tower for it.
        """
        shown = shown_media(images, audio)
        if not shown:
            return super().generate(prompt, **sampling)
        if not isinstance(prompt, str):
            raise ConfigError(
                f"`prompt` must be one text beside media, got {type(prompt).__name__}: call once for each."
            )
        return next(self.ask([prompt], [shown], self.settings(**sampling))).text


def shown_media(images: Sequence[Any], audio: Sequence[Any]) -> list[Media]:
    """Return pictures and recordings in this order; files are read here, and may change afterwards.

    Args:
        images: paths or bytes of pictures.
        audio: paths or bytes of recordings.

    Raises:
        ConfigError: if they are given otherwise.
        DataError: if a file cannot be read.
    """
    for name, given in (("images", images), ("audio", audio)):
        refuse_single(name, given)
    return [_read(kind, one) for kind, given in (("image", images), ("audio", audio)) for one in given]


def _read(kind: str, source: Any) -> Media:
    """Return a picture or recording as it is now, by the name of its file."""
    if isinstance(source, bytes):
        return Media(kind, source)
    if not isinstance(source, str | os.PathLike):
        got = type(source).__name__
        raise ConfigError(f"a picture or recording must be a path or bytes, got {got}: save it as a file first.")
    path = Path(os.path.expanduser(source))
    try:
        return Media(kind, media_bytes(path), str(path))
    except ValueError as error:
        raise DataError(str(error)) from error


def load_media_model(folder: str | Path, device: str = "auto", dtype: str = "auto") -> MediaModel:
    """Load the model with its towers that a folder holds; no code of the folder is run.

    Args:
        folder: what `fanformer train --multimodal` or `save_pretrained` left.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.

    Raises:
        CheckpointError: if anything is missing, damaged, or has no towers.
        ConfigError: if the device is not there or the dtype not known.
    """
    model = load_with_towers(folder, device, dtype)
    return MediaModel(model, load_processor(folder))


def load_with_towers(folder: str | Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load the model alone, in evaluation mode; arguments and errors as in `load_media_model`."""
    placed, kind = resolve_device(device), resolve_dtype(dtype)
    config, path = load_config(folder), Path(folder)
    if config.model_type != "fanformer_multimodal":
        raise CheckpointError(
            f"{path.absolute()} holds a model of text only, which sees and hears nothing: name one that `fanformer "
            "train --multimodal` made."
        )
    check_weights(path)
    return read_weights(AutoModelForMultimodalLM, path, config, kind).to(placed).eval()


def load_processor(folder: str | Path) -> FANformerProcessor:
    """Load the processor that a folder holds.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    path = Path(folder)
    try:
        json.loads((path / "processor_config.json").read_text(encoding="utf-8"))
        return FANformerProcessor.from_pretrained(path, local_files_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"no processor_config.json in {path.absolute()}: copy the folder again.") from error
    except Exception as error:  # what a damaged value leads to depends on the field
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the processor in {path.absolute()} cannot be read: {reason}") from error


def _parts(content: Any) -> tuple[str | Media, ...]:
    return (content,) if isinstance(content, str) else tuple(content)


def export_adapter(model: PreTrainedModel, kind: str, base: str | Path, folder: str | Path) -> None:
    """Write the adapters of one kind of media as PEFT reads them, for the language model alone.

    Args:
        model: a `FANformerForConditionalGeneration`.
        kind: "image" or "audio".
        base: folder of the language model that they belong to.
        folder: is made: adapter_config.json and adapter_model.safetensors.

    Raises:
        ConfigError: if the model has no such adapters.
    """
    name = {"image": "vision", "audio": "audio"}.get(kind, kind)
    tensors, targets = {}, set()
    for key, value in model.state_dict().items():
        layer, found, rest = key.partition(".lora_")
        if found and f".{name}." in f".{rest}":
            layer = layer.replace("model.language_model.", "base_model.model.model.")
            tensors[f"{layer}.lora_{rest[0]}.weight"] = value.contiguous()
            targets.add(layer.removeprefix("base_model.model."))
    if not tensors:
        raise ConfigError(f"`kind` must be one that the model has adapters for, got {kind!r}: tune it first.")
    place = Path(folder)
    place.mkdir(parents=True)
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": model.config.adapter_rank,
        "lora_alpha": model.config.adapter_alpha,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    (place / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

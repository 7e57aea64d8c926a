"""Pictures, recordings and rows of messages about them, small and made here; and a tiny model with towers."""

import json
import wave

import numpy as np

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (20, 60, 220), "white": (250, 250, 250)}
TONES = {"low": 250, "high": 2000}
TINY = {
    "sequence_length": 64,
    "batch_size": 4,
    "tower_width": 16,
    "tower_layers": 1,
    "image_size": 16,
    "patch_size": 4,
    "audio_token_ms": 40,
    "adapter_rank": 2,
    "device": "cpu",
    "precision": "float32",
    "eval_steps": 1000,
    "log_steps": 1,
}
"""Fields of a run that takes a second."""


def write_picture(path, colour, seed=0):
    """Write a picture of one colour with some noise."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(-20, 21, (12, 12, 3))
    Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(path)
    return path


def write_tone(path, tone, seconds=0.3, rate=8000, seed=0):
    """Write a wav of one frequency with some noise."""
    time = np.arange(int(seconds * rate)) / rate
    noise = 0.05 * np.random.default_rng(seed).standard_normal(len(time))
    samples = 0.4 * np.sin(2 * np.pi * TONES[tone] * time) + noise
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def write_rows(folder, pictures=12, recordings=12, both=0):
    """Write rows.jsonl about pictures and recordings of different noise and length, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []

    def row(parts, question, answer):
        parts = [*parts, {"type": "text", "text": question}]
        rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]})

    for index in range(max(pictures, recordings, both)):
        colour, tone = list(COLOURS)[index % len(COLOURS)], list(TONES)[index % len(TONES)]
        picture = {"type": "image", "path": write_picture(folder / f"p{index}.png", colour, index).name}
        sound = write_tone(folder / f"t{index}.wav", tone, 0.2 + 0.1 * (index % 3), seed=index)
        recording = {"type": "audio", "path": sound.name}
        if index < pictures:
            row([picture], "which colour?", colour)
        if index < recordings:
            row([recording], "which tone?", tone)
        if index < both:
            row([picture, recording], "what is here?", f"{colour} and {tone}")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def save_with_towers(base, folder, adapters=True):
    """Save the model in `base` with untrained towers for pictures and sound, and adapters that change what it says."""
    import torch

    from fanformer.data.multimodal.placeholders import add_placeholders
    from fanformer.data.multimodal.wording import wording_of
    from fanformer.generation.loading import load_config, load_tokenizer
    from fanformer.training.fields import TowersConfig
    from fanformer.training.towers import join_towers, joined_config, make_processor

    fields = ("tower_width", "tower_layers", "image_size", "patch_size", "audio_token_ms", "adapter_rank")
    asked = TowersConfig(**{name: TINY[name] for name in fields})
    config = load_config(base)
    placeholders = add_placeholders(load_tokenizer(base, config.vocab_size), config.vocab_size, ["image", "audio"])
    wording = wording_of(placeholders.tokenizer, dict(placeholders.ids))
    placeholders.tokenizer.chat_template = wording.template
    joined = joined_config(asked, config, ["image", "audio"], placeholders.ids)
    if adapters:
        joined.adapter_rank, joined.adapter_alpha = 2, 4
    torch.manual_seed(0)
    model = join_towers(str(base), joined, asked, 300)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    make_processor(asked, joined, placeholders.tokenizer).save_pretrained(folder)
    return folder

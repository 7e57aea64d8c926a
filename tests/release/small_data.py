"""Small data in the form of the real ones, for programs that read them."""

import json
import lzma
import random


def write(path, rows):
    """Write rows as jsonl.xz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def story(draw):
    """Return a story of six sentences."""
    name, thing = draw.choice(["Tom", "Ann", "Ben", "Lily"]), draw.choice(["ball", "dog", "hat", "boat", "tree"])
    place = draw.choice(["garden", "house", "river"])
    told = f"One day {name} saw a {thing} near the {place}. The {thing} was small. So {name} took the {thing} home. "
    told += f"Then {name} went to the {place} with the {thing}, and {name} was happy. All were glad of it. "
    return told + f"In the evening it rained on the {place}."


def write_data(folder):
    """Write stories and questions into a folder, as ../shared/data has them."""
    draw = random.Random(0)
    stories = [{"src": "tinystories", "id": str(number), "text": story(draw)} for number in range(300)]
    write(folder / "text-small/train.jsonl.xz", stories[:200])
    write(folder / "text-small/valid.jsonl.xz", stories[200:220])
    write(folder / "text-large/train-00.jsonl.xz", stories[220:])
    for part in ("train", "valid"):
        rows = [
            {
                "story": f"{part}-{number}",
                "text": f"The {part} king number {number} sat in a hall and slept all day.",
                "question": "Who slept?",
                "answers": ["the king"],
                "explicit": True,
                "attribute": "character",
            }
            for number in range(8)
        ]
        write(folder / f"questions/fairytaleqa-{part}.jsonl.xz", rows)

"""Tiny benchmark files in the form their authors released them."""

import csv
import json

WORDS = ["cat", "mat", "small model", "def add", "things", "speaks", "return", "the cat sat", "a", "caf\u00e9"]


def write_released_files(folder, number=6, blimp=(), mmlu=()):
    """Write the files of all tasks, `number` questions each."""

    def lines(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def word(index):
        return WORDS[index % len(WORDS)]

    def question(index):
        choices = [{"text": word(index + step), "label": label} for step, label in enumerate("ABCD")]
        return {"question": {"stem": f"Who is {word(index)}?", "choices": choices}, "answerKey": "ABCD"[index % 4]}

    count = range(number)
    for name in ("arc/ARC-Easy-Test", "arc/ARC-Challenge-Test", "arc/ARC-Easy-Train", "openbookqa/test"):
        lines(f"{name}.jsonl", [question(index) for index in count])
    lines("piqa/valid.jsonl", [{"goal": word(i), "sol1": word(i + 1), "sol2": word(i + 2)} for i in count])
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{index % 2}\n" for index in count))
    names = {"activity_label": "Cooking", "ctx_a": "A cat sat.", "ctx_b": "the mat"}
    lines(
        "hellaswag/hellaswag_val.jsonl",
        [{**names, "endings": [f"{word(i + k)} [step] end {i}." for k in range(4)], "label": i % 4} for i in count],
    )
    lines("lambada/lambada_openai.jsonl", [{"context": f"the {word(i)} sat on", "continuation": "mat"} for i in count])
    lines(
        "winogrande/dev.jsonl",
        [
            {
                "sentence": f"The {word(i)} sat and _ slept.",
                "option1": word(i + 1),
                "option2": word(i + 2),
                "answer": "2",
            }
            for i in count
        ],
    )
    (folder / "sciq").mkdir(exist_ok=True)
    distractors = {f"distractor{k}": f"{k} things" for k in (1, 2, 3)}
    rows = [{"question": f"what {word(i)}?", **distractors, "correct_answer": word(i), "support": "A."} for i in count]
    (folder / "sciq/test.json").write_text(json.dumps(rows))
    for name in blimp:
        lines(
            f"blimp/{name}.jsonl",
            [{"sentence_good": f"A {word(i)} is.", "sentence_bad": f"{word(i)} a is."} for i in count],
        )
    for name in mmlu:
        for split in ("test", "dev"):
            path = folder / f"mmlu/{split}/{name}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([[word(i), *(word(i + k) for k in range(4)), "ABCD"[i % 4]] for i in count])
    return folder

"""What TRL's trainers compute on a folder and rows of ours, as JSON; run where TRL is installed.

python trl_losses.py FOLDER REFERENCE MESSAGES.jsonl PAIRS.jsonl
"""

import json
import sys
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

folder, reference, messages, pairs = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
COMMON = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "max_length": None,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def model(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def rows(path):
    return load_dataset("json", data_files=path, split="train")


with tempfile.TemporaryDirectory() as place:
    config = SFTConfig(output_dir=place, assistant_only_loss=True, **COMMON)
    data = rows(messages)
    sft = SFTTrainer(model(folder), args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    found = {"sft": sft.evaluate()["eval_loss"]}
    sft.train()
    found["sft_after"] = sft.evaluate()["eval_loss"]
    config = DPOConfig(output_dir=place, beta=0.25, **COMMON)
    data = rows(pairs)
    dpo = DPOTrainer(
        model(folder),
        ref_model=model(reference),
        args=config,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )
    figures = dpo.evaluate()
    found |= {"dpo": figures["eval_loss"], "margin": figures["eval_rewards/margins"]}
    found["accuracy"] = figures["eval_rewards/accuracies"]
    dpo.train()
    found["dpo_after"] = dpo.evaluate()["eval_loss"]
    print(json.dumps(found))

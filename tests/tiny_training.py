"""A tiny training run: anchors in words that a tokenizer of 97 words knows, options, arguments, and what is left."""

import json
from pathlib import Path

import torch

from acd_logits.training import AnchorExamples, OPOArguments, OPOTrainingArguments, encode_anchors

FOLDER = Path(__file__).parent / "training"  # holds texts that the tiny tokenizer has words for
HARMFUL, SAFE = "w10 w11 w12 w13", "w20 w21 w22 w23"
REFUSAL, COMPLIANCE, ANSWER = "w50 w51 w52", "w60 w61 w62 w63", "w70 w71"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w90', 'assistant': 'w91'}[m.role] }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w91{% endif %}"
)


def anchor_rows(number=10):
    """Harmful instructions, refused and answered, and safe ones, answered; every row has words of its own."""
    rows = []
    for i in range(number):
        words = " ".join(f"w{30 + (7 * i + k) % 20}" for k in range(1 + i % 3))
        rows += [
            {"instruction": f"{HARMFUL} {words}", "response": REFUSAL, "split": "D_HR"},
            {"instruction": f"{HARMFUL} {words}", "response": f"{COMPLIANCE} {words}", "split": "D_HA"},
            {"instruction": f"{SAFE} {words}", "response": f"{ANSWER} {words}", "split": "D_S"},
        ]
    kinds = {"D_HR": "harmful", "D_HA": "harmful", "D_S": "near_miss"}
    return [{**r, "finished": True, "kind": kinds[r["split"]], "mirror": str(i // 3)} for i, r in enumerate(rows)]


def anchor_examples(tokenizer, number=10, held_out=3):
    """Those rows as tokens; the first `held_out` instructions of each kind are held out."""
    rows = encode_anchors(anchor_rows(number), tokenizer, False, 64)
    return AnchorExamples(rows[3 * held_out :], rows[: 3 * held_out])


def build_options(**options):
    """The paper's prompts and losses: embeddings, eq. 3 and 4, cross entropy, no weights."""
    paper = {"prompt_type": "embedding", "retain": "ce", "ln_weight": 1.0, "lr_weight": 1.0}
    paper |= {"contrast_weight": 0.0, "first_token_weight": 0.0}
    texts = {f"{name}_prompt_file": str(FOLDER / f"{name}.txt") for name in ("safe", "opposite")}
    return OPOArguments(train_file="unused", model_name_or_path="some/model", **{**paper, **texts, **options})


def build_arguments(folder, **arguments):
    """Two quiet epochs of a few steps."""
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1, "logging_steps": 1}
    defaults |= {"warmup_steps": 0}  # the few steps of a test would all be part of it
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    return OPOTrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **arguments})


def history(folder):
    """The log of a run."""
    return json.loads(Path(folder, "run", "log_history.json").read_text())


def assert_same_pair(got, expected, **tolerance):
    """Both prompts of the two pairs are close."""
    torch.testing.assert_close(got.safeguarding, expected.safeguarding, **tolerance)
    torch.testing.assert_close(got.adversarial, expected.adversarial, **tolerance)

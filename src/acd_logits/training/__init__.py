"""Opposite Prompt Optimization (OPO): train the prompt pair of a model (section 3.2 of the paper, eq. 1 to 4).

SP, AP and their contrast are trained together, in front of the frozen model, by transformers' `Trainer`:

    arguments.py     what the user says
    data.py          an anchor set as examples: tokens of a prompt x and of its response y
    sampler.py       the order of the examples in an epoch
    prompts.py       what learns, and eq. 1: how it starts
    instructions.py  keys and values of instructions that see no prompt, computed once
    attention.py     attention over them, the prompt and the response, without copies
    model.py         eq. 2: the prompts in front of the model, placed as in inference
    loss.py          L_S (eq. 3), L_A (eq. 4) and L_C, of their contrast (eq. 5)
    trainer.py       steps, evaluations, the log
    run.py           the run, and the pair that it leaves behind
    distil.py, distil_data.py, distil_model.py  a pair's contrast as one prompt
"""

from __future__ import annotations

from .arguments import OPOArguments, OPOTrainingArguments, RunArguments, parse_arguments
from .data import AnchorExamples, collate, encode_anchors, encode_example
from .loss import TERMS, joint_loss, opo_loss
from .model import OPOModel, place_soft_prompt
from .prompts import initial_prompts
from .run import Run, load_model, prepare, train_pair
from .sampler import BalancedSampler
from .trainer import OPOTrainer

__all__ = [
    "TERMS",
    "AnchorExamples",
    "BalancedSampler",
    "OPOArguments",
    "OPOModel",
    "OPOTrainer",
    "OPOTrainingArguments",
    "Run",
    "RunArguments",
    "collate",
    "encode_anchors",
    "encode_example",
    "initial_prompts",
    "joint_loss",
    "load_model",
    "opo_loss",
    "parse_arguments",
    "place_soft_prompt",
    "prepare",
    "train_pair",
]

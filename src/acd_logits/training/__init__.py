"""Opposite Prompt Optimization (OPO): train the prompt pair of a model (section 3.2 of the paper, eq. 1 to 4).

SP is trained first, then AP. Each is a soft prompt in front of the frozen model, trained by transformers' `Trainer`:

    arguments.py   what the user says
    data.py        an anchor set as examples: tokens of a prompt x and of its response y
    sampler.py     the order of the examples in an epoch
    model.py       eq. 1, how a soft prompt starts; eq. 2, `[soft prompt; x]`, placed as in inference
    loss.py        eq. 3 and 4, the losses of SP and AP
    trainer.py     one stream: steps, evaluations, the log
    run.py         both streams, and the pair that they leave behind
"""

from __future__ import annotations

from .arguments import OPOArguments, OPOTrainingArguments, parse_arguments
from .data import AnchorExamples, collate, encode_anchors, encode_example
from .loss import TERMS, opo_loss
from .model import OPOModel, initial_prompts, place_soft_prompt
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
    "collate",
    "encode_anchors",
    "encode_example",
    "initial_prompts",
    "load_model",
    "opo_loss",
    "parse_arguments",
    "place_soft_prompt",
    "prepare",
    "train_pair",
]

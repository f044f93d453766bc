"""What moved in transformers is named before anything runs."""

import configparser
import re

import pytest
from transformers.generation import GenerationMixin

from acd_logits.decoding.attach import _OVERRIDES
from acd_logits.decoding.hooks import HOOKS, SUPPORTED, check_hooks
from conftest import ROOT


def test_this_transformers_has_all_of_them():
    check_hooks()
    assert set(_OVERRIDES) <= {name for _, name in HOOKS}


def test_a_method_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_valid_auto_compile_criteria")
    with pytest.raises(
        ImportError, match=r"has no GenerationMixin\._valid_auto_compile_criteria, which ACD hooks into"
    ):
        check_hooks()


def test_an_argument_that_was_renamed_is_named(monkeypatch):
    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, is_first_iteration=False
    ):
        pass

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare_inputs_for_generation)
    with pytest.raises(ImportError, match=r"no GenerationMixin\.prepare_inputs_for_generation\(past_key_values\), "):
        check_hooks()


def test_the_versions_are_those_of_the_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    oldest, newest = re.search(r"transformers>=5\.(\d+),<5\.(\d+)", settings["options"]["install_requires"]).groups()
    assert f"5.{oldest} to 5.{int(newest) - 1}" == SUPPORTED

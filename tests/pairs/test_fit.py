"""A pair against the config of a model that is not loaded yet."""

import pytest

from acd_logits.pairs.fit import check_fit_unloaded
from conftest import ARCHITECTURES, VOCAB, build_pair


@pytest.fixture
def config():
    return ARCHITECTURES["llama"]


def test_a_pair_of_another_model_needs_to_be_wanted(config):
    ours = build_pair(base_model_name_or_path="org/Model-A", vocab_size=VOCAB)
    assert not check_fit_unloaded(ours.config, config, "/cache/model-a", transfer=False)
    assert not check_fit_unloaded(build_pair().config, config, "org/model-b", transfer=True)
    with pytest.raises(ValueError, match="the pair was made for org/Model-A, not for org/model-b: --transfer"):
        check_fit_unloaded(ours.config, config, "org/model-b", transfer=False)
    assert check_fit_unloaded(ours.config, config, "org/model-b", transfer=True)
    other_words = build_pair(vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match="made for another model"):
        check_fit_unloaded(other_words.config, config, "org/model-b", transfer=False)
    assert check_fit_unloaded(other_words.config, config, "org/model-b", transfer=True)


def test_a_pair_of_another_size_fits_no_model(config):
    with pytest.raises(ValueError, match="the pair was made for hidden size 24, org/model has 32"):
        check_fit_unloaded(build_pair(hidden=24).config, config, "org/model", transfer=True)

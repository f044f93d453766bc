"""Eq. 5, its options, and what attaching a processor does to a model."""

import copy
import io
import math
import pickle

import pytest
import torch
from transformers import LogitsProcessorList, T5Config, T5ForConditionalGeneration

from acd_logits import ACDLogitsProcessor, PromptPair
from acd_logits.decoding.logits_process import contrast
from conftest import DEVICE, HIDDEN, VOCAB, assert_same, build_batch, build_model, build_pair
from reference import ReferenceProcessor

SCORES = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 10}


class TestContrast:
    def test_eq_5(self):
        safe, adversarial = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[4.0, -2.0, 0.0]])
        assert contrast(safe, adversarial, 0.5, keep_temperature=False).tolist() == [[0.0, 2.0, 0.0]]
        assert contrast(safe, adversarial, 0.5).tolist() == [[0.0, 4.0, 0.0]]
        assert contrast(safe, adversarial, 0.75).tolist() == [[-4.0, 10.0, 0.0]]

    def test_beta_keeps_plausible_tokens_only(self):
        probabilities = torch.tensor([[0.6, 0.3, 0.06, 0.04]])
        kept = contrast(probabilities.log(), torch.zeros(1, 4), 1.0, beta=0.1).isfinite()
        assert kept.tolist() == [[True, True, True, False]]

    def test_beta_leaves_rows_without_contrast_alone(self):
        safe = torch.tensor([[0.0, -9.0], [0.0, -9.0]])
        scores = contrast(safe, torch.ones(2, 2), torch.tensor([[0.0], [0.5]]), beta=0.5)
        assert scores.tolist() == [[0.0, -9.0], [-1.0, -math.inf]]

    def test_banned_tokens_stay_banned(self):
        safe = torch.tensor([[-math.inf, -math.inf, 0.0]])
        adversarial = torch.tensor([[-math.inf, -1e4, 1.0]])
        for alpha in (0.5, torch.tensor([[0.5]])):
            assert contrast(safe, adversarial, alpha).tolist() == [[-math.inf, -math.inf, -1.0]]

    @pytest.mark.parametrize("alpha", [1.0, 1.5])
    def test_rows_whose_coefficients_sum_to_nothing_are_eq_5_alone(self, alpha):
        safe, adversarial = torch.randn(2, 2, 9)
        expected = safe - alpha * adversarial
        torch.testing.assert_close(contrast(safe, adversarial, alpha), expected)
        together = contrast(safe, adversarial, torch.tensor([[alpha], [0.5]]))
        torch.testing.assert_close(together[0], expected[0])
        torch.testing.assert_close(together[1], 2 * safe[1] - adversarial[1])

    @pytest.mark.parametrize("keep_temperature", [True, False])
    @pytest.mark.parametrize("beta", [0.0, 0.5])
    @pytest.mark.parametrize("alpha", [0.0, torch.zeros(2, 1)], ids=["number", "rows"])
    def test_alpha_0_leaves_scores_as_they_are(self, alpha, beta, keep_temperature):
        safe = torch.tensor([[-0.0, 0.1, -math.inf], [3e38, -3e38, 7.7]])
        adversarial = torch.tensor([[-1.0, -math.inf, -math.inf], [-3e38, 3e38, math.inf]])
        scores = contrast(safe, adversarial, alpha, beta, keep_temperature)
        assert torch.equal(scores.view(torch.int32), safe.view(torch.int32))  # the bits

    @pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 0.99, torch.tensor([[0.3]] * 4), torch.tensor([[0.9]] * 4)])
    def test_what_the_streams_agree_on_is_the_result(self, alpha):
        safe = 10 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(contrast(safe, safe.clone(), alpha), safe, atol=1e-4, rtol=1e-4)
        # Each stream has an arbitrary constant of its own
        got = contrast(safe, safe + 3, alpha).softmax(-1)
        torch.testing.assert_close(got, safe.softmax(-1), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("as_rows", [False, True])
    def test_the_order_of_tokens_and_what_is_cut_do_not_change(self, as_rows):
        safe, adversarial = torch.randn(2, 64, 50, generator=torch.Generator().manual_seed(0)) * 5
        for strength in (0.0, 0.2, 0.5, 0.97, 1 - 2**-24, 1.0, 1.3):
            alpha = torch.full((64, 1), strength) if as_rows else strength
            kept, verbatim = (contrast(safe, adversarial, alpha, 0.1, keep) for keep in (True, False))
            assert not kept.isnan().any()
            assert torch.equal(kept.argmax(-1), verbatim.argmax(-1))
            assert torch.equal(kept.isneginf(), verbatim.isneginf())

    def test_the_host_never_waits_for_the_device(self):
        """Nothing is read from tensors: those of the meta device have nothing to read."""
        safe, alpha = torch.zeros(2, 9, device="meta"), torch.zeros(2, 1, device="meta")
        for strength in (0.5, alpha):
            assert contrast(safe, safe, strength, 0.1).shape == (2, 9)


def generate(model, pair, batch, **options):
    acd = ACDLogitsProcessor(model, pair, **options)
    return model.generate(**batch, logits_processor=[acd], **SCORES)


def test_alpha_0_is_the_safeguarding_prompt_alone(model, pair):
    batch = build_batch((9,))
    embeds = torch.cat([pair.safeguarding[None], model.get_input_embeddings()(batch["input_ids"])], dim=1)
    expected = copy.deepcopy(model).generate(inputs_embeds=embeds.detach(), **SCORES)
    got = generate(model, pair, batch, alpha=0.0, beta=0.9)
    assert got.sequences[:, 9:].tolist() == expected.sequences.tolist()
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-4, rtol=0)


def test_equal_prompts_keep_the_logits(model):
    prompt = torch.randn(5, HIDDEN)
    batch = build_batch()
    alone = generate(model, PromptPair(prompt, prompt), batch, alpha=0.0, beta=0.0)
    both = generate(model, PromptPair(prompt, prompt), batch, alpha=0.3, beta=0.0)
    assert both.sequences.tolist() == alone.sequences.tolist()
    torch.testing.assert_close(both.scores, alone.scores, atol=1e-4, rtol=0)
    verbatim = generate(model, PromptPair(prompt, prompt), batch, alpha=0.3, beta=0.0, keep_temperature=False)
    expected = tuple(0.7 * scores for scores in alone.scores)
    torch.testing.assert_close(verbatim.scores, expected, atol=1e-4, rtol=0)


def test_alpha_per_row(model, pair):
    batch = build_batch()
    alpha = torch.tensor([0.0, 0.4, 1.1])
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, alpha, 0.05, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], **SCORES)
    assert_same(generate(model, pair, batch, alpha=alpha, beta=0.05), expected)


def test_alpha_per_row_under_beams(model, pair):
    batch = build_batch()
    alpha = torch.tensor([0.0, 0.4, 1.1])
    acd = ACDLogitsProcessor(model, pair, alpha)
    together = model.generate(**batch, logits_processor=[acd], num_beams=2, **SCORES)
    for row in range(3):
        acd = ACDLogitsProcessor(model, pair, float(alpha[row]))
        one = {key: value[row : row + 1] for key, value in batch.items()}
        alone = model.generate(**one, logits_processor=[acd], num_beams=2, **SCORES)
        assert together.sequences[row].tolist() == alone.sequences[0].tolist()


def test_defaults_come_from_the_pair(model):
    acd = ACDLogitsProcessor(model, build_pair(alpha=0.37, beta=0.02))
    assert (acd.alpha, acd.beta) == (0.37, 0.02)


def test_from_pretrained(model, tmp_path):
    pair = build_pair(alpha=0.37)
    pair.save_pretrained(tmp_path / "pair")
    acd = ACDLogitsProcessor.from_pretrained(tmp_path / "pair", model, beta=0.5, keep_temperature=False)
    assert (acd.alpha, acd.beta, acd.keep_temperature) == (0.37, 0.5, False)
    assert torch.equal(acd.pair.adversarial.cpu(), pair.adversarial.cpu())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": math.nan}, "alpha must be finite and at least 0"),
        ({"alpha": math.inf}, "alpha must be finite and at least 0"),
        ({"alpha": -0.1}, "alpha must be finite and at least 0"),
        ({"alpha": torch.tensor([0.5, math.nan])}, "alpha must be finite and at least 0"),
        ({"alpha": torch.zeros(2, 2)}, r"alpha must be a number or a \[batch\] tensor"),
        ({"alpha": "0.5"}, r"alpha must be a number or a \[batch\] tensor, got '0.5'"),
        ({"alpha": {}}, r"alpha must be a number or a \[batch\] tensor"),
        ({"beta": "0.1"}, "beta must lie between 0 and 1, got '0.1'"),
        ({"beta": {}}, "beta must lie between 0 and 1"),
        ({"share_instruction_kv": "false"}, "share_instruction_kv must be True or False, got 'false'"),
        ({"frozen_model": 1}, "frozen_model must be True or False, got 1"),
        ({"keep_temperature": None}, "keep_temperature must be True or False, got None"),
        ({"beta": -0.1}, "beta must lie between 0 and 1"),
        ({"beta": 1.1}, "beta must lie between 0 and 1"),
        ({"beta": math.nan}, "beta must lie between 0 and 1"),
        ({"horizon": 0}, "horizon must be a number of tokens"),
        ({"horizon": 2.5}, "horizon must be a number of tokens"),
        ({"horizon": "3"}, "horizon must be a number of tokens"),
    ],
)
def test_options_out_of_range(model, pair, options, message):
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=message) as error:
        ACDLogitsProcessor(model, pair, **options)
    assert "\n" not in str(error.value)
    assert set(model.__dict__) == before


def test_a_pair_of_another_kind(model, pair):
    with pytest.raises(ValueError, match="pair must be a PromptPair, got tuple"):
        ACDLogitsProcessor(model, (pair.safeguarding, pair.adversarial))


def test_alpha_of_the_wrong_length(model, pair):
    with pytest.raises(ValueError, match="alpha has 2 entries for a batch of 3 prompts"):
        generate(model, pair, build_batch(), alpha=torch.tensor([0.1, 0.2]))


def test_encoder_decoder_is_refused(pair):
    config = T5Config(vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        ACDLogitsProcessor(T5ForConditionalGeneration(config), pair)


def test_a_model_without_generate_is_refused(model, pair):
    with pytest.raises(ValueError, match="needs a transformers model with generate"):
        ACDLogitsProcessor(model.model, pair)


def test_a_model_without_a_transformers_cache_is_refused(pair):
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, RwkvConfig, RwkvForCausalLM

    for model in (
        RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2)),
        OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=4)),
    ):
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} does not keep its state in a transformers Cache"
        ):
            ACDLogitsProcessor(model, pair)


class TestFailsClosed:
    """Where the contrast cannot be applied, generation raises rather than going on plain."""

    @pytest.fixture
    def acd(self, model, pair):
        return ACDLogitsProcessor(model, pair)

    def test_another_model(self, acd, pair):
        other = build_model(seed=4)
        with pytest.raises(RuntimeError, match="outside generate"):
            other.generate(**build_batch(), logits_processor=[acd])
        ACDLogitsProcessor(other, pair)
        with pytest.raises(ValueError, match="built for another model"):
            other.generate(**build_batch(), logits_processor=[acd])

    def test_called_by_hand(self, acd):
        with pytest.raises(RuntimeError, match="outside generate"):
            acd(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, VOCAB))

    def test_two_processors(self, model, acd, pair):
        with pytest.raises(ValueError, match="one ACDLogitsProcessor at a time"):
            model.generate(**build_batch(), logits_processor=[acd, ACDLogitsProcessor(model, pair)])

    def test_paged_cache(self, model, acd):
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate(**build_batch(), logits_processor=[acd], cache_implementation="paged")

    def test_generate_batch(self, model, acd):
        with pytest.raises(ValueError, match="continuous batching"):
            model.generate_batch([[3, 4, 5]], logits_processor=LogitsProcessorList([acd]))

    def test_token_healing(self, model, acd, tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        with pytest.raises(ValueError, match="token_healing"):
            model.generate(
                **build_batch((9,)), logits_processor=[acd], token_healing=True, tokenizer=tokenizer, max_new_tokens=2
            )

    def test_detached(self, model, acd, pair):
        keep = ACDLogitsProcessor(model, pair)
        acd.detach()
        with pytest.raises(ValueError, match="was detached"):
            model.generate(**build_batch(), logits_processor=[acd])
        keep.detach()
        with pytest.raises(RuntimeError, match="outside generate"):
            model.generate(**build_batch(), logits_processor=[keep])

    def test_pickling_the_processor(self, acd):
        with pytest.raises(TypeError, match="cannot be pickled: save its pair"):
            pickle.dumps(acd)

    def test_a_model_with_a_generate_of_its_own(self, model, pair):
        model.generate = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match="carries a generate of its own"):
            ACDLogitsProcessor(model, pair)

    def test_a_stock_method_on_the_model_is_no_hindrance(self, model, pair):
        """As the generate() of a peft prompt leaves it."""
        model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
        acd = ACDLogitsProcessor(model, pair)
        model.generate(**build_batch(), logits_processor=[acd], max_new_tokens=2)


class TestAttachment:
    def test_detach_restores_the_model(self, model, pair):
        hooks = (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
        before = {key: copy.copy(value) if key in hooks else value for key, value in model.__dict__.items()}
        first, second = ACDLogitsProcessor(model, pair), ACDLogitsProcessor(model, pair, alpha=1.0)
        model.generate(**build_batch(), logits_processor=[first], max_new_tokens=3)
        first.detach()
        first.detach()  # a second time is harmless
        model.generate(**build_batch(), logits_processor=[second], max_new_tokens=3)
        second.detach()
        assert model.__dict__.keys() == before.keys()
        assert all(model.__dict__[key] == before[key] for key in hooks)
        assert model.generate.__func__ is type(model).generate

    def test_processors_that_are_gone_do_not_hold_the_model(self, model, pair):
        before = set(model.__dict__)
        kept = [ACDLogitsProcessor(model, pair) for _ in range(3)][-1]
        twin = copy.deepcopy(model)
        kept.detach()
        assert set(model.__dict__) == before
        ACDLogitsProcessor(twin, pair).detach()
        assert set(twin.__dict__) == before

    def test_plain_continuous_batching_still_finds_its_processors(self, model, pair):
        ACDLogitsProcessor(model, pair)
        assert len(model._get_logits_processor(model.generation_config)) == 0

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_works_plain_and_with_a_processor_of_its_own(self, model, pair, how):
        batch = build_batch()
        plain = model.generate(**batch, **SCORES)
        acd = ACDLogitsProcessor(model, pair, beta=0.0)
        expected = model.generate(**batch, logits_processor=[acd], **SCORES)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert_same(twin.generate(**batch, **SCORES), plain)
        with pytest.raises((ValueError, RuntimeError), match=r"another model|outside generate"):
            twin.generate(**batch, logits_processor=[acd], **SCORES)
        own = ACDLogitsProcessor(twin, pair, beta=0.0)
        assert_same(twin.generate(**batch, logits_processor=[own], **SCORES), expected)
        with torch.no_grad():  # the copy is independent of the original
            twin.lm_head.weight.mul_(-1)
        assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)

    def test_save_pretrained_of_an_attached_model(self, model, pair, tmp_path):
        ACDLogitsProcessor(model, pair)
        model.save_pretrained(tmp_path)
        twin = type(model).from_pretrained(tmp_path).to(DEVICE)
        assert "generate" not in twin.__dict__
        twin.generation_config.eos_token_id = None
        assert_same(twin.generate(**build_batch(), **SCORES), model.generate(**build_batch(), **SCORES))

    def test_signature_of_generate_is_kept(self, model, pair):
        import inspect

        before = inspect.signature(model.generate)
        ACDLogitsProcessor(model, pair)
        assert inspect.signature(model.generate) == before

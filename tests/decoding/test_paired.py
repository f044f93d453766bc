"""The paired forward against the slow reference, architecture by architecture and layout by layout."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from acd_logits import ACDLogitsProcessor
from conftest import ARCHITECTURES, DEVICE, assert_same, build_batch, build_model, build_pair
from reference import ReferenceProcessor

SCORES = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("lengths", [(11,), (11, 7, 10)], ids=["one", "padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_the_reference(name, lengths):
    model, pair, batch = build_model(name), build_pair(), build_batch(lengths)
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, 0.5, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], **SCORES)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0)
    assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)
    # Without soft prompts, the contrast would be the plain logits
    unprompted = plain.generate(**batch, **SCORES).scores[0]
    assert (expected.scores[0] - unprompted).abs().max() > 0.01, "the soft prompts do nothing here"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_long_prompt_equals_the_reference(name):
    """Soft prompts of one length in front of a long prompt need no mask and run with it."""
    model, pair, batch = build_model(name), build_pair(2, 2), build_batch((114, 114))
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, 0.5)
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0)
    got = model.generate(**batch, logits_processor=[acd], **SCORES)
    assert_same(got, plain.generate(**batch, logits_processor=[reference], **SCORES))


@pytest.mark.parametrize(
    ("lengths", "n_a", "attention", "masked"),
    [
        ((114, 114), 2, "sdpa", False),
        ((113, 113), 2, "sdpa", True),  # short: stored keys and values save more
        ((114, 99), 2, "sdpa", True),  # padding and unequal soft prompts need a mask in any case
        ((114, 114), 1, "sdpa", True),
        ((114, 114), 2, "eager", True),  # which always takes one
    ],
)
def test_stored_prompts_are_left_where_they_cost_a_mask(lengths, n_a, attention, masked, monkeypatch):
    model, pair, batch = build_model(), build_pair(2, n_a), build_batch(lengths)
    model.set_attn_implementation(attention)
    acd, widths, masks = ACDLogitsProcessor(model, pair, frozen_model=True), [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model.model.register_forward_hook(lambda _, __, out: widths.append(out.last_hidden_state.shape[1]))
    model.generate(**build_batch((5,)), logits_processor=[acd], max_new_tokens=1)  # stores them
    widths.clear(), masks.clear()
    model.generate(**batch, logits_processor=[acd], max_new_tokens=1)
    assert widths == [max(lengths) if masked else 2 + max(lengths)]
    assert [mask is not None for mask in masks] == [masked] * (3 if attention == "sdpa" else 0)  # of three layers


@pytest.mark.parametrize(
    ("lengths", "pair"),
    [((11, 7, 10), build_pair(4, 9)), ((40, 40), build_pair(4, 4))],
    ids=["masked", "unmasked"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_both_layouts_agree(name, lengths, pair):
    model, batch = build_model(name), build_batch(lengths)
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    assert acd.streams.reusable
    reused = model.generate(**batch, logits_processor=[acd], **SCORES)
    acd.streams.reusable = False
    assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), reused)


@pytest.mark.parametrize("length", [9, 114])
def test_the_last_logits_by_a_negative_index(model, length):
    acd, batch = ACDLogitsProcessor(model, build_pair(2, 2)), build_batch((length,))
    expected = model.generate(**batch, logits_processor=[acd], **SCORES)
    last = torch.tensor([-1], device=DEVICE)
    assert_same(model.generate(**batch, logits_processor=[acd], logits_to_keep=last, **SCORES), expected)


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma3", "bloom", "mamba2", "bamba", "gpt_neo", "falcon_alibi"])
def test_reuse_is_kept_to_plain_attention(name):
    assert not ACDLogitsProcessor(build_model(name), build_pair()).streams.reusable


@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "bloom"])
def test_prefill_in_chunks_shorter_than_the_padding(name, chunk):
    model, pair, batch = build_model(name), build_pair(), build_batch((11, 2, 5))
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    expected = model.generate(**batch, logits_processor=[acd], **SCORES)
    got = model.generate(**batch, logits_processor=[acd], prefill_chunk_size=chunk, **SCORES)
    assert_same(got, expected)


@pytest.mark.parametrize(("n_s", "n_a"), [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
def test_null_prompts(name, n_s, n_a):
    model, pair, batch = build_model(name), build_pair(n_s, n_a), build_batch()
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, 0.5, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], **SCORES)
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)


@pytest.mark.parametrize(
    ("frozen", "n_a", "lengths", "forwards"),
    [
        (True, 4, (9, 9), 2 + 3 * 2),  # SP and AP once, then prefill and one step per call
        (False, 4, (9, 9), 3 * (2 + 2)),
        (False, 7, (9, 9), 3 * (1 + 2)),  # prompts of one length take one forward
        (False, 4, (9,), 3 * 2),  # and one row takes them with its own prefill
    ],
)
def test_how_often_the_soft_prompts_run(model, frozen, n_a, lengths, forwards):
    acd = ACDLogitsProcessor(model, build_pair(7, n_a), frozen_model=frozen)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model.generate(**build_batch(lengths), logits_processor=[acd], max_new_tokens=2, do_sample=False)
    assert len(calls) == forwards


@pytest.mark.parametrize("new_tokens", [2, 30, 150])
@pytest.mark.parametrize(("share", "slots"), [(False, 7 + 9), (True, 8 + 7 + 4 + 2)])
def test_no_room_is_kept_that_the_call_cannot_fill(model, pair, share, slots, new_tokens):
    acd = ACDLogitsProcessor(model, pair, share_instruction_kv=share)
    out = model.generate(**build_batch((9,)), logits_processor=[acd], **SCORES | {"max_new_tokens": new_tokens})
    check_room(out.past_key_values, slots + (new_tokens - 1) * (2 if share else 1))  # the last token is never run
    turn = torch.cat([out.sequences, torch.tensor([[7, 8, 9]], device=DEVICE)], dim=1)
    used = slots + (new_tokens - 1 + 1 + 3 + 4) * (2 if share else 1)
    again = {"past_key_values": out.past_key_values, "max_new_tokens": 5}
    check_room(model.generate(turn, logits_processor=[acd], **SCORES | again).past_key_values, used)


def test_no_room_is_kept_behind_embeddings(model, pair):
    embeds = model.get_input_embeddings()(build_batch((9,))["input_ids"]).detach()
    acd = ACDLogitsProcessor(model, pair)
    check_room(model.generate(inputs_embeds=embeds, logits_processor=[acd], **SCORES).past_key_values, 7 + 9 + 11)


def check_room(cache, slots):
    for layer in cache.layers:
        assert layer.keys.shape[-2] == slots
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


@pytest.mark.parametrize(("spare", "moves"), [(None, 0), (0, 9)], ids=["small", "large"])
@pytest.mark.parametrize("share", [False, True])
def test_the_cache_is_copied_once_in_many_tokens(model, pair, share, spare, moves, monkeypatch):
    """Never where room for the whole call is small, and else once for each quarter that it grows by."""
    if spare is not None:
        monkeypatch.setattr("acd_logits.decoding.layers.SPARE", spare)
    acd, places = ACDLogitsProcessor(model, pair, share_instruction_kv=share), []

    def note(module, args, kwargs, output):
        places.append(kwargs["past_key_values"].layers[0].keys.data_ptr())

    model.model.register_forward_hook(note, with_kwargs=True)
    model.generate(**build_batch((9,)), logits_processor=[acd], max_new_tokens=150, do_sample=False)
    found = sum(before != after for before, after in itertools.pairwise(places[-149:]))
    # From 20 slots to 165; shared, a token takes two, from 27 slots to 318
    assert found == (moves and moves + int(share) * 2)


def scale_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def replace_storage(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def steer(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.1)


@pytest.mark.parametrize("change", [scale_in_place, replace_storage, steer, lambda m: m.double()])
def test_a_changed_model_is_followed(model, pair, change):
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    batch = build_batch()
    model.generate(**batch, logits_processor=[acd], **SCORES)
    change(model)
    plain = copy.deepcopy(model)
    reference = ReferenceProcessor(plain, pair, 0.5, mask=batch["attention_mask"])
    expected = plain.generate(**batch, logits_processor=[reference], **SCORES)
    assert_same(model.generate(**batch, logits_processor=[acd], **SCORES), expected)


@pytest.mark.parametrize("share", [False, True])
def test_router_logits_are_left_to_training(share):
    model = build_model("mixtral")
    acd = ACDLogitsProcessor(model, build_pair(4, 4), beta=0.0, share_instruction_kv=share)
    expected = model.generate(**build_batch(), logits_processor=[acd], **SCORES)
    model.config.output_router_logits = True
    assert_same(model.generate(**build_batch(), logits_processor=[acd], **SCORES), expected)


def test_a_copied_cache_goes_on_by_itself(model, pair):
    acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
    first = model.generate(**batch, logits_processor=[acd], **SCORES)
    whole = torch.cat([first.sequences, torch.tensor([[5, 6]], device=DEVICE)], dim=1)
    turn = {"inputs": whole, "logits_processor": [acd]}
    again = copy.deepcopy(first.past_key_values)
    expected = model.generate(**turn, past_key_values=first.past_key_values, **SCORES)
    assert_same(model.generate(**turn, past_key_values=again, **SCORES), expected)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_hidden_states_and_attentions_have_the_plain_shapes(name, pair):
    model, batch = build_model(name), build_batch()
    model.set_attn_implementation("eager")
    acd = ACDLogitsProcessor(model, pair)
    kwargs = SCORES | {"output_hidden_states": True, "output_attentions": True, "max_new_tokens": 3}
    plain = model.generate(**batch, **kwargs)
    ours = model.generate(**batch, logits_processor=[acd], **kwargs)
    for key in ("hidden_states", "attentions"):
        shapes = [[list(layer.shape) for layer in step] for step in getattr(ours, key)]
        assert shapes == [[list(layer.shape) for layer in step] for step in getattr(plain, key)]


@pytest.mark.parametrize("length", [9, 180])
@pytest.mark.parametrize("n_a", [7, 4])
def test_position_ids_of_the_user_are_kept(model, n_a, length):
    """The gap between soft prompt and prompt is no border between texts."""
    plain, batch, pair = copy.deepcopy(model), build_batch((length,)), build_pair(4, n_a)
    positions = torch.arange(length, device=DEVICE)[None] + 5
    acd = ACDLogitsProcessor(model, pair, beta=0.0)
    moved = model.generate(**batch, position_ids=positions, logits_processor=[acd], **SCORES)
    acd.streams.reusable = False
    assert_same(model.generate(**batch, position_ids=positions, logits_processor=[acd], **SCORES), moved)
    without_cache = {"position_ids": positions, "use_cache": False, "max_new_tokens": 1}
    first = model.generate(**batch, logits_processor=[acd], **SCORES | without_cache)
    torch.testing.assert_close(first.scores[0], moved.scores[0], atol=1e-4, rtol=0)
    reference = ReferenceProcessor(plain, pair, 0.5)
    usual = plain.generate(**batch, logits_processor=[reference], **SCORES)
    assert not torch.allclose(usual.scores[0], moved.scores[0], atol=1e-4)


def test_attentions_of_a_window_keep_the_real_keys(pair):
    """At every step and layer, the keys shown are as many as without ACD, also where the window is full."""
    model = build_model("gemma3")
    model.set_attn_implementation("eager")
    acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
    kwargs = SCORES | {"output_attentions": True}
    ours = model.generate(**batch, logits_processor=[acd], **kwargs)
    plain = model.generate(**batch, **kwargs)
    shapes = [[[list(layer.shape) for layer in step] for step in out.attentions] for out in (ours, plain)]
    assert shapes[0] == shapes[1]
    for layer in ours.attentions[-1]:  # what is left to the real keys there, none of them cut
        assert bool((layer[..., -1, -1] > 0).all())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_loop_that_leaves_positions_to_the_model(name, share, pair):
    def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
        mask = kwargs.get("attention_mask")
        logits = model(input_ids, attention_mask=mask, past_key_values=past_key_values).logits
        return logits_processor(input_ids, logits[:, -1].float())

    if share and name != "llama":
        pytest.skip("not for this architecture")
    model, batch = build_model(name), build_batch((9, 4))
    acd = ACDLogitsProcessor(model, pair, alpha=0.5, beta=0.0, share_instruction_kv=share)
    options = {"logits_processor": [acd], "custom_generate": loop, "max_new_tokens": 1}
    both = model.generate(**batch, **options)
    alone = model.generate(batch["input_ids"][1:, 5:], **options)
    torch.testing.assert_close(both[1], alone[0], atol=1e-4, rtol=0)


class TestRows:
    """A decoding loop of one's own may select, repeat and copy rows between a forward and its contrast."""

    def run(self, loop, lengths=(9, 9, 9), name="llama", **options):
        model = build_model(name)
        acd = ACDLogitsProcessor(model, build_pair(5, 5), beta=0.0)
        options = {"max_new_tokens": 2, "do_sample": False} | options
        return model.generate(**build_batch(lengths), logits_processor=[acd], custom_generate=loop, **options)

    @pytest.mark.parametrize("rows", [[2, 0], [1]])
    def test_selected_rows_take_their_own_adversarial_logits(self, rows):
        def loop(model, input_ids, logits_processor, past_key_values, select, **kwargs):
            logits = model(input_ids, past_key_values=past_key_values).logits[:, -1]
            if select:
                past_key_values.batch_select_indices(torch.tensor(rows, device=logits.device))
                return logits_processor(input_ids[rows], logits[rows])
            return logits_processor(input_ids, logits)[rows]

        torch.testing.assert_close(self.run(loop, select=True), self.run(loop, select=False))

    def test_repeated_rows(self):
        def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
            logits = model(input_ids, past_key_values=past_key_values).logits[:, -1]
            past_key_values.batch_repeat_interleave(2)
            return logits_processor(input_ids.repeat_interleave(2, 0), logits.repeat_interleave(2, 0))

        twice = self.run(loop)
        torch.testing.assert_close(twice[::2], twice[1::2])
        assert len(twice) == 6

    def test_rows_that_the_cache_does_not_have(self):
        """One row of adversarial logits would fit any number of candidates."""

        def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
            logits = model(input_ids, past_key_values=past_key_values).logits[:, -1]
            return logits_processor(input_ids.expand(3, -1), logits.expand(3, -1))

        with pytest.raises(RuntimeError, match=r"a contrast of 3 rows, and ACD has 1 rows"):
            self.run(loop, (9,))

    def test_branches_of_one_cache(self):
        """The processor belongs to the cache it was given: a copy's logits would meet another branch's."""

        def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
            logits = model(input_ids, past_key_values=past_key_values).logits[:, -1]
            logits_processor(input_ids, logits)
            for token in (5, 6):
                branch, step = copy.deepcopy(past_key_values), torch.full((3, 1), token, device=logits.device)
                logits = model(step, past_key_values=branch).logits[:, -1]
                logits_processor(torch.cat([input_ids, step], dim=1), logits)

        with pytest.raises(RuntimeError, match="no adversarial logits for this position"):
            self.run(loop)

    def test_a_position_is_contrasted_once(self):
        def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
            logits = model(input_ids, past_key_values=past_key_values).logits[:, -1]
            logits_processor(input_ids, logits)
            logits_processor(input_ids, logits)

        with pytest.raises(RuntimeError, match="no adversarial logits for this position"):
            self.run(loop)

    def test_a_crop_into_another_rows_padding(self):
        def loop(model, input_ids, logits_processor, past_key_values, **kwargs):
            mask = kwargs["attention_mask"]
            logits = model(input_ids, attention_mask=mask, past_key_values=past_key_values).logits[:, -1]
            logits_processor(input_ids, logits)
            past_key_values.crop(-6)

        with pytest.raises(ValueError, match="5 padding tokens cannot be cropped to 3 tokens"):
            self.run(loop, (9, 4), name="bloom")


class TestRefusals:
    @pytest.mark.parametrize("share", [False, True])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_going_on_from_a_call_without_cache(self, model, pair, use_cache, share):
        acd, batch = ACDLogitsProcessor(model, pair, share_instruction_kv=share), build_batch((9,))
        out = model.generate(**batch, logits_processor=[acd], use_cache=False, **SCORES)
        with pytest.raises(ValueError, match=r"comes from a call with use_cache=False and holds nothing"):
            model.generate(
                out.sequences, past_key_values=out.past_key_values, logits_processor=[acd], use_cache=use_cache
            )

    def test_foreign_cache_with_tokens(self, model, pair):
        acd, batch, cache = ACDLogitsProcessor(model, pair), build_batch((9,)), DynamicCache(config=model.config)
        model(batch["input_ids"][:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values was filled without ACD"):
            model.generate(**batch, past_key_values=cache, logits_processor=[acd])

    def test_cache_of_another_pair(self, model, pair):
        acd, other = ACDLogitsProcessor(model, pair), ACDLogitsProcessor(model, build_pair(seed=9))
        batch = build_batch((9,))
        out = model.generate(**batch, logits_processor=[acd], **SCORES)
        with pytest.raises(ValueError, match="another model or prompt pair"):
            model.generate(out.sequences, past_key_values=out.past_key_values, logits_processor=[other])

    @pytest.mark.parametrize("user_made", [False, True])
    def test_paired_cache_without_the_processor(self, model, pair, user_made):
        acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
        given = {"past_key_values": DynamicCache(config=model.config)} if user_made else {}
        out = model.generate(**batch, **given, logits_processor=[acd], **SCORES)
        cache = given.get("past_key_values", out.past_key_values)
        with pytest.raises(ValueError, match=r"pass logits_processor=\[acd\]"):
            model.generate(out.sequences, past_key_values=cache)

    def test_paired_cache_of_a_call_without_cache(self, model, pair):
        acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
        out = model.generate(**batch, logits_processor=[acd], use_cache=False, **SCORES)
        with pytest.raises(ValueError, match=r"pass logits_processor=\[acd\]"):
            model.generate(out.sequences, past_key_values=out.past_key_values)

    def test_forward_that_slips_past_the_hooks(self, model, pair):
        acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
        out = model.generate(**batch, logits_processor=[acd], **SCORES)
        with pytest.raises(RuntimeError, match="without its hooks"):
            model.model(batch["input_ids"], past_key_values=out.past_key_values)

    def test_decoding_loop_that_drops_the_cache(self, model, pair):
        def careless(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return logits_processor(input_ids, model(input_ids).logits[:, -1])

        acd = ACDLogitsProcessor(model, pair)
        with pytest.raises(RuntimeError, match="no adversarial logits"):
            model.generate(**build_batch((9,)), logits_processor=[acd], custom_generate=careless)

    def test_unknown_tensor_input(self, model, pair):
        acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))

        def with_extra(model, input_ids, past_key_values, **kwargs):
            return model(input_ids, past_key_values=past_key_values, token_type_ids=torch.zeros_like(input_ids))

        with pytest.raises(ValueError, match="token_type_ids"):
            model.generate(**batch, logits_processor=[acd], custom_generate=with_extra)

    def test_static_cache_of_the_user(self, model, pair):
        from transformers import StaticCache

        acd = ACDLogitsProcessor(model, pair)
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            cache = StaticCache(config=model.config, max_cache_len=32)
            model.generate(**build_batch((9,)), past_key_values=cache, logits_processor=[acd])

    def test_cache_cropped_to_nothing(self, model, pair):
        """The soft prompts would stay, and the next call would put them there once more."""
        acd, batch = ACDLogitsProcessor(model, pair), build_batch((9,))
        cache = model.generate(**batch, logits_processor=[acd], **SCORES).past_key_values
        cache.crop(-cache.get_seq_length())
        with pytest.raises(ValueError, match="changed outside ACD"):
            model.generate(**batch, past_key_values=cache, logits_processor=[acd])

    @pytest.mark.parametrize("name", ["llama", "bloom", "mistral_sliding"])
    @pytest.mark.parametrize("change", ["crop", "reset", "reorder_cache"])
    def test_cache_changed_outside(self, name, change, pair):
        model, batch = build_model(name), build_batch((9,))
        acd, cache = ACDLogitsProcessor(model, pair), DynamicCache(config=model.config)
        out = model.generate(**batch, past_key_values=cache, logits_processor=[acd], **SCORES)
        if change == "crop" and name == "mistral_sliding":
            pytest.skip("transformers refuses to crop a full window")
        changes = {"crop": [-3], "reset": [], "reorder_cache": [torch.tensor([0])]}
        getattr(cache, change)(*changes[change])
        if change == "reset" and cache.get_seq_length():
            pytest.skip("reset of older transformers keeps the tokens, as zeros")
        with pytest.raises(ValueError, match="changed outside ACD"):
            model.generate(out.sequences, past_key_values=cache, logits_processor=[acd])

    def test_cache_left_half_written_by_an_error(self, model, pair):
        batch = build_batch((9,))
        acd = ACDLogitsProcessor(model, pair)
        out = model.generate(**batch, logits_processor=[acd], **SCORES)
        cache = {"past_key_values": out.past_key_values}
        hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(out.sequences, **cache, logits_processor=[acd])
        hook.remove()
        with pytest.raises(ValueError, match="half-written by an error"):
            model.generate(out.sequences, **cache, logits_processor=[acd])

    def test_cache_past_the_horizon(self, model, pair):
        acd = ACDLogitsProcessor(model, pair, horizon=2)
        out = model.generate(**build_batch((9,)), logits_processor=[acd], **SCORES)
        with pytest.raises(ValueError, match="horizon"):
            model.generate(out.sequences, past_key_values=out.past_key_values, logits_processor=[acd])

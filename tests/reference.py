"""The slow reference: ACD by two full forwards on embeddings at every step, without cache, padding or pairing.

Everything fast in this project is tested against these few lines. They run inside an untouched model's own
`generate()` as a plain logits processor, so that every decoding mode has a reference.
"""

import math

import torch
from transformers import DynamicCache, LogitsProcessor


class ReferenceProcessor(LogitsProcessor):
    """Replaces generate's scores by eq. 5 over 1 - alpha (by eq. 5 alone where alpha is 1 or more), row by row.

    `first` are processors to run on the safeguarding stream before the contrast. `mask` is the prompts' attention
    mask, one row per row of the decoding loop. `prompt` are embeddings `[rows, n, hidden]` that stand in front of
    `input_ids` (generate's `inputs_embeds`).
    """

    def __init__(self, model, pair, alpha, beta=0.0, horizon=None, beams=False, first=(), mask=None, prompt=None):
        self.model, self.pair, self.alpha, self.beta, self.horizon = model, pair, alpha, beta, horizon
        self.beams, self.first, self.mask, self.prompt = beams, first, mask, prompt
        self.start = None

    def stream(self, soft, row, ids):
        """Logits of the token after [soft; ids], as eq. 2 writes it."""
        if self.mask is not None:
            ids = ids[(torch.nn.functional.pad(self.mask[row], (0, len(ids) - self.mask.shape[1]), value=1)) == 1]
        x = self.model.get_input_embeddings()(ids)
        if self.prompt is not None:
            x = torch.cat([self.prompt[row], x])
        with torch.no_grad():
            return self.model(inputs_embeds=torch.cat([soft, x])[None], use_cache=False).logits[:, -1].float()

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        rows = []
        for row, ids in enumerate(input_ids):
            safe = self.stream(self.pair.safeguarding, row, ids)
            for processor in self.first:
                safe = processor(ids[None], safe)
            safe = safe.log_softmax(-1) if self.beams else safe
            if self.horizon is None or input_ids.shape[1] - self.start < self.horizon:
                alpha = float(self.alpha[row] if isinstance(self.alpha, torch.Tensor) else self.alpha)
                plausible = safe >= safe.max() + math.log(self.beta) if self.beta and alpha else safe > -math.inf
                safe = (safe - alpha * self.stream(self.pair.adversarial, row, ids)) / (1 - alpha if alpha < 1 else 1)
                safe = safe.masked_fill(~plausible, -math.inf)
                safe = safe.log_softmax(-1) if self.beams else safe
            rows.append(safe)
        return torch.cat(rows)


def shared_logits(model, soft, ids, prompt_length):
    """Logits `[len(ids), vocab]` behind every token of [soft; ids], the prompt's last one and later seeing soft."""
    if soft.ndim == 5:
        return key_value_logits(model, soft, ids, prompt_length)
    n, length = len(soft), len(soft) + len(ids)
    sees = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    sees[n : n + prompt_length - 1, :n] = False
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=ids.device)
    mask = mask.masked_fill(~sees, torch.finfo(model.dtype).min)[None, None]
    embeds = torch.cat([soft, model.get_input_embeddings()(ids)])[None]
    positions = torch.arange(-n, len(ids), device=ids.device)[None]
    return model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, n:]


def key_value_logits(model, soft, ids, prompt_length, start=0):
    """The same for keys and values `[n, layers, 2, heads, head_dim]`; ids have the positions from `start` on."""
    n, length = len(soft), len(ids)
    sees = torch.ones(length, n + length, dtype=torch.bool, device=ids.device).tril(n)
    sees[: prompt_length - 1, :n] = False
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=ids.device)
    mask = mask.masked_fill(~sees, torch.finfo(model.dtype).min)[None, None]
    cache = DynamicCache()
    for index in range(soft.shape[1]):
        keys, values = soft[:, index].to(model.dtype).permute(1, 2, 0, 3)
        cache.update(keys[None], values[None], index)
    positions = torch.arange(start, start + length, device=ids.device)[None]
    return model(input_ids=ids[None], past_key_values=cache, attention_mask=mask, position_ids=positions).logits[0]


class SharedReference(ReferenceProcessor):
    """The same with the soft prompts hidden from the prompt, but for its last token; generate starts from ids."""

    def stream(self, soft, row, ids):
        prompt_length = self.start
        if self.mask is not None:
            real = torch.nn.functional.pad(self.mask[row], (0, len(ids) - self.mask.shape[1]), value=1) == 1
            prompt_length, ids = prompt_length - int((~real).sum()), ids[real]
        with torch.no_grad():
            return shared_logits(self.model, soft, ids, prompt_length)[-1:]

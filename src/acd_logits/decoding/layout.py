"""Where soft prompts and x stand in a row of the cache, and the masks that follow.

With W = max(n_s, n_a), the prompts occupy W slots, and x sits behind them:

    merged:   [pad | soft | x]       the row's left padding moves in front of the soft prompt
    reused:   [pad | soft | pad | x]  the W prompt slots are written from keys and values that one forward of the soft
                                     prompts gives for all rows; x's padding stays put

Merged is exact for every architecture that handles left padding: nothing stands between the soft prompt and x, so
sliding windows, ALiBi distances and recurrent states come out as if the row were alone. Reused computes each soft
prompt once instead of once a row, and is exact where a masked slot in between changes nothing: full attention over
standard masks, with positions given by `position_ids`. `reuses_prefix` decides. One row is merged all the same, which
costs no forward more, and so is a long x that needs no mask under sdpa, which saves more without a mask than
`key_values` does (`PairedCache._merges`).

In both layouts the visible token j has slot W + j, and a row's soft prompt ends where its first real token begins
(merged) or at slot W (reused).

Masks come in two kinds. Those of zeros and ones become what each layer needs in transformers, which asks the device
for what is in them. A decode step over our own layers has an additive mask: 0 where a token may look, and the lowest
number of the dtype where it may not. It is made once per call, with room for all tokens, and each step takes a view.
"""

from __future__ import annotations

import torch

TAKE_ADDITIVE = ("sdpa", "eager")  # attention that takes additive masks, `[rows, 1, queries, slots]`


def aligned(slots: int) -> int:
    """Room for so many slots, in which rows begin where the kernels of a GPU want them to."""
    return -(-slots // 16) * 16


def hide(mask: torch.Tensor, where: torch.Tensor) -> None:
    """Hide slots of a mask in place."""
    mask.masked_fill_(where, torch.finfo(mask.dtype).min)


def paired_mask(visible: torch.Tensor, lengths: tuple[int, ...], width: int, end: torch.Tensor | int) -> torch.Tensor:
    """Zeros and ones `[streams * B, W + tokens]` from those of x, `[B, tokens]`; soft prompts end at slot `end`."""
    x = torch.nn.functional.pad(visible.bool(), (width, 0))
    slots = torch.arange(x.shape[1], device=x.device)
    return torch.cat([x | ((slots >= end - length) & (slots < end)) for length in lengths]).long()


def place_prompts(
    embeds: torch.Tensor,
    positions: torch.Tensor,
    prompts: tuple[torch.Tensor, ...],
    first: int,
    end: torch.Tensor | int,
    reach: int,
) -> None:
    """Put each stream's soft prompt into its rows, in place.

    Args:
        embeds: `[streams * B, slots, hidden_size]`.
        positions: `[streams * B, slots]`; 0 in front of soft prompts.
        prompts: one of each stream, `[n, hidden_size]`.
        first: slot of the first column.
        end: slot behind each row's soft prompt, `[B, 1]`, or one for all.
        reach: columns that may hold a soft prompt.
    """
    slots = torch.arange(first, first + reach, device=positions.device)[None]
    rows = len(embeds) // len(prompts)
    for stream, prompt in enumerate(prompts):
        # Slices, and not chunks, which autograd does not let anybody write into
        x, places = (tensor[stream * rows : (stream + 1) * rows, :reach] for tensor in (embeds, positions))
        index = slots - end + len(prompt)  # into the soft prompt, [B or 1, reach]
        inside = (index >= 0) & (index < len(prompt))
        places.masked_fill_(slots < end, 0)
        places.copy_(torch.where(inside, index, places))
        if len(prompt):  # gathered without boolean indices, for which the host would wait
            x.copy_(torch.where(inside[..., None], prompt.to(x)[index.clamp(0, len(prompt) - 1)], x))


def paired_pattern(
    lengths: tuple[int, ...], width: int, slots: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What each stream sees of W prompt slots, whose last ones its soft prompt fills, and of x: `[streams, slots]`."""
    pattern = torch.zeros(len(lengths), aligned(slots), dtype=dtype, device=device)
    for stream, length in enumerate(lengths):
        pattern[stream, : width - length] = torch.finfo(dtype).min
    return pattern


def shared_pattern(
    lengths: tuple[int, ...], shared: int, slots: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What each stream sees of a shared x, both soft prompts and both streams' tokens in turns: `[streams, slots]`."""
    pattern = torch.full((len(lengths), aligned(slots)), torch.finfo(dtype).min, dtype=dtype, device=device)
    pattern[:, :shared] = 0
    first = shared + sum(lengths)
    for stream, length in enumerate(lengths):
        start = shared + sum(lengths[:stream])
        pattern[stream, start : start + length] = 0
        pattern[stream, first + stream :: len(lengths)] = 0
    return pattern


def under_x(mask: torch.Tensor, x: int, visible: torch.Tensor | None) -> torch.Tensor:
    """The same additive mask behind the rows of a causal x.

    Args:
        mask: what the queries behind x see, `[B, 1, queries, slots]`.
        x: tokens of x, which have the first slots.
        visible: `[B, tokens]`, 0 where x is padding, or `None`.

    Returns:
        `[B, 1, x + queries, slots]`.
    """
    rows, _, queries, slots = mask.shape
    whole = mask.new_full((rows, 1, x + queries, aligned(slots)), torch.finfo(mask.dtype).min)[..., :slots]
    whole[:, :, x:] = mask
    seen = torch.ones(x, x, dtype=torch.bool, device=mask.device).tril()
    if visible is not None:
        seen = seen & (visible[:, None, None, :x] != 0)
    whole[:, :, :x, :x].masked_fill_(seen, 0)
    return whole

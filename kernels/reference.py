"""The kernels' oracles: each operator in the plainest torch that is right, one token or row at a time.

Legend: T tokens, D hidden, F expert hidden, E experts, H heads, G kv heads, C head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.kernels.row_state import Finish, Flag, Number, Real, State


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, D], weight [D] -> [T, D]; Zhang and Sennrich 2019, the mean of squares in float32."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of half-split pairs (i, i + C/2). x [T, H, C], cos and sin [T, C/2] -> [T, H, C]."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = x[..., i], x[..., half + i]
        c, s = cos[:, i, None], sin[:, i, None]
        out[..., i], out[..., half + i] = a * c - b * s, b * c + a * s
    return out


def moe(x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """x [T, D], router float32 [E, D], w13 [E, 2F, D] (gate, then up), w2 [E, D, F] -> [T, D]."""
    out = torch.zeros_like(x)
    for t, row in enumerate(x):
        probabilities = (router @ row.float()).softmax(-1)  # [E]
        weights, experts = probabilities.topk(top_k)
        for weight, expert in zip(weights / weights.sum(), experts.tolist(), strict=True):
            gate, up = (w13[expert] @ row).chunk(2)  # [F] each
            out[t] += weight.to(x.dtype) * (w2[expert] @ (F.silu(gate) * up))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last Tq positions of one row. q [Tq, H, C], k and v [T, G, C] -> [Tq, H, C]."""
    heads, kv_heads = q.shape[1], k.shape[1]
    first = len(k) - len(q)
    out = torch.empty_like(q)
    for t in range(len(q)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            keys, values = k[: first + t + 1, group], v[: first + t + 1, group]  # [t, C]
            weights = (keys @ q[t, head] * q.shape[-1] ** -0.5).float().softmax(0)
            out[t, head] = weights.to(v.dtype) @ values
    return out


# ---- moe.py ----


def route(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Renormalised top-k of softmax; the lower expert of equals. x [T, D], router [E, D] -> float32, int32 [T, K]."""
    probabilities = (x.float() @ router.T).softmax(-1)  # [T, E]
    weights, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]
    return weights / weights.sum(-1, keepdim=True), experts.int()


def sort_pairs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """experts [T, K] -> order int32 [P]: each expert's pairs, in their own order; offsets int32 [E + 1]."""
    flat = experts.flatten().tolist()
    by_expert = [[pair for pair, chosen in enumerate(flat) if chosen == expert] for expert in range(num_experts)]
    offsets = [sum(map(len, by_expert[:expert])) for expert in range(num_experts + 1)]
    order = [pair for pairs in by_expert for pair in pairs]
    return experts.new_tensor(order, dtype=torch.int32), experts.new_tensor(offsets, dtype=torch.int32)


def experts_up(x: Tensor, w13: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """x [T, D], w13 [E, 2F, D] (gate, then up) -> float32 silu(gate) * up [P, F], in the order of `order`."""
    rows = []
    for expert, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for pair in order[begin:end].tolist():
            gate, up = (w13[expert].float() @ x[pair // top_k].float()).chunk(2)
            rows.append(F.silu(gate) * up)
    return torch.stack(rows)


def experts_down(h: Tensor, w2: Tensor, order: Tensor, offsets: Tensor, pair_weights: Tensor) -> Tensor:
    """h [P, F] in the order of `order`, w2 [E, D, F], pair_weights [P] -> float32 [P, D] in pair order."""
    out = torch.empty(len(h), w2.shape[1], device=h.device)
    for expert, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for place, pair in enumerate(order[begin:end].tolist(), start=begin):
            out[pair] = pair_weights[pair] * (w2[expert].float() @ h[place].float())
    return out


def combine(y: Tensor, top_k: int, residual: Tensor | None = None) -> Tensor:
    """The sum of each token's K rows, in order, then the residual, in float32. y [P, D], residual [T, D] -> [T, D]."""
    total = torch.zeros(len(y) // top_k, y.shape[1], device=y.device)
    for k in range(top_k):
        total += y[k::top_k].float()
    if residual is not None:
        total += residual.float()
    return total.to(y.dtype)


# ---- linear.py ----


def linear(x: Tensor, w: Tensor) -> Tensor:
    """x [T, K], w [N, K] -> x w^T [T, N], the sums in float64."""
    return torch.stack([w.double() @ row.double() for row in x]).to(x.dtype)


# ---- quantize.py ----


def quantize(part: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Elements that share a scale -> their codes as float32, and the scale, float32 []. A limit of 448 means e4m3."""
    scale = (part.float().abs().amax() / limit).clamp(min=2.0**-126)  # clamp and amax keep a NaN
    codes = (part.float() * (1 / scale)).nan_to_num(0.0).clamp(-limit, limit)
    codes = codes.to(torch.float8_e4m3fn).float() if limit == 448.0 else codes.round()
    return codes + 0.0, scale  # -0 + 0 = 0: no code is a negative zero


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, K] -> float8_e4m3fn or int8 [R, K], scales float32 [R]."""
    q, scales = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    for r, row in enumerate(x):
        q[r], scales[r] = quantize(row, 448.0 if dtype == torch.float8_e4m3fn else 127.0)
    return q, scales


def quantize_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> float8_e4m3fn [N, K], scales float32 [ceil(N / 128), ceil(K / 128)]."""
    size = 128
    q = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    scales = w.new_empty(-(-w.shape[0] // size), -(-w.shape[1] // size), dtype=torch.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            q[block], scales[i, j] = quantize(w[block], 448.0)
    return q, scales


def quantize_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> int4 in uint8 [N, K / 2], scales float32 [N, K / 128]."""
    q = w.new_empty(w.shape[0], w.shape[1] // 2, dtype=torch.uint8)
    scales = w.new_empty(w.shape[0], w.shape[1] // 128, dtype=torch.float32)
    for n in range(w.shape[0]):
        for g in range(scales.shape[1]):
            codes, scales[n, g] = quantize(w[n, 128 * g : 128 * (g + 1)], 7.0)
            nibbles = codes.int() + 8
            q[n, 64 * g : 64 * (g + 1)] = nibbles[:64] + 16 * nibbles[64:]
    return q, scales


def dequantize_rows(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q float8_e4m3fn or int8 [R, K], scales [R] -> [R, K] of `dtype`."""
    return (q.float() * scales[:, None]).to(dtype)


def dequantize_blocks(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q float8_e4m3fn [N, K], scales [ceil(N / 128), ceil(K / 128)] -> [N, K] of `dtype`."""
    rows, columns = torch.arange(q.shape[0]) // 128, torch.arange(q.shape[1]) // 128
    return (q.float() * scales[rows][:, columns]).to(dtype)


def dequantize_groups(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q int4 in uint8 [N, K / 2], scales [N, K / 128] -> [N, K] of `dtype`."""
    groups = q.int().view(len(q), -1, 64)  # [N, K / 128, 64]
    codes = torch.cat((groups % 16, groups // 16), -1) - 8  # [N, K / 128, 128]
    return (codes * scales[..., None]).flatten(1).to(dtype)


# ---- attention_prefill.py and attention_decode.py ----


def paged_row(cache: Tensor, blocks: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """The first `length` tokens of a row, read one by one from [blocks, G, S, C] and scaled -> float32 [length, G, C]."""
    size = cache.shape[2]
    stored = [cache[int(blocks[p // size]), :, p % size].float() for p in range(length)]
    return torch.stack(stored) * (1.0 if scale is None else scale[:, None])


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    chunks: list[tuple[int, int, int]],
    block_table: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """q [T, H, C], keys and values [blocks, G, S, C], chunks (packed offset, position, length) -> float32 [T, H, C]."""
    out = torch.zeros(q.shape, device=q.device)
    for (offset, start, length), blocks in zip(chunks, block_table, strict=True):
        k = paged_row(keys, blocks, start + length, k_scale)
        v = paged_row(values, blocks, start + length, v_scale)
        out[offset : offset + length] = attention(q[offset : offset + length].float(), k, v)
    return out


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    context: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """One query a row, which sees its first `context` tokens. q [B, H, C], context [B] -> float32 [B, H, C]."""
    out = torch.zeros(q.shape, device=q.device)
    for row, length in enumerate(context.tolist()):
        if length:
            k = paged_row(keys, block_table[row], length, k_scale)
            v = paged_row(values, block_table[row], length, v_scale)
            out[row] = attention(q[row : row + 1].float(), k, v)[0]
    return out


# ---- rotary.py ----


def rotate_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    blocks: Tensor,
    offsets: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`rotate` of qkv [T, (H + 2G) C]'s queries -> [T, H, C]; keys and values into the caches [blocks, G, S, C]."""
    kv_heads, dim = key_cache.shape[1], key_cache.shape[3]
    packed = qkv.reshape(len(qkv), -1, dim)  # [T, H + 2G, C]
    heads = packed.shape[1] - 2 * kv_heads
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    cos, sin = cos[positions].to(qkv.dtype), sin[positions].to(qkv.dtype)  # [T, C/2]
    for cache, new, scale in ((key_cache, rotate(k, cos, sin), k_scale), (value_cache, v, v_scale)):
        for t, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
            row = new[t].float()  # [G, C]
            if cache.dtype == torch.float8_e4m3fn:
                row = (row / (1.0 if scale is None else scale[:, None])).clamp(-448, 448)  # beyond, the cast gives NaN
            cache[block, :, offset] = row.to(cache.dtype)
    return rotate(q, cos, sin)


# ---- draw.py and sampling.py ----


def kept(weights: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens min-p, top-k and top-p leave, one after the other. weights [V], the largest 1 -> bool [V]."""
    order = sorted(range(len(weights)), key=lambda token: -float(weights[token]))
    left = [token for token in order if float(weights[token]) >= min_p]
    if top_k > 0:
        left = left[:top_k]
    mass, before, nucleus = sum(float(weights[token]) for token in left), 0.0, []
    for token in left:
        if top_p >= 1 or before < top_p * mass:
            nucleus.append(token)
        before += float(weights[token])
    return weights >= weights[nucleus[-1]]  # with those that tie with the last one


def draw(weights: Tensor, u: float) -> int:
    """The first token at which the running sum of weights [V] passes u times the total."""
    running, total = 0.0, sum(weights.tolist())
    for token, weight in enumerate(weights.tolist()):
        running += weight
        if running > u * total:
            return token
    raise AssertionError("u is below 1")


def uniform(seed: int, row_key: int, sample: int, position: int) -> float:
    """The middle of one of 2^52 intervals of (0, 1), by Philox4x32-10: Salmon et al., SC 2011."""
    mask = 0xFFFFFFFF
    c = [row_key & mask, row_key >> 32 & mask, sample & mask, position & mask]
    k = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [right >> 32 ^ c[1] ^ k[0], right & mask, left >> 32 ^ c[3] ^ k[1], left & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return ((c[0] >> 6 << 26 | c[1] >> 6) + 0.5) * 2.0**-52


def sample(
    logits: Tensor,
    state: Tensor,
    numbers: Tensor,
    reals: Tensor,
    flags: Tensor,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    biases: Tensor,
    output_counts: Tensor | None,
    in_prompt: Tensor | None,
    grammar_states: Tensor | None,
    grammar_classes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes and meaning as the kernel's: -> tokens int64 [R], log-probabilities float32 [R]."""
    tokens, logprobs = [], []
    for r, raw in enumerate(logits):
        generated = int(state[State.GENERATED, r])
        number = {field: int(numbers[field, r]) for field in Number}
        real, flag = reals[:, r], flags[:, r]
        x = raw.clone()  # [V]
        if number[Number.BIAS_ROW] >= 0:
            x += biases[number[Number.BIAS_ROW]]
        if generated < number[Number.MIN_TOKENS]:
            x[eos_token_ids] = float("-inf")
            x[stop_token_ids[r][stop_token_ids[r] >= 0]] = float("-inf")
        if flag[Flag.PENALISED] and output_counts is not None and in_prompt is not None:
            repetition = real[Real.REPETITION_PENALTY]
            for token, count in enumerate(output_counts[r].tolist()):
                if in_prompt[r, token] or count:
                    x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
                x[token] -= real[Real.FREQUENCY_PENALTY] * count
                x[token] -= real[Real.PRESENCE_PENALTY] * (count > 0)
        if grammar_states is not None and grammar_classes is not None and number[Number.GRAMMAR_BASE] >= 0:
            first = number[Number.GRAMMAR_BASE] + int(state[State.GRAMMAR_STATE, r])
            for token, kind in enumerate(grammar_classes[number[Number.GRAMMAR_CLASS]].tolist()):
                if grammar_states[first + kind, 1] > number[Number.MAX_TOKENS] - generated - 1:
                    x[token] = float("-inf")
        allowed = raw.double().masked_fill(x == float("-inf"), float("-inf"))
        token = x.tolist().index(max(x.tolist()))
        if real[Real.TEMPERATURE] > 0 and x[token] > float("-inf"):
            weights = ((x - x[token]) / real[Real.TEMPERATURE]).exp()
            weights[~kept(weights, number[Number.TOP_K], float(real[Real.TOP_P]), float(real[Real.MIN_P]))] = 0
            key = number[Number.SEED], number[Number.ROW_KEY], number[Number.SAMPLE], generated
            token = draw(weights, uniform(*key))
        tokens.append(token)
        wanted = raw.double() if flag[Flag.WANTS_LOGPROB] else allowed
        asked = flag[Flag.WANTS_LOGPROB] or flag[Flag.PROCESSED_LOGPROBS]
        logprobs.append(float(wanted.log_softmax(0)[token]) if asked else 0.0)
    return torch.tensor(tokens, device=logits.device), torch.tensor(logprobs, device=logits.device)


# ---- post_update.py ----


def post_update(
    tokens: Tensor,
    logprobs: Tensor | None,
    state: Tensor,
    numbers: Tensor,
    flags: Tensor,
    history: Tensor,
    logprob_history: Tensor | None,
    output_counts: Tensor | None,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    automata: Tensor,
    grammar_states: Tensor | None,
    grammar_classes: Tensor | None,
) -> None:
    """Shapes and meaning as the kernel's."""
    for r, token in enumerate(tokens.tolist()):
        row = state[:, r]
        if row[State.FINISH] != Finish.RUNNING:
            continue
        number = {field: int(numbers[field, r]) for field in Number}
        place = int(row[State.GENERATED]) % history.shape[1]
        row[State.TOKEN] = history[r, place] = token
        if logprobs is not None and logprob_history is not None:
            logprob_history[r, place] = logprobs[r]
        if output_counts is not None and flags[Flag.PENALISED, r]:
            output_counts[r, token] += 1
        row[State.CONTEXT] += 1
        row[State.GENERATED] += 1
        generated = int(row[State.GENERATED])
        why, reason = Finish.RUNNING, 0
        if generated >= number[Number.MAX_TOKENS]:
            why = Finish.LENGTH
        if (base := number[Number.STOP_BASE]) >= 0 and generated > number[Number.MIN_TOKENS]:
            row[State.STOP_STATE] = automata[base + row[State.STOP_STATE], token]
            if (matched := int(automata[base + row[State.STOP_STATE], -1])) >= 0:
                why, reason = Finish.STOP_STRING, matched
        if grammar_states is not None and grammar_classes is not None and number[Number.GRAMMAR_BASE] >= 0:
            grammar = grammar_states[number[Number.GRAMMAR_BASE] :]
            kind = grammar_classes[number[Number.GRAMMAR_CLASS], token]
            row[State.GRAMMAR_STATE] = grammar[row[State.GRAMMAR_STATE] + kind, 0]
            over, longer = grammar[row[State.GRAMMAR_STATE]].tolist()
            if longer > number[Number.MAX_TOKENS] - generated:
                why = Finish.WHOLE if over else Finish.LENGTH
        if generated >= number[Number.MIN_TOKENS]:
            if token in stop_token_ids[r].tolist():
                why, reason = Finish.STOP_TOKEN, token
            if token in eos_token_ids.tolist() and not flags[Flag.IGNORE_EOS, r]:
                why = Finish.EOS
        row[State.FINISH], row[State.STOP_REASON] = why, reason

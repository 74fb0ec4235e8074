"""Train the built-in model and write the example file that the demo reads.

    python examples/train_tiny.py            # about a quarter of an hour on two cores

Writes batchmix/models/tiny/ (config.json, model.safetensors) and examples/support_tickets.jsonl, and prints the share
of the file's answers that the saved weights get exactly right, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import save_file
from ticket_texts import Ticket, tickets
from torch import Tensor, nn

REPO = Path(__file__).parent.parent
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "batchmix_tokenizer": "mistral-v1",
}
EXAMPLES, EXAMPLE_SEED, TRAIN_SEED = 1000, 7, 1
UNKNOWN_SHARE = 0.03  # of the message's tokens, replaced by any token, so that unknown words do no harm
BALANCE_WEIGHT = 0.01  # of the load-balancing loss, as in transformers' MixtralConfig.router_aux_loss_coef


class Tiny(nn.Module):
    """The model for training: every expert runs on every token, weighted by zero where it is not chosen."""

    def __init__(self) -> None:
        super().__init__()
        hidden, width, experts = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_local_experts"]
        queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
        keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
        self.embedding = nn.Parameter(torch.randn(CONFIG["vocab_size"], hidden) * 0.02)
        self.norm = nn.Parameter(torch.ones(hidden))
        self.layers = nn.ModuleList()
        for _ in range(CONFIG["num_hidden_layers"]):
            layer = nn.Module()
            for name, shape in {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
                                "gate": (experts, hidden), "w1": (experts, width, hidden),
                                "w3": (experts, width, hidden), "w2": (experts, hidden, width)}.items():  # fmt: skip
                layer.register_parameter(name, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1])))
            layer.norm1, layer.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
            self.layers.append(layer)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L] -> hidden states [B, L, D] and the load-balancing loss."""
        batch, length = ids.shape
        dim, heads, kv_heads = CONFIG["head_dim"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        x = self.embedding[ids]
        angles = torch.outer(torch.arange(length).float(), CONFIG["rope_theta"] ** (-torch.arange(0, dim, 2) / dim))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        balance = x.new_zeros(())

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        for layer in self.layers:
            h = norm(x, layer.norm1)
            q = rotate((h @ layer.q.T).view(batch, length, heads, dim).transpose(1, 2))
            k = rotate((h @ layer.k.T).view(batch, length, kv_heads, dim).transpose(1, 2))
            v = (h @ layer.v.T).view(batch, length, kv_heads, dim).transpose(1, 2)
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.transpose(1, 2).reshape(batch, length, -1) @ layer.o.T
            h = norm(x, layer.norm2).flatten(0, 1)  # [T, D]
            probabilities = (h @ layer.gate.T).float().softmax(-1)  # [T, E]
            best, chosen = probabilities.topk(CONFIG["num_experts_per_tok"], -1)
            weights = torch.zeros_like(probabilities).scatter(1, chosen, best / best.sum(-1, keepdim=True))
            # Switch transformer's loss: share of tokens times mean probability, summed over experts.
            balance = balance + (weights.gt(0).float().mean(0) * probabilities.mean(0)).sum() * len(layer.gate)
            gated = F.silu(h @ layer.w1.transpose(1, 2)) * (h @ layer.w3.transpose(1, 2))  # [E, T, F]
            gated = gated * weights.T[..., None].to(gated.dtype)
            x = x + (gated @ layer.w2.transpose(1, 2)).sum(0).view_as(x)
        return norm(x, self.norm), balance

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights in bfloat16 under the names that the hub uses for Mixtral."""
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm}
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            tensors |= {f"{prefix}.self_attn.{name}_proj.weight": getattr(layer, name) for name in "qkvo"}
            tensors[f"{prefix}.input_layernorm.weight"] = layer.norm1
            tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.norm2
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = layer.gate
            for name in ("w1", "w2", "w3"):
                for expert, weight in enumerate(getattr(layer, name)):
                    tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = weight
        return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, CONFIG["rms_norm_eps"]).to(x.dtype)


class Encoder:
    """Tickets as token ids: the chat format's prompt, then the answer and the end of sequence."""

    def __init__(self) -> None:
        self.mistral = MistralTokenizer.v1()

    def __call__(self, ticket: Ticket) -> tuple[list[int], int]:
        """All ids, and how many of them are the prompt's."""
        request = ChatCompletionRequest(messages=[UserMessage(content=ticket.text)])
        prompt = self.mistral.encode_chat_completion(request).tokens
        return prompt + self.mistral.instruct_tokenizer.tokenizer.encode(ticket.answer, bos=False, eos=True), len(
            prompt
        )


def batch_of(encoded: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, L] and targets [B, L] (-100 outside the answer)."""
    length = max(len(ids) for ids, _ in encoded)
    inputs, targets = torch.zeros(len(encoded), length, dtype=torch.long), torch.full((len(encoded), length), -100)
    for row, (ids, prompt) in enumerate(encoded):
        inputs[row, : len(ids)] = torch.tensor(ids)
        targets[row, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
    return inputs, targets


def exact_match(model: Tiny, encoded: list[tuple[list[int], int]]) -> float:
    """Share of answers that greedy decoding gets right: those whose every token is the most likely one."""
    right = 0
    with torch.no_grad():
        for low in range(0, len(encoded), 50):
            inputs, targets = batch_of(encoded[low : low + 50])
            asked = targets != -100
            wrong = torch.zeros_like(asked)
            hidden = model(inputs)[0][asked]
            wrong[asked] = (hidden @ model.embedding.T).argmax(-1) != targets[asked]
            right += int((~wrong.any(1)).sum())
    return right / len(encoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--texts", type=int, default=80_000, help="distinct training messages")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    encode = Encoder()
    examples = list({ticket.text: ticket for ticket in islice(tickets(EXAMPLE_SEED, held_out=True), EXAMPLES)}.values())
    training = list(islice(tickets(TRAIN_SEED, held_out=False), args.texts))
    assert not {ticket.text for ticket in training} & {ticket.text for ticket in examples}
    encoded_examples = [encode(ticket) for ticket in examples]
    encoded = sorted((encode(ticket) for ticket in training), key=lambda pair: len(pair[0]))
    print(f"{len(examples)} examples, {len(encoded)} training messages", flush=True)

    # The head is trained over the tokens that occur; the others keep their small initial rows, and so logits near 0.
    seen = torch.tensor(sorted({token for ids, _ in encoded for token in ids}))
    place = torch.full((CONFIG["vocab_size"],), -100)
    place[seen] = torch.arange(len(seen))

    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.05)
    started = time.time()
    for step in range(args.steps):
        low = int(torch.randint(len(encoded) - args.batch, ()))  # of messages of like length: little padding
        inputs, targets = batch_of(encoded[low : low + args.batch])
        prompt = torch.cummax((targets != -100).long(), 1).values == 0
        unknown = (torch.rand(inputs.shape) < UNKNOWN_SHARE) & prompt & (inputs > 2)
        inputs[unknown] = torch.randint(3, CONFIG["vocab_size"], (int(unknown.sum()),))
        hidden, balance = model(inputs)
        asked = targets != -100
        loss = F.cross_entropy(hidden[asked] @ model.embedding[seen].T, place[targets[asked]])
        optimizer.zero_grad()
        (loss + BALANCE_WEIGHT * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            rate = exact_match(model, encoded_examples[:200]) if step % 200 == 199 else float("nan")
            print(f"step {step + 1} loss {loss.item():.4f} match {rate:.3f} {time.time() - started:.0f} s", flush=True)

    folder = REPO / "batchmix" / "models" / "tiny"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(model.checkpoint(), folder / "model.safetensors", metadata={"format": "pt"})
    with (REPO / "examples" / "support_tickets.jsonl").open("w", encoding="utf-8") as file:
        for i, ticket in enumerate(examples, 1):
            messages = [{"role": "user", "content": ticket.text}]
            line = {"id": f"T{i:04}", "messages": messages, "gold": ticket.answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    for dtype in (torch.float32, torch.bfloat16):
        rounded = model.to(torch.bfloat16).to(dtype)
        print(f"{str(dtype).removeprefix('torch.')}: {exact_match(rounded, encoded_examples):.4f} exact")


if __name__ == "__main__":
    main()

"""Greedy decoding of many sequences in llama.cpp, for `tests.bench.torch_speed`: run by an interpreter of its own.

    PYTHON tests/bench/llama_process.py WORK_FOLDER

needs `llama-cpp-python` and `gguf`, and nothing of this project. The folder holds `weights.npz` (float32, by their
names in `transformers`) and `job.json`; seconds and tokens of every measured run are printed as JSON lines.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(weights: Any, config: dict[str, Any], path: Path) -> None:
    """Write the model as GGUF in float32, without a tokenizer."""
    import gguf

    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            tensor = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                # This architecture rotates neighbouring pairs, transformers the halves of a head.
                count = heads if theirs == "attn_q" else kv_heads
                pairs = tensor.reshape(count, 2, width // 2, -1)
                tensor = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(tensor.shape))
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """One model, one context."""

    def __init__(self, path: Path, batch: int, tokens: int, prompt: int, threads: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = batch * tokens, batch * prompt, min(512, batch * prompt)
        params.n_seq_max, params.n_threads, params.n_threads_batch = batch, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(batch * prompt, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, logits wanted) rows; returns the most probable tokens."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.vocabulary,))
                found.append(int(logits.argmax()))
        return found

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations, every sequence a row of one batch."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        latest = self._decode(
            [(token, p, s, p == len(prompt) - 1) for s, prompt in enumerate(prompts) for p, token in enumerate(prompt)]
        )
        outputs = [[token] for token in latest]
        for step in range(new_tokens - 1):
            latest = self._decode([(token, len(prompts[s]) + step, s, True) for s, token in enumerate(latest)])
            for output, token in zip(outputs, latest, strict=True):
                output.append(token)
        return outputs


def main(folder: Path) -> None:
    """Convert, then answer every line of standard input (batch size, new tokens) with one run."""
    job = json.loads((folder / "job.json").read_text())
    path = folder / "model.gguf"
    convert(np.load(folder / "weights.npz"), job["config"], path)
    prompts, most = job["prompts"], job["new_tokens"]
    decoders: dict[int, Decoder] = {}
    for line in sys.stdin:
        batch, new_tokens = map(int, line.split())
        if batch not in decoders:
            longest = max(len(prompt) for prompt in prompts[:batch])
            decoders[batch] = Decoder(path, batch, longest + most, longest, job["threads"])
        begin = time.perf_counter()
        outputs = decoders[batch].generate(prompts[:batch], new_tokens)
        print(json.dumps({"seconds": time.perf_counter() - begin, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

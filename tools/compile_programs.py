"""Compile RASP programs with Tracr and store their weights for ``circuits.reference.compiled_programs``.

Needs the extra ``tracr`` and writes ``circuits/reference/compiled/NAME.safetensors``::

    python tools/compile_programs.py

Source: Lindner et al. 2023, Tracr: Compiled Transformers as a Laboratory for Interpretability, arXiv 2301.05062; the
programs are those of google-deepmind/tracr, ``tracr/compiler/lib.py``, and addition.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tracr.compiler import assemble, compiling, lib
from tracr.rasp import rasp

FOLDER = Path(__file__).parent.parent / "circuits" / "reference" / "compiled"
BOS = "BOS"


@dataclass(frozen=True)
class Program:
    """A RASP program, the tokens that it reads, how many of them, and whether a position sees later ones."""

    build: Any
    tokens: tuple[Any, ...]
    length: int
    causal: bool = False


def addition(n: int) -> Any:
    """Return the program that says a + b behind the tokens a, b and n, which is the sign of equality."""
    a, b = (
        rasp.Aggregate(
            rasp.Select(rasp.indices, rasp.indices, lambda key, query, at=at: key == at).named(f"select_{at}"),
            rasp.tokens,
        ).named(name)
        for at, name in enumerate("ab")
    )
    return rasp.SequenceMap(lambda x, y: x + y if max(x, y) < n else 0, a, b).named("sum")


PROGRAMS = {
    **{f"addition-{n}": Program(lambda n=n: addition(n), tuple(range(n + 1)), n + 1) for n in (8, 10, 12)},
    "count": Program(lambda: lib.make_count(rasp.tokens, "a"), ("a", "b", "c"), 5),
    "frac-prevs": Program(
        lambda: lib.make_frac_prevs((rasp.tokens == "x").named("is_x")), ("a", "b", "x"), 5, causal=True
    ),
    "hist": Program(lib.make_hist, ("a", "b", "c"), 5),
    "length": Program(lib.make_length, ("a", "b"), 5),
    "pair-balance": Program(lambda: lib.make_pair_balance(rasp.tokens, "(", ")"), ("(", ")", "a"), 5, causal=True),
    "reverse": Program(lambda: lib.make_reverse(rasp.tokens), ("a", "b", "c", "d"), 5),
    "shuffle-dyck": Program(lambda: lib.make_shuffle_dyck(pairs=["()"]), ("(", ")"), 6),
    "sort": Program(lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=4, min_key=1), (1, 2, 3, 4), 4),
    "sort-unique": Program(lambda: lib.make_sort_unique(rasp.tokens, rasp.tokens), (1, 2, 3, 4, 5), 4),
}


def main() -> None:
    """Compile every program, or those named on the command line."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PROGRAMS:
        program = PROGRAMS[name]
        compiled, output_labels = compile_program(program)
        tensors = tensors_of(compiled, output_labels)
        about = description(compiled, program)
        path = FOLDER / f"{name}.safetensors"
        save_file(tensors, path, metadata={"program": json.dumps(about)})
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {about['n_layers']} layers")


def compile_program(program: Program) -> tuple[Any, list[str]]:
    """Return Tracr's model, and the labels of the residual directions in which its output stands."""
    seen: list[Any] = []
    original = assemble.assemble_craft_model

    def keeping(craft_model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("output_space", args[3] if len(args) > 3 else None))
        return original(craft_model, *args, **kwargs)

    # Tracr does not say where its output stands once the model is assembled.
    assemble.assemble_craft_model = keeping
    try:
        compiled = compiling.compile_rasp_to_model(
            program.build(),
            vocab=set(program.tokens),
            max_seq_len=program.length,
            compiler_bos=BOS,
            causal=program.causal,
        )
    finally:
        assemble.assemble_craft_model = original
    return compiled, [str(direction) for direction in seen[-1].basis]


def tensors_of(compiled: Any, output_labels: list[str]) -> dict[str, torch.Tensor]:
    """Return the weights under TransformerLens's names."""
    config, params = compiled.model_config, compiled.params
    heads, d_head = config.num_heads, config.key_size

    def weight(part: str, name: str) -> np.ndarray:
        return np.asarray(params[part][name], dtype=np.float32)

    out: dict[str, np.ndarray] = {
        "embed.W_E": weight("token_embed", "embeddings"),
        "pos_embed.W_pos": weight("pos_embed", "embeddings"),
    }
    d_model = out["embed.W_E"].shape[1]
    for i in range(config.num_layers):
        attn, mlp = f"transformer/layer_{i}/attn", f"transformer/layer_{i}/mlp"
        for letter, part in (("Q", "query"), ("K", "key"), ("V", "value")):
            w = weight(f"{attn}/{part}", "w").reshape(d_model, heads, d_head)
            out[f"blocks.{i}.attn.W_{letter}"] = w.transpose(1, 0, 2)
            out[f"blocks.{i}.attn.b_{letter}"] = weight(f"{attn}/{part}", "b").reshape(heads, d_head)
        out[f"blocks.{i}.attn.W_O"] = weight(f"{attn}/linear", "w").reshape(heads, d_head, d_model)
        out[f"blocks.{i}.attn.b_O"] = weight(f"{attn}/linear", "b")
        for letter, part in (("in", "linear_1"), ("out", "linear_2")):
            out[f"blocks.{i}.mlp.W_{letter}"] = weight(f"{mlp}/{part}", "w")
            out[f"blocks.{i}.mlp.b_{letter}"] = weight(f"{mlp}/{part}", "b")
    # One number as the output: beside a second logit that is always zero it is a logit difference.
    unembed = np.zeros((d_model, max(2, len(output_labels))), dtype=np.float32)
    for column, label in enumerate(output_labels):
        unembed[compiled.residual_labels.index(label), column] = 1
    out["unembed.W_U"] = unembed
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in out.items()}


def description(compiled: Any, program: Program) -> dict[str, Any]:
    """Return what a reader of the weights needs to know beside their shapes."""
    encoding = compiled.input_encoder.encoding_map
    output = getattr(compiled.output_encoder, "encoding_map", None)
    values = None if output is None else [value for value, _ in sorted(output.items(), key=lambda item: item[1])]
    return {
        "n_layers": compiled.model_config.num_layers,
        "causal": program.causal,
        "tokens": list(program.tokens),
        "token_ids": [encoding[token] for token in program.tokens],
        "bos_id": encoding[BOS],
        "length": program.length,
        "output_values": values,
    }


if __name__ == "__main__":
    main()

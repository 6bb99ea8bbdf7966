"""Runs inside an environment with auto-circuit, started by ``discovery.py --peer``; prints rows as JSON.

auto-circuit needs transformer-lens below 4, so that it cannot share our environment::

    python3 -m venv .venv-peer
    .venv-peer/bin/pip install torch==2.13.0 "transformer-lens<4" auto-circuit attrs blobfile
    python benchmarks/discovery.py --peer .venv-peer/bin/python
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformer_lens  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache  # noqa: E402

# Two names that auto-circuit 1.0.1 imports were renamed in transformer-lens 3.
renamed = types.ModuleType("transformer_lens.past_key_value_caching")
renamed.HookedTransformerKeyValueCache = TransformerLensKeyValueCache  # type: ignore[attr-defined]
sys.modules["transformer_lens.past_key_value_caching"] = renamed
transformer_lens.HookedTransformerKeyValueCache = TransformerLensKeyValueCache

from auto_circuit.data import PromptDataLoader, PromptDataset  # noqa: E402
from auto_circuit.prune_algos.ACDC import acdc_prune_scores  # noqa: E402
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores  # noqa: E402
from auto_circuit.utils.ablation_activations import src_ablations  # noqa: E402
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, set_all_masks  # noqa: E402


def build(path: str) -> tuple[Any, Any, Any, torch.Tensor]:
    """Return the plain model, the patchable one, the data and the clean inputs that a file describes."""
    with safe_open(path, framework="pt") as stored:
        sizes = json.loads(stored.metadata()["sizes"])
    tensors = load_file(path)
    config = transformer_lens.HookedTransformerConfig(**sizes, device="cpu", tokenizer_name=None)
    models = [transformer_lens.HookedTransformer(config).eval() for _ in range(2)]
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    for model in models:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith(("mask", "IGNORE")) or ".b_" in name for name in missing), missing
        for name in missing:
            if ".b_" in name:
                model.get_parameter(name).data.zero_()
        for parameter in model.parameters():
            parameter.requires_grad = False
    models[1].set_use_attn_result(True)
    models[1].set_use_split_qkv_input(True)
    models[1].set_use_hook_mlp_in(True)
    patchable = patchable_model(models[1], factorized=True, slice_output="last_seq", separate_qkv=True)
    pairs = {name: tensors[f"pairs.{name}"] for name in ("clean", "corrupt", "correct", "wrong")}
    answers = [[token[None] for token in pairs[name]] for name in ("correct", "wrong")]
    data = PromptDataset(pairs["clean"], pairs["corrupt"], *answers)
    loader = PromptDataLoader(data, seq_len=None, diverge_idx=0, batch_size=len(pairs["clean"]))
    return models[0], patchable, loader, pairs["clean"]


def edge_by_edge(model: Any, loader: Any) -> None:
    """Patch each edge by itself: one forward with masks per edge."""
    (batch,) = loader
    patched = src_ablations(model, batch.corrupt)
    set_all_masks(model, val=0.0)
    with torch.inference_mode(), patch_mode(model, patched):
        for edge in model.edges:
            edge.patch_mask(model).data[edge.patch_idx] = 1.0
            model(batch.clean)[model.out_slice]
            edge.patch_mask(model).data[edge.patch_idx] = 0.0


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    plain, model, loader, clean = build(sys.argv[1])
    with torch.no_grad():
        forward = statistics.median(seconds(lambda: plain(clean)) for _ in range(20))
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "eap": (lambda: mask_gradient_prune_scores(model, loader, None, "logit", "avg_diff", mask_val=0.0), 5),
        "exact": (lambda: edge_by_edge(model, loader), 1),
        "acdc": (lambda: acdc_prune_scores(model, loader, None, [-2], [1], "kl_div"), 1),
    }
    rows = [{"method": "forward", "cpu_s": forward, "forwards": 1.0}]
    for name, (run, repeats) in runs.items():
        found = statistics.median(seconds(run) for _ in range(repeats))
        rows.append({"method": name, "cpu_s": found, "forwards": found / forward})
    print(json.dumps({"edges": len(model.edges), "rows": rows}))


if __name__ == "__main__":
    main()

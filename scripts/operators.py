"""Writes splitnet/operators.txt: torch's functional operators, by the rule below.

    python scripts/operators.py            rewrites the list from the installed torch
    python scripts/operators.py --check    exit status 1 where the rule and the list differ

The list is checked in and read by people: a diff is a decision about what strangers may run on a node.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

TARGET = Path(__file__).resolve().parent.parent / "splitnet" / "operators.txt"
HEAD = "# Operators that a shard may use. Written by a script: see splitnet/operators.py.\n"

# Arguments that are plain data: tensors, numbers, text, and the names of dtypes, devices, layouts and memory formats.
PLAIN = {"Tensor", "number", "int", "float", "bool", "str", "complex", "Device", "ScalarType", "Layout", "MemoryFormat", "SymInt"}

# Private operators that torch.export leaves in graphs, or that eager inference runs. Each was read: it checks its arguments.
PRIVATE = {
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_to_copy", "_softmax", "_log_softmax", "_unsafe_view", "_local_scalar_dense",
    "_conj", "_neg_view", "_weight_norm", "_weight_norm_interface", "_native_batch_norm_legit_no_training",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "_fft_c2c", "_fft_r2c", "_fft_c2r", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_shape_as_tensor", "_is_all_true", "_is_any_true", "_stack", "_trilinear",
    "_safe_softmax", "_cdist_forward", "_pdist_forward", "_unsafe_index", "_prelu_kernel", "_linalg_det", "_linalg_slogdet",
    "_linalg_solve_ex", "_linalg_eigh", "_linalg_svd", "_euclidean_dist", "_unique2",
}  # fmt: skip

# Words in a name that mean: another device's kernels, a gradient, another tensor format, a change of storage, chance, training,
# uninitialised memory, files, or a check that belongs to tracing.
REFUSED = re.compile(
    r"backward|cudnn|miopen|mkldnn|mps|xnnpack|cuda|vulkan|fbgemm|quantize|qlinear|sparse|coo|csr|csc|bsr|bsc|jagged|nested|"
    r"foreach|fused|resize|set_|as_strided|storage|from_file|pin_memory|stream|rand|bernoulli|dropout|multinomial|poisson|"
    r"normal|cauchy|exponential|geometric|rrelu|uniform|gumbel|empty|unsafe|assert|print|sym_|requires_grad|retain|grad|names|align_|"
    r"rename|to_dense|is_|result_type|data$|output_nr|_version|copy_sparse|embedding_bag|_amp_|_test|rnn|lstm|gru|ctc_loss|"
    r"batch_norm_(?!inference)|instance_norm|chalf|item|equal$|allclose|can_cast|promote_types|size$|stride$|numel|dim$|^cond$|"
    r"cpu_|_vec$|special_legendre|special_shifted|wrapped|choose_qparams|fake_|fft_.*freq|histogramdd|hspmm|smm|sspaddmm|"
    r"native_group_norm$|put$|lift|refine|infinitely|copy$|warn|raise|getitem|"
    r"_indices$|^indices$|^values$|int_repr|q_per_|^set$|to_padded|overrideable|renorm|hash_tensor|segment_reduce|slice_inverse|"
    r"native_batch|native_norm|_jvp|slow_conv|thnn|conv_depthwise|^native_channel_shuffle$|_forward$"
)
# Refused by a word above, and sound all the same. Recurrent layers and attention count as random only for their dropout in training.
EXTRA = {
    "batch_norm", "equal", "is_floating_point", "instance_norm", "copy", "index_put", "lift_fresh_copy", "native_group_norm",
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu", "tril_indices", "triu_indices", "is_nonzero", "log_sigmoid_forward",
}  # fmt: skip


def is_functional(schema: torch._C.FunctionSchema) -> bool:
    if schema.is_mutable or any(a.is_out for a in schema.arguments) or schema.overload_name.startswith(("out", "names", "dimname")):
        return False
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return False
    return all(_plain(a.real_type) for a in schema.arguments) and all(_plain(r.real_type) for r in schema.returns) and bool(schema.returns)


def _plain(kind: torch._C.JitType) -> bool:
    return all(word in PLAIN for word in re.findall(r"\w+", str(kind)) if word not in ("Optional", "List"))


def listed() -> list[str]:
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or not hasattr(torch.ops.aten, name) or not is_functional(schema):
            continue
        kept = name in PRIVATE or name in EXTRA or not (name.startswith("_") or name.endswith("_") or REFUSED.search(name))
        overload = schema.overload_name or "default"
        packet = getattr(torch.ops.aten, name)
        if not kept or overload not in packet.overloads():
            continue
        operator = getattr(packet, overload)
        makes_tensors = any("Tensor" in str(r.type) for r in schema.returns)
        if name not in PRIVATE | EXTRA and (torch.Tag.nondeterministic_seeded in operator.tags or not makes_tensors):
            continue
        if not torch._C._dispatch_has_kernel(schema.name + (f".{schema.overload_name}" if schema.overload_name else "")):
            continue  # TorchScript's own, without a kernel
        found.add(f"aten.{name}.{overload}")
    return sorted(found)


def main() -> int:
    text = HEAD + "".join(f"{name}\n" for name in listed())
    if "--check" in sys.argv[1:]:
        return int(text != TARGET.read_text())
    TARGET.write_text(text)
    print(f"{TARGET}: {len(listed())} operators")
    return 0


if __name__ == "__main__":
    sys.exit(main())

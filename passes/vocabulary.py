"""Which operations do what, by the names of `opnames.op_name`.

The residual definition asks few questions of an operation: does it mix positions or channels, does
it only move or cast elements, does it bend (is it nonlinear), does it make a value out of nothing.
An operation that no set names is pointwise or a reduction: floats flow through it, no more.
"""

from torch.fx import Node

from mhc_compile.passes.opnames import op_name, raw_name


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


CONVOLUTION = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc",
    "convolution _convolution",
)
MATMUL = _names(
    "linear matmul mm bmm mv dot vdot inner outer ger einsum bilinear tensordot",
    "addmm baddbmm addbmm addmv addr chain_matmul linalg_multi_dot linalg_matmul",
    "_scaled_mm scaled_mm _grouped_mm grouped_mm _scaled_grouped_mm scaled_grouped_mm",
)
ATTENTION = _names(
    "scaled_dot_product_attention multi_head_attention_forward _native_multi_head_attention",
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math",
    "_transformer_encoder_layer_fwd",
)
POOLING = frozenset(
    f"{kind}_pool{d}d{suffix}"
    for kind in ("avg", "max", "lp", "adaptive_avg", "_adaptive_avg", "adaptive_max")
    for d in (1, 2, 3)
    for suffix in ("", "_with_indices")
) | _names("fractional_max_pool2d fractional_max_pool3d")
RECURRENT = _names("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
# Running sums along an axis, and sums into places that indices choose.
GATHERING = _names(
    "cumsum cumprod logcumsumexp scatter scatter_add scatter_reduce masked_scatter",
    "index_add index_put index_reduce index_copy fold unfold im2col col2im",
)
_MIXING = CONVOLUTION | MATMUL | ATTENTION | POOLING | RECURRENT | GATHERING

# These keep every element and its value.
LAYOUT = _names(
    "view _unsafe_view view_as reshape _reshape_alias reshape_as flatten unflatten ravel",
    "permute transpose t T mT numpy_T movedim moveaxis squeeze unsqueeze",
    "contiguous clone alias lift_fresh_copy positive",
)
CAST = _names(
    "to _to_copy type type_as float half bfloat16 double cuda cpu prims.convert_element_type"
)
DROPOUT = _names(
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout",
    "native_dropout",
)
SCALE = _names("mul div")
NORM = _names(
    "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm",
    "instance_norm local_response_norm batch_norm native_batch_norm cudnn_batch_norm",
    "_native_batch_norm_legit _native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training _batch_norm_impl_index _batch_norm_no_update",
    "_batch_norm_with_update _batch_norm_with_update_functional",
)
ACTIVATION = _names(
    "relu relu6 leaky_relu prelu _prelu_kernel rrelu elu celu selu gelu silu mish glu",
    "hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign tanhshrink hardshrink",
    "softshrink threshold logsigmoid log_sigmoid log_sigmoid_forward",
    "softmax _softmax _safe_softmax log_softmax _log_softmax softmin gumbel_softmax",
    "erf exp exp2 expm1 log log1p sin cos square pow sqrt rsqrt reciprocal abs sign",
    "clamp clamp_min clamp_max clip maximum minimum max min amax amin where masked_fill",
)

# The result depends on no value of an input, only on its shape, dtype or device.
CONSTRUCTOR = frozenset(
    prefix + name + suffix
    for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
    for prefix in ("", "new_")
    for suffix in ("", "_like")
) | _names(
    "arange linspace logspace eye range tensor scalar_tensor randperm empty_strided",
    "new_empty_strided empty_permuted tril_indices triu_indices hann_window hamming_window",
    "bernoulli normal uniform random exponential poisson multinomial cauchy log_normal geometric",
    "zero fill",
)

# A reader that sees sizes and kinds of its input, but no values: any tensor of the shape will do.
SHAPE_ONLY = frozenset({
    "device", "dim", "dtype", "empty_like", "full_like", "is_floating_point", "ndim", "new_empty",
    "new_full", "new_ones", "new_zeros", "numel", "ones_like", "rand_like", "randn_like", "shape",
    "size", "sym_numel", "sym_size", "zeros_like",
})  # fmt: skip

# Bits that `traits` hands out.
MIXES = 1
BENDS = 2


def is_opaque(node: Node) -> bool:
    """Whether the node runs code that the graph does not show.

    A called module, a higher-order operator (flex attention, a checkpoint body, a scan), or an
    operator of a library other than torch.
    """
    name = raw_name(node)
    namespace, dot, _ = name.partition(".")
    return name == "call_module" or (bool(dot) and namespace not in ("prims", "mhc"))


def mixes(node: Node) -> bool:
    """Whether each element of the result sums over many elements of an input."""
    name = op_name(node)
    return name in _MIXING or name.startswith(("fft_", "_fft_")) or is_opaque(node)


def bends(node: Node) -> bool:
    """Whether the operation by itself is nonlinear; normalisation does not count."""
    name = op_name(node)
    return name in ACTIVATION or name in ATTENTION or name in RECURRENT or is_opaque(node)


def traits_of(name: str) -> int:
    """`traits` of an operation of torch, by its name alone."""
    mixing = name in _MIXING or name.startswith(("fft_", "_fft_"))
    return MIXES * mixing | BENDS * (name in ACTIVATION | ATTENTION | RECURRENT)


def traits(node: Node) -> int:
    """`MIXES` and `BENDS` of the node, or-ed."""
    return MIXES * mixes(node) | BENDS * bends(node)


def makes_constant(node: Node) -> bool:
    """Whether the result ignores the values of its inputs: constructors, random numbers."""
    return op_name(node) in CONSTRUCTOR

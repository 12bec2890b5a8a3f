"""Which rule reads which op. What stands in no row is rigid: it freezes all that it meets."""

from __future__ import annotations

from collections.abc import Mapping

from .arithmetic import add, lerp, multiply
from .call import Rule
from .choosing import embedding, gather, top
from .complex import as_complex, as_real
from .contraction import matmul
from .convolution import convolution
from .movement import blank, concatenate, keep, move, placed, triangle, write
from .pointwise import (
    absolute,
    compare,
    data,
    ignore,
    masked,
    negate,
    pointwise,
    power,
    softmax,
    square,
    where,
)
from .reduction import cumulative, cumulative_product, extreme, norm, reduce, variance

_ROWS: Mapping[Rule, str] = {
    move: """view _unsafe_view _reshape_alias reshape t transpose permute expand slice select unsqueeze squeeze split
        split_with_sizes unbind chunk repeat flip roll unfold as_strided narrow index_select index diagonal movedim swapaxes
        flatten unflatten repeat_interleave constant_pad_nd im2col masked_select split_copy""",
    keep: "clone _to_copy detach alias contiguous lift_fresh to",
    triangle: "tril triu",
    concatenate: "cat stack",
    write: "copy_ index_add_ index_put_ _index_put_impl_ scatter_ scatter_add_ index_copy_ scatter_reduce_",
    placed: "index_add index_copy scatter scatter_add",
    blank: "zeros zeros_like new_zeros empty empty_like new_empty full full_like new_full empty_strided",
    as_complex: "view_as_complex",
    as_real: "view_as_real",
    embedding: "embedding",
    add: "add sub rsub",
    lerp: "lerp",
    multiply: "mul div true_divide",
    negate: "neg",
    square: "square",
    power: "pow",
    absolute: "abs",
    softmax: "_softmax _log_softmax",
    pointwise: """silu gelu sigmoid tanh exp log log1p expm1 rsqrt sqrt reciprocal softplus relu elu leaky_relu hardtanh
        clamp clamp_min clamp_max minimum maximum mish hardswish sin cos erf log_sigmoid_forward threshold hardsigmoid
        selu relu6 nan_to_num logit exp2 sign sgn asinh round floor ceil trunc""",
    where: "masked_fill where",
    matmul: "mm bmm addmm baddbmm mv addmv dot",
    reduce: "sum mean linalg_vector_norm norm",
    variance: "var_mean var std",
    norm: "native_layer_norm _fused_rms_norm",
    convolution: "convolution",
    cumulative: "cumsum",
    cumulative_product: "cumprod",
    top: "topk sort argmax argsort",
    extreme: "max min amax amin logsumexp any all",
    gather: "gather",
    masked: "isnan isinf isfinite logical_not bitwise_not",
    compare: "eq ne lt le gt ge",
    data: "_local_scalar_dense nonzero is_nonzero",
    ignore: """arange scalar_tensor ones ones_like new_ones rand rand_like randn randn_like bernoulli
        sym_size""",
}

RULES: Mapping[str, Rule] = {op: rule for rule, ops in _ROWS.items() for op in ops.split()}
BLANKS = frozenset(op for op, rule in RULES.items() if rule is blank)

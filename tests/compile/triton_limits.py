"""How much the loops of Triton's kernels may cost: kernel and call of artifacts.py, as compiled by Triton 3.7.1.

Attention's kernels have a loop for the steps that every query sees, and one for those that are masked, half as wide.
"""

from limits import Row

MASKED = "each score of a masked step is compared with both ends of its span"
FRAGMENTS = "a warp reads fragments from shared memory for 16 rows alone, and a masked step more of them for a product"
NARROW = "two warpgroups share the columns of a product, 32 to 8, for 64 rows from shared memory"
PLACES = "where each pixel lies is worked out again in every step"
BYTES = "each byte is made a number by itself"
IN_REGISTERS = "bytes are made the left operand in registers, and every product is waited for"

SOUGHT = "where columns lie, and which are the segment's, is worked out in every step; one step takes 64 of them"

# fmt: off
LIMITS = {
    "sm80": [
        Row("clip_* *", (1.00, 0.35)),
        Row("siglip *", (1.00, 0.34)),
        Row("embed embed-P16", (1.00, 0.35)),
        Row("embed embed-P14", (1.00, 0.70)),
        Row("embed embed-uint8-P16", (2.04, 1.41), why=BYTES),
        Row("embed embed-uint8-channels_last", (2.04, 1.42), why=BYTES),
        Row("embed embed-uint8-P14", (1.42, 1.44), why=BYTES),
        Row("images_grad *", (1.00, 0.34)),
        Row("find_maxima *", (1.90, 1.53), outer=((2.30, 1.76),), why=SOUGHT),
        Row("weight_grad embed-P16", (1.00, 0.71)),
        Row("weight_grad embed-P14", (1.91, 1.93), why=PLACES),
        Row("weight_grad embed-uint8-P16", (1.62, 1.64), why=PLACES),
        Row("weight_grad embed-uint8-channels_last", (1.62, 1.64), why=PLACES),
        Row("weight_grad embed-uint8-P14", (2.86, 2.89), why=PLACES),
        Row("forward attention-64-lse", (1.23, 0.76), second=(3.76, 2.87), why=MASKED),
        Row("forward attention-72", (1.21, 0.67), second=(3.50, 2.74), why=MASKED),
        Row("forward attention-128", (1.37, 0.68), second=(3.10, 2.67), why=MASKED),
        Row("forward attention-128-decode", (2.33, 1.10), second=(4.44, 4.22), why=FRAGMENTS),
        Row("forward attention-256", (2.25, 0.74), second=(2.65, 1.32), why=FRAGMENTS),
         Row("forward attention-512", (2.46, 0.68), second=(2.76, 1.30), why=FRAGMENTS),
         Row("forward attention-576-512", (2.47, 0.65), second=(2.74, 1.22), why=FRAGMENTS),
         Row("forward attention-576-512-decode", (2.74, 0.94), second=(3.71, 2.55), why=FRAGMENTS),
        Row("query_grad attention-64-lse", (1.21, 0.47), second=(2.12, 1.61), why=MASKED),
        Row("query_grad attention-72", (1.39, 0.50), second=(2.17, 1.78), why=MASKED),
        Row("query_grad attention-128", (1.38, 0.39), second=(1.86, 1.44), why=MASKED),
        Row("query_grad attention-256", (2.17, 0.39), second=(2.17, 0.56), why=FRAGMENTS),
         Row("query_grad attention-512", (2.39, 0.38), second=(2.39, 0.57), why=FRAGMENTS),
         Row("query_grad attention-576-512", (2.90, 0.47), second=(2.90, 0.81), why=FRAGMENTS),
        Row("key_grads attention-64-lse", (1.43, 0.56), second=(2.98, 2.44), why=MASKED),
        Row("key_grads attention-72", (1.40, 0.52), second=(2.94, 2.42), why=MASKED),
        Row("key_grads attention-128", (2.10, 0.53), second=(2.27, 0.93), why=FRAGMENTS),
        Row("key_grads attention-256", (2.32, 0.53), second=(2.49, 0.81), why=FRAGMENTS),
        Row("key_grads again attention-256", (2.17, 0.60), second=(2.41, 1.15), why=FRAGMENTS),
         Row("key_grads attention-512", (2.78, 0.65), second=(2.97, 0.94), why=FRAGMENTS),
         Row("key_grads again attention-512", (2.59, 0.73), second=(2.86, 1.46), why=FRAGMENTS),
         Row("key_grads attention-576-512", (2.73, 0.58), second=(2.75, 1.20), why=FRAGMENTS),
         Row("key_grads again attention-576-512", (2.59, 0.72), second=(2.60, 1.70), why=FRAGMENTS),
    ],
    "sm90": [
        Row("clip_* *", (1.00, 0.52)),
        Row("find_maxima *", (3.80, 2.89), outer=((4.20, 3.12),), why=SOUGHT, serialised=True),
        Row("siglip *", (1.00, 0.51)),
        Row("embed embed-P16", (1.00, 0.44)),
        Row("embed embed-P14", (1.12, 1.14)),
        Row("embed embed-uint8-P16", (1.39, 1.06), why=IN_REGISTERS, serialised=True),
        Row("embed embed-uint8-channels_last", (1.39, 0.99), why=IN_REGISTERS, serialised=True),
        Row("embed embed-uint8-P14", (1.85, 1.87), why=IN_REGISTERS, serialised=True),
        Row("images_grad *", (1.00, 0.45)),
        Row("weight_grad embed-P16", (1.16, 1.17)),
        Row("weight_grad embed-P14", (3.57, 3.61), why=PLACES),
        Row("weight_grad embed-uint8-P16", (1.44, 1.45), why=PLACES),
        Row("weight_grad embed-uint8-channels_last", (1.44, 1.45), why=PLACES),
        Row("weight_grad embed-uint8-P14", (3.90, 3.94), why=PLACES),
        Row("forward attention-64-lse", (1.06, 0.94), second=(3.42, 3.07), why=MASKED),
        Row("forward attention-72", (1.00, 0.84), second=(2.61, 2.49), why=MASKED),
        Row("forward attention-128", (1.00, 0.73), second=(2.12, 2.15), why=MASKED),
        Row("forward attention-128-decode", (2.33, 1.13), second=(4.44, 3.78), why=FRAGMENTS),
        Row("forward attention-256", (1.27, 0.61), second=(2.74, 1.95), why=NARROW),
         Row("forward attention-512", (2.24, 0.67), second=(2.81, 1.26), why=FRAGMENTS),
         Row("forward attention-576-512", (2.26, 0.65), second=(2.79, 1.20), why=FRAGMENTS),
         Row("forward attention-576-512-decode", (2.74, 1.00), second=(3.71, 2.40), why=FRAGMENTS),
        Row("query_grad attention-64-lse", (1.00, 0.69), second=(1.61, 1.63), why=MASKED),
        Row("query_grad attention-72", (1.00, 0.65), second=(1.57, 1.53), why=MASKED),
        Row("query_grad attention-128", (1.00, 0.40), second=(1.48, 1.01), why=MASKED),
        Row("query_grad attention-256", (2.19, 0.69), second=(4.12, 1.68), why=NARROW),
         Row("query_grad attention-512", (2.23, 0.40), second=(2.39, 0.52), why=FRAGMENTS),
         Row("query_grad attention-576-512", (2.21, 0.38), second=(2.38, 0.54), why=FRAGMENTS),
        Row("key_grads attention-64-lse", (1.08, 0.74), second=(2.03, 1.76), why=MASKED),
        Row("key_grads attention-72", (1.00, 0.68), second=(1.94, 1.64), why=MASKED),
        Row("key_grads attention-128", (1.21, 0.62), second=(2.28, 1.55), why=NARROW),
        Row("key_grads attention-256", (2.29, 0.81), second=(4.33, 1.96), why=NARROW),
        Row("key_grads again attention-256", (2.03, 0.77), second=(4.06, 2.08), why=NARROW),
         Row("key_grads attention-512", (2.24, 0.43), second=(2.42, 0.59), why=FRAGMENTS),
         Row("key_grads again attention-512", (2.03, 0.48), second=(2.29, 0.80), why=FRAGMENTS),
         Row("key_grads attention-576-512", (2.22, 0.40), second=(2.40, 0.61), why=FRAGMENTS),
         Row("key_grads again attention-576-512", (2.07, 0.48), second=(2.32, 0.77), why=FRAGMENTS),
    ],
}
# fmt: on

"""How much the loops of the CUDA kernels may cost, by kernel and head size; as compiled by nvcc 13.0."""

from limits import Row

MASKS = "each score of a masked step is compared and selected at both ends of its span"
FRAGMENTS = "a fragment that ldmatrix reads from shared memory serves a warp's 16 rows alone"
PARTS = FRAGMENTS + ", and warps that share these rows add up their parts of the scores there"
SMALL = "heads of 32 have half as many products as those of 64 for the same exponentials and masks"
SUMS = "sums over positives of rows and columns go from lane to lane, beside those over all pairs"

# fmt: off
LIMITS = [
    # Hopper's own, ...
    Row("span_attention_forward_sm90_kernel<*, 64>", (1.06, 0.89), (1.57, 1.42), [(1.00, 0.89)], why=MASKS),
    Row("span_attention_forward_sm90_kernel<*, 80>", (1.00, 0.72), (1.26, 1.14), [(1.00, 0.74)], why=MASKS),
    Row("span_attention_forward_sm90_kernel<*, 96>", (1.00, 0.61), (1.03, 0.97), [(1.00, 0.64)]),
    Row("span_attention_forward_sm90_kernel<*, 128>", (1.00, 0.47), (1.00, 0.73), [(1.00, 0.52)]),
    Row("span_attention_forward_sm90_kernel<*, 192>", (1.00, 0.34), (1.00, 0.52), [(1.00, 0.45)]),
    Row("span_attention_forward_sm90_kernel<*, 256>", (1.00, 0.33), (1.00, 0.47), [(1.00, 0.51)]),
    Row("query_grad_kernel<*, 64>", (1.00, 0.56), (1.00, 0.86)),
    Row("query_grad_kernel<*, 80>", (1.00, 0.46), (1.00, 0.70)),
    Row("query_grad_kernel<*, 96>", (1.00, 0.39), (1.00, 0.59)),
    Row("query_grad_kernel<*, 128>", (1.00, 0.31), (1.00, 0.46)),
    Row("key_grads_kernel<*, 64>", (1.00, 0.58), (1.05, 0.94)),
    Row("key_grads_kernel<*, 80>", (1.00, 0.51), (1.20, 0.79)),
    Row("key_grads_kernel<*, 96>", (1.00, 0.44), (1.13, 0.68)),
    Row("key_grads_kernel<*, 128>", (1.00, 0.37), (1.04, 0.54)),
    # ... and its losses, (Same)0 without ids. Outer loops are of features of 512, 768 and 1024.
    Row("*SigLipPass<*, (Same)0, true>>", (1.00, 0.11), outer=[(1.00, 0.55), (1.00, 0.40), (1.00, 0.33)]),
    Row("*SigLipPass<*, (Same)1, true>>", (1.00, 0.11), outer=[(1.06, 1.07), (1.00, 0.75), (1.00, 0.59)]),
    Row("*SigLipPass<*, (Same)2, true>>", (1.00, 0.11), outer=[(1.00, 1.03), (1.00, 0.73), (1.00, 0.57)]),
    Row("*SigLipPass<*, (Same)0, false>>", (1.00, 0.11), outer=[(1.00, 0.35), (1.00, 0.27), (1.00, 0.23)]),
    Row("*SigLipPass<*, (Same)1, false>>", (1.00, 0.11), outer=[(1.00, 0.71), (1.00, 0.51), (1.00, 0.41)]),
    Row("*SigLipPass<*, (Same)2, false>>", (1.00, 0.11), outer=[(1.00, 0.71), (1.00, 0.51), (1.00, 0.41)]),
    Row("*ClipStatisticsPass<*, (Same)0>>", (1.00, 0.11), outer=[(1.00, 0.63), (1.00, 0.46), (1.00, 0.37)]),
    Row("*ClipStatisticsPass<*, (Same)1>>", (1.00, 0.11), outer=[(1.36, 1.14), (1.12, 0.80), (1.00, 0.63)], why=SUMS),
    Row("*ClipStatisticsPass<*, (Same)2>>", (1.00, 0.11), outer=[(1.00, 0.71), (1.00, 0.51), (1.00, 0.41)]),
    Row("*ClipGradientPass<*, (Same)0>>", (1.00, 0.11), outer=[(1.00, 0.52), (1.00, 0.38), (1.00, 0.32)]),
    Row("*ClipGradientPass<*, (Same)1>>", (1.00, 0.11), outer=[(1.04, 0.74), (1.00, 0.53), (1.00, 0.43)]),
    Row("*ClipGradientPass<*, (Same)2>>", (1.00, 0.11), outer=[(1.00, 0.60), (1.00, 0.43), (1.00, 0.35)]),
    # For sm_80 and later: the worst of all architectures, mostly sm_120, where ptxas adds a NOP to every other product.
    Row("span_attention_forward_kernel<*, 32>", (1.10, 1.10), (2.75, 2.20), [(1.11, 1.11)], why=SMALL),
    Row("span_attention_forward_kernel<*, 64>", (1.00, 0.71), (1.38, 1.28), [(1.00, 0.74)], why=MASKS),
    Row("span_attention_forward_kernel<*, 80>", (1.00, 0.64), (1.10, 1.08), [(1.00, 0.65)]),
    Row("span_attention_forward_kernel<*, 96>", (1.17, 0.64), (1.26, 1.08), [(1.17, 0.65)], why=FRAGMENTS),
    Row("span_attention_forward_kernel<*, 128>", (1.06, 0.59), (1.12, 0.92), [(1.06, 0.62)]),
    Row("span_attention_forward_kernel<*, 192>", (1.31, 0.61), (1.35, 0.83), [(1.31, 0.63)], why=FRAGMENTS),
    Row("span_attention_forward_kernel<*, 256>", (1.30, 0.56), (1.33, 0.72), [(1.30, 0.58)], why=FRAGMENTS),
    Row("span_attention_forward_kernel<*, 384>", (1.47, 0.63), (1.51, 0.84), [(1.47, 0.65)], why=PARTS),
    Row("span_attention_forward_kernel<*, 512>", (1.42, 0.57), (1.45, 0.74), [(1.42, 0.59)], why=PARTS),
    Row("span_attention_forward_kernel<*, 576>", (1.40, 0.59), (1.43, 0.72), [(1.40, 0.61)], why=PARTS),
    Row("span_attention_query_gradient_kernel<*, 32>", (1.25, 0.83), (1.42, 1.41), [(1.25, 0.84)], why=SMALL),
    Row("span_attention_query_gradient_kernel<*, 64>", (1.05, 0.55), (1.14, 0.84), [(1.05, 0.56)]),
    Row("span_attention_query_gradient_kernel<*, 80>", (1.05, 0.49), (1.11, 0.72), [(1.05, 0.50)]),
    Row("span_attention_query_gradient_kernel<*, 96>", (1.06, 0.51), (1.12, 0.71), [(1.06, 0.51)]),
    Row("span_attention_query_gradient_kernel<*, 128>", (1.05, 0.45), (1.09, 0.60), [(1.05, 0.46)]),
    Row("span_attention_query_gradient_kernel<*, 192>", (1.40, 0.46), (1.43, 0.57), [(1.40, 0.47)], why=FRAGMENTS),
    Row("span_attention_query_gradient_kernel<*, 256>", (1.39, 0.43), (1.41, 0.53), [(1.39, 0.45)], why=FRAGMENTS),
    Row("span_attention_query_gradient_kernel<*, 384>", (1.95, 0.66), outer=[(1.95, 0.68)], why=PARTS),
    Row("span_attention_query_gradient_kernel<*, 512>", (1.46, 0.55), outer=[(1.46, 0.56)], why=PARTS),
    Row("span_attention_query_gradient_kernel<*, 576>", (1.42, 0.52), outer=[(1.42, 0.56)], why=PARTS),
    Row("span_attention_key_gradient_kernel<*, 32, *>", (1.35, 0.82), (1.86, 1.50), why=SMALL),
    Row("span_attention_key_gradient_kernel<*, 64, *>", (1.22, 0.55), (1.48, 0.89), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 80, *>", (1.19, 0.49), (1.40, 0.76), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 96, *>", (1.37, 0.50), (1.54, 0.72), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 128, *>", (1.35, 0.45), (1.48, 0.62), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 192, false, *>", (1.08, 0.54), (1.25, 0.75), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 192, true, *>", (1.43, 0.49), (1.54, 0.63), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 256, false, *>", (1.06, 0.51), (1.19, 0.66)),
    Row("span_attention_key_gradient_kernel<*, 256, true, *>", (1.41, 0.49), (1.50, 0.60), why=FRAGMENTS),
    Row("span_attention_key_gradient_kernel<*, 384, *>", (1.77, 0.71), why=PARTS),
    Row("span_attention_key_gradient_kernel<*, 512, *>", (1.65, 0.63), why=PARTS),
    Row("span_attention_key_gradient_kernel<*, 576, *>", (1.86, 0.58), why=PARTS),
    Row("clip_statistics_kernel<*>", (1.00, 0.32)),
    Row("gradient_kernel<*>", (1.00, 0.32)),
    Row("patch_embed_kernel<__*>", (1.00, 0.44)),
    Row("patch_embed_kernel<float, false*>", (1.00, 0.74)),
    Row("patch_images_grad_kernel<__*>", (1.00, 0.40)),
    Row("patch_images_grad_kernel<float, false>", (1.00, 0.79)),
    Row("patch_weight_grad_kernel<__*>", (1.00, 0.39)),
    Row("patch_weight_grad_kernel<float, false*>", (1.00, 0.85)),
]
# fmt: on

// Gradients of attention for Hopper, up to head_dim 128: bulk copies, wgmma, a producer and two consumer warpgroups;
// the same bits in every run, and the sums of sm80/attention_backward.cu.
//
//     P = 2^(S - lse)    dP = dO v^T    dS = P (dP - delta)    dq = dS k    dk = dS^T q    dv = P^T dO
//
// After delta (attention_delta.cu), two persistent kernels (schedule.cuh):
//
//   query_gradient   a block takes 128 queries of one head, a consumer 64 of them, and walks 128 keys at a time:
//                    S = q k^T and dP = dO v^T, both from shared memory, dq += dS k with dS from registers
//   key_gradient     a block takes 128 keys of one key head, a consumer 64 of them, and walks the queries of each of
//                    the head's query heads, 64 or 128 at a time: S^T = k q^T and dP^T = v dO^T from shared memory,
//                    dv += P^T dO and dk += dS^T q with P^T and dS^T from registers
//
// They are in query_gradient.cuh and key_gradient.cuh; what head_dim above 128 takes is in attention_backward_wide.cu.
//
// S and dP are computed twice. One pass would save two products in seven, but then the parts of dq that blocks of keys
// have must meet in memory: 64 KB of fp32 to add, read and write, for every 128 x 128 scores, in an order that has to
// be waited for to be the same in every run. With two passes every sum has one order by itself, and no memory besides.
//
// A consumer issues the products that use what it made of the tile before together with those of the next tile, in turn
// with the other group, and does its exponentials under that one's products:
//
//     group 0   dq += dS(i-1) k(i-1) | dP(i) | S(i) |   dS(i) from S(i), dP(i)      |
//     group 1                                       | dq += dS(i-1) k(i-1) | dP(i) | S(i) |   ...
//
// Registers are what bounds the tiles: 64 for dq and 128 for S and dP of 128 keys; 128 for dk and dv and 64 for S and
// dP of 64 queries (head_dim 128). Packed dS takes the place of S. So S(i) is issued when the product of dS(i-1) is
// done, under dP(i); and in the other kernel S(i) under the second of the two products with what was packed.
//
// For 128 rows and 128 keys at head_dim 128, in cycles of a multiprocessor at 4,096 operations and 128 bytes of shared
// memory a cycle:
//
//                    tensor cores   shared memory, wgmma and copies   exp2, 16 a cycle   from L2
//   query_gradient          3,072                     2,048 +   512              1,024   64 KB, 21 bytes a cycle
//   key_gradient            4,096                     3,072 +   512              1,024   64 KB, 16 bytes a cycle
//
// Bound by the tensor cores; 7,168 cycles a tile, of which 5,120 are what is usually counted as the work of a backward
// pass (71%). The schedulers issue about 8 instructions a score in the first and 10 in the second (SASS): 1,024 and
// 1,280 cycles.
//
// Rows past a sequence's end would reach a sum as 0 x NaN, and there the next sequence of the batch begins: the last
// tile of keys, or of queries and grad_out, is copied row by row, with zeros from its end on.
#include "key_gradient.cuh"
#include "query_gradient.cuh"

namespace longrope {
namespace {

template <class T, int kHeadDim>
void run(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
         int64_t key_tokens, Stream stream) {
    launch_query_gradient<T, kHeadDim>(params, scratch, query_tokens, key_tokens, stream);
    launch_key_gradient<KeyShape<kHeadDim>>(key_gradient_sm90_kernel<T, kHeadDim>, params, scratch, query_tokens,
                                            key_tokens, stream);
}

template <class T>
void run_of_width(const AttentionBackwardParams& params, const BackwardScratch& scratch, int64_t query_tokens,
                  int64_t key_tokens, Stream stream) {
    const int64_t head_dim = params.forward.head_dim;
    if (head_dim <= 64) return run<T, 64>(params, scratch, query_tokens, key_tokens, stream);
    if (head_dim <= 96) return run<T, 96>(params, scratch, query_tokens, key_tokens, stream);
    run<T, 128>(params, scratch, query_tokens, key_tokens, stream);
}

}  // namespace

void attention_backward_sm90(const AttentionBackwardParams& params, const BackwardScratch& scratch,
                             int64_t query_tokens, int64_t key_tokens, Stream stream) {
    attention_delta(params, scratch, stream);
    if (params.forward.head_dim > 128)
        return attention_backward_wide_sm90(params, scratch, query_tokens, key_tokens, stream);
    if (params.forward.dtype == Dtype::kFloat16)
        return run_of_width<Half>(params, scratch, query_tokens, key_tokens, stream);
    run_of_width<BFloat16Bits>(params, scratch, query_tokens, key_tokens, stream);
}

}  // namespace longrope

// The decode of caches in the dtype of the query, and which source has the others.
#include "attention_decode.cuh"

namespace longrope {

void attention_decode_sm80(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    if (params.pages.key_scale != nullptr) {
        if (params.pages.stored == Stored::kFp8) return attention_decode_fp8(params, scratch, stream);
        return attention_decode_int8(params, scratch, stream);
    }
    if (params.dtype == Dtype::kFloat16) return run_decode_of_width<Half, Half>(params, scratch, stream);
    run_decode_of_width<BFloat16Bits, BFloat16Bits>(params, scratch, stream);
}

}  // namespace longrope

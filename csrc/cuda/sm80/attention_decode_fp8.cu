#include "attention_decode.cuh"

namespace longrope {

void attention_decode_fp8(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    run_quantised_decode<Fp8>(params, scratch, stream);
}

}  // namespace longrope

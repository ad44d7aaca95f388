#include "attention_decode.cuh"

namespace longrope {

void attention_decode_int8(const AttentionParams& params, const AttentionScratch& scratch, Stream stream) {
    run_quantised_decode<int8_t>(params, scratch, stream);
}

}  // namespace longrope

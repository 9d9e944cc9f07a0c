// AVX-512 with the products of pairs of AVX512-BF16: twice as many in an instruction, and nothing of a weight is
// widened. Everything else is the avx512 table. References: Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2, VDPBF16PS.
#define MOE_ISA avx512_bf16
#define MOE_VECTOR_BYTES 64
#define MOE_ACCUMULATORS 24
#define MOE_TILE_VECTORS 4
#include "gemm/avx512.h"
#include "gemm/dot.h"
#include "gemm/dot_fours.h"
#include "gemm/dot_stream.h"
#include "gemm/outer.h"
#include "gemm/pack.h"

namespace moe::avx512_bf16 {

template <typename Storage>
const Kernels<Storage>& table() {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    static const Kernels<BFloat16> kTable = [] {
      Kernels<BFloat16> with_pairs = avx512::table<BFloat16>();
      with_pairs.outer_pairs = outer<float, true>;
      with_pairs.pack_pairs = pack_pairs;
      with_pairs.pack_pairs_transposed = pack_pairs_transposed;
      with_pairs.dot = dot<BFloat16>;
      with_pairs.dot_fours_pairs = dot_fours<float, true>;
      with_pairs.arrange_for_dot = arrange_for_dot<BFloat16>;
      with_pairs.dot_step = kDotStep<BFloat16>;
      with_pairs.dot_width = kDotParts<BFloat16> * kLanes<float>;
      return with_pairs;
    }();
    return kTable;
  } else {
    return avx512::table<Storage>();
  }
}

template const Kernels<float>& table<float>();
template const Kernels<BFloat16>& table<BFloat16>();
template const Kernels<Float16>& table<Float16>();
template const Kernels<double>& table<double>();

}  // namespace moe::avx512_bf16

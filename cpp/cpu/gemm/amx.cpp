// AVX-512 with the tile unit of AMX for BFloat16: 16 x 16 sums of 32 products in one instruction. Everything else is
// the avx512 table. References: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#define MOE_ISA amx
#define MOE_VECTOR_BYTES 64
#define MOE_ACCUMULATORS 24
#define MOE_TILE_VECTORS 4
#include <immintrin.h>

#include <algorithm>

#include "gemm/avx512.h"
#include "gemm/kernels.h"
#include "gemm/pack.h"
#include "gemm/simd.h"

namespace moe::amx {
namespace {

constexpr int64_t kDepth = MatrixUnits::kDepth, kGroup = MatrixUnits::kColumns, kTile = 16 * kDepth;

// The eight tiles: four of c, two of a, two of b. NOTE: macros, because the intrinsics paste their names into assembly.
#define C00 0
#define C01 1
#define C10 2
#define C11 3
#define A0 4
#define A1 5
#define B0 6
#define B1 7

// Sets the shapes of the tiles for `rows` rows of a, and gives the unit back: its state is not carried between calls,
// so that threads of other code never pay for it.
class TileShapes {
 public:
  explicit TileShapes(int64_t rows) {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&](int tile, int64_t height) {
      config.bytes_per_row[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(height);
    };
    const int64_t first = std::min<int64_t>(rows, 16), second = std::max<int64_t>(rows - 16, 1);
    for (const int tile : {C00, C01, A0}) set(tile, first);
    for (const int tile : {C10, C11, A1}) set(tile, second);
    for (const int tile : {B0, B1}) set(tile, 16);
    _tile_loadconfig(&config);
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// One or two tiles of a times one or two of b.
template <int ATiles, int BTiles>
void multiply_tiles(const BFloat16* a, int64_t lda, const BFloat16* b, int64_t group, int64_t k, float* c, int64_t ldc,
                    bool add) {
  const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
  float* below = c + 16 * ldc;
  if (add) {
    _tile_loadd(C00, c, c_bytes);
    if constexpr (BTiles > 1) _tile_loadd(C01, c + 16, c_bytes);
    if constexpr (ATiles > 1) _tile_loadd(C10, below, c_bytes);
    if constexpr (ATiles > 1 && BTiles > 1) _tile_loadd(C11, below + 16, c_bytes);
  } else {
    _tile_zero(C00);
    if constexpr (BTiles > 1) _tile_zero(C01);
    if constexpr (ATiles > 1) _tile_zero(C10);
    if constexpr (ATiles > 1 && BTiles > 1) _tile_zero(C11);
  }
  for (int64_t x = 0; x < k; x += kDepth, b += kTile) {
    _tile_loadd(A0, a + x, a_bytes);
    _tile_loadd(B0, b, 64);
    _tile_dpbf16ps(C00, A0, B0);
    if constexpr (BTiles > 1) {
      _tile_loadd(B1, b + group, 64);
      _tile_dpbf16ps(C01, A0, B1);
    }
    if constexpr (ATiles > 1) {
      _tile_loadd(A1, a + 16 * lda + x, a_bytes);
      _tile_dpbf16ps(C10, A1, B0);
      if constexpr (BTiles > 1) _tile_dpbf16ps(C11, A1, B1);
    }
  }
  _tile_stored(C00, c, c_bytes);
  if constexpr (BTiles > 1) _tile_stored(C01, c + 16, c_bytes);
  if constexpr (ATiles > 1) _tile_stored(C10, below, c_bytes);
  if constexpr (ATiles > 1 && BTiles > 1) _tile_stored(C11, below + 16, c_bytes);
}

void multiply(const BFloat16* a, int64_t lda, int64_t rows, const BFloat16* b, int64_t groups, int64_t k, float* c,
              int64_t ldc, bool add) {
  const TileShapes shapes(rows);
  const int64_t group = k * kGroup;
  const auto run = [&]<int ATiles>() {
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2) {
      multiply_tiles<ATiles, 2>(a, lda, b + g * group, group, k, c + g * kGroup, ldc, add);
    }
    if (g < groups) multiply_tiles<ATiles, 1>(a, lda, b + g * group, group, k, c + g * kGroup, ldc, add);
  };
  rows > 16 ? run.template operator()<2>() : run.template operator()<1>();
}

// Pairs of 16-bit elements travel as numbers of 32 bits, whose value nobody looks at.
using Pairs = Vec<float>;

inline Pairs load_words(const BFloat16* p, int64_t count) {  // of up to 32 elements, the others zero
  const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(count, 0)) - 1;
  return reinterpret_cast<Pairs>(_mm512_maskz_loadu_epi16(mask, p));
}
inline void store_words(BFloat16* p, Pairs x) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(x)); }

void pack_columns(const BFloat16* const* rows, int64_t n, int64_t k, BFloat16* b) {
  for (int64_t j = 0; j < n; j += kGroup) {
    for (int64_t x = 0; x < k; x += kDepth, b += kTile) {
      Pairs square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) square[i] = j + i < n ? load_words(rows[j + i] + x, 32) : Pairs{};
      transpose_square<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store_words(b + i * 32, square[i]);
    }
  }
}

// Elements j of two rows side by side, for j of the first and of the second half of 32.
inline void interleave(Pairs even, Pairs odd, Pairs& first, Pairs& second) {
  alignas(64) static constexpr auto kOrder = [] {
    struct {
      int16_t first[32], second[32];
    } order{};
    for (int16_t i = 0; i < 32; ++i) {
      order.first[i] = static_cast<int16_t>(i / 2 + (i % 2) * 32);
      order.second[i] = static_cast<int16_t>(order.first[i] + 16);
    }
    return order;
  }();
  const __m512i a = reinterpret_cast<__m512i>(even), b = reinterpret_cast<__m512i>(odd);
  first = reinterpret_cast<Pairs>(_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.first), b));
  second = reinterpret_cast<Pairs>(_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.second), b));
}

void pack_rows(const BFloat16* const* rows, int64_t k, int64_t n, int64_t stride, BFloat16* b) {
  constexpr int64_t kPairsAhead = 2;
  for (int64_t x = 0; x < (k + kDepth - 1) / kDepth * kDepth; x += 2, b += 32) {
    const BFloat16* even = x < k ? rows[x] : nullptr;
    const BFloat16* odd = x + 1 < k ? rows[x + 1] : nullptr;
    const BFloat16* later[] = {rows[std::min(x + 2 * kPairsAhead, k - 1)],
                               rows[std::min(x + 2 * kPairsAhead + 1, k - 1)]};
    for (int64_t j = 0; j < n; j += 32) {
      fetch(later[0] + j);
      fetch(later[1] + j);
      Pairs first, second;
      interleave(even ? load_words(even + j, n - j) : Pairs{}, odd ? load_words(odd + j, n - j) : Pairs{}, first,
                 second);
      BFloat16* out = b + j / kGroup * stride;
      store_words(out, first);
      if (j + kGroup < n) store_words(out + stride, second);
    }
  }
}

void pack_transposed(const BFloat16* const* rows, int64_t k, int64_t m, BFloat16* a, int64_t lda) {
  for (int64_t i = 0; i < m; i += 32) {
    for (int64_t x = 0; x < k; x += kDepth) {
      Pairs first[16], second[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) {
        const int64_t r = x + 2 * p;
        interleave(r < k ? load_words(rows[r] + i, m - i) : Pairs{},
                   r + 1 < k ? load_words(rows[r + 1] + i, m - i) : Pairs{}, first[p], second[p]);
      }
      transpose_square<float>(first);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) store_words(a + (i + p) * lda + x, first[p]);
      if (i + 16 >= m) continue;
      transpose_square<float>(second);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) store_words(a + (i + 16 + p) * lda + x, second[p]);
    }
  }
}

constexpr MatrixUnits kUnits{multiply, pack_columns, pack_rows, pack_transposed};

}  // namespace

template <typename Storage>
const Kernels<Storage>& table() {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    static const Kernels<BFloat16> kTable = [] {
      Kernels<BFloat16> with_units = avx512::table<BFloat16>();
      with_units.matrix_units = &kUnits;
      return with_units;
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

}  // namespace moe::amx

// What one instruction set offers to the operators: one table of functions per storage type. The rows of the table,
// best first, are in kernels.inc; dispatch.cpp picks the first that the processor has.
#pragma once

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "gemm/matrix_units.h"
#include "moe/activation.h"

namespace moe {

// Sizes of a micro-kernel's tile that callers lay out memory by.
inline constexpr int64_t kMaxTileRows = 8;     // rows of p in `outer`
inline constexpr int64_t kMaxTileVectors = 4;  // width of q in `outer`, in vectors

inline constexpr int64_t kMaxDotRows = 8;     // rows of a in `dot`
inline constexpr int64_t kFewDotRows = 4;     // so few that multiplying leaves time to read all of them from the cache
inline constexpr int64_t kMaxFoursRows = 24;  // rows of a in `dot_fours`
inline constexpr int64_t kRowsOfVector = 4;   // that share a vector there

// What becomes of a tile.
enum class TileStore : int8_t {
  kWrite,
  kAdd,     // to what is there, before the first product: a sum cut into parts is the sum
  kStream,  // past the caches; rows of c lie on multiples of kStreamAlignment
};
inline constexpr int64_t kStreamAlignment = 64;

inline constexpr int64_t kCacheLine = 64;

// What a tile fetches into the second-level cache while it computes: `lines` cache lines a step, 1 to 4, from `at`
// on, and what lies `again` bytes after them, unless that is 0. After `left` steps it goes on `skip` bytes further, and
// so after every `steps` more.
struct Fetch {
  const char* at = nullptr;  // null: nothing
  int64_t lines = 0, left = 0, steps = 0, skip = 0, again = 0;
};

// Storage is float, BFloat16, Float16 or double; the arithmetic is in Real: double for double, else float.
// "Rows" arguments are arrays of pointers: gathering costs nothing. No alignment is required of anything.
template <typename Storage>
struct Kernels {
  using Real = Wide<Storage>;

  int lanes;               // Real values per vector
  int narrow_lanes;        // of the vector that a tile may end with: half as many, or the same
  int accumulators;        // vectors of a tile that fit in registers: rows * vectors <= accumulators
  int tile_vectors;        // widest tile of `outer`, in vectors
  int most_fours_rows;     // of `dot_fours`; of more, the panels of `outer` waste few lanes; 0: there is none
  int most_in_place_rows;  // for which `outer` reads an in_out weight where it lies faster than packed
  int dot_step;            // elements of a row that `dot` multiplies at a time
  int dot_width;           // numbers in whose room `arrange_for_dot` puts them

  int64_t panel() const { return int64_t{tile_vectors} * lanes; }
  int64_t tile_rows(int64_t vectors) const { return std::min(kMaxTileRows, accumulators / vectors); }

  // c[i, j] (+)= sum over x < k of p[i][x] * q[x, j], for i < rows and j < width, a multiple of narrow_lanes; row x of
  // q begins at q + x * ldq. rows * ceil(width / lanes) <= accumulators.
  void (*outer)(int rows, int width, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc,
                TileStore how, Fetch fetch);

  // The same where p and q hold pairs of BFloat16, each of the size of a Real, and the product of two pairs is the sum
  // of two products; of BFloat16 only, where the processor has such products. Subnormal numbers count as zero in it.
  void (*outer_pairs)(int rows, int width, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c,
                      int64_t ldc, TileStore how, Fetch fetch) = nullptr;
  // What packs for it along rows: pair x of q are elements of rows 2 x and 2 x + 1, or zero where there is none.
  // Panels of pairs as of `pack`, each [ceil(k / 2), width].
  void (*pack_pairs)(const Storage* const* rows, int64_t k, int64_t n, int64_t width, Real* q) = nullptr;
  // q[x, i] = the pair of rows[2 i][x] and rows[2 i + 1][x], for 2 i < m; the other columns of q, up to width, are
  // zero.
  void (*pack_pairs_transposed)(const Storage* const* rows, int64_t m, int64_t k, int64_t width, Real* q) = nullptr;

  // c[i, j] (+)= <a_i, w + j * stride> for i < rows <= kMaxDotRows and j < columns, over k elements. The rows a_i are
  // arranged (below), w is not. `next` is the w of the call after this one, or null: it is only fetched.
  void (*dot)(int rows, int64_t columns, const Real* a, const Storage* w, int64_t stride, int64_t k,
              const Storage* next, Real* c, int64_t ldc, TileStore how);
  // c[i, j] (+)= <a[i], w + j * stride> for i < rows <= most_fours_rows and j < columns <= tile_rows(ceil(rows /
  // kRowsOfVector)), over k numbers; w is read where it lies, q is what pack_fours makes of a.
  void (*dot_fours)(int rows, int columns, const Real* q, const Real* w, int64_t stride, int64_t k, Real* c,
                    int64_t ldc, TileStore how, Fetch fetch);
  // The same of pairs of BFloat16, as outer_pairs is to outer.
  void (*dot_fours_pairs)(int rows, int columns, const Real* q, const Real* w, int64_t stride, int64_t k, Real* c,
                          int64_t ldc, TileStore how, Fetch fetch) = nullptr;
  // [ceil(k / depth)][ceil(m / kRowsOfVector)] vectors, of `depth` = lanes / kRowsOfVector numbers, or pairs, of each
  // row; what pads m and k is zero.
  void (*pack_fours)(const Real* const* rows, int64_t m, int64_t k, Real* q);
  // Widens a row of n elements into steps, `stride` apart, the last one padded with zeros. Of several rows, the first
  // step of each comes first, then the second of each, and so on: one stream.
  void (*arrange_for_dot)(const Storage* src, int64_t n, Real* dst, int64_t stride);

  // q[x, i] = rows[i][x] for x < k and i < m; columns m .. width of q are zero.
  void (*pack_transposed)(const Storage* const* rows, int64_t m, int64_t k, int64_t width, Real* q);
  // The same for numbers that are Real already, or pairs.
  void (*pack_reals_transposed)(const Real* const* rows, int64_t m, int64_t k, int64_t width, Real* q);
  // Panels of `width` columns, one after the other, each [k, width]: q holds rows[x][0 .. n) for x < k; columns past n
  // are zero. Each row is read from end to end.
  void (*pack)(const Storage* const* rows, int64_t k, int64_t n, int64_t width, Real* q);
  // dst[j, i] = src[i, j] for i < rows and j < columns.
  void (*transpose)(const Real* src, int64_t ld_src, int64_t rows, int64_t columns, Real* dst, int64_t ld_dst);

  void (*widen_row)(const Storage* src, int64_t n, Real* dst);
  void (*narrow_row)(const Real* src, int64_t n, Storage* dst);
  // The same past the caches: dst on a multiple of kStreamAlignment bytes, n of them a multiple of it, too.
  void (*stream_row)(const Real* src, int64_t n, Storage* dst);
  // To be called after stores past the caches, before another thread may read them.
  void (*finish_streams)();
  // y += s * x
  void (*axpy)(Real s, const Real* x, int64_t n, Real* y);
  Real (*dot_row)(const Real* x, const Real* y, int64_t n);
  // out = act(gate, up); `up` is not read unless the activation is gated.
  void (*activate)(const ActivationOptions& options, const Real* gate, const Real* up, int64_t n, Real* out);
  // grad_gate, grad_up = d act(gate, up) * grad_out
  void (*activate_backward)(const ActivationOptions& options, const Real* grad_out, const Real* gate, const Real* up,
                            int64_t n, Real* grad_gate, Real* grad_up);

  // x *= s
  void (*scale)(Real s, int64_t n, Real* x);

  const MatrixUnits* matrix_units = nullptr;  // of BFloat16 only, where the processor has them

  // For the machine's floor. `repeats` rounds of independent FMAs, one per accumulator; returns how many numbers'
  // worth.
  int64_t (*fma_rounds)(int64_t repeats, Real* sink);
  // The sum of kMaxTileRows runs of n numbers each, read side by side.
  Real (*read_streams)(const Real* data, int64_t n);
};

// The table of the instruction set in use (moe/isa.h).
template <typename Storage>
const Kernels<Storage>& kernels();

}  // namespace moe

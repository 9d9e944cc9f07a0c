// The producer warpgroup's tools: TMA for what is contiguous, cp.async for rows that are read through the plan.
#pragma once

#include "grouped_gemm.cuh"
#include "grouped_gemm_sm90_tile.cuh"
#include "grouped_gemm_sm90_walk.cuh"

namespace moe::cuda::sm90 {

// The ring as the producer sees it. When rows are copied by threads, their arrival is told `kLag` stages late: by then
// the copies have landed, the thread's fence shows them to wgmma (the async proxy), and the loads of the stages in
// between were already on their way. A stage that were held back for a whole round would never be handed back.
template <typename Tile>
class Filler {
  static constexpr int kLag = Tile::kStages / 2;

 public:
  // Arrivals on a full barrier: the thread that starts TMA, and the warps that copy.
  static __device__ int arrivals(bool copies) { return copies ? 1 + kGroupThreads / 32 : 1; }

  __device__ explicit Filler(Pipeline<Tile>& pipeline) : pipeline_(pipeline) {}

  // Waits until the stage may be overwritten.
  __device__ void acquire() const {
    ptx::mbar_wait(ptx::smem_u32(&pipeline_.empty[ring_.stage]),
                   ring_.parity ^ (MOE_BUG(grouped_gemm_sm90, 9) ? 0 : 1));
  }

  __device__ uint32_t barrier() const { return ptx::smem_u32(&pipeline_.full[ring_.stage]); }
  __device__ uint32_t rows() const { return ptx::smem_u32(pipeline_.stage[ring_.stage]); }
  __device__ uint32_t columns() const { return rows() + Tile::kRowBytes; }

  // By the one thread that starts the TMA loads of a stage, before them.
  __device__ void expect(int bytes) const {
    if (MOE_BUG(grouped_gemm_sm90, 10)) bytes -= Tile::kColumnBytes / 2;
    ptx::mbar_arrive_expect_tx(barrier(), bytes);
  }

  __device__ void advance() { ring_.advance(); }

  // By all threads, after the copies of a stage.
  __device__ void commit_copies() {
    ptx::cp_async_commit();
    if (held_ == kLag) {
      if (MOE_BUG(grouped_gemm_sm90, 11))
        ptx::cp_async_wait<kLag + 1>();
      else
        ptx::cp_async_wait<kLag>();
      tell();
    } else {
      ++held_;
    }
    ring_.advance();
  }

  // After the last stage.
  __device__ void finish_copies() {
    ptx::cp_async_wait<0>();
    for (; held_ > (MOE_BUG(grouped_gemm_sm90, 12) ? 1 : 0); --held_) tell();
  }

 private:
  __device__ void tell() {
    if (!MOE_BUG(grouped_gemm_sm90, 13)) ptx::fence_proxy_async();
    if (!MOE_BUG(grouped_gemm_sm90, 14)) __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(ptx::smem_u32(&pipeline_.full[told_.stage]));
    told_.advance();
  }

  Pipeline<Tile>& pipeline_;
  Ring<Tile::kStages> ring_, told_;
  int held_ = 0;
};

// Column `inside` of a tile, as a column of the weight. Args has n, in_out, and concat, which tells that the lower half
// of a tile's columns are gates and the upper half their ups.
template <typename Tile, typename Args>
__device__ __forceinline__ int64_t weight_column(const Args& args, int column_tile, int inside) {
  constexpr int kHalf = Tile::kColumns / 2;
  if (args.concat) return int64_t{column_tile} * kHalf + inside % kHalf + inside / kHalf * (args.n / 2);
  return int64_t{column_tile} * Tile::kColumns + inside;
}

// The weight's part of a stage: as K-major rows in two boxes, one per half, or MN-major in chunks of 64 columns. Where
// the blocks of a cluster have the same part, each loads about half of the boxes for both.
template <typename Tile, typename Args>
__device__ __forceinline__ void load_weight(const Filler<Tile>& filler, const CUtensorMap& map, const Args& args,
                                            const TileAt& at, int k) {
  const auto load = [&](int box, int boxes, int x, int y) {
    const uint32_t to = filler.columns() + box * (Tile::kColumnBytes / boxes);
    if (Tile::kBlocks > 1 && at.is_shared) {
      constexpr uint16_t kBoth = 3;
      if (box * 2 / boxes == static_cast<int>(ptx::cluster_rank())) {
        ptx::tma_load_3d_multicast(to, &map, filler.barrier(), kBoth, x, y, at.expert);
      }
    } else if (Tile::kReadsWeightOnce) {
      ptx::tma_load_3d_once(to, &map, filler.barrier(), x, y, at.expert);
    } else {
      ptx::tma_load_3d(to, &map, filler.barrier(), x, y, at.expert);
    }
  };
  const auto column = [&](int inside) { return static_cast<int>(weight_column<Tile>(args, at.column_tile, inside)); };
  if (args.in_out) {
#pragma unroll
    for (int box = 0; box < Tile::kColumns / 64; ++box) load(box, Tile::kColumns / 64, column(box * 64), k);
  } else {
#pragma unroll
    for (int box = 0; box < 2; ++box) load(box, 2, k, column(box * (Tile::kColumns / 2)));
  }
}

// The slot of row r, or -1.
__device__ __forceinline__ int slot_of(const Gather& gather, int r) {
  const int slot = __ldg(gather.row_to_slot + r);
  return slot >= 0 && slot < gather.num_slots ? slot : -1;
}

// Row r of the operand in its source, or -1 where a zero is read.
__device__ __forceinline__ int source_row(const Gather& gather, int r) {
  if (gather.row_to_slot == nullptr) return r;
  const int slot = slot_of(gather, r);
  return slot < 0 ? -1 : slot / static_cast<int>(gather.top_k);
}

// One 16-byte piece; zeros when it is not `inside`.
template <typename T>
__device__ __forceinline__ void copy_piece(uint32_t to, const T* source, int64_t at, bool inside) {
  ptx::cp_async16(to, inside ? source + at : source, inside ? 16 : 0);
}

// K-major rows of a tile: 64 of the contracted width for each of kRows rows. Eight threads read one row's 128 bytes.
template <typename T, int kRows>
class RowCopier {
  static constexpr int kPasses = kRows / (kGroupThreads / 8);

 public:
  __device__ RowCopier(const T* source, int64_t width) : source_(source), width_(width) {}

  // The tile has rows [first, first + rows), row r of them being source_of(r) or, for -1, zeros; the others of kRows
  // are zeros.
  template <typename SourceOf>
  __device__ void set_rows(const SourceOf& source_of, int first, int rows) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int r = row(i);
      row_[i] = r < rows + (MOE_BUG(grouped_gemm_sm90, 15) ? 1 : 0) ? source_of(first + r) : -1;
    }
  }

  // Rows from `end` on are left.
  __device__ void copy(uint32_t to, int64_t k, int end = kRows) const {
    const int piece = threadIdx.x % 8;
    const int64_t at = k + piece * 8;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (row(i) >= end) break;
      copy_piece(to + swizzled(row(i), piece), source_, row_[i] * width_ + at, row_[i] >= 0 && at < width_);
    }
  }

 private:
  static __device__ int row(int pass) {
    return static_cast<int>(threadIdx.x) / 8 % (kGroupThreads / 8) + pass * (kGroupThreads / 8);
  }

  const T* source_;
  int64_t width_;
  int row_[kPasses];
};

// MN-major rows, as wgrad reads them: 64 rows of the expert are the contracted width, kFeatures of them the tile's.
template <typename T, int kFeatures>
__device__ __forceinline__ void copy_features(uint32_t to, const T* source, int64_t width, const Gather& gather,
                                              int first, int rows, int64_t feature) {
  constexpr int kPieces = kFeatures / 8, kRowsPerPass = kGroupThreads / kPieces;
  const int piece = threadIdx.x % kPieces;
  const int64_t at = feature + piece * 8;
  const uint32_t chunk = to + piece / 8 * kSlabBytes;
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x) % kGroupThreads / kPieces; r < kDepth; r += kRowsPerPass) {
    const int row = r < rows + (MOE_BUG(grouped_gemm_sm90, 16) ? 1 : 0) ? source_row(gather, first + r) : -1;
    copy_piece(chunk + swizzled(r, piece % 8), source, row * width + at, row >= 0 && at < width);
  }
}

}  // namespace moe::cuda::sm90

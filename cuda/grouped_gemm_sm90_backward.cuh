// The epilogue of the backward through the activation. The saved pre-activations of a tile are loaded into the slabs by
// TMA while the main loop runs, become their own gradients in place, and leave by TMA with the scaled activations.
#pragma once

#include "grouped_gemm_sm90_epilogue.cuh"

namespace moe::cuda::sm90 {

// One math warpgroup's 64 rows by the 128 columns of a tile, in two chunks of 64 columns. Slabs of a chunk: the gates
// and the ups (interleaved: the lower and the higher half of the pairs), and the scaled activations.
template <typename Tile, typename T>
class SavedRows {
  static constexpr int kChunks = Tile::kColumns / 64;

 public:
  __device__ SavedRows(Shared<Tile>& shared, const GemmMaps& maps, const GemmArgs<T>& args, int group)
      : shared_(shared), maps_(maps), args_(args), group_(group) {}

  // Starts the loads; by the whole warpgroup, before the main loop.
  __device__ void load(int row, int column_tile) {
    if (!MOE_BUG(grouped_gemm_sm90, 22) && is_group_leader()) ptx::tma_store_wait_read<0>();
    if (!MOE_BUG(grouped_gemm_sm90, 23)) group_sync(group_);
    if (!is_group_leader()) return;
    const int loads = args_.gate.gated ? 2 : 1;
    ptx::mbar_arrive_expect_tx(barrier(), kChunks * loads * kSlabBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int i = 0; i < loads; ++i) {
        const Place at = place(column_tile * Tile::kColumns + chunk * 64, i);
        ptx::tma_load_3d(ptx::smem_u32(slab(chunk, i)), &maps_.saved, barrier(), at.column, at.part, row);
      }
    }
  }

  // sums: <dO, W2> of the tile.
  __device__ __forceinline__ void finish(float (&sums)[Tile::kSums], int row, int rows, int column_tile) {
    ptx::mbar_wait(barrier(), MOE_BUG(grouped_gemm_sm90, 24) ? parity_ ^ 1 : parity_);
    parity_ ^= 1;
    float weights[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) weights[h] = sum_row(h) < rows ? weight_of(row + sum_row(h)) : 0.0f;
    with_sums(args_.gate.kind, sums, [&]<int kUnroll>(auto act, const auto& all, std::integral_constant<int, kUnroll>) {
#pragma unroll kUnroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        finish_chunk<kUnroll>(act, all, chunk, weights, row, rows, column_tile);
      }
    });
    publish(group_);
    for (int chunk = 0; chunk < kChunks; ++chunk) send_chunk(chunk, row, rows, column_tile);
    if (is_group_leader()) ptx::tma_store_commit();
  }

 private:
  struct Place {
    int column, part;
  };

  // Of slab i (0 or 1) of the 64 columns from `column` on.
  __device__ Place place(int column, int i) const {
    if (args_.gate.interleaved) return {2 * column + 64 * i, 0};
    return {column, i};
  }
  __device__ unsigned char* slab(int chunk, int i) const { return shared_.slab[group_][chunk * 3 + i]; }
  __device__ uint32_t barrier() const { return ptx::smem_u32(&shared_.saved[group_]); }
  __device__ float weight_of(int row) const {
    const int slot = args_.gather.row_to_slot == nullptr ? row : slot_of(args_.gather, row);
    return slot < 0 ? 0.0f : __ldg(args_.row_weights + slot);
  }

  template <int kUnroll, typename Act>
  __device__ __forceinline__ void finish_chunk(Act act, const float (&sums)[Tile::kSums], int chunk,
                                               const float (&weights)[2], int row, int rows, int column_tile) {
    unsigned char *first = slab(chunk, 0), *second = slab(chunk, 1), *scaled = slab(chunk, 2);
#pragma unroll kUnroll
    for (int h = 0; h < 2; ++h) {
      float dot = 0;
      const float s = weights[h];
      // Reads g and u, replaces them with their gradients, and returns s act.
      const auto one = [&](float p, float& g, float& u) {
        const auto d = activate_backward<T>(act, args_.gate, s * p, g, u);
        dot += p * d.value;
        g = d.grad_gate, u = d.grad_up;
        return s * d.value;
      };
#pragma unroll kUnroll
      for (int j = 0; j < 8; ++j) {
        const float p0 = sums[chunk * 32 + 4 * j + 2 * h], p1 = sums[chunk * 32 + 4 * j + 2 * h + 1];
        float a0, a1;
        if (args_.gate.interleaved) {
          // Column 8 j + 2 q has its pair in words 2 (8 j + 2 q) / 2: two neighbouring words of slab j / 4.
          const int pair = (8 * j + static_cast<int>(threadIdx.x) % 4 * 2) % 32;
          uint2* words =
              reinterpret_cast<uint2*>((j < 4 ? first : second) + swizzled(sum_row(h), pair / 4) + pair % 4 * 4);
          uint2 both = *words;
          float2 x = unpack<T>(both.x), y = unpack<T>(both.y);
          a0 = one(p0, x.x, x.y);
          a1 = one(p1, y.x, y.y);
          *words = {pack<T>(x.x, x.y), pack<T>(y.x, y.y)};
        } else {
          float2 g = unpack<T>(*slab_word(first, h, j)), u{};
          if (args_.gate.gated) u = unpack<T>(*slab_word(second, h, j));
          a0 = one(p0, g.x, u.x);
          a1 = one(p1, g.y, u.y);
          *slab_word(first, h, j) = pack<T>(g.x, g.y);
          if (args_.gate.gated) *slab_word(second, h, j) = pack<T>(u.x, u.y);
        }
        *slab_word(scaled, h, j) = pack<T>(a0, a1);
      }
      dot += __shfl_xor_sync(0xffffffffu, dot, 1);
      dot += __shfl_xor_sync(0xffffffffu, dot, 2);
      const int64_t partials = args_.num_partials, partial = int64_t{column_tile} * kChunks + chunk;
      if (args_.partials != nullptr && threadIdx.x % 4 == 0 && sum_row(h) < rows && partial < partials) {
        args_.partials[(row + sum_row(h)) * partials + partial] = dot;
      }
    }
  }

  __device__ void send_chunk(int chunk, int row, int rows, int column_tile) const {
    const int column = column_tile * Tile::kColumns + chunk * 64;
    if (column >= args_.n) return;
    const int64_t width = args_.gate.gated ? 2 * args_.n : args_.n;
    const Destination<T> grad{&maps_.pre_activation, args_.pre_activation, width,
                              args_.gate.interleaved ? width : args_.n};
    if (args_.pre_activation != nullptr) {
      for (int i = 0; i < (args_.gate.gated ? 2 : 1); ++i) {
        const Place at = place(column, i);
        if (at.column < grad.part_columns) send(slab(chunk, i), grad, row, rows, at.part, at.column);
      }
    }
    if (args_.output != nullptr) {
      send(slab(chunk, 2), Destination<T>{&maps_.output, args_.output, args_.n, args_.n}, row, rows, 0, column);
    }
  }

  Shared<Tile>& shared_;
  const GemmMaps& maps_;
  const GemmArgs<T>& args_;
  const int group_;
  uint32_t parity_ = 0;
};

}  // namespace moe::cuda::sm90

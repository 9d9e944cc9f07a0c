// What the forward and the backward of the fused path share: the layer with its types, and its rows by pointer.
#pragma once

#include <vector>

#include "gemm/block.h"
#include "gemm/row_blocks.h"
#include "moe/experts.h"
#include "plan_view.h"

namespace moe {

// Reads one row of a pre-activation as a gate part and an up part, or writes it; whatever the gate layout is.
template <typename Storage>
class GateLayoutView {
  using Real = Wide<Storage>;

 public:
  GateLayoutView(const Kernels<Storage>& kernels, const ActivationOptions& options, int64_t intermediate_size)
      : kernels_(kernels),
        gated_(is_gated(options.activation)),
        interleaved_(gated_ && options.gate_layout == GateLayout::kInterleaved),
        size_(intermediate_size) {}

  // The columns of a GEMM that make the activations [begin, begin + count).
  Columns columns(int64_t begin, int64_t count) const {
    if (interleaved_) return {{2 * begin, 0}, 2 * count, 1};
    return {{begin, size_ + begin}, count, gated_ ? 2 : 1};
  }

  // Row r of such a GEMM, split in place when it is interleaved; `spare` has room for 2 * count.
  void split(Real* c, int64_t count, Real* spare, const Real*& gate, const Real*& up) const {
    gate = c;
    up = gated_ ? c + columns(0, count).offset(1) : nullptr;
    if (!interleaved_) return;
    deinterleave(c, count, spare, spare + count);
    gate = spare;
    up = spare + count;
  }

  void read(const Storage* row, int64_t begin, int64_t count, Real* gate, Real* up, Real* spare) const {
    if (interleaved_) {
      kernels_.widen_row(row + 2 * begin, 2 * count, spare);
      return deinterleave(spare, count, gate, up);
    }
    kernels_.widen_row(row + begin, count, gate);
    if (gated_) kernels_.widen_row(row + size_ + begin, count, up);
  }

  void write(const Real* gate, const Real* up, int64_t begin, int64_t count, Storage* row, Real* spare) const {
    if (interleaved_) {
      for (int64_t i = 0; i < count; ++i) {
        spare[2 * i] = gate[i];
        spare[2 * i + 1] = up[i];
      }
      return kernels_.narrow_row(spare, 2 * count, row + 2 * begin);
    }
    kernels_.narrow_row(gate, count, row + begin);
    if (gated_) kernels_.narrow_row(up, count, row + size_ + begin);
  }

 private:
  static void deinterleave(const Real* pairs, int64_t count, Real* gate, Real* up) {
    for (int64_t i = 0; i < count; ++i) {
      gate[i] = pairs[2 * i];
      up[i] = pairs[2 * i + 1];
    }
  }

  const Kernels<Storage>& kernels_;
  bool gated_, interleaved_;
  int64_t size_;
};

// The typed view of a layer, and where each row comes from and goes to.
template <typename Storage>
struct Experts {
  using Real = Wide<Storage>;

  explicit Experts(const ExpertsLayer& layer)
      : layer(layer),
        table(kernels<Storage>()),
        rows(layer.plan.num_rows),
        hidden(layer.hidden_size),
        intermediate(layer.intermediate_size),
        pre_activation(pre_activation_size(layer.activation.activation, intermediate)),
        layout(table, layer.activation, intermediate),
        offsets(static_cast<size_t>(layer.plan.num_experts) + 1),
        token_of_row(static_cast<size_t>(rows)),
        weight_of_row(static_cast<size_t>(rows)) {
    sanitize_offsets(layer.plan.expert_offsets, layer.plan.num_experts, rows, offsets.data());
    const Real* weights = static_cast<const Real*>(layer.topk_weights);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t slot = slot_of(layer.plan, r);
      token_of_row[r] = slot < 0 ? -1 : slot / layer.plan.top_k;
      weight_of_row[r] = slot < 0 ? Real(0) : weights[slot];
    }
  }

  // Pointers to the rows of a [T, H] tensor in expert order; a row without a token reads `zeros` [H].
  std::vector<const Storage*> gather(const void* tensor, const Storage* zeros) const {
    std::vector<const Storage*> pointers(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      pointers[r] = token_of_row[r] < 0 ? zeros : static_cast<const Storage*>(tensor) + token_of_row[r] * hidden;
    }
    return pointers;
  }

  // Pointers to the rows of a [R, width] tensor.
  std::vector<const Storage*> consecutive(const void* tensor, int64_t width) const {
    std::vector<const Storage*> pointers(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) pointers[r] = static_cast<const Storage*>(tensor) + r * width;
    return pointers;
  }

  Weight<Storage> gate_up_proj(int64_t expert) const {
    return {static_cast<const Storage*>(layer.gate_up_proj) + expert * pre_activation * hidden, pre_activation, hidden,
            layer.weight_layout};
  }
  Weight<Storage> down_proj(int64_t expert) const {
    return {static_cast<const Storage*>(layer.down_proj) + expert * hidden * intermediate, hidden, intermediate,
            layer.weight_layout};
  }

  const ExpertsLayer& layer;
  const Kernels<Storage>& table;
  int64_t rows, hidden, intermediate, pre_activation;
  GateLayoutView<Storage> layout;
  std::vector<int64_t> offsets;
  std::vector<int64_t> token_of_row;
  std::vector<Real> weight_of_row;
};

// Rows that no expert owns are zero wherever they are returned.
template <typename Storage>
void zero_unowned_rows(const Experts<Storage>& experts, int64_t width, Storage* rows) {
  std::fill(rows, rows + experts.offsets.front() * width, Storage{});
  std::fill(rows + experts.offsets.back() * width, rows + experts.rows * width, Storage{});
}

// The same weight, used the other way round: dgrad.
template <typename Storage>
Weight<Storage> transposed(const Weight<Storage>& weight) {
  return {weight.data, weight.k, weight.n, transposed(weight.layout)};
}

}  // namespace moe

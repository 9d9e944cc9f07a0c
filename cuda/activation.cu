// activation and its backward: element by element, so only the memory counts. A thread has one 16-byte piece of the
// output; of an interleaved gate that is two adjacent pieces of the pre-activation.
#include "activation.cuh"

namespace moe::cuda {
namespace {

// Gates and up values of kCount output columns from `column` on.
template <typename T, int kCount>
struct Inputs {
  Wide<T> gate[kCount], up[kCount];

  __device__ __forceinline__ Inputs(const Gate<T>& options, const T* row, int64_t width, int64_t column) {
    if (options.interleaved) {
      Wide<T> low[kCount], high[kCount];
      const auto first = load_once<kCount>(row + 2 * column), second = load_once<kCount>(row + 2 * column + kCount);
      first.unpack(low);
      second.unpack(high);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        gate[i] = 2 * i < kCount ? low[2 * i] : high[2 * i - kCount];
        up[i] = 2 * i + 1 < kCount ? low[2 * i + 1] : high[2 * i + 1 - kCount];
      }
      return;
    }
    const auto first = load_once<kCount>(row + column);
    if (options.gated) {
      load_once<kCount>(row + width + column).unpack(up);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) up[i] = 0;
    }
    first.unpack(gate);
  }
};

template <typename T, int kCount>
__device__ __forceinline__ void store_inputs(const Gate<T>& options, const Wide<T> (&gate)[kCount],
                                             const Wide<T> (&up)[kCount], T* row, int64_t width, int64_t column) {
  if (options.interleaved) {
    Wide<T> low[kCount], high[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      (2 * i < kCount ? low[2 * i] : high[2 * i - kCount]) = gate[i];
      (2 * i + 1 < kCount ? low[2 * i + 1] : high[2 * i + 1 - kCount]) = up[i];
    }
    store(row + 2 * column, low);
    store(row + 2 * column + kCount, high);
    return;
  }
  store(row + column, gate);
  if (options.gated) store(row + width + column, up);
}

template <typename T, int kCount>
__global__ void __launch_bounds__(Tiling::kThreads)
    activation_kernel(T* output, const T* pre_activation, int64_t rows, int64_t width, Gate<T> options) {
  const int64_t pitch = options.gated ? 2 * width : width;
  for_tiles(rows, width / kCount, 1, [&](int64_t row, int64_t piece) {
    const Inputs<T, kCount> in(options, pre_activation + row * pitch, width, piece * kCount);
    Wide<T> out[kCount];
    with_activation(options.kind, [&](auto act) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = activate<T>(act, options, in.gate[i], in.up[i]);
    });
    store(output + row * width + piece * kCount, out);
  });
}

template <typename T, int kCount>
__global__ void __launch_bounds__(Tiling::kThreads)
    activation_backward_kernel(T* grad_pre_activation, const T* grad_output, const T* pre_activation, int64_t rows,
                               int64_t width, Gate<T> options) {
  const int64_t pitch = options.gated ? 2 * width : width;
  for_tiles(rows, width / kCount, 1, [&](int64_t row, int64_t piece) {
    const auto bits = load_once<kCount>(grad_output + row * width + piece * kCount);
    const Inputs<T, kCount> in(options, pre_activation + row * pitch, width, piece * kCount);
    Wide<T> grad[kCount], grad_gate[kCount], grad_up[kCount];
    bits.unpack(grad);
    with_activation(options.kind, [&](auto act) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto d = activate_backward<T>(act, options, grad[i], in.gate[i], in.up[i]);
        grad_gate[i] = d.grad_gate;
        grad_up[i] = d.grad_up;
      }
    });
    store_inputs(options, grad_gate, grad_up, grad_pre_activation + row * pitch, width, piece * kCount);
  });
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status activation_cuda(const ActivationArgs& args, const CudaContext& cuda) {
  const int64_t rows = args.num_rows, width = args.intermediate_size;
  if (rows == 0 || width == 0) return Status::kOk;
  return with_type(args.dtype, [&]<typename T>(std::type_identity<T>) {
    const bool whole = fits_pieces(width * static_cast<int64_t>(sizeof(T)), args.output, args.pre_activation);
    return with_piece<T>(whole, [&](auto count) {
      const Tiling tiling(rows, width / count);
      LAUNCH((activation_kernel<T, count>), tiling.grid, tiling.block, 0, stream(cuda), static_cast<T*>(args.output),
             static_cast<const T*>(args.pre_activation), rows, width, Gate<T>(args.options));
      return launched("activation", cuda);
    });
  });
}

Status activation_backward_cuda(const ActivationBackwardArgs& args, const CudaContext& cuda) {
  const int64_t rows = args.num_rows, width = args.intermediate_size;
  if (rows == 0 || width == 0) return Status::kOk;
  return with_type(args.dtype, [&]<typename T>(std::type_identity<T>) {
    const bool whole = fits_pieces(width * static_cast<int64_t>(sizeof(T)), args.grad_pre_activation, args.grad_output,
                                   args.pre_activation);
    return with_piece<T>(whole, [&](auto count) {
      const Tiling tiling(rows, width / count);
      LAUNCH((activation_backward_kernel<T, count>), tiling.grid, tiling.block, 0, stream(cuda),
             static_cast<T*>(args.grad_pre_activation), static_cast<const T*>(args.grad_output),
             static_cast<const T*>(args.pre_activation), rows, width, Gate<T>(args.options));
      return launched("activation_backward", cuda);
    });
  });
}

}  // namespace moe

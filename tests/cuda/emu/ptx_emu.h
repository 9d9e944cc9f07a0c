// The functions of cuda/ptx, for the CPU: same names, and a place in the source for messages.
#pragma once

#include "emu/emu.h"

namespace emu {
enum class Element { kBFloat16, kFloat16, kTF32 };

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes, const Where& where);
void cp_async_commit();
void cp_async_wait(int keep);
void cp_async_mbar_arrive(uint32_t mbar, const Where& where);
void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address, const Where& where);
void stmatrix(uint32_t address, const uint32_t* r, int count, bool transposed, const Where& where);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Element type, const Where& where);
void mbar_init(uint32_t mbar, uint32_t arrivals, const Where& where);
void mbar_inval(uint32_t mbar, const Where& where);
void mbar_arrive(uint32_t mbar, uint32_t bytes, bool arrive, const Where& where);
bool mbar_try_wait(uint32_t mbar, uint32_t parity, const Where& where);
void mbar_wait(uint32_t mbar, uint32_t parity, const Where& where);
void fence_proxy_async();
uint32_t mapa(uint32_t address, uint32_t rank, const Where& where);
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint32_t blocks, std::array<int, 3> at, int rank,
              const Where& where);
void tma_store(const CUtensorMap* map, uint32_t src, std::array<int, 3> at, int rank, const Where& where);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar, const Where& where);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, const Where& where);
void bulk_commit();
void bulk_wait(int keep);
struct Wgmma {
  int n;
  Element type;
  bool trans_a, trans_b;
};
void wgmma(float* d, const Wgmma& shape, const uint32_t* register_a, uint64_t a, uint64_t b, bool scale_d,
           const Where& where);
void wgmma_fence(const Where& where);
void wgmma_commit(const Where& where);
void wgmma_wait(int keep, const Where& where);
bool elect_one(const Where& where);
void setmaxnreg(bool takes, int count, const Where& where);
template <typename T>
constexpr Element kElement = std::is_same_v<T, __half> ? Element::kFloat16 : Element::kBFloat16;
}  // namespace emu

namespace moe::cuda::ptx {

using Launch = ::emu::Launch;
#define EMU_WHERE const ::emu::Where& where = ::emu::Where::current()

// ---- memory.cuh
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : std::fmax(x, y); }
inline float without_subnormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float reciprocal_approx(float x) { return without_subnormals(1 / without_subnormals(x)); }
inline float sqrt_approx(float x) { return std::sqrt(without_subnormals(x)); }
inline uint32_t smem_u32(const void* p, EMU_WHERE) { return emu::smem_address(p, where); }
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T ld_acquire(const T* p) {
  emu::spin();
  emu::note_acquire(p);
  return *p;
}
template <typename T>
void st_release(T* p, std::type_identity_t<T> v) {
  emu::atomic(p, [&](T) {
    emu::note_release(p);
    return v;
  });
}
template <typename T>
void red_release_add(T* p, std::type_identity_t<T> v) {
  emu::atomic(p, [&](T old) {
    emu::note_release(p);
    return static_cast<T>(old + v);
  });
}
template <typename T>
T atom_acq_rel_add(T* p, std::type_identity_t<T> v) {
  return emu::atomic(p, [&](T old) {
    emu::note_acquire(p);
    emu::note_release(p);
    return static_cast<T>(old + v);
  });
}

// ---- async_copy.cuh
template <int kBytes>
void cp_async(uint32_t dst, const void* src, int src_bytes = kBytes, EMU_WHERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::cp_async(dst, src, kBytes, static_cast<uint32_t>(src_bytes), where);
}
inline void cp_async16(uint32_t dst, const void* src, int src_bytes = 16, EMU_WHERE) {
  emu::cp_async(dst, src, 16, static_cast<uint32_t>(src_bytes), where);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emu::cp_async_wait(kPending);
}
inline void cp_async_mbar_arrive_noinc(uint32_t mbar, EMU_WHERE) { emu::cp_async_mbar_arrive(mbar, where); }

// ---- matrix.cuh
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, EMU_WHERE) { emu::ldmatrix(r, 4, false, address, where); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, EMU_WHERE) {
  emu::ldmatrix(r, 4, true, address, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t address, EMU_WHERE) { emu::ldmatrix(r, 2, false, address, where); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address, EMU_WHERE) {
  emu::ldmatrix(r, 2, true, address, where);
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4], EMU_WHERE) {
  emu::stmatrix(address, r, 4, false, where);
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4], EMU_WHERE) {
  emu::stmatrix(address, r, 4, true, where);
}
inline void stmatrix_x2(uint32_t address, const uint32_t (&r)[2], EMU_WHERE) {
  emu::stmatrix(address, r, 2, false, where);
}
inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_WHERE) {
  emu::mma(d, a, b0, b1, emu::Element::kBFloat16, where);
}
inline void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_WHERE) {
  emu::mma(d, a, b0, b1, emu::Element::kFloat16, where);
}
inline void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_WHERE) {
  emu::mma(d, a, b0, b1, emu::Element::kTF32, where);
}
inline uint32_t to_tf32(float x) {  // ties away from zero
  const uint32_t u = __float_as_uint(x);
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & 0xffffe000;
}

// ---- barrier.cuh
inline void bar_sync(int id, int threads, EMU_WHERE) { emu::bar_sync(id, threads, where); }
inline void bar_arrive(int id, int threads, EMU_WHERE) { emu::bar_arrive(id, threads, where); }
inline bool elect_one(EMU_WHERE) { return emu::elect_one(where); }
inline void cluster_arrive(EMU_WHERE) { emu::cluster_arrive(where); }
inline void cluster_wait(EMU_WHERE) { emu::cluster_wait(where); }
inline void cluster_sync(EMU_WHERE) {
  emu::cluster_arrive(where);
  emu::cluster_wait(where);
}
inline uint32_t cluster_rank() { return emu::cluster_rank(); }
inline uint32_t cluster_size() { return emu::cluster_size(); }
inline uint32_t mapa(uint32_t address, uint32_t rank, EMU_WHERE) { return emu::mapa(address, rank, where); }

// ---- mbarrier.cuh
inline void mbar_init(uint32_t mbar, uint32_t arrivals, EMU_WHERE) { emu::mbar_init(mbar, arrivals, where); }
inline void mbar_inval(uint32_t mbar, EMU_WHERE) { emu::mbar_inval(mbar, where); }
inline void mbar_arrive(uint32_t mbar, EMU_WHERE) { emu::mbar_arrive(mbar, 0, true, where); }
inline void mbar_arrive_cluster(uint32_t mapped, EMU_WHERE) { emu::mbar_arrive(mapped, 0, true, where); }
inline void mbar_arrive_expect_tx(uint32_t mbar, uint32_t bytes, EMU_WHERE) {
  emu::mbar_arrive(mbar, bytes, true, where);
}
inline void mbar_expect_tx(uint32_t mbar, uint32_t bytes, EMU_WHERE) { emu::mbar_arrive(mbar, bytes, false, where); }
inline bool mbar_try_wait(uint32_t mbar, uint32_t parity, EMU_WHERE) { return emu::mbar_try_wait(mbar, parity, where); }
inline void mbar_wait(uint32_t mbar, uint32_t parity, EMU_WHERE) { emu::mbar_wait(mbar, parity, where); }
inline void fence_mbar_init() { emu::fence_proxy_async(); }
inline void fence_proxy_async() { emu::fence_proxy_async(); }

// ---- bulk_copy.cuh
inline void prefetch_tmap(const CUtensorMap*) {}
inline void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y, EMU_WHERE) {
  emu::tma_load(dst, map, mbar, 0, {x, y, 0}, 2, where);
}
inline void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y, int z, EMU_WHERE) {
  emu::tma_load(dst, map, mbar, 0, {x, y, z}, 3, where);
}
inline void tma_load_3d_once(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y, int z, EMU_WHERE) {
  emu::tma_load(dst, map, mbar, 0, {x, y, z}, 3, where);
}
inline void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint16_t blocks, int x, int y,
                                  EMU_WHERE) {
  emu::tma_load(dst, map, mbar, blocks, {x, y, 0}, 2, where);
}
inline void tma_load_3d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint16_t blocks, int x, int y,
                                  int z, EMU_WHERE) {
  emu::tma_load(dst, map, mbar, blocks, {x, y, z}, 3, where);
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t src, int x, int y, EMU_WHERE) {
  emu::tma_store(map, src, {x, y, 0}, 2, where);
}
inline void tma_store_3d(const CUtensorMap* map, uint32_t src, int x, int y, int z, EMU_WHERE) {
  emu::tma_store(map, src, {x, y, z}, 3, where);
}
inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar, EMU_WHERE) {
  emu::bulk_load(dst, src, bytes, mbar, where);
}
inline void bulk_store(void* dst, uint32_t src, uint32_t bytes, EMU_WHERE) { emu::bulk_store(dst, src, bytes, where); }
inline void tma_store_commit() { emu::bulk_commit(); }
template <int kPending>
void tma_store_wait_read() {
  emu::bulk_wait(kPending);
}
template <int kPending>
void tma_store_wait() {
  emu::bulk_wait(kPending);
}

// ---- wgmma.cuh
inline void wgmma_fence(EMU_WHERE) { emu::wgmma_fence(where); }
inline void wgmma_commit(EMU_WHERE) { emu::wgmma_commit(where); }
template <int kPending>
void wgmma_wait(EMU_WHERE) {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group waits for at most 7 groups");
  emu::wgmma_wait(kPending, where);
}
template <int N, typename T, int kTransA = 0, int kTransB = 0>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d, EMU_WHERE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has N = 8, 16, ... 256");
  emu::wgmma(d, {N, emu::kElement<T>, kTransA != 0, kTransB != 0}, nullptr, a, b, scale_d != 0, where);
}
template <int N, typename T, int kTransB = 0>
void wgmma_register_a(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d, EMU_WHERE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has N = 8, 16, ... 256");
  emu::wgmma(d, {N, emu::kElement<T>, false, kTransB != 0}, a, 0, b, scale_d != 0, where);
}

// ---- control.cuh
inline void grid_dependency_wait() { emu::grid_dependency_wait(); }
inline void grid_dependency_launch() {}
template <int kRegisters>
void setmaxnreg_inc(EMU_WHERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, ... 256");
  emu::setmaxnreg(true, kRegisters, where);
}
template <int kRegisters>
void setmaxnreg_dec(EMU_WHERE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, ... 256");
  emu::setmaxnreg(false, kRegisters, where);
}

#undef EMU_WHERE
}  // namespace moe::cuda::ptx

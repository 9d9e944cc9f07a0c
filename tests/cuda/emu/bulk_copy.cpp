// Bulk copies and TMA. A load makes its destination NaN at issue and lands when the engine runs it; a store reads its
// source at once or as late as the wait for it.
#include "emu/ptx_emu.h"
#include "emu/state.h"

namespace emu {

namespace {

struct TensorMap {  // what the emulated encoder writes into a CUtensorMap
  uint64_t magic;
  char* base;
  uint64_t dim[5], stride[5];
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kMagic = 0x70616d726f736e74;

TensorMap decode(const CUtensorMap* map, int rank, uint32_t smem, const Where& where) {
  TensorMap t;
  memcpy(&t, map, sizeof t);
  if (t.magic != kMagic) fail(where, "TMA: not a tensor map");
  if (reinterpret_cast<uintptr_t>(map) % 64) fail(where, "TMA: the tensor map is not aligned to 64 bytes");
  if (t.rank != rank) fail(where, "TMA: a tensor map of rank %d in an instruction of rank %d", t.rank, rank);
  // The hardware asks for 128; a box that begins inside a swizzle pattern would need a base offset.
  const uint32_t align = t.swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 1024
                         : t.swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 512
                         : t.swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 256
                                                                  : 128;
  if (smem % align) fail(where, "TMA: shared address 0x%x is not aligned to %u, as this swizzle needs", smem, align);
  return t;
}

uint32_t box_bytes(const TensorMap& t) {
  uint32_t bytes = t.element_bytes;
  for (int i = 0; i < t.rank; ++i) bytes *= t.box[i];
  return bytes;
}

// Calls row(offset in shared memory, global address of the row's element 0 or null) for the rows of a box.
template <typename F>
void for_each_row(const TensorMap& t, const std::array<int, 3>& at, const F& row) {
  uint32_t offset = 0;
  const int n1 = t.rank > 1 ? t.box[1] : 1, n2 = t.rank > 2 ? t.box[2] : 1;
  for (int z = 0; z < n2; ++z)
    for (int y = 0; y < n1; ++y) {
      const int64_t index[2] = {at[1] + int64_t{y}, at[2] + int64_t{z}};
      char* p = t.base;
      for (int d = 1; d < t.rank && p != nullptr; ++d) {
        const int64_t i = index[d - 1];
        p = i < 0 || i >= static_cast<int64_t>(t.dim[d]) ? nullptr : p + i * static_cast<int64_t>(t.stride[d]);
      }
      row(offset, p);
      offset += t.box[0] * t.element_bytes;
    }
}

// Moves the part of each row that lies inside the tensor, 16 bytes (what a swizzle keeps together) at a time.
template <typename F>
void for_each_piece(const TensorMap& t, const std::array<int, 3>& at, uint32_t smem, const F& piece) {
  const uint32_t row_bytes = t.box[0] * t.element_bytes;
  const int64_t first = int64_t{at[0]} * t.element_bytes, limit = static_cast<int64_t>(t.dim[0]) * t.element_bytes;
  for_each_row(t, at, [&](uint32_t offset, char* row) {
    for (uint32_t x = 0; x < row_bytes; x += 16) {
      const int64_t g = first + x;
      const int64_t begin = std::clamp<int64_t>(-g, 0, 16), end = std::clamp<int64_t>(limit - g, 0, 16);
      piece(swizzle(smem + offset + x, t.swizzle) - smem, row == nullptr ? nullptr : row + g, begin,
            row == nullptr ? begin : std::max(begin, end));
    }
  });
}

// A box may hold rows that no one looks at, whose owners may write them meanwhile; but not those of another kernel.
void check_box_is_not_early(const TensorMap& t, const std::array<int, 3>& at, const Where& where) {
  if (!checks_races) return;
  const int64_t first = int64_t{at[0]} * t.element_bytes, limit = static_cast<int64_t>(t.dim[0]) * t.element_bytes;
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(first + t.box[0] * t.element_bytes, limit);
  for_each_row(t, at, [&](uint32_t, const char* row) {
    if (row != nullptr && end > begin) race_early(row + begin, static_cast<size_t>(end - begin), "reads", where);
  });
}

}  // namespace

// Moves bits of the row into the number of the 16-byte chunk; of the address, not of an offset.
uint32_t swizzle(uint32_t a, int mode) {
  switch (mode) {
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return a ^ (a >> 3 & 0x70);
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return a ^ (a >> 3 & 0x30);
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return a ^ (a >> 3 & 0x10);
    default:
      return a;
  }
}

void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint32_t blocks, std::array<int, 3> at, int rank,
              const Where& where) {
  yield_point();
  const TensorMap t = decode(map, rank, dst, where);
  const uint32_t bytes = box_bytes(t);
  check_box_is_not_early(t, at, where);
  Cluster* c = current->block->cluster;
  if (blocks == 0) blocks = 1u << current->block->rank;
  if (blocks >> c->blocks.size())
    fail(where, "TMA: multicast to blocks 0x%x of a cluster of %zu", blocks, c->blocks.size());
  for (uint32_t r = 0; r < c->blocks.size(); ++r) {
    if (!(blocks >> r & 1)) continue;
    Block* b = c->blocks[r].get();
    if (b->live == 0) fail(where, "TMA: multicast to block %u of the cluster, which has exited", r);
    mbar_check((r + 1) * kSmemWindow + local(mbar), where);
    race_probe_async(b, local(mbar), 8, "TMA load (its mbarrier)", where);
    char* d = smem_pointer(b, local(dst), bytes, 128, where);
    race_issue_write(b, local(dst), bytes, true, "TMA load", where);
    memset(d, 0xff, bytes);
    const uint32_t address = local(dst), bar = local(mbar);
    issue({[=] {
             for_each_piece(t, at, address, [&](uint32_t o, const char* g, int64_t begin, int64_t end) {
               memset(d + o, 0, 16);
               if (end > begin) memcpy(d + o + begin, g + begin, static_cast<size_t>(end - begin));
             });
             race_tma_done(b, address, bytes, b->mbarriers.at(bar));
             mbar_bytes_arrived(b, bar, bytes);
           },
           &b->fibers[0], false, 0});
  }
}

static void issue_store(uint32_t src, uint32_t bytes, std::function<void()> run) {
  if (checks_races) current->bulk_reads.push_back({current->bulk_group, src, bytes});
  if (random_below(4) == 0)
    run();
  else
    issue({std::move(run), current, true, current->bulk_group});
}

void tma_store(const CUtensorMap* map, uint32_t src, std::array<int, 3> at, int rank, const Where& where) {
  const TensorMap t = decode(map, rank, src, where);
  const uint32_t bytes = box_bytes(t);
  const char* s = smem_pointer(current->block, src, bytes, 128, where);
  race_issue_read(current->block, src, bytes, "TMA store", where);
  for_each_piece(t, at, src, [&](uint32_t, char* g, int64_t begin, int64_t end) {
    if (end > begin) race_global_write(g + begin, static_cast<size_t>(end - begin), "TMA store", where);
  });
  issue_store(src, bytes, [=] {
    for_each_piece(t, at, src, [&](uint32_t o, char* g, int64_t begin, int64_t end) {
      if (end > begin) memcpy(g + begin, s + o + begin, static_cast<size_t>(end - begin));
    });
  });
}

static void check_bulk(const void* global, uint32_t bytes, const Where& where) {
  if (bytes == 0 || bytes % 16) fail(where, "cp.async.bulk of %u bytes, not a multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16) fail(where, "cp.async.bulk: %p is not aligned to 16", global);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar, const Where& where) {
  yield_point();
  check_bulk(src, bytes, where);
  Block* b = current->block;
  mbar_check(mbar, where);
  race_probe_async(b, mbar, 8, "bulk load (its mbarrier)", where);
  char* d = smem_pointer(b, dst, bytes, 16, where);
  race_issue_write(b, dst, bytes, true, "bulk load", where);
  race_global_read(src, bytes, where);
  memset(d, 0xff, bytes);
  issue({[=] {
           memcpy(d, src, bytes);
           race_tma_done(b, dst, bytes, b->mbarriers.at(mbar));
           mbar_bytes_arrived(b, mbar, bytes);
         },
         current, false, 0});
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, const Where& where) {
  check_bulk(dst, bytes, where);
  const char* s = smem_pointer(current->block, src, bytes, 16, where);
  race_issue_read(current->block, src, bytes, "bulk store", where);
  race_global_write(dst, bytes, "bulk store", where);
  issue_store(src, bytes, [=] { memcpy(dst, s, bytes); });
}

void bulk_commit() { ++current->bulk_group; }
void bulk_wait(int keep) { finish_stores(current, keep); }

}  // namespace emu

using emu::TensorMap;

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                           const cuuint64_t* dim, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  const auto bad = [](const char* reason) {
    fprintf(stderr, "EMU: cuTensorMapEncodeTiled: %s\n", reason);
    return CUDA_ERROR_INVALID_VALUE;
  };
  uint32_t bytes = 0;
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) bytes = 1;
  if (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16) bytes = 2;
  if (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) bytes = 4;
  TensorMap t{emu::kMagic,
              static_cast<char*>(base),
              {},
              {},
              {},
              static_cast<uint8_t>(rank),
              static_cast<uint8_t>(bytes),
              static_cast<uint8_t>(swizzle)};
  if (!bytes || rank < 1 || rank > 3 || interleave) return bad("a type, rank or interleave that is not emulated");
  if (reinterpret_cast<uintptr_t>(base) % 16) return bad("the global address is not aligned to 16 bytes");
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (dim[i] == 0 || dim[i] > uint64_t{1} << 32) return bad("a dimension is 0 or above 2^32");
    if (box[i] == 0 || box[i] > 256) return bad("a box dimension is 0 or above 256");
    if (element_strides[i] != 1) return bad("element strides other than 1 are not emulated");
    t.dim[i] = dim[i];
    t.box[i] = static_cast<uint16_t>(box[i]);
    if (i == 0) continue;
    t.stride[i] = strides[i - 1];
    if (strides[i - 1] % 16 || strides[i - 1] >= uint64_t{1} << 40)
      return bad("a stride is not a multiple of 16 bytes");
  }
  if (box[0] * bytes % 16) return bad("the inner box is not a multiple of 16 bytes");
  const uint32_t span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                        : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                               : 1 << 20;
  if (box[0] * bytes > span) return bad("the inner box is wider than the swizzle");
  memset(map, 0, sizeof *map);
  memcpy(map, &t, sizeof t);
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                        enum cudaDriverEntryPointQueryResult* result) {
  *function = strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : reinterpret_cast<void*>(cuTensorMapEncodeTiled);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorUnknown;
}
extern "C" cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                               enum cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, function, 12000, flags, result);
}

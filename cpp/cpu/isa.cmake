# The only map from an instruction set to compiler flags.
#
# cpp/cpu/{gemm,route}/<isa>.cpp are compiled with the flags of their instruction set and nothing else is, so that the
# library runs on every processor of the architecture: the dispatcher asks the processor before it calls into one of them.
# It learns which ones were compiled from MOE_HAVE_<ISA>.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(MOE_ISAS scalar avx2 avx512 avx512_bf16 amx)
else()
  set(MOE_ISAS scalar) # aarch64 too: its NEON is in the baseline, which the compiler uses without a flag
endif()
set(MOE_FLAGS_scalar "")
set(MOE_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(MOE_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(MOE_FLAGS_avx512_bf16 ${MOE_FLAGS_avx512} -mavx512bf16)
set(MOE_FLAGS_amx ${MOE_FLAGS_avx512} -mamx-tile -mamx-bf16)

# Flags of every kernel: what vectorisation needs and IEEE semantics can spare. NaN, infinity and the order of sums stay
# as written: results are bitwise reproducible.
function(moe_kernel_options target)
  target_compile_options(${target} PRIVATE $<IF:$<BOOL:${MOE_ASAN}>,-O1,-O3> -fno-math-errno -fno-trapping-math
                                           -ffp-contract=fast)
endfunction()

# Compiles cpp/cpu/{gemm,route}/<isa>.cpp into `target` for each instruction set of this architecture.
function(moe_add_isa_kernels target)
  foreach(isa IN LISTS MOE_ISAS)
    set(source "${PROJECT_SOURCE_DIR}/cpp/cpu/gemm/${isa}.cpp")
    if(EXISTS "${source}")
      target_sources(${target} PRIVATE "${source}")
      set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${MOE_FLAGS_${isa}}")
      string(TOUPPER "MOE_HAVE_${isa}" have_isa)
      target_compile_definitions(${target} PRIVATE ${have_isa}=1)
    endif()
    set(source "${PROJECT_SOURCE_DIR}/cpp/cpu/route/${isa}.cpp")
    if(EXISTS "${source}")
      target_sources(${target} PRIVATE "${source}")
      set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${MOE_FLAGS_${isa}}")
    endif()
  endforeach()
endfunction()

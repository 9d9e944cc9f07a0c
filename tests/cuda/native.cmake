# The kernel tests for the GPU of this machine: the sources that the emulator executes, linked with the kernels that nvcc compiled.
#
#   cmake -S . -B build/native -DMOE_GPU_TESTS=ON && cmake --build build/native --target moe_cuda_native
#   ctest --test-dir build/native --label-regex native
add_library(moe_native_support STATIC tests/cuda/main.cpp tests/cpp/support.cpp)
target_include_directories(moe_native_support PUBLIC tests/cuda tests/cpp cuda cpp/include cpp/cpu)
moe_add_cuda_kernels(moe_native_support)
target_link_libraries(moe_native_support PUBLIC moe_core CUDA::cudart_static)

file(GLOB native_tests CONFIGURE_DEPENDS tests/cuda/test_*.cpp)
if(NOT TARGET moe_cuda_sm90)  # not among the architectures
  list(FILTER native_tests EXCLUDE REGEX "_sm90")
endif()
# These alone have kernels of their own.
set_source_files_properties(tests/cuda/test_layouts.cpp tests/cuda/test_copies.cpp tests/cuda/test_barriers.cpp
                            PROPERTIES LANGUAGE CUDA)
add_custom_target(moe_cuda_native)
foreach(source IN LISTS native_tests)
  cmake_path(GET source STEM name)
  add_executable(native_${name} ${source})
  set_target_properties(native_${name} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  target_link_libraries(native_${name} PRIVATE moe_native_support)
  add_dependencies(moe_cuda_native native_${name})
  add_test(NAME native_${name} COMMAND native_${name})
  set_tests_properties(native_${name} PROPERTIES LABELS native TIMEOUT 40)
endforeach()

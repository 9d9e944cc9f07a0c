# The CUDA kernels as a static library that knows no torch. moe_add_cuda_kernels(TARGET) links it into TARGET when
# MOE_CUDA and the compiler allow. Nothing is needed at load time: the CUDA runtime is linked statically, and the driver
# is opened by it at the first call.
set(MOE_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (when there is an nvcc), ON or OFF")
set_property(CACHE MOE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(moe_oldest_nvcc 12.4)
set(moe_oldest_cmake 3.27)  # 3.25 does not know that nvcc has C++20

# Sets ${enabled} if CUDA is wanted and possible. An AUTO that finds no usable compiler says why and goes on.
macro(moe_find_cuda enabled)
  set(${enabled} FALSE)
  if(MOE_CUDA STREQUAL "AUTO" OR MOE_CUDA)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_VERSION VERSION_LESS moe_oldest_cmake)
      set(moe_cuda_missing "CMake ${CMAKE_VERSION} is older than ${moe_oldest_cmake}")
    elseif(CMAKE_CUDA_COMPILER)
      # 80 is also kept as PTX, which the driver compiles for GPUs that are newer than this nvcc. Not compiled for 90:
      # wgmma and setmaxnreg exist in 90a alone.
      if(NOT CMAKE_CUDA_ARCHITECTURES)
        set(CMAKE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "GPU architectures to compile for" FORCE)
      endif()
      enable_language(CUDA)
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS moe_oldest_nvcc)
        set(moe_cuda_missing "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than ${moe_oldest_nvcc}")
      else()
        set(${enabled} TRUE)
      endif()
    else()
      set(moe_cuda_missing "no working nvcc (put it on the PATH or set CUDACXX)")
    endif()
    if(NOT ${enabled} AND NOT MOE_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "MOE_CUDA=ON: ${moe_cuda_missing}")
    elseif(NOT ${enabled})
      message(STATUS "MOE_CUDA=AUTO: building without CUDA kernels: ${moe_cuda_missing}")
    endif()
  endif()
endmacro()

function(moe_add_cuda_kernels target)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/*.cu")
  # Files of one architecture are in an object library of their own, because CUDA_ARCHITECTURES is a property of targets.
  set(hopper_sources ${sources})
  list(FILTER sources EXCLUDE REGEX "_sm90[^/]*$")
  list(FILTER hopper_sources INCLUDE REGEX "_sm90[^/]*$")
  add_library(moe_cuda STATIC ${sources})
  set(libraries moe_cuda)
  set(hopper ${CMAKE_CUDA_ARCHITECTURES})
  list(FILTER hopper INCLUDE REGEX "^90a")
  if(hopper_sources AND hopper)
    add_library(moe_cuda_sm90 OBJECT ${hopper_sources})
    set_target_properties(moe_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES "${hopper}")
    foreach(library moe_cuda moe_cuda_sm90)
      target_compile_definitions(${library} PRIVATE MOE_CUDA_SM90)
    endforeach()
    target_sources(moe_cuda PRIVATE $<TARGET_OBJECTS:moe_cuda_sm90>)
    list(APPEND libraries moe_cuda_sm90)
  endif()
  foreach(library IN LISTS libraries)
    set_target_properties(
      ${library} PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
                            CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
    target_include_directories(${library} PRIVATE "${PROJECT_SOURCE_DIR}/cpp/include" "${PROJECT_SOURCE_DIR}/cuda")
    target_compile_options(${library} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills -Xcompiler=-Wall,-Wextra>)
    # A kernel that spills registers is a kernel to be fixed. ptxas only mentions a wgmma that it serialised (C75xx),
    # so refuse_serialised.sh turns that into an error.
    if(MOE_WERROR)
      target_compile_options(${library} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-Werror -Werror=all-warnings>)
      set_property(TARGET ${library} PROPERTY CUDA_COMPILER_LAUNCHER
                                              sh "${PROJECT_SOURCE_DIR}/cuda/refuse_serialised.sh"
                                              ${CMAKE_CUDA_COMPILER_LAUNCHER})
    endif()
  endforeach()
  string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
  target_compile_definitions(${target} PRIVATE MOE_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
                                               MOE_CUDA_ARCHITECTURES="${architectures}")
  target_link_libraries(${target} PRIVATE moe_cuda CUDA::cudart_static)
endfunction()

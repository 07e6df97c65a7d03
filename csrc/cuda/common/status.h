// What the launchers return.
//
// A launcher is a C function that takes a struct of plain data (vq/params.h, ssm/params.h) and a cudaStream_t as
// `void*`. These headers include neither torch's nor CUDA's. All pointers are to device memory, all strides in
// elements. A launcher doesn't wait for the device. It returns 0, an error of the CUDA runtime, or kUnsupported.
#pragma once

namespace longvq::cuda {

constexpr int kUnsupported = -1;  // no kernel takes these sizes

extern "C" const char* longvq_cuda_error_text(int error);

}  // namespace longvq::cuda

#include "forward_kernel.cuh"

bssn::cuda::Kernels bssn::cuda::forward_kernels_bf16() { return forward_kernels_of<BFloat16>(); }

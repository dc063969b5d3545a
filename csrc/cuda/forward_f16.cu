#include "forward_kernel.cuh"

bssn::cuda::Kernels bssn::cuda::forward_kernels_f16() { return forward_kernels_of<Float16>(); }

#include "forward_kernel.cuh"

bssn::cuda::Kernels bssn::cuda::forward_kernels_f32() { return forward_kernels_of<float>(); }

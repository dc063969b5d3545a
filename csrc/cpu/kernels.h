// The inner loops over rows of W. They are compiled once for each instruction set; the caller takes the best table of
// functions that the processor supports. A row is W[o, :, :], of n = c_in * k columns x in memory order:
// x = i * k_size + k ("channel major") or x = k * c_in + i ("kernel major").
#pragma once

#include "../layer.h"

namespace bssn::cpu {

constexpr int kStepRows = 4;  // rows that `step` works on

template <class T>
struct Kernels {
  // s[row] = sum_x w[row][x] v[x]; if q is given, also q[row, k] = sum_{x of kernel position k} w[row][x] u[x].
  // u is expanded to one value a column for channel-major rows and is u_in itself for kernel-major ones.
  // scratch: rows * period_elements(kernel) values.
  void (*dot_rows)(const T* const* w, int64_t rows, const T* v, const T* u, int64_t n, int64_t kernel,
                   bool kernel_major, T* scratch, T* s, T* q);

  // t[x] += sum_row s[row] w[row][x]; if r is given, also r[x] += sum_row q[row * kernel + k(x)] w[row][x].
  // scratch: rows * period_elements(kernel) values. ahead: distance from a row to the one that will be read later in
  // its place, which is fetched from memory meanwhile; 0 for none.
  void (*add_rows)(const T* const* w, int64_t rows, const T* s, const T* q, int64_t n, int64_t kernel,
                   bool kernel_major, int64_t ahead, T* scratch, T* t, T* r);

  // add_rows of kStepRows rows and dot_rows of as many others, `next`. scratch: 2 * kStepRows * period_elements(kernel)
  // values.
  void (*step)(const T* const* w, const T* s, const T* q, const T* const* next, const T* v, const T* u, int64_t n,
               int64_t kernel, bool kernel_major, T* scratch, T* next_s, T* next_q, T* t, T* r);

  // out[x] = factor * w[x]; `stream` writes past the caches.
  void (*scale)(const T* w, T factor, int64_t n, bool stream, T* out);

  // sum_x a[x] b[x]
  double (*inner)(const T* a, const T* b, int64_t n);

  // sum_x x[x]^2, in double precision throughout
  double (*sum_of_squares)(const T* x, int64_t n);

  // sum[j] += x[j]
  void (*add)(const T* x, int64_t n, T* sum);

  // out[x] = factor * g[x] - a * v[x] - b[k(x)] * u[x], the last term only if u is given; b has k values and
  // u is as in dot. scratch: period_elements(kernel) values.
  void (*grad_row)(const T* g, T factor, T a, const T* v, const T* b, const T* u, int64_t n, int64_t kernel,
                   bool kernel_major, bool stream, T* scratch, T* out);

  // Conversion of n contiguous numbers from and to a storage type.
  void (*load)(const void* source, DType type, int64_t n, T* out);
  void (*store)(const T* source, int64_t n, DType type, void* out);

  // Streaming stores are weakly ordered: to call before another thread is told that they were made.
  void (*finish_streaming)();
};

// Values that one period of kernel positions takes, whatever the vector width, and a vector more for what reaches
// beyond.
constexpr int64_t period_elements(int64_t kernel) { return (kernel > 9 ? kernel : 9) * 16 + 16; }

// The hash takes this many bytes at a time, one word of them into each lane of its state.
constexpr int kHashStripe = 256;
constexpr uint64_t kHashMultiplier = 0x9e3779b1u;
using HashStripes = void (*)(const unsigned char* data, int64_t stripes, uint64_t* lanes);

HashStripes hash_stripes();  // of the instruction set in use

// One table for each instruction set this build has; defined in kernels.cpp.
#define BSSN_DECLARE_KERNELS(isa)                                                 \
  namespace isa {                                                                 \
  const Kernels<float>& kernels_f32();                                            \
  const Kernels<double>& kernels_f64();                                           \
  void hash_stripes(const unsigned char* data, int64_t stripes, uint64_t* lanes); \
  }
BSSN_DECLARE_KERNELS(portable)
BSSN_DECLARE_KERNELS(avx2)
BSSN_DECLARE_KERNELS(avx512)
#undef BSSN_DECLARE_KERNELS

}  // namespace bssn::cpu

// One layer of a call: what Python says about it, as 64-bit integers, and where its tensors are.
#pragma once

#include <cstdint>

#include "../law.h"

namespace bssn::cuda {

enum class DType : int64_t { f32 = 0, bf16 = 1, f16 = 2 };

// How a call runs. All but `phases` are one launch. `clusters` and `keep` are `tiles` where the code that runs has none
// of it: see way_on.
enum class Way : int64_t {
  tiles = 0,     // blocks take tiles
  phases = 1,    // the same, with a launch for each phase
  clusters = 2,  // forward: a cluster of blocks has a small layer to itself: see cluster.h; backward: tiles
  keep = 3,      // rows stay in shared memory until they are written: see keeping.h, backward_keeping.h
};

// A weight is read as W[o, i, k]: output channel, input channel, kernel position. It is dense and has less than 2^31
// elements.
struct Geometry {
  int64_t c_out, c_in, kernel;
  int64_t two_sided;                             // 0 or 1
  int64_t stride_out, stride_in, stride_kernel;  // in elements
  int64_t snapshot_offsets[4];                   // of the vectors, in elements

  int64_t columns() const { return c_in * kernel; }
  int64_t size() const { return c_out * columns(); }
  // Whether the rows W[o] lie in memory one after another, and each in the order [i][k] or [k][i].
  bool has_rows(int64_t wanted_in, int64_t wanted_kernel) const {
    return (c_out == 1 || stride_out == columns()) && (c_in == 1 || stride_in == wanted_in) &&
           (kernel == 1 || stride_kernel == wanted_kernel);
  }
  bool channel_major() const { return has_rows(kernel, 1); }
  bool kernel_major() const { return has_rows(1, c_in) && !channel_major(); }
};

static_assert(sizeof(Geometry) == 11 * sizeof(int64_t), "Python fills a geometry as 11 integers");

struct Layer : Geometry {
  const void* weight;
  const void* grad;    // backward only
  void* output;        // normalised weight, or gradient of the weight
  float* vectors[4];   // forward only: u_out [c_out], v_out [c_in k], u_in [c_in], v_in [c_out k]
  float* snapshot[4];  // copies of the vectors that sigma was computed with
  float* sigma;        // one number
  int64_t position;    // of the layer in the call
  Law law;
  const float* gain;   // gamma, one number, if that is the law
  uint32_t grad_gain;  // backward only: index of its gradient
};

}  // namespace bssn::cuda

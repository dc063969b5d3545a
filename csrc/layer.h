// One layer of a call as Python fills it in: nothing but 64-bit integers, so that a flat array of integers is a table
// of layers. Addresses that do not apply are 0. A weight is read as W[o, i, k]: output channel, input channel, kernel
// position.
#pragma once

#include <cstdint>

#include "law.h"

namespace bssn {

enum class DType : int64_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// How a weight lies in memory.
enum class Order : int64_t {
  channel_major = 0,  // [o][i][k]: contiguous
  kernel_major = 1,   // [o][k][i]: channels_last
  strided = 2,        // o * stride_out + i * stride_in + kernel_offsets[k]
  input_major = 3,    // [i][o][k]: transposed convolutions, only of fp32 and fp64
};

// What does not change from call to call.
struct Geometry {
  int64_t c_out, c_in, kernel;
  int64_t two_sided;  // 0 or 1
  Order order;
  int64_t stride_out, stride_in;  // in elements
  const int64_t* kernel_offsets;  // [kernel], in elements
  int64_t snapshot_offsets[4];    // of the vectors, in elements

  int64_t columns() const { return c_in * kernel; }
  int64_t size() const { return c_out * columns(); }
};

static_assert(sizeof(Geometry) == 12 * sizeof(int64_t), "Python fills a geometry as 12 integers");

struct Layer : Geometry {
  const void* weight;
  const void* grad;   // backward only
  void* output;       // normalised weight, or gradient of the weight
  void* vectors[4];   // forward only: u_out [c_out], v_out [c_in k], u_in [c_in], v_in [c_out k]
  void* snapshot[4];  // copies of the vectors that sigma was computed with
  void* sigma;        // one number
  Law law;
  const void* gain;  // gamma, one number, if that is the law
  void* grad_gain;   // backward only
};

}  // namespace bssn

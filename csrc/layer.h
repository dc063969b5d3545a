// One layer of a call as Python fills it in: nothing but 64-bit integers, so that a flat array of integers is a table
// of layers. Addresses that do not apply are 0. A weight is read as W[o, i, k]: output channel, input channel, kernel
// position.
#pragma once

#include <cstdint>

namespace bssn {

enum class DType : int64_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// How a weight lies in memory.
enum class Order : int64_t {
  channel_major = 0,  // [o][i][k]: contiguous
  kernel_major = 1,   // [o][k][i]: channels_last
  strided = 2,        // o * stride_out + i * stride_in + kernel_offsets[k]
};

struct Layer {
  int64_t c_out, c_in, kernel;
  Order order;
  int64_t stride_out, stride_in;  // in elements
  const int64_t* kernel_offsets;  // [kernel], in elements
  const void* weight;
  const void* grad;   // backward only
  void* output;       // normalised weight, or gradient of the weight
  void* vectors[4];   // u_out [c_out], v_out [c_in k], u_in [c_in], v_in [c_out k]; backward: those of the forward
  void* snapshot[4];  // forward only: copies of the vectors that sigma was computed with
  void* sigma;        // one number

  int64_t columns() const { return c_in * kernel; }
  int64_t size() const { return c_out * columns(); }
  bool two_sided() const { return vectors[2] != nullptr; }
};

static_assert(sizeof(Layer) == 19 * sizeof(int64_t), "Python fills a layer as 19 integers");

}  // namespace bssn

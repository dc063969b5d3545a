// Power iteration of both directions in one read of W, then the scaled write, for all layers of a call.
//
//   output side:  s = W v_out,  u_out = normalize(s),  t = W^T s,  v_out = normalize(t),  sigma_out = |t| / |s|
//   input side:   q = W^T u_in, v_in = normalize(q),   r = W q,    u_in = normalize(r),   sigma_in = |r| / |q|
//
// s[o] and q[o, :] need only the row W[o, :, :], and while that row is in the cache it adds s[o] W[o] to t and
// q[o, k] W[o] to r, the latter kept as one number for each column until the end.
#include <new>
#include <vector>

#include "cpu.h"
#include "direction.h"
#include "forward_tiles.h"
#include "multiplier.h"

namespace bssn::cpu {
namespace {

template <class T>
double norm(const T* x, int64_t n) {
  return std::sqrt(kernels<T>().sum_of_squares(x, n));
}

template <class T>
double inner(const T* a, const T* b, int64_t n) {
  constexpr int64_t kBlock = 256;  // one long sum would lose digits of fp64
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    double sum = 0;
    for (int64_t j = begin; j < std::min(begin + kBlock, n); ++j) sum += double(a[j]) * double(b[j]);
    total += sum;
  }
  return total;
}

template <class T>
void write_scaled(const T* x, int64_t n, double factor, void* out) {
  kernels<T>().scale(x, T(factor), n, false, static_cast<T*>(out));
}

template <class T>
class Forward {
 public:
  Forward(const Layer* layers, int64_t n, DType weight_type, DType output_type, double eps, int64_t iterations,
          int threads, Workspace& workspace)
      : layers_(layers),
        weight_type_(weight_type),
        output_type_(output_type),
        eps_(eps),
        iterations_(iterations),
        states_(n),
        workers_(threads) {
    const Room room = room_for(layers, n, threads);
    stream_ = exceeds_last_level_cache(room.elements * (element_size(weight_type) + element_size(output_type)));
    workspace.reserve(room.bytes);
    for (int64_t j = 0; j < n; ++j) take_state(workspace, layers[j], states_[j]);
    for (Worker& worker : workers_) {
      worker.u = workspace.take<T>(room.columns);
      worker.v = workspace.take<T>(room.columns);
      worker.q = workspace.take<T>(room.positions);
      worker.scratch = workspace.take<T>(room.scratch);
      worker.rows.take(workspace, room.columns);
    }
  }

  // What the layers need, and of it `columns`, `positions` and `scratch` numbers for each thread.
  struct Room {
    int64_t columns = kConversion, positions = 0, scratch = 0, elements = 0, bytes = 0;
  };

  static Room room_for(const Layer* layers, int64_t n, int threads) {
    Room room;
    for (int64_t j = 0; j < n; ++j) {
      const Layer& layer = layers[j];
      const bool input_major = layer.order == Order::input_major;
      const int64_t kernel = std::min(layer.kernel, kLongKernel);
      room.bytes += state_bytes(layer);
      room.columns = std::max(room.columns, input_major ? tile_rows(layer, sizeof(T)) * layer.kernel
                                                        : std::min(layer.columns(), kPieceColumns));
      room.positions = std::max(room.positions, kMaxBlockRows * kernel);
      room.scratch = std::max(room.scratch, kMaxBlockRows * period_elements(kernel));
      room.elements += layer.size();
    }
    room.bytes += threads * (2 * Workspace::bytes<T>(room.columns) + Workspace::bytes<T>(room.positions) +
                             Workspace::bytes<T>(room.scratch) + RowBuffer<T>::bytes(room.columns));
    return room;
  }

  int64_t phases() const { return std::max<int64_t>(iterations_, 1) + 1; }

  template <class Add>
  void tiles(int64_t j, int64_t phase, Add add) const {
    const Layer& layer = layers_[j];
    if (phase + 1 < phases()) {
      add_tiles(layer.c_out, tile_rows(layer, sizeof(T)), add);
    } else if (!in_one_go(layer) && layer.output != nullptr) {
      // Last tile first: what the power iteration read last is the likeliest to be in the cache still.
      const int64_t count = (layer.size() + kTileElements - 1) / kTileElements;
      for (int64_t tile = count - 1; tile >= 0; --tile) {
        add(tile * kTileElements, std::min((tile + 1) * kTileElements, layer.size()));
      }
    }
  }

  void tile(const Ticket& ticket, int worker) {
    if (ticket.phase + 1 == phases()) {
      write_output(layers_[ticket.layer], states_[ticket.layer].factor, ticket.begin, ticket.end, workers_[worker]);
    } else {
      const Layer& layer = layers_[ticket.layer];
      TileReader<T>(layer, weight_type_, iterations_ > 0, ticket, states_[ticket.layer], workers_[worker]).read();
    }
  }

  void finish(int64_t j, int64_t phase, int worker) {
    if (phase + 1 == phases()) return;
    const Layer& layer = layers_[j];
    State& state = states_[j];
    const double sigma = iterations_ == 0 ? evaluate(layer, state) : update_vectors(layer, state);
    if (phase + 2 < phases()) return;
    for (int i = 0; i < (layer.two_sided ? 4 : 2); ++i) {
      std::memcpy(layer.snapshot[i], layer.vectors[i], vector_size(layer, i) * sizeof(T));
    }
    *static_cast<T*>(layer.sigma) = T(sigma);
    state.factor = T(multiplier<T>(layer, sigma));
    if (in_one_go(layer) && layer.output != nullptr)
      write_output(layer, state.factor, 0, layer.size(), workers_[worker]);
  }

 private:
  static constexpr int64_t kConversion = 4096;  // elements converted at a time
  using State = Sums<T>;
  using Worker = ForwardRoom<T>;

  bool in_one_go(const Layer& layer) const {
    return layer.size() * int64_t(sizeof(T)) <= kWholeLayerBytes && tile_count(layer, sizeof(T)) == 1 &&
           iterations_ <= 1;
  }

  static int64_t state_bytes(const Layer& layer) {
    const int64_t tiles = tile_count(layer, sizeof(T));
    const int64_t one_side = Workspace::bytes<T>(layer.c_out) + Workspace::bytes<T>(tiles * layer.columns());
    if (!layer.two_sided) return one_side;
    return one_side + Workspace::bytes<T>(layer.c_out * layer.kernel) + Workspace::bytes<T>(tiles * r_size(layer)) +
           Workspace::bytes<T>(layer.c_in);
  }
  static void take_state(Workspace& workspace, const Layer& layer, State& state) {
    const int64_t tiles = tile_count(layer, sizeof(T));
    state = {};
    state.s = workspace.take<T>(layer.c_out);
    state.t = workspace.take<T>(tiles * layer.columns());
    if (layer.two_sided) {
      state.q = workspace.take<T>(layer.c_out * layer.kernel);
      state.r = workspace.take<T>(tiles * r_size(layer));
      state.r_sum = workspace.take<T>(layer.c_in);
    }
  }

  static int64_t vector_size(const Layer& layer, int i) {
    const int64_t sizes[4] = {layer.c_out, layer.columns(), layer.c_in, layer.c_out * layer.kernel};
    return sizes[i];
  }

  // Adds the tiles' sums in their order, into the first.
  static void add_up(T* sums, int64_t tiles, int64_t n) {
    for (int64_t tile = 1; tile < tiles; ++tile) kernels<T>().add(sums + tile * n, n, sums);
  }

  // r of each column to r of each input channel.
  static void add_up_kernel(const Layer& layer, State& state) {
    const int64_t c_in = layer.c_in, kernel = layer.kernel;
    if (layer.order == Order::input_major) {
      std::copy_n(state.r, c_in, state.r_sum);
    } else if (kernel_major(layer)) {
      std::copy_n(state.r, c_in, state.r_sum);
      for (int64_t k = 1; k < kernel; ++k) kernels<T>().add(state.r + k * c_in, c_in, state.r_sum);
    } else {
      for (int64_t i = 0; i < c_in; ++i) {
        T sum = 0;
        for (int64_t k = 0; k < kernel; ++k) sum += state.r[i * kernel + k];
        state.r_sum[i] = sum;
      }
    }
  }

  double update_vectors(const Layer& layer, State& state) const {
    const int64_t n = layer.columns(), tiles = tile_count(layer, sizeof(T));
    add_up(state.t, tiles, n);
    const Direction out_side(norm(state.s, layer.c_out), norm(state.t, n), eps_);
    if (out_side.usable) {
      write_scaled(state.s, layer.c_out, out_side.first_factor, layer.vectors[0]);
      T* v_out = static_cast<T*>(layer.vectors[1]);
      if (kernel_major(layer)) {
        for (int64_t k = 0; k < layer.kernel; ++k) {
          for (int64_t i = 0; i < layer.c_in; ++i) {
            v_out[i * layer.kernel + k] = T(double(state.t[k * layer.c_in + i]) * out_side.second_factor);
          }
        }
      } else {
        write_scaled(state.t, n, out_side.second_factor, v_out);
      }
    }
    if (!layer.two_sided) return out_side.sigma;

    add_up(state.r, tiles, r_size(layer));
    add_up_kernel(layer, state);
    const int64_t q_size = layer.c_out * layer.kernel;
    const Direction in_side(norm(state.q, q_size), norm(state.r_sum, layer.c_in), eps_);
    if (in_side.usable) {
      write_scaled(state.r_sum, layer.c_in, in_side.second_factor, layer.vectors[2]);
      write_scaled(state.q, q_size, in_side.first_factor, layer.vectors[3]);
    }
    return (out_side.sigma + in_side.sigma) / 2;
  }

  // sigma = u W v with the stored vectors: u_out . s and v_in . q.
  static double evaluate(const Layer& layer, const State& state) {
    double sigma = inner(static_cast<const T*>(layer.vectors[0]), state.s, layer.c_out);
    if (layer.two_sided) {
      const T* v_in = static_cast<const T*>(layer.vectors[3]);
      sigma = (sigma + inner(v_in, state.q, layer.c_out * layer.kernel)) / 2;
    }
    return std::isfinite(sigma) ? sigma : std::numeric_limits<double>::quiet_NaN();
  }

  // The weight and its normalised copy have the same strides and no gaps, so that this is one line of numbers. They may
  // be the same.
  void write_output(const Layer& layer, T factor, int64_t begin, int64_t end, const Worker& worker) const {
    const std::byte* in = static_cast<const std::byte*>(layer.weight);
    std::byte* out = static_cast<std::byte*>(layer.output);
    if (in == out && factor == 1) return;
    if (weight_type_ == kDType<T> && output_type_ == kDType<T>) {
      kernels<T>().scale(reinterpret_cast<const T*>(in) + begin, factor, end - begin, stream_,
                         reinterpret_cast<T*>(out) + begin);
      if (stream_) kernels<T>().finish_streaming();
      return;
    }
    for (int64_t x = begin; x < end; x += kConversion) {
      const int64_t n = std::min(kConversion, end - x);
      kernels<T>().load(in + x * element_size(weight_type_), weight_type_, n, worker.rows.numbers);
      kernels<T>().scale(worker.rows.numbers, factor, n, false, worker.rows.numbers);
      kernels<T>().store(worker.rows.numbers, n, output_type_, out + x * element_size(output_type_));
    }
  }

  const Layer* layers_;
  DType weight_type_, output_type_;
  double eps_;
  int64_t iterations_;
  bool stream_ = false;
  std::vector<State> states_;
  std::vector<Worker> workers_;
};

template <class T>
void run(const Layer* layers, int64_t n, DType weight_type, DType output_type, double eps, int64_t iterations,
         int threads) {
  static thread_local Workspace workspace;
  Forward<T> work(layers, n, weight_type, output_type, eps, iterations, threads, workspace);
  Schedule schedule(n, work.phases(), [&](int64_t j, int64_t phase, auto add) { work.tiles(j, phase, add); });
  schedule.run(work, threads);
}

}  // namespace

int64_t forward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int threads) {
  const std::vector<Layer> layers = with_geometry(geometry, n);
  threads = useful_threads(threads, layers, weight_type);
  return weight_type == DType::f64 ? Forward<double>::room_for(layers.data(), n, threads).bytes
                                   : Forward<float>::room_for(layers.data(), n, threads).bytes;
}

int forward(const Geometry* geometry, int64_t n, void* const* pointers, void* snapshot, void* sigma, DType weight_type,
            DType output_type, const Law* laws, double eps, int64_t iterations, int threads) {
  try {
    const int64_t number = weight_type == DType::f64 ? 8 : 4;
    std::vector<Layer> layers = with_geometry(geometry, n);
    void* const* vector = pointers + 2 * n;
    for (int64_t j = 0; j < n; ++j) {
      Layer& layer = layers[j];
      layer.weight = pointers[j];
      layer.output = pointers[n + j];
      for (int i = 0; i < (layer.two_sided ? 4 : 2); ++i) layer.vectors[i] = *vector++;
      point_to_snapshot(snapshot, number, layer);
      layer.sigma = static_cast<std::byte*>(sigma) + j * number;
      layer.law = laws[j];
    }
    for (Layer& layer : layers) {
      if (layer.law.kind == LawKind::gain) layer.gain = *vector++;
    }
    threads = useful_threads(threads, layers, weight_type);
    largest_first(layers);
    if (weight_type == DType::f64) {
      run<double>(layers.data(), n, weight_type, output_type, eps, iterations, threads);
    } else {
      run<float>(layers.data(), n, weight_type, output_type, eps, iterations, threads);
    }
    return ok;
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
}

}  // namespace bssn::cpu

// Gradients of the weights, for all layers of a call, with u and v held constant:
//
//   dW = g (G - (<G, W> / sigma) S),   S = u_out v_out^T   or   (u_out v_out^T + u_in v_in^T) / 2,
//
// G = dL/d(normalised weight), g the weight's multiplier; a gain's gradient is <G, W> / sigma. First <G, W>, then row
// by row dW: G and W are read once, G once more. Where a bound is slack, dW = G, and <G, W> is not needed.
#include <new>
#include <vector>

#include "cpu.h"
#include "multiplier.h"
#include "pieces.h"
#include "schedule.h"

namespace bssn::cpu {
namespace {

template <class T>
class Backward {
 public:
  Backward(const Layer* layers, int64_t n, DType weight_type, DType grad_type, int threads, Workspace& workspace)
      : layers_(layers), weight_type_(weight_type), grad_type_(grad_type), states_(n), workers_(threads) {
    const Room room = room_for(layers, n, threads);
    stream_ = exceeds_last_level_cache(room.elements * (2 * element_size(weight_type) + element_size(grad_type)));
    workspace.reserve(room.bytes);
    for (int64_t j = 0; j < n; ++j) states_[j].inner = workspace.take<double>(chunk_count(layers[j]));
    for (Worker& worker : workers_) {
      worker.u = workspace.take<T>(room.columns);
      worker.v = workspace.take<T>(room.columns);
      worker.scratch = workspace.take<T>(room.scratch);
      worker.b = workspace.take<T>(room.columns);
      worker.in.take(workspace, room.columns);
      worker.out.take(workspace, room.columns);
    }
  }

  // What the layers need, and of it `columns` and `scratch` numbers for each thread.
  struct Room {
    int64_t columns = kConversion, scratch = 0, elements = 0, bytes = 0;
  };

  static Room room_for(const Layer* layers, int64_t n, int threads) {
    Room room;
    for (int64_t j = 0; j < n; ++j) {
      const Layer& layer = layers[j];
      room.bytes += Workspace::bytes<double>(chunk_count(layer));
      room.columns = std::max(room.columns, std::min(row_size(layer), kPieceColumns));
      room.scratch = std::max(room.scratch, period_elements(std::min(layer.kernel, kLongKernel)));
      room.elements += layer.size();
    }
    room.bytes += threads * (3 * Workspace::bytes<T>(room.columns) + Workspace::bytes<T>(room.scratch) +
                             2 * RowBuffer<T>::bytes(room.columns));
    return room;
  }

  static constexpr int64_t kPhases = 2;

  template <class Add>
  void tiles(int64_t j, int64_t phase, Add add) const {
    const Layer& layer = layers_[j];
    if (phase == 0) {
      add_tiles(layer.size(), kTileElements, add);
    } else if (!in_one_go(layer)) {
      add_tiles(row_count(layer), tile_rows(layer, sizeof(T)), add);
    }
  }

  void tile(const Ticket& ticket, int worker) {
    if (ticket.phase == 0) {
      add_inner(ticket, workers_[worker]);
    } else {
      write_rows_of_gradient(layers_[ticket.layer], states_[ticket.layer], ticket.begin, ticket.end, workers_[worker]);
    }
  }

  void finish(int64_t j, int64_t phase, int worker) {
    if (phase != 0) return;
    const Layer& layer = layers_[j];
    State& state = states_[j];
    const double sigma = double(*static_cast<const T*>(layer.sigma));
    double inner = 0;
    for (int64_t chunk = 0; chunk < chunk_count(layer); ++chunk) inner += state.inner[chunk];
    state.factor = multiplier<T>(layer, sigma);
    state.ratio = sigma == 0 || is_slack<T>(layer, sigma) ? 0 : inner / sigma;
    if (layer.grad_gain != nullptr) *static_cast<T*>(layer.grad_gain) = T(state.ratio);
    if (in_one_go(layer)) write_rows_of_gradient(layer, state, 0, row_count(layer), workers_[worker]);
  }

 private:
  static constexpr int64_t kConversion = 4096;  // elements converted at a time

  struct State {
    double* inner;         // <G, W> of each chunk
    double factor, ratio;  // g, <G, W> / sigma
  };
  struct Worker {
    T *u, *v, *scratch, *b;
    RowBuffer<T> in, out;
  };

  static bool in_one_go(const Layer& layer) { return 2 * layer.size() * int64_t(sizeof(T)) <= kWholeLayerBytes; }

  static int64_t chunk_count(const Layer& layer) { return (layer.size() + kTileElements - 1) / kTileElements; }

  // n numbers of a tensor from element x on, in place if they are of the compute type.
  static const T* read(const void* base, DType type, int64_t x, int64_t n, T* room) {
    const std::byte* source = static_cast<const std::byte*>(base) + x * element_size(type);
    if (type == kDType<T>) return reinterpret_cast<const T*>(source);
    kernels<T>().load(source, type, n, room);
    return room;
  }

  // G has the strides of W, so that both are lines of numbers in the same order.
  void add_inner(const Ticket& ticket, Worker& worker) {
    const Layer& layer = layers_[ticket.layer];
    double sum = 0;
    const bool needed = !is_slack<T>(layer, double(*static_cast<const T*>(layer.sigma)));
    for (int64_t x = ticket.begin; needed && x < ticket.end; x += kConversion) {
      const int64_t n = std::min(kConversion, ticket.end - x);
      const T* g = read(layer.grad, grad_type_, x, n, worker.in.numbers);
      const T* w = read(layer.weight, weight_type_, x, n, worker.out.numbers);
      sum += kernels<T>().inner(g, w, n);
    }
    states_[ticket.layer].inner[ticket.tile] = sum;
  }

  void write_rows_of_gradient(const Layer& layer, const State& state, int64_t begin, int64_t end,
                              const Worker& worker) const {
    for_pieces(layer, [&](const Piece& piece) { write_pieces(layer, state, begin, end, piece, worker); });
    if (stream_) kernels<T>().finish_streaming();
  }

  void write_pieces(const Layer& layer, const State& state, int64_t begin, int64_t end, const Piece& piece,
                    const Worker& worker) const {
    const int64_t n = piece.size(), k_size = piece.positions;
    const Sides sides = sides_of(layer, piece, worker);
    const double share = state.factor * state.ratio * (layer.two_sided ? 0.5 : 1);
    const T factor = T(state.factor);
    const bool in_place = direct<T>(layer, weight_type_);
    const int64_t block = block_rows(layer);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row);
      const T* grads[kMaxBlockRows];
      read_rows(layer, layer.grad, grad_type_, row, count, piece, worker.in, grads);
      for (int64_t j = 0; j < count; ++j) {
        T* out = in_place ? static_cast<T*>(layer.output) + (row + j) * row_size(layer) + piece.first
                          : worker.out.numbers + j * n;
        if (sides.v_other != nullptr) {
          const T* v_other = sides.v_other + (row + j) * layer.kernel + piece.position;
          for (int64_t k = 0; k < k_size; ++k) worker.b[k] = T(share * double(v_other[k]));
        }
        const T a = sides.u_row == nullptr ? T(0) : T(share * double(sides.u_row[row + j]));
        if (piece.long_kernel && sides.v_other != nullptr) {  // one channel: the positions are the columns
          kernels<T>().grad_row(grads[j], factor, a, sides.v, sides.u_other, worker.b, n, 1, true, false,
                                worker.scratch, out);
        } else {
          kernels<T>().grad_row(grads[j], factor, a, sides.v, worker.b, sides.u_other, n, k_size, piece.kernel_major,
                                stream_ && in_place, worker.scratch, out);
        }
      }
      if (!in_place) write_rows(layer, worker.out, row, count, piece, weight_type_, layer.output);
    }
  }

  // S of a row is u_row[row] v + v_other[row, k] u_other, where row is o and `other` the input side; in input-major
  // layers row is i and `other` the output side. u_row or v_other is missing if that side has no part in S.
  struct Sides {
    const T *u_row, *v, *v_other, *u_other;
  };

  static Sides sides_of(const Layer& layer, const Piece& piece, const Worker& worker) {
    const T* const u_out = static_cast<const T*>(layer.snapshot[0]);
    const T* const u_in = static_cast<const T*>(layer.snapshot[2]);
    const T* const v_in = static_cast<const T*>(layer.snapshot[3]);
    if (layer.order == Order::input_major) {
      const T* u = over_columns(piece, u_out, worker.u);
      return {u_in, layer.two_sided ? v_in + piece.first : u, static_cast<const T*>(layer.snapshot[1]), u};
    }
    const T* v = in_row_order(layer, piece, layer.snapshot[1], worker.v);
    return {u_out, v, v_in, over_columns(piece, u_in, worker.u)};
  }

  const Layer* layers_;
  DType weight_type_, grad_type_;
  bool stream_ = false;
  std::vector<State> states_;
  std::vector<Worker> workers_;
};

template <class T>
void run(const Layer* layers, int64_t n, DType weight_type, DType grad_type, int threads) {
  static thread_local Workspace workspace;
  Backward<T> work(layers, n, weight_type, grad_type, threads, workspace);
  Schedule schedule(n, work.kPhases, [&](int64_t j, int64_t phase, auto add) { work.tiles(j, phase, add); });
  schedule.run(work, threads);
}

}  // namespace

int64_t backward_workspace(const Geometry* geometry, int64_t n, DType weight_type, int threads) {
  const std::vector<Layer> layers = with_geometry(geometry, n);
  threads = useful_threads(threads, layers, weight_type);
  return weight_type == DType::f64 ? Backward<double>::room_for(layers.data(), n, threads).bytes
                                   : Backward<float>::room_for(layers.data(), n, threads).bytes;
}

int backward(const Geometry* geometry, int64_t n, void* const* pointers, void* snapshot, DType weight_type,
             DType grad_type, const Law* laws, void* grad_gains, int threads) {
  try {
    std::vector<Layer> layers = with_geometry(geometry, n);
    const int64_t number = weight_type == DType::f64 ? 8 : 4;
    int64_t gains = 0;
    for (int64_t j = 0; j < n; ++j) {
      Layer& layer = layers[j];
      layer.weight = pointers[j];
      layer.grad = pointers[n + j];
      layer.output = pointers[2 * n + j];
      layer.sigma = pointers[3 * n + j];
      layer.law = laws[j];
      if (layer.law.kind == LawKind::gain) {
        layer.gain = pointers[4 * n + gains];
        layer.grad_gain = static_cast<std::byte*>(grad_gains) + gains++ * number;
      }
      point_to_snapshot(snapshot, number, layer);
    }
    threads = useful_threads(threads, layers, weight_type);
    largest_first(layers);
    if (weight_type == DType::f64) {
      run<double>(layers.data(), n, weight_type, grad_type, threads);
    } else {
      run<float>(layers.data(), n, weight_type, grad_type, threads);
    }
    return ok;
  } catch (const std::bad_alloc&) {
    return out_of_memory;
  }
}

}  // namespace bssn::cpu

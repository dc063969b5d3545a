// A block of GPU threads, as the tiles see it.
#pragma once

#include "reductions.h"

namespace bssn::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

template <int Threads>
class DeviceBlock {
 public:
  static constexpr int kThreads = Threads;
#if defined(__CUDA_ARCH__)
  static constexpr bool kHasClusters = clusters_in_code(__CUDA_ARCH__ / 10),
                        kKeeps = keeping_in_code(__CUDA_ARCH__ / 10);
#else
  static constexpr bool kHasClusters = true, kKeeps = true;
#endif

  // A thread's registers; on the CPU, an array over the threads.
  template <class T>
  struct PerThread {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
  };

  // Runs f(thread) for all threads, then a barrier.
  template <class F>
  __device__ __forceinline__ void each(F f) {
    f(int(threadIdx.x));
    __syncthreads();
  }

  // The same, without a barrier.
  template <class F>
  __device__ __forceinline__ void all(F f) {
    f(int(threadIdx.x));
  }

  // The same for what may be done before a wait: it reads nothing that other blocks write, and writes to PerThread
  // alone.
  template <class F>
  __device__ __forceinline__ void prepare(F f) {
    f(int(threadIdx.x));
  }

  // Runs f() for the thread that also publishes and arrives. No barrier.
  template <class F>
  __device__ __forceinline__ void lead(F f) {
    if (threadIdx.x == 0) f();
  }

  // What that thread has written to shared memory before the last barrier.
  template <class T>
  __device__ __forceinline__ T told(uint32_t offset) {
    return *shared<T>(offset);
  }

  __device__ __forceinline__ void sync() { __syncthreads(); }

  // Adds up N numbers of each thread, given by get(thread, x), over the lanes of a warp whose numbers are equal modulo
  // Classes. Each class's sums go to out(warp)[class][N].
  template <class T, int N, int Classes, class Get, class Out>
  __device__ __forceinline__ void sum_lanes(Get get, Out out) {
    const int lane = int(threadIdx.x) % 32;
    T x[N] = {};
    get(int(threadIdx.x), x);
    int index = 0, count = N;
    bool writes = true;
    add_lanes<T, N, 16, Classes>(x, lane, index, count, writes, out(int(threadIdx.x) / 32) + lane % Classes * N);
  }

  // Adds those sums up over `warps` warps that share their rows, from first_warp(thread) on; to values(thread): of each
  // row's `Numbers` the first for all classes together, and the others of the lane's class; then number lane % all of
  // class lane / all.
  template <int Rows, int Numbers, int Classes, class First, class In, class Values>
  __device__ __forceinline__ void sum_warps(int warps, First first_warp, In in, Values values) {
    constexpr int kAll = Rows * Numbers;
    static_assert(kAll * Classes <= 32, "a lane for each");
    const int lane = int(threadIdx.x) % 32;
    const float* const parts = in(first_warp(int(threadIdx.x))) + (lane < kAll * Classes ? lane : 0);
    float sum = 0;
    BSSN_UNROLL_BY(4)
    for (int w = 0; w < warps; ++w) sum += parts[w * kAll * Classes];
    float* const to = values(int(threadIdx.x));
    BSSN_UNROLL
    for (int j = 0; j < kAll; ++j) {
      if (j % Numbers == 0) {
        float first = 0;
        BSSN_UNROLL
        for (int c = 0; c < Classes; ++c) first += __shfl_sync(~0u, sum, c * kAll + j);
        to[j] = first;
      } else {
        to[j] = __shfl_sync(~0u, sum, lane % Classes * kAll + j);
      }
    }
    to[kAll] = sum;
  }

  template <class T>
  __device__ __forceinline__ T* shared(uint32_t offset) {
    return reinterpret_cast<T*>(dynamic_shared + offset);
  }

  // Ends the calling thread's current group of copies into shared memory.
  __device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // Until at most `pending` of the calling thread's groups are on their way.
  __device__ __forceinline__ void wait_for_copies(int pending) {
#if __CUDA_ARCH__ >= 800
    wait_for_groups<0>(pending);
#endif
  }

  // Publishes all that the block has written, after a barrier, and counts it.
  __device__ __forceinline__ void publish(uint32_t* counter) {
    if (threadIdx.x == 0) asm volatile("red.add.release.gpu.global.u32 [%0], 1;" ::"l"(counter) : "memory");
  }

  // The same, and returns the count before, to all threads.
  // What others published before their arrival can be read afterwards.
  __device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
    if (threadIdx.x == 0) *word() = add_acquire_release(counter);
    return broadcast();
  }

  // Sets a word and returns what it was before, to all threads. If another block had set it, what that one had read or
  // written before can be read afterwards.
  __device__ __forceinline__ uint32_t exchange(uint32_t* address, uint32_t value) {
    if (threadIdx.x == 0) *word() = exchange_acquire_release(address, value);
    return broadcast();
  }

  // Until the counter has reached `value`. What was published before can be read afterwards.
  __device__ __forceinline__ void wait(const uint32_t* counter, uint32_t value) {
    if (threadIdx.x == 0) {
      while (load_acquire(counter) < value) __nanosleep(20);
    }
    __syncthreads();
  }

  // Asks for the block's next ticket; hand_out_ticket gives it to all threads. The answer takes a while, so it is asked
  // for before the work on the ticket in hand and lies in a register until then, for nothing to wait for it. That is
  // safe: the smaller ticket is finished first.
  __device__ __forceinline__ void ask_for_ticket(uint32_t* counter) {
    if (threadIdx.x == 0) ticket_ = atomicAdd(counter, 1u);
  }

  __device__ __forceinline__ uint32_t hand_out_ticket() {
    if (threadIdx.x == 0) *word() = ticket_;
    return broadcast();
  }

  // Of a launch in clusters: the block's, how many there are, and the block's number in its own.
  __device__ __forceinline__ uint32_t cluster() const { return special_register<0>(); }
  __device__ __forceinline__ uint32_t clusters() const { return special_register<1>(); }
  __device__ __forceinline__ int rank() const { return int(special_register<2>()); }

  // The cluster's barrier, in two parts: all that its blocks have written before they arrive can be read after waiting.
  __device__ __forceinline__ void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // Shared memory of a block of the cluster.
  template <class T>
  __device__ __forceinline__ const T* remote(uint32_t offset, int rank) {
    const unsigned char* there = dynamic_shared + offset;
#if __CUDA_ARCH__ >= 900
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(dynamic_shared + offset), "r"(rank));
#endif
    return reinterpret_cast<const T*>(there);
  }

  // Four numbers at a multiple of 16 bytes, past the first-level cache, for what is read once.
  __device__ __forceinline__ Pack<float, 4> load_l2(const float* address) {
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(address));
    return {{words.x, words.y, words.z, words.w}};
  }

 private:
  uint32_t ticket_ = 0;  // thread 0's

  __device__ __forceinline__ uint32_t* word() { return reinterpret_cast<uint32_t*>(dynamic_shared); }

  // Two barriers: all threads read the word after it was written and before it is written again.
  __device__ __forceinline__ uint32_t broadcast() {
    __syncthreads();
    const uint32_t value = *word();
    __syncthreads();
    return value;
  }

  // The instruction takes a constant; a smaller one waits for more.
  template <int N>
  static __device__ __forceinline__ void wait_for_groups(int pending) {
#if __CUDA_ARCH__ >= 800
    if constexpr (N < 7) {
      if (pending > N) return wait_for_groups<N + 1>(pending);
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
  }

  // In each round a lane gives half of its numbers to another and adds what it gets to the other half; once one is
  // left, all of it. In the end a lane has the sums of numbers from `index` on, `count` of them.
  template <class T, int N, int Offset, int Classes>
  static __device__ __forceinline__ void add_lanes(T* x, int lane, int index, int count, bool writes, T* out) {
    if constexpr (Offset >= Classes) {
      const bool upper = (lane & Offset) != 0;
      constexpr int kHalf = (N + 1) / 2;
      if constexpr (N > 1) {
        BSSN_UNROLL
        for (int j = 0; j < kHalf; ++j) {
          const T low = x[j], high = j + kHalf < N ? x[j + kHalf] : T(0);
          x[j] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, Offset);
        }
        index += upper ? kHalf : 0;
        count = upper ? (count > kHalf ? count - kHalf : 0) : (count < kHalf ? count : kHalf);
      } else {
        x[0] += __shfl_xor_sync(~0u, x[0], Offset);
        writes = writes && !upper;
      }
      add_lanes<T, kHalf, Offset / 2, Classes>(x, lane, index, count, writes, out);
    } else {
      BSSN_UNROLL
      for (int j = 0; j < N; ++j) {
        if (writes && j < count) out[index + j] = x[j];
      }
    }
  }

  // What thread 0 releases includes what the block's other threads wrote before the last barrier.
  static __device__ __forceinline__ uint32_t add_acquire_release(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
  }

  static __device__ __forceinline__ uint32_t exchange_acquire_release(uint32_t* address, uint32_t value) {
    uint32_t before;
    asm volatile("atom.exch.acq_rel.gpu.global.b32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
  }

  // 0: %clusterid, 1: %nclusterid, 2: %cluster_ctarank. Without clusters each block is one.
  template <int Which>
  static __device__ __forceinline__ uint32_t special_register() {
    uint32_t value = Which == 0 ? blockIdx.x : Which == 1 ? gridDim.x : 0u;
#if __CUDA_ARCH__ >= 900
    if constexpr (Which == 0) {
      asm("mov.u32 %0, %%clusterid.x;" : "=r"(value));
    } else if constexpr (Which == 1) {
      asm("mov.u32 %0, %%nclusterid.x;" : "=r"(value));
    } else {
      asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
    }
#endif
    return value;
  }

  static __device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
  }
};

}  // namespace bssn::cuda

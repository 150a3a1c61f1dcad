// Threads, memory, and the two products of register tiles that everything else is made of.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Index = int64_t;
using Map = ffi::Buffer<ffi::F32, 4>;
using Places = ffi::Buffer<ffi::S8, 4>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using MapResult = ffi::Result<Map>;
using VectorResult = ffi::Result<Vector>;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 14;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 12;
#endif
constexpr int PANEL = 2 * LANES;
constexpr Index CACHE = 160 * 1024;  // floats of packed pixels at once: a third of a usual second-level cache

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
// The first n of LANES numbers at p, or all; the rest is 0.
inline Lanes load_first(const float* p, Index n) {
  if (n >= LANES) return load(p);
  float some[LANES] = {};
  std::memcpy(some, p, 4 * n);
  return load(some);
}
inline Lanes positive(Lanes v) {
  // A comparison is all ones where it holds. NaN is kept, as jax.numpy.maximum keeps it.
  return (Lanes)((Bits)v & ~(Bits)(v <= 0));
}
inline Lanes where_positive(Lanes by, Lanes v) { return (Lanes)((Bits)v & (Bits)(by > 0)); }
inline Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }
// Distance of packed pixels: an odd number of cache lines, so that those of a tile lie in different sets.
inline Index pitch(Index channels) { return (round_up(channels, 16) / 16 | 1) * 16; }

// ---------------------------------------------------------------------------------------------------- threads

inline Index threads_of(const ffi::ThreadPool& pool) { return std::max<Index>(1, pool.num_threads()); }

struct Jobs {
  std::atomic<Index> next{0};
  Index count, done = 0;
  std::mutex mutex;
  std::condition_variable finished;
};

// f(0), ..., f(count - 1) on the pool's threads and this one. This one waits only for what has begun elsewhere, so a
// pool whose threads all wait here can't come to a stop.
template <typename F>
void parallel(ffi::ThreadPool& pool, Index count, const F& f) {
  if (count <= 1 || pool.num_threads() <= 1) {
    for (Index i = 0; i < count; i++) f(i);
    return;
  }
  auto jobs = std::make_shared<Jobs>();
  jobs->count = count;
  auto work = [jobs, &f] {
    Index mine = 0;
    for (Index i; (i = jobs->next++) < jobs->count; mine++) f(i);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(jobs->mutex);
    if ((jobs->done += mine) == jobs->count) jobs->finished.notify_one();
  };
  for (Index i = 1; i < std::min<Index>(count, pool.num_threads()); i++) {
    auto again = work;
    pool.Schedule(std::move(again));
  }
  work();
  std::unique_lock<std::mutex> lock(jobs->mutex);
  jobs->finished.wait(lock, [&] { return jobs->done == jobs->count; });
}

// Memory of a thread that keeps its size, aligned to a cache line; `slot` tells the pieces of one function apart.
float* scratch(int slot, Index floats) {
  struct Piece {
    std::unique_ptr<float, void (*)(void*)> memory{nullptr, std::free};
    Index floats = 0;
  };
  thread_local Piece pieces[4];
  Piece& piece = pieces[slot];
  if (piece.floats < floats) {
    piece.memory.reset(static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats, 64))));
    piece.floats = floats;
  }
  return piece.memory.get();
}

// ------------------------------------------------------------------------------------------------------ tiles

// out[r][n] = sum over taps t and channels k of x[taps[t] + r * pixel + k] * w[t][k][n], for R pixels and PANEL n.
template <int R>
void product_tile(const float* x, Index pixel, const Index* taps, int count, Index channels, const float* w, float* out,
                  Index out_pixel) {
  Lanes sums[R][2] = {};
  for (int t = 0; t < count; t++) {
    const float* p = x + taps[t];
    for (Index k = 0; k < channels; k++, p++, w += PANEL) {
      const Lanes w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        // Written so that every third pixel has a pointer, and the two after it are offsets from that.
        const float value = (p + r / 3 * 3 * pixel)[r % 3 * pixel];
        sums[r][0] += value * w0;
        sums[r][1] += value * w1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    store(out + r * out_pixel, sums[r][0]);
    store(out + r * out_pixel + LANES, sums[r][1]);
  }
}

// out[r][n] += sum over rows and columns of x[..][r] * y[..][n], for R channels and PANEL n.
template <int R>
void outer_tile(const float* x, Index x_pixel, Index x_row, const float* y, Index y_pixel, Index y_row, Index rows,
                Index columns, float* out, Index out_channel) {
  Lanes sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    sums[r][0] = load(out + r * out_channel);
    sums[r][1] = load(out + r * out_channel + LANES);
  }
  for (Index i = 0; i < rows; i++) {
    const float *p = x + i * x_row, *q = y + i * y_row;
    for (Index j = 0; j < columns; j++, p += x_pixel, q += y_pixel) {
      const Lanes y0 = load(q), y1 = load(q + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        sums[r][0] += p[r] * y0;
        sums[r][1] += p[r] * y1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    store(out + r * out_channel, sums[r][0]);
    store(out + r * out_channel + LANES, sums[r][1]);
  }
}

template <template <int> class F, int R = TILE, typename... A>
inline void by_size(Index r, A... a) {
  if (r == R) return F<R>::run(a...);
  if constexpr (R > 1) by_size<F, R - 1>(r, a...);
}
template <int R>
struct Product {
  template <typename... A>
  static void run(A... a) { product_tile<R>(a...); }
};
template <int R>
struct Outer {
  template <typename... A>
  static void run(A... a) { outer_tile<R>(a...); }
};

// f(first, size) for n things in as few groups of at most TILE as can be, of nearly equal size.
template <typename F>
inline void in_tiles(Index n, const F& f) {
  const Index groups = (n + TILE - 1) / TILE;
  for (Index g = 0; g < groups; g++) f(n * g / groups, n * (g + 1) / groups - n * g / groups);
}

}  // namespace
